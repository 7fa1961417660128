"""ModelArgs from a Hugging Face config.json, and config.json from ModelArgs.

Nothing is ignored that changes the arithmetic: a field that our model does not compute raises ConfigError. Two forms of
the RoPE parameters are read: the published `rope_theta` and `rope_scaling`, and `rope_parameters` of transformers 5.
The published form is written, because every version of transformers reads it.

Proof: tests/test_hf.py::test_logits_equal_transformers, tests/test_hf_folders.py::test_flavor_equals_published_config,
tests/test_hf_folders.py::test_flavor_survives_config_json.
"""

import json
import math
import os
from dataclasses import fields, replace
from typing import Any

from errors import ConfigError
from hf.families import FAMILIES, ConfigFile, Family
from model import ModelArgs, get_flavor

# The parameters of each scaling of RoPE: `factor` is rope_factor of ModelArgs. YaRN's betas have defaults there.
ROPE_FIELDS = dict(llama3=("factor", "low_freq_factor", "high_freq_factor"), yarn=("factor",))
BETAS = ("beta_fast", "beta_slow")


def get_model_args(flavor: str, initial_hf_folder: str = "", **overrides: Any) -> ModelArgs:
    """The model of a run: the shape of a flavor, with every override that is not None. `flavor` is a name of
    model/flavors.py, or "hf:FOLDER" for the shape in the folder's config.json. The folder that the weights are loaded
    from, initial_hf_folder, must describe the same model unless it is the flavor's folder. Raises ConfigError for sizes
    that do not fit together and for a folder of another model."""
    folder = flavor.removeprefix("hf:") if flavor.startswith("hf:") else None
    try:
        shape = get_flavor(flavor) if folder is None else model_args_of_folder(folder)
        args = replace(shape, **{name: value for name, value in overrides.items() if value is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if initial_hf_folder and (folder is None or os.path.realpath(folder) != os.path.realpath(initial_hf_folder)):
        require_same_model(args, initial_hf_folder)
    return args


def model_args_of_folder(folder: str) -> ModelArgs:
    """The model that a folder's config.json describes. Raises ConfigError if our model does not compute it."""
    config = ConfigFile(folder)
    family = family_of_config(config)
    for name, values in family.allowed.items():
        config.require(name, *values)
    args = dict(family.args)
    for theirs, (ours, default) in family.fields.items():
        args[ours] = config.get(theirs, default)
        if args[ours] is None:
            raise ConfigError(f"{config.path} has no {theirs}.")
    args |= family.read(config, args) | _read_rope(config)
    types = {f.name: type(f.default) for f in fields(ModelArgs)}
    return ModelArgs(**{name: float(value) if types[name] is float else value for name, value in args.items()})


def config_of_model(args: ModelArgs) -> dict[str, Any]:
    """The fields of config.json for a model. Raises ConfigError if no family computes it."""
    family = family_of_model(args)
    config = dict(architectures=[family.architecture], model_type=family.model_type)
    config |= {name: values[0] for name, values in family.allowed.items()}
    config |= {theirs: getattr(args, ours) for theirs, (ours, _) in family.fields.items()}
    return config | family.write(args) | dict(rope_theta=args.rope_theta, rope_scaling=_rope_scaling_of(args))


def require_same_model(args: ModelArgs, folder: str) -> None:
    """Raises ConfigError unless a folder's config.json describes the model of `args`. The initial values and the
    longest sequence may differ: they do not change what a weight means."""
    theirs, ours = config_of_model(model_args_of_folder(folder)), config_of_model(args)
    differ = [
        f"{name} is {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted({*theirs, *ours} - {"initializer_range", "max_position_embeddings"})
        if theirs.get(name) != ours.get(name)
    ]
    if differ:
        raise ConfigError(
            f"{folder} holds another model: {'; '.join(differ)}. With --model.flavor hf:{folder} the model is the "
            "folder's, except for the options of [model] that are given."
        )


def family_of_config(config: ConfigFile) -> Family:
    """The family of a folder. Raises ConfigError for an architecture that is not in the table."""
    known = {family.architecture: family for family in FAMILIES}
    found = next(iter(config.get("architectures", [])), "missing")
    if found not in known:
        raise ConfigError(f"{config.path}: architecture {found} is not supported; supported are: {', '.join(known)}.")
    return known[found]


def family_of_model(args: ModelArgs) -> Family:
    """The family that computes the model of `args`. Raises ConfigError if there is none."""
    values = dict(vars(args))
    if args.n_experts == 0:
        values |= dict(score_function=None, n_group_topk=None)
    elif args.topk_group >= args.n_expert_groups:
        values["n_group_topk"] = None
    for family in FAMILIES:
        if all(values[name] in allowed for name, allowed in family.computes.items()):
            return family
    names = sorted({name for family in FAMILIES for name in family.computes})
    raise ConfigError(
        f"none of {', '.join(family.architecture for family in FAMILIES)} computes a model with "
        f"{', '.join(f'{name} {values[name]}' for name in names)}. scripts/export_hf.py --skip_mtp leaves the "
        "layers of multi-token prediction out."
    )


def _read_rope(config: ConfigFile) -> dict[str, Any]:
    """The rope_* fields of ModelArgs."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = dict(rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if kind == "default":
        return values | dict(rope_scaling="none")
    if kind not in ROPE_FIELDS:
        raise ConfigError(f'{config.path}: RoPE of type "{kind}" is not supported; "default", "llama3" and "yarn" are.')
    missing = [name for name in ROPE_FIELDS[kind] if rope.get(name) is None]
    if missing:
        raise ConfigError(f"{config.path}: RoPE's parameters lack {missing[0]}: {json.dumps(rope)}.")
    original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    values |= dict(rope_scaling=kind, rope_original_seq_len=original)
    values |= {f"rope_{name}": rope[name] for name in ROPE_FIELDS[kind]}
    if kind == "llama3":
        return values

    mscale, mscale_all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    has_one_mscale = bool(mscale) != bool(mscale_all_dim)
    if has_one_mscale or rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise ConfigError(
            f"{config.path}: YaRN is supported with mscale and mscale_all_dim or without both, and without "
            f"attention_factor and truncate; given {json.dumps(rope)}."
        )
    values |= {f"rope_{name}": rope[name] for name in BETAS if rope.get(name)}
    return values | dict(rope_mscale=mscale or 1.0, rope_mscale_all_dim=mscale_all_dim)


def _rope_scaling_of(args: ModelArgs) -> dict[str, Any] | None:
    """The field rope_scaling of config.json. Raises ConfigError for YaRN scales that config.json cannot express."""
    kind = args.rope_scaling
    if kind == "none":
        return None
    names = ROPE_FIELDS[kind] + (BETAS if kind == "yarn" else ())
    scaling = dict(type=kind, rope_type=kind, original_max_position_embeddings=args.rope_original_seq_len)
    scaling |= {name: getattr(args, f"rope_{name}") for name in names}
    if kind == "llama3":
        return scaling
    if args.rope_mscale and args.rope_mscale_all_dim:
        return scaling | dict(mscale=args.rope_mscale, mscale_all_dim=args.rope_mscale_all_dim)
    if not math.isclose(args.rope_mscale, 1.0) or args.rope_mscale_all_dim:
        raise ConfigError(
            f"Hugging Face's YaRN has no rope_mscale {args.rope_mscale} with rope_mscale_all_dim "
            f"{args.rope_mscale_all_dim}: both must be above 0, or be 1 and 0."
        )
    return scaling
