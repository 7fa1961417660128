"""Trains the debug model in eight layouts on CPUs and draws their losses in one figure.

    python benchmarks/plot_layouts.py [--steps 200]        writes docs/layouts.png; needs matplotlib

The runs compute in float64, so that their rounding differences, which come from the order of sums, stay small. In
float32 Adam can turn a rounding error in a gradient near zero into a step of full size: after 200 steps the losses
differ by about 1e-3.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {  # name: (processes, options of [parallelism])
    "one process": (1, {}),
    "FSDP 2": (2, {}),
    "HSDP 2 x 2": (4, {"data_parallel_replicate_degree": 2}),
    "TP 2 x FSDP 2": (4, {"tensor_parallel_degree": 2}),
    "CP 4": (4, {"context_parallel_degree": 4}),
    "CP 2, all-to-all": (2, {"context_parallel_degree": 2, "context_parallel_method": "alltoall"}),
    "PP 4": (4, {"pipeline_parallel_degree": 4, "pipeline_parallel_microbatch_size": 2}),
    "PP 2 interleaved x TP 2": (4, {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2,
                                    "pipeline_parallel_schedule": "Interleaved1F1B",
                                    "pipeline_parallel_microbatch_size": 4}),
}  # fmt: skip


def losses(processes: int, options: dict, steps: int, folder: Path) -> list[float]:
    """Trains in one layout; returns the loss of every step."""
    data_ranks = processes
    for axis in ("tensor", "context", "pipeline"):
        data_ranks //= options.get(f"{axis}_parallel_degree", 1)
    settings = {
        "job.device": "cpu", "job.dump_folder": folder / "run", "model.vocab_size": 4096, "training.steps": steps,
        "training.seq_len": 64, "training.global_batch_size": 8, "training.local_batch_size": 8 // data_ranks,
        "training.dtype": "float64", "training.mixed_precision_param": "float64",
        "training.mixed_precision_reduce": "float64", "optimizer.lr": 4e-3, "lr_scheduler.warmup_steps": 20,
        "metrics.log_freq": 1, "data.cache_folder": folder.parent / "cache",
        **{f"parallelism.{key}": value for key, value in options.items()},
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["train.py", *(f"--{key}={value}" for key, value in settings.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "layouts.png")
    given = parser.parse_args()
    steps = given.steps
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: plot_layouts.py needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    with tempfile.TemporaryDirectory() as folder:
        reference = None
        for i, (name, (processes, options)) in enumerate(LAYOUTS.items()):
            (Path(folder) / str(i)).mkdir()
            curve = losses(processes, options, steps, Path(folder) / str(i))
            reference = reference or curve
            apart = [abs(a - b) / b for a, b in zip(curve, reference, strict=True)]
            print(f"{name}: last loss {curve[-1]:.6f}, at most {max(apart):.1e} from one process", flush=True)
            above.plot(range(1, steps + 1), curve, label=name, linewidth=1 + (len(LAYOUTS) - i) * 0.6, alpha=0.8)
            below.semilogy(range(1, steps + 1), [max(a, 1e-16) for a in apart])
    above.set_ylabel("loss")
    above.legend(fontsize=8)
    below.set_ylabel("relative distance\nfrom one process")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(given.output, dpi=110)


if __name__ == "__main__":
    main()
