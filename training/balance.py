"""Balances the load of the experts, and reports it, once per optimizer step.

Balancing without a loss (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2): an expert
that got more tokens than the mean in this step loses expert_bias_speed from its bias, an expert that got fewer gains as
much. The bias takes part in the selection of experts and in nothing else, so it has no gradient.

Proof: tests/test_balance.py::test_bias_balances_a_skewed_stream (benchmarks/plot_balance.py draws it) and
tests/test_balance.py::test_bias_resumes_in_any_layout. tests/test_communication_of_mixtures.py counts the bytes.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

IDLE = 0.1  # an expert with less than this fraction of the mean load is idle; if half of them are, routing collapses


class ExpertLoadBalancer:
    """Balances the routers of this rank's stages. tokens: the ranks that have other tokens for the same layers; pp: the
    ranks that have other layers. Every method but `reset` is a collective. In a dense model no method does anything.

    With E experts, an update is one all-reduce of the counts of this rank's stages, 8 E bytes per MoE layer; a report
    is one all-reduce over pp of 24 bytes per MoE layer of the whole model, in steps that are logged.
    """

    def __init__(self, stages: list[nn.Module], tokens: DeviceMesh, pp: DeviceMesh):
        self.tokens, self.pp, args = tokens, pp, stages[0].args
        self.has_bias, self.bias_speed = args.expert_bias, args.expert_bias_speed
        # The MoE layers of the whole model, and the routers of those that are on this rank.
        self.layers = [i for i in range(args.n_layers + args.n_mtp_layers) if args.is_moe_layer(i)]
        blocks = [item for stage in stages for item in stage.blocks().items()]
        self.routers = {layer: block.moe.router for layer, block in blocks if block.moe is not None}
        # By name in the model: a checkpoint holds them beside the parameters.
        buffers = [item for stage in stages for item in stage.named_buffers()]
        self.biases = {name: buffer for name, buffer in buffers if name.endswith(".expert_bias")}
        self.shares = {}  # by layer, each expert's tokens in the last step over the mean: float64 [E]

    @torch.no_grad()
    def update(self) -> None:
        """Sums the step's counts of all layers in one all-reduce, moves the biases, in place, and resets the counts."""
        if not self.routers:
            return
        counts = torch.stack([router.tokens_per_expert for router in self.routers.values()])
        dist.all_reduce(counts, group=self.tokens.get_group())
        shares = counts.double() / counts.double().mean(-1, keepdim=True)
        self.shares = dict(zip(self.routers, shares, strict=True))
        if self.has_bias:
            for layer, router in self.routers.items():
                router.expert_bias += self.bias_speed * (1 - self.shares[layer]).sign().float()
        self.reset()

    def reset(self) -> None:
        """Sets the counts to 0; alone, without `update`, where a step is skipped."""
        for router in self.routers.values():
            router.tokens_per_expert.zero_()

    def report(self) -> dict[str, list[float]]:
        """Of the last step, a value for each MoE layer of the whole model, in order: `expert_load`, the tokens of the
        busiest expert over the mean; `expert_idle`, the fraction of experts that are idle; and with a bias
        `expert_bias_range`, the largest bias minus the smallest. Empty for a dense model."""
        if not self.layers:
            return {}
        values = torch.zeros(len(self.layers), 3, dtype=torch.float64, device=self.pp.device_type)
        for layer, share in self.shares.items():
            row, router = values[self.layers.index(layer)], self.routers[layer]
            row[0], row[1] = share.max(), (share < IDLE).double().mean()
            if self.has_bias:
                row[2] = router.expert_bias.max() - router.expert_bias.min()
        dist.all_reduce(values, group=self.pp.get_group())  # a layer is in one stage; the other stages have 0
        load, idle, bias_range = values.T.tolist()
        report = {"expert_load": load, "expert_idle": idle}
        return report | {"expert_bias_range": bias_range} if self.has_bias else report


def collapse_warning(report: dict[str, list[float]]) -> str | None:
    """A line of warning if in any layer at least half of the experts are idle."""
    collapsed = [f"{i} ({idle:.0%})" for i, idle in enumerate(report.get("expert_idle", [])) if idle >= 0.5]
    line = (
        f"warning: routing collapses: mixture layers, and the fraction of their experts that get less than {IDLE:.0%} "
        f"of the mean load: {', '.join(collapsed)}; raise model.expert_bias_speed or model.balance_loss_weight."
    )
    return line if collapsed else None
