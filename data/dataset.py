"""Samples: windows of the token stream, where sample i is a pure function of (data, seed, i)."""

from hashlib import blake2b
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.packing import open_tokens, read_header

IGNORED = -100  # the label of a position that has nothing to predict
ROUNDS = 12  # 6 mix a large n well; with 12, all orders of 6 windows come equally often too


class TokenDataset(Dataset):
    """Sample i, for any i >= 0, of the stream at path: the same in any process, whatever was read before.

    A window is seq_len + 1 ids, of which the last is also the first of the next window: every id of the
    stream (but a rest shorter than seq_len) is a label once an epoch. Epoch i // n visits the n windows in
    its own order.

    packing is what a window makes of the documents, or parts of some, that lie in it. "concat": one sequence,
    in which later documents attend to earlier ones. "documents": sequences of their own, side by side.

    held_out of the windows are no samples: the same ones whatever the seed, from all over the stream. They are read by
    held_out_sample(j) for 0 <= j < held_out; none of their labels is a sample's label.

    fingerprint is a hash of the stream: a run that resumes with another one reads other data. num_tokens,
    num_documents and text_bytes are the stream's; len() is the number of windows, n.

    Raises ValueError when the stream is too short for one window, or half of it would be held out.
    """

    def __init__(self, path: Path, *, seq_len: int, seed: int, packing: str = "concat", held_out: int = 0) -> None:
        header = read_header(path)
        assert header is not None, f"{path} is no complete token file"
        if header.num_tokens < seq_len + 1:
            raise ValueError(
                f"training.seq_len ({seq_len}) needs {seq_len + 1} tokens, but the whole data has "
                f"{header.num_tokens}; use at most {header.num_tokens - 1}, or more data."
            )
        windows = (header.num_tokens - 1) // seq_len
        if held_out > windows // 2:
            raise ValueError(
                f"validation.samples ({held_out}) would hold out more than half of the data, which has {windows} "
                f"sequences of {seq_len} tokens; use at most {windows // 2}, or more data."
            )
        self.path, self.seq_len, self.seed, self.packing, self.held_out = path, seq_len, seed, packing, held_out
        self.num_tokens, self.num_documents = header.num_tokens, header.num_documents
        self.text_bytes, self.fingerprint = header.text_bytes, header.fingerprint
        self._eos_id = header.eos_id
        self._tokens = open_tokens(path, header)

    def __len__(self) -> int:
        return (self.num_tokens - 1) // self.seq_len - self.held_out

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """tokens, labels and positions of sample i, each [seq_len] int64.

        labels[t] is the token behind tokens[t], or -100 where tokens[t] is eos: what follows is another
        document, so there is nothing to learn. positions count the window from 0; with packing "documents" they
        count each document from 0, and documents [seq_len] int64 is its number in the window.
        """
        epoch, position = divmod(i, len(self))
        return self._sample(permute(position, len(self), self.seed, epoch))

    def held_out_sample(self, j: int) -> dict[str, Tensor]:
        return self._sample(len(self) + j)

    def _sample(self, place: int) -> dict[str, Tensor]:
        if self.held_out:  # the windows that this order, the same for every seed, puts last
            place = permute(place, len(self) + self.held_out, seed=0, epoch=-1)
        start = place * self.seq_len
        window = torch.from_numpy(self._tokens[start : start + self.seq_len + 1].astype("int64"))
        tokens, labels = window[:-1], window[1:]
        is_end = tokens == self._eos_id
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

    def __reduce__(self):
        # For workers that are not forked: pickled as it is, a memory map would take all its tokens along.
        return _reopen, (self.path, self.seq_len, self.seed, self.packing, self.held_out)


def _reopen(path: Path, seq_len: int, seed: int, packing: str, held_out: int) -> TokenDataset:
    return TokenDataset(path, seq_len=seq_len, seed=seed, packing=packing, held_out=held_out)


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
