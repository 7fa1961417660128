"""Every private torch import, each with its reason and the torch versions it was tried on (2.11, 2.13)."""

import torch.distributed as dist

# The only all-to-all that autograd and the compiler understand: torch.distributed's public one is neither.
from torch.distributed._functional_collectives import all_to_all_single_autograd

# A parameter sharded by FSDP on top of another sharding of the same dimension has this placement on FSDP's axis, and
# the public Shard does not cover it. Needed to know which elements a rank holds.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = ["StridedShard", "all_to_all_single_autograd", "enable_micro_pipelining"]


def enable_micro_pipelining(group: dist.ProcessGroup) -> None:
    """Asynchronous tensor parallelism is the compiler's option, and has no public switch."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.group_name)
