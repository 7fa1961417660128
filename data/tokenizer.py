"""Text to token ids and back, by tiktoken: byte-level BPE, so that every text round-trips and no text is unknown.

A tokenizer has three parts. Each token's bytes have a rank: it is the token's id, and lower ranks merge first. A
regular expression first splits a text into words, and merges never cross words. Special tokens have ids that stand for
no text, and encoding a text never makes them.

Proof: tests/test_tokenizer.py::test_any_text_round_trips, tests/test_tokenizer.py::test_llama3_file_gets_its_specials,
tests/test_tokenizer.py::test_tokenizer_json_round_trips.
"""

import base64
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import tiktoken

from errors import ConfigError, did_you_mean
from files import read_json

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SHIPPED = {"bpe_4096": Path(__file__).parent / "bpe_4096.tiktoken"}

# Llama 3's, as published in llama-models (models/llama3/api/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NUM_RANKS = 128_000
LLAMA3_SPECIALS = [
    BOS, EOS, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
]  # fmt: skip

# A call of tiktoken with more than about a million spaces in a row fails: its regular expression's stack is full.
MAX_PIECE_CHARS = 400_000


class Tokenizer:
    """A byte-level BPE, as build_tokenizer makes it.

    name        as the user wrote it
    vocab_size  number of ids with the special tokens: the largest id + 1
    bos_id      the id before each document; None if the tokenizer has no such token
    eos_id      the id after each document"""

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int]) -> None:
        self.name = name
        self.vocab_size = max(*ranks.values(), *specials.values()) + 1
        self.bos_id = specials.get(BOS, specials.get("<|startoftext|>"))
        self.eos_id = specials[EOS] if EOS in specials else specials["<|endoftext|>"]
        self._ranks, self._pattern, self._specials = ranks, pattern, specials

    def __reduce__(self):
        return _build_once, (self.name,)  # pickled by its name; a process that gets it many times makes it once

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides a text's ids: ranks, pattern, special tokens."""
        digest = blake2b(self._pattern.encode(), digest_size=16)
        for token, rank in sorted(self._ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d:%d:%b" % (rank, len(token), token))
        digest.update(repr(sorted(self._specials.items())).encode())
        return digest.hexdigest()

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:  # made on first use: a run whose tokens are in the cache never encodes
        options = dict(pat_str=self._pattern, mergeable_ranks=self._ranks, special_tokens=self._specials)
        return tiktoken.Encoding(self.name, **options)

    def encode(self, text: str) -> list[int]:
        """The ids of text, without bos and eos. The name of a special token in it is ordinary text."""
        return [i for piece in _pieces(text) for i in self._encode_piece(piece).tolist()]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """encode() of each text, as uint32 arrays, in parallel: tiktoken releases the GIL. threads None: by cores."""
        pieces = [list(_pieces(text)) for text in texts]
        _ = self._encoding  # made here, before threads race for it
        with ThreadPoolExecutor(threads) as pool:
            encoded = pool.map(self._encode_piece, (piece for of_text in pieces for piece in of_text))
            return [np.concatenate([next(encoded) for _ in of_text]) for of_text in pieces]

    def _encode_piece(self, piece: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(without_surrogates(piece), disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens become their names. Bytes that are not UTF-8, and ids that only a model's
        padded vocabulary has, become U+FFFD."""
        tokens = {i: token for token, i in self._ranks.items()} | {i: s.encode() for s, i in self._specials.items()}
        return b"".join(tokens.get(int(i), "\ufffd".encode()) for i in ids).decode("utf-8", errors="replace")


class HFTokenizer(Tokenizer):
    """A Hugging Face folder's tokenizer.json, by their `tokenizers` library (optional). The tokenizer_config.json
    beside it names bos and eos. Templates are not used. Raises ConfigError if a file or the library is missing, or a
    file is incomplete."""

    def __init__(self, name: str, file: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                f"tokenizer {file} is read with Hugging Face's tokenizers: pip install tokenizers."
            ) from None
        try:
            content = file.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except OSError as error:
            raise ConfigError(f"tokenizer {file} cannot be read: {error.strerror}.") from None
        except Exception:  # the library raises the class Exception itself
            raise ConfigError(f"tokenizer {file}: not a tokenizer.json, or not a complete one.") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # their names are ordinary text
        beside = file.with_name("tokenizer_config.json")
        try:
            config = read_json(beside)
        except ConfigError as error:
            raise ConfigError(f"{error} It names the tokens that begin and end a document.") from None
        self.name = name
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        tokens = [config.get(key) for key in ("bos_token", "eos_token")]
        tokens = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        self.bos_id, self.eos_id = (None if t is None else self._tokenizer.token_to_id(t) for t in tokens)
        if self.eos_id is None:
            raise ConfigError(f"{beside} names no eos_token, which ends each document; add it.")
        content += f" {self.bos_id} {self.eos_id}".encode()
        self.fingerprint = blake2b(content, digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        if threads == 1:
            return [np.array(self.encode(text), dtype="uint32") for text in texts]
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # if unset, it warns when the loader forks its workers
        encoded = self._tokenizer.encode_batch([without_surrogates(t) for t in texts], add_special_tokens=False)
        return [np.array(e.ids, dtype="uint32") for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name, a file or a folder.

    "byte"               the 256 bytes, bos and eos
    "bpe_4096"           data/bpe_4096.tiktoken: 4096 ids, trained on Python source text by scripts/train_tokenizer.py
    a tiktoken encoding  by its name, as in "gpt2"; downloaded on first use
    FILE                 in tiktoken's format. A file of 128,000 ranks is Llama 3's tokenizer.model, and gets its 256
                         special tokens. Any other file gets Llama 3's split pattern, and bos and eos after its ranks
    FILE.json            a Hugging Face tokenizer.json
    FOLDER               the tokenizer.json or tokenizer.model in it

    Raises ConfigError for an unknown name, a file that is missing or has a different format, and an encoding that is
    not on this machine and cannot be downloaded."""
    if name == "byte":
        return Tokenizer(name, {bytes([i]): i for i in range(256)}, r"(?s:.+)", {BOS: 256, EOS: 257})
    if name in tiktoken.list_encoding_names():
        return _tiktoken_encoding(name)
    path = SHIPPED.get(name, Path(name).expanduser())
    if path.is_dir():
        # tokenizer.json first: a tokenizer.model beside it may be SentencePiece's. Llama 3's folder has original/.
        files = [path / file for file in ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ConfigError(f"tokenizer {path} is a folder without a tokenizer.json or tokenizer.model in it.")
        path = files[0]
    elif not path.exists() and (os.sep in name or "." in name):
        raise ConfigError(f'tokenizer {name}: no such file or folder; "bpe_4096" and "byte" need none.')
    elif not path.exists():
        names = ["byte", *SHIPPED, *tiktoken.list_encoding_names()]
        valid = f"Valid are {', '.join(names)}, and paths of files."
        raise ConfigError(f'tokenizer "{name}" is unknown;{did_you_mean(name, names)} {valid}')
    if path.suffix == ".json":
        return HFTokenizer(name, path)
    ranks = read_ranks(path)
    specials = LLAMA3_SPECIALS if len(ranks) == LLAMA3_NUM_RANKS else [BOS, EOS]
    return Tokenizer(name, ranks, LLAMA3_PATTERN, {s: len(ranks) + i for i, s in enumerate(specials)})


@lru_cache(1)
def _build_once(name: str) -> Tokenizer:
    return build_tokenizer(name)


def _tiktoken_encoding(name: str) -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # every error of requests is an OSError; a wrong checksum is a ValueError
        raise ConfigError(
            f'tokenizer "{name}" is downloaded by tiktoken on first use, which failed ({type(error).__name__}); put '
            "its file into the folder that TIKTOKEN_CACHE_DIR names, or use a tokenizer that works offline: "
            '"bpe_4096", "byte", or the path of a file in tiktoken\'s format.'
        ) from None
    # The private names are those of tiktoken's own README, "Extending tiktoken".
    tokenizer = Tokenizer(name, encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)
    tokenizer._encoding = encoding
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """{token: rank} of a file in tiktoken's format: lines of `base64(token) rank` with the ranks 0, 1, 2, ...

    tiktoken.load is not used: it keeps a copy under the file's *name*, and reads it after the file has changed."""
    ranks = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
                if len(ranks) != number or int(rank) != number - 1:
                    raise ValueError
    except OSError as error:
        raise ConfigError(f"tokenizer {path} cannot be read: {error.strerror}.") from None
    except ValueError:  # binascii.Error is one, too
        raise ConfigError(
            f"tokenizer {path}, line {number}: not tiktoken's format, lines of `base64(token) rank` with ranks 0, 1, "
            "2, ...; SentencePiece models are not supported."
        ) from None
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise ConfigError(
            f"tokenizer {path}: {len(missing)} of the 256 single bytes have no rank (the first is {missing[0]}), so "
            "not every text could be encoded; is the file complete?"
        )
    return ranks


def without_surrogates(text: str) -> str:
    """text with U+FFFD for each lone half of a surrogate pair, as in JSON's \\ud83d, which is not a character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _pieces(text: str) -> Iterable[str]:
    """Cuts text into parts of at most MAX_PIECE_CHARS, where possible at line ends, so that words stay whole."""
    start = 0
    while len(text) - start > MAX_PIECE_CHARS:
        end = text.rfind("\n", start, start + MAX_PIECE_CHARS) + 1 or start + MAX_PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
