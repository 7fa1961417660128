"""What is recomputed is computed right, what is kept is what the docstring says, and nothing dear is done twice."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import ModelArgs, Transformer
from model.rope import rope_cos_sin
from parallelize.activation import apply_activation_checkpointing

ARGS = ModelArgs(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)
BATCH, SEQ = 2, 16
ROPE = rope_cos_sin(torch.arange(SEQ).expand(BATCH, SEQ), ARGS)
MODES = {  # name: (mode, selective)
    "none": ("none", "op"),
    "full": ("full", "op"),
    "op": ("selective", "op"),
    "every second": ("selective", "2"),
}


class Watch(TorchDispatchMode):
    """Counts the operations that really run (what a checkpoint answers from its memory does not come here), and
    remembers every piece of memory that they made."""

    def __init__(self):
        super().__init__()
        self.count, self.made = Counter(), {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.count[op._opname] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_alive(self, but: set[int]) -> int:
        return sum(n for key, (ref, n) in self.made.items() if key not in but and not ref.expired())

    def attentions(self) -> int:
        return self.count["_scaled_dot_product_flash_attention_for_cpu"]


def build(name: str, dtype=torch.float64) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ARGS).to(dtype)
    mode, selective = MODES[name]
    apply_activation_checkpointing(model, mode=mode, selective=selective, memory_budget=1.0)
    return model


def tokens_and_positions():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ARGS.vocab_size, (BATCH, SEQ), generator=generator)
    return tokens, torch.arange(SEQ).expand(BATCH, SEQ)


def run_blocks(model, x):
    cos, sin = ROPE
    for block in model.layers.values():
        x, _ = block(x, cos, sin)
    return x


def stream(dtype=torch.float64):
    # Cast and not drawn in dtype: torch draws other numbers for other types.
    return torch.randn(BATCH, SEQ, ARGS.dim, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("name", ["full", "op", "every second"])
def test_recomputed_gradients_are_the_same(name):
    """To the last bit, as is the loss; and no parameter has another name."""
    results = []
    for model in (build("none"), build(name)):
        loss = model(*tokens_and_positions()).square().mean()
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, gradients), (loss_recomputed, recomputed) = results
    assert torch.equal(loss, loss_recomputed) and gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[n], recomputed[n]) for n in gradients)


def test_bytes_kept_are_those_of_the_docstring():
    """Per block and token in bfloat16, on memory that is really alive after forward."""
    kept = {}
    for name in MODES:
        model, x = build(name, torch.bfloat16), stream(torch.bfloat16).requires_grad_()
        with Watch() as watch:
            out = run_blocks(model, x)
        alive = watch.bytes_alive(but={p.untyped_storage()._cdata for p in (out, *model.parameters())})
        kept[name] = (alive + x.nbytes) / (BATCH * SEQ * ARGS.n_layers)
    d, k, f, h = ARGS.dim, ARGS.n_kv_heads * ARGS.head_dim, ARGS.hidden_dim, ARGS.n_heads
    assert kept["full"] == 2 * d
    assert kept["op"] == 6 * d + 2 * k + 2 * f + 4 * h
    # On a CPU an RMSNorm is not one kernel: it keeps two float32 copies (and a number) in place of its input.
    inputs = {"none": 1 / ARGS.n_layers, "every second": (1 + ARGS.n_layers / 2) / ARGS.n_layers}
    inner = 8 * d + 4 * k + 8 * f + 4 * h + 2 * (8 * d + 4)
    assert kept["none"] == inner + inputs["none"] * 2 * d
    assert kept["every second"] == inner / 2 + inputs["every second"] * 2 * d


def test_what_runs_again_in_backward():
    """full: attention and six of the seven matrix products of every block; every second: of half of the blocks; op: no
    attention, and three products."""
    again = {}
    for name in MODES:
        model = build(name)
        out = run_blocks(model, stream().requires_grad_())
        with Watch() as watch:
            out.backward(torch.ones_like(out))
        again[name] = (watch.attentions(), watch.count["mm"] - ARGS.n_layers * 7 * 2)
    n = ARGS.n_layers
    assert again == {"none": (0, 0), "full": (n, 6 * n), "op": (0, 3 * n), "every second": (n // 2, 6 * n // 2)}


def test_blocks_are_counted_in_the_whole_model():
    """A pipeline stage recomputes those of its blocks that the whole model would."""
    stage = Transformer(ARGS)
    for i in ("0", "2"):
        del stage.layers[i]
    apply_activation_checkpointing(stage, mode="selective", selective="4", memory_budget=1.0)
    assert ["forward" in vars(block) for block in stage.layers.values()] == [False, True]  # 1 and 3


def test_a_copy_recomputes_with_its_own_weights():
    """A deep copy of a model does not call the original's blocks."""
    model = build("op")
    copied = copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    copied(*tokens_and_positions()).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in copied.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mode="ful"), 'mode ("ful") must be "none", "full", "selective" or "memory_budget".'),
        (dict(mode="selective", selective="5"), '("5") must be "op" or a number n from 1 to 4 (model.n_layers)'),
        (dict(mode="selective", selective="0"), '("0") must be'),
        (dict(mode="selective", selective="-1"), '("-1") must be'),
        (dict(mode="selective", selective="ops"), '("ops") must be'),
        (dict(mode="memory_budget", memory_budget=1.5), "memory_budget (1.5) must be from 0 to 1."),
        (dict(mode="memory_budget", memory_budget=float("nan")), "memory_budget (nan) must be"),
    ],
)
def test_what_is_refused(options, message):
    """In one line that holds what was given and what is allowed; no block has been changed."""
    model = Transformer(ARGS)
    with pytest.raises(ValueError) as error:
        apply_activation_checkpointing(model, **(dict(selective="op", memory_budget=0.5) | options))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not any("forward" in vars(block) for block in model.layers.values())


def cut(block, mesh) -> None:
    """Tensor and sequence parallelism of one block."""
    plan = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(block, mesh, plan)


def whole_gradients(model) -> dict:
    gradients = {n: p.grad for n, p in model.layers.named_parameters()}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def _on_two_ranks(layout: str):
    """Every mode under tensor parallelism or FSDP: what ran in backward, and the gradients."""
    dist.init_process_group("gloo")
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for name in MODES:
        torch.manual_seed(0)
        model, (mode, selective) = Transformer(ARGS).double(), MODES[name]
        x = stream()
        if layout == "tp":
            x = x.chunk(2, dim=1)[dist.get_rank()]
            for block in model.layers.values():
                cut(block, mesh)
        apply_activation_checkpointing(model, mode=mode, selective=selective, memory_budget=1.0)
        if layout == "fsdp":
            for block in model.layers.values():
                fully_shard(block, mesh=mesh)
        out = run_blocks(model, x.clone().requires_grad_())
        with Watch() as watch:
            out.backward(torch.ones_like(out))
        collectives = {n: watch.count[f"{n}_tensor"] for n in ("all_gather_into", "reduce_scatter")}
        results[name] = (watch.attentions(), collectives, whole_gradients(model))
    return results


@pytest.mark.parametrize("layout", ["tp", "fsdp"])
def test_recomputation_on_two_ranks(layout):
    """Gradients are one process's. Under tensor parallelism "op" repeats no collective, and full those of the block's
    forward but its last."""
    reference = build("none")
    run_blocks(reference, stream()).backward(torch.ones(BATCH, SEQ, ARGS.dim))
    expected = whole_gradients(reference)
    for results in run_ranks(2, _on_two_ranks, layout):
        for name, (attentions, collectives, gradients) in results.items():
            for n in expected:
                torch.testing.assert_close(gradients[n], expected[n], rtol=1e-12, atol=1e-12, msg=f"{name} {n}")
            recomputed = {"none": 0, "full": 4, "op": 0, "every second": 2}[name]  # blocks, as a whole
            assert attentions == recomputed
            if layout == "tp":
                assert collectives == {"all_gather_into": 8 + 2 * recomputed, "reduce_scatter": 8 + recomputed}, name
