"""Prints where the time of a step goes: the kernels of a torch.profiler trace, by kind and by name.

python benchmarks/gpu_profile.py trace.json        a trace of one step, as `benchmark_gpu.py --profile` writes it
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

KINDS = (  # The first match in lower case wins: the name of a compiled kernel has the names of all that it fuses.
    ("element-wise, compiled", r"^triton_(?!tem)"),
    ("attention", r"sdpa|flash|fmha|attention"),
    ("communication", r"nccl"),
    ("optimizer", r"fusedadam|fused_adam|multi_tensor_apply"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|splitk|xmma|_mm\b|::mm\b|addmm"),
    ("copies, casts", r"memcpy|memset|copy|cat(array|batch)|split_with_sizes|fill"),
    ("gradient norm and other sums", r"reduce_kernel|norm"),
    ("element-wise", r""),
)


def print_profile(path: Path, *, steps: int, num_kernels: int = 25) -> None:
    """Prints two tables: the share of each kind of kernel and of idle time, and the num_kernels that take most time.

    The window is from the first kernel's start to the last kernel's end. Kernels of several streams can run at once, so
    the shares may add up to more than 1.
    """
    events = json.loads(path.read_text())["traceEvents"]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    # In a dry run without a GPU, CPU operations take the place of kernels. They are nested: the numbers mean nothing.
    kernels = on_gpu or [e for e in events if e.get("cat") == "cpu_op"]
    window = max(e["ts"] + e["dur"] for e in kernels) - min(e["ts"] for e in kernels)
    idle = window - _busy(kernels)
    by_kind, by_name = defaultdict(float), defaultdict(lambda: [0, 0.0])
    for event in kernels:
        by_kind[_kind(event["name"])] += event["dur"]
        by_name[event["name"]][0] += 1
        by_name[event["name"]][1] += event["dur"]
    print(f"\n{steps} steps, {window / steps / 1e3:.1f} ms each\n")
    print("| kind | ms a step | share |\n|---|---|---|")
    for kind, micros in sorted([*by_kind.items(), ("idle", idle)], key=lambda item: -item[1]):
        print(f"| {kind} | {micros / steps / 1e3:.2f} | {micros / window:.1%} |")
    print("\n| kernel | kind | calls a step | ms a step | share |\n|---|---|---|---|---|")
    for name, (calls, micros) in sorted(by_name.items(), key=lambda item: -item[1][1])[:num_kernels]:
        short = re.sub(r"\s+", " ", name.replace("|", "/"))[:90]
        print(f"| {short} | {_kind(name)} | {calls / steps:.1f} | {micros / steps / 1e3:.2f} | {micros / window:.1%} |")


def _kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name.lower()))


def _busy(kernels: list[dict]) -> float:
    """Time in which at least one kernel runs."""
    total = end = 0.0
    for event in sorted(kernels, key=lambda e: e["ts"]):
        start, stop = max(event["ts"], end), event["ts"] + event["dur"]
        total += max(0.0, stop - start)
        end = max(end, stop)
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--steps", type=int, default=1, help="number of steps in the trace")
    arguments = parser.parse_args()
    print_profile(arguments.trace, steps=arguments.steps)
