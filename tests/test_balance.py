"""The balance between experts: what the bias brings about, how it is counted, and what is told of it."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.layouts import MODELS
from helpers.ranks import run_ranks
from helpers.runs import options, train_on, write_ragged_text
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.plot_balance import arguments, loads, write_skewed_text
from model import ModelArgs, Transformer
from parallelize import init_weights
from parallelize.activation import apply_activation_checkpointing
from training.balance import ExpertLoadBalancer
from training.metrics import Metrics

ARGS = ModelArgs(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=2, hidden_dim=24, vocab_size=32, n_experts=4, top_k=2,
    moe_hidden_dim=8, n_dense_layers=1, expert_bias=True, expert_bias_speed=0.25, n_mtp_layers=1,
)  # fmt: skip


def _train(arguments: list[str]) -> None:
    import train
    from config import load_config

    train.main(load_config(arguments))


def test_the_bias_balances_a_skewed_stream(tmp_path):
    """On words of very uneven frequency a few experts take nearly all tokens. With the bias, in 200 steps, the busiest
    expert of no layer has more than 1.3 times its share, as a mean over the last 20; without, it has more than
    twice its share in every layer."""
    text, load = write_skewed_text(tmp_path / "skewed.jsonl"), {}
    for bias in (False, True):
        run_ranks(1, _train, arguments(bias, tmp_path / str(bias), text))
        last = loads(tmp_path / str(bias))[-20:]
        load[bias] = [sum(of_layer) / len(last) for of_layer in zip(*last, strict=True)]
    assert len(load[True]) == 3 and max(load[True]) < 1.3, load
    assert min(load[False]) > 2, load


@pytest.fixture
def alone():
    """An axis of one rank, this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ARGS)
    init_weights(model, ARGS, seed=0)
    return model


def feed(model: Transformer) -> None:
    """Forward and backward of two sequences of eight tokens, with the tokens behind each."""
    tokens = torch.randint(32, (2, 8))
    model(tokens, torch.arange(8).expand(2, 8), tokens, tokens[..., None], tokens[..., None]).backward()


def test_an_update_moves_the_bias_in_place(alone):
    """By its speed, up for experts with less than the mean and down for those with more, of each layer by its own
    counts, in the very tensors that the checkpoint holds; then counting begins anew."""
    model = build()
    balance = ExpertLoadBalancer([model], alone, alone)
    saved = dict(balance.biases)
    assert list(saved) == ["layers.1.moe.router.expert_bias", "mtp.0.block.moe.router.expert_bias"]
    for block, counts in zip(list(model.blocks().values())[1:], ([9, 1, 2, 0], [3, 4, 3, 2]), strict=True):
        block.moe.router.tokens_per_expert += torch.tensor(counts)
    balance.update()
    assert [bias.tolist() for bias in saved.values()] == [[-0.25, 0.25, 0.25, 0.25], [0.0, -0.25, 0.0, 0.25]]
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            assert buffer is saved[name] is balance.biases[name] and buffer.dtype == torch.float32
        elif name.endswith("tokens_per_expert"):
            assert not buffer.any()
    assert balance.report() == {
        "expert_load": [3.0, pytest.approx(4 / 3)], "expert_idle": [0.25, 0.0], "expert_bias_range": [0.5, 0.5]
    }  # fmt: skip


@pytest.mark.parametrize("recomputed", ["none", "full", "selective"])
def test_each_token_is_counted_once(recomputed):
    """Two microbatches of 16 tokens are 2 x 16 x 2 choices in every mixture, run again in backward or not; tokens that
    are not trained on count nothing."""
    model = build()
    apply_activation_checkpointing(model, mode=recomputed, selective="op", memory_budget=1.0)
    for _ in range(2):
        feed(model)
    model.eval()
    feed(model)
    assert [b.moe.router.tokens_per_expert.sum().item() for b in model.blocks().values() if b.moe] == [64, 64]


def test_collapse_is_told_and_nothing_else(alone, tmp_path, capsys):
    """The line of a step is followed by a warning with the layer where half of the experts are idle, else by none."""
    model = build()
    balance = ExpertLoadBalancer([model], alone, alone)
    metrics = Metrics(
        str(tmp_path), torch.device("cpu"), total_steps=2, flops_per_token=1, log_freq=1, enable_tensorboard=False
    )
    metrics.start(SimpleNamespace(step=0, tokens_seen=0))
    last = model.mtp["0"].block.moe.router.tokens_per_expert
    for step, counts in enumerate(([50, 0, 50, 50], [50, 0, 50, 2]), start=1):
        model.layers["1"].moe.router.tokens_per_expert += 1
        last += torch.tensor(counts)
        balance.update()
        state = SimpleNamespace(step=step, tokens_seen=step)
        metrics.log(state, loss=1.0, grad_norm=1.0, lr=1.0, data_seconds=0.0, **balance.report())
    first, second, *warning = capsys.readouterr().out.splitlines()
    assert "expert load 1.33" in first and "expert load 1.96" in second
    assert len(warning) == 1 and warning[0].startswith("warning: routing collapses") and "1 (50%);" in warning[0]


def test_metrics_of_every_mixture_layer_from_any_stage(tmp_path):
    """Three numbers for the mixture block and for that of multi-token prediction, also where rank 0, which writes them,
    has the first stage and with it no mixture at all; the same as from one process. A dense model has none."""
    text = options(data__path=str(write_ragged_text(tmp_path)), training__steps=2)
    keys = ("expert_load", "expert_idle", "expert_bias_range")
    alone, staged = (
        train_on(
            ranks, tmp_path / str(ranks), text, MODELS["V3"],
            options(training__local_batch_size=8, parallelism__pipeline_parallel_degree=ranks),
        )["metrics"]
        for ranks in (1, 2)
    )  # fmt: skip
    for ours, expected in zip(staged, alone, strict=True):
        assert all(len(ours[key]) == 2 and ours[key] == expected[key] for key in keys)
        assert min(ours["expert_load"]) > 1 and min(ours["expert_bias_range"]) > 0
    dense = train_on(1, tmp_path / "dense", text, options(training__local_batch_size=8))
    assert not any(key in row for row in dense["metrics"] for key in keys)


def test_the_bias_is_resumed_in_any_layout(tmp_path):
    """Three steps in a row, and two of them continued as pipeline x FSDP: the same biases, which are not those of two
    steps, and the same loss."""
    text = options(data__path=str(write_ragged_text(tmp_path)), lr_scheduler__decay_ratio=0.0) | MODELS["V3"]
    straight = train_on(1, tmp_path / "straight", text, options(training__local_batch_size=8))
    saving = options(checkpoint__enable="true", checkpoint__interval=2)
    two = train_on(1, tmp_path / "run", text, saving, options(training__local_batch_size=8, training__steps=2))
    layout = options(training__local_batch_size=4, parallelism__pipeline_parallel_degree=2)
    resumed = train_on(4, tmp_path / "run", text, saving, layout)
    for name, bias in straight["biases"].items():
        assert torch.equal(resumed["biases"][name], bias) and not torch.equal(two["biases"][name], bias)
    losses = [row["loss"] for row in resumed["metrics"]]
    assert losses == pytest.approx([row["loss"] for row in straight["metrics"]], rel=1e-9)
