"""Each parallelism in twenty lines: one step of the model on one device, the same step on several ranks, and every
parameter's gradient equal.

There is no configuration and no trainer here: only the model, the functions that train.py calls, and torch. A rank
builds the model on meta, applies one parallelism, allocates memory, draws the initial weights, and runs forward and
backward of its part of the batch. The loss is a sum over tokens, divided by the number of tokens of the whole batch.
All of it is float64, so that gradients agree to 1e-12. Every layout, through train.py: test_parity.py.
"""

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from model import ModelArgs, Transformer
from parallelize import (
    build_mesh,
    build_pipeline,
    check_parameters,
    init_weights,
    materialize,
    parallelize_context,
    parallelize_data,
    parallelize_experts,
    parallelize_pipeline,
    parallelize_tensor,
    shard_sequence,
)
from resilience.process_group import init_distributed

DENSE = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)
MOE = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64,
                n_experts=4, top_k=2, moe_hidden_dim=16, n_shared_experts=1, n_dense_layers=1)  # fmt: skip
BATCH, SEQ = 4, 16
CPU = torch.device("cpu")
FSDP = dict(param_dtype=torch.float64, reduce_dtype=torch.float64, reshard_after_forward=True, cpu_offload=False)


def whole_batch() -> dict[str, torch.Tensor]:
    """Tokens, labels and positions, [BATCH, SEQ]. Some labels are ignored, so that ranks have unequal numbers of
    them."""
    ids = torch.randint(64, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].where(torch.arange(SEQ) % torch.tensor([[2], [3], [5], [7]]) != 0, -100)
    return dict(x=ids[:, :-1], labels=labels, positions=torch.arange(SEQ).expand(BATCH, SEQ))


def num_tokens() -> int:
    return int((whole_batch()["labels"] >= 0).sum())


def on_meta(args: ModelArgs, loss_chunk_size: int = 0) -> Transformer:
    with torch.device("meta"):
        return Transformer(args, loss_chunk_size).double()


def start(*stages: nn.Module) -> None:
    """Memory, and initial values that depend on nothing but the seed and the parameter's name."""
    for stage in stages:
        materialize(stage, CPU, cpu_offload=False)
        init_weights(stage, stage.args, seed=0)


def gradients(*stages: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's whole gradient. A collective."""
    named = [item for stage in stages for item in stage.named_parameters()]
    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in named}


def reference(args: ModelArgs) -> dict[str, torch.Tensor]:
    """The step on one device: what every parallelism must equal."""
    model = on_meta(args)
    start(model)
    (model(**whole_batch()) / num_tokens()).backward()
    return gradients(model)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


# ----------------------------------------------------------------------------------------------------- FSDP and HSDP


def data_parallel_step(dp_replicate: int) -> dict[str, torch.Tensor]:
    init_distributed("cpu", 60)
    ranks = torch.distributed.get_world_size()
    mesh = build_mesh("cpu", ranks, dp_replicate=dp_replicate)
    model = on_meta(DENSE)
    parallelize_data(model, mesh.fsdp, **FSDP)
    start(model)
    mine = {name: tensor.chunk(ranks)[mesh.dp_rank] for name, tensor in whole_batch().items()}
    (model(**mine) / num_tokens()).backward()
    return gradients(model)


def test_fsdp_equals_one_process():
    """Two ranks, each with half of every weight and half of the batch."""
    assert_equal(run_ranks(2, data_parallel_step, 1)[0], reference(DENSE))


def test_hsdp_equals_one_process():
    """Four ranks: two replicas of the model, each sharded over two ranks."""
    assert_equal(run_ranks(4, data_parallel_step, 2)[0], reference(DENSE))


# ------------------------------------------------------------------------------------------------------------- tensor


def tensor_parallel_step(loss_chunk_size: int) -> dict[str, torch.Tensor]:
    init_distributed("cpu", 60)
    mesh = build_mesh("cpu", 2, tp=2)
    model = on_meta(DENSE, loss_chunk_size)
    parallelize_tensor(model, mesh.tp)
    parallelize_data(model, mesh.fsdp, **FSDP)  # over one rank: it sums the gradients of replicated weights over tp
    check_parameters(model, mesh)
    start(model)
    (model(**whole_batch()) / num_tokens()).backward()  # both ranks read the whole batch
    return gradients(model)


@pytest.mark.parametrize("loss_chunk_size", [0, 24])
def test_tensor_parallel_equals_one_process(loss_chunk_size):
    """Two ranks, each with half of every matrix and of the vocabulary; with the reference loss, and in chunks."""
    assert_equal(run_ranks(2, tensor_parallel_step, loss_chunk_size)[0], reference(DENSE))


# ------------------------------------------------------------------------------------------------------------ context


def context_parallel_step(method: str) -> dict[str, torch.Tensor]:
    init_distributed("cpu", 60)
    mesh = build_mesh("cpu", 2, cp=2)
    model = on_meta(DENSE)
    parallelize_context(model, mesh.cp, method=method, seq_len=SEQ)
    parallelize_data(model, mesh.fsdp, **FSDP)  # weights are sharded over the context ranks too
    start(model)
    mine = shard_sequence(whole_batch(), mesh.cp)
    (model(**mine) / num_tokens()).backward()
    return gradients(model)


@pytest.mark.parametrize("method", ["allgather", "alltoall"])
def test_context_parallel_equals_one_process(method):
    """Two ranks, each with two chunks of every sequence."""
    assert_equal(run_ranks(2, context_parallel_step, method)[0], reference(DENSE))


# ------------------------------------------------------------------------------------------------------------ experts


def expert_parallel_step() -> dict[str, torch.Tensor]:
    init_distributed("cpu", 60)
    mesh = build_mesh("cpu", 2, ep=2)
    model = on_meta(MOE)
    parallelize_experts(model, mesh.ep, mesh.sequence)
    parallelize_data(model, mesh.fsdp, mesh.efsdp, **FSDP)
    check_parameters(model, mesh)
    start(model)
    mine = {name: tensor.chunk(2)[mesh.dp_rank] for name, tensor in whole_batch().items()}
    (model(**mine) / num_tokens()).backward()
    return gradients(model)


def test_expert_parallel_equals_one_process():
    """Two ranks, each with two of four experts, and half of the batch."""
    assert_equal(run_ranks(2, expert_parallel_step)[0], reference(MOE))


# ----------------------------------------------------------------------------------------------------------- pipeline


def pipeline_step(schedule: str) -> dict[str, torch.Tensor]:
    init_distributed("cpu", 60)
    mesh = build_mesh("cpu", 2, pp=2)
    stages = parallelize_pipeline(on_meta(DENSE), mesh.pp, schedule, 0)
    start(*stages)
    forward_backward, _ = build_pipeline(
        stages, mesh.pp, schedule=schedule, batch_size=BATCH, microbatch_size=1, seq_len=SEQ,
        dtype=torch.float64, device=CPU,
    )  # fmt: skip
    batch = whole_batch()
    forward_backward(batch | {"tokens": batch.pop("x")}, torch.tensor(num_tokens()))
    return gradients(*stages)  # of this rank's stages


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_pipeline_equals_one_process(schedule):
    """Two ranks, each with one of two blocks; four microbatches of one sequence."""
    first, last = run_ranks(2, pipeline_step, schedule)
    assert not first.keys() & last.keys()
    assert_equal(first | last, reference(DENSE))
