"""Reports each logged step: a console line, a JSON object in metrics.jsonl and, if enabled, TensorBoard scalars.

Proof: tests/test_metrics.py::test_metrics_of_an_interval_are_means_over_its_steps.
"""

import json
import math
import os
import resource
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from resilience.health import LossSpikes
from training.balance import collapse_warning

# Dense bfloat16 tensor-core peak in FLOP/s, from NVIDIA's data sheets (SXM parts unless named), first match wins.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "H20": 148e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
}  # fmt: skip


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far, in GiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Metrics:
    """Writes a logged step to the console, metrics.jsonl and TensorBoard. Rank 0 writes; the other ranks do nothing.

    Keys of a line in metrics.jsonl:

        step                          counted from 1
        loss                          nats per token
        grad_norm                     before clipping
        lr
        tokens_seen                   since step 0, resumed runs included
        tokens_per_second             of all ranks; time in validation does not count
        tokens_per_second_per_device
        tflops                        model FLOPs per second and device, in 1e12
        mfu                           tflops / the device's peak; null if the peak is unknown
        memory_gib                    rank 0's peak
        seconds                       per step, the mean since the last logged step
        data_seconds                  how much of `seconds` rank 0 waited for data; on the console if above 5 %
        skipped_steps, failed_saves   since this start of the run: steps with a gradient that is not finite, and
                                      checkpoints that could not be written
        expert_*                      of MoE models, a list with a number per MoE layer (training/balance.py)
        validation_*                  of steps with validation (training/validation.py)
    """

    def __init__(
        self,
        dump_folder: str,
        device: torch.device,
        total_steps: int,
        flops_per_token: int,
        log_freq: int,
        enable_tensorboard: bool,
    ):
        self.device, self.total_steps, self.flops_per_token = device, total_steps, flops_per_token
        self.log_freq, self.num_devices = log_freq, dist.get_world_size()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_flops = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        self.spikes, self.file, self.tensorboard = LossSpikes(), None, None
        if dist.get_rank() == 0:
            os.makedirs(dump_folder, exist_ok=True)
            self.file = open(os.path.join(dump_folder, "metrics.jsonl"), "a", encoding="utf-8")  # noqa: SIM115
            if enable_tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # takes a second to import

                self.tensorboard = SummaryWriter(os.path.join(dump_folder, "tensorboard"))

    def start(self, state) -> None:
        """Begins the interval over which the next logged step's speed is measured; state: a TrainState."""
        self.start_time, self.start_step, self.start_tokens = time.perf_counter(), state.step, state.tokens_seen

    def is_log_step(self, step: int) -> bool:
        return step % self.log_freq == 0 or step == self.total_steps or step == 1

    def log(self, state, *, loss: float, grad_norm: float, lr: float, data_seconds: float, **more) -> None:
        """Reports the step that state has just counted, and begins the next interval. The caller has read loss from the
        device, so that the clock sees finished work. data_seconds: the loader's waits since the last logged step. more:
        the columns from skipped_steps on, in their order."""
        if self.file is None:
            return
        seconds = time.perf_counter() - self.start_time - more.get("validation_seconds", 0.0)
        steps = state.step - self.start_step
        speed = (state.tokens_seen - self.start_tokens) / seconds
        flops = self.flops_per_token * speed / self.num_devices
        row = dict(step=state.step, loss=loss, grad_norm=grad_norm, lr=lr, tokens_seen=state.tokens_seen)
        row |= dict(tokens_per_second=speed, tokens_per_second_per_device=speed / self.num_devices)
        row |= dict(tflops=flops / 1e12, mfu=flops / self.peak_flops if self.peak_flops else None)
        row |= dict(memory_gib=peak_memory_gib(self.device), seconds=seconds / steps, data_seconds=data_seconds / steps)
        row |= more
        # JSON has no NaN: a skipped step's loss is null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        print(json.dumps(finite), file=self.file, flush=True)
        if self.tensorboard:
            scalars = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
            lists = {key: value for key, value in row.items() if isinstance(value, list)}
            scalars |= {f"{key}/{i}": value for key, values in lists.items() for i, value in enumerate(values)}
            for key, value in scalars.items():
                self.tensorboard.add_scalar(key, value, state.step)
        for line in (self._line(row), collapse_warning(more), self.spikes.warning(state.step, loss)):
            if line:
                print(line, flush=True)
        self.start(state)

    def _line(self, row: dict) -> str:
        left = timedelta(seconds=round(row["seconds"] * (self.total_steps - row["step"])))
        load = f"  expert load {max(row['expert_load']):.2f}" if "expert_load" in row else ""
        held_out = f"  validation {row['validation_loss']:7.4f}" if "validation_loss" in row else ""
        waited = row["data_seconds"] / row["seconds"]
        data = f"  waits for data {waited:.0%}" if waited > 0.05 else ""
        mfu = f"  mfu {row['mfu']:5.1%}" if row["mfu"] is not None else ""
        return (
            f"step {row['step']:>{len(str(self.total_steps))}}/{self.total_steps}  loss {row['loss']:7.4f}{held_out}  "
            f"grad norm {row['grad_norm']:8.4f}  lr {row['lr']:.2e}  {row['tokens_per_second']:>9,.0f} tokens/s  "
            f"{row['tflops']:7.2f} TFLOP/s{mfu}  {row['memory_gib']:6.2f} GiB{load}{data}  left {left}"
        )

    def close(self) -> None:
        for output in filter(None, (self.file, self.tensorboard)):
            output.close()
