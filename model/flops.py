"""How many parameters a model has and how many floating-point operations a token costs: exact, from the shape."""

from model.args import ModelArgs


def num_params(args: ModelArgs) -> int:
    """Number of distinct parameters (a tied head counts once)."""
    embeddings = args.vocab_size * args.dim * (1 if args.tie_embeddings else 2)
    norms = args.dim * (2 * args.n_layers + 1)
    return embeddings + norms + args.n_layers * _block_matmul_params(args)


def num_matmul_params(args: ModelArgs) -> int:
    """Parameters that every token is multiplied with: without the norms and the embedding's lookup, with the head."""
    return args.n_layers * _block_matmul_params(args) + args.vocab_size * args.dim


def flops_per_token(args: ModelArgs, seq_len: int, *, causal: bool = False) -> int:
    """Forward and backward FLOPs of one training token in a sequence of seq_len.

    6 per matmul parameter (2 forward, 4 backward) and 6 x layers x heads x (d_qk + d_v) x seq_len for the two
    attention products (PaLM, arXiv:2204.02311, appendix B). `causal` counts only the half of them that a causal mask
    needs; the reported MFU does not, as in torchtitan, so that numbers compare. Recomputation is never counted.
    """
    attention = 6 * args.n_layers * args.n_heads * 2 * args.head_dim * seq_len
    return 6 * num_matmul_params(args) + (attention // 2 if causal else attention)


def _block_matmul_params(args: ModelArgs) -> int:
    query_and_output = 2 * args.dim * args.n_heads * args.head_dim
    key_and_value = 2 * args.dim * args.n_kv_heads * args.head_dim
    return query_and_output + key_and_value + 3 * args.dim * args.ffn_dim
