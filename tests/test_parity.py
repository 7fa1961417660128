"""Every layout equals one process: loss, each parameter's gradient, gradient norm, weights after three steps.

In float64, so that nothing hides in rounding: agreement is near 1e-13, and 1e-9 is asked for.
"""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import options, series, train_on, write_ragged_text

from model import ModelArgs, Transformer
from parallelize import Degrees, build_mesh, parallelize
from training.distributed import init_distributed

REPLICATE, SHARD = "parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_shard_degree"
LAYOUTS = {  # name: (ranks, options)
    "fsdp2": (2, {}),
    "fsdp4": (4, {}),
    "fsdp8": (8, {}),
    "fsdp4 never freed": (4, options(parallelism__fsdp_reshard_after_forward="never")),
    "hsdp 2x2": (4, {REPLICATE: "2"}),
    "hsdp 2x4": (8, {REPLICATE: "2"}),
    "replicate 2": (2, {REPLICATE: "2", SHARD: "1"}),
}
# Sequences a microbatch, as a part of a rank's share of the global batch of 8: all at once, or one after another.
ACCUMULATION = {"at once": None, "accumulated": 1}
MODELS = {
    "grouped": {},
    "tied, multi-query": options(model__tie_embeddings="true", model__n_kv_heads="1"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return options(data__path=str(write_ragged_text(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="module")
def references(tmp_path_factory, text):
    """One process, no accumulation, for each model."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        name: train_on(1, folder / str(i), text, model, options(training__local_batch_size=8))
        for i, (name, model) in enumerate(MODELS.items())
    }


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def assert_equal_runs(run: dict, reference: dict, tolerance: float = 1e-9) -> None:
    for key in ("loss", "grad_norm", "lr", "tokens_seen"):
        assert series(run, key) == pytest.approx(series(reference, key), rel=tolerance), key
    for step, (gradients, expected) in enumerate(zip(run["gradients"], reference["gradients"], strict=True)):
        assert gradients.keys() == expected.keys()
        errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
        assert max(errors.values()) < tolerance, (step, max(errors, key=errors.get), max(errors.values()))
    errors = {name: relative_error(run["weights"][name], w) for name, w in reference["weights"].items()}
    assert max(errors.values()) < tolerance, (max(errors, key=errors.get), max(errors.values()))


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, accumulation, references, text, tmp_path):
    """With the same global batch, whatever the ranks, the way they are used and the number of microbatches."""
    ranks, setting = LAYOUTS[layout]
    local = ACCUMULATION[accumulation] or 8 // ranks
    run = train_on(ranks, tmp_path / "run", text, setting, options(training__local_batch_size=local))
    assert_equal_runs(run, references["grouped"])


def test_tied_weights_and_multi_query(references, text, tmp_path):
    """A weight that is used twice, at both ends of the model, gets the sum of both gradients once, under HSDP too."""
    run = train_on(
        4, tmp_path / "run", text, MODELS["tied, multi-query"], {REPLICATE: "2"}, options(training__local_batch_size=1)
    )
    assert_equal_runs(run, references["tied, multi-query"])


def test_accumulation_alone_equals_one_batch(references, text, tmp_path):
    """One process that takes the batch in eight pieces."""
    run = train_on(1, tmp_path / "run", text, options(training__local_batch_size=1))
    assert_equal_runs(run, references["grouped"])


def test_the_data_is_ragged(references, text, tmp_path):
    """What makes the tests above strict: ranks and microbatches do hold different numbers of valid tokens."""
    run = train_on(4, tmp_path / "run", text, options(training__local_batch_size=1))
    for step in range(3):
        assert len({tuple(rank[step]) for rank in run["valid"]}) == 4  # all four ranks differ
        assert any(len(set(rank[step])) == 2 for rank in run["valid"])  # and a rank's two microbatches
    # A mean of means would not pass: it differs from the true loss by far more than the tolerance.
    counts = [sum(rank[0]) for rank in run["valid"]]
    assert max(counts) / min(counts) > 1.05


def test_mixed_precision_follows_full_precision(text, tmp_path):
    """bfloat16 compute with float32 weights and sums stays within 1 % of float32 over ten steps; what is kept between
    steps, weights and gradients, is float32."""
    full = options(training__dtype="float32", training__mixed_precision_reduce="float32", training__steps="10")
    runs = [
        train_on(2, tmp_path / dtype, text, full, {"training.mixed_precision_param": dtype, "optimizer.lr": "0.003"})
        for dtype in ("float32", "bfloat16")
    ]
    assert series(runs[1], "loss") == pytest.approx(series(runs[0], "loss"), rel=1e-2)
    assert series(runs[1], "loss") != series(runs[0], "loss")
    kept = [*runs[1]["weights"].values(), *runs[1]["gradients"][0].values()]
    assert all(tensor.dtype == torch.float32 for tensor in kept)


def _dtypes_under_mixed_precision():
    init_distributed("cpu", 60)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64)
    model = Transformer(args)
    mesh = build_mesh(Degrees(), "cpu", dist.get_world_size())
    options = dict(reduce_dtype=torch.float32, reshard_after_forward=True, cpu_offload=False)
    parallelize(model, mesh, param_dtype=torch.bfloat16, **options)
    seen = []
    model.layers["1"].attention.register_forward_pre_hook(lambda _, inputs: seen.append([x.dtype for x in inputs]))
    model(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)[None])
    return seen


def test_rope_stays_float32_under_mixed_precision():
    """FSDP casts weights to bfloat16, and the stream follows, but not the cosines and sines of RoPE."""
    assert run_ranks(2, _dtypes_under_mixed_precision)[0] == [[torch.bfloat16, torch.float32, torch.float32]]


def test_same_start_on_any_number_of_ranks(text, tmp_path):
    """The first loss agrees to 1e-12 on 1, 2, 4 and 8 ranks: weights and data are the same."""
    first = [
        series(train_on(n, tmp_path / str(n), text, options(training__steps=1, training__local_batch_size=1)), "loss")[
            0
        ]
        for n in (1, 2, 4, 8)
    ]
    assert first == pytest.approx([first[0]] * 4, rel=1e-12)
