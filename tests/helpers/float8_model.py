"""A tiny model whose layers float8 takes, and what the float8 tests compare."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import ModelArgs, Transformer
from parallelize import init_weights

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=128)
OPTIONS = dict(enable=True, recipe="tensorwise", skip=(), emulate=True, enable_fsdp_float8_all_gather=False)
BATCH, SEQ = 8, 16


def on_meta(dtype: torch.dtype = torch.float32, args: ModelArgs = ARGS) -> Transformer:
    with torch.device("meta"):
        return Transformer(args).to(dtype)


def start(model: Transformer) -> Transformer:
    model.to_empty(device="cpu")
    init_weights(model, ARGS, seed=0)
    return model


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_bitwise(weights: dict, expected: dict) -> None:
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def difference(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()
