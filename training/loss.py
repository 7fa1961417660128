"""The loss under one rule: sum over everything, divide once. (The cross entropy itself is `model/head.py`'s.)

A mean of per-rank or per-microbatch means weighs tokens of ranks with fewer valid ones too much (pytorch/torchtitan
#1842), and every axis that joins would need its own correction factor. So each microbatch's loss is a sum divided by
the number of valid tokens of the *whole* optimizer step, before backward; gradients are then summed, everywhere.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from model import IGNORE_INDEX


def count_valid_tokens(microbatches: list[dict[str, Tensor]], loss_mesh: DeviceMesh) -> Tensor:
    """Number of labels that count in this optimizer step, over all its microbatches and ranks: int64 scalar, at least
    1 so that a step without any has loss 0. A collective."""
    count = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in microbatches]).sum()
    dist.all_reduce(count, group=loss_mesh.get_group())
    return count.clamp(min=1)


def sum_over(value: Tensor, *meshes: DeviceMesh) -> Tensor:
    """The step's loss from every rank's part of it, summed over each of the axes. A collective."""
    value = value.clone()
    for mesh in meshes:
        dist.all_reduce(value, group=mesh.get_group())
    return value
