"""Tokenise ahead of a run, and say what there is:

    python -m data.prepare --dataset text --path 'texts/**/*.jsonl' --tokenizer bpe_4096

A run with the same data options then starts at once. All options default to those of a run.
"""

import argparse
import sys

from config import Data
from data.packing import pack, read_header
from data.sources import build_source
from data.tokenizer import build_tokenizer


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("dataset", "path", "text_key", "tokenizer", "cache_folder"):
        parser.add_argument(f"--{option}", default=getattr(Data(), option), help="default: %(default)r")
    options = parser.parse_args(arguments)

    tokenizer = build_tokenizer(options.tokenizer)
    path = pack(build_source(options.dataset, options.path, options.text_key), tokenizer, options.cache_folder)
    header = read_header(path)
    print(f"{header.num_documents:,} documents, {header.text_bytes:,} bytes of text")
    bytes_per_token = header.text_bytes / header.num_tokens
    print(f"{header.num_tokens:,} tokens, {bytes_per_token:.2f} bytes a token; {tokenizer.vocab_size:,} ids")
    print(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
