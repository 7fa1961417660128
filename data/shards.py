"""A corpus on disk: token ids in shards, and an index. Opening reads the index alone; reading checks every block.

    FOLDER/index.json     the tokenizer; for each shard: tokens, documents, bytes of text, SHA-256 of the file
    FOLDER/00000.tokens   ids, little-endian, 2 bytes each (4 where the vocabulary is larger than 65,536), then the
                          CRC-32 of each BLOCK_BYTES of them, 4 bytes each

The ids are one stream over all shards: [bos] ids of a document [eos] [bos] ids of the next document [eos] ... So eos
marks a document's end.

Damage to a shard                   When it is noticed
truncated, or missing               when a run opens the corpus: every file's size is compared with the index
changed, with its size kept         when a run reads the changed block, before it trains on it: by the block's CRC
any of these, or a wrong index      by `scripts/prepare_data.py --verify FOLDER`, which reads everything

Reading a sample reads one or two blocks. Files are not mapped into memory: if a mapped file shrinks, the process is
killed without a message.

Proof: tests/test_shards.py::test_changed_shard_is_noticed_before_training,
tests/test_shards.py::test_opening_a_large_corpus_reads_no_tokens.
"""

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b, sha256
from itertools import accumulate
from pathlib import Path

import numpy as np

from errors import ConfigError
from files import write_json

FORMAT = 2  # raise it when the same documents would give different files
BLOCK_BYTES = 16384  # 8,192 ids of 2 bytes, so that a read of a sample is little larger than the sample
OPEN_FILES = 64  # a process keeps the most recently used files open
MAKE_AGAIN = "run the command that made it again (scripts/prepare_data.py, or train.py): it makes only missing shards."


@dataclass
class TokenShard:
    """The index's entry of a shard."""

    num_tokens: int  # with bos and eos
    num_documents: int
    text_bytes: int  # of the documents, as UTF-8
    sha256: str  # of the file

    def file_bytes(self, bytes_per_id: int) -> int:
        return self.num_tokens * bytes_per_id + 4 * -(-self.num_tokens * bytes_per_id // BLOCK_BYTES)


@dataclass
class CorpusIndex:
    """The content of index.json."""

    source: str  # cache_key of the files and the tokenizer (data/prepare.py)
    tokenizer: str  # name
    tokenizer_fingerprint: str
    bytes_per_id: int  # 2 or 4
    eos_id: int
    shards: list[TokenShard] = field(default_factory=list)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_whole(folder / "index.json", asdict(self))


def read_index(folder: Path) -> CorpusIndex | None:
    """The index of the corpus in a folder; None if there is none. Raises ConfigError if it cannot be used."""
    path = folder / "index.json"
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ConfigError(f"{path} has format {values['format']}, not {FORMAT}; prepare the corpus again.")
        return CorpusIndex(**values | {"shards": [TokenShard(**shard) for shard in values["shards"]]})
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ConfigError(f"{path} is not the index of a corpus; prepare the corpus again.") from None


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.tokens"  # by number: an index holds no names that could lead out of its folder


def write_whole(path: Path, value: dict) -> None:
    """Writes a JSON file that appears whole or not at all."""
    write_json(temporary := _temporary(path), value)
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


class ShardWriter:
    """Writes a shard under a temporary name. close() renames the file and returns the shard's entry in the index."""

    def __init__(self, path: Path, bytes_per_id: int):
        self.path, self.temporary, self.dtype = path, _temporary(path), np.dtype(f"<u{bytes_per_id}")
        self.file, self.digest = open(self.temporary, "wb"), sha256()  # noqa: SIM115
        self.rest, self.checksums = b"", bytearray()
        self.num_tokens = self.num_documents = self.text_bytes = 0

    def write(self, ids: np.ndarray, text_bytes: int) -> None:
        """Appends a document: its ids with bos and eos, and the bytes of its text."""
        self.num_tokens += len(ids)
        self.num_documents += 1
        self.text_bytes += text_bytes
        stream = self.rest + ids.astype(self.dtype).tobytes()
        whole = len(stream) // BLOCK_BYTES * BLOCK_BYTES
        self._write(stream[:whole])
        self.rest = stream[whole:]

    def _write(self, stream: bytes) -> None:
        self.checksums += _checksums(stream)
        self.digest.update(stream)
        self.file.write(stream)

    def close(self) -> TokenShard:
        self._write(self.rest)
        self.digest.update(self.checksums)
        self.file.write(self.checksums)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        return TokenShard(self.num_tokens, self.num_documents, self.text_bytes, self.digest.hexdigest())

    def abandon(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def _checksums(stream: bytes) -> bytes:
    """The CRC-32 of each block, 4 bytes each."""
    blocks = (memoryview(stream)[at : at + BLOCK_BYTES] for at in range(0, len(stream), BLOCK_BYTES))
    return b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)


class Corpus:
    """The stream of token ids in a folder. fingerprint is a hash of the ids. Raises ConfigError if there is no index or
    if a shard's size contradicts it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = index = read_index(self.folder)
        if index is None:
            raise ConfigError(
                f"{self.folder} is not a corpus: it has no index.json; make a corpus with scripts/prepare_data.py, or "
                "let that command finish."
            )
        self.bytes_per_id, self.eos_id = index.bytes_per_id, index.eos_id
        for number, shard in enumerate(index.shards):
            path, expected = shard_path(self.folder, number), shard.file_bytes(self.bytes_per_id)
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}; {MAKE_AGAIN}") from None
            if size != expected:
                raise ConfigError(f"{path} has {size:,} bytes, its index says {expected:,}; {MAKE_AGAIN}")
        self.ends = list(accumulate(shard.num_tokens for shard in index.shards))
        self.num_tokens = self.ends[-1] if self.ends else 0
        self.num_documents = sum(shard.num_documents for shard in index.shards)
        self.text_bytes = sum(shard.text_bytes for shard in index.shards)
        checksums = "".join(shard.sha256 for shard in index.shards)
        self.fingerprint = blake2b(f"{self.bytes_per_id} {checksums}".encode(), digest_size=16).hexdigest()
        self._open = lru_cache(OPEN_FILES)(partial(_open_shard, self.folder))

    def __reduce__(self):
        return Corpus, (self.folder,)  # pickled by its folder: open files cannot go to another process

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids start ... start + count - 1: [count] uint16 or uint32. Raises ConfigError if a block has changed."""
        assert start >= 0 and start + count <= self.num_tokens
        parts, number = [], bisect_right(self.ends, start)
        while count > 0:
            first = start - (self.ends[number] - self.index.shards[number].num_tokens)
            here = min(count, self.ends[number] - start)
            parts.append(self._read(number, first, here))
            start, count, number = start + here, count - here, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read(self, number: int, first: int, count: int) -> np.ndarray:
        """The ids first ... first + count - 1 of a shard."""
        path, size = shard_path(self.folder, number), self.index.shards[number].num_tokens * self.bytes_per_id
        begin, end = first * self.bytes_per_id, (first + count) * self.bytes_per_id
        blocks = range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        offset = blocks.start * BLOCK_BYTES
        try:
            file = self._open(number).fileno()
            stream = os.pread(file, min(blocks.stop * BLOCK_BYTES, size) - offset, offset)
            checksums = os.pread(file, 4 * len(blocks), size + 4 * blocks.start)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        if not stream or _checksums(stream) != checksums:  # a truncated file may have neither ids nor checksums
            raise ConfigError(
                f"{path} has changed since it was written (around byte {begin:,}); delete it, then {MAKE_AGAIN}"
            )
        return np.frombuffer(stream, f"<u{self.bytes_per_id}", count, begin - offset)


def _open_shard(folder: Path, number: int):
    return open(shard_path(folder, number), "rb", buffering=0)


def verify(folder: Path, report: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Reads a whole corpus and returns a line for each shard whose SHA-256 is not the index's. Raises ConfigError as
    Corpus does."""
    index, wrong = Corpus(folder).index, []
    for number, shard in enumerate(index.shards):
        digest, path = sha256(), shard_path(folder, number)
        with open(path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
        if digest.hexdigest() != shard.sha256:
            wrong.append(f"{path}: SHA-256 is {digest.hexdigest()}, not {shard.sha256}")
        report(number + 1, len(index.shards))
    return wrong
