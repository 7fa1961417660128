"""The parameters of a recipe's model, by pipeline stage."""

from types import SimpleNamespace

import torch

from config import Config
from model import Transformer, get_flavor
from parallelize import parallelize_pipeline


def parameters_by_stage(config: Config, stages: int) -> list[dict[str, int]]:
    """For each pipeline rank, the number of elements of each of its whole parameters, by name."""
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
