"""Expert parallelism (GShard, Lepikhin et al. 2020, arXiv:2006.16668; DeepSeek-V3, arXiv:2412.19437, section 3.2).

Idea: each rank of the ep axis holds some of the experts, whole, and the tokens travel. Every rank sends each copy of
its tokens to the rank that has the copy's expert (dispatch), and gets the result back (combine). The MoE layer
(`model/moe.py`) is written for one device: dispatch and combine are hooks around its experts.

Expert parallelism borrows its ranks from dp_shard x cp x tp, whose ranks all have different tokens (tensor parallelism
shards the sequence outside of attention). So it adds no axis, and tensor parallelism never cuts experts. FSDP shards an
expert over the ranks that are left, efsdp = dp_shard x cp x tp / E_p:

    8 ranks as dp_shard 4 x tp 2, ep 4:   rank         0      1      2      3      4      5      6      7
                                          tokens       a      b      c      d      e      f      g      h
                                          experts      0,1    2,3    4,5    6,7    0,1    2,3    4,5    6,7    (of 8)
                                          FSDP keeps   half of rank 0's on 0 and on 4, of rank 1's on 1 and on 5, ...

Per layer and microbatch, for a rank's R rows (its tokens x top_k) of dim D, E experts, E_p = degree:

    forward     1 all-to-all of E counts (int64): a rank receives 8 E (E_p-1)/E_p bytes
                2 all-to-alls of rows, in param_dtype: dispatch brings the rows of this rank's experts from the other
                ranks, combine brings the results of its rows back; R D (E_p-1)/E_p elements each if every expert gets
                the same number
    backward    2 all-to-alls of rows, as large: the gradients of combine and of dispatch
                where the whole block is recomputed, the forward's 3 again

The balance loss is of whole sequences: one all-reduce of batch x E counts (int64) over cp x tp, per layer and forward.
training/balance.py sums counts once a step. fsdp.py communicates the weights of the E / E_p experts over efsdp.

The CPU waits once per layer and forward, for the router and the exchange of counts, because it must know how many rows
arrive; backward knows. While it waits it cannot issue the next all-gather of weights, so fsdp.py issues that at the
block's beginning. No token is ever dropped: buffers have exactly the size that is needed, and a rank may receive no
row.

Proof: tests/test_one_step.py::test_expert_parallel_equals_one_process; the bytes:
tests/test_communication_of_mixtures.py::test_expert_parallel_bytes_equal_formula,
tests/test_communication_of_mixtures.py::test_expert_parallel_bytes_follow_real_routing.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module

from model.moe import Permute, inverse_permutation
from parallelize.styles import AllReduce, LocalWeights, Plan, apply_plan
from torch_private import all_to_all_single_autograd


class ExpertParallel(LocalWeights):
    """Shards routed experts by number over the ep axis; dispatches their input and combines their output."""

    def __init__(self):
        super().__init__(Shard(0))

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        dispatcher = TokenDispatcher(mesh)
        return distribute_module(
            super()._apply(module, mesh),
            mesh,
            input_fn=lambda _, inputs, mesh: dispatcher.dispatch(*inputs),
            output_fn=lambda _, routed_output, mesh: dispatcher.combine(routed_output),
        )


PLAN: Plan = {"moe.experts": ExpertParallel()}


def parallelize_experts(stage: nn.Module, mesh: DeviceMesh, sequence: DeviceMesh) -> None:
    """Spreads a stage's routed experts over mesh (ep), in place. sequence (cp x tp) are the ranks that share sequences:
    the balance loss sums its counts over them."""
    for block in stage.blocks().values():
        if block.moe is not None and sequence.size() > 1 and stage.args.balance_loss_weight > 0:
            block.moe.router.reduce_counts = AllReduce(sequence)
        if block.moe is not None and mesh.size() > 1:
            apply_plan(block, mesh, PLAN)


class TokenDispatcher:
    """Dispatches the rows of one layer to their experts' ranks, and combines the results."""

    def __init__(self, mesh: DeviceMesh):
        self.group, self.size = mesh.get_group(), mesh.size()

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Sends rows [R, D], sorted by expert, with the number of rows of each expert [E], and returns the same for
        this rank's experts, from all ranks."""
        with torch.no_grad():
            sent_PE = counts.view(self.size, -1)
            received_PE = torch.empty_like(sent_PE)
            dist.all_to_all_single(received_PE, sent_PE, group=self.group)
            self.sent, self.received = to_lists(sent_PE.sum(1), received_PE.sum(1))
            # Rows arrive sorted by rank, then by expert. The experts need them sorted by expert.
            expert = torch.arange(received_PE.size(1), device=rows.device).repeat(self.size)
            expert = expert.repeat_interleave(received_PE.flatten(), output_size=sum(self.received))
            self.sorted_indices = expert.argsort(stable=True)
            self.unsort_indices = inverse_permutation(self.sorted_indices)
        rows = all_to_all_single_autograd(rows, self.received, self.sent, self.group)
        return Permute.apply(rows, self.sorted_indices, self.unsort_indices, 1), received_PE.sum(0)

    def combine(self, rows: Tensor) -> Tensor:
        """Returns the experts' results to the ranks and positions that their rows came from."""
        rows = Permute.apply(rows, self.unsort_indices, self.sorted_indices, 1)
        return all_to_all_single_autograd(rows, self.sent, self.received, self.group)


def to_lists(sent: Tensor, received: Tensor) -> list[list[int]]:
    """The numbers of rows that go to each rank and that come from each. The CPU waits for the device here and nowhere
    else."""
    return torch.stack((sent, received)).tolist()
