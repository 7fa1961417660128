"""What a run reports: one console line, one JSON object and, if asked for, TensorBoard scalars per logged step."""

import json
import os
import resource
import sys
import time
from datetime import timedelta

import torch

from training.balance import collapse_warning

# Dense bfloat16 tensor-core peak in FLOP/s, from NVIDIA's data sheets (SXM parts unless named), first match wins.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def device_peak_flops(device: torch.device) -> float | None:
    """FLOP/s that MFU is measured against; None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Metrics:
    """Writes a logged step to the console, metrics.jsonl and TensorBoard; rank 0 only, silent elsewhere.

    Keys of a line in metrics.jsonl: step (counted from 1), loss (nats a token), grad_norm (before clipping), lr,
    tokens_seen (since step 0, resumed runs included), tokens_per_second (of all ranks), tokens_per_second_per_device,
    tflops (model FLOPs a device a second, in 1e12), mfu (tflops / the device's peak; null if that is unknown),
    memory_gib (rank 0's peak), seconds (a step, the mean since the last logged one) and data_seconds (those of them
    that rank 0 waited for data; the console shows it above 5 % of the step). For a mixture of experts also
    expert_load, expert_idle and expert_bias_range, a number a layer (training/balance.py), and at its steps
    validation_loss, validation_perplexity and validation_seconds (training/validation.py), whose time is in no speed.
    """

    def __init__(
        self,
        dump_folder: str,
        *,
        is_writer: bool,
        log_freq: int,
        total_steps: int,
        flops_per_token: int,
        num_devices: int,
        device: torch.device,
        enable_tensorboard: bool,
    ):
        self.is_writer, self.log_freq, self.total_steps = is_writer, log_freq, total_steps
        self.flops_per_token, self.num_devices, self.device = flops_per_token, num_devices, device
        self.peak_flops = device_peak_flops(device)
        self.file = self.tensorboard = None
        if is_writer:
            os.makedirs(dump_folder, exist_ok=True)
            self.file = open(os.path.join(dump_folder, "metrics.jsonl"), "a", encoding="utf-8")  # noqa: SIM115
            if enable_tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # takes a second to import

                self.tensorboard = SummaryWriter(os.path.join(dump_folder, "tensorboard"))
        self.start()

    def start(self) -> None:
        """Begins the interval over which the next logged step's speed is measured."""
        self.interval_start, self.interval_tokens, self.interval_steps = time.perf_counter(), 0, 0
        self.interval_waited = 0.0

    def is_log_step(self, step: int) -> bool:
        return step % self.log_freq == 0 or step == self.total_steps or step == 1

    def count(self, tokens: int, seconds_waited: float = 0.0) -> None:
        """A step: its tokens, and how long it has waited for them."""
        self.interval_waited += seconds_waited
        self.interval_tokens += tokens
        self.interval_steps += 1

    def log(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens_seen: int,
        experts: dict | None = None,
        validation: dict | None = None,
    ) -> None:
        """Reports a step. The caller has read loss from the device, so that the clock sees finished work. experts: what
        `training/balance.py` reports, a list by layer each; validation: what `training/validation.py` does."""
        if not self.is_writer:
            return
        validation = validation or {}
        seconds = time.perf_counter() - self.interval_start - validation.get("validation_seconds", 0.0)
        tokens_per_second = self.interval_tokens / seconds
        flops = self.flops_per_token * tokens_per_second / self.num_devices
        row = dict(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_seen=tokens_seen,
            tokens_per_second=tokens_per_second,
            tokens_per_second_per_device=tokens_per_second / self.num_devices,
            tflops=flops / 1e12,
            mfu=flops / self.peak_flops if self.peak_flops else None,
            memory_gib=peak_memory_gib(self.device),
            seconds=seconds / self.interval_steps,
            data_seconds=self.interval_waited / self.interval_steps,
            **(experts or {}),
            **validation,
        )
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.tensorboard:
            for key, value in row.items():
                if isinstance(value, list):
                    for i, of_layer in enumerate(value):
                        self.tensorboard.add_scalar(f"{key}/{i}", of_layer, step)
                elif key != "step" and value is not None:
                    self.tensorboard.add_scalar(key, value, step)
        print(self._line(row), flush=True)
        warning = collapse_warning(experts or {})
        if warning:
            print(warning, flush=True)
        self.start()

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
        if self.file:
            self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
