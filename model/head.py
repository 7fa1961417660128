"""The head and the loss in one step, a chunk of tokens at a time, so that a batch's logits never exist at once.

Logits are the largest tensor of training: 8,192 tokens x 128,256 entries are 2 GiB in bfloat16 and 4 more in float32,
several times over in backward. But a chunk's gradient is known as soon as its logits are, softmax(logits) - one_hot, so
forward makes it at once, folds it into the gradients of h and of the weight, and forgets the logits (the idea of
Hsu et al. 2024, arXiv:2410.10989). Nothing is computed twice.

What is kept from forward to backward: a gradient like h and one like the weight. Under a pipeline schedule that runs
many forwards before the first backward (GPipe), each microbatch keeps its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100  # the label of a position where there is nothing to predict


class Head(nn.Linear):
    """Logits, or, given labels, the summed cross entropy in their place."""

    def __init__(self, dim: int, vocab_size: int, chunk_size: int = 0):
        super().__init__(dim, vocab_size, bias=False)
        self.core = HeadCore(chunk_size)

    def forward(self, h: Tensor, labels: Tensor | None = None, parts: int = 1) -> Tensor:
        """h [batch, seq, dim] -> logits [batch, seq, vocab_size]; with labels [batch, seq] (int64) the sum over valid
        ones of -log p(label), in nats, of each of so many equal parts of the batch: [parts], float32 at least."""
        if labels is None:
            return self.core.logits(h, self.weight)
        pairs = zip(h.chunk(parts), labels.chunk(parts), strict=True)
        return torch.stack([self.core(h, self.weight, labels) for h, labels in pairs])


class HeadCore(nn.Module):
    """What the head computes, without parameters: the seam where a vocabulary that is split over ranks comes in.

    chunk_size is the number of tokens whose logits exist at a time; 0: all.
    """

    def __init__(self, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size
        self.statistics, self.gradient = statistics, gradient  # compiled in their place: parallelize/compile.py

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h, weight)

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return loss_in_chunks(h.flatten(0, -2), weight, labels.flatten(), 0, self)

    def gather(self, stats: Tensor) -> Tensor:
        """stats [...] of the own part of the vocabulary -> [parts, ...] of all."""
        return stats[None]


def loss_in_chunks(h: Tensor, weight: Tensor, labels: Tensor, first_id: int, core: HeadCore) -> Tensor:
    """Sum of cross entropies of h [tokens, dim] against labels [tokens], for rows first_id ... of the vocabulary."""
    needs_gradient = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    with torch.no_grad():
        total = h.new_zeros((), dtype=torch.promote_types(h.dtype, torch.float32))
        grad_h, grad_weight = (torch.empty_like(h), torch.zeros_like(weight)) if needs_gradient else (None, None)
        size = core.chunk_size or len(h)
        for part in (slice(start, start + size) for start in range(0, len(h), size)):
            logits, stats = core.statistics(h[part], weight, labels[part], first_id)
            loss, grad_logits = core.gradient(logits, core.gather(stats), labels[part], first_id)
            del logits
            total += loss
            if needs_gradient:
                torch.mm(grad_logits, weight, out=grad_h[part])
                grad_weight.addmm_(grad_logits.T, h[part])
    if not needs_gradient:
        return total
    # Two nodes and a sum, not one node of both: a zero-bubble schedule cuts backward in two where the ways to h and to
    # the weight part, and in torch 2.11 that cannot be at a node written in Python.
    return PrecomputedGrad.apply(h, total, grad_h) + PrecomputedGrad.apply(weight, torch.zeros_like(total), grad_weight)


class PrecomputedGrad(torch.autograd.Function):
    """A value whose gradient by x is known already."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype) if ctx.needs_input_grad[0] else None, None, None


def statistics(h: Tensor, weight: Tensor, labels: Tensor, first_id: int) -> tuple[Tensor, Tensor]:
    """Logits [tokens, rows] of the vocabulary rows first_id ... in `weight`, and what is to be known of them where
    other rows are elsewhere: [3, tokens], the largest, the sum of exp(logit - largest), and the label's (0 if its row
    is not here)."""
    logits = F.linear(h, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(-1)
    exp_sum = (wide - largest[:, None]).exp().sum(-1)
    row, is_here = _row(labels, first_id, wide.size(-1))
    at_label = wide.gather(-1, row[:, None])[:, 0].where(is_here, 0.0)
    return logits, torch.stack((largest, exp_sum, at_label))


def gradient(logits: Tensor, stats: Tensor, labels: Tensor, first_id: int) -> tuple[Tensor, Tensor]:
    """The chunk's summed loss, and its gradient by the logits, in their dtype; stats [parts, 3, tokens] of all parts of
    the vocabulary."""
    largest = stats[:, 0].amax(0)
    log_z = largest + (stats[:, 1] * (stats[:, 0] - largest).exp()).sum(0).log()
    is_valid = labels != IGNORE_INDEX
    loss = (log_z - stats[:, 2].sum(0)).where(is_valid, 0.0).sum()
    probabilities = (logits.to(log_z.dtype) - log_z[:, None]).exp()
    row, is_here = _row(labels, first_id, logits.size(-1))
    columns = torch.arange(logits.size(-1), device=logits.device)
    is_label = (columns == row[:, None]) & is_here[:, None]
    return loss, ((probabilities - is_label.to(log_z.dtype)) * is_valid[:, None]).to(logits.dtype)


def _row(labels: Tensor, first_id: int, rows: int) -> tuple[Tensor, Tensor]:
    """Each label's row among `rows` that begin at first_id, and whether it is one of them (0 if not)."""
    row = labels - first_id
    is_here = (row >= 0) & (row < rows)
    return row.where(is_here, 0), is_here
