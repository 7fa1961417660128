"""The head and the loss: `reference_loss` says what is computed, `loss_in_chunks` computes the same in less memory.

Logits are the largest tensor of training: 8,192 tokens x 128,256 entries are 2 GiB in bfloat16 and 4 more in float32,
several times over in backward. `loss_in_chunks` makes them for a chunk of tokens at a time. The gradient of a chunk is
known as soon as its logits are: softmax(logits) - one_hot(labels). So forward computes it at once, adds it to the
gradients of h and of the weight, and frees the logits (the idea of Hsu et al. 2024, arXiv:2410.10989). Nothing is
computed twice. From forward to backward it keeps a gradient like h and a gradient like the weight. Under a pipeline
schedule that runs many forwards before the first backward (GPipe), it does so for each microbatch.

With chunk_size 0 `reference_loss` itself runs, and autograd does the backward: all logits exist at once. To try another
loss, change that function and set training.loss_chunk_size to 0; tensor parallelism runs it too.

torch 2.13 has F.linear_cross_entropy for the same purpose. It is not used yet: torch 2.11 lacks it, it has no
vocabulary-parallel form, and its chunked path does not compile.

Proof: tests/test_training.py::test_chunked_loss_equals_reference_loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100  # the label of a position where there is nothing to predict


def reference_loss(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over the valid labels, in nats, for h [tokens, dim], weight [vocab_size, dim] and labels
    [tokens] (int64): a scalar, in float32 at least."""
    logits = F.linear(h, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)


class Head(nn.Linear):
    """The output projection: logits, or, given labels, the summed cross entropy in their place."""

    def __init__(self, dim: int, vocab_size: int, chunk_size: int = 0):
        super().__init__(dim, vocab_size, bias=False)
        self.core = HeadCore(chunk_size)

    def forward(self, h: Tensor, labels: Tensor | None = None, num_losses: int = 1) -> Tensor:
        """h [batch, seq, dim] -> logits [batch, seq, vocab_size].

        With labels [batch, seq] (int64), losses [num_losses] instead, in float32 at least: the batch is split into
        num_losses equal parts, and each part's loss is the sum of -log p(label) over its valid labels, in nats."""
        if labels is None:
            return self.core.logits(h, self.weight)
        parts = zip(h.chunk(num_losses), labels.chunk(num_losses), strict=True)
        return torch.stack([self.core(h.flatten(0, 1), self.weight, labels.flatten()) for h, labels in parts])

    def sequence_log_probs(self, h: Tensor, labels: Tensor) -> Tensor:
        """The sum of log p(label) over each sequence's valid labels, in nats: [batch], differentiable. It is what
        preference losses such as DPO are made of; see `Transformer.sequence_log_probs` for its limits."""
        return -self(h, labels, num_losses=len(h))


class HeadCore(nn.Module):
    """Logits and loss, without parameters. Under tensor parallelism a vocabulary-parallel version replaces it.
    chunk_size is the number of tokens whose logits exist at a time; 0: all tokens, by `reference_loss`."""

    def __init__(self, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size
        # Modules and not functions, so that they can be compiled in place.
        self.reference_loss = ReferenceLoss()
        self.logits_and_stats = LogitsAndStats()
        self.loss_and_grad_logits = LossAndGradLogits()

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h, weight)

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """`reference_loss`, or the same in chunks."""
        if self.chunk_size == 0:
            return self.reference_loss(h, weight, labels)
        return loss_in_chunks(h, weight, labels, 0, self)

    def gather(self, stats: Tensor) -> Tensor:
        """Statistics [...] of the vocabulary rows on this rank -> [parts of the vocabulary, ...]; here 1 part."""
        return stats[None]


def loss_in_chunks(h: Tensor, weight: Tensor, labels: Tensor, vocab_start_index: int, core: HeadCore) -> Tensor:
    """`reference_loss` of h [tokens, dim] and labels [tokens], core.chunk_size tokens at a time (0: all at once).
    weight holds the vocabulary rows from vocab_start_index on; `core.gather` exchanges statistics with the ranks that
    hold the other rows."""
    needs_gradient = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    with torch.no_grad():
        total = h.new_zeros((), dtype=torch.promote_types(h.dtype, torch.float32))
        grad_h, grad_weight = (torch.empty_like(h), torch.zeros_like(weight)) if needs_gradient else (None, None)
        size = core.chunk_size or len(h)
        for chunk in (slice(start, start + size) for start in range(0, len(h), size)):
            logits, stats = core.logits_and_stats(h[chunk], weight, labels[chunk], vocab_start_index)
            loss, grad_logits = core.loss_and_grad_logits(logits, core.gather(stats), labels[chunk], vocab_start_index)
            del logits
            total += loss
            if needs_gradient:
                torch.mm(grad_logits, weight, out=grad_h[chunk])
                grad_weight.addmm_(grad_logits.T, h[chunk])
    if not needs_gradient:
        return total
    # Two autograd nodes and a sum, not one node with two inputs: a zero-bubble schedule splits backward where the paths
    # to h and to the weight part, and torch 2.11 cannot split at a node that is written in Python.
    return PrecomputedGrad.apply(h, total, grad_h) + PrecomputedGrad.apply(weight, torch.zeros_like(total), grad_weight)


class PrecomputedGrad(torch.autograd.Function):
    """Returns a value whose gradient with respect to x is already known."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype) if ctx.needs_input_grad[0] else None, None, None


class ReferenceLoss(nn.Module):
    def forward(self, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return reference_loss(h, weight, labels)


class LogitsAndStats(nn.Module):
    def forward(self, h: Tensor, weight: Tensor, labels: Tensor, vocab_start_index: int) -> tuple[Tensor, Tensor]:
        """Logits [tokens, rows] of the vocabulary rows in `weight`, from vocab_start_index on, and the statistics that
        ranks with other rows need of them, [3, tokens]: the largest logit, the sum of exp(logit - largest), and the
        label's logit (0 where the label's row is not in `weight`)."""
        logits = F.linear(h, weight)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(-1)
        exp_sum = (wide - largest[:, None]).exp_().sum(-1)
        row, is_here = _row(labels, vocab_start_index, wide.size(-1))
        at_label = wide.gather(-1, row[:, None])[:, 0].where(is_here, 0.0)
        return logits, torch.stack((largest, exp_sum, at_label))


class LossAndGradLogits(nn.Module):
    def forward(self, logits: Tensor, stats: Tensor, labels: Tensor, vocab_start_index: int) -> tuple[Tensor, Tensor]:
        """The chunk's summed loss, and its gradient with respect to the logits, in their dtype. stats [parts, 3,
        tokens] are the statistics of all parts of the vocabulary."""
        largest = stats[:, 0].amax(0)
        log_z = largest + (stats[:, 1] * (stats[:, 0] - largest).exp()).sum(0).log()
        is_valid = labels != IGNORE_INDEX
        loss = (log_z - stats[:, 2].sum(0)).where(is_valid, 0.0).sum()
        # Each line is one pass over the chunk's logits, where they are not compiled into one. A position without a
        # label has no gradient: its probabilities become exp(-inf), and its row, -1, is no column.
        log_z_or_inf = log_z.where(is_valid, torch.inf)[:, None]
        probabilities = (logits.to(log_z.dtype) - log_z_or_inf).exp_()
        row, is_here = _row(labels, vocab_start_index, logits.size(-1))
        is_label = torch.arange(logits.size(-1), device=logits.device) == row.where(is_here, -1)[:, None]
        return loss, probabilities.sub_(is_label.to(torch.uint8)).to(logits.dtype)


def _row(labels: Tensor, vocab_start_index: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Each label's row among the num_rows rows from vocab_start_index on, and whether it is one of them (0 if not)."""
    row = labels - vocab_start_index
    is_here = (row >= 0) & (row < num_rows)
    return row.where(is_here, 0), is_here
