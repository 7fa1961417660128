"""Kernels on a GPU: grouped products, initial weights, attention."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.cuda_runs import needs_gpu
from helpers.flavors import BUILT_IN_FLAVORS
from torch.utils._python_dispatch import TorchDispatchMode

from model import ModelArgs, Transformer, get_flavor
from model.attention import CoreAttention, DocumentMask
from model.init import fill_initial_values
from model.moe import experts_grouped, experts_in_a_loop
from parallelize import styles
from parallelize.context import AllGatherKVAttention, CPDocumentMask, shard_sequence, undo_zigzag
from parallelize.init import init_weights

pytestmark = needs_gpu

FUSED = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention")  # fmt: skip


def test_grouped_product_equals_loop_over_experts():
    """Compared with float32, results and gradients of the grouped product have at most twice the error of the loop over
    experts in bfloat16. One expert has no token."""
    generator = torch.Generator("cuda").manual_seed(0)
    counts = torch.tensor([300, 0, 17, 1, 500, 66, 100, 40], device="cuda")
    shapes = [(1024, 256), (8, 256, 128), (8, 128, 256), (8, 256, 128), (1024, 256)]
    *inputs, gradient = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]

    def results(run, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = run(leaves[0], counts, *leaves[1:])
        return [x.float() for x in (out, *torch.autograd.grad(out, leaves, gradient.to(dtype)))]

    exact = results(experts_in_a_loop, torch.float32)
    for truth, loop, grouped in zip(
        exact, results(experts_in_a_loop, torch.bfloat16), results(experts_grouped, torch.bfloat16), strict=True
    ):
        error_of_loop, error_of_grouped = ((x - truth).norm() / truth.norm() for x in (loop, grouped))
        assert error_of_loop < 0.02 and error_of_grouped < 2 * error_of_loop, (error_of_loop, error_of_grouped)


# -------------------------------------------------------------------------------------- initial weights


def test_part_of_an_initial_weight_equals_the_whole():
    """Bit for bit, for any rows and columns: neighbours, every third row; also where a call draws several blocks."""
    args, name, shape = ModelArgs(dim=256, vocab_size=128256), "tok_embeddings.weight", torch.Size((128256, 256))
    rows, columns = (torch.arange(size, device="cuda") for size in shape)

    def draw(*indices):
        local = torch.full([len(i) for i in indices], math.nan, device="cuda")
        fill_initial_values(local, name, shape, list(indices), args, seed=0)
        return local

    whole = draw(rows, columns)
    for part in (rows.chunk(7)[3], rows[5::3], torch.cat((rows[:9], rows[-1000:]))):
        for across in (columns, columns.chunk(4)[1], columns[1::2]):
            assert torch.equal(draw(part, across), whole[part][:, across])


def test_initial_weights_equal_those_of_the_cpu():
    """To 1e-6 of a value, 8 steps of float32: the last bits differ, because the GPU has another erfinv."""
    args = ModelArgs(n_layers=2)
    models = {device: Transformer(args).to(device) for device in ("cpu", "cuda")}
    for model in models.values():
        init_weights(model, args, seed=0)
    expected = dict(models["cpu"].named_parameters())
    for name, parameter in models["cuda"].named_parameters():
        torch.testing.assert_close(parameter.detach().cpu(), expected[name].detach(), rtol=1e-6, atol=1e-8, msg=name)


# -------------------------------------------------------------------------------------------- attention


class Kernels(TorchDispatchMode):
    """Records the names of the attention operators that run, and of softmax, which only runs without a fused kernel."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        if "attention" in name or "softmax" in name:
            self.seen.append(name)
        return op(*args, **(kwargs or {}))


def heads(batch: int, seq: int, n_heads: int, n_kv_heads: int, d_qk: int, d_v: int) -> list[torch.Tensor]:
    """q, k, v and a gradient of the result in bfloat16; each call returns the same numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(batch, seq, n, d, device="cuda", generator=generator).bfloat16()
        for n, d in ((n_heads, d_qk), (n_kv_heads, d_qk), (n_kv_heads, d_v), (n_heads, d_v))
    ]


@pytest.mark.parametrize("flavor", BUILT_IN_FLAVORS)
def test_attention_takes_a_fused_kernel(flavor):
    """For the heads of every flavor, forward and backward run a fused kernel: no tensor is batch x heads x seq x
    seq."""
    args = get_flavor(flavor)
    q, k, v, gradient = heads(1, 1024, args.n_heads, args.n_kv_heads, args.head_dim, args.value_head_dim)
    with Kernels() as kernels:
        CoreAttention()(q.requires_grad_(), k.requires_grad_(), v.requires_grad_()).backward(gradient)
    (forward, backward) = kernels.seen
    assert forward in FUSED and backward == f"{forward}_backward"


class FakeGather:
    """Takes the place of DTensor: its all-gather returns `together`."""

    together = None

    @classmethod
    def from_local(cls, local, mesh, placements, run_check):
        assert torch.equal(local[0], cls.together[mesh.get_local_rank()])
        return cls()

    def redistribute(self, placements):
        return self

    def to_local(self, grad_placements):
        return self.together


def test_attention_of_context_ranks_equals_the_whole(monkeypatch):
    """Each of four ranks computes its part of grouped-query attention by the flash kernel with a lower-right causal
    mask. Compared with float32, results and gradients have less than three times the error of one call in bfloat16."""
    monkeypatch.setattr(styles, "DTensor", FakeGather)
    *inputs, gradient = heads(2, 2048, 8, 2, 128, 128)
    size = 4
    meshes = [SimpleNamespace(size=lambda: size, get_local_rank=lambda r=r: r) for r in range(size)]

    def by_ranks(q, k, v):
        parts = [shard_sequence(dict(q=q, k=k, v=v), mesh) for mesh in meshes]
        # Not detached: here autograd sums the keys' gradients over the ranks, in a real run the reduce-scatter does.
        FakeGather.together = torch.stack([torch.cat((part["k"], part["v"]), dim=-1) for part in parts])
        outputs = []
        for mesh, part in zip(meshes, parts, strict=True):
            attention = AllGatherKVAttention(CoreAttention(), mesh, q.size(1))
            with Kernels() as kernels:
                outputs.append(attention(**part))
            # The first rank's first chunk sees as many keys as it has queries, so any causal kernel may run.
            assert kernels.seen[1] == FUSED[1] and kernels.seen[0] in (FUSED if mesh is meshes[0] else FUSED[1:2])
            assert len(kernels.seen) == 2
        return undo_zigzag(torch.stack(outputs))

    def results(attention, dtype=torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attention(*leaves)
        return [x.float() for x in (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype)))]

    exact = results(CoreAttention(), torch.float32)
    for name, truth, one, four in zip(
        ("out", "dq", "dk", "dv"), exact, results(CoreAttention()), results(by_ranks), strict=True
    ):
        error_of_one, error_of_four = ((x - truth).norm() / truth.norm() for x in (one, four))
        # A key's gradient is a sum over four ranks, rounded each time. A wrong mask would give an error of about 1.
        assert error_of_one < 0.01 and error_of_four < 3 * error_of_one, (name, error_of_one, error_of_four)


HEADS = {(a.head_dim, a.value_head_dim, a.n_heads > a.n_kv_heads) for a in map(get_flavor, BUILT_IN_FLAVORS)}


@pytest.mark.parametrize("d_qk, d_v, grouped", sorted(HEADS))
def test_flex_attention_equals_explicit_mask(d_qk, d_v, grouped):
    """With packed documents and the heads of every flavor, for all queries and for those of a context rank. Compared
    with float32, FlexAttention's results and gradients have at most twice the error of the explicit mask in
    bfloat16."""
    torch.compiler.reset()  # torch compiles one function for at most eight shapes
    *inputs, gradient = heads(2, 1024, 8, 2 if grouped else 8, d_qk, d_v)
    documents = (torch.arange(1024, device="cuda") ** 1.3 // 700).long().expand(2, -1).contiguous()
    documents[1] = documents[1].flip(0).neg()
    parts = DocumentMask(), CPDocumentMask(SimpleNamespace(size=lambda: 4, get_local_rank=lambda: 1), 1024)
    for part in parts:
        here = part.queries(1024, gradient.device)

        def results(dtype, as_blocks, part=part, here=here):
            q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            out = CoreAttention(scale=0.1)(q[:, here], k, v, part(documents, as_blocks))
            return [x.float() for x in (out, *torch.autograd.grad(out, leaves, gradient[:, here].to(dtype)))]

        exact = results(torch.float32, False)
        for name, truth, explicit, blocks in zip(
            ("out", "dq", "dk", "dv"), exact, results(torch.bfloat16, False), results(torch.bfloat16, True), strict=True
        ):
            error_of_explicit, error_of_blocks = ((x - truth).norm() / truth.norm() for x in (explicit, blocks))
            assert error_of_explicit < 0.01 and error_of_blocks < 2 * error_of_explicit, (name, error_of_blocks)
