"""Small whole runs on one GPU for the tests: the real `train.main`, each in a new process. They record where the CPU
waits for the GPU, and what is compiled."""

import os
import threading
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import helpers.flavors  # noqa: F401 - MIXTURE names one of its flavors
from helpers.ranks import run_ranks
from helpers.runs import argv, options, read_metrics

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SMALL = {  # sizes that the kernels of float8 and of attention support
    "job.device": "cuda", "model.dim": "256", "model.n_layers": "2", "model.n_heads": "4", "model.n_kv_heads": "2",
    "model.hidden_dim": "512", "model.vocab_size": "272", "data.dataset": "text", "data.path": str(ROOT / "tests/*.py"),
    "data.tokenizer": "byte", "training.seq_len": "256", "training.local_batch_size": "8", "training.steps": "30",
    "optimizer.lr": "0.001", "lr_scheduler.warmup_steps": "5", "metrics.log_freq": "1",
}  # fmt: skip
COMPILE = options(compile__enable="true")
MIXTURE = {  # a mixture of experts with sizes that the grouped product supports
    "model.attention": "mla", "model.n_kv_heads": "4", "model.q_lora_rank": "64", "model.kv_lora_rank": "64",
    "model.qk_nope_head_dim": "64", "model.qk_rope_head_dim": "32", "model.v_head_dim": "64", "model.n_experts": "8",
    "model.top_k": "2", "model.n_shared_experts": "1", "model.moe_hidden_dim": "128",
    "model.n_dense_layers": "1", "model.flavor": "test_sigmoid_norm",
    "model.expert_bias": "true", "model.balance_loss_weight": "0.001", "model.n_mtp_layers": "1",
}  # fmt: skip


def _run(arguments: list[str], no_compilation_after: int | None) -> list[tuple[int, list[str]]]:
    """Runs `train.py ARGUMENTS`. For every step, its number and the files whose lines made the CPU wait for the GPU,
    from `count_valid_tokens` of this step to that of the next step. A compilation after step no_compilation_after is an
    error."""
    import train
    from config import load_config

    for name in ("RANK", "WORLD_SIZE"):  # one process without torchrun
        os.environ.pop(name)
    marks, count_valid_tokens = [], train.count_valid_tokens

    def marking(*args):
        marks.append(len(caught))
        if no_compilation_after is not None and len(marks) == no_compilation_after + 1:
            torch.compiler.set_stance("fail_on_recompile")
        return count_valid_tokens(*args)

    train.count_valid_tokens = marking
    caught, this_thread = [], threading.current_thread()  # other threads may wait

    def catch(message, category, filename, *_):
        if threading.current_thread() is this_thread and "called a synchronizing CUDA operation" in str(message):
            caught.append(os.path.relpath(filename, ROOT))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = catch
        torch.cuda.set_sync_debug_mode("warn")
        train.main(load_config(arguments))
        torch.cuda.set_sync_debug_mode("default")
    waits = [caught[start:end] for start, end in zip(marks, [*marks[1:], len(caught)], strict=True)]
    return list(enumerate(waits, start=1))


def run(folder: Path, *settings: dict[str, str], no_compilation_after: int | None = None) -> dict:
    """Trains; returns `metrics`, and `waits`: for each step, the files whose lines made the CPU wait."""
    where = {"job.dump_folder": str(folder / "run"), "data.cache_folder": str(folder / "cache")}
    (waits,) = run_ranks(1, _run, argv(SMALL, where, *settings), no_compilation_after)
    return dict(metrics=read_metrics(folder / "run"), waits=waits)
