"""Fields of config.json, and its RoPE parameters, which all families write in the same way.

Two forms of the RoPE parameters are read: the published `rope_theta` and `rope_scaling`, and `rope_parameters` of
transformers 5. The published form is written, because every version of transformers reads it.
"""

import json
import math
import os
from typing import Any

from errors import ConfigError
from files import read_json
from model.args import ModelArgs


class ConfigFile:
    """The config.json of a folder. A field that is null counts as absent. Raises ConfigError for a field that is
    missing, or whose value our model cannot compute."""

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "config.json")
        self.values = read_json(self.path)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str, default: Any = None) -> Any:
        """The field, or the default. Raises ConfigError if both are None."""
        value = self.get(name, default)
        if value is None:
            raise ConfigError(f"{self.path} has no {name}.")
        return value

    def require(self, name: str, *allowed: Any) -> Any:
        """The field, whose value must be one of `allowed`; an absent field has the first of them."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            known = " or ".join(json.dumps(choice) for choice in allowed)
            raise ConfigError(f"{self.path}: {name} is {json.dumps(value)}; only {known} is supported.")
        return value


def read_rope(config: ConfigFile) -> dict[str, Any]:
    """The rope_* fields of ModelArgs."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = dict(rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if kind == "default":
        return values | dict(rope_scaling="none")
    if kind not in ("llama3", "yarn"):
        raise ConfigError(f'{config.path}: RoPE of type "{kind}" is not supported; "default", "llama3" and "yarn" are.')
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    missing = [name for name in needed if rope.get(name) is None]
    if missing:
        raise ConfigError(f"{config.path}: RoPE's parameters lack {missing[0]}: {json.dumps(rope)}.")
    original = rope.get("original_max_position_embeddings") or config.need("max_position_embeddings")
    values |= dict(rope_scaling=kind, rope_factor=rope["factor"], rope_original_seq_len=original)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return values | dict(rope_low_freq_factor=low, rope_high_freq_factor=high)

    mscale, mscale_all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    has_one_mscale = bool(mscale) != bool(mscale_all_dim)
    if has_one_mscale or rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise ConfigError(
            f"{config.path}: YaRN is supported with mscale and mscale_all_dim or without both, and without "
            f"attention_factor and truncate; given {json.dumps(rope)}."
        )
    values |= dict(rope_beta_fast=rope.get("beta_fast") or 32.0, rope_beta_slow=rope.get("beta_slow") or 1.0)
    return values | dict(rope_mscale=mscale or 1.0, rope_mscale_all_dim=mscale_all_dim)


def rope_scaling_of(args: ModelArgs) -> dict[str, Any] | None:
    """The field rope_scaling. Raises ConfigError for YaRN scales that config.json cannot express."""
    if args.rope_scaling == "none":
        return None
    scaling = dict(
        type=args.rope_scaling,
        rope_type=args.rope_scaling,
        factor=args.rope_factor,
        original_max_position_embeddings=args.rope_original_seq_len,
    )
    if args.rope_scaling == "llama3":
        return scaling | dict(low_freq_factor=args.rope_low_freq_factor, high_freq_factor=args.rope_high_freq_factor)
    scaling |= dict(beta_fast=args.rope_beta_fast, beta_slow=args.rope_beta_slow)
    if args.rope_mscale and args.rope_mscale_all_dim:
        return scaling | dict(mscale=args.rope_mscale, mscale_all_dim=args.rope_mscale_all_dim)
    if not math.isclose(args.rope_mscale, 1.0) or args.rope_mscale_all_dim:
        raise ConfigError(
            f"Hugging Face's YaRN has no rope_mscale {args.rope_mscale} with rope_mscale_all_dim "
            f"{args.rope_mscale_all_dim}: both must be above 0, or be 1 and 0."
        )
    return scaling
