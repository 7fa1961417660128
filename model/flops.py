"""Number of parameters and FLOPs per token, exact, from the shape of the model. `num_params` leaves out multi-token
prediction (MTP), as published counts do. Training runs it, so `flops_per_token` counts it.

Proof: tests/test_model.py::test_num_params_equals_module_and_published_count,
tests/test_model.py::test_flops_per_token_equals_counted_flops.
"""

from model.args import ModelArgs


def num_params(args: ModelArgs, *, active: bool = False, mtp: bool = False) -> int:
    """Number of distinct parameters; a tied head counts once. active: only the parameters that work on a token, which
    are the head but not the embedding's lookup, and top_k experts. mtp: MTP layers too."""
    embeddings = args.vocab_size * args.dim * (1 if args.tie_embeddings or active else 2)
    n_mtp = args.n_mtp_layers if mtp else 0
    blocks = sum(_block_params(args, layer, active) for layer in range(args.n_layers + n_mtp))
    return embeddings + args.dim + blocks + n_mtp * (2 * args.dim + 3) * args.dim


def flops_per_token(args: ModelArgs, seq_len: int, *, causal: bool = False) -> int:
    """Forward and backward FLOPs of one training token in a sequence of seq_len: 6 per matmul parameter (2 forward, 4
    backward) and 6 x layers x heads x (d_qk + d_v) x seq_len for the two products
    of attention (PaLM, arXiv:2204.02311, appendix B). `causal` counts only the half of attention that a causal mask
    needs. The reported MFU counts all of it, as torchtitan does, so that numbers compare. Recomputation is never
    counted."""
    mtp, layers = args.n_mtp_layers, args.n_layers + args.n_mtp_layers
    params = sum(_block_matmul_params(args, layer, active=True) for layer in range(layers))
    params += (
        1 + mtp
    ) * args.vocab_size * args.dim + mtp * 2 * args.dim * args.dim  # a head and a projection per depth
    attention = 6 * layers * args.n_heads * (args.head_dim + args.value_head_dim) * seq_len
    return 6 * params + (attention // 2 if causal else attention)


def _block_params(args: ModelArgs, layer: int, active: bool) -> int:
    latents = args.q_lora_rank + args.kv_lora_rank if args.attention == "mla" else 0
    return _block_matmul_params(args, layer, active) + 2 * args.dim + latents  # the norms' weights


def _block_matmul_params(args: ModelArgs, layer: int, active: bool) -> int:
    if args.attention == "mla":
        q = args.n_heads * args.head_dim
        queries = (args.dim + q) * args.q_lora_rank if args.q_lora_rank else args.dim * q
        latent = args.dim * (args.kv_lora_rank + args.qk_rope_head_dim)
        keys_values = args.kv_lora_rank * args.n_heads * (args.qk_nope_head_dim + args.v_head_dim)
        attention = queries + latent + keys_values + args.n_heads * args.v_head_dim * args.dim
    else:
        attention = 2 * args.dim * (args.n_heads + args.n_kv_heads) * args.head_dim
    if not args.is_moe_layer(layer):
        return attention + 3 * args.dim * args.hidden_dim
    experts = args.n_shared_experts + (args.top_k if active else args.n_experts)
    return attention + args.dim * args.n_experts + 3 * args.dim * args.moe_hidden_dim * experts
