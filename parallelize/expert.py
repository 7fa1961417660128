"""Expert parallelism (GShard, Lepikhin et al. 2020, arXiv:2006.16668; DeepSeek-V3, arXiv:2412.19437, section 3.2).

Idea: each rank of the ep axis holds some of the experts, whole, and the tokens travel: every rank sends each of its
tokens' copies to the rank that has the expert, and gets the result back. The mixture itself (`model/moe.py`) knows
nothing of it: between it and its experts stand two hooks, dispatch and combine.

Expert parallelism borrows its ranks from dp_shard x cp x tp, whose ranks all have different tokens (under tensor
parallelism the sequence is cut between attention and the next), so it adds no axis, and experts are never cut by
tensor parallelism. What remains of those ranks, efsdp = dp_shard x cp x tp / E_p, shares the experts by FSDP:

    8 ranks as dp_shard 4 x tp 2, ep 4:   rank         0      1      2      3      4      5      6      7
                                          tokens       a      b      c      d      e      f      g      h
                                          experts      0,1    2,3    4,5    6,7    0,1    2,3    4,5    6,7    (of 8)
                                          FSDP keeps   half of rank 0's on 0 and on 4, of rank 1's on 1 and on 5, ...

Per layer and microbatch, for a rank's R rows (its tokens x experts a token) of dim D, E experts, E_p = degree:

    forward     1 all-to-all of E counts (int64): a rank receives 8 E (E_p-1)/E_p bytes
                2 all-to-alls of rows, in param_dtype: there with the rows of its experts that others have, back with
                the results of its rows that went to others; R D (E_p-1)/E_p elements each if all experts get equally
                many
    backward    2 of rows: the gradients of the way back and of the way there, as many as those
                where the whole block is recomputed, the forward's 3 again

For the balance loss, which is of whole sequences, one all-reduce of batch x E counts (int64) over cp x tp, per layer
and forward. The once-a-step sum of counts is training/balance.py's; experts' weights are fsdp.py's: P elements of the
E / E_p experts over efsdp.

What waits: the sizes of what arrives must be known on the CPU, so once a layer and forward it waits for the router and
for the counts' exchange (the backward knows them). While it waits it cannot issue the next weights' all-gather, so
`fsdp.py` issues it before: a block's weights bring its experts' and the next block's. No token is ever dropped: buffers
have just the size that is needed, and a rank may receive none.

Proof: tests/test_parity.py; the bytes: tests/test_communication_of_mixtures.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from errors import ConfigError
from model.args import ModelArgs
from model.moe import Permute, inverse_permutation
from parallelize.styles import LocalWeights, SumOverRanks
from torch_private import all_to_all_single_autograd


def parallelize_experts(model: nn.Module, mesh: DeviceMesh, sequence: DeviceMesh) -> None:
    """Spreads the experts of model over mesh (ep), in place; sequence (cp, tp) are the ranks that share sequences.
    ValueError where the degree does not divide the number of experts, or there are none."""
    mixtures = [block.moe for block in model.blocks().values() if block.moe is not None]
    if mesh.size() > 1:
        require_divisible(model.args, mesh.size())
    for moe in mixtures:
        if sequence.size() > 1 and model.args.balance_loss_weight > 0:
            moe.router.reduce_counts = SumOverRanks(sequence)
        if mesh.size() > 1:
            LocalWeights(Shard(0))._apply(moe.experts, mesh)
            exchange = TokenDispatcher(mesh)
            moe.experts.register_forward_pre_hook(lambda _, inputs, exchange=exchange: exchange.dispatch(*inputs))
            moe.experts.register_forward_hook(lambda _, inputs, rows, exchange=exchange: exchange.combine(rows))


class TokenDispatcher:
    """The way of one layer's rows to the ranks of their experts and back."""

    def __init__(self, mesh: DeviceMesh):
        self.group, self.size = mesh.get_group(), mesh.size()

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """rows [R, D], sorted by expert, and counts [E] of each -> the same of this rank's experts, from all ranks."""
        with torch.no_grad():
            sent_PE = counts.view(self.size, -1)
            received_PE = torch.empty_like(sent_PE)
            dist.all_to_all_single(received_PE, sent_PE, group=self.group)
            self.sent, self.received = to_lists(sent_PE.sum(1), received_PE.sum(1))
            # What arrives is sorted by rank, then by expert; the experts want it by expert.
            num_experts = received_PE.size(1)
            expert = torch.arange(num_experts, device=rows.device).repeat(self.size)
            expert = expert.repeat_interleave(received_PE.flatten(), output_size=sum(self.received))
            self.order = expert.argsort(stable=True)
            self.place = inverse_permutation(self.order)
        rows = all_to_all_single_autograd(rows, self.received, self.sent, self.group)
        return Permute.apply(rows, self.order, self.place, 1), received_PE.sum(0)

    def combine(self, rows: Tensor) -> Tensor:
        """The experts' results, each where its row came from."""
        rows = Permute.apply(rows, self.place, self.order, 1)
        return all_to_all_single_autograd(rows, self.sent, self.received, self.group)


def to_lists(sent: Tensor, received: Tensor) -> tuple[list[int], list[int]]:
    """The one place where the CPU waits for the device: how many rows go to, and come from, each rank."""
    both = torch.stack((sent, received)).tolist()
    return both[0], both[1]


def require_divisible(args: ModelArgs, degree: int) -> None:
    """ValueError unless `degree` ranks can share the experts evenly."""
    if args.n_experts == 0:
        raise ConfigError(
            f"parallelism.expert_parallel_degree ({degree}) needs a mixture of experts, model.n_experts is 0; leave "
            "it out."
        )
    if args.n_experts % degree != 0:
        fitting = [n for n in range(1, args.n_experts + 1) if args.n_experts % n == 0]
        raise ConfigError(
            f"parallelism.expert_parallel_degree ({degree}) must divide model.n_experts ({args.n_experts}); use one of "
            f"{fitting}."
        )
