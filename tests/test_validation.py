"""Validation loss: exact, the same number in any layout, and without a trace in training."""

import json
import math
import re

import pytest
import torch
from helpers.layouts import layout
from helpers.runs import TINY, argv, options, run_command, series, train_all, train_on, write_ragged_text
from helpers.texts import BYTE, text_dataset

from config import load_config
from data import build_dataset
from data.dataset import permute
from data.prepare import prepare
from data.sources import build_source
from hf import get_model_args
from model import Transformer

NUM_SEQUENCES = 11  # not a multiple of any batch size
VALIDATE = options(validation__enable="true", validation__interval="2", validation__num_sequences=NUM_SEQUENCES)
METHOD, SCHEDULE = "parallelism__context_parallel_method", "parallelism__pipeline_parallel_schedule"
LAYOUTS = [
    layout(fsdp=4, accumulation=2),
    layout(fsdp=2, cp=2, parallelism__fsdp_reshard_after_forward="never"),
    layout(cp=2, tp=2, model="V3, documents", ep=2, **{METHOD: "latent"}),
    layout(2, fsdp=2, model="V3, documents", ep=2),
    layout(2, tp=2, parallelism__pipeline_parallel_microbatch_size=4),
    layout(2, cp=2, model="4 layers", accumulation=2, **{SCHEDULE: "Interleaved1F1B"}),
    layout(4, model="4 layers", accumulation=2),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return options(data__path=write_ragged_text(folder), data__cache_folder=folder / "cache")


@pytest.fixture(scope="module")
def references(text, tmp_path_factory):
    """By model, two runs of one process: with validation every 2 steps, and after the last step only."""
    folder = tmp_path_factory.mktemp("reference")
    models = {made.model: made.settings() for made in LAYOUTS}
    alone = {k: "1" for k in layout().settings() if k.startswith("parallelism.")} | options(
        training__local_batch_size="8"
    )
    rarely = options(validation__interval="100")
    runs = {}
    for i, settings in enumerate(models.values()):
        shape = {k: v for k, v in settings.items() if k.startswith(("model.", "data."))}
        runs[folder / f"{i}"] = text | shape | alone | VALIDATE
        runs[folder / f"{i} rarely"] = runs[folder / f"{i}"] | rarely
    done = train_all(1, runs)
    return dict(zip(models, zip(done[::2], done[1::2], strict=True), strict=True))


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    runs = {folder / str(i): text | made.settings() | VALIDATE for i, made in enumerate(LAYOUTS)}
    return dict(zip((made.name for made in LAYOUTS), train_all(4, runs), strict=True))


def validation_losses(run: dict) -> dict[int, float]:
    return {row["step"]: row["validation_loss"] for row in run["metrics"] if "validation_loss" in row}


@pytest.mark.parametrize("made", LAYOUTS, ids=lambda made: made.name)
def test_validation_loss_is_the_same_in_any_layout(made, trained, references):
    """It is measured at its steps only, and the training continues as in one process."""
    run, (reference, _) = trained[made.name], references[made.model]
    found, expected = validation_losses(run), validation_losses(reference)
    assert list(found) == [2, 3] and found == pytest.approx(expected, rel=1e-9)
    assert series(run, "loss") == pytest.approx(series(reference, "loss"), rel=1e-9)
    assert series(run, "grad_norm") == pytest.approx(series(reference, "grad_norm"), rel=1e-9)
    last = run["metrics"][-1]
    assert last["validation_perplexity"] == pytest.approx(math.exp(last["validation_loss"]))


@pytest.mark.parametrize("model", ["grouped", "V3, documents"])
def test_validation_leaves_training_unchanged(model, references):
    """With and without a validation in between, losses, gradients, weights and the experts' token counts are equal to
    the last bit."""
    often, rarely = references[model]
    assert list(validation_losses(often)) == [2, 3] and list(validation_losses(rarely)) == [3]
    for key in ("loss", "grad_norm"):
        assert series(often, key) == series(rarely, key)
    for ours, theirs in zip(
        [*often["gradients"], *often["experts"]], [*rarely["gradients"], *rarely["experts"]], strict=True
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(often["weights"][name], rarely["weights"][name]) for name in rarely["weights"])


def test_validation_leaves_training_unchanged_under_fsdp(text, tmp_path):
    """Weights that FSDP gathers for validation are freed after it."""
    settings = text | VALIDATE | layout(fsdp=2, accumulation=2).settings()
    often, rarely = train_all(
        2, {tmp_path / "a": settings, tmp_path / "b": settings | options(validation__interval="9")}
    )
    assert series(often, "loss") == series(rarely, "loss") and series(often, "grad_norm") == series(rarely, "grad_norm")


def test_validation_loss_is_the_mean_over_tokens(text, references):
    """It equals the losses of each held-out sequence by itself, summed and divided by all valid tokens."""
    run, _ = references["grouped"]
    config = load_config(argv(TINY, text))
    model = Transformer(get_model_args(**vars(config.model))).double()
    model.load_state_dict(run["weights"])
    dataset = build_dataset(
        "text",
        config.data.path,
        BYTE,
        seq_len=32,
        seed=0,
        num_held_out=NUM_SEQUENCES,
        cache_folder=config.data.cache_folder,
    )
    loss = count = 0
    for j in range(NUM_SEQUENCES):
        sample = {name: tensor[None] for name, tensor in dataset.held_out()[j].items()}
        loss += model(sample.pop("tokens"), **sample).item()
        count += (sample["labels"] >= 0).sum().item()
    assert count % NUM_SEQUENCES != 0  # sequences hold different numbers of valid tokens
    assert validation_losses(run)[3] == pytest.approx(loss / count, rel=1e-12)


def test_held_out_sequences_are_not_samples(tmp_path):
    """Held-out sequences and samples together are each window once. The held-out sequences are the same for any seed,
    and come from all over the stream."""
    whole, *parts = (text_dataset(tmp_path, seed=seed, num_held_out=n) for seed, n in ((0, 0), (0, 9), (5, 9)))

    def starts(samples):
        tokens = [tuple(sample["tokens"].tolist()) for sample in samples]
        return [windows.index(window) for window in tokens]

    windows = [None] * len(whole)
    for i in range(len(whole)):
        windows[permute(i, len(whole), 0, 0)] = tuple(whole[i]["tokens"].tolist())
    held_out = [starts(part.held_out()[j] for j in range(9)) for part in parts]
    assert held_out[0] == held_out[1] and max(held_out[0]) - min(held_out[0]) > len(whole) // 2
    for part in parts:
        assert len(part) == len(whole) - 9 and len(part.held_out()) == 9
        seen = starts(part[i] for i in range(len(part)))
        assert sorted(seen + held_out[0]) == list(range(len(whole)))
    with pytest.raises(ValueError, match=r"validation\.num_sequences \(99\) would hold out more than half of the data"):
        text_dataset(tmp_path, num_held_out=99)


def test_validation_on_other_data(text, tmp_path):
    """validation.path is text or a corpus's folder. To ask for more sequences than it holds, or to give an option
    without validation.enable, is an error."""
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "abc " * 200}))
    other = prepare(build_source("text", str(tmp_path / "other.jsonl")), BYTE, tmp_path / "other")
    losses = []
    for path in (tmp_path / "other.jsonl", other):
        validate = options(validation__enable="true", validation__num_sequences="3", validation__path=path)
        run = train_on(1, tmp_path / f"run of {path.name}", text, validate, options(training__local_batch_size="2"))
        losses.append(validation_losses(run))
    assert list(losses[0]) == [3] and losses[0] == losses[1]
    too_many = options(validation__num_sequences="99", job__dump_folder=tmp_path / "b")
    ended_well, lines = run_command(1, argv(TINY, text, validate, too_many), tmp_path)
    assert not ended_well and re.search(
        r"num_sequences \(99\) is more than there are in .*: use at most 25\.", lines[-1]
    )
    with pytest.raises(ValueError, match=r"validation\.interval has no effect without validation\.enable true"):
        load_config(["--validation.interval", "5"])
