"""Damaged and hostile checkpoints, on two ranks in one launch. Tests marked `fault` are lines of docs/faults.md, see
test_faults.py."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.checkpoints import Checkpoints, only_rank0, whole_model, write_manifest_of
from helpers.fault_table import fault
from helpers.ranks import run_ranks

from checkpoint.integrity import MANIFEST, METADATA, STATE, SafeReader, digest, find_damage
from hf.safetensors import INDEX, TensorReader
from resilience.process_group import init_distributed

HURT = "/nano-train-hurt"  # the folder that a hostile payload would make in the checkpoint's folder


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
    """Changes .metadata and the manifest together, as an attacker can and a flipped bit cannot."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    (folder / METADATA).write_bytes(pickle.dumps(edit(metadata)))
    write_manifest_of(folder)


def _name_outside(metadata):
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


# Name -> a function that damages a checkpoint's folder, and a part of the message that must follow.
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
    "shards outside of the folder": (
        lambda f: _edit_metadata(f, _name_outside),
        "names the file ../step-1/__0_0.distcp",
    ),
}


def load_damaged(folder: str) -> dict:
    """Returns the message for each damage; asserts that loading reacts to it as promised."""
    init_distributed("cpu", 60)
    found = {}
    fresh = Checkpoints(Path(folder) / "fresh")
    for name, (damage, _) in DAMAGE.items():
        here = Path(folder) / name.replace(" ", "_")
        c = Checkpoints(here)
        c.save(1, 2)
        found["manifest"] = json.loads((here / "step-2" / MANIFEST).read_text())["files"]
        files = {name for name in os.listdir(here / "step-2") if name != MANIFEST}
        found["files"] = {name: digest(str(here / "step-2" / name)) for name in files}
        dist.barrier()
        only_rank0(lambda damage=damage, here=here: damage(here / "step-2"))
        start = fresh.load(path=f"{here}/step-2")
        assert start.startswith(f"{here}/step-2 is not a complete checkpoint: "), start
        asked = c.load(load_step=2)
        assert asked.startswith(f"checkpoint.load_step 2: {here}/step-2: "), asked
        assert c.load() == "step 1" and "corrupt-step-2" in c.names and "step-2" not in c.names
        assert not os.path.exists(f"{here}/step-2{HURT}") and not os.path.exists(f"{here}/corrupt-step-2{HURT}")
        if dist.get_rank() == 0:
            assert f"it was renamed {here}/corrupt-step-2" in c.lines
        # No checkpoint is intact, but there were some: an error at every start, and no fresh start.
        only_rank0(lambda here=here: os.truncate(here / "step-1" / STATE, 3))
        for _ in range(2):
            assert "has no intact checkpoint, but damaged ones: corrupt-step-1, corrupt-step-2" in c.load()
        found[name] = asked
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(2, load_damaged, str(tmp_path_factory.mktemp("damaged")))[0]


@fault("checkpoint: {damage}")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(damage, found):
    """A warning names the file, the checkpoint is renamed `corrupt-step-N`, and the newest intact checkpoint is loaded.
    If load_step or initial_load_path asks for the damaged checkpoint, or if none is intact, the run ends with an error.
    No code in it runs."""
    assert DAMAGE[damage][1] in found[damage]


@fault("hostile checkpoint to export")
def test_export_refuses_hostile_metadata(tmp_path):
    """scripts/export_hf.py refuses a hostile .metadata, whose payload does not run."""
    folder = Path(whole_model(tmp_path))
    _edit_metadata(folder, lambda m: _put(m, "model.tok_embeddings.weight", Payload(str(tmp_path / "ran"))))
    command = [sys.executable, "scripts/export_hf.py", str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "posix.mkdir; it was not loaded" in done.stderr, done.stderr
    assert find_damage(str(folder)) is None and not (tmp_path / "ran").exists()
    with open(folder / METADATA, "rb") as file:  # Plain unpickling runs the payload.
        pickle.load(file)
    assert (tmp_path / "ran").exists()


@fault("a Hugging Face index that names files outside of its folder")
def test_hf_index_with_files_outside_is_refused(tmp_path):
    """Loading is refused, and the error repeats the name."""
    (tmp_path / INDEX).write_text(json.dumps(dict(weight_map={"lm_head.weight": "../secret.safetensors"})))
    with pytest.raises(ValueError, match="which is not a file in its folder"):
        TensorReader(str(tmp_path))


def test_safe_reader_equals_plain_unpickling(tmp_path):
    """Of metadata that DCP wrote, the restricted unpickler returns the same as the plain one."""
    folder = whole_model(tmp_path)
    with open(os.path.join(folder, METADATA), "rb") as file:
        assert SafeReader(folder).read_metadata().state_dict_metadata == pickle.load(file).state_dict_metadata


def test_manifest_lists_every_file(found):
    """The manifest of a checkpoint that two ranks saved has the size and the SHA-256 of every file except itself."""
    assert found["manifest"] == found["files"]
    assert set(found["files"]) == {"__0_0.distcp", "__1_0.distcp", METADATA, STATE}
