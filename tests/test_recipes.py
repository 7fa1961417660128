"""Every recipe in configs/ can be built in the layout of its machine. No step is run."""

import re
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.recipes import parameters_by_stage
from torch import nn
from torch.distributed.tensor import DTensor

# The fake process group sends nothing, and each of its collectives returns at once. torch has no public equivalent.
from torch.testing._internal.distributed.fake_pg import FakeStore

from config import load_config
from hf import get_model_args
from limits import check_layout
from model import get_flavor, num_params
from parallelize import build_mesh
from parallelize.init import indices_at

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def num_ranks(recipe: Path) -> list[int]:
    """The number of processes that the recipe's command starts; a recipe for any machine has several numbers."""
    command = recipe.read_text()
    per_machine, machines = (re.search(rf"--{option}=(\d+)", command) for option in ("nproc_per_node", "nnodes"))
    return [int(per_machine[1]) * (int(machines[1]) if machines else 1)] if per_machine else [1, 2, 3, 8, 16]


def numel_by_rank(parameter: nn.Parameter) -> tuple[int, list[int]]:
    """The number of copies of a parameter, and the number of elements that each rank of its mesh holds."""
    if not isinstance(parameter, DTensor):
        return 1, [parameter.numel()]
    mesh = parameter.device_mesh
    copies = prod(size for size, p in zip(mesh.shape, parameter.placements, strict=True) if p.is_replicate())
    return copies, [prod(map(len, indices_at(parameter, c, "meta"))) for c in product(*map(range, mesh.shape))]


def _built_on(world_size: int, rank: int, recipe: str) -> dict[str, tuple]:
    """Builds the model on one rank of a fake process group. Returns for each parameter the number of its elements, the
    number of elements that this rank would allocate, and `numel_by_rank` over the ranks of this pipeline stage."""
    import train

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # The recipe's machine has float8 hardware, this machine may have none.
    emulate = ["--float8.emulate=true"] if load_config(["--job.config_file", recipe]).float8.enable else []
    config = load_config(["--job.config_file", recipe, *emulate])
    t = config.training
    mesh = build_mesh("cpu", world_size, **config.parallelism.degrees)
    at_once = t.local_batch_size * mesh.dp_degree
    assert t.global_batch_size == -1 or t.global_batch_size % at_once == 0, (world_size, at_once)
    args = get_model_args(**vars(config.model))
    on_gpus = SimpleNamespace(degrees=mesh.degrees, world=SimpleNamespace(device_type="cuda"))
    check_layout(config, args, on_gpus, SimpleNamespace(vocab_size=0))
    stages = train.build_stages(config, args, mesh, at_once if t.global_batch_size == -1 else t.global_batch_size)
    train.build_forward_backward(config, stages, mesh, torch.device("cpu"))
    found = {}
    for name, parameter in (item for stage in stages for item in stage.named_parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        found[name] = parameter.numel(), local.numel(), *numel_by_rank(parameter)
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_places_every_parameter_on_its_machine(recipe):
    """The recipe parses, its layout and its batch fit the machine that its command names, and every parallelism can be
    applied to its model there: on the first and the last rank of a process group of that size, without memory.

    The pipeline stages together have every parameter of the model. The ranks of a stage together have every element of
    its parameters once, but each rank of tensor parallelism has its own copy of the norms."""
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


def test_recipe_heads_name_machine_command_and_expectation():
    """The head of each recipe says for which machine it is, how to run it, and what to expect."""
    assert len(RECIPES) >= 2
    for recipe in RECIPES:
        head = recipe.read_text().split("\n[")[0]
        assert all(f"#   {word}" in head for word in ("machine", "run", "expect")), recipe.name
