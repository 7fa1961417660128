"""From text to batches: tokenizer -> documents -> a corpus of token ids on disk -> samples in a seeded order -> steps.

tokenizer.py             text to token ids, and back
sources.py               where documents come from
prepare.py, shards.py    documents to a corpus on disk, and its token ids by position
mixture.py, dataset.py   sample i, a pure function of (data, seed, i)
loader.py                the microbatches of a data rank
build.py                 the names and paths that a user writes to a dataset
"""

from data.build import build_dataset, build_validation_samples
from data.dataset import TokenDataset
from data.loader import build_loader
from data.tokenizer import Tokenizer, build_tokenizer

__all__ = ["TokenDataset", "Tokenizer", "build_dataset", "build_loader", "build_tokenizer", "build_validation_samples"]
