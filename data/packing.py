"""All documents as one flat stream of token ids, kept in a file.

    [bos] ids of document 0 [eos] [bos] ids of document 1 [eos] ...

The file is a JSON line padded to HEADER_BYTES, then the ids, little-endian, two bytes each when the
vocabulary fits (four otherwise), so that any process maps it into memory without reading it. It is written
under a temporary name and renamed when complete: a crash leaves no torn cache, and of several writers the
last one wins with the same bytes.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.sources import Source
from data.tokenizer import Tokenizer

FORMAT_VERSION = 1  # part of the cache's key: raise it when the same documents would give other bytes
HEADER_BYTES = 4096  # a memory page, so that the ids are aligned
BATCH_CHARS = 4_000_000  # text that is encoded at once, and so what the memory in use is measured in


@dataclass
class Header:
    num_tokens: int  # bos and eos included
    num_documents: int
    text_bytes: int  # of the documents, as UTF-8
    bytes_per_id: int  # 2 or 4
    vocab_size: int
    eos_id: int
    fingerprint: str  # hash of all ids: equal for equal streams, on any machine


def pack(source: Source, tokenizer: Tokenizer, cache_folder: str | Path) -> Path:
    """The path of the stream of source's documents, which is tokenised now unless the cache has it already.

    Memory in use is bounded by BATCH_CHARS and the longest document. A cached file is found by the names,
    sizes and times of the source's files and the tokenizer's fingerprint. Raises ValueError when there is no
    text, a document cannot be read, or the cache cannot be written.
    """
    key = blake2b(f"{FORMAT_VERSION} {tokenizer.fingerprint} {source.identity()}".encode(), digest_size=16)
    path = Path(cache_folder) / f"{key.hexdigest()}.tokens"
    try:
        if read_header(path) is not None:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            _write(temporary, source, tokenizer)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_folder ({cache_folder}) cannot be used: {error.strerror}.") from None
    return path


def read_header(path: Path) -> Header | None:
    """The header of a stream's file; None when it is missing, torn, or something else."""
    try:
        with open(path, "rb") as file:
            header = Header(**json.loads(file.read(HEADER_BYTES)))
            size = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return header if size == HEADER_BYTES + header.num_tokens * header.bytes_per_id else None


def open_tokens(path: Path, header: Header) -> np.ndarray:
    """The ids, [num_tokens] of uint16 or uint32, mapped from the file and not read."""
    return np.memmap(path, dtype=f"<u{header.bytes_per_id}", mode="r", offset=HEADER_BYTES, shape=(header.num_tokens,))


def _write(path: Path, source: Source, tokenizer: Tokenizer) -> None:
    bytes_per_id = 2 if tokenizer.vocab_size <= 2**16 else 4
    bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype="uint32")
    eos = np.array([tokenizer.eos_id], dtype="uint32")
    num_tokens = num_documents = text_bytes = 0
    digest = blake2b(digest_size=16)
    with open(path, "wb") as file:
        file.seek(HEADER_BYTES)
        for documents in _batches(source):
            for document, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
                stream = np.concatenate([bos, ids, eos]).astype(f"<u{bytes_per_id}")
                digest.update(stream)
                file.write(stream)
                num_tokens += len(stream)
                text_bytes += len(document.encode("utf-8", "replace"))
            num_documents += len(documents)
        if num_documents == 0:
            raise ValueError(f"there is no text in the {len(source.files)} file(s) of {source.root}: all are empty.")
        header = Header(
            num_tokens=num_tokens,
            num_documents=num_documents,
            text_bytes=text_bytes,
            bytes_per_id=bytes_per_id,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            fingerprint=digest.hexdigest(),
        )
        file.seek(0)
        file.write(json.dumps(asdict(header)).encode().ljust(HEADER_BYTES))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about BATCH_CHARS characters together, so that threads have enough to share."""
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
