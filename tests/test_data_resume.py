"""Exact resume with every feature of the data: a mixture, packed documents, held-out sequences, workers that read
ahead."""

import pytest
from helpers.runs import TINY, argv, options, read_metrics, run_command, write_ragged_text
from helpers.texts import BYTE

from data.prepare import prepare
from data.sources import build_source

STEPS = 6
PARTS = [  # ranks, layout, the step after which the run is stopped
    (4, dict(data_parallel_shard_degree=2, context_parallel_degree=2), 2),
    (2, dict(pipeline_parallel_degree=2), 4),
    (1, {}, STEPS),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two corpora. The second is so small that the run passes through several of its epochs."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "small.jsonl").write_text('{"text": "a small one, over and over again"}\n' * 12)
    sources = [build_source("text", str(path)) for path in (write_ragged_text(folder), folder / "small.jsonl")]
    made = [prepare(source, BYTE, folder / str(i), shard_bytes=2000) for i, source in enumerate(sources)]
    return options(
        data__dataset="shards",
        data__path=f"{made[0]}:0.6,{made[1]}:0.4",
        data__packing="documents",
        data__num_workers="1",
        validation__enable="true",
        validation__interval="2",
        validation__num_sequences="5",
        checkpoint__enable="true",
        checkpoint__interval="2",
        training__steps=STEPS,
        training__local_batch_size="2",
    )


def run(folder, data, ranks: int, layout: dict[str, int], stop: int) -> None:
    layout = options(**{f"parallelism__{name}": degree for name, degree in layout.items()})
    arguments = argv(TINY, data, {"job.dump_folder": str(folder / "run")}, layout)
    ended_well, lines = run_command(ranks, arguments, folder, stop_after=stop if stop < STEPS else None)
    assert ended_well == (stop == STEPS), lines
    assert not any("warning" in line for line in lines), lines


def test_resume_on_other_layouts_equals_one_run(data, tmp_path):
    """Every loss, validation loss and gradient norm equals that of the run that is not stopped."""
    (tmp_path / "straight").mkdir()
    run(tmp_path / "straight", data, 1, {}, STEPS)
    for part in PARTS:
        run(tmp_path, data, *part)
    rows, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "straight" / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "validation_loss", "tokens_seen"):
        ours, theirs = ([row.get(key, 0) for row in found] for found in (rows, expected))
        assert ours == pytest.approx(theirs, rel=1e-9), key
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4, 6]
