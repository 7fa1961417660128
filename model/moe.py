"""Mixture of experts (DeepSeekMoE, arXiv:2401.06066; V2, arXiv:2405.04434; V3, arXiv:2412.19437).

A router sends each token to K of E narrow feed-forwards, the experts; shared experts take every token besides. The rows
that the experts work on are the tokens' copies, sorted by expert. No token is ever dropped.

    B batch, S sequence, T = B S tokens, D dim, F moe_hidden_dim, E experts, K experts a token, R = T K rows
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.args import ModelArgs


class MoE(nn.Module):
    """sum over a token's experts of score x expert(token), plus the shared experts; see `Router`, `Experts`.

    sequences_per_step is the number of sequences of an optimizer step, over which the balance loss is a mean."""

    def __init__(self, args: ModelArgs, shared_experts: nn.Module | None, sequences_per_step: int):
        super().__init__()
        self.router = Router(args, sequences_per_step)
        self.experts = Experts(args.n_experts, args.dim, args.moe_hidden_dim)
        self.shared_experts = shared_experts
        self.combine = combine  # compiled in its place: parallelize/compile.py

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> [B, S, D], and the number of tokens that went to each expert, int64 [E]."""
        scores_TK, experts_TK, counts_E = self.router(x)
        order_R = experts_TK.flatten().argsort(stable=True)  # rows by expert: which copy of a token is where
        place_R = inverse_of(order_R)  # and where each copy is
        rows_RD = Take.apply(x.flatten(0, 1), order_R, place_R, experts_TK.size(1))
        rows_RD = self.experts(rows_RD, counts_E)
        rows_RD = Take.apply(rows_RD, place_R, order_R, 1)
        y = self.combine(rows_RD, scores_TK).to(x.dtype).view_as(x)
        return y + self.shared_experts(x) if self.shared_experts is not None else y, counts_E


def combine(rows_RD: Tensor, scores_TK: Tensor) -> Tensor:
    """Each token's sum of its experts' results, weighted by their scores, in the scores' dtype (float32 at least)."""
    return (rows_RD.unflatten(0, scores_TK.shape) * scores_TK[..., None]).sum(1)


def inverse_of(order: Tensor) -> Tensor:
    """The inverse of a permutation: int64 [R] -> int64 [R]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class Take(torch.autograd.Function):
    """x[index // copies] for an index that takes each of the copies of every row of x once; inverse is its inverse.
    Autograd's own way back adds row by row, with atomic additions; knowing the inverse, backward is a gather too."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, index if copies == 1 else index // copies)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Router(nn.Module):
    """Scores of all experts for each token, and the K that it goes to. Computed in float32 at least."""

    def __init__(self, args: ModelArgs, sequences_per_step: int):
        super().__init__()
        self.args, self.sequences_per_step = args, sequences_per_step
        self.weight = nn.Parameter(torch.empty(args.n_experts, args.dim))
        if args.expert_bias:
            self.register_buffer("expert_bias", torch.zeros(args.n_experts, dtype=torch.float32))
        # Of the optimizer step so far, on this rank; the Transformer counts, where nothing is recomputed.
        self.register_buffer("tokens_per_expert", torch.zeros(args.n_experts, dtype=torch.int64), persistent=False)
        self.compute = router_logits  # of the weight: a seam, as in Experts
        self.of_sequence = nn.Identity()  # a seam: counts of a rank's part of the sequences -> of the sequences

    def _apply(self, *args, **kwargs):
        """Whatever the model is cast to, the bias stays in float32: bfloat16 would not take up its small steps."""
        super()._apply(*args, **kwargs)
        if self.args.expert_bias:
            self.expert_bias = self.expert_bias.float()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> scores [T, K], in float32 at least; experts [T, K] and tokens by expert [E], both int64."""
        args = self.args
        logits_TE = self.compute(x.flatten(0, 1), self.weight)
        scores_TE = logits_TE.softmax(-1) if args.score_function == "softmax" else logits_TE.sigmoid()
        with torch.no_grad():
            experts_TK = self.choose(scores_TE)
            chosen_TE = torch.zeros_like(scores_TE, dtype=torch.int64).scatter_(1, experts_TK, 1)
            counts_BE = chosen_TE.unflatten(0, x.shape[:2]).sum(1)
        scores_TK = scores_TE.gather(1, experts_TK)
        if args.route_norm:
            scores_TK = scores_TK / (scores_TK.sum(-1, keepdim=True) + 1e-20)
        if args.balance_loss_weight > 0:
            scores_TK = AddLoss.apply(scores_TK, self.balance_loss(scores_TE, counts_BE))
        return scores_TK * args.route_scale, experts_TK, counts_BE.sum(0)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The experts of each token [T, K]: those of the highest score + bias, in the groups that rank highest by
        their best ones (V2, section 2.1.2; V3, section 2.1.2). The bias is for this choice only."""
        args = self.args
        rank_TE = scores_TE + self.expert_bias if args.expert_bias else scores_TE
        if args.topk_group < args.n_expert_groups:
            rank_TGe = rank_TE.unflatten(1, (args.n_expert_groups, -1))
            rank_TG = rank_TGe.topk(args.n_group_topk, dim=-1).values.sum(-1)
            groups = rank_TG.topk(args.topk_group, dim=-1).indices
            is_out = torch.ones_like(rank_TG, dtype=torch.bool).scatter_(1, groups, False)
            rank_TE = rank_TGe.masked_fill(is_out[..., None], -torch.inf).flatten(1)
        return rank_TE.topk(args.top_k, dim=-1).indices

    def balance_loss(self, scores_TE: Tensor, counts_BE: Tensor) -> Tensor:
        """This part's share of the sequence-wise balance loss (V3, equations 17 to 20): weight x the mean over the
        step's sequences of sum_i f_i P_i, f_i being expert i's part of the choices x E, and P_i its mean score, where
        a token's scores are divided by their sum. f_i has no gradient, so that only it needs the whole sequence."""
        counts_BE = self.of_sequence(counts_BE).to(scores_TE.dtype)
        choices_B1 = counts_BE.sum(-1, keepdim=True)
        f_BE = counts_BE * self.args.n_experts / choices_B1
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        sum_BE = scores_TE.unflatten(0, (len(counts_BE), -1)).sum(1)
        loss = (f_BE * sum_BE * (self.args.top_k / choices_B1)).sum()
        return self.args.balance_loss_weight / self.sequences_per_step * loss


def router_logits(x_TD: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(wide), weight.to(wide))


class AddLoss(torch.autograd.Function):
    """x as it is; its backward is as if `loss` had been added to the step's loss, unscaled: a pipeline stage may never
    see that one."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dtype, device = ctx.loss_like
        return grad, torch.ones((), dtype=dtype, device=device)


class Experts(nn.Module):
    """E feed-forwards (SwiGLU) side by side; weights are stored (expert, in, out), which is what multiplies fastest."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.compute = run_experts  # of the weights: the seam where a rank has only some of them

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [R, D], sorted by expert, counts (int64 [E]) of each -> [R, D]."""
        return self.compute(rows, counts, self.w1, self.w2, self.w3)


def run_experts(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    # There is no grouped product of float64.
    run = experts_in_a_loop if rows.dtype == torch.float64 else experts_grouped
    return run(rows, counts, w1, w2, w3)


def experts_in_a_loop(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """What the experts compute, expert by expert: the reference."""
    results = []
    for expert, x in enumerate(rows.split(counts.tolist())):
        results.append((F.silu(x @ w1[expert]) * (x @ w3[expert])) @ w2[expert])
    return torch.cat(results)


def experts_grouped(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The same in three products of all experts, without waiting for the counts to arrive on the CPU."""
    ends = counts.cumsum(0).to(torch.int32)
    hidden = F.silu(F.grouped_mm(rows, w1, offs=ends)) * F.grouped_mm(rows, w3, offs=ends)
    return F.grouped_mm(hidden, w2, offs=ends)
