"""Float8: what is converted, and the rounding itself.

Emulated on the CPU: the same scales and roundings, with products in float32.
"""

import itertools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import ModelArgs, Transformer
from parallelize.float8 import RECIPES, apply_float8, as_plain
from parallelize.init import init_weights

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=128)
OPTIONS = dict(recipe="tensorwise", skip=(), min_dim=16, emulate=True, fsdp_all_gather=False, device_type="cpu")
BATCH, SEQ = 8, 16


def on_meta(dtype=torch.float32, args=ARGS) -> Transformer:
    with torch.device("meta"):
        return Transformer(args).to(dtype)


def start(model: Transformer) -> Transformer:
    model.to_empty(device="cpu")
    init_weights(model, ARGS, seed=0)
    return model


# ---------------------------------------------------------------------------------- what is converted


def test_report_names_every_layer():
    """The head, what is skipped by its whole name and what is too small stay, and are told; the rest is converted."""
    model = on_meta()
    report = apply_float8(model, **OPTIONS | dict(skip=["layers.0.feed_forward.*"], min_dim=64))
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected = {f"layers.{i}.attention.{w}" for i in (0, 1) for w in ("wq", "wo")}
    expected |= {f"layers.1.feed_forward.{w}" for w in ("w1", "w2", "w3")}
    assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == expected == set(report.converted)
    assert report.kept["kept"] == ["output"] and isinstance(model.output, type(on_meta().output))
    assert sorted([*report.converted, *itertools.chain(*report.kept.values())]) == sorted(kinds)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 128
    share = (4 * 64 * 64 + 3 * 64 * 96) / weights
    assert str(report) == (
        f"float8 tensorwise: 7 of 15 linears, {share:.1%} of their weights; too small: layers.0.attention.wk, "
        "layers.0.attention.wv, layers.1.attention.wk, layers.1.attention.wv; skipped: layers.0.feed_forward.w1, "
        "layers.0.feed_forward.w2, layers.0.feed_forward.w3; kept: output"
    )


def test_sizes_that_hardware_cannot_multiply_stay():
    """Sizes must be multiples of 16, and a subclass of nn.Linear keeps what it computes besides."""

    class Gate(nn.Linear):
        pass

    model = on_meta(args=ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=100, vocab_size=128))
    model.layers["0"].attention.wq = Gate(64, 64, bias=False, device="meta")
    report = apply_float8(model, **OPTIONS)
    assert report.kept["not a multiple of 16"] == [f"layers.0.feed_forward.{w}" for w in ("w1", "w2", "w3")]
    assert report.kept["not a plain linear"] == ["layers.0.attention.wq"]
    assert type(model.layers["0"].attention.wq) is Gate


REFUSED = {
    "recipe": (dict(recipe="blockwise"), "must be one of tensorwise, rowwise, rowwise_with_gw_hp"),
    "all-gather": (dict(recipe="rowwise", fsdp_all_gather=True), 'needs float8.recipe "tensorwise", not "rowwise"'),
    "CPU": (
        dict(emulate=False),
        'compute capability 8.9, the device is "cpu"; leave float8 out, or set float8.emulate',
    ),
    "no such name": (dict(skip=["*.wk", "*.wx"]), '"*.wx" matches no linear layer; they are layers.0.attention.wq'),
    "a part of a name": (dict(skip=["layers.1"]), '"layers.1" matches no linear layer'),
    "nothing left": (dict(min_dim=65, skip=["*.w2"]), "of 15 linear layers 12 too small, 2 skipped, 1 kept;"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_an_error(case):
    """One line that says what, and what to write instead; the model is left alone."""
    changes, message = REFUSED[case]
    model = on_meta()
    with pytest.raises(ValueError) as error:
        apply_float8(model, **OPTIONS | changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not any(type(m).__name__ == "Float8Linear" for m in model.modules())


def test_float64_is_refused():
    """torchao would round to float32 on the way, which whoever asked for float64 does not expect."""
    with pytest.raises(ValueError, match="to float32 or bfloat16"):
        apply_float8(on_meta(torch.float64), **OPTIONS)


@pytest.mark.parametrize(
    ("capability", "recipe", "fits"),
    [
        ((8, 0), "tensorwise", False),
        ((8, 9), "tensorwise", True),
        ((8, 9), "rowwise", False),
        ((9, 0), "rowwise", True),
    ],
)
def test_hardware(recipe, capability, fits, monkeypatch):
    """Float8 tensor cores come with compute capability 8.9, those that scale rows with 9.0; emulation needs neither."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    options = OPTIONS | dict(recipe=recipe, device_type="cuda")
    apply_float8(on_meta(), **options)
    if fits:
        model = on_meta()
        apply_float8(model, **options | dict(emulate=False))
        assert not model.layers["0"].attention.wq.config.emulate
    else:
        with pytest.raises(ValueError, match=r"this GPU has 8\.\d; leave float8 out"):
            apply_float8(on_meta(), **options | dict(emulate=False))


def test_torchao_is_imported_late_and_quietly():
    """Not with this module, and with nothing on stderr."""
    code = (
        "import sys, torch; from parallelize.float8 import apply_float8; assert 'torchao' not in sys.modules;"
        "m = torch.nn.Sequential(torch.nn.Linear(16, 16));"
        f"print(apply_float8(m, **{OPTIONS}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("float8 tensorwise: 1 of 1 linears, 100.0% of their weights\n", "")


@pytest.mark.parametrize("fsdp_all_gather", [False, True])
def test_names_and_initial_weights_stay(fsdp_all_gather):
    """Bit for bit those without float8."""
    model, plain = on_meta(), start(on_meta())
    apply_float8(model, **OPTIONS | dict(fsdp_all_gather=fsdp_all_gather))
    weights = {name: as_plain(p) for name, p in start(model).named_parameters()}
    assert_bitwise(weights, {name: p.detach() for name, p in plain.named_parameters()})


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_bitwise(weights: dict, expected: dict) -> None:
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------- the rounding


def rounded(x, dtype, dim=None, power_of_2=False):
    """x as float8 holds it, with one scale for all of x or one for everything along dim."""
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / amax.double()).float()
    scale = torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale
    return (x * scale).to(dtype).float() / scale


def reference(recipe, x, w, g):
    """Output, gradient of the input x and of the weight w, for the gradient g of the output."""
    if recipe == "tensorwise":
        x, w, g = (rounded(t, d) for t, d in zip((x, w, g), (E4M3, E4M3, E5M2), strict=True))
        return x @ w.T, g @ w, g.T @ x
    row = dict(dtype=E4M3, power_of_2=True)
    output = rounded(x, dim=1, **row) @ rounded(w, dim=1, **row).T
    if recipe == "rowwise":
        grad_weight = rounded(g, dim=0, **row).T @ rounded(x, dim=0, **row)
        return output, rounded(g, dim=1, **row) @ rounded(w, dim=0, **row), grad_weight
    return output, rounded(g, dim=1, **row) @ rounded(w, **row), g.T @ x


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_equals_hand_written_rounding(recipe):
    """Each of the three products has the operands, the scales and the float8 types that the recipe says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32, bias=False))
    # Rows and columns of very different sizes tell one scale from many.
    w = model[0].weight.data.mul_(torch.logspace(-2, 1, 32)[:, None] * torch.logspace(-1, 1, 48)).clone()
    apply_float8(model, **OPTIONS | dict(recipe=recipe))
    x = (torch.randn(64, 48) * torch.logspace(-1, 1, 64)[:, None]).requires_grad_()
    g = torch.randn(64, 32) * torch.logspace(-3, 0, 64)[:, None]
    output = model(x)
    output.backward(g)
    expected = reference(recipe, x.detach(), w, g)
    for ours, theirs in zip((output, x.grad, model[0].weight.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert difference(output, x.detach() @ w.T) > 1e-2  # and it does round


def difference(value, expected) -> float:
    return ((value - expected).norm() / expected.norm()).item()
