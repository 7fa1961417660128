"""Float8 matrix products in the linear layers (Micikevicius et al. 2022, arXiv:2209.05433), by torchao.

Idea: tensor cores multiply 8-bit floats twice as fast as bfloat16. Each operand is multiplied by a scale that takes its
largest absolute value to the largest float8 number, rounded to float8, multiplied, and the product divided by the
scales; sums are float32. Weights, their gradients and the optimizer stay as they are: nothing is stored in float8.

    forward    output      = input_e4m3       @ weight_e4m3^T     e4m3: 3 bits of mantissa, up to 448
    backward   grad_input  = grad_output_e5m2 @ weight_e4m3       e5m2: 2 bits, up to 57344, for the gradient's range
               grad_weight = grad_output_e5m2^T @ input_e4m3      scales are dynamic: of the values at hand

Recipes (torchao's):

    tensorwise          one scale a tensor: the fastest
    rowwise             one a row (of what is summed over), a power of 2; all operands are e4m3: more exact
    rowwise_with_gw_hp  rowwise, but grad_weight in high precision: the most exact

What stays in high precision: the head, where rounding goes straight into the loss (pytorch/torchtitan #4008 shipped a
filter that had come to match nothing, and so rounded it), embedding, norms, attention's own products, and what `skip`
and `min_dim` say: a small product does not earn back the casts.

Bytes: with fsdp_all_gather, FSDP gathers 1 byte an element of these weights instead of param_dtype's 2 or 4 (and rounds
the stored weight itself, not its bfloat16 copy). Tensor parallelism still exchanges activations in high precision;
DTensor reduces the largest values over the tp axis besides, a number a tensor, or a row, so that scales are global.

What depends on the layout: a tensorwise scale is that of a rank's microbatch, so FSDP of N ranks equals one process
that accumulates N microbatches, and tensor parallelism equals no tensor parallelism; both up to the order of sums.

Worth, on one H200 in a plain loop: tensorwise +24 to 32 % tokens per second, rowwise +12 %; fsdp_all_gather costs 6 %
where there is no other rank to gather from.

Proof: tests/test_float8.py.
"""

import importlib
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from errors import ConfigError

RECIPES = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}  # compute capability that it needs
HEAD = "output"
ALIGNMENT = 16  # no float8 kernel takes a matrix whose sizes are not multiples of it


@dataclass(frozen=True)
class Float8Report:
    """What became of every linear layer, by name; as text one line."""

    recipe: str
    converted: list[str]
    kept: dict[str, list[str]]  # by reason
    share: float  # of all linear layers' weights, by elements

    def __str__(self) -> str:
        total = len(self.converted) + sum(len(names) for names in self.kept.values())
        parts = [f"{len(self.converted)} of {total} linears, {self.share:.1%} of their weights"]
        parts += [f"{reason}: {_shortened(names)}" for reason, names in self.kept.items()]
        return f"float8 {self.recipe}: {'; '.join(parts)}"


def apply_float8(
    model: nn.Module,
    *,
    recipe: str,
    skip: Sequence[str],
    min_dim: int,
    emulate: bool,
    fsdp_all_gather: bool,
    device_type: str,
) -> Float8Report:
    """Swaps linear layers for float8 ones, in place, names and weights unchanged; on the whole model (on meta), before
    it is split into pipeline stages, so that every pattern of `skip` is held against every name.

    skip: patterns like "layers.0.*" or "*.wk" of names, matched whole and case-sensitively. min_dim: layers with
    fewer inputs or outputs stay. emulate: the same rounding, but products in float32, on any device.
    ValueError for what cannot be, with the way out.
    """
    if recipe not in RECIPES:
        raise ConfigError(f'float8.recipe ("{recipe}") must be one of {", ".join(RECIPES)}.')
    if fsdp_all_gather and recipe != "tensorwise":
        raise ConfigError(
            f'float8.enable_fsdp_float8_all_gather needs float8.recipe "tensorwise", not "{recipe}"; change one.'
        )
    if not emulate:
        _require_hardware(recipe, device_type)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    converted, kept = _choose(linears, skip, min_dim)
    dtypes = {linears[name].weight.dtype for name in converted}
    if torch.float64 in dtypes:
        raise ConfigError("float8 does not take float64 weights; set training.dtype to float32 or bfloat16.")
    torchao = _import_torchao()
    config = replace(
        torchao.Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulate,
        enable_fsdp_float8_all_gather=fsdp_all_gather,
    )
    chosen = set(converted)
    torchao.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)
    sizes = {name: module.weight.numel() for name, module in linears.items()}
    return Float8Report(recipe, converted, kept, sum(sizes[name] for name in converted) / sum(sizes.values()))


def sync_float8_scales(model: nn.Module) -> None:
    """Takes the scales of all weights that FSDP gathers in float8 in one all-reduce, instead of one for each weight and
    gather. To be called whenever weights have changed: after initialisation or loading and after every optimizer step;
    an old scale would cut off what has grown. A collective; does nothing, and costs nothing, where no weight is so."""
    gathered = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor) and _is_gathered_in_float8(p)}
    if not gathered:
        return
    for name, weight in gathered.items():
        axes = [axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate()]
        parts = prod(weight.device_mesh.size(axis) for axis in axes)
        # torchao does not pad: ranks would send different lengths, and wait for each other.
        if weight.to_local().numel() * parts != weight.numel():
            raise ConfigError(
                f"float8.enable_fsdp_float8_all_gather: {name} {tuple(weight.shape)} cannot be cut into {parts} equal "
                "parts; use a number of ranks that divides its sizes, add the layer to float8.skip, or leave it out."
            )
    with _quiet("torch.distributed.tensor._redistribute"):  # it reduces over one axis after the other
        _import_torchao().precompute_float8_dynamic_scale_for_fsdp(model)


def as_plain(parameter: Tensor) -> Tensor:
    """The same memory, detached, without the tensor class that makes FSDP gather it in float8: a checkpoint must load
    where there is no float8, or no torchao."""
    return torch.ops.aten.alias(parameter.detach())  # one of the operations that torchao's class does not survive


def _is_gathered_in_float8(weight: DTensor) -> bool:
    return hasattr(weight.to_local(), "fsdp_pre_all_gather")


def _require_hardware(recipe: str, device_type: str) -> None:
    needed, found = RECIPES[recipe], f'the device is "{device_type}"'
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability >= needed:
            return
        found = "this GPU has {}.{}".format(*capability)
    raise ConfigError(
        f'float8.recipe "{recipe}" needs a GPU of compute capability {needed[0]}.{needed[1]}, {found}; leave float8 '
        "out, or set float8.emulate to true for the same rounding at the speed of float32."
    )


def _choose(linears: dict[str, nn.Linear], skip: Sequence[str], min_dim: int) -> tuple[list[str], dict[str, list[str]]]:
    """Names to convert, and those that stay, by reason."""
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigError(
                f'float8.skip: "{pattern}" matches no linear layer; they are {_shortened(list(linears))}, and a '
                'pattern is held against the whole name: "layers.0.*", "*.wk".'
            )
    converted, kept = [], defaultdict(list)
    for name, linear in linears.items():
        sizes = linear.weight.shape
        if name == HEAD:
            kept["kept"].append(name)
        elif any(fnmatchcase(name, pattern) for pattern in skip):
            kept["skipped"].append(name)
        elif type(linear) is not nn.Linear:
            kept["not a plain linear"].append(name)  # torchao would drop what it computes besides
        elif min(sizes) < min_dim:
            kept["too small"].append(name)
        elif any(size % ALIGNMENT for size in sizes):
            kept[f"not a multiple of {ALIGNMENT}"].append(name)
        else:
            converted.append(name)
    if not converted:
        largest = max((min(linear.weight.shape) for name, linear in linears.items() if name != HEAD), default=0)
        counts = ", ".join(f"{len(names)} {reason}" for reason, names in kept.items())
        raise ConfigError(
            f"float8 has nothing to convert: of {len(linears)} linear layers {counts}; float8.min_dim is {min_dim}, "
            f"the largest layer's smaller side {largest}. Lower float8.min_dim, skip less, or leave float8 out."
        )
    return converted, dict(kept)


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ... {names[-1]} ({len(names)})"


def _import_torchao() -> ModuleType:
    """torchao.float8, without remarks on kernels for other torch versions, of which float8 uses none."""
    with _quiet("torchao", "torch.utils._pytree"), warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a docstring of torchao's, on its first import
        try:
            return importlib.import_module("torchao.float8")
        except ImportError as error:
            raise ConfigError(
                f"float8 needs torchao ({error}): pip install 'torchao>=0.17', or leave it out."
            ) from None


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
