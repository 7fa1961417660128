"""Token cross entropy under one rule: sum over everything, divide once.

A mean of per-rank or per-microbatch means weighs tokens of ranks with fewer valid ones too much (pytorch/torchtitan
#1842), and every axis that joins would need its own correction factor. So each microbatch's loss is a sum divided by
the number of valid tokens of the *whole* optimizer step, before backward; gradients are then summed, everywhere.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

IGNORE_INDEX = -100  # the label of a position where there is nothing to predict


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over valid labels of -log p(label), in nats, float32 at least: logits [batch, seq, vocab], labels
    [batch, seq]. Scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)


def count_valid_tokens(microbatches: list[dict[str, Tensor]], loss_mesh: DeviceMesh) -> Tensor:
    """Number of labels that count in this optimizer step, over all its microbatches and ranks: int64 scalar, at least
    1 so that a step without any has loss 0. A collective."""
    count = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in microbatches]).sum()
    dist.all_reduce(count, group=loss_mesh.get_group())
    return count.clamp(min=1)


def sum_over(value: Tensor, loss_mesh: DeviceMesh) -> Tensor:
    """The step's loss from every rank's part of it. A collective."""
    value = value.clone()
    dist.all_reduce(value, group=loss_mesh.get_group())
    return value
