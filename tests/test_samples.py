"""Samples as a pure function of (data, seed, i), and the loader's one integer."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import BYTE, text_dataset

from data import build_dataset, build_loader, build_tokenizer
from data.dataset import permute

# ---------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("n", [*range(1, 40), 99, 100, 101, 1000, 4096, 4099])
def test_permutation_is_a_bijection(n):
    """Each epoch visits each of n windows once, and large n in an order of its own for each epoch and
    seed.
    """
    orders = [[permute(i, n, seed, epoch) for i in range(n)] for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 30:
        assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
        fixed = sum(i == j for order in orders for i, j in enumerate(order))
        assert fixed < 20  # 1 an order on average


def test_permutation_of_few_is_fair():
    """All 24 orders of 4 windows come about equally often: no small data set is stuck in a few orders."""
    counts = Counter(tuple(permute(i, 4, seed, epoch) for i in range(4)) for seed in range(40) for epoch in range(60))
    assert len(counts) == 24 and all(60 < count < 145 for count in counts.values())


def test_permutation_of_many():
    """A huge n costs no more memory or time, and neighbours land far apart."""
    n = 10**15
    places = [permute(i, n, 0, 3) for i in range(2000)]
    assert len(set(places)) == 2000 and all(0 <= place < n for place in places)
    assert np.histogram(places, bins=10, range=(0, n))[0].min() > 150


def test_windows_cover_the_stream(tmp_path):
    """An epoch's windows, put in place, are the whole stream: each id but the first (and the rest) is a label
    once.
    """
    dataset = text_dataset(tmp_path, seq_len=7)
    stream = dataset.corpora[0].read(0, dataset.corpora[0].num_tokens)
    n = len(dataset)
    assert n == (len(stream) - 1) // 7
    for epoch in (0, 1, 5):
        windows = {permute(i, n, 0, epoch): dataset[epoch * n + i]["tokens"].tolist() for i in range(n)}
        assert [token for w in range(n) for token in windows[w]] == stream[: n * 7].tolist()


def test_sample(tmp_path):
    """labels are the next tokens, but -100 behind a document's end; positions count the window; all int64."""
    (tmp_path / "a.jsonl").write_text('{"text": "hi"}\n{"text": "you"}\n')
    dataset = build_dataset("text", str(tmp_path / "a.jsonl"), BYTE, seq_len=8, seed=0, cache_folder=tmp_path / "cache")
    sample = dataset[0]
    assert all(tensor.dtype == torch.int64 for tensor in sample.values())
    assert sample["tokens"].tolist() == [256, *b"hi", 257, 256, *b"you"]
    assert sample["labels"].tolist() == [*b"hi", 257, -100, *b"you", 257]
    assert sample["positions"].tolist() == list(range(8))
    assert len(dataset) == 1 and dataset[12345]["tokens"].equal(sample["tokens"])


def test_too_long(tmp_path):
    """A seq_len beyond the data says both numbers and what fits, and what fits does."""
    with pytest.raises(ValueError, match=r"seq_len \(8\) needs 9 tokens, but the whole data has 5; use at most 4"):
        text_dataset(tmp_path, "abc")
    assert len(text_dataset(tmp_path, "abc", seq_len=4)) == 1


def test_samples_are_the_same_in_any_process(tmp_path):
    """Samples depend on (data, seed, i) only: not on hash randomisation, not on what was read before."""
    dataset = text_dataset(tmp_path, seed=7)
    program = (
        "import sys; from data.dataset import TokenDataset; from data.shards import Corpus\n"
        "d = TokenDataset([Corpus(sys.argv[1])], seq_len=8, seed=7)\n"
        "print([d[i]['tokens'].tolist() for i in (1000, 3, 77)])"
    )
    here = str([dataset[i]["tokens"].tolist() for i in (1000, 3, 77)])
    process = subprocess.run(
        [sys.executable, "-c", program, str(dataset.corpora[0].folder)],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # conftest has put the repository on its path
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == here
    assert pickle.loads(pickle.dumps(dataset))[77]["tokens"].equal(dataset[77]["tokens"])
    assert len(pickle.dumps(dataset)) < 1000  # the folder goes to a worker, not the tokens
    assert not all(text_dataset(tmp_path, seed=8)[i]["tokens"].equal(dataset[i]["tokens"]) for i in range(5))


# ---------------------------------------------------------------------------------- loader


@pytest.fixture(scope="module")
def dataset():
    with tempfile.TemporaryDirectory() as folder:
        yield text_dataset(Path(folder))


def loader_of(dataset, **options):
    options = {"global_batch_size": 8, "local_batch_size": 2, "data_rank": 0, "data_ranks": 1, **options}
    return build_loader(dataset, **options)


def loaders_of(dataset, data_ranks, **options):
    """The loaders of all ranks."""
    return [loader_of(dataset, data_rank=r, data_ranks=data_ranks, **options) for r in range(data_ranks)]


def rows(steps) -> list[list[int]]:
    """The sequences of steps, each a list of microbatches, in order."""
    return [row for step in steps for batch in step for row in batch["tokens"].tolist()]


def samples(dataset, first, count) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(first, first + count)]


def take(loader, steps):
    return [next(loader) for _ in range(steps)]


def take_each(loaders):
    return [next(loader) for loader in loaders]


@pytest.mark.parametrize("data_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("local_batch_size", [1, 2, 3])
def test_ranks_share_a_step(dataset, data_ranks, local_batch_size):
    """Step b is the same samples in the same order, over any number of ranks and any local batch size."""
    G, first = 48, 5
    options = {"global_batch_size": G, "local_batch_size": local_batch_size, "samples_consumed": first}
    loaders = loaders_of(dataset, data_ranks, **options)
    for b in range(3):
        steps = take_each(loaders)
        assert rows(steps) == samples(dataset, first + b * G, G)
        for step in steps:
            assert len(step) == G // data_ranks // local_batch_size
            assert all(batch[name].shape == (local_batch_size, 8) for batch in step for name in batch)


def test_never_ends(dataset):
    """Epochs go on: steps reach far beyond one pass of the data."""
    loader = loader_of(dataset)
    steps = take(loader, 3 * len(dataset) // 8)
    assert rows(steps) == samples(dataset, 0, len(steps) * 8)
    assert loader.samples_consumed == len(steps) * 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume(dataset, num_workers):
    """A run stopped anywhere goes on with the very next sample, again and again, also while workers fetch
    ahead.
    """
    read, state = [], {"samples_consumed": 0}
    for steps in (1, 3, 2):
        loader = loader_of(dataset, num_workers=num_workers)
        loader.load_state_dict(state)
        read += rows(take(iter(loader), steps))
        state = loader.state_dict()
        assert state == {"samples_consumed": len(read)}
    assert read == samples(dataset, 0, 48)


def test_resume_on_other_layouts(dataset):
    """What one layout has read, any other goes on from: other ranks, other batch sizes, other workers."""
    read = 0
    for data_ranks, G, local, workers in [(4, 8, 1, 0), (1, 6, 3, 2), (2, 12, 2, 0)]:
        options = {"global_batch_size": G, "local_batch_size": local, "num_workers": workers}
        loaders = loaders_of(dataset, data_ranks, samples_consumed=read, **options)
        for _ in range(2):
            assert rows(take_each(loaders)) == samples(dataset, read, G)
            read += G
        assert {loader.samples_consumed for loader in loaders} == {read}


def test_load_state_while_running(dataset):
    """Loading a state drops what was fetched ahead: the next step is the state's."""
    loader = loader_of(dataset)
    take(loader, 2)
    loader.load_state_dict({"samples_consumed": 3})
    assert rows(take(loader, 1)) == samples(dataset, 3, 8)


def test_workers_end_with_their_loader(dataset):
    """A loader that is dropped, or loads a state, ends its workers at once."""
    loader = loader_of(dataset, num_workers=2)
    take(loader, 1)
    start = time.monotonic()
    loader.load_state_dict({"samples_consumed": 0})
    take(loader, 1)
    del loader
    assert not multiprocessing.active_children() and time.monotonic() - start < 4


def test_workers_outlive_signals(dataset):
    """The signals that tell a run to save and end do not take its workers away, whoever sends them to all processes;
    and still the loader can end them."""
    loader = loader_of(dataset, num_workers=2)
    read = rows(take(loader, 1))
    workers = multiprocessing.active_children()
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    read += rows(take(loader, 20))
    assert read == samples(dataset, 0, len(read)) and all(worker.is_alive() for worker in workers)
    workers[0].terminate()
    workers[0].join(4)
    assert not workers[0].is_alive()


def _fetch_and_wait(dataset, pipe) -> None:
    loader = loader_of(dataset, num_workers=2)
    take(loader, 1)
    pipe.send([worker.pid for worker in multiprocessing.active_children()])
    time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_their_run(dataset, method):
    """kill -9 of the process that trains: its workers do not stay behind, however they were started."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    run = context.Process(target=_fetch_and_wait, args=(dataset, there))
    run.start()
    workers = here.recv()
    run.kill()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [worker for worker in workers if os.path.exists(f"/proc/{worker}")]
    assert len(workers) == 2 and not left


def test_loader_leaves_the_random_state_alone(dataset):
    """Reading data draws no number from torch's global generator, so dropout does not depend on it."""
    before = torch.get_rng_state()
    take(loader_of(dataset), 2)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(("size", "use"), [(10, "8 or 16"), (3, "8"), (0, "8"), (-8, "8")])
def test_global_batch_that_does_not_divide(dataset, size, use):
    """A global batch that the ranks cannot share says the product, and the nearest sizes that fit."""
    message = rf"global_batch_size \({size}\) must be .* \(4 x 2 = 8\); use {use}, or another local_batch_size"
    with pytest.raises(ValueError, match=message):
        loader_of(dataset, global_batch_size=size, local_batch_size=4, data_ranks=2)


def test_default_data(tmp_path):
    """Without any file of one's own there are millions of tokens to train on, of the whole small
    vocabulary.
    """
    tokenizer = build_tokenizer("bpe_4096")
    dataset = build_dataset("python_stdlib", "", tokenizer, seq_len=256, seed=0, cache_folder=tmp_path)
    (corpus,) = dataset.corpora
    assert corpus.num_tokens > 1_500_000 and corpus.text_bytes / corpus.num_tokens > 3
    tokens = corpus.read(0, corpus.num_tokens)
    assert int(tokens.max()) == tokenizer.eos_id and len(np.unique(tokens)) > 3500
    documents = Counter(tokens[tokens >= tokenizer.bos_id].tolist())
    assert set(documents.values()) == {corpus.num_documents}


class SlowDataset:
    seq_len = 8

    def __getitem__(self, i):
        time.sleep(0.02)
        return {"tokens": torch.full((8,), i)}


def test_waiting_is_measured():
    """Data that is too slow shows as time waited; a worker that runs ahead while training is busy takes it away."""
    waited = {}
    for num_workers in (0, 1):
        loader = loader_of(SlowDataset(), global_batch_size=4, local_batch_size=4, num_workers=num_workers)
        take(loader, 1)
        loader.take_seconds_waited()
        for _ in range(3):
            time.sleep(0.3)  # training
            take(loader, 1)
        waited[num_workers] = loader.take_seconds_waited()
        assert loader.take_seconds_waited() == 0
    assert waited[0] > 0.24 and waited[1] < waited[0] / 2
