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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoint.integrity import METADATA, STATE, digest, write_manifest
from collectives import gather_objects, local_tensor
from files import write_json
from torch_private import dtensor_with

PARTIAL = "incomplete-"
T = TypeVar("T")

# --------------------------------------------------------------------------------------------- copy


class Staging:
    """Copies tensors to CPU memory, from where a checkpoint is written while training changes the originals. Every copy
    reuses the memory of the copy before.

    With pinned memory the copy runs on a CUDA stream of its own, beside the forward and backward of the next step. Only
    the optimizer's step waits for it, because it is the first to change the weights. Without pinned memory the copy is
    complete when `copy` returns.
    """

    def __init__(self, pinned: bool):
        self.pinned, self.memory = pinned, {}
        self.stream = torch.cuda.Stream() if pinned else None
        self.copied = None

    def copy(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Returns the copies, and a function that blocks until they are complete."""
        self.memory = {name: buffer for name, buffer in self.memory.items() if name in tensors}
        if self.stream is None:
            return {name: self._copy(name, tensor) for name, tensor in tensors.items()}, lambda: None
        self.stream.wait_stream(torch.cuda.current_stream())  # The last optimizer step may still be running.
        with torch.cuda.stream(self.stream):
            copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
            copied = self.copied = torch.cuda.Event()
            copied.record()
        return copies, copied.synchronize

    def wait(self) -> None:
        """Makes all later kernels of the current stream wait for the copy. The CPU does not wait."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = local_tensor(tensor.detach())
        buffer = self.memory.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
            pin = self.pinned and local.device.type == "cuda"
            buffer = self.memory[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin)
        buffer.copy_(local, non_blocking=self.pinned)
        if self.stream is not None and local.device.type == "cuda":
            local.record_stream(self.stream)  # A temporary tensor must live until it is copied.
        return dtensor_with(buffer, tensor) if isinstance(tensor, DTensor) else buffer


# --------------------------------------------------------------------------------------------- prepare, write, commit


class SaveFailed(Exception):
    """A save that all ranks gave up, with the same message on all of them. None of its files is left."""


def write_checkpoint(folder: str, name: str, tensors: dict[str, Tensor], state: dict[str, Any], group) -> None:
    """Writes the checkpoint `name` into folder, from the tensors of all ranks. A collective of group; SaveFailed on all
    ranks if it failed on any."""
    partial, final = os.path.join(folder, PARTIAL + name), os.path.join(folder, name)
    is_first = dist.get_rank(group) == 0
    try:
        all_or_fail(lambda: _prepare(partial, _bytes_of(tensors, group), is_first), group)
        entries = all_or_fail(lambda: _write_tensors(partial, tensors, group), group)
        all_or_fail(lambda: _commit(partial, final, state, entries) if is_first else None, group)
    except SaveFailed:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def all_or_fail(do: Callable[[], T], group) -> list[T]:
    """Calls `do` on every rank and returns the results of all ranks; SaveFailed on all ranks if it failed on any."""
    failure = value = None
    try:
        value = do()
    except dcp.CheckpointException as failures:  # DCP raises it on all ranks, with the errors of some.
        failure = "; ".join(f"rank {rank}: {_one_line(error)}" for rank, (error, _) in failures.failures.items())
    except Exception as error:
        failure = f"rank {dist.get_rank()}: {_one_line(error)}"
    failures, values = zip(*gather_objects((failure, value), group), strict=True)
    distinct = list(dict.fromkeys(filter(None, failures)))
    if distinct:
        more = f"; and {len(distinct) - 3} more" if len(distinct) > 3 else ""
        raise SaveFailed("; ".join(distinct[:3]) + more)
    return list(values)


def _one_line(error: BaseException) -> str:
    """Class and text of an error, cut to 200 characters: torch's errors carry C++ stacks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _bytes_of(tensors: dict[str, Tensor], group) -> int:
    """Returns the bytes that all ranks together will write. Of the replicas of a shard only the first is written."""
    total = 0
    for tensor in tensors.values():
        replica = 0
        if isinstance(tensor, DTensor):
            coordinates = zip(tensor.placements, tensor.device_mesh.get_coordinate(), strict=True)
            replica = sum(coordinate for placement, coordinate in coordinates if placement.is_replicate())
        if replica == 0:
            total += local_tensor(tensor).nbytes
    return sum(gather_objects(total, group))


def _prepare(partial: str, needed: int, is_first: bool) -> None:
    if not is_first:
        return
    os.makedirs(os.path.dirname(partial), exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # An earlier run may have been killed during this very save.
    free = shutil.disk_usage(os.path.dirname(partial)).free
    if needed > free:
        raise OSError(f"{needed:,} bytes are needed, {free:,} are free in {os.path.dirname(partial)}")
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
    write_manifest(partial, entries)
    _sync_folder(partial)
    if os.path.exists(final):  # The run went back to an earlier step and has now come here again.
        os.rename(final, free_name(os.path.dirname(final), f"superseded-{os.path.basename(final)}"))
    os.rename(partial, final)
    _sync_folder(os.path.dirname(final))


def _sync_folder(folder: str) -> None:
    """Brings the names in a folder to the disk. Without this a rename may be lost when the machine fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(folder: str, name: str) -> str:
    """Returns a path in folder that does not exist yet: name, or name-2, name-3 and so on."""
    path, number = os.path.join(folder, name), 2
    while os.path.exists(path):
        path = os.path.join(folder, f"{name}-{number}")
        number += 1
    return path
