"""Saves that fail, asynchronous saves, retention, the end of a run, and checkpoints of earlier versions: on two ranks,
without a training run. Tests marked `fault` are lines of docs/faults.md, see test_faults.py."""

import os
import resource
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.checkpoints import Checkpoints, only_rank0, progress
from helpers.fault_table import fault
from helpers.ranks import run_ranks

import checkpoint.writer
from resilience.process_group import init_distributed

# ------------------------------------------------------------------------------------------------ saves that fail


@contextmanager
def small_disk(folder: Path, size: str = "200k"):
    """Mounts a file system of that size. Yields False where that is not possible; then a limit on the size of files
    takes its place."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)


def run_failing_saves(disk: str, is_mounted: bool, read_only: str | None) -> dict[str, tuple]:
    """For each way to fail: whether the save succeeded, the number of failed saves, rank 0's output, the folder."""
    init_distributed("cpu", 60)
    results = {}

    def record(name: str, c: Checkpoints, saved: bool) -> None:
        results[name] = saved, c.manager.failed_saves, c.lines, c.names if c.folder.is_dir() else []

    # No space for a shard: seen before the save, then not seen.
    c = Checkpoints(Path(disk) / "ck")
    filler = Path(disk) / "filler"
    assert c.save(1)
    free = shutil.disk_usage(disk).free
    if is_mounted:
        only_rank0(lambda: filler.write_bytes(b"0" * (free - 4096)))
        record("no space, seen before", c, c.save(2))
        usage, shutil.disk_usage = shutil.disk_usage, lambda _: usage("/")
        record("disk full during a save", c, c.save(3))
        shutil.disk_usage = usage
        only_rank0(lambda: os.remove(filler))
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        record("disk full during a save", c, c.save(3))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert c.save(4) and c.load() == "step 4"
    # A folder that cannot be written: mounted read-only, or a file in its place.
    blocked = Path(read_only) if read_only else Path(disk) / "file" / "ck"
    only_rank0(lambda: read_only or (Path(disk) / "file").write_text(""))
    c = Checkpoints(blocked)
    record("read-only folder", c, c.save(1))
    # One rank fails in the background.
    c = Checkpoints(Path(disk) / "async", async_mode="async")
    if dist.get_rank() == 1:
        write, checkpoint.writer._write_tensors = checkpoint.writer._write_tensors, _write_and_fail
    record("one rank fails, asynchronous", c, c.save(1))
    if dist.get_rank() == 1:
        checkpoint.writer._write_tensors = write
    assert c.save(2) and c.load() == "step 2"
    return results


def _write_and_fail(partial, tensors, group):
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), process_group=group)
    raise OSError("injected")


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    bound = folder / "read-only"
    bound.mkdir()
    commands = [["mount", "--bind", bound, bound], ["mount", "-o", "remount,ro,bind", bound]]
    is_read_only = all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)
    try:
        with small_disk(folder / "disk") as is_mounted:
            read_only = str(bound / "ck") if is_read_only else None
            return run_ranks(2, run_failing_saves, str(folder / "disk"), is_mounted, read_only)
    finally:
        subprocess.run(["umount", "-l", bound], capture_output=True)


@fault("save: {fault}")
@pytest.mark.parametrize(
    "fault, message",
    [
        ("no space, seen before", " bytes are needed, "),
        ("disk full during a save", ": "),
        ("read-only folder", "OSError: "),
        ("one rank fails, asynchronous", "rank 1: OSError: injected"),
    ],
)
def test_failed_save_leaves_nothing_and_the_run_continues(fault, message, failed):
    """All ranks give the save up together, rank 0 prints a warning, no file of it is left, the metrics count it, and
    the run continues; the next interval tries again."""
    if fault not in failed[0]:
        pytest.skip("this machine cannot mount a tmpfs")
    (saved, count, printed, names), (saved_1, count_1, *_) = failed[0][fault], failed[1][fault]
    assert not saved and not saved_1 and count == count_1 > 0
    *_, line = printed.splitlines()
    assert line.startswith("WARNING: step ") and "was NOT saved" in line and message in line, line
    assert not any(name.startswith("incomplete") for name in names)


# ------------------------------------------------------------------------------------------------ saves that succeed


def run_saves(folder: str) -> dict:
    init_distributed("cpu", 60)
    folder, results = Path(folder), {}
    # The weights change while an asynchronous save is written.
    c = Checkpoints(folder / "async", async_mode="async")
    write, began, go_on = checkpoint.writer._write_tensors, threading.Event(), threading.Event()

    def write_slowly(*args):
        began.set()
        go_on.wait(30)
        return write(*args)

    checkpoint.writer._write_tensors = write_slowly
    c.set(1)
    before = time.monotonic()
    c.manager.save(progress(1))
    c.manager.wait_for_staging()
    c.set(7)
    results["waited"] = time.monotonic() - before
    assert began.wait(30) and "step-1" not in c.names
    go_on.set()
    c.manager.wait()
    results["loaded"] = c.load()
    checkpoint.writer._write_tensors = write

    c = Checkpoints(folder / "kept", keep_latest_k=2, keep_every=4)
    c.save(*range(1, 11))
    results["kept"] = c.names

    # The first format: a whole checkpoint, then the weights alone in bfloat16.
    c = Checkpoints(folder / "first")
    c.save_in_first_format(1)
    results["resume from first format"], results["printed"] = c.load(), c.lines
    c.save_in_first_format(2, dtype=torch.bfloat16)
    results["resume from weights"] = c.load()
    fresh = Checkpoints(folder / "fresh")
    for name, step in (("first format", 1), ("weights", 2)):
        results[f"start from {name}"] = fresh.load(path=str(folder / "first" / f"step-{step}"))
    path = str(folder / "first" / "step-2")
    results["start from some"] = fresh.load(path=path, exclude=["norm"])
    results["exclude nothing"] = fresh.load(path=path, exclude=["wid"])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(2, run_saves, str(tmp_path_factory.mktemp("kept")))[0]


@fault("weights change during an asynchronous save")
def test_asynchronous_save_holds_the_weights_of_its_step(results):
    """The checkpoint holds the weights of the moment of the call to `save`, and it appears when it is complete."""
    assert results["waited"] < 5 and results["loaded"] == "step 1"


def test_keep_every_and_latest_k(results):
    """Of ten steps the latest two and every fourth are kept."""
    assert results["kept"] == ["step-10", "step-4", "step-8", "step-9"]


def test_checkpoint_of_first_format_loads(results):
    """The first version's state.json has other names for some arguments and for data_fingerprint: a run resumes from
    it, without a warning about the data, and a new run starts from its weights."""
    assert results["resume from first format"] == "step 1"
    assert results["printed"] == "resumed at step 1 (10 tokens seen)\n"
    start = results["start from first format"]
    assert start.startswith("no step") and "'model.wide.weight': {1.0}" in start
    assert "'optimizer.wide.weight.exp_avg': {-1.0}" in start


def test_weights_only_checkpoint_refuses_resume_and_starts_a_run(results):
    """An earlier version could save the weights alone, in bfloat16: no run resumes from them, a new run can start."""
    assert "step-2 holds the weights alone" in results["resume from weights"]
    assert "\n" not in results["resume from weights"]
    assert "'model.wide.weight': {2.0}" in results["start from weights"]
    assert "'optimizer.wide.weight.exp_avg': {-1.0}" in results["start from weights"]


def test_exclude_from_loading(results):
    """The named parameters keep their values; a name that matches nothing is an error."""
    some = results["start from some"]
    assert "'model.norm.weight': {-1.0}" in some and "'model.wide.weight': {2.0}" in some
    assert 'no parameter that is, or begins with, "wid"' in results["exclude nothing"]


# ------------------------------------------------------------------------------------------------ end of a run


def run_to_the_end(folder: str) -> dict:
    """What `finish` returns after step 3 of 4 or 4 of 4, and the steps that are on the disk then."""
    init_distributed("cpu", 60)
    results = {}
    prepare = checkpoint.writer._prepare

    def fail(*args):
        raise OSError("injected")

    def run(name: str, last_step: int, fails: str = "", **options) -> None:
        c = Checkpoints(Path(folder) / name, interval=2, **options)
        with redirect_stdout(c.output):
            for step in range(1, last_step + 1):
                checkpoint.writer._prepare = fail if fails == "at the last step" and step == 4 else prepare
                c.set(step)
                c.manager.maybe_save(progress(step), is_last=step == 4)
                c.manager.wait()
            checkpoint.writer._prepare = fail if fails == "in finish" else prepare
            is_saved = c.manager.finish(progress(last_step))
            checkpoint.writer._prepare = prepare
        results[name] = is_saved, c.names if c.folder.exists() else None, c.manager.failed_saves

    for mode in ("disabled", "async"):
        run(f"complete, {mode}", 4, async_mode=mode)
        run(f"stopped, {mode}", 3, async_mode=mode)
    run("stopped at an interval", 2)
    run("last save fails", 4, fails="at the last step")
    run("stopped, save fails", 3, fails="in finish")
    run("disabled", 4, enable=False)

    c = Checkpoints(Path(folder) / "complete, async")
    assert c.load() == "step 4"
    results["started again"] = c.manager.finish(progress(4)), c.names, c.manager.failed_saves
    return results


def test_finish_tells_whether_the_last_step_is_saved(tmp_path):
    """`finish` saves a run that is stopped between two saves. It does not try the failed save of a complete run again,
    and returns False. A complete run that is started again has nothing to save."""
    for result in run_ranks(2, run_to_the_end, str(tmp_path)):
        assert result == {
            "complete, disabled": (True, ["step-2", "step-4"], 0),
            "stopped, disabled": (True, ["step-2", "step-3"], 0),
            "complete, async": (True, ["step-2", "step-4"], 0),
            "stopped, async": (True, ["step-2", "step-3"], 0),
            "stopped at an interval": (True, ["step-2"], 0),
            "last save fails": (False, ["step-2"], 1),
            "stopped, save fails": (False, ["step-2"], 1),
            "disabled": (None, None, 0),
            "started again": (True, ["step-2", "step-4"], 0),
        }
