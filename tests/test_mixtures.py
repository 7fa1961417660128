"""Layout-invariant data as a property: for any ranks, workers, batch sizes, stops and mixture, step b holds the same
samples, and an epoch of a corpus reads each of its windows once."""

import itertools
import json

import pytest
from helpers.texts import BYTE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import build_dataset, build_loader
from data.dataset import TokenDataset
from data.mixture import DatasetMixture, floor_sum
from data.prepare import prepare
from data.shards import Corpus
from data.sources import build_source

SEQ_LEN = 8
fast = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Corpora of 30, 11 and 3 windows. Each token tells the place it comes from."""
    made = []
    for letter, windows in (("a", 30), ("b", 11), ("c", 3)):
        folder = tmp_path_factory.mktemp("corpus")
        words = [f"{letter}{i:03}" for i in range(windows * SEQ_LEN // 4)]
        cut = len(words) // 3
        texts = ["".join(words[:cut]), "".join(words[cut:])]
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        source = build_source("text", str(folder / "a.jsonl"))
        made.append(Corpus(prepare(source, BYTE, folder / "corpus", shard_bytes=40)))
    return made


def key(sample) -> tuple:
    return tuple(tuple(sample[name].tolist()) for name in sorted(sample))


mixtures = st.fixed_dictionaries(
    {
        "numbers": st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
        "weights": st.lists(st.floats(0.05, 10), min_size=3, max_size=3),
        "seed": st.integers(0, 2**31),
        "packing": st.sampled_from(["concat", "documents"]),
        "num_held_out": st.integers(0, 1),
    }
)


def dataset_of(corpora, numbers, weights, **options) -> TokenDataset:
    return TokenDataset([corpora[n] for n in numbers], weights=weights[: len(numbers)], seq_len=SEQ_LEN, **options)


@fast
@given(
    mixture=mixtures,
    parts=st.lists(
        # data ranks, local batch size, microbatches, steps until the run is stopped, workers
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
def test_any_layout_reads_the_same_samples(corpora, mixture, parts, start):
    """A run that is stopped and resumed any number of times, each time with other ranks, batch sizes and workers, reads
    sample after sample: no sample twice, and none left out."""
    dataset = dataset_of(corpora, **mixture)
    consumed = start
    for dp_degree, local, accumulation, steps, workers in parts:
        size = dp_degree * local * accumulation
        loaders = [
            build_loader(
                dataset,
                global_batch_size=size,
                local_batch_size=local,
                dp_rank=rank,
                dp_degree=dp_degree,
                samples_consumed=consumed,
                num_workers=workers if rank == 0 else 0,
            )
            for rank in range(dp_degree)
        ]
        for _ in range(steps):
            batches = [batch for loader in loaders for batch in next(loader)]
            read = [key({k: v[row] for k, v in batch.items()}) for batch in batches for row in range(local)]
            assert read == [key(dataset[i]) for i in range(consumed, consumed + size)]
            consumed += size


@fast
@given(mixture=mixtures)
def test_epoch_reads_each_window_once(corpora, mixture):
    """For any weights, every n successive samples of a corpus of n windows are its n windows. No held-out window is
    among them."""
    dataset = dataset_of(corpora, **mixture)
    names = [chr(ord("a") + n) for n in mixture["numbers"]]
    streams = {name: [] for name in names}

    def place(sample) -> tuple[str, tuple]:
        tokens = sample["tokens"].tolist()
        return next(chr(t) for t in tokens if chr(t) in "abc"), tuple(tokens)

    for i in range(300):
        name, tokens = place(dataset[i])
        streams[name].append(tokens)
    samples = dataset.held_out()
    assert len(samples) == mixture["num_held_out"]
    held_out_places = {place(samples[j]) for j in range(len(samples))}
    for name, windows, held_out in zip(names, dataset.num_windows, dataset.num_held_out, strict=True):
        n, stream = windows - held_out, streams[name]
        for first in range(0, len(stream) - n + 1, n):
            assert len(set(stream[first : first + n])) == n
        assert not {(name, tokens) for tokens in stream} & held_out_places


@fast
@given(
    weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    first=st.integers(0, 10**15),
)
def test_counts_follow_weights(weights, seed, first):
    """Any stretch of a mixture holds n x weight samples of each corpus, up to a few, and the counts are exact
    anywhere."""
    mixture = DatasetMixture(weights, seed)
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
def test_floor_sum_equals_the_sum(n, m, a, b):
    """The fast sum equals the sum term by term."""
    assert floor_sum(n, m, a, b) == sum((a * j + b) // m for j in range(n))


def test_path_with_weights_sets_the_shares(corpora):
    """Weights in data.path may have any sum; without weights, a corpus's share is its size."""

    def shares(path: str):
        dataset = build_dataset("shards", path, BYTE, seq_len=SEQ_LEN, seed=1)
        drawn = [dataset.mixture(i)[0] for i in range(440)]
        return dataset, [drawn.count(c) for c in range(3)]

    by_size, counts = shares(",".join(str(corpus.folder) for corpus in corpora))
    assert max(abs(count - 10 * windows) for count, windows in zip(counts, by_size.num_windows, strict=True)) <= 3
    weighted, counts = shares(", ".join(f"{c.folder}:{w}" for c, w in zip(corpora, (2, 1.0, "1e0"), strict=True)))
    assert max(abs(count - part) for count, part in zip(counts, (220, 110, 110), strict=True)) <= 3
    assert weighted.fingerprint != by_size.fingerprint
    # Corpora alternate as often as their weights allow.
    drawn = [weighted.mixture(i)[0] for i in range(440)]
    assert max(len(list(group)) for _, group in itertools.groupby(drawn)) <= 3


def test_folder_name_with_a_colon_is_not_a_weight(corpora, tmp_path):
    """A colon in the name of an existing folder is part of the name, with and without a weight after it."""
    folder = tmp_path / "v1:2"
    folder.symlink_to(corpora[0].folder)
    for path in (str(folder), f"{folder}:0.5"):
        dataset = build_dataset("shards", path, BYTE, seq_len=SEQ_LEN, seed=1)
        assert dataset.corpus_fingerprint == corpora[0].fingerprint
