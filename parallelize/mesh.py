"""ParallelDims -> device meshes. Five axes, always there, each of size 1 or more; slowest first:

    pp              pipeline stages
    dp_replicate    copies of the model
    dp_shard        FSDP
    cp              parts of a sequence
    tp              parts of a weight (and, between them, of a sequence)

Eight ranks as dp_replicate 2 x dp_shard 2 x tp 2 (pp = cp = 1):

                         dp_replicate 0                    dp_replicate 1
                   dp_shard 0      dp_shard 1        dp_shard 0      dp_shard 1
                 tp 0    tp 1    tp 0    tp 1      tp 0    tp 1    tp 0    tp 1
    rank           0       1       2       3         4       5       6       7
    reads          samples 0       samples 1         samples 2       samples 3
    weights      a       b       c       d         a       b       c       d      <- four quarters, twice
    sums with      weights: all-gather {0,2} {1,3} {4,6} {5,7}; gradients: reduce-scatter within those, then
                   all-reduce {0,4} {1,5} {2,6} {3,7}; activations: {0,1} {2,3} {4,5} {6,7}

Other views of the same ranks, in the same order:

    batch = dp_replicate x dp_shard        who reads which samples
    loss  = dp_replicate x dp_shard x cp   who holds different tokens, so over whom token counts and losses are summed
    fsdp  = dp_shard x cp                  over whom a weight is sharded: context ranks hold the same weights
    tokens = all but pp                    who holds different tokens between attention and the next: the sequence is
                                           cut over tp too
    sequence = cp x tp                     who shares sequences
    efsdp x ep = dp_shard x cp x tp        the same as fsdp for experts, which are never tensor-parallel: expert
                                           parallelism borrows ranks, it adds none
"""

from dataclasses import dataclass, fields
from itertools import product
from math import prod

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class ParallelDims:
    """How many ways each axis is split; dp_shard = -1 takes the ranks that the others leave."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def resolve(self, world_size: int) -> "ParallelDims":
        """The same with dp_shard filled in. ValueError unless it multiplies to world_size, with layouts that do."""
        values = {axis: getattr(self, axis) for axis in AXES}
        wrong = [a for a, n in values.items() if n < 1 and not (a == "dp_shard" and n == -1)]
        if wrong:
            raise ConfigError(f"{_option(wrong[0])} ({values[wrong[0]]}) must be at least 1.")
        others = prod(n for axis, n in values.items() if axis != "dp_shard")
        if values["dp_shard"] == -1 and world_size % others == 0:
            values["dp_shard"] = world_size // others
        if others * values["dp_shard"] != world_size:
            given = " x ".join(f"{_option(a)} {n}" for a, n in values.items() if n not in (1, -1))
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
        """Up to three layouts of world_size ranks that differ from this one on as few axes, as little as can be."""
        wanted = {axis: max(1, getattr(self, axis)) for axis in AXES if axis != "dp_shard"}
        sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
        # An axis that was not asked for stays at 1.
        choices = [sizes if n > 1 else [1] for n in wanted.values()]
        fitting = [c for c in product(*choices) if world_size % prod(c) == 0]
        fitting.sort(key=lambda c: sum(abs(a - b) + (a != b) for a, b in zip(c, wanted.values(), strict=True)))
        texts = []
        for choice in fitting[:3]:
            named = [(_option(axis), n) for axis, n in zip(wanted, choice, strict=True) if n > 1]
            named.append((_option("dp_shard"), world_size // prod(choice)))
            texts.append(" x ".join(f"{option} {n}" for option, n in named))
        return "; ".join(texts)


def _option(axis: str) -> str:
    names = {"pp": "pipeline", "dp_replicate": "data_parallel_replicate", "dp_shard": "data_parallel_shard",
             "cp": "context", "tp": "tensor"}  # fmt: skip
    return names[axis] + ("_degree" if axis.startswith("dp_") else "_parallel_degree")


@dataclass(frozen=True)
class ParallelMesh:
    """One layout. Slices are taken once, here: a DeviceMesh is equal to itself only.

    The meshes are made side by side over the same ranks in the same order, since FSDP and DTensor need equal rank
    maps, not a common root, and joining axes of one mesh is not public API.
    """

    degrees: ParallelDims
    world: DeviceMesh  # pp, dp_replicate, dp_shard, cp, tp
    dense: DeviceMesh  # pp, dp_replicate, fsdp, tp
    sparse: DeviceMesh  # pp, dp_replicate, efsdp, ep
    pp: DeviceMesh
    cp: DeviceMesh
    tp: DeviceMesh
    ep: DeviceMesh
    sequence: DeviceMesh  # who shares sequences
    loss: DeviceMesh  # over whom token counts and losses are summed
    tokens: DeviceMesh  # over whom tokens of experts are counted
    fsdp: DeviceMesh  # what fully_shard takes: (dp_replicate, fsdp), or fsdp alone
    efsdp: DeviceMesh  # the same for experts: (dp_replicate, efsdp), or efsdp alone

    @property
    def dp_degree(self) -> int:
        """Number of ranks that read different samples."""
        return self.degrees.dp_replicate * self.degrees.dp_shard

    @property
    def dp_rank(self) -> int:
        """Which of them this one is; ranks that differ only in cp, tp or pp read the same samples."""
        replicate, shard = (self.world.get_local_rank(axis) for axis in ("dp_replicate", "dp_shard"))
        return replicate * self.degrees.dp_shard + shard


def build_mesh(degrees: ParallelDims, device_type: str, world_size: int) -> ParallelMesh:
    """Meshes of all ranks ("cpu" or "cuda") for these degrees. ValueError if they do not fit; a collective."""
    d = degrees.resolve(world_size)
    fsdp, experts = d.dp_shard * d.cp, d.dp_shard * d.cp * d.tp

    def make(**axes: int) -> DeviceMesh:
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    world = make(pp=d.pp, dp_replicate=d.dp_replicate, dp_shard=d.dp_shard, cp=d.cp, tp=d.tp)
    dense = make(pp=d.pp, dp_replicate=d.dp_replicate, fsdp=fsdp, tp=d.tp)
    sparse = make(pp=d.pp, dp_replicate=d.dp_replicate, efsdp=experts // d.ep, ep=d.ep)
    loss = make(pp=d.pp, loss=d.dp_replicate * fsdp, tp=d.tp)["loss"]
    tokens = loss if d.tp == 1 else make(pp=d.pp, tokens=d.dp_replicate * experts)["tokens"]
    sequence = make(pp=d.pp, batch=d.dp_replicate * d.dp_shard, sequence=d.cp * d.tp)["sequence"]
    # A 2-D mesh adds an all-reduce, over one rank when there is one copy.
    replicate = ("dp_replicate",) if d.dp_replicate > 1 else ()
    return ParallelMesh(
        d,
        world,
        dense,
        sparse,
        pp=world["pp"],
        cp=world["cp"],
        tp=dense["tp"],  # of one root with FSDP's axis: a weight is cut over both
        ep=sparse["ep"],
        sequence=sequence,
        loss=loss,
        tokens=tokens,
        fsdp=dense[(*replicate, "fsdp")],
        efsdp=sparse[(*replicate, "efsdp")],
    )
