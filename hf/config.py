"""ModelArgs from a Hugging Face config.json, and config.json from ModelArgs.

Nothing is ignored that changes the arithmetic: a field that our model does not compute raises ConfigError.

Proof: tests/test_hf.py::test_logits_equal_transformers, tests/test_hf_folders.py::test_flavor_equals_published_config,
tests/test_hf_folders.py::test_flavor_survives_config_json.
"""

import os
from dataclasses import fields, replace
from typing import Any

from errors import ConfigError
from hf.config_file import ConfigFile, read_rope, rope_scaling_of
from hf.families import FAMILIES, Family, effective_n_group_topk
from model import ModelArgs, get_flavor


def get_model_args(flavor: str, initial_hf_folder: str = "", **overrides: Any) -> ModelArgs:
    """The model of a run: the shape of a flavor, with every override that is not None.

    flavor              a name of model/flavors.py, or "hf:FOLDER" for the shape in the folder's config.json
    initial_hf_folder   the folder that the weights are loaded from. Unless it is the flavor's folder, it must describe
                        the same model

    Raises ConfigError for sizes that do not fit together and for a folder of another model.
    """
    folder = flavor.removeprefix("hf:") if flavor.startswith("hf:") else None
    try:
        shape = get_flavor(flavor) if folder is None else model_args_of_folder(folder)
        args = replace(shape, **{name: value for name, value in overrides.items() if value is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    is_same_folder = folder is not None and os.path.realpath(folder) == os.path.realpath(initial_hf_folder)
    if initial_hf_folder and not is_same_folder:
        require_same_model(args, initial_hf_folder)
    return args


def model_args_of_folder(folder: str) -> ModelArgs:
    """The model that a folder's config.json describes. Raises ConfigError if our model does not compute it."""
    config = ConfigFile(folder)
    family = family_of_config(config)
    for name, value in family.fixed.items():
        config.require(name, value)
    for name, values in family.allowed.items():
        config.require(name, *values)
    args = {ours: family.read_field(config, theirs) for theirs, (ours, _) in family.fields.items()} | family.args
    args |= family.read(config, args) | read_rope(config)
    types = {f.name: type(f.default) for f in fields(ModelArgs)}
    return ModelArgs(**{name: float(value) if types[name] is float else value for name, value in args.items()})


def config_of_model(args: ModelArgs) -> dict[str, Any]:
    """The fields of config.json for a model. Raises ConfigError if no family computes it."""
    family = family_of_model(args)
    config = dict(architectures=[family.architecture], model_type=family.model_type) | family.fixed
    config |= {theirs: getattr(args, ours) for theirs, (ours, _) in family.fields.items()}
    return config | family.write(args) | dict(rope_theta=args.rope_theta, rope_scaling=rope_scaling_of(args))


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
    for family in FAMILIES:
        if family.computes(args):
            return family
    names = ("attention", "n_experts", "score_function", "route_norm", "expert_bias", "n_mtp_layers")
    values = {name: getattr(args, name) for name in names} | dict(n_group_topk=effective_n_group_topk(args))
    raise ConfigError(
        f"none of {', '.join(family.architecture for family in FAMILIES)} computes a model with "
        f"{', '.join(f'{name} {value}' for name, value in values.items())}. scripts/export_hf.py --skip_mtp leaves the "
        "layers of multi-token prediction out."
    )
