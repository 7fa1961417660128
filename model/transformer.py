"""The decoder: embedding, blocks of attention and feed-forward (or a mixture of experts) with RMSNorm before each,
norm, head; and, in training, blocks that predict further tokens.

It is written for one device and knows of no other. Parallelism is applied to it from outside, by module name:

    tok_embeddings, layers.{i}.{attention_norm, attention, ffn_norm, feed_forward | moe}, norm, output,
    mtp.{k}.{enorm, hnorm, eh_proj, block, norm}, where mtp.{k}.block is like layers.{i}; in these

    attention       wq, wk, wv, core, wo; in multi-head latent attention wq | (wq_a, q_norm, wq_b), wkv_a, kv_norm,
                    latent, wkv_b, core, wo
    feed_forward    w1, w2, w3
    moe             router, experts.{w1, w2, w3}, shared_experts.{w1, w2, w3}
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.args import ModelArgs
from model.attention import Attention, DocumentMask, LatentAttention
from model.head import Head
from model.moe import MoE
from model.mtp import MTPLayer
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
    """Block number `layer`: which of attention, feed-forward and mixture it has, the shape says."""

    def __init__(self, args: ModelArgs, layer: int, sequences_per_step: int = 1):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = LatentAttention(args) if args.attention == "mla" else Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.feed_forward = self.moe = None
        if args.is_moe_layer(layer):
            width = args.n_shared_experts * args.moe_hidden_dim
            self.moe = MoE(args, FeedForward(args.dim, width) if width else None, sequences_per_step)
        else:
            self.feed_forward = FeedForward(args.dim, args.hidden_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask=None) -> tuple[Tensor, Tensor | None]:
        """x [batch, seq, dim], the rest as for attention -> x's shape; and in a mixture the number of tokens that went
        to each expert."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        if self.moe is None:
            return x + self.feed_forward(self.ffn_norm(x)), None
        y, tokens_per_expert = self.moe(self.ffn_norm(x))
        return x + y, tokens_per_expert


class Transformer(nn.Module):
    """tokens -> logits, or the loss. A pipeline stage is the same class with some parts removed: an embedding, norm or
    head that is None is skipped, and `layers` is a ModuleDict so that a block keeps its name wherever it runs.

    loss_chunk_size is the number of tokens whose logits exist at a time, see model/head.py; 0: all. sequences_per_step
    is the number of sequences of an optimizer step, for the balance loss of a mixture."""

    def __init__(self, args: ModelArgs, loss_chunk_size: int = 0, sequences_per_step: int = 1):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        numbers = range(args.n_layers + args.n_mtp_layers)
        blocks = [TransformerBlock(args, number, sequences_per_step) for number in numbers]
        self.layers = nn.ModuleDict({str(i): block for i, block in enumerate(blocks[: args.n_layers])})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = Head(args.dim, args.vocab_size, loss_chunk_size)
        self.mtp = nn.ModuleDict({str(k): MTPLayer(args, block) for k, block in enumerate(blocks[args.n_layers :])})
        self.document_mask = DocumentMask()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's, if they are to be one. Moving a model off meta (`to_empty`) unties
        them, so this is called again after it."""
        if self.args.tie_embeddings and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight

    def blocks(self) -> dict[int, TransformerBlock]:
        """The blocks that are here, by number; those of multi-token prediction count on from n_layers."""
        further = {self.args.n_layers + int(k): layer.block for k, layer in self.mtp.items()}
        return {int(i): block for i, block in self.layers.items()} | further

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        labels: Tensor | None = None,
        mtp_tokens: Tensor | None = None,
        mtp_labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits [batch, seq, vocab_size] for token ids x [batch, seq] (int64) at `positions` [batch, seq] (int64).
        Given labels [batch, seq] (int64, -100 where there is none), the sum of their cross entropies in nats. In a
        later pipeline stage x is the stream [batch, seq, dim], in an earlier one so is the result.

        mtp_tokens and mtp_labels [batch, seq, n_mtp_layers], from `mtp_targets`, are for multi-token prediction: the
        mean of its losses, times mtp_loss_weight, is added to the gradient but not to the loss that is returned.

        documents [batch, whole seq] (int64) numbers the documents that share a sequence: attention stays in each."""
        # All tokens in one look-up: what is communicated for the embedding is communicated once.
        ids = [] if x.is_floating_point() else [x]
        if self.output is not None and mtp_tokens is not None:
            ids += mtp_tokens.unbind(-1)
        embedded = list(self.tok_embeddings(torch.cat(ids)).chunk(len(ids))) if ids else []
        h = x if x.is_floating_point() else embedded.pop(0)
        cos, sin = rope_cos_sin(positions, self.args)
        mask = None
        if documents is not None:
            mask = self.document_mask(documents, as_blocks=h.is_cuda and h.dtype != torch.float64)
        for block in self.layers.values():
            h = self._counted(block.moe, *block(h, cos, sin, mask))
        h = self.norm(h) if self.norm is not None else h
        if self.output is None or labels is None:
            return self.output(h) if self.output is not None else h
        streams, targets = [h], [labels]
        for k, (layer, embedding) in enumerate(zip(self.mtp.values(), embedded, strict=bool(embedded))):
            streams.append(self._counted(layer.block.moe, *layer(streams[-1], embedding, cos, sin, mask)))
            targets.append(mtp_labels[..., k])
        # Once, with everything: what is communicated for the head is communicated once.
        loss, *further = self.output(torch.cat(streams), torch.cat(targets), len(streams)).unbind()
        for extra in further:
            loss = loss + self.args.mtp_loss_weight / len(further) * (extra - extra.detach())
        # A loss that is not finite has a gradient that is not, which the gradients' sums then show to every rank.
        return loss * torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), torch.nan)

    def _counted(self, moe: MoE | None, h: Tensor, tokens_per_expert: Tensor | None) -> Tensor:
        """h. Here, where nothing is run again in backward, each token is counted once."""
        if self.training and tokens_per_expert is not None:
            moe.router.tokens_per_expert += tokens_per_expert
        return h
