"""Grouped-query attention (with n_kv_heads = n_heads it is multi-head, with 1 multi-query attention), and DeepSeek's
multi-head latent attention. Each token attends to all tokens before it and to itself; where several documents share a
sequence, only within its document.

Proof: tests/test_model.py::test_attention_equals_textbook, tests/test_hf.py::test_logits_equal_transformers,
tests/test_packing.py::test_packed_documents_equal_each_document_alone.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.args import ModelArgs
from model.rope import apply_rope, yarn_mscale

LATENT_NORM_EPS = 1e-6  # for every norm_eps: DeepSeek's reference code and transformers do not pass it to these norms


@cache
def compiled(function):
    """FlexAttention's functions must be compiled: in eager mode they materialize the whole matrix of scores."""
    return torch.compile(function, dynamic=False)


class DocumentMask(nn.Module):
    """Which tokens attend to which, where documents share a sequence. Context parallelism replaces it."""

    def queries(self, seq_len: int, device: torch.device) -> Tensor:
        """The positions in the sequence of the queries on this rank, int64: here all of them."""
        return torch.arange(seq_len, device=device)

    def forward(self, documents: Tensor, as_blocks: bool) -> Tensor | BlockMask:
        """documents [batch, seq] (int64), the number of each token's document -> the mask for `CoreAttention`, made
        once for all layers: a tensor [batch, 1, queries, seq] that is true where query and key are in the same document
        and the key is not after the query. With as_blocks it is a BlockMask for FlexAttention, which skips blocks that
        are false throughout; it needs CUDA, and does not take float64."""
        (batch, seq), device = documents.shape, documents.device
        queries = self.queries(seq, device)

        def allowed(b, _, q, k):
            return (documents[b, queries[q]] == documents[b, k]) & (k <= queries[q])

        if as_blocks:
            return compiled(create_block_mask)(allowed, batch, None, len(queries), seq, device=device)
        b, q, k = (torch.arange(n, device=device) for n in (batch, len(queries), seq))
        return allowed(b[:, None, None, None], None, q[:, None], k)


class CoreAttention(nn.Module):
    """softmax(scale q k^T) v with a causal mask. It has no parameters; context parallelism replaces it.

    scale None: 1 / sqrt(channels of a query)."""

    def __init__(self, scale: float | None = None):
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """q [batch, queries, heads, d_qk], k [batch, seq, kv heads, d_qk], v [batch, seq, kv heads, d_v] -> [batch,
        queries, heads, d_v]. A mask, such as `DocumentMask`'s, takes the place of the causal mask; it is needed where
        the queries are only a part of the sequence."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = dict(scale=self.scale, enable_gqa=q.size(1) != k.size(1))
        if isinstance(mask, BlockMask):
            attend = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
            out = attend(q, k, v, block_mask=mask, **options)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
        return out.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.core = CoreAttention()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """x [batch, seq, dim] -> [batch, seq, dim]; cos, sin from `rope_cos_sin`, mask from `DocumentMask` or None."""
        batch, seq, _ = x.shape
        # -1 and not the number of heads: under tensor parallelism a rank holds only some of them.
        q, k, v = (w(x).view(batch, seq, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        out = self.core(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, mask)
        return self.wo(out.reshape(batch, seq, -1))


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434, section 2.1): the keys and values of all heads
    are made from one narrow latent per token, and so are the queries if q_lora_rank > 0. RoPE does not commute with
    this product, so separate channels carry it; all heads share the key's."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.qk_dims = (args.qk_nope_head_dim, args.qk_rope_head_dim)
        self.kv_dims = (args.qk_nope_head_dim, args.v_head_dim)
        self.latent_dims = (args.kv_lora_rank, args.qk_rope_head_dim)
        q_dim, kv_dim = args.n_heads * sum(self.qk_dims), args.n_heads * sum(self.kv_dims)
        self.compresses_queries = args.q_lora_rank > 0
        if self.compresses_queries:
            self.wq_a = nn.Linear(args.dim, args.q_lora_rank, bias=False)
            self.q_norm = nn.RMSNorm(args.q_lora_rank, eps=LATENT_NORM_EPS)
            self.wq_b = nn.Linear(args.q_lora_rank, q_dim, bias=False)
        else:
            self.wq = nn.Linear(args.dim, q_dim, bias=False)
        self.wkv_a = nn.Linear(args.dim, sum(self.latent_dims), bias=False)
        self.kv_norm = nn.RMSNorm(args.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.wkv_b = nn.Linear(args.kv_lora_rank, kv_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.v_head_dim, args.dim, bias=False)
        # Context parallelism gathers here: the latent is 4 to 70 times narrower than the keys and values of all heads.
        self.latent = nn.Identity()
        self.core = CoreAttention(sum(self.qk_dims) ** -0.5 * yarn_mscale(args, args.rope_mscale_all_dim) ** 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """As `Attention.forward`."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.compresses_queries else self.wq(x)
        q_nope, q_rope = q.unflatten(-1, (-1, sum(self.qk_dims))).split(self.qk_dims, dim=-1)
        q = torch.cat((q_nope, apply_rope(q_rope, cos, sin)), dim=-1)

        latent, k_rope = self.wkv_a(x).split(self.latent_dims, dim=-1)
        k_rope = apply_rope(k_rope[:, :, None], cos, sin)[:, :, 0]
        latent, k_rope = self.latent(torch.cat((self.kv_norm(latent), k_rope), dim=-1)).split(self.latent_dims, dim=-1)
        keys_values = self.wkv_b(latent).unflatten(-1, (-1, sum(self.kv_dims)))
        k_nope, v = keys_values.split(self.kv_dims, dim=-1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, k_nope.size(2), -1)), dim=-1)
        return self.wo(self.core(q, k, v, mask).flatten(2))
