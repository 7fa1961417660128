"""Corpora on disk: they are made in parallel and in spite of kills, and damage to them is noticed."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import ROOT
from helpers.fault_table import fault
from helpers.runs import TINY, argv, run_command
from helpers.texts import BYTE

from data import build_dataset, build_loader, build_tokenizer
from data.dataset import TokenDataset
from data.prepare import prepare
from data.shards import BLOCK_BYTES, Corpus, CorpusIndex, TokenShard, read_index, shard_path
from data.sources import build_source
from scripts.prepare_data import verify

SHARD_BYTES = 10_000  # of text per shard


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """About 100 KB of documents, some longer than a shard's text."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [
        json.dumps({"text": f"document {i} " + "many words " * (i % 40) * (1 + 30 * (i == 77))}) for i in range(400)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("one more")
    return folder


def command(texts, output, *more: str) -> list[str]:
    options = [
        "--path",
        str(texts),
        "--tokenizer",
        "byte",
        "--output",
        str(output),
        "--shard_bytes",
        str(SHARD_BYTES),
        *more,
    ]
    return [sys.executable, "scripts/prepare_data.py", *options]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    prepare(build_source("text", str(texts)), BYTE, folder, shard_bytes=SHARD_BYTES)
    return folder


# ---------------------------------------------------------------------------------- what is written


def test_stream_is_bos_ids_eos_per_document(tmp_path):
    """Documents are in order; a tokenizer without bos gives ids and eos."""
    (tmp_path / "a.jsonl").write_text('{"text": "hi"}\n{"text": "you"}\n')
    source = build_source("text", str(tmp_path / "*.jsonl"))
    corpus = Corpus(prepare(source, BYTE, tmp_path / "cache"))
    tokens = corpus.read(0, corpus.num_tokens)
    assert tokens.dtype == np.uint16 and tokens.tolist() == [256, *b"hi", 257, 256, *b"you", 257]
    assert (corpus.num_tokens, corpus.num_documents, corpus.text_bytes) == (9, 2, 5)

    no_bos = build_tokenizer("byte")
    no_bos.bos_id, no_bos.vocab_size = None, 70_000
    corpus = Corpus(prepare(source, no_bos, tmp_path / "cache32"))
    tokens = corpus.read(0, corpus.num_tokens)
    assert tokens.dtype == np.uint32 and tokens.tolist() == [*b"hi", 257, *b"you", 257]


def test_many_shards_are_one_stream(texts, corpus, tmp_path):
    """A stream that is cut into many shards equals the stream in one shard, wherever it is read."""
    whole = Corpus(prepare(build_source("text", str(texts)), BYTE, tmp_path))
    parts = Corpus(corpus)
    assert len(parts.index.shards) > 8 and len(whole.index.shards) == 1
    assert any(shard.num_tokens * 2 > BLOCK_BYTES for shard in parts.index.shards)
    stream = whole.read(0, whole.num_tokens)
    assert parts.num_tokens == len(stream) and parts.num_documents == 401
    rng = np.random.default_rng(0)
    for start, count in zip(rng.integers(0, len(stream), 200), rng.integers(1, 30_000, 200), strict=True):
        count = min(int(count), len(stream) - int(start))
        assert np.array_equal(parts.read(int(start), count), stream[start : start + count])
    assert len(os.listdir("/proc/self/fd")) < 200


def test_any_number_of_processes_makes_the_same_files(texts, corpus, tmp_path):
    """The files are equal byte for byte, no other file is left, and the command reports the corpus."""
    done = run(command(texts, tmp_path / "out", "--processes", "2"))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(corpus)
    shards = len(read_index(corpus).shards)
    assert f"{shards}/{shards} shards" in done.stdout and "401 documents" in done.stdout
    done = run([sys.executable, "scripts/prepare_data.py", "--verify", str(tmp_path / "out")])
    assert done.returncode == 0 and "every shard is as it was written" in done.stdout


def test_killed_prepare_makes_only_missing_shards(texts, corpus, tmp_path):
    """Started again after a kill, the command keeps finished shards, and the files are those of a run that is not
    killed."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(texts, out, "--processes", "1"), cwd=ROOT, start_new_session=True)
    while len(list(out.glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tokens") if path.with_suffix(".json").exists()}
    assert len(finished) >= 3 and not (out / "index.json").exists()
    with pytest.raises(
        ValueError, match=r"out is not a corpus: it has no index\.json; make a corpus with scripts/prepare_data"
    ):
        Corpus(out)
    (out / "00001.json").write_text("{torn")
    assert run(command(texts, out, "--processes", "0")).returncode == 0
    remade = [path.name for path, written in finished.items() if path.stat().st_mtime_ns != written]
    assert remade == ["00001.tokens"]
    assert {k: v for k, v in files_of(out).items() if not k.endswith(".tmp")} == files_of(corpus)


def test_prepare_does_not_overwrite_another_corpus(texts, corpus, tmp_path):
    """A folder with different data is refused, as are an index of a different format and a file that is not an
    index."""
    done = run(command(texts, corpus, "--shard_bytes", "999"))
    assert (
        done.returncode == 1 and "holds a corpus of different files" in done.stderr and "Traceback" not in done.stderr
    )
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"index\.json has format 99, not 2"):
        Corpus(tmp_path)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the index of a corpus"):
        Corpus(tmp_path)


# ---------------------------------------------------------------------------------- damage


def copied(corpus, folder):
    folder.mkdir(exist_ok=True)
    for name, content in files_of(corpus).items():
        (folder / name).write_bytes(content)
    return folder


@fault("data: truncated or missing shard")
def test_truncated_shard_is_noticed_at_start(texts, corpus, tmp_path):
    """A truncated or missing shard is noticed when a run opens the corpus. The command that made the corpus makes it
    again, and no other shard."""
    folder = copied(corpus, tmp_path)
    path = shard_path(folder, 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"00003\.tokens has [\d,]+ bytes, its index says [\d,]+; run the command that made"
    ):
        Corpus(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"00003\.tokens cannot be read: No such file or directory; run the command"):
        Corpus(folder)
    prepare(build_source("text", str(texts)), BYTE, folder, shard_bytes=SHARD_BYTES)
    assert files_of(folder) == files_of(corpus)


@fault("data: a shard changed, its size kept")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_changed_shard_is_noticed_before_training(corpus, tmp_path, num_workers):
    """One changed bit is noticed before a run trains on it, and by --verify. Both name the shard. Samples of other
    blocks can still be read."""
    folder = copied(corpus, tmp_path)
    content = bytearray(shard_path(folder, 3).read_bytes())
    content[1001] ^= 4
    shard_path(folder, 3).write_bytes(content)
    changed = Corpus(folder)
    start = changed.ends[2] + 500
    changed.read(0, 64)
    dataset = TokenDataset([changed], seq_len=64, seed=0)
    loader = build_loader(
        dataset, global_batch_size=8, local_batch_size=4, dp_rank=0, dp_degree=1, num_workers=num_workers
    )
    with pytest.raises(ValueError) as error:
        for _ in range(len(dataset) // 8 + 1):
            next(loader)
    assert "00003.tokens has changed since it was written (around byte" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"00003\.tokens has changed"):
        changed.read(start, 1)
    assert [line.split(":")[0] for line in verify(folder)] == [str(shard_path(folder, 3))]
    done = run([sys.executable, "scripts/prepare_data.py", "--verify", str(folder)])
    assert done.returncode == 1 and "00003.tokens: SHA-256" in done.stderr


@fault("data: a run on a shard that has changed")
def test_run_on_a_changed_shard_ends_with_its_name(corpus, tmp_path):
    """The run ends with one line that names the shard, although a worker has read it."""
    folder = copied(corpus, tmp_path / "changed")
    content = bytearray(shard_path(folder, 0).read_bytes())
    content[::BLOCK_BYTES] = bytes(255 - b for b in content[::BLOCK_BYTES])
    shard_path(folder, 0).write_bytes(content)
    data = {"data.dataset": "shards", "data.path": str(folder), "data.num_workers": "1", "training.steps": "99"}
    arguments = argv(TINY, data, {"job.dump_folder": str(tmp_path / "run"), "training.local_batch_size": "8"})
    ended_well, lines = run_command(1, arguments, tmp_path)
    assert not ended_well and "00000.tokens has changed since it was written" in lines[-1], lines
    assert "Traceback" not in "\n".join(lines)


@fault("data: a shard shrinks while it is read")
def test_shard_that_shrinks_while_read_is_an_error(corpus, tmp_path):
    """The error names the shard, and the process is not killed."""
    folder = copied(corpus, tmp_path)
    opened = Corpus(folder)
    opened.read(0, 10)
    os.truncate(shard_path(folder, 0), 100)
    with pytest.raises(ValueError, match=r"00000\.tokens has changed"):
        opened.read(0, 10)


# ---------------------------------------------------------------------------------- as a dataset


def test_shards_dataset_rejects_wrong_folder_tokenizer_and_weights(corpus, tmp_path):
    """A right folder is read; each mistake is one line with the cure."""

    def build(path=str(corpus), tokenizer=BYTE, **options):
        return build_dataset("shards", path, tokenizer, seq_len=64, seed=0, **options)

    dataset = build()
    assert len(dataset) == (Corpus(corpus).num_tokens - 1) // 64
    for match, arguments in (
        ("needs data.path", dict(path="")),
        ("nowhere is not a corpus", dict(path=f"{tmp_path}/nowhere")),
        (r"made with the tokenizer byte, .* set --data\.tokenizer byte", dict(tokenizer=build_tokenizer("bpe_4096"))),
        (r"has a weight for 1 of its 2 folders; give every folder a weight", dict(path=f"{corpus}:1,{corpus}")),
        (
            r'the weight of \S+ \("x"\) must be a positive number, as in A:0\.7,B:0\.3',
            dict(path=f"{corpus}:1,{corpus}:x"),
        ),
        (r'the weight of \S+ \("0"\)', dict(path=f"{corpus}:1,{corpus}:0")),
        (r'the weight of \S+ \("inf"\)', dict(path=f"{corpus}:inf")),
    ):
        with pytest.raises(ValueError, match=match):
            build(**arguments)


def test_opening_a_large_corpus_reads_no_tokens(tmp_path):
    """50 GB in 50 shards are opened in less than 2 seconds; with 300 samples read, in less than 4 seconds and 50 MB."""
    tokens = 500_000_000
    blank, rest = (zlib.crc32(bytes(n)).to_bytes(4, "little") for n in (BLOCK_BYTES, 2 * tokens % BLOCK_BYTES))
    shard = TokenShard(tokens, 1, tokens, "0" * 64)
    index = CorpusIndex("", "byte", BYTE.fingerprint, 2, BYTE.eos_id, [shard] * 50)
    for number in range(50):
        with open(shard_path(tmp_path, number), "wb") as file:
            file.truncate(2 * tokens)  # a sparse file: zeros that take no space
            file.seek(0, os.SEEK_END)
            file.write(blank * (2 * tokens // BLOCK_BYTES) + rest)
    index.write(tmp_path)
    program = f"""
import resource, time
from data import build_dataset, build_tokenizer
tokenizer, start = build_tokenizer("byte"), time.perf_counter()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = build_dataset("shards", {str(tmp_path)!r}, tokenizer, seq_len=8192, seed=0)
opened = time.perf_counter() - start
for i in range(300): dataset[i]
print(opened, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    opened, sampled, kilobytes = map(float, done.stdout.split())
    assert opened < 2 and sampled < 4 and kilobytes < 50_000
