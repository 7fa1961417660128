"""Activation checkpointing: recomputed values are right, kept bytes are the docstring's, and nothing expensive runs
twice."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.blocks import (
    ARGS,
    BATCH,
    SEQ,
    run_blocks,
    shard_blocks,
    stream,
    tokens_and_positions,
    whole_gradients,
)
from helpers.ranks import run_ranks
from helpers.runs import argv
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import limits
from config import load_config
from model import Transformer
from parallelize import ParallelDims, apply_activation_checkpointing

MODES = {
    "none": dict(mode="none", selective_option="op"),
    "full": dict(mode="full", selective_option="op"),
    "op": dict(mode="selective", selective_option="op"),
    "every second": dict(mode="selective", selective_option="2"),
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
    apply_activation_checkpointing(model, **MODES[name])
    return model


@pytest.mark.parametrize("name", ["full", "op", "every second"])
def test_recomputed_gradients_equal_kept_ones(name):
    """Loss and gradients are equal to the last bit, and no parameter changes its name."""
    results = []
    for model in (build("none"), build(name)):
        loss = model(*tokens_and_positions()).square().mean()
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, gradients), (loss_recomputed, recomputed) = results
    assert torch.equal(loss, loss_recomputed) and gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[n], recomputed[n]) for n in gradients)


def test_bytes_kept_equal_docstring():
    """Bytes per block and token in bfloat16, of the memory that is really alive after forward."""
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


def test_backward_recomputes_what_docstring_says():
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


def test_every_nth_block_counts_blocks_of_the_whole_model():
    """A pipeline stage recomputes the blocks that the whole model would."""
    stage = Transformer(ARGS)
    for i in ("0", "2"):
        del stage.layers[i]
    apply_activation_checkpointing(stage, mode="selective", selective_option="4")
    assert ["forward" in vars(block) for block in stage.layers.values()] == [False, True]  # 1 and 3


def test_copied_model_recomputes_with_its_weights():
    """A deep copy of a model does not call the original's blocks."""
    model = build("op")
    copied = copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    copied(*tokens_and_positions()).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in copied.parameters())


@pytest.mark.parametrize(
    "mode, option, message",
    [
        ("ful", "op", "activation_checkpoint.mode: expected"),
        ("selective", "5", '("5") must be "op" or a number n from 1 to 4 (model.n_layers)'),
        ("selective", "0", '("0") must be'),
        ("selective", "-1", '("-1") must be'),
        ("selective", "ops", '("ops") must be'),
        ("memory_budget", "1.5", '("1.5") must be a number from 0 to 1'),
        ("memory_budget", "nan", '("nan") must be a number from 0 to 1'),
    ],
)
def test_activation_checkpointing_rejects_impossible_option(mode, option, message):
    """The error is one line, with the value that was given and the values that are allowed."""
    mesh, options = SimpleNamespace(degrees=ParallelDims()), dict(mode=mode, selective_option=option)
    with pytest.raises(ValueError) as error:
        config = load_config(argv({f"activation_checkpoint.{name}": value for name, value in options.items()}))
        raise ValueError(next(limits.recomputation(config, ARGS, mesh, None), ""))
    assert message in str(error.value) and "\n" not in str(error.value)


def _on_two_ranks(layout: str):
    """Every mode under tensor parallelism or FSDP: what ran in backward, and the gradients."""
    dist.init_process_group("gloo")
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for name, options in MODES.items():
        torch.manual_seed(0)
        model, x = Transformer(ARGS).double(), stream()
        if layout == "tp":
            x = x.chunk(2, dim=1)[dist.get_rank()]
            shard_blocks(model, mesh)
        apply_activation_checkpointing(model, **options)
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
def test_recomputation_on_two_ranks_equals_one_process(layout):
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
