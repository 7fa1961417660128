"""Collectives of Python objects, and the local part of a tensor: helpers that every room uses."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's value, by rank. A collective."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
