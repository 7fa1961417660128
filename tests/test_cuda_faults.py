"""What goes wrong on a GPU, and saves beside training there. (Without one: test_faults.py, test_saves.py.)"""

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.cuda_runs import COMPILE, MIXTURE, SMALL, needs_gpu, run
from helpers.faults import exit_codes, start
from helpers.runs import argv, options, read_metrics, write_ragged_text

from checkpoint.integrity import MANIFEST
from checkpoint.writer import Staging
from resilience.signals import EXIT_PREEMPTED

pytestmark = needs_gpu

PINNED = options(checkpoint__async_mode="async_with_pinned_mem")
EACH_STEP = options(checkpoint__enable="true", checkpoint__interval="1", checkpoint__keep_latest_k="0")
EXACT = options(training__deterministic="true", training__steps="8")


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "does not"])
def test_the_optimizer_waits_for_the_copy(waits):
    """A gigabyte that is overwritten while it is copied into pinned memory: what was there before arrives, for the
    device waits; without that, something else does."""
    staging, tensors = Staging(pinned=True), {"x": torch.ones(2**28, device="cuda")}
    for first in (1, 2):  # the second copy goes into the memory of the first
        tensors["x"].fill_(first)
        copies, copied = staging.copy(tensors)
        if waits:
            staging.wait()
        tensors["x"].fill_(-1)
        copied()
        assert copies["x"].is_pinned() and copies["x"].eq(first).all().item() == waits


def _files(folder: Path) -> dict[str, dict]:
    """The checksums of each checkpoint's tensors."""
    manifests = {path.parent.name: json.loads(path.read_text()) for path in folder.glob(f"step-*/{MANIFEST}")}
    return {step: {k: v for k, v in m["files"].items() if k.endswith(".distcp")} for step, m in manifests.items()}


@pytest.mark.parametrize("more", [{}, COMPILE | MIXTURE], ids=["dense", "mixture, compiled"])
def test_saves_beside_training_are_the_same_files(more, tmp_path):
    """Saved after each of 8 steps, the files of asynchronous saves from pinned memory are byte for byte those of saves
    that training stood still for; and the CPU waits for the GPU no more than without them."""
    still = run(tmp_path / "still", more, EACH_STEP, EXACT)
    beside = run(tmp_path / "beside", more, EACH_STEP, EXACT, PINNED, options(metrics__log_freq="8"))
    still_files, beside_files = (_files(tmp_path / name / "run" / "checkpoint") for name in ("still", "beside"))
    assert len(still_files) == 8 and beside_files == still_files
    assert beside["metrics"][-1]["loss"] == still["metrics"][-1]["loss"]
    waits = dict(beside["waits"])
    assert [waits[step] for step in (4, 5, 6)] == [["training/optimizer.py"]] * 3


class Job:
    def __init__(self, folder: Path, *settings):
        self.folder, self.settings, self.output = folder, settings, folder / "output.txt"

    def run(self, fault: dict | None = None) -> int:
        where = {"job.dump_folder": str(self.folder / "run"), "data.cache_folder": str(self.folder / "cache")}
        (code,) = exit_codes(start(1, argv(SMALL, where, EXACT, *self.settings), str(self.output), fault), timeout=240)
        return code

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def rows(self) -> list[tuple]:
        rows = {row["step"]: row for row in read_metrics(self.folder / "run")}
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows.values()]


def test_killed_beside_a_save(tmp_path):
    """kill -9 while asynchronous saves from pinned memory go on: resumed, compiled, on packed documents, the losses are
    an undisturbed run's to the last bit. SIGTERM likewise, with status 75."""
    packed = options(data__packing="documents", data__path=write_ragged_text(tmp_path))
    settings = (COMPILE, PINNED, EACH_STEP, packed)
    undisturbed, job = Job(tmp_path, *settings), Job(tmp_path / "job", *settings)
    job.folder.mkdir()
    assert undisturbed.run() == 0, undisturbed.text
    assert job.run(dict(kind="kill", step=5)) == -9
    assert job.run(dict(kind="SIGTERM", step=2)) == EXIT_PREEMPTED, job.text
    assert job.run() == 0, job.text
    assert job.text.count("resumed at step ") == 2 and job.rows == undisturbed.rows and len(job.rows) == 8


def test_out_of_memory(tmp_path):
    """One line says what to change."""
    job = Job(tmp_path)
    assert job.run(dict(kind="out of GPU memory", step=2)) == 1
    (line,) = [line for line in job.text.splitlines() if line.startswith("error")]
    assert "OutOfMemoryError" in line and "lower training.local_batch_size" in line


def test_a_collective_that_hangs(tmp_path):
    """Behind a kernel that does not end, NCCL's next collective ends the run after comm.timeout_seconds, with a line
    that says so; its flight recorder's last collectives, and where the CPU waits, are in the dump folder."""
    job = Job(tmp_path, options(comm__timeout_seconds="10"))
    assert job.run(dict(kind="GPU hangs", step=3)) == 1, job.text
    assert "rank 0 failed: one of NCCL's collectives was not done after comm.timeout_seconds" in job.text
    stacks = tmp_path / "run" / "stacks"
    recorded = pickle.loads((stacks / "nccl-rank-0").read_bytes())["entries"]
    assert any(entry["state"] != "completed" for entry in recorded), recorded
    assert "train.py" in (stacks / "rank-0.txt").read_text()
