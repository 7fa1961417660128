"""Writes docs/faults.md: a line for every fault that the tests of MODULES inject, from their marks and docstrings."""

import inspect
import json
import platform
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path

import torch

DOCS = Path(__file__).parent.parent.parent / "docs"
MODULES = ("test_faults", "test_damaged_checkpoints", "test_saves", "test_shards")
STALLS = DOCS / "save_stall.txt"


def fault(title: str) -> Callable:
    """Marks a test as one that injects a fault; {name} in the title stands for the parameter of that name."""

    def mark(test: Callable) -> Callable:
        test.fault = title
        return test

    return mark


def faults() -> dict[str, tuple[str, str]]:
    """By fault: what follows from it, and the name of its test without parameters."""
    found = {}
    for module in map(__import__, MODULES):
        tests = [test for test in vars(module).values() if isinstance(getattr(test, "fault", None), str)]
        for test in tests:
            follows = " ".join(inspect.getdoc(test).split())
            for values in _parameters(test):
                found[test.fault.format(**values)] = follows, f"tests/{module.__name__}.py::{test.__name__}"
    return found


def _parameters(test: Callable) -> list[dict]:
    choices = []
    for mark in getattr(test, "pytestmark", []):
        names = [name.strip() for name in mark.args[0].split(",")]
        rows = mark.args[1]
        choices.append([dict(zip(names, row if len(names) > 1 else [row], strict=True)) for row in rows])
    return [{k: v for part in combination for k, v in part.items()} for combination in product(*choices)]


def listed() -> dict[str, str]:
    """The faults of docs/faults.md, each with what follows from it."""
    table, *_ = (DOCS / "faults.md").read_text().split("\n## ")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {cells[0].removeprefix("| "): cells[1] for cells in rows if cells[0] != "| fault"}


def write(passed: set[str]) -> None:
    """Writes docs/faults.md if the tests of all faults have passed; passed: names of tests, without parameters."""
    table = faults()
    if not {test for _, test in table.values()} <= passed:
        return
    rows = [f"| {title} | {follows} | `{test.split('::')[1]}` |" for title, (follows, test) in table.items()]
    sweep = json.loads((DOCS / "fault_sweep.json").read_text())
    kinds = "\n".join(f"- {kind}: {count}" for kind, count in sweep["by_kind"].items())
    text = f"""# What a run does when something fails

Written on {date.today()}, torch {torch.__version__}, {platform.machine()}, gloo, by

    pytest --write-docs {" ".join(f"tests/{name}.py" for name in MODULES)}

Each test injects the faults of its lines, and its docstring says what must follow. Faults that need a GPU are in
`tests/test_cuda_faults.py`; see [gpu.md](gpu.md).

| fault | what follows | test |
|---|---|---|
{chr(10).join(rows)}

## Killed again and again

`python benchmarks/fault_sweep.py` on {sweep["date"]}, torch {sweep["torch"]}: {sweep["kills"]} kills (SIGKILL) at
random moments of {sweep["runs"]} runs on {sweep["ranks"]} CPU ranks. Every start resumed from the newest complete
checkpoint, and the losses and grad norms of every run equal those of an undisturbed run to the last bit.

{kinds}

## Exit status

| status | meaning |
|---|---|
| 0 | the last step is done |
| 75 | stopped by SIGTERM or SIGUSR1 and saved: start the same command again |
| 1 | any other end; the last line says why |

torchrun itself ends with 1 in the last two cases. After SIGTERM it gives the ranks 30 s to save; from torch 2.13 on
`--shutdown_timeout` sets this time. Send SIGUSR1 to a rank, since torchrun does not pass it on.

## Several machines

Use `scripts/slurm.sh` under SLURM; without SLURM, run this on each of N machines:

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # a restart must not find the addresses of the ranks before it
    torchrun --nnodes=N --nproc_per_node=8 --max-restarts=3 --rdzv_id=ANY --rdzv_backend=c10d \\
        --rdzv_endpoint=FIRST_HOST:29500 train.py --job.config_file configs/x.toml --checkpoint.enable true

`job.dump_folder` must be on a file system that all machines share: a save fails if rank 0 does not see all its files.

## What a save costs

Stall: the seconds for which training waits for a save. Complete: the seconds until the checkpoint can be loaded
(`benchmarks/save_stall.py`; "disabled" saves are synchronous):

{STALLS.read_text().rstrip()}
"""
    (DOCS / "faults.md").write_text(text)
