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

Opening a corpus looks up the size of each file, and reading a sample reads one or two blocks, for a corpus of any size.
Files are not mapped into memory: if a mapped file shrinks, the process is killed without a message.

Proof: tests/test_shards.py::test_changed_shard_is_noticed_before_training,
tests/test_shards.py::test_opening_a_large_corpus_reads_no_tokens.
"""

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
        with appear_whole(folder / "index.json") as temporary:
            write_json(temporary, asdict(self))


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


def shard_path(folder: Path, number: int, suffix: str = ".tokens") -> Path:
    return folder / f"{number:05}{suffix}"  # by number: an index holds no names that could lead out of its folder


@contextmanager
def appear_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to. It becomes path at the end of the block, and is deleted after an error."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checksums(stream: bytes | memoryview) -> bytes:
    blocks = (stream[start : start + BLOCK_BYTES] for start in range(0, len(stream), BLOCK_BYTES))
    return b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)


def write_shard(path: Path, bytes_per_id: int, documents: Iterable[tuple[np.ndarray, int]]) -> TokenShard:
    """Writes a shard, returns its entry in the index. documents: ids with bos and eos, and the bytes of the text."""
    shard, digest = TokenShard(0, 0, 0, ""), sha256()
    rest, checksums = b"", bytearray()  # the ids after the last full block; the CRCs of the full blocks
    with appear_whole(path) as temporary, open(temporary, "wb") as file:
        for ids, text_bytes in documents:
            shard.num_tokens += len(ids)
            shard.num_documents += 1
            shard.text_bytes += text_bytes
            stream = rest + ids.astype(f"<u{bytes_per_id}").tobytes()
            whole = len(stream) // BLOCK_BYTES * BLOCK_BYTES
            blocks, rest = stream[:whole], stream[whole:]
            checksums += _checksums(blocks)
            digest.update(blocks)
            file.write(blocks)
        end = rest + checksums + _checksums(rest)
        digest.update(end)
        file.write(end)
        file.flush()
        os.fsync(file.fileno())
    shard.sha256 = digest.hexdigest()
    return shard


class Corpus:
    """The stream of token ids in a folder; fingerprint is a hash of the ids. Raises ConfigError if there is no index,
    or if a shard's size contradicts it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise ConfigError(
                f"{self.folder} is not a corpus: it has no index.json; make a corpus with scripts/prepare_data.py, or "
                "let that command finish."
            )
        self.index, self.bytes_per_id, self.eos_id = index, index.bytes_per_id, index.eos_id
        self.paths = [shard_path(self.folder, number) for number in range(len(index.shards))]
        for path, shard in zip(self.paths, index.shards, strict=True):
            expected = shard.file_bytes(self.bytes_per_id)
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
        self._open = lru_cache(OPEN_FILES)(partial(open, mode="rb", buffering=0))

    def __reduce__(self):
        return Corpus, (self.folder,)  # pickled by its folder: open files cannot go to another process

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids start ... start + count - 1: [count] uint16 or uint32. ConfigError if a block of them has changed."""
        assert start >= 0 and start + count <= self.num_tokens
        parts = []
        while count > 0:
            number = bisect_right(self.ends, start)
            first = start - (self.ends[number] - self.index.shards[number].num_tokens)
            here = min(count, self.ends[number] - start)
            parts.append(self._read(number, first, here))
            start, count = start + here, count - here
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read(self, number: int, first: int, count: int) -> np.ndarray:
        """The ids first ... first + count - 1 of a shard."""
        path = self.paths[number]
        size = self.index.shards[number].num_tokens * self.bytes_per_id
        begin, end = first * self.bytes_per_id, (first + count) * self.bytes_per_id
        blocks = range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        offset = blocks.start * BLOCK_BYTES
        try:
            file = self._open(path).fileno()
            stream = os.pread(file, min(blocks.stop * BLOCK_BYTES, size) - offset, offset)
            checksums = os.pread(file, 4 * len(blocks), size + 4 * blocks.start)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        if len(checksums) < 4 * len(blocks) or _checksums(memoryview(stream)) != checksums:
            raise ConfigError(
                f"{path} has changed since it was written (around byte {begin:,}); delete it, then {MAKE_AGAIN}"
            )
        return np.frombuffer(stream, f"<u{self.bytes_per_id}", count, begin - offset)
