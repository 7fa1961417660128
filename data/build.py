"""The names and paths that a user writes -> a TokenDataset to train on, and samples to validate on.

Proof: tests/test_shards.py::test_shards_dataset_rejects_wrong_folder_tokenizer_and_weights,
tests/test_mixtures.py::test_path_with_weights_sets_the_shares, tests/test_validation.py::test_validation_on_other_data.
"""

from math import inf
from pathlib import Path

from torch.utils.data import Subset

from data.dataset import TokenDataset
from data.prepare import cache_key, prepare
from data.shards import Corpus
from data.sources import build_source
from data.tokenizer import Tokenizer
from errors import ConfigError


def build_dataset(
    dataset: str,
    path: str,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    seed: int,
    packing: str = "concat",
    num_held_out: int = 0,
    text_key: str = "text",
    cache_folder: str | Path = "outputs/cache",
) -> TokenDataset:
    """Samples of seq_len tokens in the order of seed; for packing and num_held_out see TokenDataset.

    "python_stdlib" and "text" are the documents of data/sources.py: tokenised on first use, and kept in cache_folder.
    "shards" reads the folders in path that scripts/prepare_data.py has made: "A", or several as a mixture, "A,B" by
    their size or "A:0.7,B:0.3" by weights of any sum. Raises ConfigError if a name, a weight or a file is wrong, or if
    the data is shorter than one sample."""
    weights = None
    if dataset == "shards":
        folders, weights = _folders_and_weights(path)
        corpora = [Corpus(folder) for folder in folders]
        for corpus in corpora:
            if corpus.index.tokenizer_fingerprint != tokenizer.fingerprint:
                raise ConfigError(
                    f"{corpus.folder} was made with the tokenizer {corpus.index.tokenizer}, and data.tokenizer "
                    f"{tokenizer.name} is a different one; set --data.tokenizer {corpus.index.tokenizer}."
                )
    else:
        source = build_source(dataset, path, text_key)
        corpora = [Corpus(prepare(source, tokenizer, Path(cache_folder) / cache_key(source, tokenizer)))]
    order = dict(seq_len=seq_len, seed=seed, packing=packing)
    return TokenDataset(corpora, weights=weights, num_held_out=num_held_out, **order)


def build_validation_samples(
    path: str, dataset: TokenDataset, tokenizer: Tokenizer, *, num_sequences: int, **cache: str | Path
) -> Subset:
    """The samples that dataset holds out if path is empty; else num_sequences samples of the data in path.

    The path of folders that hold index.json is read as "shards", any other path as "text". Those samples have the
    training data's seq_len and packing, and do not depend on its seed. cache is text_key and cache_folder, as in
    build_dataset. Raises ConfigError if there are fewer samples."""
    if not path:
        return dataset.held_out()
    is_corpus = any((Path(part).expanduser() / "index.json").is_file() for part in path.split(","))
    order = dict(seq_len=dataset.seq_len, seed=0, packing=dataset.packing)
    other = build_dataset("shards" if is_corpus else "text", path, tokenizer, **order, **cache)
    if num_sequences > len(other):
        raise ConfigError(
            f"validation.num_sequences ({num_sequences}) is more than there are in {path}: use at most {len(other)}."
        )
    return Subset(other, range(num_sequences))


def _folders_and_weights(path: str) -> tuple[list[Path], list[float] | None]:
    """The folders of "A:0.7,B:0.3" and their weights; None in place of the weights of "A,B"."""
    folders, weights = [], []
    for part in filter(None, map(str.strip, path.split(","))):
        folder, colon, text = part.rpartition(":")
        if not colon or Path(part).expanduser().exists():  # the colon may be part of a folder's name
            folder = part
        else:
            try:
                weights.append(float(text))
            except ValueError:
                weights.append(0.0)
            if not 0 < weights[-1] < inf:
                raise ConfigError(
                    f'data.path: the weight of {folder} ("{text}") must be a positive number, as in A:0.7,B:0.3.'
                )
        folders.append(Path(folder.strip()).expanduser())
    if not folders:
        raise ConfigError('dataset "shards" needs data.path: a folder that scripts/prepare_data.py has made.')
    if weights and len(weights) != len(folders):
        raise ConfigError(
            f"data.path ({path}) has a weight for {len(weights)} of its {len(folders)} folders; give every folder a "
            "weight, as in A:0.7,B:0.3, or give none."
        )
    return folders, weights or None
