"""Samples are a pure function of (data, seed, i), and the loader's state is one integer."""

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
from helpers.texts import BYTE, text_dataset

from data import build_dataset, build_loader, build_tokenizer
from data.dataset import permute

# ---------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("n", [*range(1, 40), 99, 100, 101, 1000, 4096, 4099])
def test_permutation_is_a_bijection(n):
    """Each epoch visits each of n windows once. For large n, the order differs for each epoch and seed."""
    orders = [[permute(i, n, seed, epoch) for i in range(n)] for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 30:
        assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
        fixed = sum(i == j for order in orders for i, j in enumerate(order))
        assert fixed < 20  # on average, 1 in each order


def test_permutation_of_four_gives_all_orders_equally_often():
    """Each of the 24 orders of 4 windows is about equally frequent, so a small data set gets many different orders."""
    counts = Counter(tuple(permute(i, 4, seed, epoch) for i in range(4)) for seed in range(40) for epoch in range(60))
    assert len(counts) == 24 and all(60 < count < 145 for count in counts.values())


def test_permutation_of_huge_n_is_spread_out():
    """A huge n costs no more memory or time, and neighbours are sent far from each other."""
    n = 10**15
    places = [permute(i, n, 0, 3) for i in range(2000)]
    assert len(set(places)) == 2000 and all(0 <= place < n for place in places)
    assert np.histogram(places, bins=10, range=(0, n))[0].min() > 150


def test_windows_cover_the_stream(tmp_path):
    """An epoch's windows, put in order, are the whole stream: each id is a label once, except the first id and a
    remainder."""
    dataset = text_dataset(tmp_path, seq_len=7)
    stream = dataset.corpora[0].read(0, dataset.corpora[0].num_tokens)
    n = len(dataset)
    assert n == (len(stream) - 1) // 7
    for epoch in (0, 1, 5):
        windows = {permute(i, n, 0, epoch): dataset[epoch * n + i]["tokens"].tolist() for i in range(n)}
        assert [token for w in range(n) for token in windows[w]] == stream[: n * 7].tolist()


def test_sample_labels_are_the_next_tokens(tmp_path):
    """A label is -100 after a document's end; positions count the window's tokens; every tensor is int64."""
    (tmp_path / "a.jsonl").write_text('{"text": "hi"}\n{"text": "you"}\n')
    dataset = build_dataset("text", str(tmp_path / "a.jsonl"), BYTE, seq_len=8, seed=0, cache_folder=tmp_path / "cache")
    sample = dataset[0]
    assert all(tensor.dtype == torch.int64 for tensor in sample.values())
    assert sample["tokens"].tolist() == [256, *b"hi", 257, 256, *b"you"]
    assert sample["labels"].tolist() == [*b"hi", 257, -100, *b"you", 257]
    assert sample["positions"].tolist() == list(range(8))
    assert len(dataset) == 1 and dataset[12345]["tokens"].equal(sample["tokens"])


def test_seq_len_beyond_the_data_is_an_error(tmp_path):
    """The error gives both numbers and the largest seq_len that fits, and that seq_len works."""
    with pytest.raises(ValueError, match=r"seq_len \(8\) needs 9 tokens, but the whole data has 5; use at most 4"):
        text_dataset(tmp_path, "abc")
    assert len(text_dataset(tmp_path, "abc", seq_len=4)) == 1


def test_samples_are_the_same_in_any_process(tmp_path):
    """Samples do not depend on hash randomisation, nor on the samples that were read before."""
    dataset = text_dataset(tmp_path, seed=7)
    program = (
        "import sys; from data.dataset import TokenDataset; from data.shards import Corpus\n"
        "d = TokenDataset([Corpus(sys.argv[1])], seq_len=8, seed=7)\n"
        "print([d[i]['tokens'].tolist() for i in (1000, 3, 77)])"
    )
    here = str([dataset[i]["tokens"].tolist() for i in (1000, 3, 77)])
    process = subprocess.run(
        [sys.executable, "-c", program, str(dataset.corpora[0].folder)],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # conftest.py puts the repository on its path
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == here
    assert pickle.loads(pickle.dumps(dataset))[77]["tokens"].equal(dataset[77]["tokens"])
    assert len(pickle.dumps(dataset)) < 1000  # a worker gets the folder's name, not the tokens
    assert not all(text_dataset(tmp_path, seed=8)[i]["tokens"].equal(dataset[i]["tokens"]) for i in range(5))


def test_fingerprint_names_all_that_decides_the_order(tmp_path):
    """Checkpoints keep the fingerprint, so its text must not change: every resumed run would warn of other data."""
    dataset = text_dataset(tmp_path, seed=7, packing="documents", num_held_out=5)
    assert dataset.corpus_fingerprint == dataset.corpora[0].fingerprint
    assert dataset.fingerprint == f"{dataset.corpus_fingerprint} seed 7 seq_len 8 documents held out 5"
    assert text_dataset(tmp_path, seq_len=4).fingerprint == f"{dataset.corpus_fingerprint} seed 0 seq_len 4 concat"


# ---------------------------------------------------------------------------------- loader


@pytest.fixture(scope="module")
def dataset():
    with tempfile.TemporaryDirectory() as folder:
        yield text_dataset(Path(folder))


def loader_of(dataset, **options):
    options = {"global_batch_size": 8, "local_batch_size": 2, "dp_rank": 0, "dp_degree": 1, **options}
    return build_loader(dataset, **options)


def loaders_of(dataset, dp_degree, **options):
    """The loader of each rank."""
    return [loader_of(dataset, dp_rank=r, dp_degree=dp_degree, **options) for r in range(dp_degree)]


def rows(steps) -> list[list[int]]:
    """The sequences of steps in order; a step is a list of microbatches."""
    return [row for step in steps for batch in step for row in batch["tokens"].tolist()]


def samples(dataset, first, count) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(first, first + count)]


def take(loader, steps):
    return [next(loader) for _ in range(steps)]


def take_each(loaders):
    return [next(loader) for loader in loaders]


@pytest.mark.parametrize("dp_degree", [1, 2, 4, 8])
@pytest.mark.parametrize("local_batch_size", [1, 2, 3])
def test_ranks_share_a_step(dataset, dp_degree, local_batch_size):
    """Step b holds the same samples in the same order, for any number of ranks and any local batch size."""
    G, first = 48, 5
    options = {"global_batch_size": G, "local_batch_size": local_batch_size, "samples_consumed": first}
    loaders = loaders_of(dataset, dp_degree, **options)
    for b in range(3):
        steps = take_each(loaders)
        assert rows(steps) == samples(dataset, first + b * G, G)
        for step in steps:
            assert len(step) == G // dp_degree // local_batch_size
            assert all(batch[name].shape == (local_batch_size, 8) for batch in step for name in batch)


def test_loader_continues_over_epochs(dataset):
    """Steps continue far beyond one pass over the data."""
    loader = loader_of(dataset)
    steps = take(loader, 3 * len(dataset) // 8)
    assert rows(steps) == samples(dataset, 0, len(steps) * 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_loader_continues_with_the_next_sample(dataset, num_workers):
    """A run is stopped and resumed several times, also while workers fetch ahead."""
    read = []
    for steps in (1, 3, 2):
        loader = loader_of(dataset, num_workers=num_workers, samples_consumed=len(read))
        read += rows(take(loader, steps))
    assert read == samples(dataset, 0, 48)


def test_resumed_loader_continues_on_another_layout(dataset):
    """Ranks, batch sizes and workers change at each resume."""
    read = 0
    for dp_degree, G, local, workers in [(4, 8, 1, 0), (1, 6, 3, 2), (2, 12, 2, 0)]:
        options = {"global_batch_size": G, "local_batch_size": local, "num_workers": workers}
        loaders = loaders_of(dataset, dp_degree, samples_consumed=read, **options)
        for _ in range(2):
            assert rows(take_each(loaders)) == samples(dataset, read, G)
            read += G


def test_workers_end_with_their_loader(dataset):
    """A loader that is dropped ends its workers at once."""
    loader = loader_of(dataset, num_workers=2)
    take(loader, 1)
    assert multiprocessing.active_children()
    start = time.monotonic()
    del loader
    assert not multiprocessing.active_children() and time.monotonic() - start < 4


def test_workers_survive_signals_to_the_run(dataset):
    """The signals that tell a run to save and end do not end its workers, if they are sent to all processes. The loader
    can still end its workers."""
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
def test_workers_end_when_the_run_is_killed(dataset, method):
    """After kill -9 of the training process no worker is left, for each start method."""
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


def test_loader_draws_no_random_number(dataset):
    """Reading data leaves torch's global generator unchanged."""
    before = torch.get_rng_state()
    take(loader_of(dataset), 2)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(("size", "use"), [(10, "8 or 16"), (3, "8"), (0, "8"), (-8, "8")])
def test_loader_rejects_global_batch_size_that_does_not_divide(dataset, size, use):
    """The error gives the product that must divide it, and the nearest sizes that fit."""
    message = rf"global_batch_size \({size}\) must be .* \(4 x 2 = 8\); use {use}, or another local_batch_size"
    with pytest.raises(ValueError, match=message):
        loader_of(dataset, global_batch_size=size, local_batch_size=4, dp_degree=2)


def test_python_stdlib_is_enough_to_train_on(tmp_path):
    """Without any file of the user's there are millions of tokens, which use the whole small vocabulary."""
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


def test_loader_measures_seconds_waited():
    """Slow data shows as time waited, and a worker that fetches ahead while training computes reduces this time."""
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
