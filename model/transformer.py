"""The decoder: embedding, blocks of attention and SwiGLU with RMSNorm before each, norm, head.

It is written for one device and knows of no other. Parallelism is applied to it from outside, by module name:

    tok_embeddings, layers.{i}.{attention_norm, attention.{wq,wk,wv,core,wo}, ffn_norm, feed_forward.{w1,w2,w3}},
    norm, output
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.args import ModelArgs
from model.attention import Attention
from model.head import Head
from model.rope import rope_cos_sin


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.feed_forward = FeedForward(args.dim, args.ffn_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """tokens -> logits, or the loss. A pipeline stage is the same class with some parts removed: an embedding, norm or
    head that is None is skipped, and `layers` is a ModuleDict so that a block keeps its name wherever it runs.

    loss_chunk_size is the number of tokens whose logits exist at a time, see model/head.py; 0: all."""

    def __init__(self, args: ModelArgs, loss_chunk_size: int = 0):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = Head(args.dim, args.vocab_size, loss_chunk_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's, if they are to be one. Moving a model off meta (`to_empty`) unties
        them, so this is called again after it."""
        if self.args.tie_embeddings and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, x: Tensor, positions: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [batch, seq, vocab_size] for token ids x [batch, seq] (int64) at `positions` [batch, seq] (int64).
        Given labels [batch, seq] (int64, -100 where there is none), the sum of their cross entropies in nats. In a
        later pipeline stage x is the stream [batch, seq, dim], in an earlier one so is the result."""
        h = self.tok_embeddings(x) if self.tok_embeddings is not None else x
        cos, sin = rope_cos_sin(positions, self.args)
        for block in self.layers.values():
            h = block(h, cos, sin)
        h = self.norm(h) if self.norm is not None else h
        return self.output(h, labels) if self.output is not None else h
