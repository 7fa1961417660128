"""Samples: windows of token streams. Sample i is a pure function of (data, seed, i), in any process, in any order.

Proof: tests/test_samples.py::test_samples_are_the_same_in_any_process,
tests/test_mixtures.py::test_epoch_reads_each_window_once.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import isqrt

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data.mixture import DatasetMixture
from data.shards import Corpus
from errors import ConfigError
from model import IGNORE_INDEX

ROUNDS = 12  # 6 rounds mix a large n well; 12 also make all orders of a few windows equally frequent


class TokenDataset(Dataset):
    """Sample i, for any i >= 0, of one corpus or of a mixture. len() is the number of samples in an epoch.

    A window is seq_len + 1 token ids. Its last id is the first id of the next window, so that every id of a stream is a
    label once an epoch, except the first id and a remainder shorter than seq_len. Epoch i // n of a corpus visits its n
    windows in a new order. A mixture draws from each corpus by weight, and each corpus passes through its epochs at its
    own pace. weights None: by number of windows.

    packing says how documents in the same window see each other. "concat": they are one sequence, so later documents
    attend to earlier ones. "documents": each document is a sequence by itself.

    num_held_out windows are held out for validation and are never samples; held_out() gives them. They are the same for
    every seed, are spread over all streams by weight, and share no label with a sample.

    fingerprint names the samples and their order: a run that resumes with a different fingerprint reads different data.
    corpus_fingerprint is the part that names the token ids and the weights. Raises ConfigError if a stream is shorter
    than a window, or if more than half of its windows would be held out."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        seq_len: int,
        seed: int,
        packing: str = "concat",
        num_held_out: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.corpora, self.seq_len, self.seed, self.packing = corpora, seq_len, seed, packing
        shortest = min(corpus.num_tokens for corpus in corpora)
        if shortest <= seq_len:
            raise ConfigError(
                f"training.seq_len ({seq_len}) needs {seq_len + 1} tokens, but the whole data has {shortest}; use at "
                f"most {shortest - 1}, or more data."
            )
        # Of each corpus: windows, and windows that are held out.
        self.num_windows = [(corpus.num_tokens - 1) // seq_len for corpus in corpora]
        weights = list(self.num_windows if weights is None else weights)
        self.mixture, self.held_out_mixture = DatasetMixture(weights, seed), DatasetMixture(weights, seed=0)
        self.num_held_out = [self.held_out_mixture.count(c, num_held_out) for c in range(len(corpora))]
        for windows, held_out in zip(self.num_windows, self.num_held_out, strict=True):
            if held_out > windows // 2:
                raise ConfigError(
                    f"validation.num_sequences ({held_out}) would hold out more than half of the data, which has "
                    f"{windows} sequences of {seq_len} tokens; use at most {windows // 2}, or more data."
                )
        self.corpus_fingerprint = corpora[0].fingerprint
        if len(corpora) > 1:
            parts = [(corpus.fingerprint, weight) for corpus, weight in zip(corpora, weights, strict=True)]
            self.corpus_fingerprint = blake2b(repr(parts).encode(), digest_size=16).hexdigest()
        # Checkpoints keep this text: if its form changes, every resumed run warns that its data has changed.
        self.fingerprint = f"{self.corpus_fingerprint} seed {seed} seq_len {seq_len} {packing}"
        if num_held_out:
            self.fingerprint += f" held out {num_held_out}"

    def __len__(self) -> int:
        return sum(self.num_windows) - sum(self.num_held_out)

    def held_out(self) -> Subset:
        """The held-out samples. Their numbers in this dataset are -1, -2, -3, ..."""
        return Subset(self, range(-1, -1 - sum(self.num_held_out), -1))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """tokens, labels and positions of sample i, each [seq_len] int64.

        labels[t] is the token after tokens[t]. It is IGNORE_INDEX where tokens[t] is eos, because a new document
        follows and there is nothing to learn. positions count the window's tokens from 0. With packing "documents",
        positions count each document's tokens from 0, and documents [seq_len] int64 is each token's document: 0, 1, ...
        """
        corpus, window = self._window_of(i)
        ids = self.corpora[corpus].read(window * self.seq_len, self.seq_len + 1)
        ids = torch.from_numpy(ids.astype("int64"))
        tokens, labels = ids[:-1], ids[1:]
        is_end = tokens == self.corpora[corpus].eos_id
        positions = torch.arange(self.seq_len)
        sample = dict(tokens=tokens, labels=labels.masked_fill(is_end, IGNORE_INDEX), positions=positions)
        if self.packing == "documents":
            documents = is_end.cumsum(0) - is_end.long()  # the number of ends before each token
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), is_end.nonzero()[:, 0] + 1])
            sample |= dict(positions=positions - starts[documents], documents=documents)
        return sample

    def _window_of(self, i: int) -> tuple[int, int]:
        """The corpus of sample i, and the number of its window there."""
        if i < 0:
            corpus, j = self.held_out_mixture(-1 - i)
            place = self.num_windows[corpus] - self.num_held_out[corpus] + j
        else:
            corpus, i = (0, i) if len(self.corpora) == 1 else self.mixture(i)
            num_samples = self.num_windows[corpus] - self.num_held_out[corpus]
            epoch, place = divmod(i, num_samples)
            place = permute(place, num_samples, self.seed, epoch)
        if self.num_held_out[corpus]:  # held-out windows are the last ones of an order that is the same for every seed
            place = permute(place, self.num_windows[corpus], seed=0, epoch=-1)
        return corpus, place


def permute(i: int, n: int, seed: int, epoch: int) -> int:
    """The place of i in an epoch's permutation of range(n), in O(1) time and memory.

    A Feistel network on the pairs (left, right) of a grid of rows x columns >= n cells. Each round adds a keyed hash of
    one half to the other half. A round can be undone, so the network is a bijection of the grid. A result outside of
    range(n) goes through the network again ("cycle walking", Black and Rogaway 2002). This happens a few times at most:
    the grid has fewer than `rows` surplus cells."""
    rows = isqrt(n - 1) + 1
    columns = -(-n // rows)
    key = blake2b(f"{seed} {epoch}".encode(), digest_size=16).digest()

    def hash_of(r: int, half: int) -> int:
        return int.from_bytes(blake2b(b"%d %d" % (r, half), key=key, digest_size=8).digest(), "little")

    while True:
        left, right = divmod(i, columns)
        for r in range(0, ROUNDS, 2):
            left = (left + hash_of(r, right)) % rows
            right = (right + hash_of(r + 1, left)) % columns
        i = left * columns + right
        if i < n:
            return i
