"""Compares the trainer's speed on CPUs with a plain PyTorch loop over the same model, and prints a table.

    python benchmarks/benchmark.py                                  debug and 125M models, 1 and 2 processes, five pairs
    python benchmarks/benchmark.py --models llama3_debug --pairs 3 --processes 1

Each run is a new process. One run of a pair is `train.py` as a user starts it, with data, FSDP2, grad norm and logging.
The other run is `plain_loop` below: random tokens, fused AdamW, torch's clipping, no data, no logging, no FSDP; with
several processes it uses DistributedDataParallel (DDP). Both train the same model in float32 on the same number of
tokens. DDP keeps all weights on each rank, so FSDP2 keeps them too (fsdp_reshard_after_forward "never").

The speed of a run is its median step after the warm-up. The speed of a shared machine drifts, therefore the result is
the ratio of the two runs of a pair. "first loss" is the time from the command to the first loss, including the first
step. Other arguments go to train.py.

--plain_keeps_memory gives the plain loop the trainer's malloc setting, which makes it 10 to 20 % faster.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WARMUP_STEPS = 1
SHAPES = {  # model: (sequences per process and step, tokens per sequence, steps)
    "llama3_debug": (8, 256, 16),
    "llama3_125m": (4, 256, 4),
}


def plain_loop(model_name: str, output: str) -> None:
    """A training loop with the model's work and nothing else. Writes the seconds of each step to output."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from model import Transformer, get_flavor
    from parallelize import init_weights

    batch, seq_len, steps = SHAPES[model_name]
    args = get_flavor(model_name)
    module = model = Transformer(args)
    init_weights(module, args, seed=0)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    positions = torch.arange(seq_len).expand(batch, seq_len)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        tokens = torch.randint(args.vocab_size, (batch, seq_len + 1))
        logits = model(tokens[:, :-1], positions)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    if int(os.environ.get("RANK", 0)) == 0:
        Path(output).write_text(json.dumps(seconds))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(
    kind: str, model: str, processes: int, folder: Path, options: list[str], keeps_memory: bool
) -> tuple[float, float]:
    """Starts one run; returns the tokens per second of all its processes, and the seconds from the command to the
    first loss."""
    batch, seq_len, steps = SHAPES[model]
    folder.mkdir()
    if kind == "ours":
        program = ["train.py", "--model.flavor", model, "--job.device", "cpu", "--job.dump_folder", str(folder),
                   "--training.steps", str(steps), "--training.seq_len", str(seq_len),
                   "--training.local_batch_size", str(batch), "--training.mixed_precision_param", "float32",
                   "--parallelism.fsdp_reshard_after_forward", "never", "--metrics.log_freq", "1",
                   "--data.cache_folder", str(folder.parent / "cache"), *options]  # fmt: skip
    else:
        program = [str(Path(__file__).resolve()), "--plain", model, str(folder / "seconds.json")]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if kind == "plain" and keeps_memory:
        environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    start = time.perf_counter()
    command = subprocess.Popen(
        [sys.executable, *launcher, *program], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    first_loss, printed = float("nan"), []
    for line in command.stdout:
        printed.append(line)
        if line.startswith("step") and first_loss != first_loss:
            first_loss = time.perf_counter() - start
    if command.wait() != 0:
        sys.exit("".join(printed))
    if kind == "ours":
        seconds = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    else:
        seconds = json.loads((folder / "seconds.json").read_text())
    return batch * seq_len * processes / median(seconds[WARMUP_STEPS:]), first_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--plain_keeps_memory", action="store_true")
    parser.add_argument("--plain", nargs=2, metavar=("MODEL", "OUTPUT"), help=argparse.SUPPRESS)  # run plain_loop
    arguments, options = parser.parse_known_args()  # the rest goes to train.py
    if arguments.plain:
        plain_loop(*arguments.plain)
        return
    print(
        "| model | processes | against | train.py, tokens/s | plain, tokens/s | ratio (min, median, max) | first loss |"
    )
    print("|---|---|---|---|---|---|---|")
    for model in arguments.models:
        for processes in arguments.processes:
            with tempfile.TemporaryDirectory() as folder:
                runs = {"ours": [], "plain": []}
                for pair in range(arguments.pairs):
                    # The order alternates, so that a steady drift of the machine's speed favours neither.
                    for kind in ("ours", "plain") if pair % 2 == 0 else ("plain", "ours"):
                        where = Path(folder) / f"{kind}{pair}"
                        runs[kind].append(run(kind, model, processes, where, options, arguments.plain_keeps_memory))
            speeds = {kind: [speed for speed, _ in results] for kind, results in runs.items()}
            ratios = sorted(a / b for a, b in zip(speeds["ours"], speeds["plain"], strict=True))
            print(
                f"| {model} | {processes} | {'a plain loop' if processes == 1 else 'DDP'} | "
                f"{median(speeds['ours']):,.0f} | {median(speeds['plain']):,.0f} | "
                f"{ratios[0]:.3f}, **{median(ratios):.3f}**, {ratios[-1]:.3f} | "
                f"{median(start for _, start in runs['ours']):.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
