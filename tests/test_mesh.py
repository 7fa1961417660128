"""Layouts: which are accepted, the ranks of each axis, process groups, and the elements of a parameter on a rank."""

import time

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.runs import whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import ModelArgs, Transformer
from parallelize import ParallelDims, ParallelMesh, build_mesh, init_weights, parallelize_pipeline
from parallelize.fsdp import parallelize_data
from parallelize.init import held_indices
from parallelize.tensor import parallelize_tensor
from resilience.process_group import init_distributed


@pytest.mark.parametrize(
    "degrees, world_size, resolved",
    [
        (ParallelDims(), 8, (1, 1, 8, 1, 1)),
        (ParallelDims(dp_replicate=2), 8, (1, 2, 4, 1, 1)),
        (ParallelDims(dp_replicate=4, dp_shard=1), 4, (1, 4, 1, 1, 1)),
        (ParallelDims(pp=2, cp=2, tp=2), 16, (2, 1, 2, 2, 2)),
    ],
)
def test_dp_shard_minus_one_takes_the_remaining_ranks(degrees, world_size, resolved):
    """dp_shard = -1 becomes what the other axes leave of the ranks."""
    d = degrees.resolve(world_size)
    assert (d.pp, d.dp_replicate, d.dp_shard, d.cp, d.tp) == resolved


@pytest.mark.parametrize(
    "degrees, world_size, parts",
    [
        (ParallelDims(dp_replicate=3), 8, ["data_parallel_replicate_degree 3 does not", "(8)", "replicate_degree 2 x"]),
        (ParallelDims(dp_shard=16), 8, ["data_parallel_shard_degree 16", "(8)", "data_parallel_shard_degree 8"]),
        (ParallelDims(dp_shard=2, tp=2), 8, ["data_parallel_shard_degree 2 x tensor_parallel_degree 2", "(8)",
                                        "tensor_parallel_degree 2 x data_parallel_shard_degree 4"]),
        (ParallelDims(dp_shard=0), 8, ["data_parallel_shard_degree (0) must be at least 1"]),
        (ParallelDims(tp=2, ep=3), 8, ["expert_parallel_degree (3)", "(8)", "[1, 2, 4, 8]"]),
    ],
)  # fmt: skip
def test_resolve_rejects_layout_that_does_not_fit(degrees, world_size, parts):
    """The error holds every number, and layouts that fit."""
    with pytest.raises(ValueError) as error:
        degrees.resolve(world_size)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_suggested_layouts_fit():
    """Every layout that the error suggests multiplies to the number of ranks."""
    for world_size in (1, 6, 8, 12, 64):
        for layout in (ParallelDims(dp_replicate=5), ParallelDims(tp=7, pp=3), ParallelDims(dp_shard=5, cp=2)):
            with pytest.raises(ValueError) as error:
                layout.resolve(world_size)
            for suggestion in str(error.value).split("these would fit: ")[1].rstrip(".").split("; "):
                product = 1
                for part in suggestion.split(" x "):
                    product *= int(part.split()[-1])
                assert product == world_size, str(error.value)


def _ranks_of_axes():
    init_distributed("cpu", 60)
    mesh = build_mesh("cpu", 8, dp_replicate=2, cp=2, tp=2, ep=4)
    dist.barrier()  # rank 0 has the store, through which the others may still be making their groups
    axes = {axis: mesh.world[axis] for axis in mesh.world.mesh_dim_names}
    axes |= dict(fsdp=mesh.dense["fsdp"], ep=mesh.ep, loss=mesh.loss, tokens=mesh.tokens, sequence=mesh.sequence)
    return {name: dist.get_process_group_ranks(m.get_group()) for name, m in axes.items()}, mesh.dp_rank, mesh.dp_degree


def test_axes_hold_the_drawn_ranks():
    """dp_replicate 2 x cp 2 x tp 2: the ranks of every axis, and the part of a batch that each rank reads."""
    views = run_ranks(8, _ranks_of_axes)
    ranks, dp_rank, dp_degree = views[5]  # dp_replicate 1, dp_shard 0, cp 0, tp 1
    assert ranks == {
        "pp": [5], "dp_replicate": [1, 5], "dp_shard": [5], "cp": [5, 7], "tp": [4, 5],
        "fsdp": [5, 7], "ep": [4, 5, 6, 7], "loss": [1, 3, 5, 7], "tokens": list(range(8)), "sequence": [4, 5, 6, 7],
    }  # fmt: skip
    assert (dp_rank, dp_degree) == (1, 2)
    assert [v[1] for v in views] == [0] * 4 + [1] * 4


def _build_and_count(world_size: int, degrees: dict[str, int]) -> tuple[ParallelMesh, list[list[int]]]:
    """The mesh, and the ranks of each process group that this rank has made for it."""
    made, new_group = [], dist.new_group

    def counting_new_group(ranks, *args, **options):
        made.append(ranks)
        return new_group(ranks, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", counting_new_group)
        mesh = build_mesh("cpu", world_size, **degrees)
    return mesh, made


def _axes(mesh: ParallelMesh) -> list[DeviceMesh]:
    """Every axis of every mesh, as a mesh of one axis."""
    grids = (mesh.world, mesh.dense, mesh.sparse)
    return [grid[axis] for grid in grids for axis in grid.mesh_dim_names] + [mesh.loss, mesh.tokens, mesh.sequence]


# Layouts of eight ranks, with the number of groups that each needs beside the world's.
LAYOUTS_AND_GROUPS = [
    (dict(), 1),  # this rank alone
    (dict(pp=8), 1),
    (dict(tp=2, cp=2), 6),  # dp_shard, cp, tp, fsdp = loss, sequence, this rank alone
    (dict(pp=2, tp=2, ep=2), 5),  # pp, fsdp = loss = efsdp, tp = ep = sequence, tokens, this rank alone
    (dict(dp_replicate=2, cp=2, tp=2, ep=4), 6),  # dp_replicate, cp = fsdp, tp, ep = sequence, loss, this rank alone
]


def _groups_of_layouts() -> list[int]:
    """The number of groups made for each layout, after the ranks of each, and a sum over it, were found right."""
    init_distributed("cpu", 60)
    counts = []
    for degrees, _ in LAYOUTS_AND_GROUPS:
        mesh, made = _build_and_count(8, degrees)
        by_ranks = {}
        for axis in _axes(mesh):
            group, ranks = axis.get_group(), axis.mesh.tolist()
            assert dist.get_process_group_ranks(group) == ranks, (degrees, axis)
            assert by_ranks.setdefault(tuple(ranks), group) is group, f"two groups of ranks {ranks} in {degrees}"
            total = torch.tensor(dist.get_rank())
            dist.all_reduce(total, group=group)
            assert total == sum(ranks), (degrees, axis)
        counts.append(len(made))
        assert (mesh.efsdp is None) == (mesh.degrees.ep == mesh.degrees.tp == 1)
    return counts


def test_axes_of_same_ranks_share_a_group():
    """Axes and views of the same ranks have the same process group, whose members are the axis's ranks in order."""
    assert run_ranks(8, _groups_of_layouts) == [[groups for _, groups in LAYOUTS_AND_GROUPS]] * 8


def _groups_on_fake_ranks(rank: int, world_size: int, degrees: dict[str, int]) -> tuple[int, int]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    mesh, made = _build_and_count(world_size, degrees)
    assert all(dist.get_process_group_ranks(axis.get_group()) == axis.mesh.tolist() for axis in _axes(mesh))
    return len(made), len({axis.get_group().group_name for axis in _axes(mesh)})


def test_rank_makes_at_most_eleven_groups():
    """One group for each of the eleven axes where all of them have different ranks, here of 64."""
    degrees = dict(pp=2, dp_replicate=2, dp_shard=4, cp=2, tp=2, ep=8)
    assert run_ranks(1, _groups_on_fake_ranks, 37, 64, degrees)[0] == (11, 11)


@pytest.mark.parametrize("rank", [0, 1000, 2047])
def test_rank_of_2048_makes_five_groups(rank):
    """The layout of configs/deepseek_v3_671b.toml: pp, fsdp = loss = tokens, efsdp, ep and this rank alone."""
    assert run_ranks(1, _groups_on_fake_ranks, rank, 2048, dict(pp=16, ep=64))[0] == (5, 5)


def _wait_for_a_missing_rank() -> float:
    """Seconds until rank 0 gives up a sum over tp that rank 1 never joins."""
    init_distributed("cpu", 60)
    mesh = build_mesh("cpu", 4, timeout_seconds=2, tp=2)
    dist.barrier()
    began = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.all_reduce(torch.zeros(1), group=mesh.tp.get_group())
    seconds = time.monotonic() - began
    dist.barrier()
    return seconds


def test_collective_of_an_axis_ends_after_timeout_seconds():
    """comm.timeout_seconds holds for the groups of every axis, not only for the world's group."""
    assert 1 < run_ranks(4, _wait_for_a_missing_rank)[0] < 30


def _held_elements():
    """Asserts, for many shardings of one matrix, that held_indices names the elements the rank really holds."""
    init_distributed("cpu", 60)
    checked = []
    for sizes in ((4,), (2, 2)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])
        placements = [Shard(0), Shard(1), Replicate()]
        combinations = (
            [(p,) for p in placements] if len(sizes) == 1 else [(p, q) for p in placements for q in placements]
        )
        for shape in ((8, 12), (7, 5), (3, 9), (2, 2)):
            matrix = torch.arange(shape[0] * shape[1]).view(shape)
            for combination in combinations:
                tensor = distribute_tensor(matrix, mesh, combination)
                rows, columns = held_indices(tensor)
                assert torch.equal(tensor.to_local(), matrix[rows][:, columns]), (shape, combination)
                checked.append((shape, combination))
    # FSDP over what tensor parallelism left of the same dimension: the strided case, also where nothing divides.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    for rows_in_all in (8, 12, 6, 7):
        linear = nn.Linear(3, rows_in_all, bias=False)
        matrix = torch.arange(rows_in_all * 3.0).view(rows_in_all, 3)
        linear.weight = nn.Parameter(distribute_tensor(matrix, mesh["tp"], [Shard(0)]))
        fully_shard(linear, mesh=mesh["fsdp"])
        assert isinstance(linear.weight, DTensor)
        rows, columns = held_indices(linear.weight)
        assert torch.equal(linear.weight.to_local(), matrix[rows][:, columns]), rows_in_all
        checked.append(rows_in_all)
    return len(checked)


def test_held_indices_equal_local_elements():
    """Plain, two-dimensional, uneven and strided shards, on each of four ranks."""
    assert run_ranks(4, _held_elements) == [52] * 4


def _initial_weights(shape: dict, degrees: dict):
    """This rank's part of each parameter: (whole shape, indices, values) by name."""
    init_distributed("cpu", 60)
    args = ModelArgs(**shape)
    with torch.device("meta"):
        model = Transformer(args)
    mesh = build_mesh("cpu", dist.get_world_size(), **degrees)
    held = {}
    for stage in parallelize_pipeline(model, mesh.pp, schedule="Interleaved1F1B", stages_per_rank=0):
        parallelize_tensor(stage, mesh.tp)
        precision = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        parallelize_data(stage, mesh.fsdp, **precision, reshard_after_forward=True, cpu_offload=False)
        stage.to_empty(device="cpu")
        init_weights(stage, args, seed=3)
        for name, p in stage.named_parameters():
            held[name] = (p.shape, held_indices(p), p.to_local().detach() if isinstance(p, DTensor) else p.detach())
    dist.barrier()  # rank 0 has the store, through which the others may still be making their groups
    return held


def test_initial_weights_are_equal_in_any_layout():
    """Initial weights are bitwise equal on one rank and sharded, evenly, unevenly, and into fewer rows than ranks."""
    shape = dict(dim=36, n_layers=4, n_heads=6, n_kv_heads=2, hidden_dim=50, vocab_size=62)
    one = whole(run_ranks(1, _initial_weights, shape, {}))
    layouts = [
        (3, {}), (8, {}), (8, dict(dp_replicate=2)), (2, dict(tp=2)), (8, dict(tp=2)), (2, dict(pp=2)),
        (8, dict(pp=2, cp=2, tp=2)),
    ]  # fmt: skip
    for ranks, degrees in layouts:
        many = whole(run_ranks(ranks, _initial_weights, shape, degrees))
        assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one), (ranks, degrees)
