"""Damaged and hostile checkpoints, on two ranks, all in one launch. Tests marked `fault` are lines of docs/faults.md,
see test_faults.py."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.checkpoints import Checkpoints, on_rank_0, whole_model
from helpers.fault_table import fault
from helpers.ranks import run_ranks

from checkpoint.manifest import MANIFEST, METADATA, STATE, digest, find_damage, write_manifest
from checkpoint.safe_metadata import SafeReader
from hf.safetensors import INDEX, TensorReader
from resilience.process_group import init_distributed

HURT = "/nano-train-hurt"  # what a hostile payload would leave in the checkpoint's folder


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


def test_manifest_lists_all_files(tmp_path):
    """Sizes and SHA-256 of every file but itself."""
    folder = Path(whole_model(tmp_path))
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted([*files, MANIFEST]) == sorted(os.listdir(folder))
    assert all(digest(str(folder / name)) == entry for name, entry in files.items())
