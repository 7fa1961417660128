"""The model on one device: sizes, arithmetic, log probabilities of sequences, and initial values."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.flavors import BUILT_IN_FLAVORS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import IGNORE_INDEX, ModelArgs, Transformer, flops_per_token, get_flavor, num_params
from model.init import fill_initial_values, init_std
from model.rope import apply_rope, rope_cos_sin, rope_frequencies
from parallelize import init_weights

PUBLISHED = {  # Meta's model cards and Hugging Face's parameter counts
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
}
SMALL = dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=97)


def build(dtype=torch.float64, **changes) -> Transformer:
    args = ModelArgs(**{**SMALL, **changes})
    model = Transformer(args).to(dtype)
    init_weights(model, args, seed=0)
    return model


def tokens_and_positions(batch=2, seq=16, vocab=97, offset=0):
    tokens = torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(offset, offset + seq).expand(batch, seq)


@pytest.mark.parametrize("flavor", BUILT_IN_FLAVORS)
def test_num_params_equals_module_and_published_count(flavor):
    """Each flavor's formula equals the count of the module's parameters, and Meta's where it is published."""
    args = get_flavor(flavor)
    with torch.device("meta"):
        counted = sum(p.numel() for p in Transformer(args).parameters())
    assert num_params(args, mtp=True) == counted == PUBLISHED.get(flavor, counted)


@pytest.mark.parametrize("flavor, total, active", [
    ("deepseek_v2_lite_16b", 15.7, 2.4), ("deepseek_v3_236b", 236, 21), ("deepseek_v3_671b", 671, 37),
    ("kimi_k2_1t", 1026, 32),
])  # fmt: skip
def test_num_params_of_mixtures_equals_published_sizes(flavor, total, active):
    """Billions of parameters, total and active per token, as the rounded numbers of the reports: V2-Lite 15.7 and 2.4,
    V2 236 and 21, V3 671 and 37, Kimi K2 1T (1,026) and 32."""
    args = get_flavor(flavor)
    assert num_params(args) / 1e9 == pytest.approx(total, rel=0.002)
    assert num_params(args, active=True) / 1e9 == pytest.approx(active, rel=0.025)


def test_flops_per_token_equals_counted_flops():
    """The FLOPs per token are exactly the multiplications and additions in the matmuls that torch runs, forward and
    backward."""
    seq = 32
    model = build(torch.float32)
    tokens, positions = tokens_and_positions(seq=seq)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, positions).sum().backward()
    assert counter.get_total_flops() == flops_per_token(model.args, seq) * tokens.numel()


def test_flops_per_token_of_llama3_8b():
    """At 8k tokens: 57.9 GFLOP per token as torchtitan counts, 51.5 with causal attention."""
    args = get_flavor("llama3_8b")
    assert round(flops_per_token(args, 8192) / 1e9, 1) == 57.9
    assert round(flops_per_token(args, 8192, causal=True) / 1e9, 1) == 51.5


@pytest.mark.parametrize("n_kv_heads", [6, 3, 2, 1])
def test_attention_equals_textbook(n_kv_heads):
    """Multi-head, grouped and multi-query attention agree with softmax(q k / sqrt(d)) v written out head by head."""
    torch.manual_seed(0)
    model = build(n_kv_heads=n_kv_heads)
    attention, args = model.layers["0"].attention, model.args
    x = torch.randn(2, 9, args.dim, dtype=torch.float64)
    cos, sin = rope_cos_sin(torch.arange(9).expand(2, 9), args)
    d, group = args.head_dim, args.n_heads // n_kv_heads
    heads = []
    for h in range(args.n_heads):
        rows, kv_rows = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        q = apply_rope((x @ attention.wq.weight[rows].T)[:, :, None], cos, sin)[:, :, 0]
        k = apply_rope((x @ attention.wk.weight[kv_rows].T)[:, :, None], cos, sin)[:, :, 0]
        v = x @ attention.wv.weight[kv_rows].T
        scores = (q @ k.transpose(1, 2) / math.sqrt(d)).masked_fill(~torch.ones(9, 9).tril().bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(attention(x, cos, sin), torch.cat(heads, -1) @ attention.wo.weight.T)


def test_logits_do_not_depend_on_later_tokens():
    """Changing the tokens from position 10 on changes the logits from position 10 on, and no others."""
    model = build()
    tokens, positions = tokens_and_positions()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 97
    a, b = model(tokens, positions), model(changed, positions)
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.equal(a[:, 10], b[:, 10])


def test_logits_depend_on_relative_positions():
    """Adding a constant to all positions changes no logit, except for the rounding of float32 angles; adding it to half
    of them does."""
    model = build()
    tokens, positions = tokens_and_positions()
    logits = model(tokens, positions)
    torch.testing.assert_close(model(tokens, positions + 100), logits, rtol=0, atol=1e-5)
    gap = positions + 50 * (positions >= 8)
    assert (model(tokens, gap) - logits).abs().max() > 1e-3


def test_rope_rotates_each_pair_by_its_angle():
    """Channels (2k, 2k+1), as a complex number, are multiplied by exp(i position / theta^(2k/d)), in float32."""
    args = ModelArgs(**SMALL, rope_theta=10000.0)
    x = torch.randn(1, 5, 3, args.head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 7, 100, 3]])
    rotated = apply_rope(x, *rope_cos_sin(positions, args))
    for i in range(args.head_dim // 2):
        angle = positions.double() / 10000.0 ** (2 * i / args.head_dim)
        expected = (
            torch.complex(x[..., 2 * i], x[..., 2 * i + 1]) * torch.polar(torch.ones_like(angle), angle)[..., None]
        )
        torch.testing.assert_close(torch.view_as_real(expected), rotated[..., 2 * i : 2 * i + 2], rtol=0, atol=1e-5)
    cos, sin = rope_cos_sin(torch.tensor([[4097]]), args)
    assert cos.dtype == torch.float32 and apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_llama31_rope_scaling():
    """Per channel: short wavelengths keep their frequency, long wavelengths are slowed by the factor, and between them
    stands the published blend."""
    args = get_flavor("llama3_8b")
    scaled = rope_frequencies(args, torch.device("cpu"))
    for i in range(args.head_dim // 2):
        frequency = 500000.0 ** (-2 * i / args.head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192 / 1:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert scaled[i].item() == pytest.approx(expected, rel=1e-6)


def test_tied_embeddings_share_one_weight():
    """A tied head's weight is the embedding's weight, also for a model made on meta, and gets both gradients."""
    args = ModelArgs(**SMALL, tie_embeddings=True)
    with torch.device("meta"):
        model = Transformer(args).double()
    model.to_empty(device="cpu")
    init_weights(model, args, seed=0)
    assert model.output.weight is model.tok_embeddings.weight
    model(*tokens_and_positions()).logsumexp(-1).sum().backward()
    assert (model.tok_embeddings.weight.grad.abs().sum(1) > 0).all()  # also the rows of tokens that do not occur


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_heads=5), "n_heads .5. must divide model.dim .48."),
        (dict(n_kv_heads=4), "n_kv_heads .4. must divide model.n_heads .6."),
        (dict(n_heads=16, n_kv_heads=16), "must be even"),
        (dict(n_layers=0), "n_layers .0. must be at least 1"),
        (dict(rope_scaling="linear"), 'rope_scaling ."linear".'),
    ],
)
def test_model_args_rejects_impossible_shapes(changes, message):
    """The error holds the numbers that do not fit together."""
    with pytest.raises(ValueError, match=message):
        ModelArgs(**{**SMALL, **changes})


def test_unknown_flavor_suggests_the_nearest():
    """The error for a misspelt flavor names the most similar flavor."""
    with pytest.raises(ValueError, match='did you mean "llama3_8b"'):
        get_flavor("llama3-8b")


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_sequence_log_probs_equal_log_softmax(chunk_size):
    """Values, and every parameter's gradient through a preference loss (DPO, arXiv:2305.18290, without a reference
    model), equal those from log_softmax of the logits. Ignored labels and MTP take no part."""
    args = ModelArgs(**SMALL, n_mtp_layers=1)
    model = Transformer(args, chunk_size).double()
    init_weights(model, args, seed=0)
    tokens, positions = tokens_and_positions(batch=4)
    labels = tokens.roll(-1, 1).masked_fill(positions < torch.tensor([[3], [0], [16], [9]]), IGNORE_INDEX)
    table = model(tokens, positions).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = table.masked_fill(labels == IGNORE_INDEX, 0).sum(1)
    log_probs = model.sequence_log_probs(tokens, positions, labels)
    assert log_probs[2] == 0  # it has no valid label
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-12)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (
        torch.autograd.grad(-F.logsigmoid(0.1 * (x[:2] - x[2:])).sum(), parameters, allow_unused=True)
        for x in (log_probs, expected)
    )
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a is None) == (b is None) == name.startswith("mtp.")
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------ initial values


def whole(name: str, shape: tuple[int, ...], seed=0, dtype=torch.float32) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    fill_initial_values(tensor, name, tensor.shape, [torch.arange(n) for n in shape], ModelArgs(**SMALL), seed)
    return tensor


def test_any_part_of_a_parameter_has_the_whole_parameters_values():
    """A rectangle of any size and stride, drawn alone, is bitwise equal to that part of the whole parameter."""
    name, shape = "layers.0.attention.wq.weight", (301, 257)
    full, random = whole(name, shape), torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randperm(301, generator=random)[: torch.randint(0, 302, (), generator=random)]
        columns = torch.randperm(257, generator=random)[: torch.randint(1, 258, (), generator=random)]
        part = torch.empty(len(rows), len(columns))
        fill_initial_values(part, name, torch.Size(shape), [rows, columns], ModelArgs(**SMALL), 0)
        assert torch.equal(part, full[rows][:, columns])


def test_initial_values_are_a_truncated_normal():
    """Mean 0, the standard deviation asked for (0.9866 of it, since it is truncated at 3), no larger value, and no
    correlation between elements."""
    x = whole("output.weight", (2000, 1500))
    std = init_std("output.weight", ModelArgs())
    n = x.numel()
    assert abs(x.mean().item()) < 4 * std / math.sqrt(n)
    assert x.std().item() == pytest.approx(0.98658 * std, rel=4 / math.sqrt(2 * n))
    assert x.abs().max() <= 3 * std
    flat = x.flatten() / std
    for lag in (1, 2, 1500):
        assert abs((flat[:-lag] * flat[lag:]).mean().item()) < 5 / math.sqrt(n)


def test_initial_values_differ_by_name_and_seed():
    """Each layer, weight and seed has other random numbers, and not a shift of another's."""
    a = whole("layers.0.attention.wq.weight", (64, 64))
    others = [whole("layers.1.attention.wq.weight", (64, 64)), whole("layers.0.attention.wk.weight", (64, 64))]
    others += [whole("layers.0.attention.wq.weight", (64, 64), seed=1)]
    for b in others:  # of 8 million possible values a few meet by chance; a shifted copy would share nearly all
        assert len(set(a.flatten().tolist()) & set(b.flatten().tolist())) < 20


def test_init_std_has_a_rule_for_every_parameter():
    """Norms start as ones, projections into the residual stream are smaller, and a name without a rule is an error."""
    model = build(torch.float32, dim=96, n_layers=8)
    assert (model.norm.weight == 1).all() and (model.layers["3"].ffn_norm.weight == 1).all()
    ratio = model.layers["0"].attention.wo.weight.std() / model.layers["0"].attention.wq.weight.std()
    assert ratio.item() == pytest.approx(1 / 4, rel=0.05)
    with pytest.raises(ValueError, match="no rule"):
        init_std("layers.0.attention.unknown.weight", model.args)
