"""Runs a function on N ranks, each a new process: `run_ranks(4, function, ...)` returns the four results.

The processes are forked from a server that has imported torch, so a rank starts in a tenth of a second instead of
several seconds, and each layout gets new process groups.
"""

import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train", "torch.distributed.checkpoint", "torchdata.stateful_dataloader"])


def run_ranks(world_size: int, function: Callable, *args, timeout: float = 300, **kwargs) -> list[Any]:
    """Calls function(*args, **kwargs) in world_size processes with torchrun's environment; returns the results by rank.

    function must be importable, at the top level of a test module. If a rank fails, all ranks are ended, and an
    AssertionError has the tracebacks.
    """
    __tracebackhide__ = True
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_rank, args=(rank, world_size, port, folder, function, args, kwargs))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        while any(p.exitcode is None for p in processes):
            if any(p.exitcode for p in processes) or time.monotonic() > deadline:
                time.sleep(0.5)  # other ranks may still write their tracebacks
                for process in processes:
                    process.kill()
            processes[0].join(0.02)
        if any(p.exitcode for p in processes):
            errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.error")))
            raise AssertionError(f"exit codes {[p.exitcode for p in processes]}\n{errors}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def free_port() -> int:
    """A free port below the range that the system gives to connections. It is random, so tests that run at the same
    time rarely draw the same port."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def _rank(rank: int, world_size: int, port: int, folder: str, function: Callable, args: tuple, kwargs: dict) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        torch.save(function(*args, **kwargs), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"--- rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)
