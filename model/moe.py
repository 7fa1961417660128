"""Mixture of experts (DeepSeekMoE, arXiv:2401.06066; V2, arXiv:2405.04434; V3, arXiv:2412.19437).

A router sends each token to K of E narrow feed-forwards, the experts; shared experts take every token. The experts work
on the tokens' copies, sorted by expert. No token is ever dropped.

    B batch, S sequence, T = B S tokens, D dim, F moe_hidden_dim, E experts, K experts per token (top_k), R = T K rows

Proof: tests/test_moe.py::test_moe_equals_loop_over_tokens (results and gradients, with every kind of routing),
tests/test_moe.py::test_grouped_experts_equal_loop_over_experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.args import ModelArgs


class MoE(nn.Module):
    """Sum over a token's experts of score x expert(token), plus the shared experts; see `Router` and `Experts`.

    sequences_per_step is the number of sequences of an optimizer step: the balance loss is a mean over them."""

    def __init__(self, args: ModelArgs, shared_experts: nn.Module | None, sequences_per_step: int):
        super().__init__()
        self.router = Router(args, sequences_per_step)
        self.experts = Experts(args.n_experts, args.dim, args.moe_hidden_dim)
        self.shared_experts = shared_experts
        self.combine = Combine()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> [B, S, D], and the number of tokens that went to each expert, int64 [E]."""
        topk_scores_TK, topk_indices_TK, tokens_per_expert_E = self.router(x)
        # Permute the tokens' copies into the order of the experts, and back.
        sorted_indices_R = topk_indices_TK.flatten().argsort(stable=True)
        unsort_indices_R = inverse_permutation(sorted_indices_R)
        top_k = topk_indices_TK.size(1)
        routed_input_RD = Permute.apply(x.flatten(0, 1), sorted_indices_R, unsort_indices_R, top_k)
        routed_output_RD = self.experts(routed_input_RD, tokens_per_expert_E)
        routed_output_RD = Permute.apply(routed_output_RD, unsort_indices_R, sorted_indices_R, 1)
        y = self.combine(routed_output_RD, topk_scores_TK).to(x.dtype).view_as(x)
        return (y if self.shared_experts is None else y + self.shared_experts(x)), tokens_per_expert_E


class Combine(nn.Module):
    def forward(self, rows_RD: Tensor, topk_scores_TK: Tensor) -> Tensor:
        """The sum of a token's expert outputs, weighted by their scores: [T, D], in the scores' dtype (float32 at
        least). rows_RD has the K outputs of a token side by side."""
        return (rows_RD.unflatten(0, topk_scores_TK.shape) * topk_scores_TK[..., None]).sum(1)


def inverse_permutation(indices: Tensor) -> Tensor:
    """The permutation that undoes `indices`: int64 [R] -> int64 [R]."""
    return torch.empty_like(indices).scatter_(0, indices, torch.arange(len(indices), device=indices.device))


class Permute(torch.autograd.Function):
    """Makes `copies` copies of every row of x and permutes them: row r of the result is x[indices[r] // copies].

    Example: x = [a, b], copies = 2, indices = [2, 0, 3, 1] -> [b, a, b, a]; copies 0 and 1 are of a, 2 and 3 of b.
    inverse is `inverse_permutation(indices)`: with it, backward is an index_select too, where autograd's own backward
    would add the rows with atomic additions."""

    @staticmethod
    def forward(ctx, x: Tensor, indices: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, indices if copies == 1 else indices // copies)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Router(nn.Module):
    """Scores every expert for each token, and selects the token's K experts. Computes in float32 at least."""

    def __init__(self, args: ModelArgs, sequences_per_step: int):
        super().__init__()
        self.args, self.sequences_per_step = args, sequences_per_step
        self.weight = nn.Parameter(torch.empty(args.n_experts, args.dim))
        if args.expert_bias:
            self.register_buffer("expert_bias", torch.zeros(args.n_experts, dtype=torch.float32))
        # Of this optimizer step so far, on this rank. The Transformer counts, where nothing is recomputed in backward.
        self.register_buffer("tokens_per_expert", torch.zeros(args.n_experts, dtype=torch.int64), persistent=False)
        self.gate = GateLogits()
        self.reduce_counts = nn.Identity()

    def _apply(self, *args, **kwargs):
        """nn.Module's hook behind .to(): whatever the model is cast to, the bias stays in float32, since bfloat16 would
        round its small steps away."""
        super()._apply(*args, **kwargs)
        if self.args.expert_bias:
            self.expert_bias = self.expert_bias.float()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> top-k scores [T, K] in float32 at least, top-k indices [T, K] and tokens per expert [E], both
        int64."""
        args = self.args
        logits_TE = self.gate(x.flatten(0, 1), self.weight)
        scores_TE = logits_TE.softmax(-1) if args.score_function == "softmax" else logits_TE.sigmoid()
        with torch.no_grad():
            topk_indices_TK = self.select_experts(scores_TE)
            is_selected_TE = torch.zeros_like(scores_TE, dtype=torch.int64).scatter_(1, topk_indices_TK, 1)
            tokens_per_expert_BE = is_selected_TE.unflatten(0, x.shape[:2]).sum(1)
        topk_scores_TK = scores_TE.gather(1, topk_indices_TK)
        if args.route_norm:
            topk_scores_TK = topk_scores_TK / (topk_scores_TK.sum(-1, keepdim=True) + 1e-20)
        if args.balance_loss_weight > 0:
            balance_loss = self.balance_loss(scores_TE, tokens_per_expert_BE)
            topk_scores_TK = AddAuxiliaryLoss.apply(topk_scores_TK, balance_loss)
        return topk_scores_TK * args.route_scale, topk_indices_TK, tokens_per_expert_BE.sum(0)

    def select_experts(self, scores_TE: Tensor) -> Tensor:
        """The experts of each token, int64 [T, K]: the highest score + bias, within the groups that rank highest by the
        sum of their best (V2, section 2.1.2; V3, section 2.1.2). The bias takes part in this selection only."""
        args = self.args
        rank_TE = scores_TE + self.expert_bias if args.expert_bias else scores_TE
        if args.topk_group < args.n_expert_groups:
            rank_TGe = rank_TE.unflatten(1, (args.n_expert_groups, -1))
            rank_TG = rank_TGe.topk(args.n_group_topk, dim=-1).values.sum(-1)
            groups = rank_TG.topk(args.topk_group, dim=-1).indices
            is_out = torch.ones_like(rank_TG, dtype=torch.bool).scatter_(1, groups, False)
            rank_TE = rank_TGe.masked_fill(is_out[..., None], -torch.inf).flatten(1)
        return rank_TE.topk(args.top_k, dim=-1).indices

    def balance_loss(self, scores_TE: Tensor, tokens_per_expert_BE: Tensor) -> Tensor:
        """This microbatch's part of the sequence-wise balance loss (V3, equations 17 to 20): weight x the mean over the
        step's sequences of sum_i f_i P_i. f_i is E x the fraction of the sequence's choices that are expert i, P_i the
        mean over its tokens of expert i's share of the scores. f_i has no gradient; so, where ranks share a sequence,
        only the counts behind f_i need the whole of it."""
        counts_BE = self.reduce_counts(tokens_per_expert_BE).to(scores_TE.dtype)
        choices_B1 = counts_BE.sum(-1, keepdim=True)
        f_BE = counts_BE * self.args.n_experts / choices_B1
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        sum_BE = scores_TE.unflatten(0, (len(counts_BE), -1)).sum(1)
        loss = (f_BE * sum_BE * (self.args.top_k / choices_B1)).sum()
        return self.args.balance_loss_weight / self.sequences_per_step * loss


class GateLogits(nn.Module):
    def forward(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        """The router's logits [T, E], in float32 at least."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(wide), weight.to(wide))


class AddAuxiliaryLoss(torch.autograd.Function):
    """Identity on x; adds the auxiliary loss's gradient (as DeepSeek's code, and Megatron-LM's MoEAuxLossAutoScaler).
    The loss itself need not reach the end of the model, which may be on another pipeline stage."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dtype, device = ctx.loss_like
        return grad, torch.ones((), dtype=dtype, device=device)


class Experts(nn.Module):
    """E feed-forwards (SwiGLU). Weights are stored as (expert, in, out), the layout that multiplies fastest."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.compute = GroupedExperts()

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [R, D], sorted by expert, and the number of rows of each expert, int64 [E] -> [R, D]."""
        return self.compute(rows, counts, self.w1, self.w2, self.w3)


class GroupedExperts(nn.Module):
    def forward(self, rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        run = experts_in_a_loop if rows.dtype == torch.float64 else experts_grouped  # torch groups no float64 product
        return run(rows, counts, w1, w2, w3)


def experts_in_a_loop(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The reference: one expert after the other."""
    parts = rows.split(counts.tolist())
    return torch.cat([(F.silu(x @ w1[e]) * (x @ w3[e])) @ w2[e] for e, x in enumerate(parts)])


def experts_grouped(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The same in three grouped products, without waiting for the counts to arrive on the CPU."""
    ends = counts.cumsum(0).to(torch.int32)
    hidden = F.silu(F.grouped_mm(rows, w1, offs=ends)) * F.grouped_mm(rows, w3, offs=ends)
    return F.grouped_mm(hidden, w2, offs=ends)
