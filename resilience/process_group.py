"""Process group and device: start, a clean end, errors that are reported once, one rank a machine first."""

import ctypes
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from errors import ConfigError
from resilience.watchdog import POLL_SECONDS, Watchdog, running_watchdog

REPOSITORY = Path(__file__).resolve().parent.parent
OUT_OF_MEMORY = (  # where it is no OutOfMemoryError; the last: what the allocator does not ask for, as kernels' own
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
)
TIMED_OUT = ("timed out", "timeout")
ERROR_GRACE_SECONDS = 10  # how long other ranks let rank 0 report an error that all of them have met


def rank() -> int:
    """This process's global rank, also before the process group exists."""
    return int(os.environ.get("RANK", 0))


def init_distributed(device: str, timeout_seconds: int) -> torch.device:
    """Starts the process group that torchrun prepared (or one of a single process without it); returns this rank's
    device. device is "auto", "cpu" or "cuda"; a collective that waits longer than timeout_seconds ends the run. A group
    that exists already is taken as it is: a process may train several times."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ConfigError(
                f"this machine has {num_gpus} GPUs, but local rank {local_rank} needs one of its own; start at most "
                f"{num_gpus} processes a machine, or add --job.device cpu."
            )
        torch.cuda.set_device(local_rank)
    this_device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    if dist.is_initialized():
        return this_device
    # Tensors on the CPU are communicated too: barriers, and gradients under CPU offload.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        store, this, ranks = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
            # torchrun's store outlives a restart of the ranks, and with it the addresses of those before. (On several
            # machines restarts are not counted alike: there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, see docs/faults.md.)
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=this, world_size=ranks)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    if device == "cpu":
        _keep_freed_memory()
    return this_device


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep what is freed, as torch's allocator does on a GPU. Every step frees and allocates the
    same large tensors; handing their pages back and having them zeroed again cost 10 to 20 % of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not on macOS
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)  # large blocks too come from the heap,
        libc.mallopt(m_trim_threshold, -1)  # which never shrinks


def set_determinism(seed: int, deterministic: bool) -> None:
    """Seeds every generator. Nothing in training draws from them (weights and data come from counters), so equal
    seeds on all ranks do no harm. deterministic makes torch refuse kernels whose result varies from run to run."""
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(True)


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """One rank a machine runs the body first, the others after it: they find what it left in a cache."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    yield
    if first:
        dist.barrier()


def require_equal_on_all_ranks(**values: str) -> None:
    """ValueError unless every rank has the same text under each name: machines may differ in their files, and a run
    whose ranks read different things would go on in silence. A collective."""
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, values)
    for name, value in values.items():
        others = [r for r, theirs in enumerate(everywhere) if theirs[name] != value]
        if others:
            raise ConfigError(f"{name} differs between ranks: {dist.get_rank()} and {others}; give all the same.")


@contextmanager
def clean_exit() -> Iterator[None]:
    """Ends the process group, and turns an error that this project raised on purpose, or one of the file system, into
    one line and exit status 1. Any other error keeps its traceback, and all ranks end within seconds.

    Usually every rank meets the same error. Rank 0 reports it; torchrun then stops the others, which wait for that. An
    error that only another rank has met is reported by that rank, after the wait.
    """
    try:
        yield
    except Exception as error:
        watchdog = running_watchdog()
        if watchdog:
            watchdog.stop()
        if isinstance(error, OSError) or (isinstance(error, ValueError | FloatingPointError) and _raised_here(error)):
            if rank() != 0:
                if watchdog and watchdog.hears_of_another(ERROR_GRACE_SECONDS):
                    os._exit(1)
                time.sleep(0 if watchdog else ERROR_GRACE_SECONDS)
            prefix = "error:" if rank() == 0 else f"error (rank {rank()}):"
            line = f"{prefix} {' '.join(str(error).split())}"
            print(line, file=sys.stderr, flush=True)
            if watchdog:
                watchdog.tell(line)
        else:
            _report_failure(error, watchdog)
        if watchdog and dist.get_world_size() > 1:
            time.sleep(1.5 * POLL_SECONDS)  # so that others learn of it before the store that they look into is gone
        # Not sys.exit: leaving the interpreter in order would wait for peers that never come.
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _report_failure(error: Exception, watchdog: Watchdog | None) -> None:
    """An error that other ranks do not know of: its traceback, and a last line that says what it means. An error that
    only follows from another rank's leaves no more than its stack, in a file."""
    text = " ".join(str(error).split())
    line = f"rank {rank()} failed: {type(error).__name__}: {text[:300]}"
    is_first = watchdog is None or watchdog.tell(line)
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
    elif any(part in text.lower() for part in TIMED_OUT):
        line += "; a collective waited longer than comm.timeout_seconds for a rank that did not come"
    print("error:", line, f"(stacks: {watchdog.folder})" if watchdog else "", file=sys.stderr, flush=True)


def _raised_here(error: BaseException) -> bool:
    """Whether the raise statement stands in this repository, and not in a library."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    path = Path(frame.f_code.co_filename).resolve()
    return path.is_relative_to(REPOSITORY) and "site-packages" not in path.parts  # .venv may be in the clone
