"""Every layout equals one process: loss, each parameter's gradient, gradient norm, weights after three steps.

In float64, so that no error hides in rounding: agreement is near 1e-12, and 1e-9 is required. helpers/layouts.py lists
the layouts; `pytest tests/test_parity.py --write-docs` writes docs/layouts.md from what it has proven.
"""

import platform
from datetime import date
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.layouts import GLOBAL_BATCH, LAYOUTS, MODELS, V2
from helpers.ranks import run_ranks
from helpers.runs import options, series, side_by_side, train_all, train_on, write_ragged_text

from model import ModelArgs, Transformer
from parallelize import build_mesh
from parallelize.fsdp import parallelize_data
from resilience.process_group import init_distributed
from torch_private import torch_at_least

BATCH_OF_RUNS = 8  # layouts that one set of processes trains: torch's caches stay warm
DOCS = Path(__file__).parent.parent / "docs" / "layouts.md"
IS_OLD = not torch_at_least(2, 12)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return options(data__path=str(write_ragged_text(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="module")
def references(tmp_path_factory, text):
    """One process, no accumulation, for each model."""
    folder = tmp_path_factory.mktemp("reference")
    whole_batch = options(training__local_batch_size=GLOBAL_BATCH)
    halves = [{}, {}]
    for i, model in enumerate(MODELS.values()):
        half = 2 * i // len(MODELS)
        halves[half][folder / str(half) / str(i)] = text | whole_batch | model
    first, second = side_by_side(*((1, half) for half in halves))
    return dict(zip(MODELS, first + second, strict=True))


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory, text):
    """A function: layout's name -> its run. It trains several of the layouts that were selected together."""
    folder, runs = tmp_path_factory.mktemp("layouts"), {}
    selected = [
        i.callspec.params["name"]
        for i in request.session.items
        if i.originalname == test_layout_equals_one_process.__name__
    ]
    waiting = [name for name in selected if not (IS_OLD and LAYOUTS[name].needs_torch_2_12)]

    def get(name: str) -> dict:
        if name not in runs:
            same_ranks = [n for n in waiting if LAYOUTS[n].ranks == LAYOUTS[name].ranks]
            batch = [name, *(n for n in same_ranks if n not in runs and n != name)][:BATCH_OF_RUNS]
            settings = {folder / n.replace(" ", "_"): text | LAYOUTS[n].settings() for n in batch}
            runs.update(zip(batch, train_all(LAYOUTS[name].ranks, settings), strict=True))
        return runs[name]

    return get


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def assert_equal_runs(run: dict, reference: dict, tolerance: float = 1e-9) -> dict[str, float]:
    """The largest relative error of each kind of quantity."""
    errors = {}
    for key in ("loss", "grad_norm"):
        errors[key] = max(abs(a / b - 1) for a, b in zip(series(run, key), series(reference, key), strict=True))
    for key in ("lr", "tokens_seen"):
        assert series(run, key) == series(reference, key)
    # How many tokens each expert gets, and the biases that follow from it, are not rounded: they are equal.
    for ours, expected in zip(
        [*run["experts"], run["biases"]], [*reference["experts"], reference["biases"]], strict=True
    ):
        assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    kinds = {"gradients": zip(run["gradients"], reference["gradients"], strict=True)}
    kinds["weights"] = [(run["weights"], reference["weights"])]
    for kind, pairs in kinds.items():
        for ours, expected in pairs:
            assert ours.keys() == expected.keys()
            for name in expected:
                error = relative_error(ours[name], expected[name])
                assert error < tolerance, (kind, name, error)
                errors[kind] = max(errors.get(kind, 0.0), error)
    assert max(errors.values()) < tolerance, errors
    return errors


@pytest.fixture(scope="module")
def proven(request):
    """Errors of the layouts that were found equal; with --write-docs a full run leaves them in docs/layouts.md."""
    errors = {}
    yield errors
    if request.config.getoption("--write-docs") and errors.keys() == LAYOUTS.keys():
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(table_of(errors))


def table_of(errors: dict[str, dict[str, float]]) -> str:
    rows = [
        f"| {name} | {LAYOUTS[name].ranks} | " + " | ".join(f"{error:.0e}" for error in found.values()) + " |"
        for name, found in errors.items()
    ]
    return (
        f"""# Layouts that equal one process

Written by `pytest tests/test_parity.py --write-docs` on {date.today()}, torch {torch.__version__},
{platform.machine()}, gloo, float64: a Llama, or a mixture of experts, of two to eight layers, three AdamW
steps through `train.py`. Columns: the largest relative difference from one process, over the steps, of the loss and of
the gradient norm; over the steps and parameters, of any gradient's and any weight's element, relative to that tensor's
largest. 1e-9 is what the test allows.

{len(rows)} layouts; an axis that is not named has degree 1.

| layout | ranks | loss | gradient norm | gradients | weights |
|---|---|---|---|---|---|
"""
        + "\n".join(rows)
        + "\n"
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, trained, references, proven):
    """Loss, every gradient, gradient norm and weights equal those of one process with the same global batch, for any
    number of ranks, layout and number of microbatches."""
    if IS_OLD and LAYOUTS[name].needs_torch_2_12:
        with pytest.raises(AssertionError, match=r"needs torch 2\.12"):
            trained(name)
        return
    proven[name] = assert_equal_runs(trained(name), references[LAYOUTS[name].model])


@pytest.mark.parametrize("dim, hidden_dim", [(46, 24), (46, 22)])
def test_uneven_experts_equal_one_process(dim, hidden_dim, text, tmp_path):
    """With fewer experts than ranks, the ranks can cut evenly the columns of an expert's matrices, or neither their
    rows nor their columns."""
    model = V2 | options(model__dim=dim, model__moe_hidden_dim=hidden_dim, model__n_experts=3, model__n_expert_groups=1)
    model |= options(model__topk_group=1)
    reference = train_on(1, tmp_path / "1", text, model, options(training__local_batch_size=8))
    run = train_on(4, tmp_path / "4", text, model, options(training__local_batch_size=2))
    assert_equal_runs(run, reference)


def test_docs_list_the_tested_layouts():
    """docs/layouts.md lists the layouts of helpers/layouts.py, all of them and no others."""
    listed = [line.split(" | ")[0][2:] for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    assert listed[1:] == list(LAYOUTS)


def test_the_data_is_ragged(text, tmp_path):
    """This makes the tests above strict: ranks and microbatches hold different numbers of valid tokens."""
    run = train_on(4, tmp_path / "run", text, options(training__local_batch_size=1))
    for step in range(3):
        assert len({tuple(rank[step]) for rank in run["valid"]}) == 4  # all four ranks differ
        assert any(len(set(rank[step])) == 2 for rank in run["valid"])  # and a rank's two microbatches
    # A mean of means would not pass: it differs from the true loss by far more than the tolerance.
    counts = [sum(rank[0]) for rank in run["valid"]]
    assert max(counts) / min(counts) > 1.05


def _dtypes_under_mixed_precision():
    init_distributed("cpu", 60)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)
    model = Transformer(args)
    mesh = build_mesh("cpu", dist.get_world_size())
    parallelize_data(
        model,
        mesh.fsdp,
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        reshard_after_forward=True,
        cpu_offload=False,
    )
    seen = []
    model.layers["1"].attention.register_forward_pre_hook(lambda _, inputs: seen.append([x.dtype for x in inputs[:3]]))
    model(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)[None])
    return seen


def test_rope_stays_float32_under_mixed_precision():
    """FSDP casts weights to bfloat16, and the stream follows, but not the cosines and sines of RoPE."""
    assert run_ranks(2, _dtypes_under_mixed_precision)[0] == [[torch.bfloat16, torch.float32, torch.float32]]


def test_first_loss_is_equal_on_any_number_of_ranks(text, tmp_path):
    """The first loss agrees to 1e-12 on 1, 2, 4 and 8 ranks: weights and data are the same."""
    first = [
        series(train_on(n, tmp_path / str(n), text, options(training__steps=1, training__local_batch_size=1)), "loss")[
            0
        ]
        for n in (1, 2, 4, 8)
    ]
    assert first == pytest.approx([first[0]] * 4, rel=1e-12)
