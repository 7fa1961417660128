"""Float8: what is converted, and the rounding itself. Emulated on the CPU: the same scales and roundings, with products
in float32."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from helpers.float8_model import ARGS, OPTIONS, assert_bitwise, difference, on_meta, start
from helpers.runs import argv
from torch import nn

from config import load_config
from parallelize.float8 import NEEDED_CAPABILITY, apply_float8, as_plain, choose_layers, linear_layers

# ---------------------------------------------------------------------------------- what is converted


def converted_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


def test_float8_log_line_accounts_for_every_layer():
    """The head and the layers that `skip` names stay, and the line says so; all other layers are converted."""
    model, skip = on_meta(), ["layers.0.feed_forward.*", "*.wk", "*.wv"]
    linears = linear_layers(model)
    converted, kept = choose_layers(linears, skip)
    line = apply_float8(model, "cpu", **OPTIONS | dict(skip=skip))
    expected = {f"layers.{i}.attention.{w}" for i in (0, 1) for w in ("wq", "wo")}
    expected |= {f"layers.1.feed_forward.{w}" for w in ("w1", "w2", "w3")}
    assert converted_layers(model) == expected == converted
    assert kept["head"] == ["output"] and isinstance(model.output, type(on_meta().output))
    assert sorted([*converted, *itertools.chain(*kept.values())]) == sorted(linears)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 128
    share = (4 * 64 * 64 + 3 * 64 * 96) / weights
    assert line == (
        f"float8 tensorwise: 7 of 15 linear layers, {share:.1%} of their weights; skipped: layers.0.attention.wk, "
        "layers.0.attention.wv, ... layers.1.attention.wv (7); head: output"
    )


def test_float8_not_enabled_changes_nothing():
    """Without float8.enable the model stays as it is, and there is no line for the log."""
    model = on_meta()
    assert apply_float8(model, "cpu", **OPTIONS | dict(enable=False)) == "" and not converted_layers(model)


def test_float8_keeps_layers_that_kernels_do_not_take():
    """Sizes must be multiples of 16, and a subclass of nn.Linear keeps what it computes in addition."""

    class Gate(nn.Linear):
        pass

    model = on_meta(args=replace(ARGS, n_layers=1, hidden_dim=100))
    model.layers["0"].attention.wq = Gate(64, 64, bias=False, device="meta")
    line = apply_float8(model, "cpu", **OPTIONS)
    assert (
        "; not a multiple of 16: " + ", ".join(f"layers.0.feed_forward.{w}" for w in ("w1", "w2", "w3")) + ";" in line
    )
    assert "; not a plain linear: layers.0.attention.wq;" in line
    assert type(model.layers["0"].attention.wq) is Gate
    assert converted_layers(model) == {f"layers.0.attention.{w}" for w in ("wk", "wv", "wo")}


REFUSED = {
    "CPU": (
        dict(emulate=False),
        'compute capability 8.9, the device is "cpu"; leave float8 out, or set float8.emulate',
    ),
    "no such name": (dict(skip=["*.wk", "*.wx"]), '"*.wx" matches no linear layer; they are layers.0.attention.wq'),
    "a part of a name": (dict(skip=["layers.1"]), '"layers.1" matches no linear layer'),
    "nothing left": (
        dict(skip=["*.attention.*"]),
        "of 15 linear layers 8 skipped, 6 not a multiple of 16, 1 head; skip less",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_float8_rejects_what_it_cannot_convert(case):
    """The error is one line that says what to write instead; no layer has been converted."""
    changes, message = REFUSED[case]
    model = on_meta(args=replace(ARGS, hidden_dim=100))
    with pytest.raises(ValueError) as error:
        apply_float8(model, "cpu", **OPTIONS | changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not converted_layers(model)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"float8.recipe": "blockwise"},
            'expected "tensorwise" | "rowwise" | "rowwise_with_gw_hp", given "blockwise".',
        ),
        (
            {"float8.recipe": "rowwise", "float8.enable_fsdp_float8_all_gather": "true"},
            "has no effect without float8.recipe tensorwise",
        ),
    ],
)
def test_float8_rejects_impossible_recipe(options, message):
    """An unknown recipe, and float8 all-gather with scales per row, are errors of one line."""
    with pytest.raises(ValueError) as error:
        load_config(argv({"float8.enable": "true"}, options))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_float8_rejects_float64_weights():
    """torchao would round them to float32 on the way, which a user who asked for float64 does not expect."""
    with pytest.raises(ValueError, match="to float32 or bfloat16"):
        apply_float8(on_meta(torch.float64), "cpu", **OPTIONS)


@pytest.mark.parametrize(
    ("capability", "recipe", "fits"),
    [
        ((8, 0), "tensorwise", False),
        ((8, 9), "tensorwise", True),
        ((8, 9), "rowwise", False),
        ((9, 0), "rowwise", True),
    ],
)
def test_float8_rejects_gpus_without_kernels(recipe, capability, fits, monkeypatch):
    """Float8 tensor cores come with compute capability 8.9, those that scale rows with 9.0; emulation needs neither."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    options = OPTIONS | dict(recipe=recipe)
    apply_float8(on_meta(), "cuda", **options)
    if fits:
        model = on_meta()
        apply_float8(model, "cuda", **options | dict(emulate=False))
        assert not model.layers["0"].attention.wq.config.emulate
    else:
        with pytest.raises(ValueError, match=r"this GPU has 8\.\d; leave float8 out"):
            apply_float8(on_meta(), "cuda", **options | dict(emulate=False))


def test_torchao_is_imported_late_and_quietly():
    """Not with this module, and with nothing on stderr."""
    code = (
        "import sys, torch; from parallelize.float8 import apply_float8; assert 'torchao' not in sys.modules;"
        "m = torch.nn.Sequential(torch.nn.Linear(16, 16));"
        f"print(apply_float8(m, 'cpu', **{OPTIONS}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("float8 tensorwise: 1 of 1 linear layers, 100.0% of their weights\n", "")


@pytest.mark.parametrize("all_gather", [False, True])
def test_float8_names_and_initial_weights_equal_those_without(all_gather):
    """Bit for bit."""
    model, plain = on_meta(), start(on_meta())
    apply_float8(model, "cpu", **OPTIONS | dict(enable_fsdp_float8_all_gather=all_gather))
    weights = {name: as_plain(p) for name, p in start(model).named_parameters()}
    assert_bitwise(weights, {name: p.detach() for name, p in plain.named_parameters()})


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


@pytest.mark.parametrize("recipe", NEEDED_CAPABILITY)
def test_linear_equals_hand_written_rounding(recipe):
    """Each of the three products has the operands, the scales and the float8 types that the recipe says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32, bias=False))
    # Rows and columns of very different sizes tell one scale from many.
    w = model[0].weight.data.mul_(torch.logspace(-2, 1, 32)[:, None] * torch.logspace(-1, 1, 48)).clone()
    apply_float8(model, "cpu", **OPTIONS | dict(recipe=recipe))
    x = (torch.randn(64, 48) * torch.logspace(-1, 1, 64)[:, None]).requires_grad_()
    g = torch.randn(64, 32) * torch.logspace(-3, 0, 64)[:, None]
    output = model(x)
    output.backward(g)
    expected = reference(recipe, x.detach(), w, g)
    for ours, theirs in zip((output, x.grad, model[0].weight.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert difference(output, x.detach() @ w.T) > 1e-2  # and it does round
