"""Samples: windows of token streams, where sample i is a pure function of (data, seed, i)."""

from collections.abc import Sequence
from hashlib import blake2b
from math import isqrt

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.mixture import Mixture
from data.shards import Corpus
from errors import ConfigError

IGNORED = -100  # the label of a position that has nothing to predict
ROUNDS = 12  # 6 mix a large n well; with 12, all orders of 6 windows come equally often too


class TokenDataset(Dataset):
    """Sample i, for any i >= 0, of one corpus or a mixture: the same in any process, whatever was read before.

    A window is seq_len + 1 ids, of which the last is also the first of the next window: every id of a stream (but a
    rest shorter than seq_len) is a label once an epoch. Epoch i // n of a corpus visits its n windows in its own order.
    In a mixture each corpus gets its weight's part of the samples, and goes through its epochs at its own pace.

    packing is what a window makes of the documents, or parts of some, that lie in it. "concat": one sequence,
    in which later documents attend to earlier ones. "documents": sequences of their own, side by side.

    held_out of the windows are no samples: the same ones whatever the seed, from all over the streams, by weight. They
    are read by held_out_sample(j) for 0 <= j < held_out; none of their labels is a sample's label.

    fingerprint is a hash of the streams and weights: a run that resumes with another one reads other data. len() is the
    number of windows that are samples.

    Raises ValueError when a stream is too short for one window, or half of it would be held out.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        seq_len: int,
        seed: int,
        packing: str = "concat",
        held_out: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        """weights None: by their number of windows."""
        self.corpora, self.seq_len, self.seed, self.packing = corpora, seq_len, seed, packing
        self.windows = [(corpus.num_tokens - 1) // seq_len for corpus in corpora]
        for corpus, windows in zip(corpora, self.windows, strict=True):
            if windows < 1:
                raise ConfigError(
                    f"training.seq_len ({seq_len}) needs {seq_len + 1} tokens, but the whole data has "
                    f"{corpus.num_tokens}; use at most {corpus.num_tokens - 1}, or more data."
                )
        weights = list(self.windows if weights is None else weights)
        self.mixture = Mixture(weights, seed)
        self.held_out_mixture = Mixture(weights, 0)
        self.held_out = [self.held_out_mixture.count(c, held_out) for c in range(len(corpora))]
        for windows, apart in zip(self.windows, self.held_out, strict=True):
            if apart > windows // 2:
                raise ConfigError(
                    f"validation.samples ({apart}) would hold out more than half of the data, which has {windows} "
                    f"sequences of {seq_len} tokens; use at most {windows // 2}, or more data."
                )
        self.fingerprint = corpora[0].fingerprint
        if len(corpora) > 1:
            parts = [(corpus.fingerprint, weight) for corpus, weight in zip(corpora, weights, strict=True)]
            self.fingerprint = blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return sum(self.windows) - sum(self.held_out)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """tokens, labels and positions of sample i, each [seq_len] int64.

        labels[t] is the token behind tokens[t], or -100 where tokens[t] is eos: what follows is another
        document, so there is nothing to learn. positions count the window from 0; with packing "documents" they
        count each document from 0, and documents [seq_len] int64 is its number in the window.
        """
        corpus, i = (0, i) if len(self.corpora) == 1 else self.mixture(i)
        num_samples = self.windows[corpus] - self.held_out[corpus]
        epoch, place = divmod(i, num_samples)
        return self._sample(corpus, permute(place, num_samples, self.seed, epoch))

    def held_out_sample(self, j: int) -> dict[str, Tensor]:
        corpus, j = self.held_out_mixture(j)
        return self._sample(corpus, self.windows[corpus] - self.held_out[corpus] + j)

    def _sample(self, corpus: int, place: int) -> dict[str, Tensor]:
        if self.held_out[corpus]:  # the windows that this order, the same for every seed, puts last
            place = permute(place, self.windows[corpus], seed=0, epoch=-1)
        ids = self.corpora[corpus].read(place * self.seq_len, self.seq_len + 1)
        window = torch.from_numpy(ids.astype("int64"))
        tokens, labels = window[:-1], window[1:]
        is_end = tokens == self.corpora[corpus].eos_id
        sample = {
            "tokens": tokens,
            "labels": labels.masked_fill(is_end, IGNORED),
            "positions": torch.arange(self.seq_len),
        }
        if self.packing == "documents":
            documents = is_end.cumsum(0) - is_end.long()  # ends before each token
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), is_end.nonzero()[:, 0] + 1])
            sample["positions"] = sample["positions"] - starts[documents]
            sample["documents"] = documents
        return sample


def permute(i: int, n: int, seed: int, epoch: int) -> int:
    """Where i goes in epoch's permutation of range(n): a bijection, in O(1) time and memory.

    A Feistel network (each round adds a keyed hash of one half to the other, which can be undone, so it is a
    bijection) on the pairs (left, right) of a grid of rows x columns >= n; a result outside range(n) goes
    through it again ("cycle walking", Black and Rogaway 2002), at most a few times, as the grid has fewer
    than rows cells too many.
    """
    rows = isqrt(n - 1) + 1
    columns = -(-n // rows)
    key = blake2b(f"{seed} {epoch}".encode(), digest_size=16).digest()
    while True:
        left, right = divmod(i, columns)
        for r in range(0, ROUNDS, 2):
            left = (left + _hash(key, r, right)) % rows
            right = (right + _hash(key, r + 1, left)) % columns
        i = left * columns + right
        if i < n:
            return i


def _hash(key: bytes, r: int, half: int) -> int:
    return int.from_bytes(blake2b(b"%d %d" % (r, half), key=key, digest_size=8).digest(), "little")
