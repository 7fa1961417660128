"""The loss of held-out sequences, every so many steps: the same number in any layout.

Each of the sequences counts once: losses and valid tokens are summed over all batches and ranks, and divided at the
end. (A mean of batches' means depends on how they were cut: pytorch/torchtitan #2366.) Ranks whose share is smaller go
on with sequences without a label, so that all take the same number of forwards, which communicate (#1617).

Training does not notice: no gradient, no count of an expert's tokens, no random number, and no sample is used up.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import default_collate

from model import IGNORE_INDEX
from training.loss import sum_over


class Validation:
    """run() after a step gives nothing, or what `Metrics.log` takes: validation_loss (nats a token),
    validation_perplexity (its exponential) and validation_seconds.

    sample(j) for j below num_samples is a sequence, as the loader's {name: [seq_len]}; forward takes a batch of them
    and returns this rank's part of their summed loss. The meshes are those of `train.py`."""

    def __init__(
        self,
        sample: Callable[[int], dict[str, Tensor]],
        num_samples: int,
        *,
        interval: int,
        last_step: int,
        batch_size: int,
        data_rank: int,
        data_ranks: int,
        forward: Callable[[dict[str, Tensor]], Tensor],
        place: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        stages: list[nn.Module],
        loss_mesh: DeviceMesh,
        pp_mesh: DeviceMesh,
    ):
        self.sample, self.num_samples, self.interval, self.last_step = sample, num_samples, interval, last_step
        self.batch_size, self.data_rank, self.data_ranks = batch_size, data_rank, data_ranks
        self.forward, self.place, self.stages = forward, place, stages
        self.loss_mesh, self.pp_mesh = loss_mesh, pp_mesh

    @torch.no_grad()
    def run(self, step: int) -> dict[str, float]:
        """A collective, on every rank at every step."""
        if step % self.interval and step != self.last_step:
            return {}
        start = time.perf_counter()
        losses, counts = [], []
        for stage in self.stages:
            stage.eval()
        for batch in self._batches():
            batch = self.place(batch)
            losses.append(self.forward(batch).double())
            counts.append((batch["labels"] != IGNORE_INDEX).sum())
        for stage in self.stages:
            stage.train()
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # what was gathered: no backward comes that would free it
        loss = sum_over(torch.stack(losses).sum(), self.loss_mesh, self.pp_mesh)
        count = sum_over(torch.stack(counts).sum(), self.loss_mesh).clamp(min=1)
        mean = loss / count
        return dict(
            validation_loss=mean.item(),
            validation_perplexity=mean.exp().item(),
            validation_seconds=time.perf_counter() - start,
        )

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        at_once = self.batch_size * self.data_ranks
        for step in range(-(-self.num_samples // at_once)):
            first = step * at_once + self.data_rank * self.batch_size
            yield default_collate([self._sample_or_blank(j) for j in range(first, first + self.batch_size)])

    def _sample_or_blank(self, j: int) -> dict[str, Tensor]:
        if j < self.num_samples:
            return self.sample(j)
        blank = self.sample(0)
        return blank | {"labels": torch.full_like(blank["labels"], IGNORE_INDEX)}
