"""FSDP's two collectives over gloo, as direct messages between the ranks (comm.direct_messages).

Idea: gloo's own all-gather and reduce-scatter copy more than they send. On two processes of one machine they take 2.6
and 3.6 times as long as sending each rank its part and adding up what arrives (64 MB; torch 2.13), and that decides the
speed of a CPU run. Messages are bytes, so that dtypes that gloo does not know can be sent too. Sums run in the order of
the ranks, so that every run adds in the same order. On GPUs FSDP keeps NCCL's collectives.

Bytes: the collective's. Over N ranks a rank sends and receives N - 1 messages, each of 1/N of the larger side.

Proof: tests/test_gloo.py::test_direct_messages_equal_fsdp_collectives.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def use_direct_messages(model: nn.Module) -> None:
    """Replaces the collectives of each FSDP module in model whose weights are sharded over several ranks on gloo. Does
    nothing on GPUs, and for a model that is not sharded."""
    for module in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        # A nested FSDP module communicates its weights itself, and those of experts may be sharded over another mesh.
        inner = [m for m in module.modules() if isinstance(m, FSDPModule) and m is not module]
        nested = {weight for m in inner for weight in m.parameters()}
        weight = next((weight for weight in module.parameters() if weight not in nested), None)
        if weight is not None and _is_sharded_on_gloo(weight):
            module.set_custom_all_gather(DirectAllGather())
            module.set_custom_reduce_scatter(DirectReduceScatter())


def _is_sharded_on_gloo(weight: DTensor) -> bool:
    """Whether FSDP shards a weight over several ranks that communicate through gloo."""
    mesh = weight.device_mesh
    # FSDP's axes come first: weights are replicated on dp_replicate, and sharded on the next axis, even over one rank.
    axis = next(i for i, placement in enumerate(weight.placements) if not placement.is_replicate())
    return mesh.device_type == "cpu" and mesh.size(axis) > 1 and dist.get_backend(mesh.get_group(axis)) == "gloo"


class _Comm:
    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class DirectAllGather(_Comm):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False):
        """Fills output [n * ranks] with every rank's input [n]. Has finished when it returns, even with async_op: a CPU
        has no stream on which it could go on."""
        parts = output_tensor.view(group.size(), -1)
        own = parts[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():  # FSDP's input is usually a view of its output
            own.copy_(input_tensor)
        _exchange(dict.fromkeys(_peers(group), own), {peer: parts[peer] for peer in _peers(group)}, group)


class DirectReduceScatter(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op, async_op: bool = False
    ):
        """Fills output [n] with the sum over ranks of the part of their input [n * ranks] that belongs to this rank."""
        assert op == dist.ReduceOp.SUM, "every gradient reduction is a plain sum"
        parts = input_tensor.view(group.size(), -1)
        arrived = {peer: torch.empty_like(output_tensor) for peer in _peers(group)}
        _exchange({peer: parts[peer] for peer in _peers(group)}, arrived, group)
        arrived[group.rank()] = parts[group.rank()]
        torch.add(arrived[0], arrived[1], out=output_tensor)
        for rank in range(2, group.size()):
            output_tensor.add_(arrived[rank])


def _peers(group: dist.ProcessGroup) -> list[int]:
    return [rank for rank in range(group.size()) if rank != group.rank()]


def _exchange(sent: dict[int, Tensor], received: dict[int, Tensor], group: dist.ProcessGroup) -> None:
    """Sends a message to each other rank and receives one from it, all at the same time. Both dicts are by rank."""
    works = [dist.irecv(t.view(torch.uint8), group=group, group_src=rank) for rank, t in received.items()]
    works += [dist.isend(t.view(torch.uint8), group=group, group_dst=rank) for rank, t in sent.items()]
    for work in works:
        work.wait()
