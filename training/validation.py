"""The loss of held-out sequences, every interval steps: the same number in any layout.

Each sequence counts once: losses and valid tokens are summed over all batches and ranks, and divided at the end. A mean
of the batches' means would depend on how the sequences were cut into batches (pytorch/torchtitan #2366). Forwards
communicate, so a rank with fewer sequences runs as many, on sequences without labels (pytorch/torchtitan #1617).

It leaves no trace in training: it makes no gradient, counts no tokens of experts, and consumes no sample.

Proof: tests/test_validation.py::test_validation_loss_is_the_same_in_any_layout,
tests/test_validation.py::test_validation_leaves_training_unchanged.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset, default_collate

from model import IGNORE_INDEX
from parallelize.mesh import ParallelMesh
from training.loss import sum_over

Batch = dict[str, Tensor]


@dataclass
class Validation:
    """Measures the loss of samples after every interval steps, and after last_step."""

    samples: Dataset  # samples[j] is a sequence, {name: [seq_len]}; with no samples, nothing is measured
    stages: list[nn.Module]
    mesh: ParallelMesh
    forward: Callable[[Batch], Tensor]  # gives this rank's part of a batch's summed loss
    to_this_rank: Callable[[Batch], Batch]  # gives this rank's part of each sequence, on its device
    interval: int
    last_step: int
    batch_size: int  # sequences of this data rank

    def maybe_run(self, step: int) -> dict[str, float]:
        """validation_loss in nats per token, validation_perplexity (its exponential) and validation_seconds; empty for
        other steps. A collective: every rank calls it after every step."""
        if not len(self.samples) or (step % self.interval and step != self.last_step):
            return {}
        start = time.perf_counter()
        loss = self._mean_loss()
        numbers = dict(validation_loss=loss.item(), validation_perplexity=loss.exp().item())
        return numbers | dict(validation_seconds=time.perf_counter() - start)

    @torch.no_grad()
    def _mean_loss(self) -> Tensor:
        losses, counts = [], []
        for stage in self.stages:
            stage.eval()
        for batch in map(self.to_this_rank, self._batches()):
            losses.append(self.forward(batch).double())
            counts.append((batch["labels"] != IGNORE_INDEX).sum())
        for stage in self.stages:
            stage.train()
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # frees the gathered weights; in training, backward does
        loss = sum_over(torch.stack(losses).sum(), self.mesh.loss, self.mesh.pp)
        return loss / sum_over(torch.stack(counts).sum(), self.mesh.loss).clamp(min=1)

    def _batches(self) -> Iterator[Batch]:
        blank = self.samples[0] | {"labels": torch.full_like(self.samples[0]["labels"], IGNORE_INDEX)}
        at_once = self.batch_size * self.mesh.dp_degree
        for start in range(0, len(self.samples), at_once):  # as many batches on every rank
            first = start + self.mesh.dp_rank * self.batch_size
            numbers = range(first, first + self.batch_size)
            yield default_collate([self.samples[j] if j < len(self.samples) else blank for j in numbers])
