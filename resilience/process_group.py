"""Starts the process group and chooses this rank's device."""

import ctypes
import os
import random
from datetime import timedelta

import torch
import torch.distributed as dist

from errors import ConfigError


def rank() -> int:
    """This process's global rank. Unlike dist.get_rank() it works before the process group exists."""
    return int(os.environ.get("RANK", 0))


def init_distributed(device: str, timeout_seconds: int) -> torch.device:
    """Starts the process group that torchrun prepared, or one of this process alone, and returns this rank's device.
    device is "auto", "cpu" or "cuda"; a collective that waits longer than timeout_seconds ends the run. A group that
    exists is kept, since a process may train several times."""
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
    this_device = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if dist.is_initialized():
        return this_device
    timeout = timedelta(seconds=timeout_seconds)
    store, this, ranks = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, this, ranks = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
            # torchrun's store outlives a restart of the ranks, and still holds the addresses of the ranks before it.
            # (Several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead: they do not count restarts alike.)
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # GPU runs communicate CPU tensors too: in barriers, and gradients under CPU offload.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=this, world_size=ranks)
    if device == "cpu":
        _keep_freed_memory()
    return this_device


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory, as torch's allocator does on a GPU. By default malloc returns the pages
    of large tensors to the kernel, which zeroes them again at the next use: 10 to 20 % of a step. Python has no
    function for this setting, so it goes through ctypes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not on macOS
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)  # allocate large blocks from the heap too,
        libc.mallopt(m_trim_threshold, -1)  # and never shrink the heap


def set_determinism(seed: int, deterministic: bool) -> None:
    """Seeds every generator, which training does not draw from: weights and data come from counters. deterministic
    makes torch refuse kernels whose result varies from run to run."""
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a workspace of fixed size
        torch.use_deterministic_algorithms(True)
