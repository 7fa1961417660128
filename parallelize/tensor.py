"""Tensor and sequence parallelism (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198).

Idea: each weight matrix is cut in T parts. The first matrices of attention and feed-forward are cut by output rows, so
that a rank has whole heads and whole hidden channels, the last by input columns, so that ranks hold parts of a sum.
Between them the stream is cut along the sequence: the norms and the residual additions are not done T times over.

Who holds what, for T ranks on the tp axis: 1/T of every matrix, of the embedding's and the head's vocabulary, and of
the stream between the blocks [batch, seq / T, dim]. The norms' weights are whole on each rank; their gradients, sums
over the sequence, are summed over the ranks. So are the weights that make the latents of DeepSeek's attention, router
and what multi-token prediction has besides a block. Experts are not cut, see `parallelize/expert.py`.

Collectives on the tp axis, per microbatch, for L blocks and an activation of A = batch x seq x dim elements:

    forward     embedding 1 reduce-scatter; each block 2 all-gathers and 2 reduce-scatters; head 1 all-gather and, for
                each chunk of the loss, 1 all-gather of 3 float32 numbers a token and rank
    backward    each of the reduce-scatters becomes an all-gather and the other way round; but for the loss's
                the gradients of the 2 L + 1 norms, 1 all-reduce of dim elements each (by FSDP, before it scatters them)

    a rank receives (T-1)/T x A elements in each of the 8 L + 4 large ones, 3 (T-1) numbers a token for the loss, and
    2 (T-1)/T x dim elements for a norm.

What differs in DeepSeek's models:

    latent attention    with compressed queries the block's first all-gather is two: of the queries' latent, and of the
                        other with the key that has RoPE, A/dim x q_lora_rank and A/dim x (kv_lora_rank +
                        qk_rope_head_dim) elements. (DeepSeek-V3: 2,112 a token, its stream is 7,168 wide.) So are, in
                        backward, the reduce-scatters. Gradients summed too: wq_a, q_norm, wkv_a, kv_norm
    mixture             its shared experts are the block's feed-forward; nothing is sent for it where there are none.
                        Gradient summed too: the router's
    further tokens      each a block more, and 1 + depth times the elements for embedding, head and loss; only for the
                        loss in 1 + depth times as many messages. Gradients summed too: enorm, hnorm, eh_proj, norm

    a gradient that is summed over the ranks is 1 all-reduce of the whole weight, 2 (T-1)/T x its elements.

Activations and gradients have param_dtype's bytes. No logits are gathered: the loss exchanges three numbers a token
(see `model/head.py`). Proof: tests/test_parity.py; the numbers above: tests/test_communication.py, for DeepSeek's parts
tests/test_communication_of_mixtures.py.
"""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from errors import ConfigError
from model.args import ModelArgs
from model.head import Head, HeadCore, loss_in_chunks
from parallelize.styles import GatherInput, GatherOutput, LocalWeights
from torch_private import enable_micro_pipelining

MTP_WEIGHTS = ("enorm", "hnorm", "eh_proj", "norm")


def parallelize_tensor(model: nn.Module, mesh: DeviceMesh, *, seq_len: int, use_async: bool) -> None:
    """Cuts model in place over mesh (tp); seq_len is the length of a context rank's part of a sequence. use_async lets
    the compiler split each collective and overlap its parts with the matmul beside it (CUDA, compile). ValueError where
    the degree does not divide what it must."""
    if mesh.size() == 1:
        return  # DTensors would only add their overhead
    require_divisible(model.args, mesh.size(), seq_len)
    # Gathered once for the three; inside the module it is a DTensor, so that their gradients, parts of a sum, are added
    # before they are scattered, once.
    gather_dtensor = dict(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    feed_forward = {
        "": PrepareModuleInput(**gather_dtensor),
        ".w1": ColwiseParallel(),
        ".w3": ColwiseParallel(),
        ".w2": RowwiseParallel(output_layouts=Shard(1)),
    }
    grouped_queries = {
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
    }
    # A rank makes the latents of its part of the sequence, and gathers those of the whole for its own heads: they are
    # narrower than the stream. Where queries have none, the stream is gathered for them, and the other latent made from
    # it. (Were the gradient of the one key that has RoPE not summed, a run would diverge only after a thousand steps:
    # pytorch/torchtitan #1373.)
    stream, kv_latent = (None, GatherOutput()) if model.args.q_lora_rank else (GatherInput(), LocalWeights(Replicate()))
    latent = {
        "attention": stream,
        "attention.wq": LocalWeights(Shard(0)),
        "attention.wq_a": GatherOutput(),
        "attention.q_norm": LocalWeights(Replicate()),
        "attention.wq_b": LocalWeights(Shard(0)),
        "attention.wkv_a": kv_latent,
        "attention.kv_norm": LocalWeights(Replicate()),
        "attention.wkv_b": LocalWeights(Shard(0)),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
    }
    in_block = {
        "attention_norm": SequenceParallel(use_local_output=True),
        **(latent if model.args.attention == "mla" else grouped_queries),
        "ffn_norm": SequenceParallel(use_local_output=True),
        # Experts are not cut here: each rank has its own tokens for them, see parallelize/expert.py.
        "moe.router": LocalWeights(Replicate()),
        **{f"feed_forward{name}": style for name, style in feed_forward.items()},
        **{f"moe.shared_experts{name}": style for name, style in feed_forward.items()},
    }
    whole = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "output": VocabParallelHead(),
        **{f"mtp.{k}.{name}": LocalWeights(Replicate()) for k in model.mtp for name in MTP_WEIGHTS},
    }
    # What a pipeline stage lacks, or a block's kind: torch would only warn of a name that matches nothing.
    parallelize_module(model, mesh, _only_present(model, whole))
    for block in model.blocks().values():
        parallelize_module(block, mesh, _only_present(block, in_block))
    if model.tok_embeddings is not None:
        # What the reduce-scatter returns is a promise (AsyncCollectiveTensor), and to one of these a compiled block
        # returns no gradient, silently (torch 2.13): the embedding would not be trained. A copy waits for it.
        model.tok_embeddings.register_forward_hook(lambda module, inputs, output: output.clone())
    model.tie_weights()  # each style has made a parameter of its own
    if use_async:
        enable_micro_pipelining(mesh.get_group())


def _only_present(module: nn.Module, plan: dict[str, ParallelStyle | None]) -> dict[str, ParallelStyle]:
    present = {name for name, _ in module.named_modules(remove_duplicate=False)}
    return {name: style for name, style in plan.items() if style and name in present}


class VocabParallelHead(ParallelStyle):
    """The head with 1/T of the vocabulary's rows on each rank; its input [batch, seq / T, dim] is gathered."""

    def _apply(self, module: Head, mesh: DeviceMesh) -> Head:
        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))
        module.core = VocabParallelCrossEntropy(module.core.chunk_size, mesh)

        return GatherInput()._apply(module, mesh)


class VocabParallelCrossEntropy(HeadCore):
    def __init__(self, chunk_size: int, mesh: DeviceMesh):
        super().__init__(chunk_size)
        self.mesh = mesh

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        return DTensor.from_local(super().logits(h, weight.to_local()), self.mesh, [Shard(-1)]).full_tensor()

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = weight.to_local()
        first_id = self.mesh.get_local_rank() * rows.size(0)
        return loss_in_chunks(h, rows, labels, first_id, self)

    def gather(self, stats: Tensor) -> Tensor:
        return DTensor.from_local(stats[None], self.mesh, [Shard(0)], run_check=False).full_tensor()


def require_divisible(args: ModelArgs, degree: int, seq_len: int) -> None:
    """ValueError unless `degree` ranks can share heads, channels, vocabulary and sequence evenly."""
    sizes = {
        "model.n_heads": args.n_heads,
        "model.n_kv_heads": args.n_kv_heads,
        "model.hidden_dim": args.hidden_dim if args.n_dense_layers or not args.n_experts else 0,
        "model.n_shared_experts x model.moe_hidden_dim": args.n_shared_experts * args.moe_hidden_dim,
        "model.vocab_size": args.vocab_size,
        "the sequence length of a context rank": seq_len,
    }
    fitting = [n for n in range(1, args.n_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
    for name, size in sizes.items():
        if size % degree != 0:
            raise ConfigError(
                f"parallelism.tensor_parallel_degree ({degree}) must divide {name} ({size}); use one of {fitting}."
            )
