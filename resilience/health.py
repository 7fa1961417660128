"""What must not go into the weights, and what deserves a word: gradients that are not finite, and jumps of the loss."""

import math
import statistics
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class NonFiniteGuard:
    """Decides, before the optimizer's step, whether a step may change the weights.

    The gradient's norm is the same number on all ranks, and not finite if any rank's gradient or loss is not: a loss
    that is not finite gives a gradient that is not (model/transformer.py), and gradients are summed over ranks. So
    finding out costs nothing, and all ranks find the same.

    skipped   how many steps were
    """

    def __init__(self, parameters: dict[str, nn.Parameter], max_skipped_steps: int):
        """max_skipped_steps: how many steps in a row may be skipped before the run ends."""
        self.parameters, self.max_skipped_steps = parameters, max_skipped_steps
        self.skipped = self.in_a_row = 0

    def allows(self, step: int, grad_norm: float, loss: Tensor) -> bool:
        """Whether to take the step; its loss is this rank's part. FloatingPointError, on all ranks, when it may not be
        skipped either: the weights, and the last checkpoint, are still good."""
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
        bad = next((name for name, p in self.parameters.items() if not _is_finite(p.grad)), None)
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (loss.item(), bad))
        losses = [f"rank {rank}'s loss is {value}" for rank, (value, _) in enumerate(everywhere) if value - value != 0]
        found = next(((rank, name) for rank, (_, name) in enumerate(everywhere) if name), None)
        parts = [f"step {step}: the gradient's norm is {grad_norm}", *losses[:3]]
        if found:
            parts.append(f"the first parameter whose gradient is not finite is {found[1]} (rank {found[0]})")
        return ", ".join(parts)


def _is_finite(grad: Tensor | None) -> bool:
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    return local is None or bool(torch.isfinite(local).all())


class LossSpikes:
    """Notices a loss that lies far above those before it."""

    WINDOW, NEEDED, SIGMAS = 100, 20, 6.0

    def __init__(self):
        self.losses = deque(maxlen=self.WINDOW)

    def warning(self, step: int, loss: float) -> str | None:
        """One line, if the loss of this logged step is a spike. A spike does not count among those before."""
        if not math.isfinite(loss):
            return None
        if len(self.losses) >= self.NEEDED:
            mean, sigma = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if loss > mean + self.SIGMAS * sigma and loss > 1.1 * mean:
                self.losses.append(mean + self.SIGMAS * sigma)  # a new level is accepted, slowly
                return (
                    f"warning: loss spike at step {step}: {loss:.4f}, {(loss - mean) / max(sigma, 1e-12):.0f} standard "
                    f"deviations above the mean of the last {len(self.losses) - 1} logged ({mean:.4f})."
                )
        self.losses.append(loss)
        return None
