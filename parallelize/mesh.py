"""The ranks as device meshes, one axis for each kind of parallelism.

Five axes, always there, each of size 1 or more; slowest first:

    pp              pipeline stages
    dp_replicate    copies of the model
    dp_shard        shards of every weight (FSDP)
    cp              parts of a sequence
    tp              parts of a weight; between weights, parts of a sequence

Eight ranks as dp_replicate 2 x dp_shard 2 x tp 2 (pp = cp = 1):

                         dp_replicate 0                    dp_replicate 1
                   dp_shard 0      dp_shard 1        dp_shard 0      dp_shard 1
                 tp 0    tp 1    tp 0    tp 1      tp 0    tp 1    tp 0    tp 1
    rank           0       1       2       3         4       5       6       7
    reads          samples 0       samples 1         samples 2       samples 3
    weights      a       b       c       d         a       b       c       d      <- four quarters, twice
    dp_shard     all-gathers weights, reduce-scatters gradients: {0,2} {1,3} {4,6} {5,7}
    dp_replicate all-reduces the shards of gradients: {0,4} {1,5} {2,6} {3,7}
    tp           gathers and sums activations: {0,1} {2,3} {4,5} {6,7}

Six more axes join or divide these, with the ranks in the same order:

    fsdp = dp_shard x cp               shards a weight: context ranks hold the same weights
    efsdp x ep = dp_shard x cp x tp    experts, which are never tensor-parallel: ep sends tokens to their experts, efsdp
                                       shards an expert's weights. Expert parallelism borrows ranks, it adds none.
    loss = dp_replicate x fsdp         sums losses and token counts: these ranks hold different tokens
    tokens = loss x tp                 sums the tokens of each expert: a sequence is split over tp too
    sequence = cp x tp                 ranks that share sequences

Process groups: axes of the same ranks share a group. An axis of all ranks takes the world's group, and all axes of size
1 take one group of this rank alone. So a rank makes at most 11 groups, one for each axis above, whatever the number of
ranks. NCCL makes a communicator at a group's first collective: at most 11 with the world's, since nothing is sent over
dp_shard where it differs from fsdp. A communicator runs one collective after the other, so the collectives of axes that
share a group do not overlap.

Proof: tests/test_mesh.py::test_axes_hold_the_drawn_ranks, tests/test_mesh.py::test_axes_of_same_ranks_share_a_group,
tests/test_mesh.py::test_rank_makes_at_most_eleven_groups.
"""

from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from errors import ConfigError

AXES = {  # and the option that sets the size of each
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}


@dataclass(frozen=True)
class ParallelDims:
    """The size of each axis; dp_shard = -1 takes the ranks that the other axes leave."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def resolve(self, world_size: int) -> "ParallelDims":
        """Fills in dp_shard. ConfigError, with layouts that fit, unless the axes multiply to world_size."""
        values = {axis: getattr(self, axis) for axis in AXES}
        for axis, n in values.items():
            if n < 1 and (axis, n) != ("dp_shard", -1):
                raise ConfigError(f"{AXES[axis]} ({n}) must be at least 1.")
        others = prod(n for axis, n in values.items() if axis != "dp_shard")
        if values["dp_shard"] == -1 and world_size % others == 0:
            values["dp_shard"] = world_size // others
        if others * values["dp_shard"] != world_size:
            given = " x ".join(f"{AXES[a]} {n}" for a, n in values.items() if n not in (1, -1))
            raise ConfigError(
                f"{given} does not multiply to the number of ranks ({world_size}); these would fit: "
                f"{self._suggest(world_size)}."
            )
        experts = values["dp_shard"] * values["cp"] * values["tp"]
        if self.ep < 1 or experts % self.ep != 0:
            raise ConfigError(
                f"expert_parallel_degree ({self.ep}) must divide dp_shard x cp x tp ({experts}); use one of "
                f"{[n for n in range(1, experts + 1) if experts % n == 0]}."
            )
        return ParallelDims(**values, ep=self.ep)

    def __str__(self) -> str:
        return " x ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1) or "1"

    def _suggest(self, world_size: int) -> str:
        """The up to three layouts of world_size ranks that differ least from this layout, as text."""
        wanted = {axis: max(1, getattr(self, axis)) for axis in AXES if axis != "dp_shard"}
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        choices = [divisors if n > 1 else [1] for n in wanted.values()]  # an axis that was not asked for stays at 1
        fitting = [c for c in product(*choices) if world_size % prod(c) == 0]
        fitting.sort(key=lambda c: sum(abs(a - b) + (a != b) for a, b in zip(c, wanted.values(), strict=True)))
        texts = []
        for choice in fitting[:3]:
            named = [f"{AXES[axis]} {n}" for axis, n in zip(wanted, choice, strict=True) if n > 1]
            texts.append(" x ".join([*named, f"{AXES['dp_shard']} {world_size // prod(choice)}"]))
        return "; ".join(texts)


@dataclass(frozen=True)
class ParallelMesh:
    """The meshes of one layout. fully_shard joins the axes that a weight is sharded on, so `dense` has fsdp and tp."""

    degrees: ParallelDims
    world: DeviceMesh  # pp, dp_replicate, dp_shard, cp, tp
    dense: DeviceMesh  # pp, dp_replicate, fsdp, tp
    sparse: DeviceMesh  # pp, dp_replicate, efsdp, ep
    pp: DeviceMesh
    cp: DeviceMesh
    tp: DeviceMesh
    ep: DeviceMesh
    sequence: DeviceMesh
    loss: DeviceMesh
    tokens: DeviceMesh
    fsdp: DeviceMesh  # for fully_shard: (dp_replicate, fsdp), or fsdp alone without copies
    efsdp: DeviceMesh | None  # the same for experts; None where they are sharded like everything else: ep = tp = 1

    @property
    def dp_degree(self) -> int:
        """Number of ranks that read different samples."""
        return self.degrees.dp_replicate * self.degrees.dp_shard

    @property
    def dp_rank(self) -> int:
        """Which of the dp_degree parts of a batch this rank reads; ranks that differ in pp, cp or tp read the same."""
        replicate, shard = (self.world.get_local_rank(axis) for axis in ("dp_replicate", "dp_shard"))
        return replicate * self.degrees.dp_shard + shard


def build_mesh(device_type: str, world_size: int, *, timeout_seconds: int = 600, **degrees: int) -> ParallelMesh:
    """The meshes of all world_size ranks for degrees, the fields of ParallelDims. device_type is "cpu" or "cuda".
    ConfigError if the degrees do not fit. A collective: every rank makes its groups in the same order."""
    d, rank = ParallelDims(**degrees).resolve(world_size), dist.get_rank()
    timeout = timedelta(seconds=timeout_seconds)  # a new group does not inherit that of the world's group
    groups = {range(world_size): dist.group.WORLD}

    def group_of(axis: str, size: int, stride: int) -> dist.ProcessGroup:
        """This rank's group of an axis: `size` ranks, `stride` apart."""
        first = rank - rank // stride % size * stride
        ranks = range(first, first + size * stride, stride)
        if ranks not in groups:  # ranges are equal if their numbers are
            # Only the members take part: the cost for a rank does not grow with the number of groups on other ranks.
            groups[ranks] = dist.new_group(list(ranks), timeout, use_local_synchronization=True, group_desc=axis)
        return groups[ranks]

    def grid(**axes: int) -> DeviceMesh:
        """A mesh of all ranks, the last axis fastest."""
        sizes = tuple(axes.values())
        mesh_groups = [group_of(axis, n, prod(sizes[i + 1 :])) for i, (axis, n) in enumerate(axes.items())]
        ranks = torch.arange(world_size).view(sizes)
        return DeviceMesh.from_group(mesh_groups, device_type, ranks, mesh_dim_names=tuple(axes))

    def line(axis: str, size: int, stride: int) -> DeviceMesh:
        """A mesh of this rank's group of one axis."""
        return DeviceMesh.from_group(group_of(axis, size, stride), device_type, mesh_dim_names=(axis,))

    fsdp = d.dp_shard * d.cp
    dense = grid(pp=d.pp, dp_replicate=d.dp_replicate, fsdp=fsdp, tp=d.tp)
    sparse = grid(pp=d.pp, dp_replicate=d.dp_replicate, efsdp=fsdp * d.tp // d.ep, ep=d.ep)
    world = grid(pp=d.pp, dp_replicate=d.dp_replicate, dp_shard=d.dp_shard, cp=d.cp, tp=d.tp)
    # A 2-D mesh adds an all-reduce, over one rank when there is one copy.
    replicate = ("dp_replicate",) if d.dp_replicate > 1 else ()
    return ParallelMesh(
        d,
        world,
        dense,
        sparse,
        pp=world["pp"],
        cp=world["cp"],
        tp=dense["tp"],
        ep=sparse["ep"],
        sequence=line("sequence", d.cp * d.tp, stride=1),
        loss=line("loss", d.dp_replicate * fsdp, stride=d.tp),
        tokens=line("tokens", d.dp_replicate * fsdp * d.tp, stride=1),
        fsdp=dense[(*replicate, "fsdp")],
        efsdp=sparse[(*replicate, "efsdp")] if d.ep > 1 or d.tp > 1 else None,
    )
