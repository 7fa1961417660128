"""Compiled blocks compute the same as eager ones, and are compiled once: not per layer, not again at a later step."""

import pytest
import torch
import torch.distributed as dist
from helpers.blocks import (
    ARGS,
    BATCH,
    ROPE,
    SEQ,
    run_blocks,
    shard_blocks,
    stream,
    tokens_and_positions,
    whole_gradients,
)
from helpers.ranks import run_ranks
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from model import Transformer
from parallelize import apply_activation_checkpointing, apply_compile
from torch_private import set_activation_memory_budget

RECOMPUTATION = {
    "none": dict(mode="none", selective_option="op"),
    "full": dict(mode="full", selective_option="op"),
    "op": dict(mode="selective", selective_option="op"),
    "memory_budget": dict(mode="memory_budget", selective_option="0.5"),
}
OPTIONS = dict(enable=True, param_dtype=torch.float32, separate_experts=False)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    set_activation_memory_budget(1.0)


def build(backend: str | None, name: str = "none", dtype=torch.float32, **changes: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ARGS).to(dtype)
    apply_activation_checkpointing(model, **RECOMPUTATION[name] | changes)
    apply_compile(model, **OPTIONS | dict(enable=backend is not None), backend=backend)
    return model


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(*tokens_and_positions()).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", RECOMPUTATION)
def test_compiled_gradients_equal_eager_with_one_graph(name):
    """With and without recomputation, the four blocks share one graph, and later steps use it again. The loss and every
    gradient equal those of blocks that are neither compiled nor recomputed."""
    expected_loss, expected = loss_and_gradients(build(None))
    model = build("aot_eager", name)
    loss, gradients = loss_and_gradients(model)
    assert counters["stats"]["unique_graphs"] == 1 and ARGS.n_layers > 1
    loss_and_gradients(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    for n in expected:
        torch.testing.assert_close(gradients[n], expected[n], rtol=1e-4, atol=1e-5, msg=n)


def test_inductor_gradients_equal_eager():
    """The default backend agrees with eager, with activation checkpointing by operator."""
    expected_loss, expected = loss_and_gradients(build(None))
    loss, gradients = loss_and_gradients(build("inductor", "op"))
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    for n in expected:
        torch.testing.assert_close(gradients[n], expected[n], rtol=1e-4, atol=1e-5, msg=n)


def test_compiled_block_keeps_what_budget_or_operators_allow():
    """A memory budget of 1 is what the compiler does by itself. Half the budget keeps about half of the bytes, and 0
    nearly none. "op" keeps what its docstring says."""

    def kept(name, **changes):
        torch._dynamo.reset()
        model = build("aot_eager", name, **changes)
        out, _ = model.layers["0"](stream(torch.float32).requires_grad_(), *ROPE)
        held = {t.untyped_storage()._cdata: t.untyped_storage() for t in out.grad_fn.saved_tensors}
        given = {t.untyped_storage()._cdata for t in (*model.parameters(), *ROPE)}
        return sum(s.nbytes() for key, s in held.items() if key not in given) / (BATCH * SEQ)

    by_itself, half, nothing = (kept("memory_budget", selective_option=budget) for budget in ("1.0", "0.5", "0.0"))
    assert by_itself == kept("none") and 0.4 * by_itself < half < 0.65 * by_itself and nothing < 0.2 * by_itself
    d, k, f, h = ARGS.dim, ARGS.n_kv_heads * ARGS.head_dim, ARGS.hidden_dim, ARGS.n_heads
    assert kept("op") == 2 * (6 * d + 2 * k + 2 * f) + 4 * h  # float32


def test_compile_rejects_unknown_backend():
    """The error names the backend, and the backends that torch knows."""
    with pytest.raises(ValueError, match=r'compile.backend \("inducter"\) must be one of .*inductor'):
        build("inducter")


def _on_two_ranks(layout: str, precision: str):
    """Checkpointing by operator, compile and FSDP on two ranks, over tensor parallelism or not: the graphs after the
    first and the last step, and the gradients."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1) if layout == "fsdp" else (1, 2), mesh_dim_names=("fsdp", "tp"))
    fsdp, tp = mesh["fsdp"], mesh["tp"]  # sliced once: a slice for each block would cost a compilation for each
    torch.manual_seed(0)
    model, x = Transformer(ARGS), stream(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    if layout == "tp":
        x = x.chunk(2, dim=1)[dist.get_rank()]
        shard_blocks(model, tp)
    apply_activation_checkpointing(model, **RECOMPUTATION["op"])
    apply_compile(model, backend="aot_eager", **OPTIONS)
    policy = MixedPrecisionPolicy(getattr(torch, precision), torch.float32, cast_forward_inputs=False)
    for block in model.layers.values():
        fully_shard(block, mesh=fsdp, mp_policy=policy)
    for step in range(3):
        model.zero_grad()
        out = run_blocks(model, x.clone().requires_grad_())
        out.backward(torch.ones_like(out))
        if step == 0:
            graphs = counters["stats"]["unique_graphs"]
    return graphs, counters["stats"]["unique_graphs"], whole_gradients(model)


@pytest.mark.parametrize("layout, precision", [("tp", "float32"), ("fsdp", "float32"), ("fsdp", "bfloat16")])
def test_compiled_blocks_on_two_ranks_equal_eager_on_one(layout, precision):
    """Each rank compiles once, and the gradients are those of one eager process, under tensor parallelism and FSDP."""
    torch.manual_seed(0)
    reference = Transformer(ARGS)
    run_blocks(reference, stream(torch.float32)).backward(torch.ones(BATCH, SEQ, ARGS.dim))
    expected = whole_gradients(reference)
    for graphs, graphs_at_the_end, gradients in run_ranks(2, _on_two_ranks, layout, precision):
        assert graphs == 1 and graphs_at_the_end == 1
        for n in expected:
            error = (gradients[n] - expected[n]).norm() / expected[n].norm()
            assert error < (1e-5 if precision == "float32" else 0.03), (n, error)
