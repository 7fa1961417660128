"""Ends a run that failed: one clear line for a user's mistake, a traceback for a bug, and no rank left behind.

Proof: tests/test_train.py::test_a_mistake_is_one_line,
tests/test_train.py::test_an_unexpected_error_keeps_its_traceback.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from errors import ConfigError
from resilience.process_group import rank
from resilience.watchdog import POLL_SECONDS, Watchdog

ONE_LINE = (ConfigError, OSError, FloatingPointError)  # their messages say what to change; the last: NonFiniteGuard's
OUT_OF_MEMORY = (  # torch raises these as RuntimeError, not as OutOfMemoryError
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",  # memory that a kernel needs and torch's allocator does not manage
)
ERROR_GRACE_SECONDS = 10  # how long the other ranks wait for rank 0 to report an error that all ranks have met


@contextmanager
def clean_exit() -> Iterator[None]:
    """Ends the process group. A ConfigError, OSError or FloatingPointError becomes one line and exit status 1. Any
    other error keeps its traceback, and all ranks end within seconds."""
    try:
        yield
    except Exception as error:
        # The failed run's watchdog is not at hand here: `main` made it, and may make several in one process.
        watchdog = next((thread for thread in threading.enumerate() if isinstance(thread, Watchdog)), None)
        if watchdog:
            watchdog.stopped.set()
        report = report_in_one_line if isinstance(error, ONE_LINE) else report_with_traceback
        report(error, watchdog)
        if watchdog and dist.get_world_size() > 1:
            time.sleep(1.5 * POLL_SECONDS)  # the other ranks must read the failure before its store ends with rank 0
        # Not sys.exit: an orderly end of the interpreter would wait for peers that never come.
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def report_in_one_line(error: Exception, watchdog: Watchdog | None) -> None:
    """Prints an error that usually every rank has met. Rank 0 reports it, and torchrun stops the other ranks, which
    wait for that. If rank 0 does not report an error in time, only this rank has met it, and this rank reports it."""
    if rank() != 0:
        if watchdog and watchdog.peer_failed(ERROR_GRACE_SECONDS):
            os._exit(1)
        time.sleep(0 if watchdog else ERROR_GRACE_SECONDS)
    line = ("error: " if rank() == 0 else f"error (rank {rank()}): ") + " ".join(str(error).split())
    print(line, file=sys.stderr, flush=True)
    if watchdog:
        watchdog.report_failure(line)


def report_with_traceback(error: Exception, watchdog: Watchdog | None) -> None:
    """Prints the traceback of an error that other ranks do not know of, and a last line that explains it. If another
    rank has failed before, this error follows from that failure: only this rank's stack is written, to its file."""
    text = " ".join(str(error).split())
    line = f"rank {rank()} failed: {type(error).__name__}: {text[:300]}"
    is_first = watchdog is None or watchdog.report_failure(line)
    if watchdog:
        watchdog.dump(line)
    if not is_first:
        return
    traceback.print_exc()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in text for part in OUT_OF_MEMORY):
        line += (
            "; out of memory: lower training.local_batch_size (training.global_batch_size keeps the step what it is) "
            "or training.loss_chunk_size, recompute with activation_checkpoint.mode full, or split further: "
            "parallelism.data_parallel_shard_degree, tensor_parallel_degree, context_parallel_degree."
        )
    elif "timed out" in text.lower() or "timeout" in text.lower():
        line += "; a collective waited longer than comm.timeout_seconds for a rank that did not come"
    print("error:", line, f"(stacks: {watchdog.folder})" if watchdog else "", file=sys.stderr, flush=True)
