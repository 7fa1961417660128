"""Collectives on Python objects, for setup, checkpoints and errors; and the local part of a tensor."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from errors import ConfigError

T = TypeVar("T")


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns every rank's value, in the order of the group's ranks. The values are pickled."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank0(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Calls `do` on rank 0 and returns its result on all ranks. For folders that change: ranks that each look for
    themselves may see different files. An OSError or ConfigError on rank 0 becomes a ConfigError on all ranks."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = do()
        except OSError as error:
            answer[1] = f"{error.filename}: {error.strerror}."
        except ConfigError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, group=group)
    result, failure = answer
    if failure:
        raise ConfigError(failure)
    return result


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns the part of a DTensor that this rank holds, and a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
