"""The learning rate as a pure function of the step: nothing to save, and nothing that a change of layout could lose.

Proof: tests/test_training.py::test_warmup_stable_decay, tests/test_training.py::test_cosine_from_the_warmup_on.
"""

import math


def learning_rate(
    step: int, lr: float, total_steps: int, warmup_steps: int, decay_ratio: float, decay_type: str, min_lr_factor: float
) -> float:
    """The learning rate of a step, counted from 0: linear warm-up to lr, constant, decay to lr x min_lr_factor.

    The decay takes the last decay_ratio of all steps, or the steps that the warm-up leaves: 0 is constant after
    warm-up; 1 decays at once, which with "cosine" is the usual cosine schedule; 0.1 to 0.2 is warmup-stable-decay
    (MiniCPM, arXiv:2404.06395). With s the part of the decay that is done, the factor falls from 1 as 1 - s
    ("linear"), (1 + cos(pi s)) / 2 ("cosine") or 1 - sqrt(s) ("sqrt", Hägele et al. 2024, arXiv:2405.18392)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    decay_steps = min(round(decay_ratio * total_steps), total_steps - warmup_steps)
    decay_start = total_steps - decay_steps
    if step < decay_start or decay_steps == 0:
        return lr
    done = min(1.0, (step - decay_start) / decay_steps)
    factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "sqrt": 1 - math.sqrt(done)}[decay_type]
    return lr * (min_lr_factor + (1 - min_lr_factor) * factor)
