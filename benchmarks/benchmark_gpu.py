"""Measures speed and memory of the trainer on one GPU, and compares them with a plain loop, with the GPU's matmul
ceiling, and with memory counted by hand.

    python benchmarks/benchmark_gpu.py '1b/*' '8b/4k*' --out FOLDER     cases of gpu_cases.py: patterns of GROUP/CASE
    python benchmarks/benchmark_gpu.py --profile '8b/4k, batch 3'       where the time of a step goes
    python benchmarks/benchmark_gpu.py '1b/*' --device cpu              a dry run with tiny models on a CPU

Each case is a process (`gpu_case.py`) with the options of train.py that gpu_cases.py lists. Its speed is the median
over the logged intervals after the first two: the first step compiles, the second allocates. A case marked PLAIN is
followed by a plain loop with the same options, so that both numbers of their ratio come from the same GPU at about the
same time. A case that fails (out of memory, out of time) is reported as failed, and the other cases go on. After
--seconds no further case begins.

GPU time is expensive: while a case runs, the process of the next case has already imported torch and waits. With
--precompile N nothing is measured. Instead the compiler's cache is filled with the graphs of the cases, N at a time,
with two layers each. The compiler chooses between variants of a kernel by timing them, and other processes disturb
these timings, so the choices are deleted from the cache.

FOLDER/results.json has all numbers, FOLDER/results.csv a line per case, FOLDER/<group>/ the output of each process.
"""

import argparse
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_case import PROFILED_AFTER, PROFILED_STEPS  # noqa: E402
from gpu_cases import ALL, DRY, DRY_MIXTURE, GROUPS, PLAIN  # noqa: E402
from gpu_memory import predict_memory  # noqa: E402
from gpu_profile import print_profile  # noqa: E402
from torch._inductor.runtime.cache_dir_utils import cache_dir  # noqa: E402

from config import load_config  # noqa: E402
from hf import get_model_args  # noqa: E402
from model import flops_per_token  # noqa: E402

COLUMNS = [
    *("date", "machine", "torch", "group", "case", "kind", "status", "tokens_per_second", "tflops", "mfu"),
    *("causal_tflops", "plain_ratio", "peak_gib", "predicted_gib", "predicted_over_measured", "predicted_peak_at"),
    *("reserved_gib", "alloc_retries", "first_step_seconds", "loss", "wall_seconds", "options"),
]


class Case:
    """A process of gpu_case.py. It imports its modules and then waits for `finish`."""

    def __init__(self, kind: str, name: str, options: str, arguments: argparse.Namespace):
        self.kind, self.name, self.options = kind, name, options
        self.argv = shlex.split(f"{ALL} {options} --data.cache_folder {shlex.quote(str(arguments.cache))}")
        group, _, case = name.partition("/")
        self.folder = arguments.out / group / f"{case.replace(', ', '_').replace(' ', '-')}_{kind}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in ("metrics.jsonl", "facts.json"):
            (self.folder / old).unlink(missing_ok=True)
        with open(self.folder / "output.txt", "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "benchmarks" / "gpu_case.py"), kind, str(self.folder), *self.argv],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self, seconds: float) -> dict:
        """Lets the process run for at most `seconds`; returns a row with COLUMNS and all other measured values."""
        group, _, case = self.name.partition("/")
        row = dict.fromkeys(COLUMNS) | dict(
            date=date.today().isoformat(), group=group, case=case, kind=self.kind, options=self.options
        )
        start = time.monotonic()
        try:
            self.process.communicate(b"\n", timeout=max(1, seconds))
            row["status"] = "failed" if self.process.returncode else "ok"
        except subprocess.TimeoutExpired:
            self.kill()
            row["status"] = f"no result in {seconds:.0f} s"
        row["wall_seconds"] = time.monotonic() - start
        if row["status"] != "ok":
            lines = (self.folder / "output.txt").read_text().strip().splitlines() or [""]
            if any("out of memory" in line for line in lines):
                row["status"] = "out of memory"
            elif row["status"] == "failed":
                row["status"] = f"failed: {lines[-1][:200]}"
        if (self.folder / "facts.json").exists() and row["status"] == "ok":
            facts = json.loads((self.folder / "facts.json").read_text())
            row |= dict(machine=facts["machine"], torch=facts["torch"], facts=facts)
            row["alloc_retries"] = facts.get("alloc_retries")
            row["reserved_gib"] = facts["reserved"] / 2**30 if "reserved" in facts else None
        if self.kind in ("train", "plain"):
            add_speed(row, self.folder, self.argv)
        if self.kind == "train":
            add_prediction(row, self.argv)
        return row

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # the whole session, with the compiler's processes
        self.process.wait()


def add_speed(row: dict, folder: Path, argv: list[str]) -> None:
    path = folder / "metrics.jsonl"
    row["metrics"] = rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if row["status"] != "ok":
        return
    for key in ("tokens_per_second", "tflops", "mfu"):
        row[key] = median(r[key] for r in rows[2:]) if rows[-1][key] is not None else None
    config = load_config(argv)
    args, seq_len = get_model_args(**vars(config.model)), config.training.seq_len
    row["causal_tflops"] = row["tokens_per_second"] * flops_per_token(args, seq_len, causal=True) / 1e12
    row |= dict(peak_gib=rows[-1]["memory_gib"], loss=rows[-1]["loss"], first_step_seconds=rows[0]["seconds"])


def add_prediction(row: dict, argv: list[str]) -> None:
    config = load_config(argv)
    row["predicted"] = predicted = predict_memory(get_model_args(**vars(config.model)), config)
    row |= dict(predicted_gib=predicted["peak"] / 2**30, predicted_peak_at=predicted["peak_at"])
    if row["peak_gib"] is not None:
        row["predicted_over_measured"] = row["predicted_gib"] / row["peak_gib"]


def save(rows: list[dict], out: Path) -> None:
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def table(rows: list[dict]) -> str:
    lines = [
        "| case | tokens/s | TFLOP/s | MFU | plain loop | ratio | GiB | by hand | by hand / GiB | first step, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {(row["group"], row["case"]): row for row in rows if row["kind"] == "plain"}

    def show(value, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        if row["kind"] != "train":
            continue
        beside = plain.get((row["group"], row["case"]))
        beside_speed = "" if beside is None else show(beside["tokens_per_second"], ",.0f") or beside["status"]
        speed = show(row["tokens_per_second"], ",.0f") or row["status"]
        lines.append(
            f"| {row['group']}: {row['case']} | {speed} | {show(row['tflops'], ',.0f')} | {show(row['mfu'], '.1%')} | "
            f"{beside_speed} | {show(row['plain_ratio'], '.3f')} | {show(row['peak_gib'], '.1f')} | "
            f"{show(row['predicted_gib'], '.1f')} | {show(row['predicted_over_measured'], '.2f')} | "
            f"{show(row['first_step_seconds'], '.0f')} |"
        )
    return "\n".join(lines)


def precompile(jobs: list[tuple[str, str, str]], at_a_time: int, arguments: argparse.Namespace) -> None:
    """Fills the compiler's cache. Two layers are enough: all layers share the graphs of a block."""
    start, distinct = time.monotonic(), {options: name for kind, name, options in jobs if "--compile" in options}
    small = "--model.n_layers 2 --training.steps 1 --training.global_batch_size -1"

    def compile_one(item: tuple[str, str]) -> None:
        options, name = item
        row = Case("compile", name, f"{options} {small}", arguments).finish(arguments.case_seconds)
        print(f"compiled {name}: {row['status']}, {row['wall_seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(compile_one, distinct.items()))
    for choice in Path(cache_dir()).rglob("*.best_config"):
        choice.unlink()
    print(f"compiled {len(distinct)} in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="GROUP/CASE", help="patterns; cases run in this order")
    parser.add_argument("--profile", nargs="+", default=[], metavar="GROUP/CASE", help="then profile these cases")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmark_gpu")
    parser.add_argument("--cache", type=Path, default=ROOT / "outputs" / "cache", help="folder for tokenized data")
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit for all cases together")
    parser.add_argument("--case_seconds", type=float, default=150.0, help="limit for one case")
    parser.add_argument("--precompile", type=int, default=0, metavar="N", help="only compile, N at a time")
    parser.add_argument("--options", default="", help="options of train.py for all cases")
    arguments = parser.parse_args()
    arguments.out, arguments.cache = arguments.out.resolve(), arguments.cache.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.seconds

    def options_of(name: str) -> str:
        group, _, case = name.partition("/")
        options = f"{GROUPS[group][0]} {GROUPS[group][1][case][0]}"
        if arguments.device == "cpu":
            options += (
                f" {DRY}"
                + DRY_MIXTURE * ("deepseek" in options)
                + " --compile.backend aot_eager" * ("compile" in options)
            )
            options += " --float8.emulate true" * ("float8" in options)
            options = options.replace(" --float8.enable_fsdp_float8_all_gather true", "")
        return f"{options} {arguments.options}".strip()

    def names(pattern: str) -> list[str]:
        known = [f"{group}/{case}" for group, (_, cases) in GROUPS.items() for case in cases]
        found = [name for name in known if fnmatch(name, pattern)]
        return found or parser.error(f"no case matches {pattern}; there are {', '.join(known)}")

    jobs = [("ceiling", "ceiling/matrix product", f"--job.device {arguments.device}")]  # (kind, name, options)
    for name in dict.fromkeys(name for pattern in arguments.cases for name in names(pattern)):
        group, _, case = name.partition("/")
        jobs.append(("train", name, options_of(name)))
        if PLAIN in GROUPS[group][1][case]:
            jobs.append(("plain", name, options_of(name)))
    for name in dict.fromkeys(name for pattern in arguments.profile for name in names(pattern)):
        jobs.append(("profile", name, f"{options_of(name)} --training.steps {PROFILED_AFTER + PROFILED_STEPS}"))
    if arguments.precompile:
        precompile(jobs, arguments.precompile, arguments)
        return

    rows, coming = [], Case(*jobs[0], arguments)
    for after, (kind, name, _) in enumerate(jobs, start=1):
        case, coming = coming, Case(*jobs[after], arguments) if after < len(jobs) else None
        left = deadline - time.monotonic()
        if left < 15:
            case.kill()
            print(f"{name} ({kind}): not run, no time left", flush=True)
            continue
        row = case.finish(min(left, arguments.case_seconds))
        speed = "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f} tokens/s, "
        print(f"{name} ({kind}): {row['status']}, {speed}{row['wall_seconds']:.0f} s in total", flush=True)
        if kind == "plain":
            ours, theirs = rows[-1]["tokens_per_second"], row["tokens_per_second"]
            rows[-1]["plain_ratio"] = ours / theirs if ours and theirs else None
        if kind == "profile" and row["status"] == "ok":
            print_profile(case.folder / "trace.json", steps=PROFILED_STEPS)
        rows.append(row)
        save(rows, arguments.out)
        if row["status"] != "ok":
            time.sleep(10)  # the driver needs time to reclaim the memory of the failed process
    products = rows[0].get("facts", {}).get("ceiling", {})
    print("\n" + ", ".join(f"{product} {value:,.1f} TFLOP/s" for product, value in products.items()), end="\n\n")
    print(table(rows))


if __name__ == "__main__":
    main()
