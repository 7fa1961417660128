"""Kills small runs at random moments, many times, and checks that each run resumes exactly.

    python benchmarks/fault_sweep.py --kills 120

A trial is one run of 12 steps on 2 CPU ranks, with a checkpoint every second step. It is killed (SIGKILL to one rank or
to all ranks) up to five times, and started again until it is done. Every start must resume from the newest complete
checkpoint, and the losses and grad norms must equal those of an undisturbed run to the last bit. Two thirds of the
kills aim at a save: they come at a random moment after the save's folder has appeared. The result goes to
docs/fault_sweep.json, which docs/faults.md quotes. Ranks are forked from a process that has imported torch, so a trial
takes a few seconds.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from helpers.faults import exit_codes, start  # noqa: E402
from helpers.runs import TINY, argv, options, read_metrics, write_ragged_text  # noqa: E402

STEPS, INTERVAL, RANKS, KILLS_A_RUN = 12, 2, 2, 5
GRACE_SECONDS = 30  # torchrun gives the remaining ranks the same time
KINDS = [(who, mode) for who in ("one rank", "all ranks") for mode in ("disabled", "async")]


def arguments(folder: Path, mode: str) -> list[str]:
    run = options(
        job__dump_folder=folder / "run", data__path=folder.parent / "ragged.jsonl", training__steps=STEPS,
        data__cache_folder=folder.parent / "cache", checkpoint__enable="true", checkpoint__interval=INTERVAL,
        checkpoint__async_mode=mode, training__local_batch_size=1, comm__timeout_seconds=60,
    )  # fmt: skip
    return argv(TINY, run)


def rows(folder: Path) -> list[tuple]:
    """The numbers of each step. A step that was repeated counts once, as it was done last."""
    found = {r["step"]: (r["step"], r["loss"], r["grad_norm"], r["tokens_seen"]) for r in read_metrics(folder / "run")}
    return list(found.values())


def kill(processes: list, folder: Path, who: str, choose: random.Random) -> str | None:
    """Kills processes at a random moment. Returns the phase of the run at that moment, or None if the run ended before
    it."""
    checkpoints = folder / "run" / "checkpoint"
    saving = lambda: checkpoints.exists() and any(n.startswith("incomplete-step") for n in os.listdir(checkpoints))  # noqa: E731
    aimed, skip = choose.random() < 2 / 3, choose.randrange(4)
    moment = time.monotonic() + choose.uniform(0.2, 2.5)
    was_saving = False
    while all(process.is_alive() for process in processes):
        now = saving()
        if aimed and now and not was_saving:
            skip -= 1
            if skip < 0:
                time.sleep(choose.uniform(0, 0.03))
                break
        if not aimed and time.monotonic() > moment:
            break
        was_saving = now
        time.sleep(0.0005)
    else:
        return None
    for process in processes if who == "all ranks" else [choose.choice(processes)]:
        os.kill(process.pid, signal.SIGKILL)
    return "a save" if saving() else "a step or the start"


def end(processes: list, seconds: float) -> bool:
    """Waits up to `seconds`, then kills the processes that still run. Returns whether all had ended by themselves."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    ended_alone = all(process.exitcode is not None for process in processes)
    for process in processes:
        process.kill()
        process.join()
    return ended_alone


def trial(number: int, folder: Path, expected: list[tuple], choose: random.Random) -> list[tuple[str, str, str]]:
    """Runs one trial. Returns its kills: (who was killed, checkpoint.async_mode, the phase of the run). AssertionError
    if the run did not resume exactly."""
    who, mode = KINDS[number % len(KINDS)]
    folder.mkdir()
    output, kills = folder / "output.txt", []
    output.touch()
    for attempt in range(KILLS_A_RUN + 1):
        before = sorted(os.listdir(folder / "run" / "checkpoint")) if (folder / "run" / "checkpoint").exists() else []
        lines_before = len(output.read_text().splitlines())
        processes = start(RANKS, arguments(folder, mode), str(output))
        moment = kill(processes, folder, who, choose) if attempt < KILLS_A_RUN else None
        ended_alone = end(processes, GRACE_SECONDS if moment else 120)
        codes = [process.exitcode for process in processes]
        lines = output.read_text().splitlines()[lines_before:]
        # A start resumes from the newest complete checkpoint, whatever else is in the folder.
        complete = max((int(name[5:]) for name in before if name.startswith("step-")), default=None)
        resumed = [line for line in lines if line.startswith("resumed at step")]
        has_begun = any("parameters on" in line for line in lines)
        if has_begun:
            assert bool(resumed) == (complete is not None), (before, lines)
            assert not resumed or resumed[0].startswith(f"resumed at step {complete} "), (before, lines)
        # During the start a rank may wait for a dead peer until comm.timeout_seconds: there torchrun would end it.
        assert ended_alone or not any(line.startswith("step ") for line in lines), (codes, lines)
        assert not any("corrupt" in line for line in lines), lines
        if moment is None:
            assert codes == [0] * RANKS, (codes, lines)
            break
        kills.append((who, mode, moment))
    assert rows(folder) == expected, f"trial {number} in {folder}: {who}, {mode}"
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120, help="smallest number of kills (default 120)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and ranks")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "fault_sweep.json")
    given = parser.parse_args()
    # For the process that imports torch, and for the ranks that are forked from it.
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path[:2]), OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    choose, kills, number, began = random.Random(given.seed), [], 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nano-train-sweep-") as name:
        folder = Path(name)
        write_ragged_text(folder)
        (folder / "undisturbed").mkdir()
        codes = exit_codes(start(RANKS, arguments(folder / "undisturbed", "disabled"), str(folder / "output.txt")))
        assert codes == [0] * RANKS, (folder / "output.txt").read_text()
        expected = rows(folder / "undisturbed")
        while len(kills) < given.kills:
            kills += trial(number, folder / f"trial-{number}", expected, choose)
            number += 1
            print(
                f"{number} runs, {len(kills)} kills, all resumed and equal; {time.monotonic() - began:.0f} s",
                flush=True,
            )
    table = {}
    for who, mode, moment in kills:
        key = f"{who}, {'asynchronous' if mode == 'async' else 'synchronous'} saves, during {moment}"
        table[key] = table.get(key, 0) + 1
    result = dict(
        date=str(date.today()), torch=torch.__version__, machine=platform.machine(), ranks=RANKS, seed=given.seed,
        runs=number, kills=len(kills), seconds=round(time.monotonic() - began), by_kind=dict(sorted(table.items())),
    )  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
