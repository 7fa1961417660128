"""Runs in which something fails. Each test injects one fault and is one line of docs/faults.md: the mark names the
fault, and the docstring says what follows. `pytest --write-docs` with the modules of helpers/fault_table.py writes the
table.

Damaged checkpoints, failed saves and damaged data are in test_damaged_checkpoints.py, test_saves.py and test_shards.py;
benchmarks/fault_sweep.py kills runs many times.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import fault_table
from helpers.fault_table import fault
from helpers.faults import FAULTS, TORCHRUN, TwoHosts, exit_codes, start
from helpers.runs import TINY, argv, options, read_metrics, write_ragged_text

from resilience import EXIT_PREEMPTED
from resilience.clean_exit import OUT_OF_MEMORY, report_with_traceback

STEPS = 8
RUN = options(
    training__steps=STEPS, lr_scheduler__warmup_steps=2, checkpoint__enable="true", checkpoint__interval=2,
    training__local_batch_size=1, comm__timeout_seconds=60,
)  # fmt: skip
ASYNC = options(checkpoint__async_mode="async")


class Job:
    """One dump folder, in which runs are started."""

    def __init__(self, folder: Path, text: dict[str, str]):
        self.folder, self.text, self.output = folder, text, folder / "output.txt"

    def argv(self, *settings) -> list[str]:
        return argv(TINY, {"job.dump_folder": str(self.folder / "run")}, self.text, RUN, *settings)

    def run(self, ranks: int, *settings, fault: dict | None = None) -> list[int]:
        return exit_codes(start(ranks, self.argv(*settings), str(self.output), fault))

    @property
    def lines(self) -> list[str]:
        return self.output.read_text().splitlines()

    @property
    def rows(self) -> list[tuple]:
        """The numbers that must not change from run to run, of each step. A step that was done again counts once."""
        rows = read_metrics(self.folder / "run")
        return list(
            {r["step"]: (r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens_seen"]) for r in rows}.values()
        )

    @property
    def saved(self) -> list[str]:
        return sorted(os.listdir(self.folder / "run" / "checkpoint"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return options(data__path=write_ragged_text(folder), data__cache_folder=folder / "cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text):
    job = Job(tmp_path_factory.mktemp("undisturbed"), text)
    assert job.run(2) == [0, 0], job.lines
    return job.rows


@pytest.fixture
def job(tmp_path, text):
    return Job(tmp_path, text)


# ------------------------------------------------------------------------------------------------ ranks that are lost


@fault("kill -9 of one rank")
def test_kill_9_of_one_rank(job, undisturbed):
    """The other ranks end within seconds. The next start resumes from the last complete checkpoint, and its losses
    equal those of an undisturbed run to the last bit."""
    processes = start(2, job.argv(), str(job.output), dict(kind="kill", step=6, rank=1))
    processes[1].join(60)
    killed = time.monotonic()
    assert exit_codes(processes) == [1, -signal.SIGKILL] and time.monotonic() - killed < 10, job.lines
    assert job.run(2) == [0, 0] and "resumed at step 4" in "\n".join(job.lines)
    assert job.rows == undisturbed


@fault("kill -9 of all ranks during a save (async_mode {mode})")
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_kill_9_of_all_ranks_during_a_save(mode, job, undisturbed):
    """The unfinished folder is no checkpoint and is removed. The run resumes from the checkpoint before it, and its
    losses equal those of an undisturbed run to the last bit."""
    settings = options(checkpoint__async_mode=mode)
    processes = start(2, job.argv(settings), str(job.output), dict(kind="kill in save", step=4))
    processes[0].join(60)
    for process in processes:
        process.kill()
    exit_codes(processes)
    assert job.saved == ["incomplete-step-4", "step-2"]
    assert job.run(2, settings) == [0, 0] and "resumed at step 2" in "\n".join(job.lines)
    assert job.rows == undisturbed and job.saved == ["step-2", "step-4", "step-6", "step-8"]


@fault("killed three times in a row, resumed on fewer and more ranks and in other layouts")
def test_killed_three_times_resumes_on_other_ranks_and_layouts(job, undisturbed):
    """Runs on 2, 1, 4 and 2 ranks, with tensor and pipeline parallelism, equal an undisturbed run to 1e-9."""
    pipeline = options(parallelism__pipeline_parallel_degree=2, training__local_batch_size=4)
    for ranks, settings, step in (
        (2, {}, 3),
        (1, {}, 3),
        (4, options(parallelism__tensor_parallel_degree=2), 3),
        (2, pipeline, None),
    ):
        job.run(ranks, settings, fault=dict(kind="kill", step=step, rank=ranks - 1) if step else None)
    assert [line.split(" (")[0] for line in job.lines if line.startswith("resumed")] == [
        "resumed at step 2",
        "resumed at step 4",
        "resumed at step 6",
    ]
    for row, expected in zip(job.rows, undisturbed, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)


@fault("a rank asleep, the others in a collective")
def test_rank_asleep_ends_the_collective(job):
    """The collective fails after comm.timeout_seconds. The run ends with a line that says so, and the stack of each
    rank in the dump folder names the function that slept."""
    settings = options(comm__timeout_seconds=4)
    began = time.monotonic()
    codes = exit_codes(start(2, job.argv(settings), str(job.output), dict(kind="sleep", step=3, rank=1)))
    assert codes == [1, 1] and time.monotonic() - began < 60
    assert any(line.startswith("error: rank 0 failed") and "comm.timeout_seconds" in line for line in job.lines)
    stacks = [(job.folder / "run" / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert " in hurt" in stacks[1] and "rank 1: rank 0 failed" in stacks[1] and "Current thread" in stacks[0]


@fault("NCCL reports a collective that hangs")
@pytest.mark.parametrize("kind", ["NCCL's file", "NCCL's file, elsewhere"])
def test_nccl_timeout_ends_all_ranks(kind, job):
    """When NCCL's flight recorder writes a rank's last collectives, all ranks end within seconds, with a line that says
    so, and write their stacks. (This test writes the file by hand; in `tests/test_cuda_faults.py` NCCL does.)"""
    stacks = job.folder / "run" / "stacks"
    stacks.mkdir(parents=True)
    (stacks / "nccl-rank-0").write_text("of an earlier run")
    settings = options(comm__timeout_seconds=600)
    assert exit_codes(start(2, job.argv(settings), str(job.output), dict(kind=kind, step=3, rank=1))) == [1, 1]
    why = "rank 1 failed: one of NCCL's collectives was not done after comm.timeout_seconds"
    assert any(line.startswith(f"rank 1 ends: {why}") for line in job.lines), job.lines
    assert why in (stacks / "rank-1.txt").read_text() and "train.py" in (stacks / "rank-0.txt").read_text()


@fault("a rank crashes under torchrun --max-restarts")
def test_crash_under_torchrun_restarts_all_ranks(job, undisturbed):
    """torchrun starts all ranks again, and they resume from the last checkpoint."""
    crash = [str(FAULTS), "crash", "6", "1"]
    command = [*TORCHRUN, "--standalone", "--max-restarts=1", *crash, *job.argv()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr
    assert "error: rank 1 failed: RuntimeError: injected" in done.stderr
    assert job.rows == undisturbed


@fault("no checkpoint can be written")
def test_disk_full_does_not_end_the_run(job, undisturbed):
    """The run goes on to its last step, and the metrics count the failed saves. It exits with status 1, since the last
    step is not saved."""
    assert job.run(2, fault=dict(kind="disk full")) == [1, 1], job.lines
    assert job.rows == undisturbed and [row["failed_saves"] for row in read_metrics(job.folder / "run")][-1] == 3
    assert "error: the last step could not be saved" in job.lines


# ------------------------------------------------------------------------------------------------ preemption


@fault("{name} to one rank")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_to_one_rank_saves_and_ends_all(name, job, undisturbed):
    """All ranks save after the same step and exit with status 75; the next start resumes from that step. The same holds
    with asynchronous saves."""
    settings = ASYNC if name == "SIGUSR1" else {}
    assert job.run(2, settings, fault=dict(kind=name, step=3, rank=1)) == [EXIT_PREEMPTED] * 2, job.lines
    assert any(line == f"{name} ended the run after step 4, which is saved" for line in job.lines), job.lines
    assert job.run(2, settings) == [0, 0] and job.rows == undisturbed


@fault("SIGTERM to torchrun, ranks and data workers")
def test_sigterm_to_torchrun_ranks_and_data_workers(job, undisturbed):
    """All of them receive the signal. The data workers ignore it, and the ranks save and end."""
    settings = options(data__num_workers=1, training__steps=100000, metrics__log_freq=1)
    command = [*TORCHRUN, "--standalone", "train.py", *job.argv(settings)]
    with open(job.output, "w") as file:
        torchrun = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 90
    while not any(line.startswith("step ") for line in job.lines) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(torchrun.pid, signal.SIGTERM)
    torchrun.wait(60)
    (ended,) = [line for line in job.lines if line.startswith("SIGTERM ended the run after step ")]
    step = int(ended.split()[6].rstrip(","))
    assert ended.endswith("which is saved") and f"step-{step}" in job.saved
    assert not any("Traceback" in line and "rank" in line for line in job.lines), job.lines


# ------------------------------------------------------------------------------------------------ bad numbers, memory


@fault("one rank: {kind}")
@pytest.mark.parametrize("kind", ["nan gradient", "nan forward", "infinite loss"])
def test_not_finite_on_one_rank_ends_the_run(kind, job):
    """All ranks end before the optimizer's step. One line names the step, the first parameter and, if its loss is not
    finite, the rank. The last checkpoint is good."""
    assert job.run(2, fault=dict(kind=kind, step=3, rank=1)) == [1, 1]
    (line,) = [line for line in job.lines if line.startswith("error")]
    assert line.startswith("error: step 3: the gradient's norm is nan") and line.endswith("no weight was changed.")
    assert ("rank 1's loss is" in line) == (kind != "nan gradient") and "rank 0's loss" not in line
    assert "gradient is not finite is tok_embeddings.weight (rank 0)" in line
    assert job.saved == ["step-2"] and not any("Traceback" in line for line in job.lines)


@fault("NaN on one rank, skipping allowed")
def test_not_finite_step_is_skipped_if_allowed(job):
    """With training.max_skipped_steps the step changes no weight, the metrics count it, and the run goes on."""
    settings = options(training__max_skipped_steps=1)
    assert job.run(2, settings, fault=dict(kind="nan forward", step=3, rank=1)) == [0, 0], job.lines
    rows = read_metrics(job.folder / "run")
    assert [row["skipped_steps"] for row in rows] == [0, 0] + [1] * (STEPS - 2)
    assert rows[2]["loss"] is None and all(row["loss"] for row in rows[3:])
    assert any(line.startswith("WARNING: step 3:") for line in job.lines)


@fault("out of memory")
def test_out_of_memory_says_what_to_change(job):
    """One line says which options to change."""
    assert job.run(2, fault=dict(kind="out of memory", step=2, rank=1)) == [1, 1]
    (line,) = [line for line in job.lines if line.startswith("error")]
    assert "rank 1 failed" in line and "lower training.local_batch_size" in line


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_out_of_memory_is_recognised_by_its_text(text, capfd):
    """torch raises it as several errors, and each of them is recognised."""
    report_with_traceback(RuntimeError(f"{text}: more of it"), None)
    report_with_traceback(RuntimeError("something else"), None)
    first, other = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "lower training.local_batch_size" in first and "lower training.local_batch_size" not in other


# ------------------------------------------------------------------------------------------------ jobs and hosts


@fault("two jobs in one dump folder")
def test_two_jobs_in_one_folder_the_second_is_refused(job):
    """The second job is refused with one line that names the process of the first. If that process is killed, the
    folder is free."""
    processes = start(1, job.argv(), str(job.output), dict(kind="sleep", step=2))
    while not (job.folder / "run" / "metrics.jsonl").exists() or not read_metrics(job.folder / "run"):
        assert processes[0].is_alive(), job.lines
        time.sleep(0.1)
    second = Job(job.folder, job.text)
    second.output = job.folder / "second.txt"
    assert second.run(2) == [1, 1]
    (line,) = [line for line in second.lines if line.startswith("error:")]
    assert f"another run is using job.dump_folder {job.folder / 'run'} (process {processes[0].pid} on " in line
    processes[0].kill()
    assert job.run(2) == [0, 0]


@fault("two hosts (no fault)")
def test_two_hosts_equal_one(job, undisturbed):
    """torchrun on two hosts (network namespaces with a cable between them), 2 ranks each, equals the run on one host to
    1e-9."""
    hosts = TwoHosts()
    try:
        hosts.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        hosts.__exit__()
        pytest.skip(f"this machine cannot make network namespaces: {getattr(error, 'stderr', error)}")
    try:
        outputs = [job.folder / f"host-{i}.txt" for i in (0, 1)]
        runs = [hosts.torchrun(i, job.argv(), outputs[i]) for i in (0, 1)]
        assert [run.wait(150) for run in runs] == [0, 0], [output.read_text() for output in outputs]
    finally:
        for run in runs:
            run.kill()
        hosts.__exit__()
    for row, expected in zip(job.rows, undisturbed, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)


def test_docs_list_the_faults():
    """docs/faults.md lists exactly the faults of these tests, each with the docstring of its test."""
    assert fault_table.listed() == {title: follows for title, (follows, _) in fault_table.faults().items()}
