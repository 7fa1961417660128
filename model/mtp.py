"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): for each further token a block of its own, which
gets what the last one made of position i and the embedding of the token i + k, and predicts token i + k + 1. Embedding
and head are the main model's. Only training uses it; inference can drop it, or draft tokens with it.
"""

import torch
from torch import Tensor, nn

from model.args import ModelArgs
from model.head import IGNORE_INDEX


class MTPLayer(nn.Module):
    def __init__(self, args: ModelArgs, block: nn.Module):
        super().__init__()
        self.enorm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.hnorm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.eh_proj = nn.Linear(2 * args.dim, args.dim, bias=False)
        self.block = block
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self, h: Tensor, embedding: Tensor, cos: Tensor, sin: Tensor, mask=None
    ) -> tuple[Tensor, Tensor | None]:
        """From what the depth before made, h [B, S, D] after its last norm, and the embedding [B, S, D] of the token
        after each: what the head turns into logits [B, S, D], and the tokens that went to each expert. cos, sin and
        mask are a block's."""
        # The embedding comes first in the published weights, other than in the paper's equation 21.
        h = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(h)), dim=-1))
        h, counts = self.block(h, cos, sin, mask)
        return self.norm(h), counts


def mtp_targets(tokens: Tensor, labels: Tensor, depth: int) -> dict[str, Tensor]:
    """What multi-token prediction of whole sequences needs, for tokens and labels [B, S]: `mtp_tokens` [B, S, depth],
    the k-th token after each, and `mtp_labels`, the one behind that. A label is ignored unless all up to it are valid,
    since no prediction goes beyond the end of a document or of the sequence (there, the token is 0)."""
    next_tokens, next_labels = [], []
    for _ in range(depth):
        is_valid = labels != IGNORE_INDEX
        tokens = nn.functional.pad(tokens[:, 1:], (0, 1)).where(is_valid, 0)
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).where(is_valid, IGNORE_INDEX)
        next_tokens.append(tokens)
        next_labels.append(labels)
    return {"mtp_tokens": torch.stack(next_tokens, -1), "mtp_labels": torch.stack(next_labels, -1)}
