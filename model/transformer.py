"""The decoder: embedding, blocks of attention and feed-forward (or mixture of experts) with RMSNorm before each, norm,
head; in training also blocks for multi-token prediction (MTP).

It is written for one device and knows of no other. Parallelism is applied to it from outside, by module name:

    tok_embeddings, layers.{i}.{attention_norm, attention, ffn_norm, feed_forward | moe}, norm, output,
    mtp.{k}.{enorm, hnorm, eh_proj, block, norm}, where mtp.{k}.block has the modules of layers.{i}

    attention       wq, wk, wv, core, wo; for multi-head latent attention wq | (wq_a, q_norm, wq_b), wkv_a, kv_norm,
                    latent, wkv_b, core, wo
    feed_forward    w1, w2, w3
    moe             router, experts.{w1, w2, w3}, shared_experts.{w1, w2, w3}

Seams are modules without parameters. Parallelism, compile and activation checkpointing come in there: they replace the
module, compile it or hook it. They are document_mask (which tokens attend to which), attention.core (softmax(q k^T) v),
attention.latent (the latent of keys and values), moe.router.gate (the router's product with its weight),
moe.router.reduce_counts (counts of the tokens here -> of whole sequences), moe.experts.compute (the experts' products),
moe.combine (weighted sum of a token's expert outputs) and output.core (logits and loss) with its parts reference_loss,
logits_and_stats and loss_and_grad_logits.
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
    """Block number `layer`; args say which attention it has, and whether a feed-forward or a mixture of experts."""

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
        """x [batch, seq, dim] -> [batch, seq, dim], and the number of tokens that went to each expert, int64 [experts]
        (None in a dense block). cos, sin and mask are attention's."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        if self.moe is None:
            return x + self.feed_forward(self.ffn_norm(x)), None
        y, tokens_per_expert = self.moe(self.ffn_norm(x))
        return x + y, tokens_per_expert


class Transformer(nn.Module):
    """Token ids -> logits, or the loss. A pipeline stage is the same class with some parts removed: an embedding, norm
    or head that is None is skipped, and `layers` is a ModuleDict so that a block keeps its name wherever it runs.

    loss_chunk_size is the number of tokens whose logits exist at a time, see model/head.py; 0: all. sequences_per_step
    is the number of sequences of an optimizer step; the balance loss of a mixture of experts needs it."""

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
        """Makes the head's weight the embedding's if args.tie_embeddings. Moving a model off meta (`to_empty`) unties
        them, so this is called again after it."""
        if self.args.tie_embeddings and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight

    def blocks(self) -> dict[int, TransformerBlock]:
        """The blocks of this stage by number. The MTP blocks are numbered from n_layers on."""
        mtp_blocks = {self.args.n_layers + int(k): layer.block for k, layer in self.mtp.items()}
        return {int(i): block for i, block in self.layers.items()} | mtp_blocks

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        labels: Tensor | None = None,
        mtp_tokens: Tensor | None = None,
        mtp_labels: Tensor | None = None,
        documents: Tensor | None = None,
        per_sequence: bool = False,
    ) -> Tensor:
        """Logits [batch, seq, vocab_size] for token ids x [batch, seq] (int64) at `positions` [batch, seq] (int64).

        Given labels [batch, seq] (int64, IGNORE_INDEX where there is none): the sum of their cross entropies in nats,
        or, per_sequence, `sequence_log_probs`. A later pipeline stage gets the residual stream [batch, seq, dim] as x,
        and every stage but the last returns it.

        mtp_tokens and mtp_labels [batch, seq, n_mtp_layers], from `add_mtp_targets`, are for multi-token prediction:
        the mean of the MTP losses, times mtp_loss_weight, is added to the gradient but not to the loss that is
        returned.

        documents [batch, whole seq] (int64) numbers the documents that share a sequence: attention stays within each.
        """
        # One lookup of all tokens, so that the embedding's communication happens once.
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
            h = self._count_tokens(block.moe, *block(h, cos, sin, mask))
        h = self.norm(h) if self.norm is not None else h
        if self.output is None or labels is None:
            return self.output(h) if self.output is not None else h
        if per_sequence:
            return self.output.sequence_log_probs(h, labels)
        streams, targets = [h], [labels]
        for k, (layer, embedding) in enumerate(zip(self.mtp.values(), embedded, strict=bool(embedded))):
            streams.append(self._count_tokens(layer.block.moe, *layer(streams[-1], embedding, cos, sin, mask)))
            targets.append(mtp_labels[..., k])
        # One call of the head with everything, so that its communication happens once.
        loss, *mtp_losses = self.output(torch.cat(streams), torch.cat(targets), len(streams)).unbind()
        for mtp_loss in mtp_losses:
            # Value 0: only the gradient is added.
            loss = loss + self.args.mtp_loss_weight / len(mtp_losses) * (mtp_loss - mtp_loss.detach())
        # A loss that is not finite gets a gradient of NaN; the sum of gradients then shows it to every rank.
        return loss * torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), torch.nan)

    def sequence_log_probs(
        self, tokens: Tensor, positions: Tensor, labels: Tensor, documents: Tensor | None = None
    ) -> Tensor:
        """The sum of log p(label) over each sequence's valid labels, in nats: [batch], in float32 at least. It is
        differentiable; preference losses such as DPO are functions of it. MTP takes no part.

        Two limits. Under context parallelism a rank has only its part of each sequence: all-reduce the sums over the cp
        axis, differentiably, before any non-linear function. And such a loss is a mean over pairs of sequences, not a
        sum over tokens. "Sum, then divide once" (training/loss.py) does not cover it: divide by the number of pairs in
        the whole step instead."""
        # By way of forward, so that FSDP's hooks run.
        return self(tokens, positions, labels, documents=documents, per_sequence=True)

    def _count_tokens(self, moe: MoE | None, h: Tensor, tokens_per_expert: Tensor | None) -> Tensor:
        """Adds to the router's counts and returns h. It stands here because nothing in the Transformer itself is
        recomputed in backward, so that each token is counted once."""
        if self.training and tokens_per_expert is not None:
            moe.router.tokens_per_expert += tokens_per_expert
        return h
