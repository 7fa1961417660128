"""The loss under one rule: sum over everything, divide once. (The cross entropy itself is in `model/head.py`.)

A mean of per-rank or per-microbatch means gives too much weight to the tokens of ranks that have few valid tokens
(pytorch/torchtitan #1842), and every further axis would need its correction factor. So each microbatch's loss is the
sum over its tokens, divided before backward by the number of valid tokens of the *whole* optimizer step. Every
reduction of gradients, on every axis, is then a plain sum.

Proof: tests/test_parity.py::test_the_data_is_ragged
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from model import IGNORE_INDEX


def count_valid_tokens(microbatches: list[dict[str, Tensor]], loss_mesh: DeviceMesh) -> Tensor:
    """Number of valid labels in this optimizer step, over all microbatches and ranks: int64 scalar, at least 1, so that
    the loss of a step without valid labels is 0. A collective."""
    count = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in microbatches]).sum()
    return sum_over(count, loss_mesh).clamp(min=1)


def sum_over(value: Tensor, *meshes: DeviceMesh) -> Tensor:
    """value, summed over the ranks of each mesh: the step's loss from every rank's part. A collective."""
    value = value.clone()
    for mesh in meshes:
        dist.all_reduce(value, group=mesh.get_group())
    return value
