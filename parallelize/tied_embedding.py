"""The embedding that two pipeline stages use: as embedding on the first, and on the last as the head (tied embeddings)
or for multi-token prediction.

Idea: the first stage owns the weight, and the last stage has a copy. After backward the copy's gradient is added to the
owner's. After the optimizer step the owner's value is sent to the copy. So grad norm, optimizer and checkpoint know of
one weight.

Messages per step: the gradient of a rank's shard to the first stage, and its value back, in the weight's dtype. Where
both stages are on one rank (a V schedule), nothing is sent.

Proof: tests/test_parity.py::test_layout_equals_one_process (layouts with a pipeline and "tied" or "V3"); the messages:
tests/test_communication.py::test_pipeline_messages_equal_formula.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from collectives import local_tensor
from parallelize.pipeline import V_SCHEDULES


class TiedEmbedding:
    """The weight and its copy, where they are on this rank. Does nothing where there is no copy. `reduce_gradient` and
    `broadcast_weight` are collectives of the pp axis."""

    def __init__(self, stages: list[nn.Module], mesh: DeviceMesh, *, schedule: str):
        self.owner = self.copy = None
        self.group, self.owner_rank = mesh.get_group(), 0
        self.copy_rank = 0 if schedule in V_SCHEDULES else mesh.size() - 1
        args = stages[0].args
        if mesh.size() == 1 or not (args.tie_embeddings or args.n_mtp_layers):
            return
        for stage in stages:
            if stage.output is not None:
                self.copy = stage.output.weight if args.tie_embeddings else stage.tok_embeddings.weight
            elif stage.tok_embeddings is not None:
                self.owner = stage.tok_embeddings.weight

    def unique_parameters(self, stages: list[nn.Module]) -> dict[str, nn.Parameter]:
        """The parameters of this rank's stages by name, without the copy."""
        named = [item for stage in stages for item in stage.named_parameters()]
        return {name: parameter for name, parameter in named if parameter is not self.copy}

    @torch.no_grad()
    def reduce_gradient(self) -> None:
        """Adds the copy's gradient to the owner's, and drops it."""
        owner, copied = (None if p is None else local_tensor(p.grad) for p in (self.owner, self.copy))
        arrived = self._send(copied, owner, self.copy_rank, self.owner_rank)
        if owner is not None:
            owner += arrived
        if self.copy is not None:
            self.copy.grad = None

    @torch.no_grad()
    def broadcast_weight(self) -> None:
        """Sets the copy's value to the owner's."""
        owner, copied = (None if p is None else local_tensor(p) for p in (self.owner, self.copy))
        arrived = self._send(owner, copied, self.owner_rank, self.copy_rank)
        if copied is not None:
            copied.copy_(arrived)

    def _send(self, source: Tensor | None, like: Tensor | None, source_rank: int, target_rank: int) -> Tensor | None:
        """Moves `source` from its rank to the rank where `like` has its shape. Other ranks do nothing."""
        if source is not None and like is not None:
            return source
        arrived = None if like is None else torch.empty_like(like)
        if source is not None:
            dist.send(source.contiguous(), group=self.group, group_dst=target_rank)
        if arrived is not None:
            dist.recv(arrived, group=self.group, group_src=source_rank)
        return arrived
