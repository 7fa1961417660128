"""Batches of a TokenDataset for one data rank, with a state of one integer.

Step b, counted from samples_consumed, holds samples [samples_consumed + b * G, + G) of the global order, G
being the global batch size. Rank r of R takes the r-th contiguous G / R of them. So the samples of a step are
the same on any number of ranks, and a run goes on exactly with other ranks or batch sizes, knowing only how
many samples are behind it.
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

from data.dataset import TokenDataset
from errors import ConfigError

Microbatch = dict[str, Tensor]


class Loader:
    """What build_loader returns: an iterator that never ends.

    next() gives one optimizer step: a list of microbatches, each {name: [local_batch_size, seq_len] int64}
    with the names of TokenDataset's samples. samples_consumed counts the samples, of all ranks, of the steps
    handed out.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        global_batch_size: int,
        local_batch_size: int,
        rank_batch_size: int,
        data_rank: int,
        samples_consumed: int,
        num_workers: int,
    ) -> None:
        self.samples_consumed, self._seconds_waited = samples_consumed, 0.0
        self._dataset, self._num_workers = dataset, num_workers
        self._global_batch_size, self._local_batch_size = global_batch_size, local_batch_size
        self._rank_batch_size, self._rank_offset = rank_batch_size, data_rank * rank_batch_size
        self._batches: Iterator[list[Microbatch]] | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Microbatch]:
        start = time.perf_counter()
        if self._batches is None:
            self._batches = self._start()
        microbatches = next(self._batches)
        self._seconds_waited += time.perf_counter() - start
        if isinstance(microbatches, ValueError):
            raise ConfigError(str(microbatches))
        # Counted here, where a step is handed out: workers are already fetching the steps after it.
        self.samples_consumed += self._global_batch_size
        return microbatches

    def take_seconds_waited(self) -> float:
        """How long next() took in all since this was asked the last time: what training has waited for data."""
        waited, self._seconds_waited = self._seconds_waited, 0.0
        return waited

    def state_dict(self) -> dict[str, int]:
        # Not StatefulDataLoader's own, which holds a part for each worker and is bound to their number.
        return {"samples_consumed": self.samples_consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples_consumed = state["samples_consumed"]
        self._batches = None

    def _start(self) -> Iterator[list[Microbatch]]:
        first = self.samples_consumed + self._rank_offset
        with warnings.catch_warnings():  # torchdata 0.11 on torch 2.13, about itself
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            batches = StatefulDataLoader(
                _Steps(self._dataset, self._rank_batch_size, self._local_batch_size),
                sampler=count(first, self._global_batch_size),
                batch_size=None,
                num_workers=self._num_workers,
                worker_init_fn=_outlive_signals,
                generator=torch.Generator(),  # its own: otherwise it draws a number from the model's
            )
        return iter(batches)


def build_loader(
    dataset: TokenDataset,
    *,
    global_batch_size: int,
    local_batch_size: int,
    data_rank: int,
    data_ranks: int,
    samples_consumed: int = 0,
    num_workers: int = 0,
) -> Loader:
    """Steps of global_batch_size samples, this rank's share in microbatches of local_batch_size.

    global_batch_size and samples_consumed count sequences over all data_ranks. num_workers processes fetch
    ahead; 0 fetches when asked. Raises ValueError when the ranks cannot share a step in whole microbatches.
    """
    at_once = local_batch_size * data_ranks
    if global_batch_size < 1 or global_batch_size % at_once:
        below = global_batch_size // at_once * at_once
        fitting = f"{below} or {below + at_once}" if below > 0 else f"{at_once}"
        raise ConfigError(
            f"training.global_batch_size ({global_batch_size}) must be a multiple of local_batch_size x "
            f"data ranks ({local_batch_size} x {data_ranks} = {at_once}); use {fitting}, or another "
            "local_batch_size."
        )
    return Loader(
        dataset,
        global_batch_size=global_batch_size,
        local_batch_size=local_batch_size,
        rank_batch_size=global_batch_size // data_ranks,
        data_rank=data_rank,
        samples_consumed=samples_consumed,
        num_workers=num_workers,
    )


def _outlive_signals(worker: int) -> None:
    """In a worker. The signal that asks a run to save and end often goes to all of its processes; a worker that died of
    it would end the run with an error instead. So only the run's own process can end it, by a signal or by its end.
    (torch looks whether os.getppid() changes, which is a server's number where workers are not forked.)"""
    run = multiprocessing.parent_process()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})  # in threads too
        threading.Thread(target=_end_when_told_by, args=(run.pid,), daemon=True).start()
    threading.Thread(target=_end_with, args=(run,), daemon=True).start()


def _end_with(run) -> None:
    run.join()
    os._exit(1)


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class _Steps(Dataset):
    """A rank's share of a step, by the number of its first sample. No part of Loader: in a cycle of references, workers
    outlive their queues, and each is waited for, in vain, for 5 seconds."""

    def __init__(self, dataset: TokenDataset, size: int, local_batch_size: int):
        self.dataset, self.size, self.local_batch_size = dataset, size, local_batch_size

    def __getitem__(self, first: int) -> list[Microbatch] | ValueError:
        try:
            samples = [self.dataset[i] for i in range(first, first + self.size)]
        except ValueError as error:
            return error  # raised where it is received: a worker's errors arrive as pages of traceback
        firsts = range(0, self.size, self.local_batch_size)
        return [default_collate(samples[i : i + self.local_batch_size]) for i in firsts]
