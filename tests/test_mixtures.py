"""Law 7 as a property: whatever the ranks, workers, batches, stops and mixture, batch b holds the same samples, and in
an epoch of a corpus each of its windows is read once."""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import BYTE

from data import build_dataset, build_loader
from data.dataset import TokenDataset
from data.mixture import Mixture, floor_sum
from data.prepare import prepare
from data.shards import Corpus
from data.sources import build_source

SEQ_LEN = 8
fast = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Of 30, 11 and 3 windows, each token of which tells where it is from."""
    made = []
    for letter, windows in (("a", 30), ("b", 11), ("c", 3)):
        folder = tmp_path_factory.mktemp("corpus")
        words = [f"{letter}{i:03}" for i in range(windows * SEQ_LEN // 4)]
        cut = len(words) // 3
        texts = ["".join(words[:cut]), "".join(words[cut:])]
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        source = build_source("text", str(folder / "a.jsonl"))
        made.append(Corpus(prepare(source, BYTE, folder / "corpus", unit_bytes=40)))
    return made


def key(sample) -> tuple:
    return tuple(tuple(sample[name].tolist()) for name in sorted(sample))


mixtures = st.fixed_dictionaries(
    {
        "numbers": st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
        "weights": st.lists(st.floats(0.05, 10), min_size=3, max_size=3),
        "seed": st.integers(0, 2**31),
        "packing": st.sampled_from(["concat", "documents"]),
        "held_out": st.integers(0, 1),
    }
)


def dataset_of(corpora, numbers, weights, **options) -> TokenDataset:
    return TokenDataset([corpora[n] for n in numbers], weights=weights[: len(numbers)], seq_len=SEQ_LEN, **options)


@fast
@given(
    mixture=mixtures,
    parts=st.lists(
        # data ranks, samples of a rank and microbatch, microbatches, steps until the run is stopped, workers
        st.tuples(
            st.sampled_from([1, 2, 4, 8]),
            st.integers(1, 3),
            st.integers(1, 2),
            st.integers(1, 4),
            st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2]),
        ),
        min_size=1,
        max_size=4,
    ),
    start=st.integers(0, 200),
)
def test_any_run_reads_the_same_samples(corpora, mixture, parts, start):
    """Stopped and resumed any number of times, each time on other ranks with other batches and workers, runs read
    sample after sample: none twice, none left out."""
    dataset = dataset_of(corpora, **mixture)
    consumed = start
    for data_ranks, local, accumulation, steps, workers in parts:
        size = data_ranks * local * accumulation
        loaders = [
            build_loader(
                dataset,
                global_batch_size=size,
                local_batch_size=local,
                data_rank=rank,
                data_ranks=data_ranks,
                samples_consumed=consumed,
                num_workers=workers if rank == 0 else 0,
            )
            for rank in range(data_ranks)
        ]
        for _ in range(steps):
            batches = [batch for loader in loaders for batch in next(loader)]
            read = [key({k: v[row] for k, v in batch.items()}) for batch in batches for row in range(local)]
            assert read == [key(dataset[i]) for i in range(consumed, consumed + size)]
            consumed += size
        assert {loader.samples_consumed for loader in loaders} == {consumed}


@fast
@given(mixture=mixtures)
def test_each_window_once_an_epoch(corpora, mixture):
    """Of each corpus of a mixture, whatever the others' weights, every n samples in a row are its n windows; none of
    the held-out ones is ever among them."""
    dataset = dataset_of(corpora, **mixture)
    names = [chr(ord("a") + n) for n in mixture["numbers"]]
    streams = {name: [] for name in names}

    def place(sample) -> tuple[str, tuple]:
        tokens = sample["tokens"].tolist()
        return next(chr(t) for t in tokens if chr(t) in "abc"), tuple(tokens)

    for i in range(300):
        name, tokens = place(dataset[i])
        streams[name].append(tokens)
    apart = {place(dataset.held_out_sample(j)) for j in range(mixture["held_out"])}
    for name, windows, held_out in zip(names, dataset.windows, dataset.held_out, strict=True):
        n, stream = windows - held_out, streams[name]
        for first in range(0, len(stream) - n + 1, n):
            assert len(set(stream[first : first + n])) == n
        assert not {(name, tokens) for tokens in stream} & apart


@fast
@given(
    weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    first=st.integers(0, 10**15),
)
def test_counts_follow_weights(weights, seed, first):
    """Any stretch of a mixture holds n x weight of each corpus, up to a few; and counts are right anywhere."""
    mixture = Mixture(weights, seed)
    before = [mixture.count(c, first) for c in range(len(weights))]
    assert sum(before) == first
    seen = [0] * len(weights)
    for i in range(first, first + 500):
        corpus, count = mixture(i)
        assert count == before[corpus] + seen[corpus]
        seen[corpus] += 1
    for count, weight in zip(seen, weights, strict=True):
        assert abs(count - 500 * weight / sum(weights)) < 6


@fast
@given(n=st.integers(0, 60), m=st.integers(1, 50), a=st.integers(0, 90), b=st.integers(0, 90))
def test_floor_sum(n, m, a, b):
    """The quick sum is the sum."""
    assert floor_sum(n, m, a, b) == sum((a * j + b) // m for j in range(n))


def test_weights_of_folders(corpora):
    """As a user writes it: folders and weights, of any sum; without weights, by size."""
    path = ",".join(str(corpus.folder) for corpus in corpora)

    def shares(**options):
        dataset = build_dataset("shards", path, BYTE, seq_len=SEQ_LEN, seed=1, **options)
        drawn = [dataset.mixture(i)[0] for i in range(440)]
        return dataset, [drawn.count(c) for c in range(3)]

    by_size, counts = shares()
    assert max(abs(count - 10 * windows) for count, windows in zip(counts, by_size.windows, strict=True)) <= 3
    weighted, counts = shares(weights="2, 1, 1")
    assert max(abs(count - part) for count, part in zip(counts, (220, 110, 110), strict=True)) <= 3
    assert weighted.fingerprint != by_size.fingerprint
    # Runs of the same corpus are as short as its weight allows: no stretch of one language, then of another.
    drawn = [weighted.mixture(i)[0] for i in range(440)]
    assert max(len(list(group)) for _, group in itertools.groupby(drawn)) <= 3
