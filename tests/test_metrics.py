"""What a line of metrics.jsonl says of an interval, and in which order."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.runs import read_metrics

from training.metrics import Metrics


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_metrics_of_an_interval_are_means_over_its_steps(one_rank, tmp_path):
    """Speed, seconds and data_seconds are of the steps since the last logged step or start, and the time of validation
    does not count; the row keeps the order of its columns, and null stands for NaN."""
    metrics = Metrics(
        str(tmp_path), torch.device("cpu"), total_steps=20, flops_per_token=10, log_freq=4, enable_tensorboard=False
    )
    assert [step for step in range(1, 21) if metrics.is_log_step(step)] == [1, 4, 8, 12, 16, 20]
    state = SimpleNamespace(step=10, tokens_seen=1000)  # a resumed run
    metrics.start(state)
    for step, loss in ((12, math.nan), (16, 2.0)):
        time.sleep(0.2)
        state.step, state.tokens_seen = step, step * 100
        numbers = dict(loss=loss, grad_norm=1.0, lr=0.1, data_seconds=0.08, skipped_steps=0, failed_saves=0)
        metrics.log(state, **numbers, expert_idle=[0.0], validation_loss=3.0, validation_seconds=0.1)
    metrics.close()
    first, second = read_metrics(tmp_path)
    assert list(first) == [
        "step", "loss", "grad_norm", "lr", "tokens_seen", "tokens_per_second", "tokens_per_second_per_device", "tflops",
        "mfu", "memory_gib", "seconds", "data_seconds", "skipped_steps", "failed_saves", "expert_idle",
        "validation_loss", "validation_seconds",
    ]  # fmt: skip
    assert first["loss"] is None and first["mfu"] is None and second["loss"] == 2.0
    for row, steps in ((first, 2), (second, 4)):
        assert row["tokens_seen"] == row["step"] * 100 and row["data_seconds"] == 0.08 / steps
        assert row["seconds"] * steps >= 0.1
        assert row["tokens_per_second"] == pytest.approx(100 / row["seconds"])
        assert row["tflops"] == pytest.approx(row["tokens_per_second"] * 10 / 1e12)
