"""Measures the tokens per second of a rank's loader, by the number of its worker processes.

    python benchmarks/measure_loader.py                              a random corpus of 1 GB, in the file system's cache
    python benchmarks/measure_loader.py --path corpora/mine          a corpus of scripts/prepare_data.py

A GPU that trains Llama 3.1 8B needs about 12,000 tokens per second from its loader, so eight GPUs need 96,000.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data import build_loader
from data.dataset import TokenDataset
from data.shards import Corpus, CorpusIndex, shard_path, write_shard

NEED = 8 * 12_000


def random_corpus(folder: Path, shards: int, tokens: int) -> Path:
    """Random documents of about 1,000 tokens."""
    rng = np.random.default_rng(0)

    def documents():
        for _ in range(tokens // 1000):
            ids = rng.integers(0, 128_000, rng.integers(1, 2000), dtype="uint32")
            yield np.append(ids, np.uint32(128_001)), 4 * len(ids)

    made = [write_shard(shard_path(folder, number), 4, documents()) for number in range(shards)]
    CorpusIndex("", "random", "", 4, 128_001, made).write(folder)
    return folder


def measure(dataset: TokenDataset, num_workers: int, batch_size: int, seconds: float) -> float:
    """Tokens per second, without the first step."""
    loader = build_loader(
        dataset,
        global_batch_size=8 * batch_size,
        local_batch_size=batch_size,
        dp_rank=0,
        dp_degree=8,
        num_workers=num_workers,
    )
    next(loader)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(loader)
        steps += 1
    return steps * batch_size * dataset.seq_len / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a corpus")
    parser.add_argument("--seq_len", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch_size", type=int, default=2, help="sequences per rank; default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(options.path or random_corpus(Path(folder), 8, 32_000_000))
        print("packing    seq_len  workers     tokens/s  x the need of 8 GPUs")
        for packing in ("concat", "documents"):
            for seq_len in options.seq_len:
                dataset = TokenDataset([corpus], seq_len=seq_len, seed=0, packing=packing)
                for workers in options.workers:
                    speed = measure(dataset, workers, options.batch_size, options.seconds)
                    print(f"{packing:9}  {seq_len:7}  {workers:7}  {speed:11,.0f}  {speed / NEED:.0f}", flush=True)


if __name__ == "__main__":
    main()
