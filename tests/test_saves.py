"""Saves that fail, and saves beside training: on two ranks, without a run around them. Tests marked `fault` are lines
of docs/faults.md, see test_faults.py."""

import os
import resource
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.checkpoints import Checkpoints, on_rank_0
from helpers.fault_table import fault
from helpers.ranks import run_ranks

import checkpoint.storage
from checkpoint.safe_metadata import SafeReader
from resilience.process_group import init_distributed

# ------------------------------------------------------------------------------------------------ saves that fail


@contextmanager
def small_disk(folder: Path, size: str = "200k"):
    """A file system of that size; where it cannot be mounted, a limit on the size of files."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    yield mounted.returncode == 0
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", folder], check=True)


def failing(disk: str, is_mounted: bool, read_only: str | None) -> dict[str, tuple]:
    """For each way to fail: whether the save was, how many saves failed, and what rank 0 printed."""
    init_distributed("cpu", 60)
    results = {}
    # Space: there is none left for a shard, once it is known before, and once not.
    c = Checkpoints(Path(disk) / "ck")
    filler = Path(disk) / "filler"
    assert c.save(1)
    free = shutil.disk_usage(disk).free
    if is_mounted:
        on_rank_0(lambda: filler.write_bytes(b"0" * (free - 4096)))
        results["no space, seen before"] = c.save(2), c.manager.failed_saves, c.lines, c.names
        usage, shutil.disk_usage = shutil.disk_usage, lambda _: usage("/")
        results["disk full during a save"] = c.save(3), c.manager.failed_saves, c.lines, c.names
        shutil.disk_usage = usage
        on_rank_0(lambda: os.remove(filler))
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        results["disk full during a save"] = c.save(3), c.manager.failed_saves, c.lines, c.names
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert c.save(4) and c.load() == "step 4"
    # A folder that cannot be written to: mounted read-only, or with a file where it should be.
    blocked = Path(read_only) if read_only else Path(disk) / "file" / "ck"
    on_rank_0(lambda: read_only or (Path(disk) / "file").write_text(""))
    c = Checkpoints(blocked)
    results["read-only folder"] = c.save(1), c.manager.failed_saves, c.lines, None
    # One rank alone fails, in the background.
    c = Checkpoints(Path(disk) / "async", async_mode="async")
    if dist.get_rank() == 1:
        write, checkpoint.storage._write_own_files = checkpoint.storage._write_own_files, _fail
    results["one rank fails, asynchronous"] = c.save(1), c.manager.failed_saves, c.lines, c.names
    if dist.get_rank() == 1:
        checkpoint.storage._write_own_files = write
    assert c.save(2) and c.load() == "step 2"
    return results


def _fail(partial, tensors, group):
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
            return run_ranks(2, failing, str(folder / "disk"), is_mounted, str(bound / "ck") if is_read_only else None)
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
def test_save_that_fails(fault, message, failed):
    """All ranks give it up together, rank 0 says so loudly, nothing is left of it, it is counted in the metrics, and
    the run goes on; the next interval tries again."""
    if fault not in failed[0]:
        pytest.skip("this machine cannot mount a tmpfs")
    (saved, count, printed, names), (saved_1, count_1, *_) = failed[0][fault], failed[1][fault]
    assert not saved and not saved_1 and count == count_1 > 0
    *_, line = printed.splitlines()
    assert line.startswith("WARNING: step ") and "was NOT saved" in line and message in line, line
    assert names is None or not any(name.startswith("incomplete") for name in names)


# ------------------------------------------------------------------------------------------------ beside training


def kept(folder: str) -> dict:
    init_distributed("cpu", 60)
    results = {}
    # Asynchronous: what is saved is what was there when it was asked for, whatever happens to the weights meanwhile.
    c = Checkpoints(Path(folder) / "async", async_mode="async")
    write, began, go_on = checkpoint.storage._write_own_files, threading.Event(), threading.Event()

    def slow(*args):
        began.set()
        go_on.wait(30)
        return write(*args)

    checkpoint.storage._write_own_files = slow
    c.set(1)
    before = time.monotonic()
    c.manager.save(1)
    c.manager.wait_for_staging()
    c.set(7)
    results["waited"] = time.monotonic() - before
    assert began.wait(30) and "step-1" not in c.names
    go_on.set()
    assert c.manager.wait() and c.load() == "step 1"
    checkpoint.storage._write_own_files = write
    # Kept for good, and the newest.
    c = Checkpoints(Path(folder) / "kept", keep_latest_k=2, keep_every=4)
    c.save(*range(1, 11))
    results["kept"] = c.names
    # The weights alone, in another dtype: no run goes on from them, but one may begin.
    c = Checkpoints(Path(folder) / "export", last_save_dtype=torch.bfloat16)
    c.save(1)
    c.save(2, is_last=True)
    path = Path(folder) / "export" / "step-2"
    stored = SafeReader(str(path)).read_metadata().state_dict_metadata
    results["export"] = {name: str(entry.properties.dtype) for name, entry in stored.items()}
    results["resume from weights"] = c.load()
    fresh = Checkpoints(Path(folder) / "fresh")
    results["start from weights"] = fresh.load(path=str(path))
    results["start from some"] = fresh.load(path=str(path), exclude=["norm"])
    results["exclude nothing"] = fresh.load(path=str(path), exclude=["wid"])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(2, kept, str(tmp_path_factory.mktemp("kept")))[0]


@fault("weights change during an asynchronous save")
def test_an_asynchronous_save_is_of_its_moment(results):
    """Weights that change while a save is under way do not get into it, and nothing is committed before it is done."""
    assert results["waited"] < 5


def test_some_are_kept_for_good(results):
    """keep_every's, and the latest k."""
    assert results["kept"] == ["step-10", "step-4", "step-8", "step-9"]


def test_the_weights_alone(results):
    """last_save_model_only: weights in export_dtype, biases of experts in their own; a run cannot resume from it, a new
    one can start from it."""
    expected = {"model.wide.weight": "torch.bfloat16", "model.norm.weight": "torch.bfloat16"}
    assert results["export"] == expected | {"model.expert_bias": "torch.float32"}
    assert "holds the weights alone" in results["resume from weights"]
    assert "'model.wide.weight': {2.0}" in results["start from weights"]
    assert "'optimizer.wide.weight.exp_avg': {-1.0}" in results["start from weights"]


def test_a_part_is_left_out(results):
    """exclude_from_loading leaves the named parameters as they are; a name that matches nothing is an error."""
    some = results["start from some"]
    assert "'model.norm.weight': {-1.0}" in some and "'model.wide.weight': {2.0}" in some
    assert 'no parameter that is, or begins with, "wid"' in results["exclude nothing"]
