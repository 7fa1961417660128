"""Batches of a dataset for one data rank. The whole state is one integer, the number of samples consumed.

Step b after samples_consumed holds the samples samples_consumed + b * G ... + G - 1 of the global order, where G is the
global batch size. Rank r of R takes the r-th contiguous G / R of them. So a step holds the same samples on any number
of ranks, and a run resumes exactly on other ranks and with another batch size.

Proof: tests/test_mixtures.py::test_any_layout_reads_the_same_samples,
tests/test_samples.py::test_ranks_share_a_step, tests/test_data_resume.py::test_resume_on_other_layouts_equals_one_run.
"""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from errors import ConfigError

Microbatch = dict[str, Tensor]


def build_loader(
    dataset: Dataset,
    *,
    global_batch_size: int,
    local_batch_size: int,
    dp_rank: int,
    dp_degree: int,
    samples_consumed: int = 0,
    num_workers: int = 0,
) -> "Loader":
    """An iterator over steps of global_batch_size samples: this rank's share, in microbatches of local_batch_size.

    global_batch_size and samples_consumed count samples over all data ranks. num_workers processes fetch ahead; with 0
    this process fetches at each step. Raises ConfigError if the ranks cannot share a step in whole microbatches."""
    at_once = local_batch_size * dp_degree
    if global_batch_size < 1 or global_batch_size % at_once:
        below = global_batch_size // at_once * at_once
        fitting = f"{below} or {below + at_once}" if below > 0 else f"{at_once}"
        raise ConfigError(
            f"training.global_batch_size ({global_batch_size}) must be a multiple of local_batch_size x data ranks "
            f"({local_batch_size} x {dp_degree} = {at_once}); use {fitting}, or another local_batch_size."
        )
    share = global_batch_size // dp_degree
    first_samples = count(samples_consumed + dp_rank * share, global_batch_size)
    return Loader(_fetch(_Steps(dataset, share, local_batch_size), first_samples, num_workers))


class Loader(Iterator[list[Microbatch]]):
    """An endless iterator over optimizer steps. next() gives a step: a list of microbatches, each a dict of
    [local_batch_size, seq_len] int64 tensors by the names of the dataset's samples."""

    def __init__(self, steps: Iterator[list[Microbatch] | ConfigError]) -> None:
        self._steps, self._seconds_waited = steps, 0.0

    def __next__(self) -> list[Microbatch]:
        start = time.perf_counter()
        microbatches = next(self._steps)
        self._seconds_waited += time.perf_counter() - start
        if isinstance(microbatches, ConfigError):
            raise microbatches
        return microbatches

    def take_seconds_waited(self) -> float:
        """Seconds spent in next() since the last call of this method: the time that training has waited for data."""
        waited, self._seconds_waited = self._seconds_waited, 0.0
        return waited


class _Steps(Dataset):
    """[first] is a rank's share of the step whose share begins at sample `first`, or the error of reading it."""

    def __init__(self, dataset: Dataset, share: int, local_batch_size: int):
        self.dataset, self.share, self.local_batch_size = dataset, share, local_batch_size

    def __getitem__(self, first: int) -> list[Microbatch] | ConfigError:
        try:
            samples = [self.dataset[i] for i in range(first, first + self.share)]
        except ConfigError as error:
            return error  # Loader raises it: torch would wrap a worker's error in pages of traceback
        starts = range(0, self.share, self.local_batch_size)
        return [default_collate(samples[i : i + self.local_batch_size]) for i in starts]


def _fetch(steps: _Steps, first_samples: Iterator[int], num_workers: int) -> Iterator[list[Microbatch] | ConfigError]:
    """Fetches the steps. A generator, so that workers start at the first step, when the model is in memory.

    It does not refer to Loader. In a cycle of references, workers would outlive their queues, and each of them would be
    waited for in vain for 5 seconds."""
    with warnings.catch_warnings():  # torchdata 0.11 uses a function that torch 2.13 calls deprecated
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        batches = StatefulDataLoader(
            steps,
            sampler=first_samples,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_survive_signals,
            generator=torch.Generator(),  # without it, the loader draws a number from torch's global generator
        )
    yield from batches


def _survive_signals(worker: int) -> None:
    """Lets only the training process end a worker: by SIGTERM, or by its own end.

    The signal that asks a run to save and end often reaches all processes of the run. A worker that died of it would
    end the run with an error. torch watches os.getppid(), which is a server's number where workers are not forked."""
    run = multiprocessing.parent_process()

    def end_with_the_run() -> None:
        run.join()
        os._exit(1)

    def end_on_its_sigterm() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})  # in threads too
        threading.Thread(target=end_on_its_sigterm, daemon=True).start()
    threading.Thread(target=end_with_the_run, daemon=True).start()
