"""Every recipe in configs/ is right without running it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config import load_config
from model import Transformer, get_flavor, num_params
from parallelize import Degrees

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_sound(recipe):
    """It parses, its layout and batch fit the machine that its command names, and its model can be built."""
    config = load_config(["--job.config_file", str(recipe)])
    text = recipe.read_text()
    # A recipe that names no number of processes must do for any machine.
    named = "--nproc_per_node=" in text
    p, t = config.parallelism, config.training
    for ranks in [int(text.split("--nproc_per_node=")[1].split()[0])] if named else range(1, 17):
        degrees = Degrees(dp_replicate=p.data_parallel_replicate_degree, dp_shard=p.data_parallel_shard_degree)
        degrees = degrees.resolve(ranks)
        if t.global_batch_size != -1:
            assert t.global_batch_size % (t.local_batch_size * degrees.dp_replicate * degrees.dp_shard) == 0, ranks
    overrides = {k: v for k, v in vars(config.model).items() if k != "flavor" and v is not None}
    args = replace(get_flavor(config.model.flavor), **overrides)
    assert t.seq_len <= args.max_seq_len
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(p.numel() for p in model.parameters()) == num_params(args)


def test_recipes_talk():
    """The head of each says for which machine, how to run it, and what to expect."""
    assert len(RECIPES) >= 2
    for recipe in RECIPES:
        head = recipe.read_text().split("\n[")[0]
        assert all(f"#   {word}" in head for word in ("machine", "run", "expect")), recipe.name
