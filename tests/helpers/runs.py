"""Whole training runs for the tests: the real `train.main`, small and in float64, recorded from outside."""

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

# Sizes that 4 tensor-parallel ranks can share, but that FSDP cannot cut evenly in 4 or 8, before or after that.
TINY = {
    "model.dim": "48", "model.n_layers": "2", "model.n_heads": "8", "model.n_kv_heads": "4", "model.hidden_dim": "60",
    "model.vocab_size": "268", "data.dataset": "text", "data.tokenizer": "byte", "training.seq_len": "32",
    "training.dtype": "float64", "training.mixed_precision_param": "float64",
    "training.mixed_precision_reduce": "float64", "training.global_batch_size": "8", "training.steps": "3",
    "training.max_norm": "0.5", "optimizer.lr": "0.01", "metrics.log_freq": "1", "job.device": "cpu",
    "data.num_workers": "0",
}  # fmt: skip


def write_ragged_text(folder: Path) -> Path:
    """Documents of 1 to 40 bytes: a label that follows a document's end is ignored, so sequences, and with them ranks
    and microbatches, hold different numbers of valid tokens."""
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
    """Runs training on this rank. What it holds, by parameter name, as (whole shape, indices held, values): every
    step's gradients before clipping, and the final weights; the number of its valid tokens in each microbatch; every
    step's shares of tokens by expert, by layer, and the final biases, by name."""
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

    torch.compiler.reset()  # a graph of an earlier layout must not be taken for this one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_optimizer", recording_build)
        patch.setattr(train, "clip_grad_norm", recording_clip)
        patch.setattr(train, "count_valid_tokens", recording_count)
        patch.setattr(train.ExpertLoadBalancer, "update", recording_update)
        train.main(load_config(arguments))
    weights = {name: held(p) for name, p in parameters.items()}
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # how full_tensor does it
    # That the indices are right: torch puts the same whole together, with a collective for each.
    for name, p in parameters.items():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        _, indices, values = weights[name]
        assert torch.equal(whole[torch.meshgrid(*indices, indexing="ij")], values), name
    return dict(gradients=gradients, weights=weights, valid=valid, experts=experts, biases=biases)


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Whole tensors by name from what every rank holds; where several hold the same, they must agree exactly."""
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
    """All that any rank has; ranks that have the same must agree exactly."""
    merged = {}
    for name, tensor in (item for rank in ranks for item in rank.items()):
        assert torch.equal(merged.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return dict(sorted(merged.items()))


def record_runs(many: list[list[str]]) -> list[dict]:
    """Record one run after another in the same processes: torch's caches are warm from the second on. A process group
    lives as long as its process and has three threads, so all runs share the groups of the same ranks."""
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
    """Recorded runs on world_size ranks, each in its folder with its settings: whole gradients and weights, every
    rank's valid tokens, shares of tokens by expert, biases, metrics."""
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
    """`train_all` of each (ranks, runs), two at a time: where one alone would leave a core idle. Their folders lie in
    different ones, as they would make the same cache there at the same moment."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda launch: train_all(*launch), launches))


def train_on(world_size: int, folder: Path, *settings: dict[str, str]) -> dict:
    """One recorded run."""
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
    """What `python train.py ARGUMENTS` does, with stdout and stderr of every rank appended to a file; stop_after is the
    step after which the run breaks off, once it has saved what it saves there."""
    import train
    from config import load_config
    from resilience import clean_exit

    maybe_save = train.CheckpointManager.maybe_save

    def save_and_break_off(self, state, **kwargs):
        maybe_save(self, state, **kwargs)
        if state.step == stop_after:
            print("interrupted for the test", flush=True)
            os._exit(9)

    train.CheckpointManager.maybe_save = save_and_break_off
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
    """Whether `train.py ARGUMENTS` ended well on world_size ranks, and the lines that they printed."""
    output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    try:
        run_ranks(world_size, _command, arguments, str(output), stop_after)
        ended_well = True
    except AssertionError:
        ended_well = False
    return ended_well, output.read_text().splitlines()
