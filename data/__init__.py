"""From text to batches: tokenizer -> documents -> a corpus of token ids on disk -> samples in seeded order -> steps."""

from pathlib import Path

from data.dataset import TokenDataset
from data.loader import build_loader
from data.prepare import prepare, source_key
from data.shards import Corpus
from data.sources import build_source
from data.tokenizer import Tokenizer, build_tokenizer
from errors import ConfigError

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
    weights: str = "",
    text_key: str = "text",
    cache_folder: str | Path = "outputs/cache",
) -> TokenDataset:
    """Samples of seq_len tokens of a dataset, in the order of seed; packing is "concat" or "documents", held_out a
    number of sequences that are none of them, see TokenDataset.

    dataset is "python_stdlib", "text" with a path (their documents are tokenised on first use, and kept in
    cache_folder), or "shards": path is a folder that scripts/prepare_data.py has made, or several, separated by commas,
    with as many numbers in weights (without: by their size). Raises ValueError, one line, for whatever is wrong with
    the names, the files, or a seq_len that is longer than the data.
    """
    if dataset == "shards":
        folders = [folder.strip() for folder in path.split(",") if folder.strip()]
        if not folders:
            raise ConfigError('dataset "shards" needs data.path: a folder that scripts/prepare_data.py has made.')
        corpora = [Corpus(Path(folder).expanduser()) for folder in folders]
        for corpus in corpora:
            if corpus.index.tokenizer_fingerprint != tokenizer.fingerprint:
                raise ConfigError(
                    f"{corpus.folder} was made with the tokenizer {corpus.index.tokenizer}, data.tokenizer is "
                    f"{tokenizer.name}, another one; set --data.tokenizer {corpus.index.tokenizer}."
                )
    else:
        source = build_source(dataset, path, text_key)
        corpora = [Corpus(prepare(source, tokenizer, Path(cache_folder) / source_key(source, tokenizer)))]
    return TokenDataset(
        corpora,
        seq_len=seq_len,
        seed=seed,
        packing=packing,
        held_out=held_out,
        weights=_weights(weights, corpora),
    )


def _weights(text: str, corpora: list[Corpus]) -> list[float] | None:
    try:
        weights = [float(weight) for weight in text.split(",")] if text else None
    except ValueError:
        weights = []
    if weights is not None and (len(weights) != len(corpora) or not all(0 < w < float("inf") for w in weights)):
        raise ConfigError(
            f'data.weights ("{text}") must be a positive number for each of the {len(corpora)} folders of data.path, '
            "separated by commas."
        )
    return weights
