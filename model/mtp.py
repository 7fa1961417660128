"""Multi-token prediction, MTP (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Depth k = 1 ... n_mtp_layers is one more block. At position i it gets the output of depth k - 1 and the embedding of
token i + k, and predicts token i + k + 1. Embedding and head are shared with the main model. Only training uses MTP;
inference can drop it, or draft tokens with it.

Proof: tests/test_moe.py::test_mtp_loss_equals_textbook, tests/test_moe.py::test_mtp_targets_stay_in_their_document.
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

    def forward(self, h: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor, mask=None) -> tuple[Tensor, Tensor | None]:
        """h [B, S, D], the normed output of the depth before, and embedded [B, S, D], the next token at each
        position -> the head's input [B, S, D], and the number of tokens that went to each expert (None in a dense
        block). cos, sin and mask are attention's."""
        # The published weights have the embedding first, unlike equation 21 of the paper.
        h = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(h)), dim=-1))
        h, counts = self.block(h, cos, sin, mask)
        return self.norm(h), counts


def add_mtp_targets(batch: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The batch of whole sequences, `tokens` and `labels` [B, S], with `mtp_tokens` and `mtp_labels` [B, S, depth]
    added: the k-th token after each token, and the token after that one. For depth 0 the batch itself.

    A label is IGNORE_INDEX unless all labels from the position up to it are valid: no prediction goes past the end of a
    document or of the sequence. Where there is no k-th token, mtp_tokens has 0."""
    if depth == 0:
        return batch
    tokens, labels, next_tokens, next_labels = batch["tokens"], batch["labels"], [], []
    for _ in range(depth):
        is_valid = labels != IGNORE_INDEX
        tokens = nn.functional.pad(tokens[:, 1:], (0, 1)).where(is_valid, 0)
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).where(is_valid, IGNORE_INDEX)
        next_tokens.append(tokens)
        next_labels.append(labels)
    return batch | {"mtp_tokens": torch.stack(next_tokens, -1), "mtp_labels": torch.stack(next_labels, -1)}
