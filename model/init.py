"""Initial weights that depend only on (seed, parameter name, index of the element in the whole tensor).

torch's generators hand out numbers in order, so that a rank which holds a part of a tensor would have to draw all of
it, or get other numbers than one process does. Here every element's number is computed from its own index by a
counter-based generator (splitmix64's finalizer, Steele et al. 2014, doi:10.1145/2660193.2660195), so a rank draws just
what it holds, and any layout starts from bitwise the same weights.
"""

import math
from hashlib import blake2b

import torch
from torch import Tensor

from model.args import ModelArgs

BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements drawn at a time: the scratch stays in cache; few kernel launches
TRUNCATION = 3.0  # standard deviations


def init_std(name: str, args: ModelArgs) -> float | None:
    """Standard deviation of a parameter's initial values; None for those that start as ones (the norms).

    The two projections that write into the residual stream are divided by sqrt(2 x layers), so that the stream's
    variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).
    """
    *_, module, last = name.split(".")
    matrix = module if last == "weight" else last  # experts' matrices are parameters of one module
    if matrix in ("wo", "w2"):
        return args.init_std / math.sqrt(2 * args.n_layers)
    if matrix in ("tok_embeddings", "output", "router", "eh_proj", "w1", "w3") or matrix.startswith(("wq", "wk", "wv")):
        return args.init_std
    if matrix.endswith("norm"):
        return None
    raise AssertionError(f"{name}: no rule for its initial values")


def fill_initial_values(local: Tensor, name: str, shape: torch.Size, indices: list[Tensor], args: ModelArgs, seed: int):
    """Writes parameter `name`'s initial values, in place, into the part of it that `local` holds.

    shape is the whole parameter's; indices[d] (int64, [local.size(d)], on local's device) are the positions along its
    dimension d that `local` holds: any rectangle, contiguous or not.
    """
    std = init_std(name, args)
    if std is None:
        local.fill_(1.0)
        return
    # A hash, since neighbouring raw keys would give shifted copies of one stream.
    key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little", signed=True)
    rows, row_length = indices[0], 1
    columns = rows.new_zeros(1)
    if len(shape) > 1:  # all dimensions but the last together count rows
        columns, row_length = indices[-1], shape[-1]
        for index, size in zip(indices[1:-1], shape[1:-1], strict=True):
            rows = (rows[:, None] * size + index).flatten()
    flat = local.view(len(rows), len(columns))
    rows_at_a_time = max(1, BLOCK[local.device.type] // max(1, len(columns)))
    for start in range(0, len(rows), rows_at_a_time):
        part = slice(start, start + rows_at_a_time)
        flat[part] = _truncated_normal(rows[part, None] * row_length + columns, key, std).to(local.dtype)


def _truncated_normal(index: Tensor, key: int, std: float) -> Tensor:
    """float32 numbers for int64 element indices (overwritten), by inverting the normal distribution's integral."""
    # In place, since this is all memory traffic; int64 arithmetic wraps around, as it must here.
    z = index.add_(1).mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    z.bitwise_xor_(_shift(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(0x94D049BB133111EB))
    z.bitwise_xor_(_shift(z, 31))
    # 23 bits: with 24 the largest uniform rounds to 1. The half keeps it off both ends.
    uniform = _shift(z, 41).to(torch.float32).add_(0.5).mul_(2.0**-23)
    inside = math.erf(TRUNCATION / math.sqrt(2))  # probability mass that is kept
    return uniform.mul_(2.0).sub_(1.0).mul_(inside).erfinv_().mul_(std * math.sqrt(2))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64's own >> copies the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
