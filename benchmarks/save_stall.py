"""Measures for how long a save stalls training, for each checkpoint.async_mode:

    torchrun --nproc_per_node=2 benchmarks/save_stall.py --gib 4 --folder /scratch/stall

Weights and two moments of --gib GiB in all, sharded over the ranks, are saved three times in each mode. Between saves
the device multiplies matrices, as training would. Printed are the median seconds that `save` and `wait_for_staging`
took, without the first save, which allocates, and the seconds until the checkpoint was complete. On a GPU
`wait_for_staging` stalls the device and not the CPU: the clock is read when the device has done the work after it.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpoint import CheckpointManager, ModelState, TrainState
from model import ModelArgs
from resilience.process_group import init_distributed

WORK_SECONDS = 1.0  # "training" between the start of a save and the optimizer's step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of a checkpoint (default 1)")
    parser.add_argument("--folder", required=True, help="where to save; its contents are deleted")
    given = parser.parse_args()
    device = init_distributed("auto", 600)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rows = int(given.gib * 2**30 / 3 / 4 / 16 / 4096 / mesh.size())
    local = [torch.randn(rows, 4096, device=device) for _ in range(16)]
    parameters = {f"{i}.weight": nn.Parameter(DTensor.from_local(t, mesh, [Shard(0)])) for i, t in enumerate(local)}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    matrix = torch.randn(2048, 2048, device=device)

    def work(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            matrix @ matrix
            synchronize()

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    modes = ["disabled", "async"] + (["async_with_pinned_mem"] if device.type == "cuda" else [])
    for mode in modes:
        if dist.get_rank() == 0:
            shutil.rmtree(given.folder, ignore_errors=True)
        manager = CheckpointManager(
            given.folder, ModelState(parameters, {}, optimizer, ModelArgs()), enable=True, folder="", interval=1,
            async_mode=mode, keep_latest_k=1, keep_every=0, load_step=-1, initial_load_path="",
            initial_load_in_hf=False, exclude_from_loading=[],
        )  # fmt: skip
        stalls, wholes = [], []
        for step in range(1, 4):
            synchronize()
            dist.barrier()
            began = time.perf_counter()
            manager.save(TrainState(step))
            stall = time.perf_counter() - began
            work(WORK_SECONDS)
            before = time.perf_counter()
            manager.wait_for_staging()
            matrix.add_(0)  # the optimizer's step
            synchronize()
            stalls.append(stall + time.perf_counter() - before)
            manager.wait()
            assert manager.saved_step == step
            wholes.append(time.perf_counter() - began)
        manager.finish(TrainState(step))
        if dist.get_rank() == 0:
            name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
            print(
                f"{given.gib:g} GiB, {dist.get_world_size()} x {name}, torch {torch.__version__}, {mode}: "
                f"stall {statistics.median(stalls[1:]):.3f} s, complete after {statistics.median(wholes[1:]):.2f} s",
                flush=True,
            )
    if dist.get_rank() == 0:
        shutil.rmtree(given.folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
