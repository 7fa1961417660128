"""Makes a corpus of token shards from text, in parallel. Any number of runs can read it at once (data/shards.py).

    python scripts/prepare_data.py --path 'texts/**/*.jsonl' --tokenizer bpe_4096 --output corpora/mine
    python scripts/prepare_data.py --hf_dataset NAME --hf_split train --tokenizer TOKENIZER --output corpora/theirs
    python scripts/prepare_data.py --verify corpora/mine
    torchrun ... train.py --data.dataset shards --data.path corpora/mine --data.tokenizer bpe_4096

If the command is killed, start it again: finished shards are kept. --verify reads a corpus and compares each shard's
SHA-256 with the index.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Data
from data.prepare import SHARD_BYTES, prepare
from data.shards import Corpus, TokenShard
from data.sources import build_source
from data.tokenizer import build_tokenizer
from errors import ConfigError
from scripts.hf_stream import HFStream


class Progress:
    """Shows progress: a line that is updated on a terminal; elsewhere a new line every seconds_between."""

    def __init__(self, seconds_between: float):
        self.start = self.shown = time.monotonic()
        self.tokens = self.made = 0
        self.seconds_between = seconds_between

    def shard(self, done: int, total: int, shard: TokenShard) -> None:
        self.tokens, self.made = self.tokens + shard.num_tokens, self.made + 1
        seconds = time.monotonic() - self.start
        left = timedelta(seconds=round(seconds / self.made * (total - done)))
        speed = f"{self.tokens:,} tokens, {self.tokens / seconds:,.0f} tokens/s"
        self.show(f"{done}/{total} shards, {speed}, left {left}", is_last=done == total)

    def show(self, line: str, is_last: bool) -> None:
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if is_last else "", flush=True)
        elif is_last or time.monotonic() - self.shown > self.seconds_between:
            print(line, flush=True)
            self.shown = time.monotonic()


def verify(folder: Path, report: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Reads a whole corpus and returns a line for each shard whose SHA-256 is not the index's. Raises ConfigError as
    Corpus does."""
    corpus, wrong = Corpus(folder), []
    shards = corpus.index.shards
    for number, (path, shard) in enumerate(zip(corpus.paths, shards, strict=True)):
        digest = sha256()
        with open(path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
        if digest.hexdigest() != shard.sha256:
            wrong.append(f"{path}: SHA-256 is {digest.hexdigest()}, not {shard.sha256}")
        report(number + 1, len(shards))
    return wrong


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="the folder of the corpus")
    parser.add_argument("--dataset", default="text", choices=("text", "python_stdlib"), help="default: %(default)r")
    for option in ("path", "text_key", "tokenizer"):
        parser.add_argument(f"--{option}", default=getattr(Data(), option), help="default: %(default)r")
    parser.add_argument("--hf_dataset", help="stream this Hugging Face dataset instead of files")
    parser.add_argument("--hf_subset", default="", help="the dataset's configuration, if it has several")
    parser.add_argument("--hf_split", default="train", help="default: %(default)r")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="default: the number of cores, %(default)s"
    )
    parser.add_argument("--shard_bytes", type=int, default=SHARD_BYTES, help="text per shard; default: %(default)s")
    parser.add_argument("--verify", metavar="FOLDER", help="compare every shard of a corpus with its checksum")
    options = parser.parse_args(arguments)

    progress = Progress(seconds_between=10)
    if options.verify:
        folder = Path(options.verify)
        wrong = verify(folder, lambda done, total: progress.show(f"{done}/{total} shards read", done == total))
        if wrong:
            cure = "delete them, and run the command that made the corpus again: it makes only missing shards."
            raise ConfigError("\n".join([*wrong, f"{len(wrong)} shard(s) of {folder} have changed; {cure}"]))
        print(f"{folder}: every shard is as it was written")
        return
    if not options.output:
        raise ConfigError("--output FOLDER is needed: the folder of the new corpus.")
    if options.processes < 0 or options.shard_bytes < 1:
        raise ConfigError("--processes must be at least 0 (0: no other process), --shard_bytes at least 1.")
    tokenizer = build_tokenizer(options.tokenizer)
    if options.hf_dataset:
        source = HFStream(options.hf_dataset, options.hf_subset, options.hf_split, options.text_key)
    else:
        source = build_source(options.dataset, options.path, options.text_key)
    folder = prepare(
        source,
        tokenizer,
        options.output,
        processes=options.processes,
        shard_bytes=options.shard_bytes,
        report=progress.shard,
    )
    corpus = Corpus(folder)
    print(f"{corpus.num_documents:,} documents, {corpus.text_bytes:,} bytes of text")
    bytes_per_token = corpus.text_bytes / corpus.num_tokens
    print(f"{corpus.num_tokens:,} tokens, {bytes_per_token:.2f} bytes per token; {tokenizer.vocab_size:,} ids")
    print(folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
