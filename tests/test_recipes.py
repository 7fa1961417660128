"""Every recipe in configs/ is right without running it."""

import re
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

# A process group that answers at once without having sent anything. Private, but there is no other.
from torch.testing._internal.distributed.fake_pg import FakeStore

from config import Config, load_config
from model import Transformer, get_flavor, num_params
from parallelize import build_mesh, parallelize_pipeline
from parallelize.init import indices_at

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def num_ranks(recipe: Path) -> list[int]:
    """The number of processes that its command starts; several where it names none, as it must do for any machine."""
    command = recipe.read_text()
    per_machine, machines = (re.search(rf"--{option}=(\d+)", command) for option in ("nproc_per_node", "nnodes"))
    return [int(per_machine[1]) * (int(machines[1]) if machines else 1)] if per_machine else [1, 2, 3, 8, 16]


def numel_by_rank(parameter: nn.Parameter) -> tuple[int, list[int]]:
    """How many copies of it there are, and how many of its elements each rank of its mesh holds."""
    if not isinstance(parameter, DTensor):
        return 1, [parameter.numel()]
    mesh = parameter.device_mesh
    copies = prod(size for size, p in zip(mesh.shape, parameter.placements, strict=True) if p.is_replicate())
    return copies, [prod(map(len, indices_at(parameter, c, "meta"))) for c in product(*map(range, mesh.shape))]


def parameters_by_stage(config: Config, stages: int) -> list[dict[str, int]]:
    """Elements of each whole parameter, by name, for each pipeline rank."""
    p = config.parallelism
    with torch.device("meta"):
        model = Transformer(get_flavor(config.model.flavor))
    found = []
    for rank in range(stages):
        mesh = SimpleNamespace(size=lambda: stages, get_local_rank=lambda rank=rank: rank)
        parts = parallelize_pipeline(
            model,
            mesh,
            schedule=p.pipeline_parallel_schedule,
            stages_per_rank=p.pipeline_parallel_stages_per_rank,
        )
        found.append({name: p.numel() for part in parts for name, p in part.named_parameters()})
    return found


def _built_on(world_size: int, rank: int, recipe: str) -> dict[str, tuple]:
    """On one rank of a group that is only told to exist, for each parameter: the elements of all of it, the elements
    that memory would be allocated for here, and `numel_by_rank` of this pipeline stage."""
    import train

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # What the machine of the recipe can do and this one cannot.
    emulate = ["--float8.emulate=true"] if load_config(["--job.config_file", recipe]).float8.enable else []
    config = load_config(["--job.config_file", recipe, *emulate])
    t = config.training
    mesh = build_mesh("cpu", world_size, **train.degrees_of(config))
    at_once = t.local_batch_size * mesh.dp_degree
    assert t.global_batch_size == -1 or t.global_batch_size % at_once == 0, (world_size, at_once)
    args = train.model_args_of(config)
    assert t.seq_len <= args.max_seq_len
    stages = train.build_stages(config, args, mesh, "cpu")
    train.build_forward_backward(config, stages, mesh, torch.device("cpu"))
    found = {}
    for name, parameter in (item for stage in stages for item in stage.named_parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        found[name] = parameter.numel(), local.numel(), *numel_by_rank(parameter)
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_sound(recipe):
    """It parses, its layout and batch fit the machine that its command names, and every parallelism can be applied to
    its model there: on the first and the last rank of a process group of that size, without memory for a weight.

    The pipeline's stages together have every parameter of the model, and the ranks of a stage together every element of
    its parameters, once; what tensor parallelism leaves whole (the norms), once for each of its ranks."""
    config = load_config(["--job.config_file", str(recipe)])
    args, pipeline = get_flavor(config.model.flavor), config.parallelism.pipeline_parallel_degree
    by_stage = parameters_by_stage(config, pipeline)
    copied = args.vocab_size * args.dim if pipeline > 1 and (args.n_mtp_layers or args.tie_embeddings) else 0
    assert sum(sum(stage.values()) for stage in by_stage) == num_params(args, mtp=True) + copied
    for world_size in num_ranks(recipe):
        ranks_a_stage = world_size // pipeline
        for rank in {0, world_size - 1}:
            found = run_ranks(1, _built_on, world_size, rank, str(recipe))[0]
            assert {name: numel for name, (numel, *_) in found.items()} == by_stage[rank // ranks_a_stage]
            for name, (numel, here, copies, by_rank) in found.items():
                assert len(by_rank) == ranks_a_stage and sum(by_rank) == copies * numel, name
                assert copies == (config.parallelism.tensor_parallel_degree if name.endswith("norm.weight") else 1), (
                    name
                )
                assert here == by_rank[rank % ranks_a_stage], name


def test_recipes_talk():
    """The head of each says for which machine, how to run it, and what to expect."""
    assert len(RECIPES) >= 2
    for recipe in RECIPES:
        head = recipe.read_text().split("\n[")[0]
        assert all(f"#   {word}" in head for word in ("machine", "run", "expect")), recipe.name
