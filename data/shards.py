"""A corpus on disk: token ids in shards, and an index. It is opened without being read, and read without being trusted.

    FOLDER/index.json     the tokenizer, and of each shard: tokens, documents, bytes of text, SHA-256 of the file
    FOLDER/00000.tokens   ids, little-endian, 2 bytes each (4 where the vocabulary is larger than 65,536), then the
                          CRC-32 of each BLOCK_BYTES of them, 4 bytes each

The ids are one stream over all shards, [bos] ids of a document [eos] [bos] ids of the next [eos] ...: eos is a
document's boundary.

What happened to a shard                noticed
truncated, or missing                   when a run opens the corpus: it compares every file's size with the index
changed, its size kept                  when a run reads the changed block, before it trains on it: by the block's CRC
either, or an index of another corpus   by `scripts/prepare_data.py --verify FOLDER`, which reads everything

Opening costs a look at each file's size, reading a sample one or two blocks, whatever the size of the corpus. Files are
read by position and not mapped into memory: a map of a file that shrinks kills the process without a word.
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

FORMAT = 2  # raise it when the same documents would give other files
BLOCK_BYTES = 16384  # what is read and checked for a sample of up to 8,192 tokens is little more than the sample
OPEN_FILES = 64  # of a process, the latest used
MAKE_AGAIN = "start again what made it (scripts/prepare_data.py, or a run of text): it makes just what is missing."


@dataclass
class Shard:
    num_tokens: int  # bos and eos included
    num_documents: int
    text_bytes: int  # of the documents, as UTF-8
    sha256: str  # of the file

    def file_bytes(self, bytes_per_id: int) -> int:
        return self.num_tokens * bytes_per_id + 4 * -(-self.num_tokens * bytes_per_id // BLOCK_BYTES)


@dataclass
class Index:
    source: str  # hash of what it was made of: files and tokenizer
    tokenizer: str  # its name
    tokenizer_fingerprint: str
    bytes_per_id: int  # 2 or 4
    eos_id: int
    shards: list[Shard] = field(default_factory=list)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_json(folder / "index.json", asdict(self))


def read_index(folder: Path) -> Index | None:
    """The index of a corpus; None where there is none. ValueError for one that cannot be used."""
    path = folder / "index.json"
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ConfigError(f"{path} has format {values['format']}, not {FORMAT}; prepare the corpus again.")
        return Index(**values | {"shards": [Shard(**shard) for shard in values["shards"]]})
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ConfigError(f"{path} is not a corpus' index; prepare the corpus again.") from None


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.tokens"  # by number: no name from an index leads out of its folder


def write_json(path: Path, value: dict) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


class ShardWriter:
    """Writes a shard under a temporary name; close() gives it its own, and returns what the index says of it."""

    def __init__(self, path: Path, bytes_per_id: int):
        self.path, self.temporary = path, path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.dtype = np.dtype(f"<u{bytes_per_id}")
        self.file, self.digest = open(self.temporary, "wb"), sha256()  # noqa: SIM115
        self.rest, self.checksums = b"", bytearray()
        self.num_tokens = self.num_documents = self.text_bytes = 0

    def write(self, ids: np.ndarray, text_bytes: int) -> None:
        """A document: all of its ids, bos and eos included."""
        self.num_tokens += len(ids)
        self.num_documents += 1
        self.text_bytes += text_bytes
        stream = self.rest + ids.astype(self.dtype).tobytes()
        whole = len(stream) // BLOCK_BYTES * BLOCK_BYTES
        self._write(stream[:whole])
        self.rest = stream[whole:]

    def _write(self, stream: bytes) -> None:
        for start in range(0, len(stream), BLOCK_BYTES):
            self.checksums += zlib.crc32(stream[start : start + BLOCK_BYTES]).to_bytes(4, "little")
        self.digest.update(stream)
        self.file.write(stream)

    def close(self) -> Shard:
        self._write(self.rest)
        self.digest.update(self.checksums)
        self.file.write(self.checksums)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        return Shard(self.num_tokens, self.num_documents, self.text_bytes, self.digest.hexdigest())

    def abandon(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


class Corpus:
    """The stream of ids in a folder. ValueError when it cannot be what its index says.

    fingerprint is a hash of the ids: a run that resumes with another one reads other data."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise ConfigError(
                f"{self.folder} is no corpus: it has no index.json; make one with scripts/prepare_data.py, or let it "
                "finish there."
            )
        self.index, self.bytes_per_id, self.eos_id = index, index.bytes_per_id, index.eos_id
        for number in range(len(index.shards)):
            self._require_size(number)
        self.ends = list(accumulate(shard.num_tokens for shard in index.shards))
        self.num_tokens = self.ends[-1] if self.ends else 0
        self.num_documents = sum(shard.num_documents for shard in index.shards)
        self.text_bytes = sum(shard.text_bytes for shard in index.shards)
        checksums = "".join(shard.sha256 for shard in index.shards)
        self.fingerprint = blake2b(f"{self.bytes_per_id} {checksums}".encode(), digest_size=16).hexdigest()
        self._open = lru_cache(OPEN_FILES)(partial(_open_shard, self.folder))

    def __reduce__(self):
        return Corpus, (self.folder,)  # open files stay in their process

    def read(self, start: int, count: int) -> np.ndarray:
        """ids start to start + count: [count] of uint16 or uint32. ValueError where they are not those that were
        written."""
        assert start >= 0 and start + count <= self.num_tokens
        parts = []
        number = bisect_right(self.ends, start)
        while count > 0:
            first = start - (self.ends[number] - self.index.shards[number].num_tokens)
            here = min(count, self.ends[number] - start)
            parts.append(self._read(number, first, here))
            start, count, number = start + here, count - here, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read(self, number: int, first: int, count: int) -> np.ndarray:
        size = self.index.shards[number].num_tokens * self.bytes_per_id
        begin, end = first * self.bytes_per_id, (first + count) * self.bytes_per_id
        blocks = range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        offset = blocks.start * BLOCK_BYTES
        try:
            file = self._open(number).fileno()
            stream = os.pread(file, min(blocks.stop * BLOCK_BYTES, size) - offset, offset)
            checksums = os.pread(file, 4 * len(blocks), size + 4 * blocks.start)
        except OSError as error:
            raise ConfigError(f"{shard_path(self.folder, number)} cannot be read: {error.strerror}.") from None
        found = b"".join(
            zlib.crc32(memoryview(stream)[at : at + BLOCK_BYTES]).to_bytes(4, "little")
            for at in range(0, len(blocks) * BLOCK_BYTES, BLOCK_BYTES)
        )
        if found != checksums:
            raise ConfigError(
                f"{shard_path(self.folder, number)} has changed since it was written (around byte {begin:,}); delete "
                f"it, and {MAKE_AGAIN}"
            )
        return np.frombuffer(stream, f"<u{self.bytes_per_id}", count, begin - offset)

    def _require_size(self, number: int) -> None:
        path = shard_path(self.folder, number)
        expected = self.index.shards[number].file_bytes(self.bytes_per_id)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}; {MAKE_AGAIN}") from None
        if size != expected:
            raise ConfigError(f"{path} has {size:,} bytes, its index says {expected:,}; {MAKE_AGAIN}")


def _open_shard(folder: Path, number: int):
    return open(shard_path(folder, number), "rb", buffering=0)


def verify(folder: Path, report: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Reads a whole corpus; a line for each shard whose SHA-256 is not its index's. ValueError as from `Corpus`."""
    index, wrong = Corpus(folder).index, []
    for number, shard in enumerate(index.shards):
        digest = sha256()
        with open(shard_path(folder, number), "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
        if digest.hexdigest() != shard.sha256:
            wrong.append(f"{shard_path(folder, number)}: SHA-256 is {digest.hexdigest()}, not {shard.sha256}")
        report(number + 1, len(index.shards))
    return wrong
