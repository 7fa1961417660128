"""Mixture of experts and multi-token prediction (MTP) equal references that are written out token by token, in
float64: results, and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from model import IGNORE_INDEX, ModelArgs, Transformer, add_mtp_targets
from model.moe import MoE, Permute, experts_grouped, experts_in_a_loop, inverse_permutation
from model.rope import rope_cos_sin
from model.transformer import FeedForward
from parallelize import init_weights

SHAPE = dict(dim=12, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=16, vocab_size=23, n_experts=8, moe_hidden_dim=6)
ROUTINGS = {
    "V3": dict(
        top_k=3, score_function="sigmoid", n_expert_groups=4, topk_group=2, n_group_topk=2,
        route_norm=True, route_scale=2.5, expert_bias=True,
    ),
    "V2": dict(top_k=2, n_expert_groups=4, topk_group=2, route_scale=16.0),
    "plain": dict(top_k=2, route_norm=True, expert_bias=True),
    "one": dict(top_k=1),
}  # fmt: skip


def best(values: list[float], number: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:number]


def experts_of_token(scores: list[float], bias: list[float], args: ModelArgs) -> list[int]:
    """The papers' rule, by score + bias: the groups with the highest sum of their best, then the best in these."""
    ranks = [s + b for s, b in zip(scores, bias, strict=True)]
    size = args.n_experts // args.n_expert_groups
    groups = [ranks[g * size : (g + 1) * size] for g in range(args.n_expert_groups)]
    values = [sum(sorted(group)[-args.n_group_topk :]) for group in groups]
    allowed = [g * size + i for g in best(values, args.topk_group) for i in range(size)]
    return sorted(allowed, key=lambda e: -ranks[e])[: args.top_k]


def reference(moe: MoE, x: torch.Tensor, args: ModelArgs, sequences: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """The result, the balance loss and the number of tokens per expert, one token after the other."""
    bias = moe.router.expert_bias.tolist() if args.expert_bias else [0.0] * args.n_experts
    ys, balance_loss, counts = [], 0, [0] * args.n_experts
    for sequence in x:
        chosen, shares, results = [0] * args.n_experts, [], []
        for token in sequence:
            logits = moe.router.weight @ token
            scores = logits.softmax(0) if args.score_function == "softmax" else logits.sigmoid()
            shares.append(scores / scores.sum())
            experts = experts_of_token(scores.tolist(), bias, args)
            total = sum(scores[e] for e in experts) if args.route_norm else 1
            y = moe.shared_experts(token)
            for e in experts:
                chosen[e] += 1
                w1, w2, w3 = (w[e] for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
                y = y + args.route_scale * scores[e] / total * ((F.silu(token @ w1) * (token @ w3)) @ w2)
            results.append(y)
        ys.append(torch.stack(results))
        mean_share = sum(shares) / len(sequence)
        for e in range(args.n_experts):  # f_i = E / (K S) x the number of tokens that chose i
            f = args.n_experts / (args.top_k * len(sequence)) * chosen[e]
            balance_loss = balance_loss + args.balance_loss_weight * f * mean_share[e] / sequences
        counts = [a + b for a, b in zip(counts, chosen, strict=True)]
    return torch.stack(ys), balance_loss, counts


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("balance_loss_weight", [0.0, 0.7])
def test_moe_equals_loop_over_tokens(routing, balance_loss_weight):
    """Equal are the result, the counts, and the gradients of input, router, experts and shared experts. They include
    the balance loss: a mean over the step's sequences, independent of what the loss is divided by. The bias changes
    which experts are selected, not their weight."""
    args = ModelArgs(**SHAPE, **ROUTINGS[routing], balance_loss_weight=balance_loss_weight)
    torch.manual_seed(0)
    moe = MoE(args, FeedForward(args.dim, 6), sequences_per_step=5).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if args.expert_bias:
        moe.router.expert_bias.copy_(torch.randn(args.n_experts) / 4)
    x = torch.randn(2, 7, args.dim, dtype=torch.float64, requires_grad=True)
    direction, inputs = torch.randn(2, 7, args.dim, dtype=torch.float64), [x, *moe.parameters()]
    expected, balance_loss, expected_counts = reference(moe, x, args, sequences=5)
    y, counts = moe(x)
    torch.testing.assert_close(y, expected)
    assert counts.tolist() == expected_counts
    ours = torch.autograd.grad((y * direction).sum() / 3, inputs)
    theirs = torch.autograd.grad((expected * direction).sum() / 3 + balance_loss, inputs)
    torch.testing.assert_close(ours, theirs)


def test_router_selects_by_groups_and_bias():
    """By hand: experts 0 and 2 have the highest scores. But the groups (0, 1), (2, 3), (4, 5) rank by the sums 1.1, 1.0
    and 1.2 of score + bias: experts 0 and 5 of the first and last group are selected, weighted by score alone."""
    groups = dict(n_expert_groups=3, topk_group=2, n_group_topk=2)
    shape = SHAPE | dict(n_experts=6, top_k=2, score_function="sigmoid", expert_bias=True)
    moe = MoE(ModelArgs(**shape, **groups), None, 1).double()
    scores = torch.tensor([0.9, 0.2, 0.6, 0.4, 0.3, 0.5], dtype=torch.float64)
    moe.router.expert_bias.copy_(torch.tensor([0, 0, 0, 0, 0.1, 0.3]))
    torch.nn.init.zeros_(moe.router.weight)
    moe.router.weight.data[:, 0] = scores.logit()
    x = torch.eye(1, 12, dtype=torch.float64)[None]
    weights, experts, counts = moe.router(x)
    assert experts.tolist() == [[0, 5]] and counts.tolist() == [1, 0, 0, 0, 0, 1]
    torch.testing.assert_close(weights, scores[[0, 5]][None])


def test_bfloat16_moe_computes_routing_in_float32():
    """In a bfloat16 model three things equal, bit for bit, the same computation in float32: logits and scores, and so
    the selection; the bias, whose small steps bfloat16 would round away; and the sum over a token's experts."""
    args = ModelArgs(**SHAPE, **ROUTINGS["V3"])
    torch.manual_seed(0)
    moe = MoE(args, None, sequences_per_step=1).bfloat16()
    torch.nn.init.normal_(moe.router.weight)
    moe.router.expert_bias += 1 + torch.arange(8) / 1000
    assert moe.router.expert_bias.unique().numel() == 8
    x, rows = torch.randn(2, 50, 12).bfloat16(), torch.randn(300, 12).bfloat16()
    scores, experts, _ = moe.router(x)
    summed = moe.combine(rows, scores)
    wide = moe.float()
    for ours, expected in zip((scores, experts), wide.router(x.float()), strict=False):
        assert torch.equal(ours, expected)
    assert torch.equal(summed, wide.combine(rows.float(), scores))


def test_balance_loss_equals_formula():
    """By hand: three of four tokens choose the first of two experts, whose mean share of the scores is 0.7. So f is
    (1.5, 0.5), P is (0.7, 0.3) and the sum of f P is 1.2; balanced routing has the minimum, 1. It is multiplied by the
    weight, and divided by the step's four sequences."""
    args = ModelArgs(**SHAPE | dict(n_experts=2, top_k=1), balance_loss_weight=0.5)
    router = MoE(args, None, sequences_per_step=4).double().router
    shares = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    loss = router.balance_loss(shares * 3, torch.tensor([[3, 1]]))
    assert loss.item() == pytest.approx(0.5 / 4 * (1.5 * 0.7 + 0.5 * 0.3))
    assert router.balance_loss(torch.ones(4, 2), torch.tensor([[2, 2]])).item() == pytest.approx(0.5 / 4)


@pytest.mark.parametrize("counts", [[5, 0, 3, 8], [0, 0, 16, 0]])
def test_grouped_experts_equal_loop_over_experts(counts):
    """Results and every gradient, in float32, also where some experts get no tokens."""
    torch.manual_seed(0)
    shapes = [(16, 8), (4, 8, 16), (4, 16, 8), (4, 8, 16)]
    rows, *weights = (torch.randn(shape, requires_grad=True) for shape in shapes)
    direction, results = torch.randn(16, 8), []
    for run in (experts_grouped, experts_in_a_loop):
        y = run(rows, torch.tensor(counts), *weights)
        results.append((y, *torch.autograd.grad((y * direction).sum(), (rows, *weights))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


def test_permute_example_and_gradient():
    """The docstring's example; unpermuting undoes it; and backward equals autograd's through plain indexing."""
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([2, 0, 3, 1])
    inverse = inverse_permutation(indices)
    rows = Permute.apply(x, indices, inverse, 2)
    assert torch.equal(rows, x[[1, 0, 1, 0]])
    assert torch.equal(Permute.apply(rows, inverse, indices, 1), x.repeat_interleave(2, 0))
    direction = torch.randn(4, 3, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((y * direction).sum(), x) for y in (rows, x[indices // 2]))
    torch.testing.assert_close(ours, theirs)


def test_mtp_targets_stay_in_their_document():
    """Depth k reads token i + k and predicts token i + k + 1, unless a document ends in between: by a loop over i.
    Depth 0 leaves a batch unchanged."""
    torch.manual_seed(0)
    tokens, ends = torch.randint(23, (3, 12)), torch.rand(3, 12) < 0.25
    following = torch.randint(23, (3, 1))  # the token behind the sequence is a label too
    labels = torch.cat((tokens[:, 1:], following), 1).masked_fill(ends, IGNORE_INDEX)
    batch = dict(tokens=tokens, labels=labels)
    made = add_mtp_targets(batch, depth=2)
    assert add_mtp_targets(batch, depth=0) == batch and made.keys() == {*batch, "mtp_tokens", "mtp_labels"}
    for b in range(3):
        for i in range(12):
            for k in (1, 2):
                inside = i + k < 12
                is_read = inside and not ends[b, i : i + k].any()
                assert made["mtp_tokens"][b, i, k - 1] == (tokens[b, i + k] if is_read else 0)
                is_valid = inside and not ends[b, i : i + k + 1].any()
                assert made["mtp_labels"][b, i, k - 1] == (labels[b, i + k] if is_valid else IGNORE_INDEX)
    assert (made["mtp_labels"] != IGNORE_INDEX).any(1).all()  # every sequence has valid labels at both depths


@pytest.mark.parametrize("tied", [False, True])
def test_mtp_loss_equals_textbook(tied):
    """Every parameter's gradient equals that of the main loss + mtp_loss_weight x the mean over depths of the MTP
    losses. Depth k's loss is the cross entropy of token i + k + 1, summed over valid labels; the main model's head
    predicts it from depth k - 1's output at i and the embedding of token i + k. The returned loss is the main loss."""
    args = ModelArgs(**SHAPE, top_k=2, n_mtp_layers=2, mtp_loss_weight=0.3, tie_embeddings=tied)
    model = Transformer(args).double()
    init_weights(model, args, seed=0)
    torch.manual_seed(0)
    tokens = torch.randint(23, (2, 9))
    labels = torch.roll(tokens, -1, 1)
    labels[0, 4] = labels[1, 8] = IGNORE_INDEX
    positions = torch.arange(9).expand(2, 9)
    cos, sin = rope_cos_sin(positions, args)

    def cross_entropy(h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = h @ model.output.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")

    h = model.tok_embeddings.weight[tokens]
    h = model.norm(model.layers["0"](h, cos, sin)[0])
    main = cross_entropy(h, labels)
    total = main
    for k, layer in enumerate(model.mtp.values(), start=1):
        next_tokens, targets = torch.zeros_like(tokens), torch.full_like(labels, IGNORE_INDEX)
        for b in range(2):
            for i in range(9 - k):
                if (labels[b, i : i + k] != IGNORE_INDEX).all():
                    next_tokens[b, i] = tokens[b, i + k]
                if (labels[b, i : i + k + 1] != IGNORE_INDEX).all():
                    targets[b, i] = labels[b, i + k]
        both = (layer.enorm(model.tok_embeddings.weight[next_tokens]), layer.hnorm(h))
        h = layer.norm(layer.block(layer.eh_proj(torch.cat(both, -1)), cos, sin)[0])
        total = total + 0.3 / 2 * cross_entropy(h, targets)
    targets = add_mtp_targets(dict(tokens=tokens, labels=labels), depth=2)
    loss = model(tokens, positions, labels, targets["mtp_tokens"], targets["mtp_labels"])
    torch.testing.assert_close(loss, main)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(value / 11, parameters) for value in (loss, total))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
