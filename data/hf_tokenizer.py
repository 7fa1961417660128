"""A Hugging Face folder's tokenizer.json as a Tokenizer, by their `tokenizers` library (optional).

Proof: tests/test_tokenizer.py::test_tokenizer_json_round_trips.
"""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer, without_surrogates
from errors import ConfigError
from files import read_json


class HFTokenizer(Tokenizer):
    """A tokenizer.json. The tokenizer_config.json beside it names bos and eos.

    Templates are not used, and the name of a special token in a text is ordinary text. Raises ConfigError if a file or
    the library is missing, or a file is incomplete."""

    def __init__(self, name: str, file: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                f"tokenizer {file} is read with Hugging Face's tokenizers: pip install tokenizers."
            ) from None
        beside = file.with_name("tokenizer_config.json")
        try:
            self._content = file.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._content)
        except OSError as error:
            raise ConfigError(f"tokenizer {file} cannot be read: {error.strerror}.") from None
        except Exception:  # the library raises the class Exception itself
            raise ConfigError(f"tokenizer {file}: not a tokenizer.json, or not a complete one.") from None
        try:
            config = read_json(beside)
        except ConfigError as error:
            raise ConfigError(f"{error} It names the tokens that begin and end a document.") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # their names are ordinary text
        self.name = name
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id = self._id(config, "bos_token"), self._id(config, "eos_token")
        if self.eos_id is None:
            raise ConfigError(f"{beside} names no eos_token, which ends each document; add it.")

    def _id(self, config: dict, key: str) -> int | None:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(token) if token is not None else None

    @cached_property
    def fingerprint(self) -> str:
        return blake2b(self._content + f" {self.bos_id} {self.eos_id}".encode(), digest_size=16).hexdigest()

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
