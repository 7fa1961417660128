"""Initial weights that depend only on (seed, parameter name, index of the element in the whole tensor).

torch's generators produce numbers in order: a rank that holds a part of a tensor would have to draw the whole tensor,
or would get other numbers than one process does. Here every element is computed from its index by a counter-based
generator (splitmix64's finalizer, Steele et al. 2014, doi:10.1145/2660193.2660195). So a rank draws only the part that
it holds, and every layout starts from bitwise the same weights.

Proof: tests/test_model.py::test_any_part_of_a_parameter_has_the_whole_parameters_values.
"""

import math
from hashlib import blake2b

import torch
from torch import Tensor

from model.args import ModelArgs

BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements drawn at a time: to stay in cache; to launch few kernels
TRUNCATION = 3.0  # standard deviations


def init_std(name: str, args: ModelArgs) -> float | None:
    """Standard deviation of a parameter's initial values; None for a norm's weight, which starts as ones. The two
    projections that write into the residual stream are divided by sqrt(2 x layers), so that the stream's variance does
    not grow with depth (GPT-2, Radford et al. 2019, section 2.3). ValueError for a name without a rule."""
    *_, module, last = name.split(".")
    matrix = module if last == "weight" else last  # experts' matrices are parameters of one module
    if matrix in ("wo", "w2"):
        return args.init_std / math.sqrt(2 * args.n_layers)
    if matrix in ("tok_embeddings", "output", "router", "eh_proj", "w1", "w3") or matrix.startswith(("wq", "wk", "wv")):
        return args.init_std
    if matrix.endswith("norm"):
        return None
    raise ValueError(f"{name} has no rule for its initial values; add its module's name to init_std in model/init.py.")


def fill_initial_values(local: Tensor, name: str, shape: torch.Size, indices: list[Tensor], args: ModelArgs, seed: int):
    """Writes the initial values of parameter `name`, in place, into `local`, a part of it. shape is the whole
    parameter's; indices[d] (int64, [local.size(d)], on local's device) are the positions along its dimension d that
    `local` holds: any rectangle, contiguous or not."""
    std = init_std(name, args)
    if std is None:
        local.fill_(1.0)
        return
    # A hash, since neighbouring raw keys would give shifted copies of one stream.
    key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little", signed=True)
    rows, row_length = indices[0], 1
    columns = rows.new_zeros(1)
    if len(shape) > 1:  # all dimensions but the last are flattened into rows
        columns, row_length = indices[-1], shape[-1]
        for index, size in zip(indices[1:-1], shape[1:-1], strict=True):
            rows = (rows[:, None] * size + index).flatten()
    flat = local.view(len(rows), len(columns))
    rows_at_a_time = max(1, BLOCK[local.device.type] // max(1, len(columns)))
    for start in range(0, len(rows), rows_at_a_time):
        part = slice(start, start + rows_at_a_time)
        flat[part] = _truncated_normal(rows[part, None] * row_length + columns, key, std).to(local.dtype)


def _truncated_normal(index: Tensor, key: int, std: float) -> Tensor:
    """float32 numbers for int64 element indices (overwritten), by the inverse of the normal distribution function."""
    # In place, since memory traffic is the cost. int64 arithmetic wraps around, as splitmix64 requires.
    z = index.add_(1).mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    z.bitwise_xor_(_shift(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(0x94D049BB133111EB))
    z.bitwise_xor_(_shift(z, 31))
    # 23 bits: with 24 the largest uniform number rounds to 1. Adding 0.5 keeps it away from 0 and 1.
    uniform = _shift(z, 41).to(torch.float32).add_(0.5).mul_(2.0**-23)
    inside = math.erf(TRUNCATION / math.sqrt(2))  # the probability that a normal number is within the truncation
    return uniform.mul_(2.0).sub_(1.0).mul_(inside).erfinv_().mul_(std * math.sqrt(2))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; >> on int64 copies the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
