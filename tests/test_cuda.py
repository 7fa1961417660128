"""What only a GPU can show: its kernels, its precision, and that the CPU does not wait for it.

Small, one GPU, a few minutes; skipped where there is none. Whole runs are the real `train.main`, each in a process of
its own, on the text of these tests.
"""

import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from ranks import run_ranks
from runs import argv, options, read_metrics, run_command, series
from torch.utils._python_dispatch import TorchDispatchMode

from model import FLAVORS, ModelArgs, Transformer
from model.attention import CoreAttention
from model.init import fill_initial_values
from model.moe import experts_grouped, experts_in_a_loop
from parallelize import styles
from parallelize.context import GatheredAttention, in_order, shard_sequences
from parallelize.init import init_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SMALL = {  # sizes that float8's and attention's kernels take
    "job.device": "cuda", "model.dim": "256", "model.n_layers": "2", "model.n_heads": "4", "model.n_kv_heads": "2",
    "model.ffn_dim": "512", "model.vocab_size": "272", "data.dataset": "text", "data.path": str(ROOT / "tests/*.py"),
    "data.tokenizer": "byte", "training.seq_len": "256", "training.local_batch_size": "8", "training.steps": "30",
    "optimizer.lr": "0.001", "lr_scheduler.warmup_steps": "5", "metrics.log_freq": "1",
}  # fmt: skip
COMPILE = options(compile__enable="true")
FUSED = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention")  # fmt: skip


MIXTURE = {  # sizes that the grouped product takes
    "model.attention": "mla", "model.n_kv_heads": "4", "model.q_lora_rank": "64", "model.kv_lora_rank": "64",
    "model.qk_nope_head_dim": "64", "model.qk_rope_head_dim": "32", "model.v_head_dim": "64", "model.n_experts": "8",
    "model.n_experts_per_token": "2", "model.n_shared_experts": "1", "model.moe_ffn_dim": "128",
    "model.n_dense_layers": "1", "model.score_function": "sigmoid", "model.normalize_scores": "true",
    "model.expert_bias": "true", "model.balance_loss_weight": "0.001", "model.n_mtp_layers": "1",
}  # fmt: skip


# ------------------------------------------------------------------------------------------- whole runs


def _run(arguments: list[str], no_compilation_after: int | None) -> list[tuple[int, list[str]]]:
    """`train.py ARGUMENTS`. For every step, its number and the files whose lines made the CPU wait for the GPU, from
    after the step's data are on their way to the next one's. A compilation in a later step than that is an error."""
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train.main(load_config(arguments))
        torch.cuda.set_sync_debug_mode("default")
    waits = [
        [
            os.path.relpath(w.filename, ROOT)
            for w in caught[start:end]
            if "called a synchronizing CUDA operation" in str(w.message)
        ]
        for start, end in zip(marks, [*marks[1:], len(caught)], strict=True)
    ]
    return list(enumerate(waits, start=1))


def run(folder: Path, *settings: dict[str, str], no_compilation_after: int | None = None) -> dict:
    """A run's metrics, and by step what the CPU waited for."""
    where = {"job.dump_folder": str(folder / "run"), "data.cache_folder": str(folder / "cache")}
    (waits,) = run_ranks(1, _run, argv(SMALL, where, *settings), no_compilation_after)
    return dict(metrics=read_metrics(folder / "run"), waits=waits)


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory) -> list[float]:
    """The losses of 30 steps in bfloat16, eager: what others are held against."""
    losses = series(run(tmp_path_factory.mktemp("bfloat16")), "loss")
    assert losses[-1] < 0.7 * losses[0]
    return losses


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_trains_like_bfloat16(recipe, bfloat16, tmp_path):
    """On the hardware's own kernels each of 30 losses is within 2 % of bfloat16's (and not the same: it is float8)."""
    losses = series(run(tmp_path, options(float8__enable="true", float8__recipe=recipe)), "loss")
    assert losses == pytest.approx(bfloat16, rel=0.02) and losses != bfloat16


@pytest.mark.parametrize("more", [{}, options(activation_checkpoint__mode="selective")], ids=["none", "selective"])
def test_compiled_trains_like_eager(more, bfloat16, tmp_path):
    """Within 1 %, and nothing is compiled after the second step."""
    losses = series(run(tmp_path, COMPILE, more, no_compilation_after=2), "loss")
    assert losses == pytest.approx(bfloat16, rel=0.01)


def test_compiled_float8_trains_like_bfloat16(bfloat16, tmp_path):
    """Within 2 %, accumulating over two microbatches, and nothing is compiled after the second step."""
    more = options(float8__enable="true", training__local_batch_size="4", training__global_batch_size="8")
    losses = series(run(tmp_path, COMPILE, more, no_compilation_after=2), "loss")
    assert losses == pytest.approx(bfloat16, rel=0.02)


@pytest.mark.parametrize(
    "more",
    [
        {},
        options(training__dtype="bfloat16"),
        COMPILE | options(training__local_batch_size="4", training__global_batch_size="8"),
        COMPILE | options(float8__enable="true"),
        COMPILE | options(float8__enable="true", float8__enable_fsdp_float8_all_gather="true"),
    ],
    ids=["fsdp", "pure", "compiled", "float8", "float8 all-gather"],
)
def test_the_cpu_waits_once_a_step(more, tmp_path):
    """For the gradient's norm, which decides whether the weights may change; and for the loss, where it is logged."""
    waits = dict(run(tmp_path, more, options(training__steps="8", metrics__log_freq="6"))["waits"])
    assert [waits[step] for step in (3, 4, 5, 7)] == [["training/optimizer.py"]] * 4
    assert waits[6] == ["training/optimizer.py", "train.py"]


@pytest.mark.parametrize("more", [{}, COMPILE], ids=["eager", "compiled"])
def test_resume_is_exact(more, tmp_path):
    """5 + 5 steps equal 10 to the last bit, in bfloat16, with kernels that do not vary."""
    settings = [SMALL, {"data.cache_folder": str(tmp_path / "cache")}, more]
    settings += [options(training__deterministic="true", training__steps="10")]
    settings += [options(checkpoint__enable="true", checkpoint__interval="5")]
    for name, stops in (("straight", [None]), ("resumed", [5, None])):
        for stop in stops:
            lines = argv(*settings, {"job.dump_folder": str(tmp_path / name)})
            ended_well, printed = run_command(1, lines, tmp_path, stop_after=stop)
            assert ended_well == (stop is None), "\n".join(printed)
    assert any("resumed at step 5 " in line for line in printed)
    exact = [[(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / name)]
             for name in ("straight", "resumed")]  # fmt: skip
    assert exact[0] == exact[1] and len(exact[0]) == 10


# -------------------------------------------------------------------------------------------- mixtures


def test_grouped_product_is_the_loop():
    """Results and gradients of all experts in three products, one expert without any token: as exact as the loop over
    experts in bfloat16 is against float32, within a factor."""
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


def test_compiled_mixture_trains_like_eager(tmp_path):
    """DeepSeek-V3's parts: 30 losses within 1 %, nothing compiled after the second step; and where nothing is logged
    the CPU waits for the gradient's norm alone."""
    eager = series(run(tmp_path / "eager", MIXTURE), "loss")
    compiled = run(tmp_path / "compiled", MIXTURE, COMPILE, options(metrics__log_freq="10"), no_compilation_after=2)
    assert eager[-1] < 0.7 * eager[0]
    for row in compiled["metrics"]:
        assert row["loss"] == pytest.approx(eager[row["step"] - 1], rel=0.01)
    waits = dict(compiled["waits"])
    assert [waits[step] for step in (3, 7, 15)] == [["training/optimizer.py"]] * 3


# -------------------------------------------------------------------------------------- initial weights


def test_parts_of_a_weight_are_the_whole_ones():
    """Bit for bit, for any rectangle: rows, columns, every third row; and where one call draws in several blocks."""
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


def test_initial_weights_are_the_cpus():
    """But for the last bits, as erfinv is another function there: 1e-6 of a value, which is 8 steps of float32."""
    args = ModelArgs(n_layers=2)
    models = {device: Transformer(args).to(device) for device in ("cpu", "cuda")}
    for model in models.values():
        init_weights(model, args, seed=0)
    expected = dict(models["cpu"].named_parameters())
    for name, parameter in models["cuda"].named_parameters():
        torch.testing.assert_close(parameter.detach().cpu(), expected[name].detach(), rtol=1e-6, atol=1e-8, msg=name)


# -------------------------------------------------------------------------------------------- attention


class Kernels(TorchDispatchMode):
    """Names of the attention operations that run, and of what attention without a fused kernel is made of."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        if "attention" in name or "softmax" in name:
            self.seen.append(name)
        return op(*args, **(kwargs or {}))


def heads(batch: int, seq: int, n_heads: int, n_kv_heads: int, d_qk: int, d_v: int) -> list[torch.Tensor]:
    """q, k, v and a gradient of the result, bfloat16, the same whenever called."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(batch, seq, n, d, device="cuda", generator=generator).bfloat16()
        for n, d in ((n_heads, d_qk), (n_kv_heads, d_qk), (n_kv_heads, d_v), (n_heads, d_v))
    ]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_attention_takes_a_fused_kernel(flavor):
    """For the heads of every named model, forward and backward: nothing of batch x heads x seq x seq is made."""
    args = FLAVORS[flavor]
    q, k, v, gradient = heads(1, 1024, args.n_heads, args.n_kv_heads, args.head_dim, args.value_dim)
    with Kernels() as kernels:
        CoreAttention()(q.requires_grad_(), k.requires_grad_(), v.requires_grad_()).backward(gradient)
    (forward, backward) = kernels.seen
    assert forward in FUSED and backward == f"{forward}_backward"


class FakeGather:
    """In DTensor's place: what comes back from the all-gather is what `together` holds."""

    together = None

    @classmethod
    def from_local(cls, local, mesh, placements, run_check):
        assert torch.equal(local[0], cls.together[mesh.get_local_rank()])
        return cls()

    def redistribute(self, placements):
        return self

    def to_local(self, grad_placements):
        return self.together


def test_attention_of_context_ranks(monkeypatch):
    """The parts that each of four ranks computes of grouped-query attention, by the flash kernel with its causal
    mask at the lower right, are those of the whole: results and gradients, as exact as one bfloat16 call is against
    float32, within a factor."""
    monkeypatch.setattr(styles, "DTensor", FakeGather)
    *inputs, gradient = heads(2, 2048, 8, 2, 128, 128)
    size = 4
    meshes = [SimpleNamespace(size=lambda: size, get_local_rank=lambda r=r: r) for r in range(size)]

    def by_ranks(q, k, v):
        parts = [shard_sequences(dict(q=q, k=k, v=v), mesh) for mesh in meshes]
        # Not detached: the sum over the ranks of the keys' gradients is autograd's here, the reduce-scatter's there.
        FakeGather.together = torch.stack([torch.cat((part["k"], part["v"]), dim=-1) for part in parts])
        outputs = []
        for mesh, part in zip(meshes, parts, strict=True):
            attention = GatheredAttention(CoreAttention(), mesh, q.size(1))
            with Kernels() as kernels:
                outputs.append(attention(**part))
            # The first rank's first chunk sees as many keys as it has queries: any causal kernel will do.
            assert kernels.seen[1] == FUSED[1] and kernels.seen[0] in (FUSED if mesh is meshes[0] else FUSED[1:2])
            assert len(kernels.seen) == 2
        return in_order(torch.stack(outputs))

    def results(attention, dtype=torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attention(*leaves)
        return [x.float() for x in (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype)))]

    exact = results(CoreAttention(), torch.float32)
    for name, truth, one, four in zip(
        ("out", "dq", "dk", "dv"), exact, results(CoreAttention()), results(by_ranks), strict=True
    ):
        error_of_one, error_of_four = ((x - truth).norm() / truth.norm() for x in (one, four))
        # A key's gradient is a sum over four ranks, rounded each time. (A wrong mask is wrong by about 1.)
        assert error_of_one < 0.01 and error_of_four < 3 * error_of_one, (name, error_of_one, error_of_four)
