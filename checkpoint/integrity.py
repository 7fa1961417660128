"""Checks a checkpoint before anything is loaded from it.

Damage: DCP loads a shard with a flipped bit without an error (298 of 300 trials). Therefore manifest.json has the size
and the SHA-256 of every other file. It is written last and checked first, and the ranks share the hashing.

Hostile files: DCP's `.metadata` is a pickle, and unpickling runs any code that the pickle names. SafeReader knows only
the classes that DCP writes for a dict of tensors. It also refuses entries that are not tensors, because DCP would
unpickle these from the shards without a limit. Tensors are safe: DCP reads them by `torch.load(weights_only=True)`.

Proof: tests/test_damaged_checkpoints.py::test_damaged_checkpoint,
tests/test_damaged_checkpoints.py::test_export_refuses_hostile_metadata,
tests/test_damaged_checkpoints.py::test_safe_reader_equals_plain_unpickling.
"""

import hashlib
import json
import os
import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from errors import ConfigError
from files import is_plain_name

MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"


def digest(path: str) -> dict[str, Any]:
    """Returns the manifest's entry of a file: its size in bytes and its SHA-256."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
        return dict(bytes=file.tell(), sha256=sha256.hexdigest())


def find_damage(folder: str, part: int = 0, parts: int = 1) -> str | None:
    """Returns why a folder is not a complete and intact checkpoint, or None if it is one. Of the files' contents a call
    checks one part of `parts`, counted from 0. ConfigError if the file system fails."""
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            entries = json.load(file)["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
        for name in (METADATA, STATE):
            if name not in expected:
                return f"its {MANIFEST} does not list {name}"
        for name, (size, _) in expected.items():
            if not is_plain_name(name):
                return f'its {MANIFEST} names "{name}", which is not a file in it'
            path = os.path.join(folder, name)
            if os.path.islink(path):
                return f"its {name} is a link, which may lead out of it"
            if os.stat(path).st_size != size:
                return f"its {name} has {os.stat(path).st_size:,} bytes, {size:,} were written"
        # Largest first, so that all ranks hash about the same number of bytes.
        by_size = sorted(expected, key=lambda name: (-expected[name][0], name))
        for name in by_size[part::parts]:
            if digest(os.path.join(folder, name))["sha256"] != expected[name][1]:
                return f"its {name} is not what was written (SHA-256)"
    except FileNotFoundError as error:
        return f"it has no {os.path.basename(error.filename)}"
    except OSError as error:  # A disk or permission error may go away: the checkpoint is not to blame.
        raise ConfigError(f"cannot read {error.filename or folder}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} is damaged"
    return None


# Module -> names, as torch 2.11 to 2.13 write them. _get_layout only looks a name up in a fixed table.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": [
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch": ["Size"] + [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)],
    "torch.serialization": ["_get_layout"],
    "pathlib": ["PosixPath"],
    "pathlib._local": ["PosixPath"],  # Python 3.13
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _load_metadata(path: str) -> Metadata:
    with open(path, "rb") as file:
        metadata = _Unpickler(file).load()
    if type(metadata) is not Metadata:
        raise ConfigError("it is not of the class Metadata")
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry) is not TensorStorageMetadata:
            raise ConfigError(f"{name} is not a tensor")
    for info in metadata.storage_data.values():
        if not is_plain_name(info.relative_path):
            raise ConfigError(f"it names the file {info.relative_path}")
        if info.transform_descriptors:
            raise ConfigError(f"{info.relative_path} is encoded by {info.transform_descriptors}")
    return metadata


class SafeReader(dcp.FileSystemReader):
    """DCP's reader of a checkpoint folder, but it runs no code from it. ConfigError if the metadata is not what DCP
    writes for tensors, or if it names a file outside of the folder."""

    metadata: Metadata | None = None  # read once, however many loads follow

    def read_metadata(self, *_, **__) -> Metadata:
        path = os.path.join(self.path, METADATA)
        try:
            self.metadata = self.metadata or _load_metadata(path)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
        except Exception as error:  # A damaged pickle can raise anything.
            raise ConfigError(f"{path} is not what torch writes for tensors: {error}; it was not loaded.") from None
        return self.metadata
