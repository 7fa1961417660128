"""From text to batches: tokenizer -> documents -> one cached stream of ids -> samples in seeded order ->
steps.
"""

from pathlib import Path

from data.dataset import TokenDataset
from data.loader import build_loader
from data.packing import pack
from data.sources import build_source
from data.tokenizer import Tokenizer, build_tokenizer

__all__ = ["TokenDataset", "Tokenizer", "build_dataset", "build_loader", "build_tokenizer"]


def build_dataset(
    dataset: str,
    path: str,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    seed: int,
    packing: str = "concat",
    held_out: int = 0,
    text_key: str = "text",
    cache_folder: str | Path = "outputs/cache",
) -> TokenDataset:
    """Samples of seq_len tokens of a dataset ("python_stdlib", or "text" with a path), in the order of seed;
    packing is "concat" or "documents", held_out a number of sequences that are none of them, see TokenDataset.

    The documents are tokenised on first use, and kept in cache_folder. Raises ValueError, one line, for
    whatever is wrong with the names, the files, or a seq_len that is longer than the data.
    """
    return TokenDataset(
        pack(build_source(dataset, path, text_key), tokenizer, cache_folder),
        seq_len=seq_len,
        seed=seed,
        packing=packing,
        held_out=held_out,
    )
