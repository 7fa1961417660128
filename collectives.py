"""Three small things about ranks that every room needs."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from errors import ConfigError


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The value of every rank of the group, by rank, on every rank. A collective."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank0(do: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Calls `do` on rank 0 alone and returns its result on every rank: ranks must not each look at a folder that
    changes. An error of the file system becomes a ConfigError on every rank. A collective."""
    result = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = do()
        except OSError as error:
            result[1] = f"{error.filename}: {error.strerror}."
    dist.broadcast_object_list(result, group=group)
    if result[1]:
        raise ConfigError(result[1])
    return result[0]
