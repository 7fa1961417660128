"""Trains the two debug models in twenty layouts, one after another, and compares each layout with one process.

    scripts/smoke_8gpu.sh                                       on all GPUs, or on 8 CPU processes
    scripts/smoke_8gpu.sh 4 --cpu --dtype float64               on 4 CPU processes, where all layouts agree to 1e-9
    python scripts/smoke.py 2 --only 'moe*'                     without the set-up of the script; some of the layouts

Each layout (scripts/smoke_layouts.py) is a whole run of train.py's `main` in new processes: 6 steps of 16 sequences
each. Every step is compared in its loss, its grad norm, and the gradient of each parameter, because the norm of the
whole gradient hides the error of a small one. Then a run of each model is stopped twice, and resumes from its
checkpoint in another layout each time.

All numbers go to results.json in --folder. If a layout differs, the last line names it, and the exit status is 1.
docs/smoke.md tells how far layouts may differ, and why.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from datetime import date
from fnmatch import fnmatch
from math import inf, nan
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = PATHS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from helpers.ranks import run_ranks  # noqa: E402
from smoke_layouts import GLOBAL_BATCH, SCHEDULE, all_chains, all_layouts, name_of, reference_layout  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import train  # noqa: E402
from config import load_config  # noqa: E402
from errors import ConfigError  # noqa: E402
from parallelize.init import held_indices  # noqa: E402
from parallelize.pipeline import V_SCHEDULES  # noqa: E402
from resilience import clean_exit  # noqa: E402
from torch_private import torch_at_least  # noqa: E402

STEPS, SEQ_LEN = 6, 64
RECIPES = {"dense": "llama3_debug", "moe": "deepseek_v3_debug"}
FIRST, LATER = "gradients, step 1", "gradients, later"
TOLERANCE = {  # by model and compute dtype: the largest relative difference from one process; see docs/smoke.md
    ("dense", "bfloat16"): {"loss": 2e-4, "grad_norm": 2e-2, FIRST: 5e-2, LATER: 0.2},
    ("moe", "bfloat16"): {"loss": 2e-4, "grad_norm": 3e-2, FIRST: 0.2, LATER: 2},
    ("dense", "float32"): {"loss": 3e-6, "grad_norm": 5e-4, FIRST: 5e-5, LATER: 1e-2},
    ("moe", "float32"): {"loss": 3e-6, "grad_norm": 5e-4, FIRST: 5e-5, LATER: 1e-2},
    ("dense", "float64"): {"loss": 1e-9, "grad_norm": 1e-9, FIRST: 1e-9, LATER: 1e-9},
    ("moe", "float64"): {"loss": 1e-9, "grad_norm": 1e-9, FIRST: 1e-9, LATER: 1e-9},
}


def measure(parameters: dict[str, torch.nn.Parameter]) -> dict[str, tuple[float, float]]:
    """Two numbers of the gradient of each parameter that this rank has a part of, by name: its norm, and its product
    with signs that depend on the indices alone. The product distinguishes gradients of the same norm: it differs by
    about as much as the norm of their difference. A collective."""
    groups = defaultdict(list)
    for name, parameter in parameters.items():
        grad, axes = parameter.grad, ()
        indices = held_indices(grad)
        if isinstance(grad, DTensor):  # always, except on one process that casts no weight
            axes = tuple((grad.device_mesh, a) for a, p in enumerate(grad.placements) if not p.is_replicate())
            grad = grad.to_local()
        signed = grad = grad.double()
        for dim, index in enumerate(indices):
            of_dim = torch.randint(2, (parameter.shape[dim],), generator=torch.Generator().manual_seed(dim)) * 2 - 1
            signed = signed.movedim(dim, -1).mul(of_dim[index.cpu()].to(grad.device)).movedim(-1, dim)
        groups[axes].append((name, torch.stack((grad.square().sum(), signed.sum()))))
    measured = {}
    for axes, named in groups.items():
        sums = torch.stack([both for _, both in named])
        for mesh, axis in axes:
            dist.all_reduce(sums, group=mesh.get_group(axis))
        measured |= {
            name: (square**0.5, product) for (name, _), (square, product) in zip(named, sums.tolist(), strict=True)
        }
    return measured


def train_rank(arguments: list[str], output: Path) -> list[dict[str, tuple[float, float]]]:
    """Runs `python train.py ARGUMENTS` on this rank, and appends what it prints to a file. Returns the `measure` of
    each step's gradients."""
    parameters, measured = {}, []
    build_optimizer, clip_grad_norm = train.build_optimizer, train.clip_grad_norm

    def build(named, **options):
        parameters.update(named)
        return build_optimizer(named, **options)

    def clip(clipped, *rest):
        measured.append(measure(parameters))
        return clip_grad_norm(clipped, *rest)

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with clean_exit(), patch.multiple(train, build_optimizer=build, clip_grad_norm=clip):
        assert train.main(load_config(arguments)) == 0
    return measured


def run(name: str, ranks: int, arguments: list[str], folder: Path) -> list[dict]:
    """Trains, and returns for each step its loss, its grad_norm, and by parameter the `measure` of its gradient on
    every rank that has a part of it. ConfigError with the last error line of the run if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    output, metrics = folder / "output.txt", folder / "metrics.jsonl"
    before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    try:
        by_rank = run_ranks(ranks, train_rank, [*arguments, f"--job.dump_folder={folder}"], output, timeout=600)
    except AssertionError as failure:
        lines = output.read_text().splitlines() if output.exists() else []
        errors = [line for line in lines if line.startswith("error")] or str(failure).splitlines()[-1:]
        print(flush=True)
        raise ConfigError(f"{name} failed: {errors[0].removeprefix('error: ')} (its output: {output})") from failure
    steps = []
    for line, *measured in zip(metrics.read_text().splitlines()[before:], *by_rank, strict=True):
        names = sorted(set().union(*measured))
        gradients = {name: [of_rank[name] for of_rank in measured if name in of_rank] for name in names}
        step = json.loads(line)
        steps.append(dict(loss=step["loss"], grad_norm=step["grad_norm"], gradients=gradients))
    return steps


def differences(steps: list[dict], reference: list[dict]) -> dict[str, tuple[float, str]]:
    """For each quantity of TOLERANCE, the largest difference relative to the reference, and its place."""
    worst = {"loss": (0.0, ""), "grad_norm": (0.0, ""), FIRST: (0.0, ""), LATER: (0.0, "")}

    def see(quantity: str, difference: float, size: float, where: str) -> None:
        relative = 0.0 if difference == 0 else abs(difference) / (size or nan)
        worst[quantity] = max(worst[quantity], (relative if relative == relative else inf, where))

    for number, (step, expected) in enumerate(zip(steps, reference, strict=True), 1):
        for quantity in ("loss", "grad_norm"):  # metrics.jsonl has null for a number that is not finite
            see(quantity, (step[quantity] or nan) - expected[quantity], expected[quantity], f"step {number}")
        for name in step["gradients"].keys() | expected["gradients"].keys():
            norm, product = expected["gradients"].get(name, [(nan, nan)])[0]
            for its_norm, its_product in step["gradients"].get(name, [(nan, nan)]):
                difference = max(abs(its_norm - norm), abs(its_product - product))
                see(FIRST if number == 1 else LATER, difference, norm, f"{name}, step {number}")
    return worst


def verdict(worst: dict[str, tuple[float, str]], tolerance: dict[str, float]) -> str:
    """A text that names each quantity that differs by more than it may, and its place; empty if there is none."""
    return "; ".join(
        f"{quantity} by {worst[quantity][0]:.1e} where {most:.0e} is allowed ({worst[quantity][1]})"
        for quantity, most in tolerance.items()
        if worst[quantity][0] > most
    )


def common_arguments(given: argparse.Namespace, model: str) -> list[str]:
    reduce = "float64" if given.dtype == "float64" else "float32"
    recipe = ROOT / "configs" / f"{RECIPES[model]}.toml"
    return [
        f"--job.config_file={recipe}", f"--training.seq_len={SEQ_LEN}", f"--training.dtype={reduce}",
        f"--training.mixed_precision_param={given.dtype}", f"--training.mixed_precision_reduce={reduce}",
        f"--training.global_batch_size={GLOBAL_BATCH}", "--lr_scheduler.warmup_steps=2", "--lr_scheduler.decay_ratio=0",
        "--optimizer.lr=1e-3", "--metrics.log_freq=1", "--data.num_workers=0",
        f"--job.device={'cpu' if given.cpu else 'auto'}",
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    most = max(n for n in (1, 2, 4, 8) if n <= (gpus or 8))
    parser.add_argument(
        "ranks", nargs="?", type=int, choices=(1, 2, 4, 8), default=most, help="default: all GPUs, or 8"
    )
    parser.add_argument("--cpu", action="store_true", default=gpus == 0, help="CPU processes even if there are GPUs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float64"), default="bfloat16", help="compute dtype")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of layouts' names, as in 'moe*'")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "smoke", help="results.json and the runs")
    given = parser.parse_args(argv)
    # For the ranks. The compiler would start a pool of processes in each rank. It also makes a lock, of which Python's
    # resource tracker warns at the end.
    os.environ.update(PYTHONPATH=os.pathsep.join(PATHS), OMP_NUM_THREADS="1")
    os.environ.update(TORCHINDUCTOR_COMPILE_THREADS="1", PYTHONWARNINGS="ignore:resource_tracker")
    plans = [[made] for made in all_layouts(given.ranks)] + all_chains(given.ranks)
    chosen = [plan for plan in plans if any(fnmatch(name_of(plan), pattern) for pattern in given.only)]
    if not chosen:
        raise ConfigError(f"no layout matches {' or '.join(given.only)}; there are: {' | '.join(map(name_of, plans))}.")
    plans = [[reference_layout(model)] for model in RECIPES if any(plan[0].model == model for plan in chosen)] + chosen
    began, references, results = time.perf_counter(), {}, []
    print(f"{'layout':<62} {'loss':>15}  differs in loss, norm, gradients: first, later  seconds")
    for number, plan in enumerate(plans):
        name, model = name_of(plan), plan[0].model
        print(f"{name:<62} ", end="", flush=True)
        if given.cpu and not torch_at_least(2, 12) and dict(plan[0].options).get(SCHEDULE) in V_SCHEDULES:
            print("skipped: before torch 2.12 gloo cannot send to its own rank")
            continue
        folder = given.folder / f"{number:02d}"
        shutil.rmtree(folder, ignore_errors=True)  # this run would resume from an earlier one
        start, steps = time.perf_counter(), []
        for i, made in enumerate(plan, 1):
            until = [f"--training.steps={STEPS * i // len(plan)}"]
            until += ["--checkpoint.enable=true"] if len(plan) > 1 else []
            steps += run(name, made.ranks, [*common_arguments(given, model), *made.settings(), *until], folder)
        worst = differences(steps, references.setdefault(model, steps))
        wrong, seconds = verdict(worst, TOLERANCE[model, given.dtype]), time.perf_counter() - start
        numbers = " ".join(f"{difference:9.1e}" for difference, _ in worst.values())
        print(f"{steps[0]['loss']:.4f}..{steps[-1]['loss']:.4f}  {numbers}  {seconds:6.1f} s  {wrong}", flush=True)
        results.append(dict(layout=name, seconds=seconds, differences=worst, wrong=wrong, steps=steps))
    device, seconds = "cpu" if given.cpu else torch.cuda.get_device_name(), time.perf_counter() - began
    about = dict(date=str(date.today()), torch=torch.__version__, device=device, ranks=given.ranks, dtype=given.dtype)
    (given.folder / "results.json").write_text(json.dumps(about | dict(seconds=seconds, layouts=results)) + "\n")
    where = f"{given.ranks} x {device}, {given.dtype}, torch {torch.__version__}"
    print(f"{len(results)} runs on {where}, in {seconds:.0f} s; all numbers are in {given.folder / 'results.json'}")
    wrong = [f"{result['layout']}: {result['wrong']}" for result in results if result["wrong"]]
    if wrong:
        raise ConfigError(f"{len(wrong)} of {len(results)} runs differ from one process: {' | '.join(wrong)}")


if __name__ == "__main__":
    with clean_exit():
        main(sys.argv[1:])
