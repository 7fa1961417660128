"""A Hugging Face folder's tokenizer.json as a Tokenizer, by their library (`tokenizers`, an optional one)."""

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer, without_surrogates
from errors import ConfigError


class HFTokenizer(Tokenizer):
    """Which of its tokens begin and end a document, tokenizer_config.json beside it says; templates are not used, and
    the name of a special token in a text is text like any other. ValueError for what is missing or torn."""

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
        except Exception:  # their own kind, which is Exception itself
            raise ConfigError(f"tokenizer {file}: not such a file, or not a whole one.") from None
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{beside}, which says what begins and ends a document, cannot be read: {error.strerror}."
            ) from None
        except ValueError:
            raise ConfigError(f"{beside} is not JSON.") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # as text
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
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unsaid, it warns when the loader forks its workers
        encoded = self._tokenizer.encode_batch([without_surrogates(t) for t in texts], add_special_tokens=False)
        return [np.array(e.ids, dtype="uint32") for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
