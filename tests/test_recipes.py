"""Every recipe in configs/ is right without running it."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

# A process group that answers at once without having sent anything. Private, but there is no other.
from torch.testing._internal.distributed.fake_pg import FakeStore

from config import load_config
from model import get_flavor, num_params
from parallelize import build_mesh

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def num_ranks(recipe: Path) -> list[int]:
    """The number of processes that its command starts; several where it names none, as it must do for any machine."""
    command = recipe.read_text()
    per_machine, machines = (re.search(rf"--{option}=(\d+)", command) for option in ("nproc_per_node", "nnodes"))
    return [int(per_machine[1]) * (int(machines[1]) if machines else 1)] if per_machine else [1, 2, 3, 8, 16]


def _built_on(world_size: int, rank: int, recipe: str) -> dict[str, tuple[int, int]]:
    """On one rank of a group that is only told to exist: (elements of the whole parameter, elements here) by name."""
    import train

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # What the machine of the recipe can do and this one cannot.
    emulate = ["--float8.emulate=true"] if load_config(["--job.config_file", recipe]).float8.enable else []
    config = load_config(["--job.config_file", recipe, *emulate])
    t = config.training
    mesh = build_mesh(train.degrees_of(config), "cpu", world_size)
    at_once = t.local_batch_size * mesh.batch_size
    assert t.global_batch_size == -1 or t.global_batch_size % at_once == 0, (world_size, at_once)
    args = train.model_args_of(config)
    assert t.seq_len <= args.max_seq_len
    stages = train.build_stages(config, args, mesh, "cpu")
    train.build_forward_backward(config, stages, mesh, torch.device("cpu"))
    held = {
        name: (parameter.numel(), parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel())
        for stage in stages
        for name, parameter in stage.named_parameters()
    }
    dist.destroy_process_group()
    return held


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_sound(recipe):
    """It parses, its layout and batch fit the machine that its command names, and every parallelism can be applied to
    its model there: on the first and the last rank of a process group of that size, without memory for a weight."""
    config = load_config(["--job.config_file", str(recipe)])
    for world_size in num_ranks(recipe):
        ranks = [run_ranks(1, _built_on, world_size, rank, str(recipe))[0] for rank in {0, world_size - 1}]
        whole = {name: numel for held in ranks for name, (numel, _) in held.items()}
        if config.parallelism.pipeline_parallel_degree == 1:
            assert sum(whole.values()) == num_params(get_flavor(config.model.flavor))
        here = sum(numel for _, numel in ranks[0].values())
        # A rank has its part of the weights; the first stage has the embedding and fewer blocks.
        assert 0.7 < here * world_size / num_params(get_flavor(config.model.flavor)) < 1.3


def test_recipes_talk():
    """The head of each says for which machine, how to run it, and what to expect."""
    assert len(RECIPES) >= 2
    for recipe in RECIPES:
        head = recipe.read_text().split("\n[")[0]
        assert all(f"#   {word}" in head for word in ("machine", "run", "expect")), recipe.name
