"""Tensor and sequence parallelism (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198).

Idea: each weight matrix is cut into T parts. The first matrices of attention and feed-forward are cut by output rows,
so that a rank has whole heads and whole hidden channels. The last matrix is cut by input columns, so that each rank
computes a part of a sum. Outside of attention and feed-forward the activations are sharded along the sequence, so that
norms and residual additions are not computed T times. Sequence parallelism is part of the design and has no switch:
expert parallelism, the head and the gradients of replicated weights rely on it.

Who holds what, for T ranks on the tp axis: 1/T of every matrix, of the embedding's and the head's vocabulary, and of
the activations between the blocks [batch, seq / T, dim]. Every rank holds these weights whole, and their gradients are
summed over the ranks: the norms; in latent attention wq_a, q_norm, wkv_a and kv_norm; the router; and enorm, hnorm,
eh_proj and norm of multi-token prediction. Experts are not cut, see `parallelize/expert.py`.

Collectives on the tp axis, per microbatch, for L blocks and an activation of A = batch x seq x dim elements:

    forward     embedding 1 reduce-scatter; each block 2 all-gathers and 2 reduce-scatters; head 1 all-gather and, for
                each chunk of the loss, 1 all-gather of 3 float32 numbers a token and rank (with loss_chunk_size 0
                instead 1 all-gather of the head's weight and 1 all-reduce of the loss)
    backward    a reduce-scatter for each all-gather, and an all-gather for each reduce-scatter, but none for the loss;
                for each of the 2 L + 1 norms, 1 all-reduce of its gradient (by FSDP, before it scatters the gradient)

    a rank receives (T-1)/T x A elements in each of the 8 L + 4 large ones, 3 (T-1) numbers a token for the loss, and
    2 (T-1)/T x dim elements for a norm.

DeepSeek's models differ:

    latent attention    with compressed queries the block's first all-gather becomes two: of the queries' latent, and of
                        the other latent together with the key's RoPE channels, A/dim x q_lora_rank and A/dim x
                        (kv_lora_rank + qk_rope_head_dim) elements: 2,112 numbers a token in DeepSeek-V3, whose
                        activations have 7,168. The reduce-scatters of backward change likewise
    mixture of experts  the shared experts take the feed-forward's place; nothing is sent for them where there are none
    MTP                 each depth is one more block. Embedding, head and loss carry 1 + depth times the elements, but
                        only the loss sends more messages, 1 + depth times as many

    a replicated weight's gradient is 1 all-reduce of the whole weight, 2 (T-1)/T x its elements.

Activations and gradients have param_dtype's bytes. Logits are never gathered: the loss exchanges three numbers a token
(see `model/head.py`).

Proof: tests/test_one_step.py::test_tensor_parallel_equals_one_process; the numbers above:
tests/test_communication.py::test_tensor_parallel_bytes_equal_formula,
tests/test_communication_of_mixtures.py::test_tensor_parallel_bytes_equal_formula.
"""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

from model.args import ModelArgs
from model.head import Head, HeadCore, loss_in_chunks
from parallelize.styles import GatherInput, GatherOutput, LocalWeights, Plan, apply_plan
from torch_private import enable_micro_pipelining


class VocabParallelHead(GatherInput):
    """Cuts the head's rows, the vocabulary, over the ranks; all-gathers its input [batch, seq / T, dim]."""

    def _apply(self, module: Head, mesh: DeviceMesh) -> Head:
        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))
        module.core = VocabParallelCrossEntropy(module.core.chunk_size, mesh)
        return super()._apply(module, mesh)


def gather_input(num_inputs: int) -> PrepareModuleInput:
    """All-gathers the first of a module's inputs along the sequence, once for all of its matrices. The result is a
    DTensor, so that the matrices' gradients are summed before one reduce-scatter."""
    others = (None,) * (num_inputs - 1)
    return PrepareModuleInput(input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others))


# One plan for each kind of module. A block's plan is the plan of its attention and the plan of its feed-forward.
GROUPED_QUERY_ATTENTION: Plan = {
    "attention_norm": SequenceParallel(use_local_output=True),
    "attention":      gather_input(4),
    "attention.wq":   ColwiseParallel(),
    "attention.wk":   ColwiseParallel(),
    "attention.wv":   ColwiseParallel(),
    "attention.wo":   RowwiseParallel(output_layouts=Shard(1)),
}  # fmt: skip
# A rank computes the latents of its part of the sequence and all-gathers them for its heads: they are narrower than
# the activations. Where queries have no latent, the activations are all-gathered instead. (The gradient of the key's
# RoPE channels, which all heads share, must be summed: else a run diverges after a thousand steps, pytorch/torchtitan
# #1373.)
LATENT_ATTENTION: Plan = {
    "attention_norm":    SequenceParallel(use_local_output=True),
    "attention":         GatherInput(),
    "attention.wq":      LocalWeights(Shard(0)),
    "attention.wkv_a":   LocalWeights(Replicate()),
    "attention.kv_norm": LocalWeights(Replicate()),
    "attention.wkv_b":   LocalWeights(Shard(0)),
    "attention.wo":      RowwiseParallel(output_layouts=Shard(1)),
}  # fmt: skip
LATENT_ATTENTION_WITH_Q_LORA: Plan = {
    "attention_norm":    SequenceParallel(use_local_output=True),
    "attention.wq_a":    GatherOutput(),
    "attention.q_norm":  LocalWeights(Replicate()),
    "attention.wq_b":    LocalWeights(Shard(0)),
    "attention.wkv_a":   GatherOutput(),
    "attention.kv_norm": LocalWeights(Replicate()),
    "attention.wkv_b":   LocalWeights(Shard(0)),
    "attention.wo":      RowwiseParallel(output_layouts=Shard(1)),
}  # fmt: skip
FEED_FORWARD: Plan = {
    "ffn_norm":        SequenceParallel(use_local_output=True),
    "feed_forward":    gather_input(1),
    "feed_forward.w1": ColwiseParallel(),
    "feed_forward.w3": ColwiseParallel(),
    "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
}  # fmt: skip
# Routed experts are not cut: each rank has other tokens for them, see parallelize/expert.py.
MOE: Plan = {
    "ffn_norm":   SequenceParallel(use_local_output=True),
    "moe.router": LocalWeights(Replicate()),
}  # fmt: skip
SHARED_EXPERTS: Plan = {
    "moe.shared_experts":    gather_input(1),
    "moe.shared_experts.w1": ColwiseParallel(),
    "moe.shared_experts.w3": ColwiseParallel(),
    "moe.shared_experts.w2": RowwiseParallel(output_layouts=Shard(1)),
}  # fmt: skip
MTP_LAYER: Plan = {
    "enorm":   LocalWeights(Replicate()),
    "hnorm":   LocalWeights(Replicate()),
    "eh_proj": LocalWeights(Replicate()),
    "norm":    LocalWeights(Replicate()),
}  # fmt: skip
EMBEDDING: Plan = {"tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))}
HEAD: Plan = {"norm": SequenceParallel(use_local_output=True), "output": VocabParallelHead()}


def parallelize_tensor(stage: nn.Module, mesh: DeviceMesh, *, use_async: bool = False) -> None:
    """Cuts a stage's weights over mesh (tp), in place. use_async lets the compiler split each collective and overlap
    its parts with the matrix product next to it (CUDA, compiled blocks)."""
    if mesh.size() == 1:
        return  # DTensors would only add their overhead
    for block in stage.blocks().values():
        apply_plan(block, mesh, block_plan(stage.args, block))
    for layer in stage.mtp.values():
        apply_plan(layer, mesh, MTP_LAYER)
    if stage.output is not None:
        apply_plan(stage, mesh, HEAD)
    if stage.tok_embeddings is not None:
        apply_plan(stage, mesh, EMBEDDING)
        # The reduce-scatter returns a promise (AsyncCollectiveTensor), and a compiled block silently returns no
        # gradient to a promise (torch 2.13): the embedding would not be trained. A copy waits for the result.
        stage.tok_embeddings.register_forward_hook(lambda module, inputs, output: output.clone())
    stage.tie_weights()  # the styles of embedding and head have made two parameters
    if use_async:
        enable_micro_pipelining(mesh.get_group())


def block_plan(args: ModelArgs, block: nn.Module) -> Plan:
    attention = GROUPED_QUERY_ATTENTION
    if args.attention == "mla":
        attention = LATENT_ATTENTION_WITH_Q_LORA if args.q_lora_rank else LATENT_ATTENTION
    if block.moe is None:
        return attention | FEED_FORWARD
    return attention | MOE | (SHARED_EXPERTS if block.moe.shared_experts is not None else {})


class VocabParallelCrossEntropy(HeadCore):
    """The head's logits and loss where each rank holds 1/T of the vocabulary's rows."""

    def __init__(self, chunk_size: int, mesh: DeviceMesh):
        super().__init__(chunk_size)
        self.mesh = mesh

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        return DTensor.from_local(super().logits(h, weight.to_local()), self.mesh, [Shard(-1)]).full_tensor()

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if self.chunk_size == 0:
            return self.reference(h, weight, labels)
        rows = weight.to_local()
        return loss_in_chunks(h, rows, labels, self.mesh.get_local_rank() * len(rows), self)

    def reference(self, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """`reference_loss` of this rank's part of the tokens, with the whole vocabulary's weight, summed over the
        ranks: what a fork changes in that function also holds here."""
        whole = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        loss = self.reference_loss(h.chunk(ranks)[rank], whole, labels.chunk(ranks)[rank])
        return DTensor.from_local(loss, self.mesh, [Partial()], run_check=False).full_tensor()

    def gather(self, stats: Tensor) -> Tensor:
        return DTensor.from_local(stats[None], self.mesh, [Shard(0)], run_check=False).full_tensor()
