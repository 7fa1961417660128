"""Reads DCP's files without running what may be in them.

DCP's `.metadata` is a pickle, and unpickling runs whatever code the pickle names. Here only the classes are known that
DCP itself writes for a dict of tensors. What is no tensor is refused too: DCP would unpickle it, from the shards,
without any limit. The tensors themselves are read by `torch.load(weights_only=True)`, which DCP uses for them.
"""

import os
import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from checkpoint.manifest import METADATA
from errors import ConfigError
from files import is_plain_name

# Module and name of each class, as torch 2.11 to 2.13 write them. _get_layout looks a name up in a fixed table.
ALLOWED = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
            *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader of a checkpoint folder. ValueError if its metadata is not what DCP writes for tensors, or names a
    file outside of the folder."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self.folder, self.metadata = folder, None

    def read_metadata(self, *_, **__) -> Metadata:
        if self.metadata is None:  # read once, however many loads there are
            path = os.path.join(self.folder, METADATA)
            try:
                with open(path, "rb") as file:
                    self.metadata = _Unpickler(file).load()
                self._require_only_tensors()
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
            except Exception as error:  # a damaged pickle fails in any way
                raise ConfigError(f"{path} is not what torch writes for tensors: {error}; it was not loaded.") from None
        return self.metadata

    def _require_only_tensors(self) -> None:
        metadata = self.metadata
        if type(metadata) is not Metadata:
            raise ConfigError("it is no Metadata")
        for name, entry in metadata.state_dict_metadata.items():
            if type(entry) is not TensorStorageMetadata:
                raise ConfigError(f"{name} is no tensor")
        for info in metadata.storage_data.values():
            if not is_plain_name(info.relative_path):
                raise ConfigError(f"it names the file {info.relative_path}")
            if info.transform_descriptors:
                raise ConfigError(f"{info.relative_path} is encoded by {info.transform_descriptors}")
