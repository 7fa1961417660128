"""Trains a byte-level BPE tokenizer, and writes it in tiktoken's file format.

    python scripts/train_tokenizer.py
    python scripts/train_tokenizer.py --dataset text --path 'texts/**' --vocab_size 32000 --output my.tiktoken

The first command makes data/bpe_4096.tiktoken. A run reads the second command's file with
`--data.tokenizer my.tiktoken`. The same text always gives the same file. The text of data/bpe_4096.tiktoken is the
standard library of Python 3.11.7, 12 MB, at 3.47 bytes per token; training took about 15 s on one CPU core.

Proof: tests/test_tokenizer.py::test_trainer_equals_naive_bpe.
"""

import argparse
import base64
import heapq
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import regex

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.sources import build_source
from data.tokenizer import LLAMA3_PATTERN, SHIPPED
from errors import ConfigError

NUM_SPECIALS = 2  # bos and eos, the two ids that build_tokenizer puts after the ranks


def count_words(documents: Iterable[str]) -> Counter[bytes]:
    """The number of times that each word occurs, as UTF-8. A word is a match of Llama 3's pattern; tokens do not cross
    words."""
    pattern = regex.compile(LLAMA3_PATTERN)
    words: Counter[str] = Counter()
    for document in documents:
        words.update(pattern.findall(document))
    return Counter({word.encode("utf-8", "replace"): count for word, count in words.items()})


def train_bpe(words: dict[bytes, int], num_tokens: int) -> list[bytes]:
    """The tokens in the order of their ranks: the 256 bytes, then repeatedly the most frequent two neighbours.

    Neighbours are counted by their joined bytes and not as a pair, because tiktoken merges any neighbours whose joined
    bytes are a token: "a" + "bc" and "ab" + "c" count as the same. Between equal counts, the smaller bytes come first.
    Raises ConfigError if the words give fewer than num_tokens tokens.
    """
    ranks = {bytes([i]): i for i in range(256)}
    counts: Counter[bytes] = Counter()
    users: dict[bytes, set[int]] = defaultdict(set)  # candidate -> words in which it occurs or once occurred
    parts, frequencies = [], []
    for index, (word, frequency) in enumerate(words.items()):
        parts.append([word[i : i + 1] for i in range(len(word))])
        frequencies.append(frequency)
        for candidate in _candidates(parts[index]):
            counts[candidate] += frequency
            users[candidate].add(index)

    # A heap's entries cannot change. So each changed count adds an entry, and stale entries are skipped.
    heap = [(-count, candidate) for candidate, count in counts.items()]
    heapq.heapify(heap)
    while len(ranks) < num_tokens:
        if not heap:
            raise ConfigError(
                f"this text gives at most {len(ranks)} tokens, not {num_tokens}; use a smaller --vocab_size."
            )
        negative, token = heapq.heappop(heap)
        if counts[token] != -negative or not negative:
            continue
        ranks.setdefault(token, len(ranks))
        changed = set()
        for index in users.pop(token):
            before = _candidates(parts[index])
            if token not in before:
                continue
            parts[index] = _merge(parts[index], token)
            for candidate in before:
                counts[candidate] -= frequencies[index]
            for candidate in _candidates(parts[index]):
                counts[candidate] += frequencies[index]
                users[candidate].add(index)
            changed.update(before, _candidates(parts[index]))
        for candidate in changed:
            heapq.heappush(heap, (-counts[candidate], candidate))
    return list(ranks)


def _candidates(parts: list[bytes]) -> list[bytes]:
    return [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]


def _merge(parts: list[bytes], token: bytes) -> list[bytes]:
    """parts, with neighbours that join to token merged from the left."""
    merged, i = [], 0
    while i < len(parts):
        is_token = i + 1 < len(parts) and parts[i] + parts[i + 1] == token
        merged.append(token if is_token else parts[i])
        i += 2 if is_token else 1
    return merged


def write_ranks(path: str | Path, tokens: list[bytes]) -> None:
    lines = [b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    Path(path).write_bytes(b"".join(lines))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=4096, help="number of ids with bos and eos; default: 4096")
    parser.add_argument(
        "--dataset", default="python_stdlib", choices=("python_stdlib", "text"), help="default: %(default)s"
    )
    parser.add_argument("--path", default="", help="for text: a file, folder or glob of text or .jsonl files")
    parser.add_argument("--text_key", default="text", help="the field of a .jsonl line that holds the text")
    parser.add_argument("--output", default=str(SHIPPED["bpe_4096"]), help="the file to write; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.vocab_size < 256 + NUM_SPECIALS:
        raise ConfigError(
            f"--vocab_size ({options.vocab_size}) must be at least {256 + NUM_SPECIALS}: bytes, bos and eos."
        )

    words = count_words(build_source(options.dataset, options.path, options.text_key))
    tokens = train_bpe(words, options.vocab_size - NUM_SPECIALS)
    write_ranks(options.output, tokens)
    print(f"{options.output}: {len(tokens):,} tokens, from {len(words):,} different words")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
