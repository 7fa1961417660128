"""Whole runs on one GPU: precision, compiler, exact resume, and that the CPU does not wait for the GPU.

The runs are small and take a few minutes; without a GPU they are skipped. test_cuda_kernels.py tests single kernels,
test_cuda_faults.py tests faults.
"""

import pytest
from helpers.cuda_runs import COMPILE, MIXTURE, SMALL, needs_gpu, run
from helpers.runs import argv, options, read_metrics, run_command, series, write_ragged_text

pytestmark = needs_gpu


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory) -> list[float]:
    """The losses of 30 steps in bfloat16, eager: the reference of other tests."""
    losses = series(run(tmp_path_factory.mktemp("bfloat16")), "loss")
    assert losses[-1] < 0.7 * losses[0]
    return losses


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_trains_like_bfloat16(recipe, bfloat16, tmp_path):
    """With the GPU's float8 kernels each of 30 losses is within 2 % of bfloat16's, and the losses are not equal."""
    losses = series(run(tmp_path, options(float8__enable="true", float8__recipe=recipe)), "loss")
    assert losses == pytest.approx(bfloat16, rel=0.02) and losses != bfloat16


@pytest.mark.parametrize("more", [{}, options(activation_checkpoint__mode="selective")], ids=["none", "selective"])
def test_compiled_trains_like_eager(more, bfloat16, tmp_path):
    """Losses are within 1 %, and nothing is compiled after the second step."""
    losses = series(run(tmp_path, COMPILE, more, no_compilation_after=2), "loss")
    assert losses == pytest.approx(bfloat16, rel=0.01)


def test_compiled_float8_trains_like_bfloat16(bfloat16, tmp_path):
    """Losses are within 2 % with two microbatches a step, and nothing is compiled after the second step."""
    more = options(float8__enable="true", training__local_batch_size="4", training__global_batch_size="8")
    losses = series(run(tmp_path, COMPILE, more, no_compilation_after=2), "loss")
    assert losses == pytest.approx(bfloat16, rel=0.02)


@pytest.mark.parametrize(
    "more",
    [
        {},
        options(training__dtype="bfloat16"),
        COMPILE | options(training__local_batch_size="4", training__global_batch_size="8"),
        COMPILE | options(float8__enable="true"),
        COMPILE | options(float8__enable="true", float8__enable_fsdp_float8_all_gather="true"),
    ],
    ids=["fsdp", "pure bfloat16", "compiled", "float8", "float8 all-gather"],
)
def test_cpu_waits_for_gpu_once_a_step(more, tmp_path):
    """The CPU waits for the grad norm, which decides whether the weights may change. In a logged step it also waits for
    the loss."""
    waits = dict(run(tmp_path, more, options(training__steps="8", metrics__log_freq="6"))["waits"])
    assert [waits[step] for step in (3, 4, 5, 7)] == [["training/optimizer.py"]] * 4
    assert waits[6] == ["training/optimizer.py", "train.py"]


@pytest.mark.parametrize("more", [{}, COMPILE], ids=["eager", "compiled"])
def test_resume_is_exact(more, tmp_path):
    """5 + 5 steps equal 10 steps to the last bit, in bfloat16, with deterministic kernels."""
    settings = [SMALL, {"data.cache_folder": str(tmp_path / "cache")}, more]
    settings += [options(training__deterministic="true", training__steps="10")]
    settings += [options(checkpoint__enable="true", checkpoint__interval="5")]
    for name, stops in (("straight", [None]), ("resumed", [5, None])):
        for stop in stops:
            lines = argv(*settings, {"job.dump_folder": str(tmp_path / name)})
            ended_well, printed = run_command(1, lines, tmp_path, stop_after=stop)
            assert ended_well == (stop is None), "\n".join(printed)
    assert any("resumed at step 5 " in line for line in printed)
    exact = [[(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / name)]
             for name in ("straight", "resumed")]  # fmt: skip
    assert exact[0] == exact[1] and len(exact[0]) == 10


def test_compiled_mixture_trains_like_eager(tmp_path):
    """With DeepSeek-V3's parts each of 30 losses is within 1 %, nothing is compiled after the second step, and in steps
    without a log line the CPU waits for the grad norm alone."""
    eager = series(run(tmp_path / "eager", MIXTURE), "loss")
    compiled = run(tmp_path / "compiled", MIXTURE, COMPILE, options(metrics__log_freq="10"), no_compilation_after=2)
    assert eager[-1] < 0.7 * eager[0]
    for row in compiled["metrics"]:
        assert row["loss"] == pytest.approx(eager[row["step"] - 1], rel=0.01)
    waits = dict(compiled["waits"])
    assert [waits[step] for step in (3, 7, 15)] == [["training/optimizer.py"]] * 3


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_ragged_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("kind", [{}, MIXTURE], ids=["dense", "mixture"])
def test_compiled_packed_documents_train_like_eager(kind, mode, text, tmp_path):
    """With FlexAttention in compiled blocks, recomputed or not, losses are within 1 % of eager losses. Nothing is
    compiled after the second step, though every step has another mask, and the CPU waits no more than without masks."""
    packed = options(data__packing="documents", data__path=text, training__steps="8")
    eager = series(run(tmp_path / "eager", kind, packed), "loss")
    more = options(activation_checkpoint__mode=mode, metrics__log_freq="6")
    compiled = run(tmp_path / mode, kind, packed, COMPILE, more, no_compilation_after=2)
    assert [row["step"] for row in compiled["metrics"]] == [1, 6, 8] and eager[-1] < 0.9 * eager[0]
    for row in compiled["metrics"]:
        assert row["loss"] == pytest.approx(eager[row["step"] - 1], rel=0.01), mode
    waits = dict(compiled["waits"])
    assert [waits[step] for step in (3, 4, 5, 7)] == [["training/optimizer.py"]] * 4


def test_validation_compiles_once_and_its_loss_falls(tmp_path):
    """The held-out loss falls and is close to the training loss at the end. It is compiled at its first time only."""
    more = options(
        validation__enable="true", validation__num_sequences="19", validation__interval="4", training__steps="20"
    )
    metrics = run(tmp_path, COMPILE, more, no_compilation_after=4)["metrics"]
    losses = {row["step"]: row["validation_loss"] for row in metrics if row.get("validation_loss")}
    assert sorted(losses) == [4, 8, 12, 16, 20] and losses[20] < 0.8 * losses[4]
    assert losses[20] == pytest.approx(metrics[-1]["loss"], rel=0.2)


@pytest.mark.parametrize("kind", [{}, MIXTURE], ids=["dense", "mixture"])
def test_cpu_offload_trains_like_gpu_memory(kind, tmp_path):
    """With weights, gradients and optimizer state in CPU memory, each of 10 losses is within 1 % of the run without
    offload, and the GPU needs less memory."""
    steps = options(training__steps="10")
    metrics = {
        offload: run(tmp_path / offload, kind, steps, options(training__enable_cpu_offload=offload))["metrics"]
        for offload in ("false", "true")
    }
    on_cpu, on_gpu = ([row["loss"] for row in metrics[offload]] for offload in ("true", "false"))
    assert on_cpu == pytest.approx(on_gpu, rel=0.01)
    assert metrics["true"][-1]["memory_gib"] < metrics["false"][-1]["memory_gib"]
