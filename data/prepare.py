"""Documents -> a corpus on disk (data/shards.py): in parallel, and resumable after a kill.

A source is cut into jobs that depend on its files alone. Each job becomes a shard. A finished shard leaves a note,
00000.json, and the notes together become the index. So a second run makes only the missing shards. If two runs work in
the same folder at once, they write the same bytes.

Proof: tests/test_shards.py::test_any_number_of_processes_makes_the_same_files,
tests/test_shards.py::test_killed_prepare_makes_only_missing_shards.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np

from data.shards import FORMAT, CorpusIndex, ShardWriter, TokenShard, read_index, shard_path, write_whole
from data.sources import Source
from data.tokenizer import Tokenizer, build_tokenizer
from errors import ConfigError

SHARD_BYTES = 2**28  # about as much of a source's text as a shard holds
BATCH_CHARS = 4_000_000  # text that is encoded at once; the memory in use is proportional to it


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

    processes is the number of worker processes of one thread each; with 0, this process makes the shards with a thread
    for each core. Each process needs memory in proportion to BATCH_CHARS and to the longest document. report is called
    after each shard with the number of finished shards, the number of all shards, and the shard. Raises ConfigError if
    there is no text, a document cannot be read, or the folder cannot be written or holds a different corpus."""
    folder, key, bytes_per_id = Path(folder), cache_key(source, tokenizer, shard_bytes), _bytes_per_id(tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index = read_index(folder)
        _require_same(folder, index.source if index else key, key)
        if index and all(_finished(folder, n, index, key, bytes_per_id) for n in range(len(index.shards))):
            return folder
        jobs = source.jobs(shard_bytes)
        shards = {n: shard for n in range(len(jobs)) if (shard := _finished(folder, n, index, key, bytes_per_id))}
        missing = [(n, job) for n, job in enumerate(jobs) if n not in shards]
        for number, shard in _make_shards(missing, tokenizer, folder, key, processes):
            shards[number] = shard
            report(len(shards), len(jobs), shard)
        shards = [shards[n] for n in range(len(jobs))]
        if not any(shard.num_documents for shard in shards):
            raise ConfigError(f"there is no text in {source}: nothing, or only empty documents.")
        CorpusIndex(key, tokenizer.name, tokenizer.fingerprint, bytes_per_id, tokenizer.eos_id, shards).write(folder)
        for n in range(len(jobs)):
            _note(folder, n).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used: {error.strerror}.") from None
    return folder


def cache_key(source: Source, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES) -> str:
    """Hash of everything that decides a corpus's content. No document is read: the source's fingerprint stands for
    it."""
    text = f"{FORMAT} {tokenizer.fingerprint} {shard_bytes} {source.fingerprint()}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _make_shards(
    jobs: list[tuple[int, Iterable[str]]], tokenizer: Tokenizer, folder: Path, key: str, processes: int
) -> Iterator[tuple[int, TokenShard]]:
    """(number, shard) of each job, in the order in which the shards are finished."""
    if processes == 0:
        for number, job in jobs:
            yield number, _make_shard(job, tokenizer, folder, number, key, threads=None)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.prepare"])
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting, running = iter(jobs), {}
        try:
            while True:
                for number, job in islice(waiting, 2 * processes - len(running)):
                    running[pool.submit(_make_shard_by_name, job, tokenizer.name, folder, number, key)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_shard_by_name(job: Iterable[str], tokenizer: str, folder: Path, number: int, key: str) -> TokenShard:
    return _make_shard(job, _tokenizer(tokenizer), folder, number, key, threads=1)


_tokenizer = lru_cache(1)(build_tokenizer)  # a process makes many shards with the same tokenizer


def _make_shard(
    job: Iterable[str], tokenizer: Tokenizer, folder: Path, number: int, key: str, threads: int | None
) -> TokenShard:
    bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype="uint32")
    eos = np.array([tokenizer.eos_id], dtype="uint32")
    writer = ShardWriter(shard_path(folder, number), _bytes_per_id(tokenizer))
    try:
        for documents in _batches(job):
            for document, ids in zip(documents, tokenizer.encode_batch(documents, threads), strict=True):
                writer.write(np.concatenate([bos, ids, eos]), len(document.encode("utf-8", "replace")))
        shard = writer.close()
    finally:
        writer.abandon()
    write_whole(_note(folder, number), {"source": key, **asdict(shard)})
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
    if batch:
        yield batch


def _bytes_per_id(tokenizer: Tokenizer) -> int:
    return 2 if tokenizer.vocab_size <= 2**16 else 4


def _note(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _finished(folder: Path, number: int, index: CorpusIndex | None, key: str, bytes_per_id: int) -> TokenShard | None:
    """The entry of a shard that an earlier run has finished; None if there is no such shard."""
    if index:
        shard = index.shards[number]
    else:
        try:
            values = json.loads(_note(folder, number).read_text())
            _require_same(folder, values.pop("source"), key)
            shard = TokenShard(**values)
        except (FileNotFoundError, json.JSONDecodeError):
            return None
    path = shard_path(folder, number)
    return shard if path.is_file() and path.stat().st_size == shard.file_bytes(bytes_per_id) else None


def _require_same(folder: Path, found: str, key: str) -> None:
    if found != key:
        raise ConfigError(
            f"{folder} holds a corpus of different files or of a different tokenizer; use another folder, or delete it."
        )
