"""Tensor and sequence parallelism (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198).

Idea: each weight matrix is cut in T parts. The first matrices of attention and feed-forward are cut by output rows, so
that a rank has whole heads and whole hidden channels, the last by input columns, so that ranks hold parts of a sum.
Between them the stream is cut along the sequence: the norms and the residual additions are not done T times over.

Who holds what, for T ranks on the tp axis: 1/T of every matrix, of the embedding's and the head's vocabulary, and of
the stream between the blocks [batch, seq / T, dim]. The norms' weights are whole on each rank; their gradients, sums
over the sequence, are summed over the ranks.

Collectives on the tp axis, per microbatch, for L blocks and an activation of A = batch x seq x dim elements:

    forward     embedding 1 reduce-scatter; each block 2 all-gathers and 2 reduce-scatters; head 1 all-gather and, for
                each chunk of the loss, 1 all-gather of 3 float32 numbers a token and rank
    backward    each of the reduce-scatters becomes an all-gather and the other way round; but for the loss's
                the gradients of the 2 L + 1 norms, 1 all-reduce of dim elements each (by FSDP, before it scatters them)

    a rank receives (T-1)/T x A elements in each of the 8 L + 4 large ones, 3 (T-1) numbers a token for the loss, and
    2 (T-1)/T x dim elements for a norm.

Activations and gradients have param_dtype's bytes. No logits are gathered: the loss exchanges three numbers a token
(see `model/head.py`). Proof: tests/test_parity.py; the numbers above: tests/test_communication.py.
"""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model.args import ModelArgs
from model.head import Head, HeadCore, loss_in_chunks
from parallelize.compat import enable_micro_pipelining


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, seq_len: int, use_async: bool) -> None:
    """Cuts model in place over mesh (tp); seq_len is the length of a context rank's part of a sequence. use_async lets
    the compiler split each collective and overlap its parts with the matmul beside it (CUDA, compile). ValueError where
    the degree does not divide what it must."""
    if mesh.size() == 1:
        return  # DTensors would only add their overhead
    require_divisible(model.args, mesh.size(), seq_len)
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "layers.*.attention_norm": SequenceParallel(),
        # Gathered once for the three; inside the module it is a DTensor, so that their gradients, parts of a sum, are
        # added before they are scattered, once.
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "layers.*.attention.wq": ColwiseParallel(),
        "layers.*.attention.wk": ColwiseParallel(),
        "layers.*.attention.wv": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "layers.*.ffn_norm": SequenceParallel(),
        "layers.*.feed_forward": PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        ),
        "layers.*.feed_forward.w1": ColwiseParallel(),
        "layers.*.feed_forward.w3": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "output": VocabularyParallelHead(),
    }  # fmt: skip
    # A pipeline stage lacks some of them, and torch warns of a pattern that matches nothing.
    missing = {name for name in ("tok_embeddings", "norm", "output") if getattr(model, name) is None}
    parallelize_module(model, mesh, {name: style for name, style in plan.items() if name not in missing})
    if model.tok_embeddings is not None:
        # What the reduce-scatter returns is a promise (AsyncCollectiveTensor), and to one of these a compiled block
        # returns no gradient, silently (torch 2.13): the embedding would not be trained. A copy waits for it.
        model.tok_embeddings.register_forward_hook(lambda module, inputs, output: output.clone())
    model.tie_weights()  # each style has made a parameter of its own
    if use_async:
        enable_micro_pipelining(mesh.get_group())


class VocabularyParallelHead(ParallelStyle):
    """The head with 1/T of the vocabulary's rows on each rank; its input [batch, seq / T, dim] is gathered."""

    def _apply(self, module: Head, mesh: DeviceMesh) -> Head:
        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))
        module.core = VocabularyParallelCore(module.core.chunk_size, mesh)

        def gather(_, inputs):
            h, *labels = inputs
            h = DTensor.from_local(h, mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
            # Each rank's rows of the vocabulary contribute a part of h's gradient: a sum that is scattered.
            return h.to_local(grad_placements=[Partial()]), *labels

        module.register_forward_pre_hook(gather)
        return module


class VocabularyParallelCore(HeadCore):
    def __init__(self, chunk_size: int, mesh: DeviceMesh):
        super().__init__(chunk_size)
        self.mesh = mesh

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        return DTensor.from_local(super().logits(h, weight.to_local()), self.mesh, [Shard(-1)]).full_tensor()

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = weight.to_local()
        first_id = self.mesh.get_local_rank() * rows.size(0)
        return loss_in_chunks(h.flatten(0, -2), rows, labels.flatten(), first_id, self)

    def gather(self, stats: Tensor) -> Tensor:
        return DTensor.from_local(stats[None], self.mesh, [Shard(0)], run_check=False).full_tensor()


def require_divisible(args: ModelArgs, degree: int, seq_len: int) -> None:
    """ValueError unless `degree` ranks can share heads, channels, vocabulary and sequence evenly."""
    sizes = {
        "model.n_heads": args.n_heads,
        "model.n_kv_heads": args.n_kv_heads,
        "model.ffn_dim": args.ffn_dim,
        "model.vocab_size": args.vocab_size,
        "the sequence length of a context rank": seq_len,
    }
    fitting = [n for n in range(1, args.n_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
    for name, size in sizes.items():
        if size % degree != 0:
            raise ValueError(
                f"parallelism.tensor_parallel_degree ({degree}) must divide {name} ({size}); use one of {fitting}."
            )
