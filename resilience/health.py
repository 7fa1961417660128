"""Skips steps whose gradient is not finite, and warns of loss spikes.

Proof: tests/test_faults.py::test_not_finite_on_one_rank_ends_the_run,
tests/test_faults.py::test_not_finite_step_is_skipped_if_allowed,
tests/test_training.py::test_loss_spike_is_reported_once.
"""

import math
import statistics
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collectives import gather_objects, local_tensor


class NonFiniteGuard:
    """Decides, before the optimizer's step, whether a step may change the weights. max_skipped_steps in a row may be
    skipped (`skipped` counts all); at the next such step the run ends.

    The grad norm is the same number on all ranks, so all ranks decide alike, and without communication. It is finite
    only if every rank's gradient and loss are: a loss that is not finite makes its gradient so (model/transformer.py).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], max_skipped_steps: int):
        self.parameters, self.max_skipped_steps = parameters, max_skipped_steps
        self.skipped = self.in_a_row = 0

    def is_finite(self, step: int, grad_norm: float, loss: Tensor) -> bool:
        """Whether the optimizer may take this step, which is counted from 1; loss is this rank's part. Otherwise the
        step must be skipped. FloatingPointError on all ranks if too many have been skipped; the weights and the last
        checkpoint are still good then. Communicates only if the grad norm is not finite."""
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        report = self._report(step, grad_norm, loss)
        if self.in_a_row == self.max_skipped_steps:
            more = f" ({self.in_a_row} steps in a row were skipped)" if self.in_a_row else ""
            raise FloatingPointError(f"{report}; no weight was changed{more}.")
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if dist.get_rank() == 0:
            print(f"WARNING: {report}; the step was skipped, {self.in_a_row} in a row.", flush=True)
        return False

    def _report(self, step: int, grad_norm: float, loss: Tensor) -> str:
        """One sentence that names the ranks and the first parameter that are not finite."""
        gradients = {name: local_tensor(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        bad = next((name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()), None)
        by_rank = gather_objects((loss.item(), bad))
        losses = [f"rank {rank}'s loss is {x}" for rank, (x, _) in enumerate(by_rank) if not math.isfinite(x)]
        first = "the first parameter whose gradient is not finite is"
        found = [f"{first} {name} (rank {rank})" for rank, (_, name) in enumerate(by_rank) if name]
        return ", ".join([f"step {step}: the gradient's norm is {grad_norm}", *losses[:3], *found[:1]])


class LossSpikes:
    """Finds a loss that is far above the last logged losses."""

    WINDOW, NEEDED, SIGMAS = 100, 20, 6.0

    def __init__(self):
        self.losses = deque(maxlen=self.WINDOW)

    def warning(self, step: int, loss: float) -> str | None:
        """One line if the loss of this logged step is a spike, else None."""
        if not math.isfinite(loss):
            return None
        if len(self.losses) >= self.NEEDED:
            mean, sigma = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if loss > mean + self.SIGMAS * sigma and loss > 1.1 * mean:
                # The window gets the limit instead of the spike: it stays a spike, and a new level is accepted slowly.
                self.losses.append(mean + self.SIGMAS * sigma)
                return (
                    f"warning: loss spike at step {step}: {loss:.4f}, {(loss - mean) / max(sigma, 1e-12):.0f} standard "
                    f"deviations above the mean of the last {len(self.losses) - 1} logged ({mean:.4f})."
                )
        self.losses.append(loss)
        return None
