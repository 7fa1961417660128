"""train.py as a user sees it: launch, resume, checkpoints, its files, and errors of one line."""

import os
import re
import subprocess
import sys

import pytest
from helpers.runs import TINY, argv, options, read_metrics, run_command, write_ragged_text

SAVE = options(checkpoint__enable="true", checkpoint__interval="5", training__local_batch_size="1")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return options(data__path=write_ragged_text(folder), data__cache_folder=folder / "cache")


def trained(ranks: int, folder, *settings) -> list[str]:
    """Trains TINY in folder / "run" in float64; returns the printed lines. Fails if the run fails."""
    ended_well, lines = run_command(ranks, argv(TINY, {"job.dump_folder": str(folder / "run")}, *settings), folder)
    assert ended_well, lines
    return lines


def refused(ranks: int, folder, *settings) -> str:
    """Starts a run that must be refused; returns the one error line with which it ended."""
    ended_well, lines = run_command(ranks, argv(TINY, {"job.dump_folder": str(folder / "run")}, *settings), folder)
    errors = [line for line in lines if line.startswith("error")]
    assert not ended_well and len(errors) == 1 and lines[-1] == errors[0], lines
    assert "Traceback" not in "\n".join(lines)
    return errors[0]


def exact(folder) -> list[tuple]:
    """The numbers that must not change from run to run, to the last bit."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens_seen"]) for r in read_metrics(folder / "run")]


# ------------------------------------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text):
    """The folder of a run of twenty steps on four ranks, without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    trained(4, folder, text, SAVE, options(training__steps="20", lr_scheduler__warmup_steps="4"))
    return folder


def in_parts(folder, text, *parts) -> None:
    """Runs 20 steps with stops and resumes: parts are (ranks, step at which the run stops)."""
    for ranks, stop in parts:
        # The run is interrupted, not configured with fewer steps: its learning rate schedule must be that of 20 steps.
        settings = [text, SAVE, options(training__steps="20", lr_scheduler__warmup_steps="4")]
        if stop == 20:
            trained(ranks, folder, *settings)
        else:
            lines = argv(TINY, {"job.dump_folder": str(folder / "run")}, *settings)
            ended_well, printed = run_command(ranks, lines, folder, stop_after=stop)
            assert not ended_well and any("interrupted for the test" in line for line in printed), printed


def test_resume_is_exact_on_the_same_layout(straight, text, tmp_path):
    """10 + 10 steps, and 5 + 5 + 10 steps with a second resume, equal 20 steps to the last bit."""
    for name, parts in (("once", [(4, 10), (4, 20)]), ("twice", [(4, 5), (4, 10), (4, 20)])):
        (tmp_path / name).mkdir()
        in_parts(tmp_path / name, text, *parts)
        assert exact(tmp_path / name) == exact(straight)


@pytest.mark.parametrize("parts", [[(4, 10), (2, 20)], [(2, 10), (8, 20)], [(1, 5), (8, 15), (2, 20)]])
def test_resume_on_another_number_of_ranks_equals_straight_run(straight, text, tmp_path, parts):
    """A run that resumes once or twice, each time on another number of ranks, equals the straight run to 1e-9."""
    in_parts(tmp_path, text, *parts)
    for row, expected in zip(exact(tmp_path), exact(straight), strict=True):
        assert row == pytest.approx(expected, rel=1e-9)


def in_layout(pp=1, replicate=1, cp=1, tp=1, **more):
    return options(
        parallelism__pipeline_parallel_degree=pp,
        parallelism__data_parallel_replicate_degree=replicate,
        parallelism__context_parallel_degree=cp,
        parallelism__tensor_parallel_degree=tp,
        **more,
    )


def test_resume_in_any_layout(text, tmp_path):
    """A run that changes its layout every two steps, tensor to pipeline parallel and so on, equals one process to 1e-9.
    Embedding and head are tied; a pipeline has this weight twice."""
    interleaved = options(parallelism__pipeline_parallel_schedule="Interleaved1F1B")
    layouts = [  # ranks, layout
        (4, in_layout(tp=4)),
        (4, in_layout(pp=4)),
        (4, in_layout(cp=2)),
        (4, in_layout(pp=2, tp=2) | interleaved),
        (4, in_layout(replicate=2, tp=2)),
        (2, in_layout(pp=2, training__local_batch_size=4)),
        (1, in_layout(training__local_batch_size=2)),
        (4, in_layout(cp=2, tp=2)),
        (8, in_layout(replicate=2)),
    ]
    steps = 2 * len(layouts)
    common = [text, options(training__steps=steps, model__n_layers="4", model__tie_embeddings="true")]
    save = options(checkpoint__enable="true", checkpoint__interval="2")
    (tmp_path / "one").mkdir()
    trained(1, tmp_path / "one", *common, options(training__local_batch_size="8"))
    for i, (ranks, layout) in enumerate(layouts):
        batch = options(training__local_batch_size=8 if layout["parallelism.pipeline_parallel_degree"] != "1" else 1)
        lines = argv(TINY, {"job.dump_folder": str(tmp_path / "run")}, *common, save, batch | layout)
        ended_well, printed = run_command(ranks, lines, tmp_path, stop_after=2 * (i + 1))
        assert i == 0 or any(f"resumed at step {2 * i} " in line for line in printed), printed
        assert not ended_well and "interrupted for the test" in printed, printed
    for row, expected in zip(exact(tmp_path), exact(tmp_path / "one"), strict=True):
        assert row == pytest.approx(expected, rel=1e-9)


def test_work_after_the_last_checkpoint_is_repeated(straight, text, tmp_path):
    """A run that is killed at step 13 resumes from step 10: steps 11 to 13 run again and give the same numbers."""
    in_parts(tmp_path, text, (4, 13), (4, 20))
    rows = exact(tmp_path)
    assert [r[0] for r in rows] == [*range(1, 14), *range(11, 21)]
    assert rows[:10] + rows[13:] == exact(straight) and rows[10:13] == rows[13:16]


# ------------------------------------------------------------------------------------------------ checkpoints


def test_oldest_checkpoints_are_deleted(text, tmp_path):
    """Every interval and the last step are saved, and keep_latest_k checkpoints are kept. A finished run that is
    started again does nothing."""
    save = options(checkpoint__interval="2", checkpoint__keep_latest_k="2", training__steps="7")
    trained(2, tmp_path, text, SAVE, save)
    folder = tmp_path / "run" / "checkpoint"
    assert sorted(os.listdir(folder)) == ["step-6", "step-7"]
    trained(2, tmp_path, text, SAVE, save)
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(1, 8))


def test_incomplete_checkpoint_is_removed_not_loaded(text, tmp_path):
    """A run resumes from the newest complete checkpoint, and removes a folder that a killed run left unfinished."""
    trained(2, tmp_path, text, SAVE, options(training__steps="5"))
    folder = tmp_path / "run" / "checkpoint"
    (folder / "incomplete-step-10").mkdir()
    (folder / "incomplete-step-10" / "__0_0.distcp").write_text("torn")
    lines = trained(2, tmp_path, text, SAVE, options(training__steps="10"))
    assert any("resumed at step 5" in line for line in lines)
    assert sorted(os.listdir(folder)) == ["step-10", "step-5"]


def test_load_step_sets_newer_checkpoints_aside(text, tmp_path):
    """load_step resumes from an older checkpoint. Newer checkpoints are renamed, so that no later start resumes from
    them."""
    save = options(checkpoint__interval="2", training__steps="6")
    trained(2, tmp_path, text, SAVE, save)
    lines = trained(2, tmp_path, text, SAVE, save, options(checkpoint__load_step="2", checkpoint__keep_latest_k="0"))
    assert any("resumed at step 2" in line for line in lines)
    names = sorted(os.listdir(tmp_path / "run" / "checkpoint"))
    assert names == ["step-2", "step-4", "step-6", "superseded-step-4", "superseded-step-6"]


def test_initial_load_path_loads_weights_alone(text, tmp_path):
    """The new run starts from the weights of the checkpoint, at step 0, with new data and optimizer state."""
    trained(2, tmp_path, text, SAVE, options(training__steps="5"))
    path = tmp_path / "run" / "checkpoint" / "step-5"
    other = tmp_path / "other"
    other.mkdir()
    trained(1, other, text, options(checkpoint__initial_load_path=path, training__steps="1"))
    fresh, warm = exact(tmp_path)[0], exact(other)[0]
    assert fresh[0] == warm[0] == 1 and warm[1] < fresh[1] - 0.1
    assert "checkpoint" not in os.listdir(other / "run")  # checkpoints are off


# ------------------------------------------------------------------------------------------------ launch and files


def test_torchrun_trains_and_saved_config_repeats_the_run(text, tmp_path):
    """torchrun trains with two processes, and metrics.jsonl has every key. A run from config.toml gives the same
    numbers."""
    arguments = argv(TINY, text, {"job.dump_folder": str(tmp_path / "run"), "metrics.enable_tensorboard": "true"})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    printed = subprocess.run(command + arguments, capture_output=True, text=True, check=True)
    lines = [line for line in printed.stdout.splitlines() if line.startswith("step")]
    line = r"step \d/3  loss +\d+\.\d{4}  grad norm +\d+\.\d{4}  lr \d\.\d\de-\d\d  +[\d,]+ tokens/s  "
    line += r"+[\d.]+ TFLOP/s  +[\d.]+ GiB(  waits for data \d+%)?  left \d+:\d\d:\d\d"
    assert len(lines) == 3 and all(re.fullmatch(line, printed_line) for printed_line in lines), printed.stdout
    rows = read_metrics(tmp_path / "run")
    keys = ["step", "loss", "grad_norm", "lr", "tokens_seen", "tokens_per_second", "tokens_per_second_per_device"]
    keys += ["tflops", "mfu", "memory_gib", "seconds", "data_seconds", "skipped_steps", "failed_saves"]
    assert list(rows[0]) == keys
    assert rows[0]["mfu"] is None and rows[2]["tokens_seen"] == 3 * 8 * 32
    assert any(name.startswith("events") for name in os.listdir(tmp_path / "run" / "tensorboard"))
    first = exact(tmp_path)
    again = ["--job.config_file", str(tmp_path / "run" / "config.toml")]
    subprocess.run(command + again, capture_output=True, check=True)
    assert exact(tmp_path)[3:] == first


def test_plain_python_is_one_process(text, tmp_path):
    """`python train.py` trains without a launcher."""
    command = [sys.executable, "train.py", *argv(TINY, text, {"job.dump_folder": str(tmp_path / "run")})]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run(command, capture_output=True, check=True, env=environment)
    assert len(read_metrics(tmp_path / "run")) == 3


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"training.stepz": "3"}, "--training.stepz is not an option; did you mean training.steps?"),
        ({"job.config_file": "/no/such.toml"}, "job.config_file: cannot read /no/such.toml"),
        ({"model.flavor": "llama3_8c"}, 'model.flavor "llama3_8c" is not known; did you mean "llama3_8b"?'),
        ({"parallelism.data_parallel_replicate_degree": "3"}, "does not multiply to the number of ranks (2)"),
        ({"training.global_batch_size": "7"}, "training.global_batch_size (7) must be a multiple of"),
        ({"data.path": "/no/such/folder"}, "/no/such/folder"),
        ({"data.tokenizer": "/no/such/tokenizer.model"}, "/no/such/tokenizer.model"),
        (
            {"training.seq_len": "8000", "model.max_seq_len": "8000"},
            "needs 8001 tokens, but the whole data has",
        ),
        ({"model.max_seq_len": "16"}, "training.seq_len (32) is longer than model.max_seq_len (16)"),
        ({"model.vocab_size": "100"}, "--model.vocab_size 258"),
        ({"training.enable_cpu_offload": "true"}, "training.enable_cpu_offload"),
        ({"checkpoint.enable": "true", "checkpoint.load_step": "3"}, "complete ones: []"),
        ({"checkpoint.initial_load_path": "/no/such"}, "/no/such is not a complete checkpoint"),
        ({"optimizer.lr": "1e40", "training.max_norm": "0"}, "no weight was changed"),
    ],
)
def test_a_mistake_is_one_line(settings, message, text, tmp_path):
    """Two ranks end with a non-zero status, and rank 0 alone prints the error, as the last line."""
    assert message in refused(2, tmp_path, text, settings)


def test_checkpoint_of_another_model_is_refused(text, tmp_path):
    """The error names the sizes that differ, or a dtype that would be cast without a warning."""
    trained(1, tmp_path, text, SAVE, options(training__steps="1"))
    line = refused(2, tmp_path, text, SAVE, options(model__hidden_dim="64", model__n_layers="3"))
    assert "checkpoint of another model: n_layers is 2 there, 3 here; hidden_dim is 60 there, 64 here" in line
    line = refused(2, tmp_path, text, SAVE, options(training__dtype="float32"))
    assert "stored as torch.float64, this run has torch.float32" in line


def test_resume_on_other_data_warns(text, tmp_path):
    """Resuming on another text is allowed, with a warning."""
    trained(1, tmp_path, text, SAVE, options(training__steps="1"))
    other = tmp_path / "other.txt"
    other.write_text("something else " * 100)
    lines = trained(1, tmp_path, text, SAVE, options(training__steps="2", data__path=other))
    assert any(line.startswith("warning: data, tokenizer, seed or seq_len is not that checkpoint's") for line in lines)


def test_an_unexpected_error_keeps_its_traceback():
    """Only errors that are raised on purpose are cut to one line: a bug in a library must stay debuggable."""
    program = (
        "from resilience import clean_exit\nimport torch\n"
        "with clean_exit():\n    torch.optim.SGD([], lr=1)\n"  # a ValueError of torch's
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "optimizer got an empty" in ended.stderr
