"""Float8 matrix products in the linear layers (Micikevicius et al. 2022, arXiv:2209.05433), by torchao.

Idea: tensor cores multiply 8-bit floats twice as fast as bfloat16. Each operand is multiplied by a scale that takes
its largest absolute value to the largest float8 number, and rounded to float8. The product, summed in float32, is
divided by the scales. Weights, gradients and optimizer state keep their dtypes: nothing is stored in float8.

    forward    output      = input_e4m3       @ weight_e4m3^T     e4m3: 3 bits of mantissa, up to 448
    backward   grad_input  = grad_output_e5m2 @ weight_e4m3       e5m2: 2 bits, up to 57344, for the gradient's range
               grad_weight = grad_output_e5m2^T @ input_e4m3      scales are dynamic: computed from the values at hand

Recipes (torchao's):

    tensorwise          one scale per tensor: the fastest
    rowwise             one scale, a power of 2, per row (of what is summed over); all operands are e4m3: more exact
    rowwise_with_gw_hp  rowwise, but grad_weight in high precision: the most exact

These stay in high precision: the head, where rounding goes straight into the loss (a filter of pytorch/torchtitan #4008
matched nothing any more, and so the head was rounded), the embedding, the norms, attention's products, layers whose
sizes no float8 kernel takes, and the layers that `skip` names. Skip small layers: their casts cost more than they gain.

Bytes: with enable_fsdp_float8_all_gather, FSDP gathers 1 byte an element of these weights instead of param_dtype's 2
or 4 (and rounds the stored weight, not its bfloat16 copy). Tensor parallelism still exchanges activations in high
precision. It also reduces the largest values over the tp axis, a number per tensor or row, so that scales are global.

One thing depends on the layout: a tensorwise scale is computed from a rank's microbatch. So FSDP of N ranks equals one
process that accumulates N microbatches, and tensor parallelism equals no tensor parallelism, up to the order of sums.

Gain, on one H200 in a plain loop: tensorwise +24 to 32 % tokens per second, rowwise +12 %; the float8 all-gather costs
6 % where there is no other rank to gather from.

Proof: tests/test_float8.py::test_linear_equals_hand_written_rounding,
tests/test_float8_layouts.py::test_float8_fsdp_equals_accumulating_process,
tests/test_float8_layouts.py::test_float8_tensor_parallel_equals_one_process.
"""

import importlib
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from errors import ConfigError
from torch_private import PYTREE_LOGGER, REDISTRIBUTE_LOGGER, silenced

NEEDED_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}
HEAD = "output"
ALIGNMENT = 16  # No float8 kernel takes a matrix whose sizes are not multiples of it.


def apply_float8(
    model: nn.Module,
    device_type: str,
    *,
    enable: bool,
    recipe: str,
    skip: Sequence[str],
    enable_fsdp_float8_all_gather: bool,
    emulate: bool,
) -> str:
    """Converts linear layers to float8, in place, with the same names and weights; returns a line for the log, empty
    if not enabled. It takes the whole model on meta, so that each pattern of skip is checked against the names of all
    layers. skip: patterns of whole names, case-sensitive, as "layers.0.*" or "*.wk". emulate: the same rounding with
    products in float32, on any device. ConfigError, with the cure, where hardware, torchao, dtype or a pattern does not
    fit."""
    if not enable:
        return ""
    if not emulate:
        require_hardware(recipe, device_type)
    linears = linear_layers(model)
    converted, kept = choose_layers(linears, skip)
    if torch.float64 in {linears[name].weight.dtype for name in converted}:
        raise ConfigError("float8 does not take float64 weights; set training.dtype to float32 or bfloat16.")
    torchao = import_torchao()
    config = replace(
        torchao.Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulate,
        enable_fsdp_float8_all_gather=enable_fsdp_float8_all_gather,
    )
    torchao.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in converted)
    share = sum(linears[n].weight.numel() for n in converted) / sum(m.weight.numel() for m in linears.values())
    parts = [f"{len(converted)} of {len(linears)} linear layers, {share:.1%} of their weights"]
    parts += [f"{reason}: {shortened(names)}" for reason, names in kept.items()]
    return f"float8 {recipe}: {'; '.join(parts)}"


def sync_float8_scales(model: nn.Module) -> None:
    """Computes the scales of all weights that FSDP gathers in float8, in one all-reduce instead of one per weight and
    gather. It must be called whenever weights have changed: after initialisation or loading and after every optimizer
    step, because an old scale would clip values that have grown. A collective; does nothing without float8
    all-gather."""
    dtensors = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    gathered = {name: p for name, p in dtensors.items() if hasattr(p.to_local(), "fsdp_pre_all_gather")}
    for name, weight in gathered.items():
        axes = [axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate()]
        parts = prod(weight.device_mesh.size(axis) for axis in axes)
        # torchao does not pad: ranks would send different lengths, and wait for each other.
        if weight.to_local().numel() * parts != weight.numel():
            raise ConfigError(
                f"float8.enable_fsdp_float8_all_gather: {name} {tuple(weight.shape)} cannot be cut into {parts} equal "
                "parts; use a number of ranks that divides its sizes, add the layer to float8.skip, or leave it out."
            )
    if gathered:
        with silenced(REDISTRIBUTE_LOGGER):
            import_torchao().precompute_float8_dynamic_scale_for_fsdp(model)


def as_plain(parameter: Tensor) -> Tensor:
    """The same memory, detached, without the tensor class that makes FSDP gather it in float8: a checkpoint must load
    where there is no float8, or no torchao."""
    return torch.ops.aten.alias(parameter.detach())  # an operation whose result is not of torchao's class


def require_hardware(recipe: str, device_type: str) -> None:
    needed, found = NEEDED_CAPABILITY[recipe], f'the device is "{device_type}"'
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability >= needed:
            return
        found = "this GPU has {}.{}".format(*capability)
    raise ConfigError(
        f'float8.recipe "{recipe}" needs a GPU of compute capability {needed[0]}.{needed[1]}, {found}; leave float8 '
        "out, or set float8.emulate to true for the same rounding at the speed of float32."
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def choose_layers(linears: dict[str, nn.Linear], skip: Sequence[str]) -> tuple[set[str], dict[str, list[str]]]:
    """Names of the layers to convert, and of the layers that stay, by reason."""
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigError(
                f'float8.skip: "{pattern}" matches no linear layer; they are {shortened(list(linears))}, and a '
                'pattern is compared with the whole name: "layers.0.*", "*.wk".'
            )
    converted, kept = [], defaultdict(list)
    for name, linear in linears.items():
        if name == HEAD:
            kept["head"].append(name)
        elif any(fnmatchcase(name, pattern) for pattern in skip):
            kept["skipped"].append(name)
        elif type(linear) is not nn.Linear:
            kept["not a plain linear"].append(name)  # torchao would drop what a subclass computes in addition
        elif any(size % ALIGNMENT for size in linear.weight.shape):
            kept[f"not a multiple of {ALIGNMENT}"].append(name)
        else:
            converted.append(name)
    if not converted:
        counts = ", ".join(f"{len(names)} {reason}" for reason, names in kept.items())
        raise ConfigError(
            f"float8 has nothing to convert: of {len(linears)} linear layers {counts}; skip less, or leave float8 out."
        )
    return set(converted), dict(kept)


def shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ... {names[-1]} ({len(names)})"


def import_torchao() -> ModuleType:
    """torchao.float8, imported without its warnings about kernels that float8 does not use."""
    with silenced("torchao", PYTREE_LOGGER), warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # a docstring of torchao has one
        try:
            return importlib.import_module("torchao.float8")
        except ImportError as error:
            cure = "pip install 'torchao>=0.17', or leave float8 out."
            raise ConfigError(f"float8 needs torchao ({error}): {cure}") from None
