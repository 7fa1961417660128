"""Predicts the memory of a training step on one GPU: bytes counted by hand, from the model's shape alone.

    python benchmarks/gpu_memory.py --job.config_file configs/llama3_8b_1gpu.toml       prints GiB by moment

`benchmark_gpu.py` compares the prediction with the allocator's peak.

Notation: P = parameters, T = tokens of a microbatch; w = bytes of a stored weight (training.dtype), c = bytes of a
weight in use (mixed_precision_param), r = bytes of a reduced gradient (mixed_precision_reduce). The first two rows are
in memory most of the time; the other rows are the moments at which the memory may have its peak:

    static                weights w P, Adam's two moments 2 w P; gradients w P too when they are accumulated
    activations           per block the table below x T, the last block's output, cosines and sines, the microbatches
    head, forward         a chunk's logits; the gradients of h and of the head's weight, made at once (model/head.py)
    head, backward        these two gradients twice: as they were made, and multiplied by the gradient of the loss
    head, reduced         FSDP's buffers: the gradient in reduce_dtype to be sent, and the received gradient
    block i               activations of blocks 1 to i, gradients of all later weights, gradients of i's activations
    embedding             no activations; all gradients, and the embedding's gradient while it is made
    optimizer             weights, moments, gradients

FSDP is there only where weights are cast (w != c): it adds a block's gathered weights and the buffers of its reduction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config, load_config
from hf import get_model_args
from model import ModelArgs, num_params
from resilience import clean_exit

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}

# The bytes that a block keeps for backward, per token in bfloat16, as multiples of dim, n_kv_heads x head_dim,
# hidden_dim and n_heads. parallelize/activation.py explains the first three rows. A compiled block does not keep
# silu(w1 x). A compiled float8 block does not keep the norms' results and w2's input either: it keeps their float8
# casts. The numbers are those of inductor's graphs on torch 2.11 and 2.13. The norms add two float32 numbers per token.
KEPT = {
    "eager": (12, 4, 8, 4),
    "op": (6, 2, 2, 4),
    "full": (2, 0, 0, 0),
    "compiled": (12, 4, 6, 4),
    "compiled float8": (8, 4, 4, 4),
}
# Bytes for each logit of a chunk at the worst moment, in bfloat16: the logits, their gradient, and with several chunks
# the gradient of the previous chunk. Eager mode adds several float32 copies.
LOGIT_BYTES = {"compiled": (4, 6), "eager": (15, 17)}  # with one chunk, with several
COPIES_OF_REDUCED = 2  # FSDP of one rank has a buffer to send and a buffer to receive
WORKSPACE = 0.1 * 2**30  # cuBLAS, cuDNN


def predict_memory(args: ModelArgs, config: Config) -> dict:
    """Returns bytes by name: the parts, the sums of the largest `moments`, and `peak`, the largest sum; `peak_at` is
    the name of that moment."""
    training = config.training
    w, c, r = (BYTES[getattr(training, name)] for name in ("dtype", "mixed_precision_param", "mixed_precision_reduce"))
    tokens = training.local_batch_size * training.seq_len
    microbatches = max(1, training.global_batch_size // training.local_batch_size)
    accumulates = microbatches > 1
    has_fsdp, is_compiled = w != c, config.compile.enable
    total, embedding = num_params(args), args.vocab_size * args.dim
    block = (total - embedding * (1 if args.tie_embeddings else 2) - args.dim) / args.n_layers

    parameters, optimizer, gradients = w * total, 2 * w * total, w * total
    static = parameters + optimizer + WORKSPACE
    accumulated = gradients if accumulates else 0
    stream = c * args.dim * tokens  # [batch, seq, dim]
    whole, kept = (x * tokens for x in _block_activations(args, config))
    outside = stream + 4 * args.head_dim * tokens + 24 * tokens * microbatches
    activations = args.n_layers * kept + outside
    # The largest gradients of a block's activations are those of w1's and w3's results and of their product. Experts
    # also have the gradients of their input and output rows.
    largest = 3 * args.hidden_dim
    if args.n_experts:
        largest = args.top_k * (3 * args.moe_hidden_dim + 2 * args.dim)
    backward = 2 * stream + c * largest * tokens + (whole - kept)

    chunk = min(training.loss_chunk_size or tokens, tokens)
    logits = LOGIT_BYTES["compiled" if is_compiled else "eager"][chunk < tokens] * c // 2 * chunk * args.vocab_size
    head_gradients = stream + c * embedding
    # A tied weight is in FSDP's root group: it is gathered from its first use to its last, and reduced at the end.
    gathered_head = c * embedding if has_fsdp else 0
    gathered_block = 2 * c * block if has_fsdp else 0  # the weights, and their gradients before they are reduced
    if not has_fsdp and accumulates:
        gathered_block = c * block  # the new gradients, before they are added to the accumulated gradients
    reduced = COPIES_OF_REDUCED * r if has_fsdp else 0
    head_done = 0 if args.tie_embeddings and has_fsdp else w * embedding
    tied_until_the_end = 2 * c * embedding if args.tie_embeddings and has_fsdp else 0

    base = static + accumulated
    moments = {
        "head, forward": base + activations + gathered_head + stream + head_gradients + logits,
        "head, backward": base + activations + gathered_head + 2 * head_gradients,
    }
    if has_fsdp and not args.tie_embeddings:
        moments["head, reduced"] = base + activations + stream + reduced * embedding
    for i in range(args.n_layers, 0, -1):
        done = head_done + (args.n_layers - i) * w * block
        waiting = (r * (embedding if i == args.n_layers else block)) if has_fsdp and not tied_until_the_end else 0
        moments[f"block {i}"] = (
            static
            + max(accumulated, done)
            + i * kept
            + outside
            + waiting
            + gathered_block
            + tied_until_the_end
            + backward
        )
    done = head_done + args.n_layers * w * block
    made = c * embedding * (1 + (args.tie_embeddings and not has_fsdp))
    moments["embedding"] = (
        static + max(accumulated, done) + stream + max(made + tied_until_the_end, reduced * embedding)
    )
    moments["optimizer"] = static + gradients
    peak_at = max(moments, key=moments.get)
    return dict(
        parameters=parameters,
        optimizer=optimizer,
        gradients=gradients,
        workspace=WORKSPACE,
        activations=activations,
        activations_of_a_block=kept,
        activations_of_a_block_per_token=kept / tokens,
        backward_of_a_block=backward,
        logits=logits,
        head_gradients=head_gradients,
        gathered_head=gathered_head,
        gathered_block=gathered_block,
        reduced_head=reduced * embedding,
        # At the three points where gpu_case.py measures.
        at_step_start=parameters + optimizer,
        after_forward=parameters + optimizer + accumulated + activations + gathered_head + head_gradients,
        before_clip=parameters + optimizer + gradients,
        moments={name: moments[name] for name in sorted(moments, key=moments.get, reverse=True)[:6]},
        peak=moments[peak_at],
        peak_at=peak_at,
    )


def _block_activations(args: ModelArgs, config: Config) -> tuple[float, float]:
    """Bytes per token that a block's backward needs, and the part of them that is kept; the rest is recomputed."""
    sizes = (args.dim, args.n_kv_heads * args.head_dim, args.hidden_dim, args.n_heads)
    factor = BYTES[config.training.mixed_precision_param] / 2

    def per_token(name: str) -> float:
        return factor * sum(n * size for n, size in zip(KEPT[name], sizes, strict=True)) + 8

    name = "eager"
    if config.compile.enable:
        name = "compiled float8" if config.float8.enable else "compiled"
    if args.attention == "mla":
        layers = [_latent_block(args, layer) for layer in range(args.n_layers)]
        return (sum(layers) / len(layers),) * 2
    whole, recompute = per_token(name), config.activation_checkpoint
    if recompute.mode == "full":
        return whole, per_token("full")
    if recompute.mode == "memory_budget":
        return whole, max(per_token("full"), float(recompute.selective_option) * whole)
    if recompute.mode == "selective" and recompute.selective_option == "op":
        return whole, per_token("op")
    if recompute.mode == "selective":
        share = 1 / int(recompute.selective_option)
        return whole, share * per_token("full") + (1 - share) * whole
    return whole, whole


def _latent_block(args: ModelArgs, layer: int) -> float:
    """Bytes per token that a compiled block with latent attention keeps, in bfloat16 without recomputation.

    Attention: the stream and its norm, twice; the latents before and after their norms; the heads of queries and keys,
    the tensor that keys and values are split from, and the result. Dense or shared feed-forward: w1's and w3's results
    and their product. Routed experts: the same three for each expert of a token, with the input and output rows; and
    the router's scores."""
    heads = args.n_heads * (2 * args.head_dim + args.qk_nope_head_dim + 2 * args.v_head_dim)
    latents = 2 * (args.q_lora_rank + args.kv_lora_rank) + args.qk_rope_head_dim
    kept = 2 * (4 * args.dim + heads + latents) + 4 * args.n_heads + 8
    if not args.is_moe_layer(layer):
        return kept + 6 * args.hidden_dim
    experts = args.top_k * (4 * args.dim + 6 * args.moe_hidden_dim)
    return kept + experts + 6 * args.n_shared_experts * args.moe_hidden_dim + 4 * args.n_experts


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    config = load_config(argv)
    predicted = predict_memory(get_model_args(**vars(config.model)), config)
    for name, num_bytes in predicted["moments"].items():
        print(f"{name:<20} {num_bytes / 2**30:8.1f} GiB")


if __name__ == "__main__":
    with clean_exit():
        main(sys.argv[1:])
