"""Trains a small mixture of experts on a skewed text, with and without the expert bias, and draws the experts' load.

    python benchmarks/plot_balance.py [--steps 200]        writes docs/balance.png; needs matplotlib

The words of the text have very uneven frequencies: without load balancing a few experts get nearly all tokens. The
expert bias is the only load balancing here, there is no balance loss. tests/test_balance.py asserts the result.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {  # three MoE layers: two blocks and the block of multi-token prediction
    "job.device": "cpu", "model.dim": 32, "model.n_layers": 2, "model.n_heads": 4, "model.n_kv_heads": 2,
    "model.hidden_dim": 48, "model.vocab_size": 268, "model.n_experts": 4, "model.top_k": 1,
    "model.moe_hidden_dim": 16, "model.n_mtp_layers": 1,
    "model.expert_bias_speed": 0.003, "training.steps": 200, "training.seq_len": 64, "training.global_batch_size": 8,
    "training.local_batch_size": 8, "training.mixed_precision_param": "float32", "optimizer.lr": 2e-3,
    "lr_scheduler.warmup_steps": 10, "lr_scheduler.decay_ratio": 1.0, "metrics.log_freq": 1, "data.dataset": "text",
    "data.tokenizer": "byte",
}  # fmt: skip


def write_skewed_text(path: Path) -> Path:
    """Writes documents of 100 words out of 60 words, where the i-th word is i times as rare as the first."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.choice((2, 3, 4, 6)))) for _ in range(60)]
    frequencies = [1 / (i + 1) for i in range(60)]
    texts = (" ".join(choose.choices(words, weights=frequencies, k=100)) for _ in range(300))
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def arguments(bias: bool, folder: Path, text: Path) -> list[str]:
    """The arguments of train.py for a run in folder."""
    more = {"model.expert_bias": str(bias).lower(), "job.dump_folder": folder, "data.path": text}
    more["data.cache_folder"] = folder.parent / "cache"
    return [f"--{key}={value}" for key, value in (SETTINGS | more).items()]


def loads(folder: Path) -> list[list[float]]:
    """For every step and each MoE layer, the tokens of the busiest expert over the mean."""
    return [json.loads(line)["expert_load"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "balance.png")
    given = parser.parse_args()
    steps = given.steps
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: plot_balance.py needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 3.5))
    with tempfile.TemporaryDirectory() as folder:
        text = write_skewed_text(Path(folder) / "skewed.jsonl")
        for axis, bias in zip(axes, (False, True), strict=True):
            title, run = "with the bias" if bias else "without the bias", Path(folder) / str(bias)
            command = [sys.executable, "train.py", *arguments(bias, run, text), f"--training.steps={steps}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
            curves = list(zip(*loads(run), strict=True))
            for number, curve in enumerate(curves):
                last = curve[-20:]
                print(f"{title}, MoE layer {number}: last {sum(last) / len(last):.2f}", flush=True)
                name = f"MoE layer {number}" if number < len(curves) - 1 else "multi-token prediction"
                axis.plot(range(1, steps + 1), curve, label=name, linewidth=1)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.axhline(1.3, color="grey", linestyle=":")
    axes[0].set_ylabel("busiest expert's tokens / mean")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(given.output, dpi=80)


if __name__ == "__main__":
    main()
