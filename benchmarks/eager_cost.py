"""Measures the Python cost of the parallelisms: CPU time of a step on a process group that sends nothing.

    python benchmarks/eager_cost.py                                       a table of layouts
    python benchmarks/eager_cost.py --profile "tensor_parallel_degree 2"  the most expensive functions of a layout

One process runs rank 0's part of a small model, eager, with one thread. Rank 0 of a layout computes less than a single
process does, so the time that it takes longer is spent in Python and in DTensor's dispatch.
"""

import argparse
import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 25
LAYOUTS = {  # options of [parallelism]: number of ranks
    "": 1,
    "data_parallel_shard_degree 4": 4,
    "tensor_parallel_degree 2": 2,
    "tensor_parallel_degree 2 data_parallel_shard_degree 4": 8,
    "context_parallel_degree 2": 2,
}


def settings(layout: str, folder: str) -> list[str]:
    words = layout.split()
    given = {f"parallelism.{key}": value for key, value in zip(words[::2], words[1::2], strict=True)}
    given |= {
        "job.device": "cpu", "job.dump_folder": f"{folder}/run", "data.cache_folder": f"{ROOT}/outputs/cache",
        "model.dim": 64, "model.n_layers": 3, "model.hidden_dim": 96, "training.steps": STEPS, "training.seq_len": 32,
        "training.local_batch_size": 2, "training.mixed_precision_param": "float32", "data.num_workers": 0,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in given.items()]


def run(layout: str, profile: bool, folder: str) -> None:
    """Runs rank 0 of a layout, in a new process; prints the milliseconds of CPU time of a step and, with profile, the
    functions that take most of it."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import resilience.run
    import train
    from config import load_config

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=LAYOUTS[layout])
    # No rank answers, so each function that reads other ranks' answers is replaced.
    resilience.run.init_distributed = lambda *_: torch.device("cpu")
    train.Run.require_same_on_all_ranks = lambda *_, **__: None
    clip, count, starts, profiler = train.clip_grad_norm, train.count_valid_tokens, [], cProfile.Profile()

    def counting(*args):
        starts.append(time.process_time())
        if profile and len(starts) == STEPS:
            profiler.enable()
        return count(*args)

    train.count_valid_tokens = counting
    train.clip_grad_norm = lambda *args: (clip(*args), 1.0)[1]
    train.Metrics.log = lambda *_, **__: profiler.disable()
    train.main(load_config(settings(layout, folder)))
    seconds = sorted(b - a for a, b in pairwise(starts[5:]))
    print(f"{layout or 'one process'} | {seconds[len(seconds) // 2] * 1e3:.0f}")
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=LAYOUTS, metavar="LAYOUT", help=f"one of {', '.join(map(repr, LAYOUTS))}")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.layout is not None or arguments.profile is not None:
            chosen = arguments.layout if arguments.layout is not None else arguments.profile
            return run(chosen, arguments.profile is not None, folder)
        for layout in LAYOUTS:
            command = [sys.executable, __file__, "--layout", layout]
            printed = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout
            print(printed.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
