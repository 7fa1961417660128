"""Damaged and hostile checkpoints, saves that fail, and saves beside training: each on two ranks, without a run around
it. Tests marked `fault` are lines of docs/faults.md, see test_faults.py.

Many faults go into one launch: a `Checkpoints` has a manager of a small sharded model, and a folder.
"""

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fault_table import fault
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import checkpoint.storage
from checkpoint import CheckpointManager, TrainedState
from checkpoint.hf_files import INDEX, TensorReader
from checkpoint.manifest import MANIFEST, METADATA, STATE, digest, find_damage, write_manifest
from checkpoint.safe_metadata import SafeReader
from model import ModelArgs, Transformer
from parallelize import Degrees, build_mesh
from training.distributed import init_distributed

HURT = "/nano-train-hurt"  # what a hostile payload would leave in the checkpoint's folder


class Checkpoints:
    """On each rank: a sharded and a replicated parameter and AdamW, and a manager. A value says which step it is of."""

    def __init__(self, folder: Path, **settings):
        mesh = build_mesh(Degrees(), "cpu", dist.get_world_size()).data_parallel
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            name: nn.Parameter(distribute_tensor(torch.randn(shape, generator=generator), mesh, [placement]))
            for name, shape, placement in (("wide.weight", (16, 64), Shard(0)), ("norm.weight", (64,), Replicate()))
        }
        self.bias = torch.zeros(4)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1, fused=True)
        for p in self.parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        self.folder, self.output = Path(folder), io.StringIO()
        default = dict(
            enable=True, interval=1, async_mode="disabled", keep_latest_k=0, keep_every=0, last_save_dtype=None
        )
        self.manager = CheckpointManager(
            str(folder),
            trained=TrainedState(self.parameters, {"expert_bias": self.bias}, optimizer, ModelArgs()),
            **(default | settings),
        )

    def set(self, value: float) -> None:
        with torch.no_grad():
            for tensor in self.manager.trained.tensors().values():
                tensor.fill_(value)

    def save(self, *steps: int, **more) -> bool:
        for step in steps:
            self.set(step)
            with redirect_stdout(self.output):
                ok = self.manager.save(step, **more) and self.manager.wait()
        return ok

    def load(self, load_step: int = -1, path: str = "", exclude=()) -> str:
        """ "step N" with the values that were loaded, or the error."""
        self.set(-1)
        try:
            with redirect_stdout(self.output):
                state = self.manager.load(load_step, path, False, exclude)
        except ValueError as error:
            return str(error)
        values = {name: set(_local(t).unique().tolist()) for name, t in self.manager.trained.tensors().items()}
        if state is None:
            return f"no step, {values}"
        assert all(found == {float(state["step"])} for found in values.values()), values
        return f"step {state['step']}"

    @property
    def lines(self) -> str:
        return self.output.getvalue()

    @property
    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def on_rank_0(do) -> None:
    if dist.get_rank() == 0:
        do()
    dist.barrier()


def whole_model(folder: Path) -> str:
    """A checkpoint of a small model, written by one process."""
    args, path = ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=16, vocab_size=32), folder / "step-1"
    tensors = {f"model.{name}": t.detach() for name, t in Transformer(args).named_parameters()}
    dcp.save(tensors, checkpoint_id=path, no_dist=True)
    (path / STATE).write_text(json.dumps(dict(step=1, model_args=vars(args))))
    write_manifest(str(path))
    return str(path)


# ------------------------------------------------------------------------------------------------ damage


class Payload:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit_metadata(folder: Path, edit) -> None:
    """Changes .metadata, and the manifest with it: what an attacker can do, and a flipped bit cannot."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    (folder / METADATA).write_bytes(pickle.dumps(edit(metadata)))
    os.remove(folder / MANIFEST)
    write_manifest(str(folder))


def _leave(metadata):
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = type(info)("../step-1/__0_0.distcp", info.offset, info.length)
    return metadata


def _bytes_entry(metadata):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    return _put(metadata, "model.wide.weight", BytesStorageMetadata())


def _put(metadata, name, entry):
    metadata.state_dict_metadata[name] = entry
    return metadata


def _link(folder: Path) -> None:
    shard = folder / "__1_0.distcp"
    shutil.move(shard, folder.parent / "elsewhere")
    shard.symlink_to("../elsewhere")


# What is done to a checkpoint's folder, and what is said of it.
DAMAGE = {
    "truncated shard": (lambda f: os.truncate(f / "__1_0.distcp", 1000), "__1_0.distcp has 1,000 bytes"),
    "flipped bit in a shard": (lambda f: _flip(f / "__0_0.distcp"), "__0_0.distcp is not what was written"),
    "flipped bit in state.json": (lambda f: _flip(f / STATE), "state.json is not what was written"),
    "flipped bit in the manifest": (lambda f: _flip(f / MANIFEST), "its "),
    "missing shard": (lambda f: os.remove(f / "__1_0.distcp"), "it has no __1_0.distcp"),
    "missing .metadata": (lambda f: os.remove(f / METADATA), "it has no .metadata"),
    "missing manifest": (lambda f: os.remove(f / MANIFEST), "it has no manifest.json"),
    "a shard that is a link": (_link, "__1_0.distcp is a link"),
    "hostile .metadata": (
        lambda f: _edit_metadata(f, lambda m: _put(m, "model.wide.weight", Payload(f"{f}{HURT}"))),
        "it names posix.mkdir; it was not loaded",
    ),
    "hostile .metadata, unpickled by DCP itself": (lambda f: _edit_metadata(f, _bytes_entry), "BytesStorageMetadata"),
    "shards outside of the folder": (lambda f: _edit_metadata(f, _leave), "it names the file ../step-1/__0_0.distcp"),
}


def damaged(folder: str) -> dict[str, str]:
    """What is found wrong; asserts what must follow from it, for each damage."""
    init_distributed("cpu", 60)
    found = {}
    for name, (hurt, _) in DAMAGE.items():
        here = Path(folder) / name.replace(" ", "_")
        c = Checkpoints(here)
        c.save(1, 2)
        on_rank_0(lambda hurt=hurt, here=here: hurt(here / "step-2"))
        asked = c.load(load_step=2)
        assert asked.startswith(f"checkpoint.load_step 2: {here}/step-2: "), asked
        assert c.load() == "step 1" and "corrupt-step-2" in c.names and "step-2" not in c.names
        assert not os.path.exists(f"{here}/step-2{HURT}") and not os.path.exists(f"{here}/corrupt-step-2{HURT}")
        if dist.get_rank() == 0:
            assert f"it was renamed {here}/corrupt-step-2" in c.lines
        # Nothing intact, but something there was: an error, each time, and not a fresh start.
        on_rank_0(lambda here=here: os.truncate(here / "step-1" / STATE, 3))
        for _ in range(2):
            assert "has no intact checkpoint, but damaged ones: corrupt-step-1, corrupt-step-2" in c.load()
        found[name] = asked
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(2, damaged, str(tmp_path_factory.mktemp("damaged")))[0]


@fault("checkpoint: {damage}")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(damage, found):
    """Reported with the file's name, renamed `corrupt-step-N`, skipped; the newest intact one is used. Asked for by
    load_step, or with no intact one left, it is an error and no fresh start. Nothing in it runs."""
    assert DAMAGE[damage][1] in found[damage]


@fault("hostile checkpoint to start from or to export")
def test_hostile_weights_to_start_from_and_to_export(tmp_path):
    """initial_load_path and scripts/export_hf.py refuse a hostile .metadata, whose payload does not run."""
    folder = Path(whole_model(tmp_path))
    _edit_metadata(folder, lambda m: _put(m, "model.tok_embeddings.weight", Payload(str(tmp_path / "ran"))))
    command = [sys.executable, "scripts/export_hf.py", str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "posix.mkdir; it was not loaded" in done.stderr, done.stderr
    assert find_damage(str(folder)) is None and not (tmp_path / "ran").exists()
    with open(folder / METADATA, "rb") as file:  # the payload is alive
        pickle.load(file)
    assert (tmp_path / "ran").exists()


@fault("a Hugging Face index that names files outside of its folder")
def test_index_that_leaves_its_folder(tmp_path):
    """Refused, with the name that it gives."""
    (tmp_path / INDEX).write_text(json.dumps(dict(weight_map={"lm_head.weight": "../secret.safetensors"})))
    with pytest.raises(ValueError, match="which is not a file in its folder"):
        TensorReader(str(tmp_path))


def test_what_dcp_writes_is_read(tmp_path):
    """The restricted unpickler gives what the plain one does."""
    folder = whole_model(tmp_path)
    with open(os.path.join(folder, METADATA), "rb") as file:
        assert SafeReader(folder).read_metadata().state_dict_metadata == pickle.load(file).state_dict_metadata


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


def test_manifest_lists_all_files(tmp_path):
    """Sizes and SHA-256 of every file but itself."""
    folder = Path(whole_model(tmp_path))
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted([*files, MANIFEST]) == sorted(os.listdir(folder))
    assert all(digest(str(folder / name)) == entry for name, entry in files.items())
