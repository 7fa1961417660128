"""Balance between experts, and what is to be seen of it, once per optimizer step.

Balancing without a loss (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2): an expert
that got more tokens than the mean in this step loses a little of its bias, one that got fewer gains as much. The bias
decides which experts are chosen and nothing else, so it has no gradient.

Proof: tests/test_balance.py, drawn by benchmarks/plot_balance.py; the bytes: tests/test_communication_of_mixtures.py.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

IDLE = 0.1  # an expert with less than this part of its fair share is idle; with half of them idle, routing collapses


class ExpertLoadBalancer:
    """The routers of this rank's stages. Every method but `forget` is a collective; all do nothing in a
    dense model.

    With L mixture layers of E experts: an update is one all-reduce of this rank's stages' counts, 8 E bytes a layer; a
    report, where a step is logged, one of 24 bytes a layer of the whole model over pp.
    """

    def __init__(self, stages: list[nn.Module], tokens: DeviceMesh, pp: DeviceMesh):
        """tokens: all ranks that have other tokens for the same layers; pp: those with other layers."""
        self.tokens, self.pp = tokens, pp
        args = stages[0].args
        self.has_bias = args.expert_bias
        self.layers = [
            i for i in range(args.n_layers + args.n_mtp_layers) if args.is_moe_layer(i)
        ]  # of the whole model
        self.routers = {
            number: block.moe.router
            for stage in stages
            for number, block in stage.blocks().items()
            if block.moe is not None
        }
        buffers = [item for stage in stages for item in stage.named_buffers()]
        # By name in the model: what a checkpoint must hold besides the parameters.
        self.biases = {name: buffer for name, buffer in buffers if name.endswith(".expert_bias")}
        self.shares = {}  # by layer, each expert's tokens in the last step over the mean: float64 [E]

    @torch.no_grad()
    def update(self) -> None:
        """Takes up the step's counts, of all layers in one all-reduce, and moves the biases by them, in place."""
        if not self.routers:
            return
        counts = torch.stack([router.tokens_per_expert for router in self.routers.values()])
        dist.all_reduce(counts, group=self.tokens.get_group())
        shares = counts.double() / counts.double().mean(-1, keepdim=True)
        self.shares = dict(zip(self.routers, shares, strict=True))
        for number, router in self.routers.items():
            if router.args.expert_bias:
                router.expert_bias += router.args.expert_bias_speed * (1 - self.shares[number]).sign().float()
            router.tokens_per_expert.zero_()

    def forget(self) -> None:
        """Drops the counts of a step that is skipped."""
        for router in self.routers.values():
            router.tokens_per_expert.zero_()

    def report(self) -> dict[str, list[float]]:
        """Of the last step, for every mixture layer of the whole model, in order: `expert_load`, the tokens of its
        busiest expert over the mean; `expert_idle`, the part of its experts that are idle; and where there is a bias,
        `expert_bias_range`, the largest less the smallest. Empty for a dense model."""
        if not self.layers:
            return {}
        values = torch.zeros(len(self.layers), 3, dtype=torch.float64, device=self.pp.device_type)
        for number, share in self.shares.items():
            row = values[self.layers.index(number)]
            row[0], row[1] = share.max(), (share < IDLE).double().mean()
            if self.has_bias:
                bias = self.routers[number].expert_bias
                row[2] = bias.max() - bias.min()
        dist.all_reduce(values, group=self.pp.get_group())  # each layer is in one stage, and 0 in the others
        load, idle, bias_range = values.T.tolist()
        report = {"expert_load": load, "expert_idle": idle}
        return report | {"expert_bias_range": bias_range} if self.has_bias else report


def collapse_warning(report: dict[str, list[float]]) -> str | None:
    """One line if in some layer half of the experts, or more, are idle."""
    collapsed = [f"{i} ({idle:.0%})" for i, idle in enumerate(report.get("expert_idle", [])) if idle >= 0.5]
    if not collapsed:
        return None
    return (
        f"warning: routing collapses: experts that get less than {IDLE:.0%} of their fair share of tokens, by mixture "
        f"layer: {', '.join(collapsed)}; raise model.expert_bias_speed or model.balance_loss_weight."
    )
