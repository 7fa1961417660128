"""Writes a checkpoint folder on all ranks together: the whole folder appears, or none of it.

    copy      only with asynchronous saves: Staging copies the tensors to CPU memory, and training continues
    prepare   rank 0 checks the free space and makes the folder incomplete-step-N
    write     every rank writes its tensors to files of its own and hashes these
    commit    rank 0 writes state.json and the manifest, then renames the folder to step-N

A run that is killed before the rename leaves incomplete-step-N, which the next start removes. After prepare, write and
commit all ranks exchange their errors. If one rank has failed, all ranks give the save up together.

Proof: tests/test_saves.py::test_failed_save_leaves_nothing_and_the_run_continues,
tests/test_saves.py::test_asynchronous_save_holds_the_weights_of_its_step.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoint.integrity import MANIFEST, METADATA, STATE, digest
from collectives import gather_objects, local_tensor
from files import write_json
from torch_private import dtensor_with

PARTIAL, SUPERSEDED = "incomplete-", "superseded-"


class Staging:
    """Copies tensors to CPU memory, from where a checkpoint is written while training changes the originals. Every copy
    reuses the memory of the copy before.

    With pinned memory the copy runs on a CUDA stream of its own, beside the forward and backward of the next step. Only
    the optimizer's step waits for it, because it is the first to change the weights. Without pinned memory the copy is
    complete when `copy` returns.
    """

    def __init__(self, pinned: bool):
        self.pinned, self.memory, self.copied = pinned, {}, None
        self.stream = torch.cuda.Stream() if pinned else None

    def copy(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Returns the copies, and a function that blocks until they are complete."""
        if self.stream is None:
            return {name: self._copy(name, tensor) for name, tensor in tensors.items()}, lambda: None
        self.stream.wait_stream(torch.cuda.current_stream())  # The last optimizer step may still be running.
        with torch.cuda.stream(self.stream):
            copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        self.copied = self.stream.record_event()
        return copies, self.copied.synchronize

    def wait(self) -> None:
        """Makes all later kernels of the current stream wait for the copy. The CPU does not wait."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = local_tensor(tensor.detach())
        if name not in self.memory:
            pin = self.pinned and local.device.type == "cuda"
            self.memory[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin)
        buffer = self.memory[name].copy_(local, non_blocking=self.pinned)
        if self.stream is not None and local.device.type == "cuda":
            local.record_stream(self.stream)  # A temporary tensor must live until it is copied.
        return dtensor_with(buffer, tensor) if isinstance(tensor, DTensor) else buffer


class SaveFailed(Exception):
    """A save that all ranks gave up, with the same message on all of them. None of its files is left."""


def write_checkpoint(folder: str, name: str, tensors: dict[str, Tensor], state: dict[str, Any], group) -> None:
    """Writes the checkpoint `name` into folder, from the tensors of all ranks. A collective of group; SaveFailed on all
    ranks if it failed on any."""
    partial, final = os.path.join(folder, PARTIAL + name), os.path.join(folder, name)
    is_first = dist.get_rank(group) == 0
    try:
        needed = sum(local_tensor(tensor).nbytes for tensor in tensors.values() if _is_first_replica(tensor))
        needed = sum(gather_objects(needed, group))
        all_or_fail(lambda: _prepare(partial, needed) if is_first else None, group)
        entries = all_or_fail(lambda: _write_tensors(partial, tensors, group), group)
        all_or_fail(lambda: _commit(partial, final, state, entries) if is_first else None, group)
    except SaveFailed:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def all_or_fail(do: Callable[[], Any], group) -> list[Any]:
    """Calls `do` on every rank and returns the results of all ranks; SaveFailed on all ranks if it failed on any."""
    errors, value = {}, None
    try:
        value = do()
    except dcp.CheckpointException as failure:  # DCP raises it on all ranks, with the errors of some.
        errors = {rank: error for rank, (error, _) in failure.failures.items()}
    except Exception as error:
        errors = {dist.get_rank(): error}
    # Cut to 200 characters, because torch's errors carry C++ stacks.
    texts = [f"rank {r}: {type(e).__name__}: {' '.join(str(e).split())[:200]}" for r, e in errors.items()]
    texts_by_rank, values = zip(*gather_objects((texts, value), group), strict=True)
    failures = list(dict.fromkeys(text for texts in texts_by_rank for text in texts))
    if failures:
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise SaveFailed("; ".join(failures[:3]) + more)
    return list(values)


def _is_first_replica(tensor: Tensor) -> bool:
    """Whether this rank writes its shard of a tensor; the other replicas of the shard are not written."""
    if not isinstance(tensor, DTensor):
        return True
    axes = zip(tensor.placements, tensor.device_mesh.get_coordinate(), strict=True)
    return not any(coordinate for placement, coordinate in axes if placement.is_replicate())


def _prepare(partial: str, needed: int) -> None:
    parent = os.path.dirname(partial)
    os.makedirs(parent, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # An earlier run may have been killed during this very save.
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(f"{needed:,} bytes are needed, {free:,} are free in {parent}")
    os.mkdir(partial)


def _write_tensors(partial: str, tensors: dict[str, Tensor], group) -> dict[str, dict]:
    """Writes this rank's files and returns their entries in the manifest. Hashing reads them from the page cache."""
    # FileSystemWriter calls fsync on every file.
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), process_group=group)
    rank = dist.get_rank(group)
    names = [name for name in os.listdir(partial) if name.startswith(f"__{rank}_")] + ([METADATA] if rank == 0 else [])
    return {name: digest(os.path.join(partial, name)) for name in names}


def _commit(partial: str, final: str, state: dict[str, Any], entries_by_rank: list[dict[str, dict]]) -> None:
    write_json(os.path.join(partial, STATE), state)
    entries = {name: entry for of_rank in entries_by_rank for name, entry in of_rank.items()}
    for name, entry in entries.items():
        path = os.path.join(partial, name)
        if not os.path.isfile(path) or os.path.getsize(path) != entry["bytes"]:
            raise OSError(f"rank 0 does not see {path} as it was written; all machines must share that folder")
    entries[STATE] = digest(os.path.join(partial, STATE))
    write_json(os.path.join(partial, MANIFEST), dict(files=dict(sorted(entries.items()))))
    _sync_folder(partial)
    if os.path.exists(final):  # The run went back to an earlier step and has now come here again.
        set_aside(final, SUPERSEDED)
    os.rename(partial, final)
    _sync_folder(os.path.dirname(final))


def _sync_folder(folder: str) -> None:
    """Brings the names in a folder to the disk. Without this a rename may be lost when the machine fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: str, prefix: str) -> str:
    """Renames a folder to prefix + its name or, if that exists, with -2, -3 and so on behind it; returns its path."""
    parent, name = os.path.split(path)
    aside, number = os.path.join(parent, prefix + name), 2
    while os.path.exists(aside):
        aside = os.path.join(parent, f"{prefix}{name}-{number}")
        number += 1
    os.rename(path, aside)
    return aside
