"""Layouts: which are accepted, what their views are, and which elements of a parameter a rank holds in them."""

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.runs import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from model import ModelArgs, Transformer
from parallelize import ParallelDims, build_mesh, init_weights, parallelize_pipeline
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
def test_shard_degree_takes_the_rest(degrees, world_size, resolved):
    """dp_shard = -1 becomes what the other axes leave of the ranks."""
    d = degrees.resolve(world_size)
    assert (d.pp, d.dp_replicate, d.dp_shard, d.cp, d.tp) == resolved


@pytest.mark.parametrize(
    "degrees, world_size, parts",
    [
        (ParallelDims(dp_replicate=3), 8, ["data_parallel_replicate_degree 3 does not", "(8)", "_replicate_degree 2 x"]),
        (ParallelDims(dp_shard=16), 8, ["data_parallel_shard_degree 16", "(8)", "data_parallel_shard_degree 8"]),
        (ParallelDims(dp_shard=2, tp=2), 8, ["data_parallel_shard_degree 2 x tensor_parallel_degree 2", "(8)",
                                        "tensor_parallel_degree 2 x data_parallel_shard_degree 4"]),
        (ParallelDims(dp_shard=0), 8, ["data_parallel_shard_degree (0) must be at least 1"]),
        (ParallelDims(tp=2, ep=3), 8, ["expert_parallel_degree (3)", "(8)", "[1, 2, 4, 8]"]),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(degrees, world_size, parts):
    """The message holds every number, and layouts that do fit."""
    with pytest.raises(ValueError) as error:
        degrees.resolve(world_size)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_suggested_layouts_fit():
    """What a refusal suggests is itself accepted: every suggestion multiplies to the ranks."""
    for world_size in (1, 6, 8, 12, 64):
        for layout in (ParallelDims(dp_replicate=5), ParallelDims(tp=7, pp=3), ParallelDims(dp_shard=5, cp=2)):
            with pytest.raises(ValueError) as error:
                layout.resolve(world_size)
            for suggestion in str(error.value).split("these would fit: ")[1].rstrip(".").split("; "):
                product = 1
                for part in suggestion.split(" x "):
                    product *= int(part.split()[-1])
                assert product == world_size, str(error.value)


def _views():
    init_distributed("cpu", 60)
    mesh = build_mesh(ParallelDims(dp_replicate=2, cp=2, tp=2, ep=4), "cpu", 8)
    members = {axis: dist.get_process_group_ranks(mesh.world[axis].get_group()) for axis in mesh.world.mesh_dim_names}
    members["fsdp"] = dist.get_process_group_ranks(mesh.dense["fsdp"].get_group())
    members["ep"] = dist.get_process_group_ranks(mesh.sparse["ep"].get_group())
    members["loss"] = dist.get_process_group_ranks(mesh.loss.get_group())
    return members, mesh.dp_rank, mesh.dp_degree


def test_views_of_eight_ranks():
    """dp_replicate 2 x cp 2 x tp 2: who is with whom on every axis and view, and who reads which samples."""
    views = run_ranks(8, _views)
    members, dp_rank, batch_size = views[5]  # dp_replicate 1, dp_shard 0, cp 0, tp 1
    assert members == {
        "pp": [5], "dp_replicate": [1, 5], "dp_shard": [5], "cp": [5, 7], "tp": [4, 5],
        "fsdp": [5, 7], "ep": [4, 5, 6, 7], "loss": [1, 3, 5, 7],
    }  # fmt: skip
    assert (dp_rank, batch_size) == (1, 2)
    assert [v[1] for v in views] == [0] * 4 + [1] * 4


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


def test_held_indices_are_what_a_rank_holds():
    """For plain, two-dimensional, uneven and strided shards, on each of four ranks."""
    assert run_ranks(4, _held_elements) == [52] * 4


def _initial_weights(shape: dict, degrees: dict):
    """What this rank holds of each parameter: (whole shape, indices, values) by name."""
    init_distributed("cpu", 60)
    args = ModelArgs(**shape)
    with torch.device("meta"):
        model = Transformer(args)
    mesh = build_mesh(ParallelDims(**degrees), "cpu", dist.get_world_size())
    held = {}
    for stage in parallelize_pipeline(model, mesh.pp, schedule="Interleaved1F1B", stages_per_rank=0):
        parallelize_tensor(stage, mesh.tp, seq_len=16, use_async=False)
        precision = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        parallelize_data(stage, mesh.fsdp, **precision, reshard_after_forward=True, cpu_offload=False)
        stage.to_empty(device="cpu")
        init_weights(stage, args, seed=3)
        for name, p in stage.named_parameters():
            held[name] = (p.shape, held_indices(p), p.to_local().detach() if isinstance(p, DTensor) else p.detach())
    return held


def test_initial_weights_do_not_depend_on_the_layout():
    """Bitwise equal on one rank, and sharded, cut and split: evenly, unevenly, and into fewer rows than ranks."""
    shape = dict(dim=36, n_layers=4, n_heads=6, n_kv_heads=2, hidden_dim=50, vocab_size=62)
    one = whole(run_ranks(1, _initial_weights, shape, {}))
    layouts = [
        (3, {}), (8, {}), (8, dict(dp_replicate=2)), (2, dict(tp=2)), (8, dict(tp=2)), (2, dict(pp=2)),
        (8, dict(pp=2, cp=2, tp=2)),
    ]  # fmt: skip
    for ranks, degrees in layouts:
        many = whole(run_ranks(ranks, _initial_weights, shape, degrees))
        assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one), (ranks, degrees)
