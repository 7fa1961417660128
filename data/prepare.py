"""Documents -> a corpus on disk (data/shards.py): in parallel, and resumable after a kill.

A source is cut into jobs, in an order and of a size that depend on its files alone. Each job becomes a shard. A
finished shard leaves a note, 00000.json, and the notes together become the index. So a second run makes only the
missing shards. If two runs work in the same folder at once, they write the same bytes.

Proof: tests/test_shards.py::test_any_number_of_processes_makes_the_same_files,
tests/test_shards.py::test_killed_prepare_makes_only_missing_shards.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.shards import FORMAT, CorpusIndex, TokenShard, appear_whole, read_index, shard_path, write_shard
from data.sources import Source
from data.tokenizer import Tokenizer
from errors import ConfigError
from files import write_json

SHARD_BYTES = 2**28  # about as much of a source's text as a shard holds
BATCH_CHARS = 4_000_000  # text that is encoded at once; the memory in use is proportional to it
NOTE = ".json"  # the ending of a note's name


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    processes: int = 0,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[int, int, TokenShard], None] = lambda done, total, shard: None,
) -> Path:
    """Makes the corpus of source's documents in folder, as far as it is missing, and returns folder.

    processes is the number of worker processes, of one thread each; with 0, this process makes the shards, with a
    thread for each core. report gets, after each shard, the number of finished shards, the number of all shards, and
    the shard. A process needs memory in proportion to BATCH_CHARS and to the longest document. Raises ConfigError if
    there is no text, a document cannot be read, or the folder cannot be written or holds a different corpus."""
    folder = Path(folder)
    key, bytes_per_id = cache_key(source, tokenizer, shard_bytes), _bytes_per_id(tokenizer)

    def is_there(number: int, shard: TokenShard) -> bool:
        path = shard_path(folder, number)
        return path.is_file() and path.stat().st_size == shard.file_bytes(bytes_per_id)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        index = read_index(folder)
        if index:
            _require_same(folder, index.source, key)
            if all(is_there(n, shard) for n, shard in enumerate(index.shards)):
                return folder
        jobs = source.jobs(shard_bytes)
        known = index.shards if index else [_read_note(folder, n, key) for n in range(len(jobs))]
        shards = {n: shard for n, shard in enumerate(known) if shard and is_there(n, shard)}
        missing = [(n, job) for n, job in enumerate(jobs) if n not in shards]
        for n, shard in _make_shards(missing, tokenizer, folder, key, processes):
            shards[n] = shard
            report(len(shards), len(jobs), shard)
        if not any(shard.num_documents for shard in shards.values()):
            raise ConfigError(f"there is no text in {source}: nothing, or only empty documents.")
        shards = [shards[n] for n in range(len(jobs))]
        CorpusIndex(key, tokenizer.name, tokenizer.fingerprint, bytes_per_id, tokenizer.eos_id, shards).write(folder)
        for n in range(len(jobs)):
            shard_path(folder, n, NOTE).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used: {error.strerror}.") from None
    return folder


def cache_key(source: Source, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES) -> str:
    """Hash of all that decides a corpus's content. A file stands in it by name, size and time, so that none is read."""
    text = f"{FORMAT} {tokenizer.fingerprint} {shard_bytes} {source.fingerprint()}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _make_shards(
    jobs: list[tuple[int, Iterable[str]]], tokenizer: Tokenizer, folder: Path, key: str, processes: int
) -> Iterator[tuple[int, TokenShard]]:
    """(number, shard) of each job, in the order in which the shards are finished."""
    if processes == 0:
        for number, job in jobs:
            yield number, _make_shard(job, tokenizer, folder, number, key)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.prepare"])
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {pool.submit(_make_shard, job, tokenizer, folder, n, key, threads=1): n for n, job in jobs}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_shard(
    job: Iterable[str], tokenizer: Tokenizer, folder: Path, number: int, key: str, threads: int | None = None
) -> TokenShard:
    bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype="uint32")
    eos = np.array([tokenizer.eos_id], dtype="uint32")
    documents = (
        (np.concatenate([bos, ids, eos]), len(text.encode("utf-8", "replace")))
        for texts in _batches(job)
        for text, ids in zip(texts, tokenizer.encode_batch(texts, threads), strict=True)
    )
    shard = write_shard(shard_path(folder, number), _bytes_per_id(tokenizer), documents)
    with appear_whole(shard_path(folder, number, NOTE)) as temporary:
        write_json(temporary, {"source": key, **asdict(shard)})
    return shard


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about BATCH_CHARS characters, so that each thread gets some."""
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def _bytes_per_id(tokenizer: Tokenizer) -> int:
    return 2 if tokenizer.vocab_size <= 2**16 else 4


def _read_note(folder: Path, number: int, key: str) -> TokenShard | None:
    try:
        note = json.loads(shard_path(folder, number, NOTE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    _require_same(folder, note.pop("source"), key)
    return TokenShard(**note)


def _require_same(folder: Path, found: str, key: str) -> None:
    if found != key:
        raise ConfigError(
            f"{folder} holds a corpus of different files or of a different tokenizer; use another folder, or delete it."
        )
