"""Whole training runs for the tests: the real `train.main`, small and in float64, with its gradients recorded."""

import json
import logging
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import helpers.flavors  # noqa: F401 - so that every rank knows the flavors of the tests
from helpers.ranks import run_ranks

# Sizes that 4 tensor-parallel ranks can share evenly, but that FSDP cannot cut into 4 or 8 equal parts.
TINY = {
    "model.dim": "48", "model.n_layers": "2", "model.n_heads": "8", "model.n_kv_heads": "4", "model.hidden_dim": "60",
    "model.vocab_size": "268", "data.dataset": "text", "data.tokenizer": "byte", "training.seq_len": "32",
    "training.dtype": "float64", "training.mixed_precision_param": "float64",
    "training.mixed_precision_reduce": "float64", "training.global_batch_size": "8", "training.steps": "3",
    "training.max_norm": "0.5", "optimizer.lr": "0.01", "metrics.log_freq": "1", "job.device": "cpu",
    "data.num_workers": "0",
}  # fmt: skip


def write_ragged_text(folder: Path) -> Path:
    """Writes documents of 1 to 40 bytes. A label that follows the end of a document is ignored, so sequences, ranks and
    microbatches hold different numbers of valid tokens."""
    choose = random.Random(0)
    lines = []
    for _ in range(400):
        words = "".join(choose.choice("abc defg hi\n") for _ in range(choose.choice((1, 2, 3, 20, 40))))
        lines.append(json.dumps({"text": words}))
    path = folder / "ragged.jsonl"
    path.write_text("\n".join(lines))
    return path


def options(**more: str) -> dict[str, str]:
    """Option values by name, with __ for the dot: options(training__steps="5")."""
    return {name.replace("__", "."): str(value) for name, value in more.items()}


def argv(*settings: dict[str, str]) -> list[str]:
    merged = {}
    for setting in settings:
        merged |= setting
    return [f"--{name}={value}" for name, value in merged.items()]


def record_run(arguments: list[str]) -> dict:
    """Trains on this rank and returns what it recorded. By parameter name, as (whole shape, held indices, values): the
    gradients of every step before clipping, and the final weights. For every step: the number of valid tokens in each
    microbatch, and by layer the experts' shares of the tokens. By name: the final expert biases."""
    import train
    from config import load_config
    from parallelize.init import held_indices

    parameters, gradients, valid, experts, biases = {}, [], [], [], {}
    build_optimizer, clip_grad_norm = train.build_optimizer, train.clip_grad_norm
    count_valid_tokens = train.count_valid_tokens

    def held(tensor):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return tensor.shape, held_indices(tensor), local.detach().clone()

    def recording_build(named, **kwargs):
        parameters.update(named)
        return build_optimizer(named, **kwargs)

    def recording_clip(clipped, *args):
        gradients.append({name: held(p.grad) for name, p in parameters.items()})
        return clip_grad_norm(clipped, *args)

    def recording_count(microbatches, mesh):
        valid.append([int((batch["labels"] >= 0).sum()) for batch in microbatches])
        return count_valid_tokens(microbatches, mesh)

    def recording_update(self):
        update(self)
        experts.append({layer: share.clone() for layer, share in self.shares.items()})
        biases.update(self.biases)

    update = train.ExpertLoadBalancer.update

    torch.compiler.reset()  # a graph of an earlier layout must not be used again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_optimizer", recording_build)
        patch.setattr(train, "clip_grad_norm", recording_clip)
        patch.setattr(train, "count_valid_tokens", recording_count)
        patch.setattr(train.ExpertLoadBalancer, "update", recording_update)
        train.main(load_config(arguments))
    weights = {name: held(p) for name, p in parameters.items()}
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # of full_tensor
    # Checks the indices: torch's full_tensor, a collective, has the same values at these indices.
    for name, p in parameters.items():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        _, indices, values = weights[name]
        assert torch.equal(whole[torch.meshgrid(*indices, indexing="ij")], values), name
    return dict(gradients=gradients, weights=weights, valid=valid, experts=experts, biases=biases)


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Whole tensors by name from the parts that ranks hold; ranks that hold the same part must agree exactly."""
    result = {}
    for name in {name for rank in ranks for name in rank}:
        parts = [rank[name] for rank in ranks if name in rank]
        tensor = torch.full(parts[0][0], torch.nan, dtype=parts[0][2].dtype)
        for _, indices, values in parts:
            grid = torch.meshgrid(*indices, indexing="ij")
            assert torch.equal(tensor[grid].where(tensor[grid].isfinite(), values), values), f"copies of {name} differ"
            tensor[grid] = values
        assert tensor.isfinite().all(), f"no rank holds all of {name}"
        result[name] = tensor
    return dict(sorted(result.items()))


def same_everywhere(ranks: list[dict]) -> dict:
    """The tensors of all ranks by name; ranks that have the same tensor must agree exactly."""
    merged = {}
    for name, tensor in (item for rank in ranks for item in rank.items()):
        assert torch.equal(merged.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return dict(sorted(merged.items()))


def record_runs(many: list[list[str]]) -> list[dict]:
    """Records one run after another in the same processes: from the second run on torch's caches are warm. A process
    group lives as long as its process and has three threads, so all runs share the groups of the same ranks."""
    groups, new_group = {}, dist.new_group

    def new_or_same_group(ranks=None, *args, backend=None, **options):
        key = (backend, *(ranks or ()))
        if key not in groups:
            groups[key] = new_group(ranks, *args, backend=backend, **options)
        return groups[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", new_or_same_group)
        records = [record_run(arguments) for arguments in many]
    dist.destroy_process_group()
    return records


def train_all(world_size: int, runs: dict[Path, dict[str, str]]) -> list[dict]:
    """Records runs on world_size ranks, each in its folder with its settings. Returns for each run the whole gradients
    and weights, every rank's valid tokens, the experts' shares of the tokens, the expert biases, and the metrics."""
    arguments = [
        argv(TINY, {"job.dump_folder": str(folder), "data.cache_folder": str(folder.parent / "cache")}, settings)
        for folder, settings in runs.items()
    ]
    by_rank = run_ranks(world_size, record_runs, arguments)
    return [
        dict(
            gradients=[whole(list(step)) for step in zip(*(r["gradients"] for r in ranks), strict=True)],
            weights=whole([rank["weights"] for rank in ranks]),
            valid=[rank["valid"] for rank in ranks],
            experts=[same_everywhere(list(step)) for step in zip(*(r["experts"] for r in ranks), strict=True)],
            biases=same_everywhere([rank["biases"] for rank in ranks]),
            metrics=read_metrics(folder),
        )
        for folder, *ranks in zip(runs, *by_rank, strict=True)
    ]


def side_by_side(*launches: tuple[int, dict[Path, dict[str, str]]]) -> list[list[dict]]:
    """`train_all` of each (ranks, runs), two at a time, because a single one would leave a core idle. The launches must
    have different parent folders: in the same folder they would write the same cache at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda launch: train_all(*launch), launches))


def train_on(world_size: int, folder: Path, *settings: dict[str, str]) -> dict:
    """Records one run."""
    merged = {}
    for setting in settings:
        merged |= setting
    return train_all(world_size, {folder: merged})[0]


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(run: dict, key: str) -> list[float]:
    return [row[key] for row in run["metrics"]]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def _command(arguments: list[str], output: str, stop_after: int | None) -> None:
    """Runs `python train.py ARGUMENTS`, with stdout and stderr of every rank appended to a file. The run exits after
    step stop_after and its save."""
    import train
    from config import load_config
    from resilience import clean_exit

    maybe_save = train.CheckpointManager.maybe_save

    def save_and_exit(self, state, **kwargs):
        maybe_save(self, state, **kwargs)
        if state.step == stop_after:
            print("interrupted for the test", flush=True)
            os._exit(9)

    train.CheckpointManager.maybe_save = save_and_exit
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with clean_exit():
        status = train.main(load_config(arguments))
    if status:
        os._exit(status)


def run_command(
    world_size: int, arguments: list[str], folder: Path, stop_after: int | None = None
) -> tuple[bool, list[str]]:
    """Runs `train.py ARGUMENTS` on world_size ranks. Returns whether it ended with status 0, and the printed lines."""
    output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    try:
        run_ranks(world_size, _command, arguments, str(output), stop_after)
        ended_well = True
    except AssertionError:
        ended_well = False
    return ended_well, output.read_text().splitlines()
