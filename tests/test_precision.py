"""Compiled blocks in float32, bfloat16 compute and float8, which float64 cannot run, each against the plain float32
run."""

import pytest
import torch
from helpers.layouts import V3
from helpers.runs import options, series, side_by_side, train_all, write_ragged_text

FLOAT32 = options(
    training__dtype="float32", training__mixed_precision_param="float32", training__mixed_precision_reduce="float32",
    # Adam takes a whole step in the direction of a gradient's sign, even where the gradient is only rounding. This eps
    # is far above the rounding.
    optimizer__eps=1e-4,
)  # fmt: skip
AXES = {"pp": "pipeline", "cp": "context", "tp": "tensor", "ep": "expert"}


def degrees(**by_axis) -> dict[str, str]:
    return {f"parallelism.{AXES[axis]}_parallel_degree": str(n) for axis, n in by_axis.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return options(data__path=write_ragged_text(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, text):
    """Eager, in float32, for three steps."""
    folder = tmp_path_factory.mktemp("reference")
    return train_all(1, {folder / "run": text | FLOAT32 | options(training__local_batch_size=8)})[0]


def largest_error(run: dict, reference: dict) -> float:
    pairs = [*zip(run["gradients"], reference["gradients"], strict=True), (run["weights"], reference["weights"])]
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for a, b in pairs for n in b)


MEMORY_BUDGET = options(activation_checkpoint__mode="memory_budget", activation_checkpoint__selective_option="0.5")
COMPILED = {  # ranks, options
    "alone, inductor": (1, options(compile__backend="inductor", training__local_batch_size=8)),
    "fsdp2, full": (2, options(activation_checkpoint__mode="full")),
    "fsdp2 memory budget": (2, MEMORY_BUDGET),
    "tp2": (2, degrees(tp=2)),
    "fsdp2 tp2, selective": (4, degrees(tp=2) | options(activation_checkpoint__mode="selective")),
    "cp2, selective": (2, degrees(cp=2) | options(activation_checkpoint__mode="selective")),
    "cp2 tp2 alltoall": (4, degrees(cp=2, tp=2) | options(parallelism__context_parallel_method="alltoall")),
    "pp2 fsdp2": (4, degrees(pp=2) | options(training__local_batch_size=4)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layout_equals_eager_process(name, one_process, text, tmp_path):
    """Blocks and loss compiled, on each parallelism: loss, gradients and weights follow the eager run of one process to
    1e-4."""
    ranks, setting = COMPILED[name]
    compiled = options(compile__enable="true", compile__backend="aot_eager", training__local_batch_size=2)
    run = train_all(ranks, {tmp_path / "run": text | FLOAT32 | compiled | setting})[0]
    assert series(run, "loss") == pytest.approx(series(one_process, "loss"), rel=1e-4)
    assert series(run, "grad_norm") == pytest.approx(series(one_process, "grad_norm"), rel=1e-4)
    assert largest_error(run, one_process) < 1e-4


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory, text):
    """One process, eager, three steps of DeepSeek-V3's parts: in float64, with experts in a loop, and in float32, with
    the grouped product."""
    folder, batch = tmp_path_factory.mktemp("mixtures"), options(training__local_batch_size=8)
    looped, grouped = text | V3 | batch | options(optimizer__eps=1e-4), text | V3 | batch | FLOAT32
    (a,), (b,) = side_by_side((1, {folder / "64" / "run": looped}), (1, {folder / "32" / "run": grouped}))
    return dict(float64=a, float32=b)


def norm_error(run: dict, reference: dict) -> float:
    """The largest of all gradients' errors, each by its norm."""
    pairs = zip(run["gradients"], reference["gradients"], strict=True)
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for a, b in pairs for n in b)


def test_grouped_experts_follow_loop_over_experts(mixtures):
    """The grouped products of all experts, in float32, follow the loop over experts in float64: loss to 1e-6, gradients
    to 1e-5."""
    assert series(mixtures["float32"], "loss") == pytest.approx(series(mixtures["float64"], "loss"), rel=1e-6)
    assert norm_error(mixtures["float32"], mixtures["float64"]) < 1e-5


GROUPED = {  # ranks, options
    "fsdp2 ep2": (2, degrees(ep=2)),
    "fsdp2 tp2 ep4": (4, degrees(tp=2, ep=4)),
    "cp2 ep2 latent": (2, degrees(cp=2, ep=2) | options(parallelism__context_parallel_method="latent")),
    "pp2 fsdp2 ep2": (4, degrees(pp=2, ep=2) | options(training__local_batch_size=4)),
    "fsdp2 ep2, parts compiled": (2, degrees(ep=2) | options(compile__enable="true", compile__backend="aot_eager")),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_experts_in_layout_follow_one_process(name, mixtures, text, tmp_path):
    """In float32, with the grouped product, a mixture on several ranks follows one process to 1e-5."""
    ranks, setting = GROUPED[name]
    run = train_all(ranks, {tmp_path / "run": text | V3 | FLOAT32 | options(training__local_batch_size=2) | setting})[0]
    for key in ("loss", "grad_norm"):
        assert series(run, key) == pytest.approx(series(mixtures["float32"], key), rel=1e-5)
    assert norm_error(run, mixtures["float32"]) < 1e-5


def test_compiled_moe_in_bfloat16_follows_eager(text, tmp_path):
    """On one process the whole block is compiled, and its parts where experts are a separate group. Both follow eager
    bfloat16 to 1 %."""
    bf16 = text | V3 | FLOAT32 | options(training__mixed_precision_param="bfloat16", training__local_batch_size=8)
    compiled = options(compile__enable="true", compile__backend="aot_eager")
    apart = bf16 | compiled | degrees(tp=2, ep=2) | options(activation_checkpoint__mode="selective")
    alone = {tmp_path / "eager": bf16, tmp_path / "whole": bf16 | compiled}
    (eager, whole), (parts,) = side_by_side((1, alone), (2, {tmp_path / "parts" / "run": apart}))
    for run in (whole, parts):
        assert series(run, "loss") == pytest.approx(series(eager, "loss"), rel=1e-2)
        assert series(run, "grad_norm") == pytest.approx(series(eager, "grad_norm"), rel=3e-2)


FLOAT8 = options(  # sizes that float8 takes
    float8__enable="true", float8__emulate="true", model__dim=64, model__hidden_dim=96, model__vocab_size=272,
)  # fmt: skip
SIZES = {name: value for name, value in FLOAT8.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory, text):
    """200 steps of one process: bfloat16 compute, and float8 with each of two recipes on top."""
    folder = tmp_path_factory.mktemp("long")
    common = text | FLOAT32 | SIZES | options(training__mixed_precision_param="bfloat16", training__steps=200)
    common |= options(
        training__local_batch_size=8, optimizer__lr=3e-3, lr_scheduler__warmup_steps=20, optimizer__eps=1e-8
    )
    runs = {folder / "bfloat16" / "run": common}
    for recipe in ("tensorwise", "rowwise"):
        runs[folder / recipe / "run"] = common | FLOAT8 | options(float8__recipe=recipe)
    found = side_by_side(*((1, {path: setting}) for path, setting in runs.items()))
    return {path.parent.name: run for path, (run,) in zip(runs, found, strict=True)}


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_trains_like_bfloat16(recipe, long_runs):
    """Over 200 steps the loss falls by much more than 1 %, and stays within 1 % of bfloat16's. Compared are means of 10
    steps, since a single step's losses differ by chance."""

    def means(name):
        losses = series(long_runs[name], "loss")
        return [sum(losses[i : i + 10]) / 10 for i in range(0, len(losses), 10)]

    ours, expected = means(recipe), means("bfloat16")
    assert ours == pytest.approx(expected, rel=1e-2) and ours != expected
    assert expected[-1] < 0.6 * expected[0]


FLOAT8_LAYOUTS = {  # more in test_float8_layouts.py; ranks, options; a microbatch is one sequence, as one process's
    "fsdp2 tp2, gathered in float8": (4, degrees(tp=2) | options(float8__enable_fsdp_float8_all_gather="true")),
    "pp2": (2, degrees(pp=2) | options(training__local_batch_size=8)),
}


@pytest.mark.parametrize("name", FLOAT8_LAYOUTS)
def test_float8_layout_equals_one_process(name, text, tmp_path):
    """Float8 on several ranks equals float8 on one process that takes one sequence at a time. Sums differ in float32's
    last digits, which push some values over a rounding boundary of float8: a difference of 1e-3 of a gradient, where a
    wrong scale would make 1e-1."""
    ranks, setting = FLOAT8_LAYOUTS[name]
    common = text | FLOAT32 | FLOAT8 | options(training__local_batch_size=1, training__steps=1)
    one = train_all(1, {tmp_path / "one": common})[0]
    run = train_all(ranks, {tmp_path / "run": common | setting})[0]
    assert series(run, "loss") == pytest.approx(series(one, "loss"), rel=1e-4)
    for parameter, expected in one["gradients"][0].items():
        error = (run["gradients"][0][parameter] - expected).norm() / expected.norm()
        assert error < 5e-3, (parameter, error)


def test_bfloat16_training_follows_float32(text, tmp_path):
    """bfloat16 compute with float32 weights and sums stays within 1 % of float32 over 20 steps, on one process and with
    every axis; what is kept between steps, weights and gradients, is float32."""
    bf16 = text | FLOAT32 | options(training__steps=20, optimizer__lr=3e-3, training__local_batch_size=4)
    full = train_all(1, {tmp_path / "float32": bf16})[0]
    bf16 |= options(training__mixed_precision_param="bfloat16")
    runs = train_all(4, {tmp_path / "tp": bf16 | degrees(tp=2), tmp_path / "pp_cp": bf16 | degrees(pp=2, cp=2)})
    for run in (*runs, *train_all(1, {tmp_path / "one": bf16})):
        assert series(run, "loss") == pytest.approx(series(full, "loss"), rel=1e-2)
        assert series(run, "loss") != series(full, "loss")
        kept = [*run["weights"].values(), *run["gradients"][0].values()]
        assert all(tensor.dtype == torch.float32 for tensor in kept)
