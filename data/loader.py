"""Batches of a TokenDataset for one data rank, with a state of one integer.

Step b, counted from samples_consumed, holds samples [samples_consumed + b * G, + G) of the global order, G
being the global batch size. Rank r of R takes the r-th contiguous G / R of them. So the samples of a step are
the same on any number of ranks, and a run goes on exactly with other ranks or batch sizes, knowing only how
many samples are behind it.
"""

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from data.dataset import TokenDataset
from training.signals import ignore_stop_signals

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
        self.samples_consumed = samples_consumed
        self._dataset, self._num_workers = dataset, num_workers
        self._global_batch_size, self._local_batch_size = global_batch_size, local_batch_size
        self._rank_batch_size, self._rank_offset = rank_batch_size, data_rank * rank_batch_size
        self._batches: Iterator[list[Microbatch]] | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Microbatch]:
        if self._batches is None:
            self._batches = self._start()
        microbatches = next(self._batches)
        # Counted here, where a step is handed out: workers are already fetching the steps after it.
        self.samples_consumed += self._global_batch_size
        return microbatches

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
                self._dataset,
                batch_sampler=_steps(first, self._rank_batch_size, self._global_batch_size),
                collate_fn=partial(_microbatches, self._local_batch_size),
                num_workers=self._num_workers,
                generator=torch.Generator(),  # its own: otherwise it draws a number from the model's
                worker_init_fn=ignore_stop_signals,
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
        raise ValueError(
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


def _steps(first: int, size: int, stride: int) -> Iterator[list[int]]:
    """The sample numbers of each step. No method of Loader: in a cycle of references, workers outlive their
    queues, and each is waited for, in vain, for 5 seconds."""
    while True:
        yield list(range(first, first + size))
        first += stride


def _microbatches(local_batch_size: int, samples: list[Microbatch]) -> list[Microbatch]:
    firsts = range(0, len(samples), local_batch_size)
    return [default_collate(samples[first : first + local_batch_size]) for first in firsts]
