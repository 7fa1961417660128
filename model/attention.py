"""Grouped-query attention; multi-head and multi-query attention are its cases n_kv_heads = n_heads and = 1."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.args import ModelArgs
from model.rope import apply_rope


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v over the past: no parameters, the one seam where attention is exchanged."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [batch, seq, heads, head_dim], k and v with n_kv_heads heads; returns q's shape. A mask replaces the causal
        one, for queries that are not those of all keys' positions."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
        )
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, seq, dim] -> [batch, seq, dim]; cos, sin from `rope_cos_sin`."""
        batch, seq, _ = x.shape
        # -1 and not the number of heads: under tensor parallelism a rank holds only some of them.
        q = self.wq(x).view(batch, seq, -1, self.head_dim)
        k = self.wk(x).view(batch, seq, -1, self.head_dim)
        v = self.wv(x).view(batch, seq, -1, self.head_dim)
        out = self.core(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        return self.wo(out.reshape(batch, seq, -1))
