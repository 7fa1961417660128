"""FSDP's two collectives over gloo, as direct messages between the ranks (comm.direct_messages).

Idea: gloo's all-gather and reduce-scatter copy more than they send. On two processes of one machine they take 2.6 and
3.6 times as long as sending each rank its part and adding up what arrives (64 MB; torch 2.13), and that decides the
speed of a CPU run. Messages are bytes, so that dtypes that gloo does not know can be sent too. Sums run in the order of
the ranks, the same in every run. On GPUs FSDP keeps NCCL's collectives.

Bytes: the collective's. Over N ranks a rank sends and receives N - 1 messages, each of 1/N of the larger side.

Proof: tests/test_gloo.py::test_direct_messages_equal_fsdp_collectives.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def use_direct_messages(model: nn.Module) -> None:
    """Replaces the collectives of each FSDP module in model. Does nothing on GPUs, whose backend is not gloo alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and dist.get_backend() == "gloo":
            module.set_custom_all_gather(DirectAllGather())
            module.set_custom_reduce_scatter(DirectReduceScatter())


class _Comm:
    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class DirectAllGather(_Comm):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op=False):
        """Fills output [n * ranks] with every rank's input [n]. It has finished when it returns, even with async_op."""
        parts = output_tensor.view(group.size(), -1)
        mine = parts[group.rank()]
        if mine.data_ptr() != input_tensor.data_ptr():  # FSDP's input is usually a view of its output
            mine.copy_(input_tensor)
        _exchange([mine] * group.size(), parts, group)


class DirectReduceScatter(_Comm):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op, async_op=False):
        """Fills output [n] with the sum over ranks of the part of their input [n * ranks] that belongs to this rank."""
        assert op == dist.ReduceOp.SUM, "every gradient reduction is a plain sum"
        parts = input_tensor.view(group.size(), -1)
        arrived = [part if i == group.rank() else torch.empty_like(part) for i, part in enumerate(parts)]
        _exchange(parts, arrived, group)
        torch.add(arrived[0], arrived[1], out=output_tensor)
        for part in arrived[2:]:
            output_tensor.add_(part)


def _exchange(sent, received, group: dist.ProcessGroup) -> None:
    """Sends sent[i] to each other rank i, and receives received[i] from it, all at the same time."""
    peers = [rank for rank in range(group.size()) if rank != group.rank()]
    works = [dist.irecv(received[i].view(torch.uint8), group=group, group_src=i) for i in peers]
    works += [dist.isend(sent[i].view(torch.uint8), group=group, group_dst=i) for i in peers]
    for work in works:
        work.wait()
