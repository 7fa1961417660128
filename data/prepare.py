"""Documents -> a corpus on disk (data/shards.py), in parallel, and going on where a run that was killed has stopped.

A source is cut in units, in an order and of a size that depend on its files alone; each becomes a shard. A finished
shard leaves a note, 00000.json, and from all notes the index is made at the end. So a second run makes just what is
missing; of two at once, on a file system that machines share, the later one writes the same bytes.
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

from data.shards import FORMAT, Index, Shard, ShardWriter, read_index, shard_path, write_json
from data.tokenizer import Tokenizer, build_tokenizer
from errors import ConfigError

UNIT_BYTES = 2**28  # of a source, about what becomes a shard
BATCH_CHARS = 4_000_000  # text that is encoded at once, and so what the memory in use is measured in

Report = Callable[[int, int, Shard], None]


def prepare(
    source,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    processes: int = 0,
    unit_bytes: int = UNIT_BYTES,
    report: Report = lambda done, total, shard: None,
) -> Path:
    """folder, with the corpus of source's documents in it, of which only what is missing is made now.

    processes: how many make shards, each with one thread; 0: this one, with a thread for each core. report is called
    after each shard, with the number of finished ones and of all. Memory is bounded by BATCH_CHARS and the longest
    document, for each process. ValueError when there is no text, a document cannot be read, the folder cannot be
    written or holds another corpus.
    """
    folder = Path(folder)
    key = source_key(source, tokenizer, unit_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index = read_index(folder)
        _require_same(folder, index.source if index else key, key)
        bytes_per_id = 2 if tokenizer.vocab_size <= 2**16 else 4
        if index and all(_is_there(folder, n, shard, bytes_per_id) for n, shard in enumerate(index.shards)):
            return folder
        units = source.units(unit_bytes)
        shards = {n: shard for n in range(len(units)) if (shard := _finished(folder, n, index, key, bytes_per_id))}
        jobs = [(unit, tokenizer, folder, n, key) for n, unit in enumerate(units) if n not in shards]
        for number, shard in _each(jobs, processes):
            shards[number] = shard
            report(len(shards), len(units), shard)
        shards = [shards[n] for n in range(len(units))]
        if not any(shard.num_documents for shard in shards):
            raise ConfigError(f"there is no text in {source}: nothing, or only empty documents.")
        Index(key, tokenizer.name, tokenizer.fingerprint, bytes_per_id, tokenizer.eos_id, shards).write(folder)
        for n in range(len(units)):
            _note(folder, n).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used: {error.strerror}.") from None
    return folder


def source_key(source, tokenizer: Tokenizer, unit_bytes: int = UNIT_BYTES) -> str:
    """Hash of all that decides what is in a corpus: of files, by their names, sizes and times."""
    text = f"{FORMAT} {tokenizer.fingerprint} {unit_bytes} {source.identity()}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _each(jobs: list[tuple], processes: int) -> Iterator[tuple[int, Shard]]:
    """(number, shard) of each job, as they are done."""
    if processes == 0:
        for unit, tokenizer, folder, number, key in jobs:
            yield _make_shard(unit, tokenizer, folder, number, key, threads=None)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.prepare"])
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        jobs, running = iter(jobs), set()
        try:
            while True:
                for unit, tokenizer, folder, number, key in islice(jobs, 2 * processes - len(running)):
                    running.add(pool.submit(_make_shard_by_name, unit, tokenizer.name, folder, number, key))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_shard_by_name(unit: Iterable[str], tokenizer: str, folder: Path, number: int, key: str) -> tuple[int, Shard]:
    return _make_shard(unit, _tokenizer(tokenizer), folder, number, key, threads=1)


_tokenizer = lru_cache(1)(build_tokenizer)  # a process makes many shards with one


def _make_shard(unit: Iterable[str], tokenizer: Tokenizer, folder: Path, number: int, key: str, threads: int | None):
    bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype="uint32")
    eos = np.array([tokenizer.eos_id], dtype="uint32")
    writer = ShardWriter(shard_path(folder, number), 2 if tokenizer.vocab_size <= 2**16 else 4)
    try:
        for documents in _batches(unit):
            for document, ids in zip(documents, tokenizer.encode_batch(documents, threads), strict=True):
                writer.write(np.concatenate([bos, ids, eos]), len(document.encode("utf-8", "replace")))
        shard = writer.close()
    finally:
        writer.abandon()
    write_json(_note(folder, number), {"source": key, **asdict(shard)})
    return number, shard


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


def _note(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _finished(folder: Path, number: int, index: Index | None, key: str, bytes_per_id: int) -> Shard | None:
    """A shard that an earlier run has finished."""
    if index:
        shard = index.shards[number]
    else:
        try:
            values = json.loads(_note(folder, number).read_text())
            _require_same(folder, values.pop("source"), key)
            shard = Shard(**values)
        except (FileNotFoundError, json.JSONDecodeError):
            return None
    return shard if _is_there(folder, number, shard, bytes_per_id) else None


def _is_there(folder: Path, number: int, shard: Shard, bytes_per_id: int) -> bool:
    path = shard_path(folder, number)
    return path.is_file() and path.stat().st_size == shard.file_bytes(bytes_per_id)


def _require_same(folder: Path, found: str, key: str) -> None:
    if found != key:
        raise ConfigError(
            f"{folder} holds a corpus of other files, or of another tokenizer; give another folder, or delete it."
        )
