"""Writes one checkpoint folder, completely or not at all, on all ranks at once.

All goes into a folder of another name: the tensors (each rank its own file), then state.json and the manifest. When
everything is on the disk, one rename makes it a checkpoint. A rank that fails makes all of them give up together, and
what was written is removed. Nothing here is done under a rank's own condition: each step ends with word from all.
"""

import os
import shutil
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoint.manifest import METADATA, STATE, digest, write_manifest
from files import write_json

PARTIAL = "incomplete-"


class SaveFailed(Exception):
    """A save that was given up, on all ranks, for the same reason; nothing is left of it."""


def write_checkpoint(folder: str, name: str, tensors: dict[str, Tensor], state: dict[str, Any], group) -> None:
    """Makes the checkpoint `name` in folder, of every rank's tensors. A collective of group; SaveFailed on all ranks if
    it failed on any."""
    partial, final = os.path.join(folder, PARTIAL + name), os.path.join(folder, name)
    is_first = dist.get_rank(group) == 0
    try:
        _together(group, lambda: _prepare(partial, _bytes_of(tensors, group), is_first))
        entries = _together(group, lambda: _write_own_files(partial, tensors, group))
        _together(group, lambda: _commit(partial, final, state, entries) if is_first else None)
    except SaveFailed:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _together(group, do) -> list[Any]:
    """What `do` returned on every rank; SaveFailed on all if it failed on some."""
    error = value = None
    try:
        value = do()
    except dcp.CheckpointException as several:  # what DCP raises on all ranks for some ranks' errors
        error = "; ".join(f"rank {rank}: {_text(wrapped[0])}" for rank, wrapped in several.failures.items())
    except Exception as own:
        error = f"rank {dist.get_rank()}: {_text(own)}"
    everywhere = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, (error, value), group=group)
    errors = list(dict.fromkeys(error for error, _ in everywhere if error))
    if errors:
        raise SaveFailed("; ".join(errors[:3]) + (f"; and {len(errors) - 3} more" if len(errors) > 3 else ""))
    return [value for _, value in everywhere]


def _text(error: BaseException) -> str:
    """In one line, and short: torch's errors come with C++ stacks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _bytes_of(tensors: dict[str, Tensor], group) -> int:
    """Bytes that all ranks together will write. A part that several ranks hold is counted by the first of them."""
    own = 0
    for tensor in tensors.values():
        if not isinstance(tensor, DTensor):
            own += tensor.nbytes
        elif not any(
            placement.is_replicate() and place > 0
            for placement, place in zip(tensor.placements, tensor.device_mesh.get_coordinate(), strict=True)
        ):
            own += tensor.to_local().nbytes
    everywhere = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, own, group=group)
    return sum(everywhere)


def _prepare(partial: str, needed: int, is_first: bool) -> None:
    if not is_first:
        return
    os.makedirs(os.path.dirname(partial), exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
    free = shutil.disk_usage(os.path.dirname(partial)).free
    if needed > free:
        raise OSError(f"{needed:,} bytes are needed, {free:,} are free in {os.path.dirname(partial)}")
    os.mkdir(partial)


def _write_own_files(partial: str, tensors: dict[str, Tensor], group) -> dict[str, dict]:
    """The manifest's entries of the files that this rank wrote. They are read again for it, from the page cache."""
    # FileSystemWriter brings each file to the disk (fsync) before it goes on.
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), process_group=group)
    rank = dist.get_rank(group)
    own = [name for name in os.listdir(partial) if name.startswith(f"__{rank}_")] + ([METADATA] if rank == 0 else [])
    return {name: digest(os.path.join(partial, name)) for name in own}


def _commit(partial: str, final: str, state: dict[str, Any], entries: list[dict[str, dict]]) -> None:
    write_json(os.path.join(partial, STATE), state)
    files = {name: entry for of_rank in entries for name, entry in of_rank.items()}
    for name, entry in files.items():
        path = os.path.join(partial, name)
        if not os.path.isfile(path) or os.path.getsize(path) != entry["bytes"]:
            raise OSError(f"rank 0 does not see {path} as it was written; all machines must share that folder")
    files[STATE] = digest(os.path.join(partial, STATE))
    write_manifest(partial, files)
    sync_folder(partial)
    if os.path.exists(final):  # of an earlier history of this run
        os.rename(final, free_name(os.path.dirname(final), f"superseded-{os.path.basename(final)}"))
    os.rename(partial, final)
    sync_folder(os.path.dirname(final))


def sync_folder(folder: str) -> None:
    """Brings a folder's names to the disk: a renamed file's new name is not there before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(folder: str, name: str) -> str:
    """A path in folder that is not taken: name, or name and a number."""
    path, number = os.path.join(folder, name), 2
    while os.path.exists(path):
        path = os.path.join(folder, f"{name}-{number}")
        number += 1
    return path
