"""Every private torch import, each with its reason and the torch versions it was tried on (2.11, 2.13)."""

# A parameter sharded by FSDP on top of another sharding of the same dimension has this placement on FSDP's axis, and
# the public Shard does not cover it. Needed to know which elements a rank holds.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = ["StridedShard"]
