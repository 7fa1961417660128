"""Twenty layouts of the two debug models, one after another in the same processes: do all of them train alike?

    scripts/smoke_8gpu.sh                                           all GPUs (2, 4 or 8), or 8 CPU processes
    scripts/smoke_8gpu.sh 4 --cpu --dtype float64                   4 CPU processes, equal to 1e-9
    torchrun --standalone --nproc_per_node=2 scripts/smoke.py --only 'moe*'      what the script starts

Each layout is a whole run of train.py's `main`: 6 steps of 16 sequences, the same in every layout. What is compared with
the first layout of the model, at every step: the loss, the norm of the gradient, and the norm of each parameter's
gradient, since a gradient that is twice what it should be in one part of the model hides in the norm of all. Then a run
of each model is stopped twice, and goes on in another layout from its checkpoint, as if nothing had been.

The numbers are written down for 8 ranks. With fewer, the largest degree of a layout is halved until it fits, and what
then comes twice is left out. All numbers go to results.json in --folder; a layout that differs is a last line and
exit status 1. How far apart layouts may be, and why: docs/smoke.md.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import train  # noqa: E402
from config import load_config  # noqa: E402
from parallelize.pipeline import V_SHAPED  # noqa: E402
from training.distributed import clean_exit, init_distributed  # noqa: E402

STEPS, GLOBAL_BATCH, SEQ_LEN = 6, 16, 64
RECIPES = {"dense": "llama3_debug", "moe": "deepseek_v3_debug"}
SHORT = {  # option: its short name, as in "tp 2"
    "pp": "parallelism.pipeline_parallel_degree",
    "replicate": "parallelism.data_parallel_replicate_degree",
    "fsdp": "parallelism.data_parallel_shard_degree",
    "cp": "parallelism.context_parallel_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "ep": "parallelism.expert_parallel_degree",
}
SCHEDULE, METHOD = "parallelism.pipeline_parallel_schedule", "parallelism.context_parallel_method"
RECOMPUTE, COMPILE = "activation_checkpoint.mode", "compile.enable"
QUANTITIES = ("loss", "grad_norm", "gradients")
TOLERANCE = {  # dtype: how far each of the QUANTITIES may be from the reference's, relative to it
    "bfloat16": {"dense": (1, 1, 1), "moe": (1, 1, 1)},
    "float32": {"dense": (1, 1, 1), "moe": (1, 1, 1)},
    "float64": {"dense": (1e-9, 1e-9, 1e-9), "moe": (1e-9, 1e-9, 1e-9)},
}


@dataclass(frozen=True)
class Layout:
    model: str
    degrees: tuple[tuple[str, int], ...]  # by short name; FSDP takes the ranks that are left
    accumulation: int  # into how many microbatches a rank's share of the step is cut
    options: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        degrees = ", ".join(f"{axis} {n}" for axis, n in self.degrees if n > 1)
        extras = [value if value != "true" else "compiled" for _, value in self.options]
        extras += [f"{self.accumulation} accumulations"] if self.accumulation > 1 else []
        return f"{self.model}: {', '.join([degrees, *extras])}"

    def settings(self) -> list[str]:
        degrees = dict(self.degrees)
        local_batch = GLOBAL_BATCH // (degrees["replicate"] * degrees["fsdp"]) // self.accumulation
        values = {SHORT[axis]: n for axis, n in self.degrees} | dict(self.options)
        return [f"--{option}={value}" for option, value in values.items()] + [f"--training.local_batch_size={local_batch}"]


def layout(model: str, ranks: int, pp=1, replicate=1, cp=1, tp=1, ep=1, accumulation=1, **options: str) -> Layout:
    """As near as ranks allow: the largest degree is halved until all fit, and of equals the first, so that pipelines,
    which are the most various, stay longest."""
    degrees = dict(tp=tp, cp=cp, replicate=replicate, pp=pp)
    while ranks % prod(degrees.values()):
        degrees[max(degrees, key=degrees.get)] //= 2
    degrees["fsdp"] = ranks // prod(degrees.values())
    while degrees["fsdp"] * degrees["cp"] * degrees["tp"] % ep:
        ep //= 2
    degrees["ep"] = ep
    named = {"schedule": SCHEDULE, "method": METHOD, "recompute": RECOMPUTE, "compile": COMPILE}
    useless = {"schedule": degrees["pp"] == 1, "method": degrees["cp"] == 1}
    kept = tuple((named[key], value) for key, value in options.items() if not useless.get(key))
    return Layout(model, tuple((axis, degrees[axis]) for axis in SHORT), accumulation, kept)


def all_layouts(ranks: int) -> list[Layout]:
    """Of each model the reference first."""
    dense = [
        dict(),
        dict(replicate=8),
        dict(replicate=2, recompute="selective"),
        dict(tp=2),
        dict(tp=4, accumulation=2),
        dict(cp=2, method="allgather"),
        dict(cp=4, method="alltoall"),
        dict(pp=4, schedule="1F1B"),
        dict(pp=2, replicate=2, schedule="InterleavedZeroBubble"),
        dict(pp=2, schedule="DualPipeV"),
        dict(pp=2, tp=2, schedule="Interleaved1F1B"),
        dict(cp=2, tp=2, method="allgather", recompute="full"),
        dict(compile="true"),
    ]
    moe = [
        dict(),
        dict(ep=8),
        dict(replicate=2, ep=4),
        dict(tp=2, ep=2),
        dict(cp=2, ep=4, method="latent"),
        dict(pp=2, ep=2, schedule="Interleaved1F1B"),
        dict(pp=2, tp=2, ep=4, schedule="1F1B", recompute="full"),
    ]
    made = [layout("dense", ranks, **d) for d in dense] + [layout("moe", ranks, **d) for d in moe]
    return list(dict.fromkeys(made))


def all_chains(ranks: int) -> list[list[Layout]]:
    """Runs that are stopped after a third and two thirds of their steps, and go on in the next layout."""
    return [
        [
            layout("dense", ranks),
            layout("dense", ranks, pp=2, tp=2, schedule="Interleaved1F1B"),
            layout("dense", ranks, replicate=2, cp=2, method="allgather"),
        ],
        [
            layout("moe", ranks, ep=8),
            layout("moe", ranks, pp=2, ep=2, schedule="Interleaved1F1B"),
            layout("moe", ranks, replicate=2, tp=2, ep=2),
        ],
    ]


def gradient_norms(parameters: dict[str, torch.nn.Parameter]) -> dict[str, float]:
    """The norm of each parameter's gradient, by name, of those that this rank has a part of. A collective."""
    groups = defaultdict(list)
    for name, parameter in parameters.items():
        grad = parameter.grad
        assert isinstance(grad, DTensor), name
        axes = tuple((grad.device_mesh, a) for a, p in enumerate(grad.placements) if not p.is_replicate())
        groups[axes].append((name, grad.to_local()))
    norms = {}
    for axes, named in groups.items():
        squares = torch.stack([local.double().square().sum() for _, local in named])
        for mesh, axis in axes:
            dist.all_reduce(squares, group=mesh.get_group(axis))
        norms |= dict(zip([name for name, _ in named], squares.sqrt().tolist(), strict=True))
    return norms


def run(arguments: list[str], folder: Path) -> list[dict]:
    """Trains on all ranks. Rank 0 gets, for each step: loss, grad_norm, and gradients, the norm of each parameter's by
    name, from each of the ranks that know it."""
    parameters, norms = {}, []
    build_optimizer, clip_grad_norm = train.build_optimizer, train.clip_grad_norm

    def remembering(named, **options):
        parameters.update(named)
        return build_optimizer(named, **options)

    def measuring(clipped, *rest):
        norms.append(gradient_norms(parameters))
        return clip_grad_norm(clipped, *rest)

    done = len(read_metrics(folder))
    dist.barrier()  # all have looked
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "output.txt" if dist.get_rank() == 0 else os.devnull, "a") as output,
        contextlib.redirect_stdout(output),
        patch.multiple(train, build_optimizer=remembering, clip_grad_norm=measuring),
    ):
        status = train.main(load_config([*arguments, f"--job.dump_folder={folder}"]))
    assert status == 0, f"train.py ended with status {status}, see {folder}/output.txt"
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, norms)
    # The next layout needs the memory, and must not be given a graph that was made for this one.
    parameters.clear()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    rows = []
    for row, *by_rank in zip(read_metrics(folder)[done:], *everywhere, strict=True):
        gradients = {name: [n[name] for n in by_rank if name in n] for n in by_rank for name in n}
        rows.append(dict(loss=row["loss"], grad_norm=row["grad_norm"], gradients=dict(sorted(gradients.items()))))
    return rows


def read_metrics(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def differences(rows: list[dict], reference: list[dict]) -> dict[str, tuple[float, str]]:
    """For each of the QUANTITIES the largest relative difference from the reference's steps of the same numbers, and
    where it is."""
    worst = dict.fromkeys(QUANTITIES, (0.0, ""))

    def see(quantity: str, value: float, expected: float, where: str) -> None:
        difference = abs(value - expected) / abs(expected) if value != expected else 0.0
        if not difference <= worst[quantity][0]:  # NaN is the worst
            worst[quantity] = (difference, where)

    assert len(rows) == len(reference), (len(rows), len(reference))
    for step, (row, expected) in enumerate(zip(rows, reference, strict=True), 1):
        for quantity in ("loss", "grad_norm"):
            see(quantity, row[quantity], expected[quantity], f"step {step}")
        for name in row["gradients"].keys() | expected["gradients"].keys():
            of_reference = expected["gradients"].get(name, [float("nan")])[0]
            for value in row["gradients"].get(name, [float("nan")]):  # from every rank that knows it
                see("gradients", value, of_reference, f"{name} at step {step}")
    return worst


def verdict(worst: dict[str, tuple[float, str]], tolerances: tuple[float, ...]) -> str:
    """What differs by more than it may; empty if nothing does."""
    return "; ".join(
        f"{quantity} by {worst[quantity][0]:.1e} (at most {tolerance:.0e}; {worst[quantity][1]})"
        for quantity, tolerance in zip(QUANTITIES, tolerances, strict=True)
        if not worst[quantity][0] <= tolerance
    )


def common_arguments(given: argparse.Namespace, model: str) -> list[str]:
    reduce = "float64" if given.dtype == "float64" else "float32"
    return [
        f"--job.config_file={ROOT / 'configs' / RECIPES[model]}.toml", f"--training.mixed_precision_param={given.dtype}",
        f"--training.mixed_precision_reduce={reduce}", f"--training.dtype={reduce}", f"--training.seq_len={SEQ_LEN}",
        f"--training.global_batch_size={GLOBAL_BATCH}", "--lr_scheduler.warmup_steps=2", "--lr_scheduler.decay_ratio=0",
        "--optimizer.lr=1e-3", "--metrics.log_freq=1", "--data.num_workers=0",
        f"--job.device={'cpu' if given.cpu else 'auto'}",
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="CPU ranks, with gloo, although there are GPUs")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="of the computation; weights: float32")
    parser.add_argument("--only", default="*", help="layouts whose name matches this, as in 'moe*', and the references")
    parser.add_argument("--folder", type=Path, default=Path("outputs/smoke"), help="for results.json and all runs")
    given = parser.parse_args(argv)

    device = init_distributed("cpu" if given.cpu else "auto", 300)
    ranks, say = dist.get_world_size(), print if dist.get_rank() == 0 else lambda *_, **__: None
    if ranks not in (2, 4, 8):
        raise ValueError(f"the layouts are for 2, 4 or 8 ranks, not {ranks}.")
    began = time.perf_counter()
    plans = [[made] for made in all_layouts(ranks)] + all_chains(ranks)
    references, results, failures = {}, [], []
    say(f"{'layout':<58} {'loss':>16}  {'differs in: loss':>16} {'grad norm':>9} {'gradients':>9}  seconds")
    for number, plan in enumerate(plans):
        model, name = plan[0].model, ", then ".join(made.name.removeprefix("moe: ").removeprefix("dense: ") for made in plan)
        name = f"{plan[0].model}{' resumed' if len(plan) > 1 else ''}: {name}"
        if model in references and not fnmatch(name, given.only):
            continue
        say(f"{name:<58}", end="", flush=True)
        if device.type == "cpu" and torch.__version__ < "2.12" and any((SCHEDULE, v) in m.options for m in plan for v in V_SHAPED):
            say("  left out: gloo cannot send to its own rank before torch 2.12")
            continue
        folder = given.folder / f"{number:02d}"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        start, rows = time.perf_counter(), []
        for i, made in enumerate(plan, 1):
            stop = [f"--training.steps={STEPS * i // len(plan)}"]
            save = ["--checkpoint.enable=true"] if len(plan) > 1 else []
            rows += run([*common_arguments(given, model), *made.settings(), *stop, *save], folder)
        reference = references.setdefault(model, rows)
        worst = differences(rows, reference)
        wrong, seconds = verdict(worst, TOLERANCE[given.dtype][model]), time.perf_counter() - start
        numbers = " ".join(f"{worst[quantity][0]:9.1e}" for quantity in QUANTITIES)
        say(f" {rows[0]['loss']:7.4f}..{rows[-1]['loss']:7.4f}         {numbers}  {seconds:6.1f} {wrong}", flush=True)
        failures += [f"{name}: {wrong}"] if wrong else []
        results.append(dict(layout=name, seconds=seconds, differences=worst, wrong=wrong, steps=rows))
    seconds = time.perf_counter() - began
    if dist.get_rank() == 0:
        about = dict(date=str(date.today()), torch=torch.__version__, device=device.type, ranks=ranks, dtype=given.dtype)
        (given.folder / "results.json").write_text(json.dumps(about | dict(seconds=seconds, layouts=results)))
    say(f"{len(results)} runs on {ranks} x {device.type} in {seconds:.0f} s, {given.dtype}; {given.folder}/results.json")
    if failures:
        raise ValueError(f"{len(failures)} of {len(results)} differ from their reference: " + " | ".join(failures))
    return 0


if __name__ == "__main__":
    with clean_exit():
        sys.exit(main(sys.argv[1:]))
