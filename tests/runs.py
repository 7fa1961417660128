"""Whole training runs for the tests: the real `train.main`, small and in float64, recorded from outside."""

import json
import os
import random
from pathlib import Path

import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.tensor import DTensor

# Sizes that divide neither evenly among 4 or 8 ranks nor into as many rows as there are ranks.
TINY = {
    "model.dim": "36", "model.n_layers": "2", "model.n_heads": "6", "model.n_kv_heads": "2", "model.ffn_dim": "50",
    "model.vocab_size": "261", "data.dataset": "text", "data.tokenizer": "byte", "training.seq_len": "24",
    "training.dtype": "float64", "training.mixed_precision_param": "float64",
    "training.mixed_precision_reduce": "float64", "training.global_batch_size": "8", "training.steps": "3",
    "training.max_norm": "0.5", "optimizer.lr": "0.01", "metrics.log_freq": "1", "job.device": "cpu",
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


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def record_run(arguments: list[str]) -> dict:
    """Runs training on this rank; every step's whole gradients before clipping and number of this rank's valid
    tokens, and the whole final weights, by parameter name."""
    import train
    from config import load_config

    names, gradients, valid, build_optimizer = {}, [], [], train.build_optimizer
    clip_grad_norm, count_valid_tokens = train.clip_grad_norm, train.count_valid_tokens

    def recording_build(named_parameters, **kwargs):
        names.update(named_parameters)
        return build_optimizer(names.items(), **kwargs)

    def recording_clip(parameters, max_norm, device):
        gradients.append({name: whole(p.grad) for name, p in names.items()})
        return clip_grad_norm(parameters, max_norm, device)

    def recording_count(microbatches, mesh):
        valid.append([int((batch["labels"] >= 0).sum()) for batch in microbatches])
        return count_valid_tokens(microbatches, mesh)

    train.build_optimizer, train.clip_grad_norm = recording_build, recording_clip
    train.count_valid_tokens = recording_count
    train.main(load_config(arguments))
    weights = {name: whole(p) for name, p in names.items()}
    keep = dist.get_rank() == 0
    dist.destroy_process_group()
    return dict(gradients=gradients if keep else None, weights=weights if keep else None, valid=valid)


def train_on(world_size: int, folder: Path, *settings: dict[str, str]) -> dict:
    """A recorded run on world_size ranks, in `folder`: rank 0's record, every rank's valid tokens and the metrics."""
    arguments = argv(
        TINY, {"job.dump_folder": str(folder), "data.cache_folder": str(folder.parent / "cache")}, *settings
    )
    results = run_ranks(world_size, record_run, arguments)
    return {**results[0], "valid": [r["valid"] for r in results], "metrics": read_metrics(folder)}


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
    from training.distributed import clean_exit

    maybe_save = train.CheckpointManager.maybe_save

    def save_and_break_off(self, step, **kwargs):
        maybe_save(self, step, **kwargs)
        if step == stop_after:
            print("interrupted for the test", flush=True)
            os._exit(9)

    train.CheckpointManager.maybe_save = save_and_break_off
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with clean_exit():
        train.main(load_config(arguments))


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
