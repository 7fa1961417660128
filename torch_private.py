"""Every private torch import, each with its reason and the torch versions it was tried on (2.11, 2.13)."""

import torch.distributed as dist
from torch import Tensor

# Norms of many tensors in one pass, and their scaling: torch.nn.utils.get_total_norm is public, but computes the norm
# of bfloat16 gradients in bfloat16.
from torch import _foreach_mul_ as foreach_mul_
from torch import _foreach_norm as foreach_norm

# The only all-to-all that autograd and the compiler understand: torch.distributed's public one is neither.
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import DTensor

# A parameter sharded by FSDP on top of another sharding of the same dimension has this placement on FSDP's axis, and
# the public Shard does not cover it. Needed to know which elements a rank holds.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = [
    "StridedShard",
    "all_to_all_single_autograd",
    "default_store",
    "dtensor_with",
    "enable_micro_pipelining",
    "foreach_mul_",
    "foreach_norm",
    "set_activation_memory_budget",
]


def default_store() -> dist.Store:
    """The store that the process group began with, through which a failing rank can still reach the others: torch keeps
    it and has no public getter."""
    return dist.distributed_c10d._get_default_store()


def dtensor_with(local: Tensor, like: DTensor) -> DTensor:
    """A DTensor laid out as `like`, whose local part is `local` and may be on another device. DTensor.from_local would
    move it to the mesh's device, and torch's own DefaultStager can stage only once in torch 2.11."""
    return DTensor(local, like._spec, requires_grad=False)


def enable_micro_pipelining(group: dist.ProcessGroup) -> None:
    """Asynchronous tensor parallelism is the compiler's option, and has no public switch."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.group_name)


def set_activation_memory_budget(budget: float) -> None:
    """How much of the activations the compiler's partitioner may keep (0 to 1, 1 being its own choice): an option of
    the whole process, without a public setter."""
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = budget
