"""A Hugging Face config.json as ModelArgs, and back, for Llama 3 and for DeepSeek V2 and V3 (Kimi K2 is a V3).

Only what our model computes is let through: whatever would change the arithmetic and has no counterpart here is one
ValueError. Both spellings of RoPE are read, the published `rope_theta` and `rope_scaling` and transformers 5's
`rope_parameters`; the published one is written, which every version understands.
"""

import json
import math
import os
from dataclasses import fields
from typing import Any

from errors import ConfigError
from files import read_json
from model.args import ModelArgs

LLAMA, DEEPSEEK_V2, DEEPSEEK_V3 = "LlamaForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"

# config.json's name of what is one number, or one yes or no, in both.
NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
DEEPSEEK_NAMES = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "n_experts",
    "num_experts_per_tok": "top_k",
    "n_shared_experts": "n_shared_experts",
    "moe_intermediate_size": "moe_hidden_dim",
    "first_k_dense_replace": "n_dense_layers",
    "n_group": "n_expert_groups",
    "topk_group": "topk_group",
    "norm_topk_prob": "route_norm",
    "routed_scaling_factor": "route_scale",
    "num_nextn_predict_layers": "n_mtp_layers",
}
# What a file may leave out (or have null), with the meaning of that.
DEFAULTS = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "q_lora_rank": 0,
    "n_routed_experts": 0,
    "num_experts_per_tok": 0,
    "n_shared_experts": 0,
    "moe_intermediate_size": 0,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
}


class ConfigFile:
    """config.json of a folder. ValueError for what is missing in it, or is not what our model computes."""

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "config.json")
        self.values = read_json(self.path)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def __getitem__(self, name: str) -> Any:
        value = self.get(name, DEFAULTS.get(name))
        if value is None:
            raise ConfigError(f"{self.path} has no {name}.")
        return value

    def require(self, name: str, *allowed: Any, default: Any) -> Any:
        value = self.get(name, default)
        if value not in allowed:
            known = " or ".join(json.dumps(choice) for choice in allowed)
            raise ConfigError(f"{self.path}: {name} is {json.dumps(value)}; only {known} is supported.")
        return value

    @property
    def architecture(self) -> str:
        known = (LLAMA, DEEPSEEK_V2, DEEPSEEK_V3)
        found = next(iter(self.get("architectures", [])), "missing")
        if found not in known:
            raise ConfigError(f"{self.path}: architecture {found} is not supported; these are: {', '.join(known)}.")
        return found


# --------------------------------------------------------------------------------------------------- in


def model_args_of_folder(folder: str) -> ModelArgs:
    """The model that a folder's config.json describes. ValueError if it is none of ours."""
    config = ConfigFile(folder)
    architecture = config.architecture
    config.require("hidden_act", "silu", default="silu")
    config.require("attention_bias", False, default=False)
    config.require("mlp_bias", False, default=False)
    config.require("pretraining_tp", 1, default=1)
    values = {ours: config[theirs] for theirs, ours in NAMES.items()}
    if architecture == LLAMA:
        values["n_kv_heads"] = config.get("num_key_value_heads", values["n_heads"])
        config.require("head_dim", values["dim"] // values["n_heads"], default=values["dim"] // values["n_heads"])
    else:
        values = _deepseek_values(config, architecture, values)
    values |= _rope_values(config)
    types = {f.name: type(f.default) for f in fields(ModelArgs)}
    return ModelArgs(**{name: float(value) if types[name] is float else value for name, value in values.items()})


def _deepseek_values(config: ConfigFile, architecture: str, common: dict[str, Any]) -> dict[str, Any]:
    values = common | {ours: config[theirs] for theirs, ours in DEEPSEEK_NAMES.items()}
    values |= dict(attention="mla", n_kv_heads=config["num_attention_heads"])
    config.require("moe_layer_freq", 1, default=1)
    # Each architecture has one score function and one way to rank groups: by the two best biased scores in V3.
    if architecture == DEEPSEEK_V3:
        config.require("scoring_func", "sigmoid", default="sigmoid")
        config.require("topk_method", "noaux_tc", default="noaux_tc")
        values |= dict(score_function="sigmoid", expert_bias=True, n_group_topk=2)
    else:
        config.require("scoring_func", "softmax", default="softmax")
        # Normalised scores are scaled in one implementation of V2 and not in another; no published model has them.
        config.require("norm_topk_prob", False, default=False)
        if config.require("topk_method", "greedy", "group_limited_greedy", default="greedy") == "greedy":
            values |= dict(n_expert_groups=1, topk_group=1)
        values |= dict(score_function="softmax", expert_bias=False, n_group_topk=1)
    if values["n_dense_layers"] >= values["n_layers"] + values["n_mtp_layers"]:
        values |= dict(n_experts=0)
    if values["n_experts"] == 0:
        values |= dict(n_dense_layers=0, expert_bias=False)
    return values


def _rope_values(config: ConfigFile) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = dict(rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if kind == "default":
        return values | dict(rope_scaling="none")
    if kind not in ("llama3", "yarn"):
        raise ConfigError(f'{config.path}: RoPE of type "{kind}" is not supported; "default", "llama3" and "yarn" are.')
    needed = ("factor", *(("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()))
    missing = [name for name in needed if rope.get(name) is None]
    if missing:
        raise ConfigError(f"{config.path}: RoPE's parameters lack {missing[0]}: {json.dumps(rope)}.")
    values |= dict(rope_scaling=kind, rope_factor=rope["factor"])
    original = rope.get("original_max_position_embeddings")
    values["rope_original_seq_len"] = original or config["max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return values | dict(rope_low_freq_factor=low, rope_high_freq_factor=high)
    mscale, mscale_all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if (
        rope.get("attention_factor") is not None
        or not rope.get("truncate", True)
        or bool(mscale) != bool(mscale_all_dim)
    ):
        raise ConfigError(
            f"{config.path}: YaRN is supported with mscale and mscale_all_dim or without both, and without "
            f"attention_factor and truncate; given {json.dumps(rope)}."
        )
    values |= dict(rope_beta_fast=rope.get("beta_fast") or 32.0, rope_beta_slow=rope.get("beta_slow") or 1.0)
    return values | dict(rope_mscale=mscale or 1.0, rope_mscale_all_dim=mscale_all_dim)


# --------------------------------------------------------------------------------------------------- out


def config_of_model(args: ModelArgs) -> dict[str, Any]:
    """config.json's values for a model. ValueError if no architecture of Hugging Face computes it."""
    architecture = _architecture_of(args)
    config = dict(
        architectures=[architecture],
        model_type={LLAMA: "llama", DEEPSEEK_V2: "deepseek_v2", DEEPSEEK_V3: "deepseek_v3"}[architecture],
        hidden_act="silu",
        attention_bias=False,
        **{theirs: getattr(args, ours) for theirs, ours in NAMES.items()},
        rope_theta=args.rope_theta,
        rope_scaling=_rope_scaling(args),
    )
    if architecture == LLAMA:
        return config | dict(mlp_bias=False, num_key_value_heads=args.n_kv_heads, head_dim=args.head_dim)
    config |= {theirs: getattr(args, ours) for theirs, ours in DEEPSEEK_NAMES.items()}
    config |= dict(num_key_value_heads=args.n_heads, q_lora_rank=args.q_lora_rank or None, moe_layer_freq=1)
    if args.n_experts == 0:  # every block is before the first mixture
        config |= dict(first_k_dense_replace=args.n_layers + args.n_mtp_layers, n_routed_experts=1)
    if architecture == DEEPSEEK_V3:
        return config | dict(scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True)
    del config["num_nextn_predict_layers"]
    method = "group_limited_greedy" if args.topk_group < args.n_expert_groups else "greedy"
    return config | dict(scoring_func="softmax", topk_method=method)


def _architecture_of(args: ModelArgs) -> str:
    is_moe_layer = args.n_experts > 0
    ranked_by = args.n_group_topk if is_moe_layer and args.topk_group < args.n_expert_groups else None
    if args.attention == "gqa" and not is_moe_layer and args.n_mtp_layers == 0:
        return LLAMA
    if args.attention == "mla" and (not is_moe_layer or (args.score_function == "sigmoid" and ranked_by in (2, None))):
        return DEEPSEEK_V3
    is_v2 = args.score_function == "softmax" and ranked_by in (1, None) and not args.route_norm
    if args.attention == "mla" and is_v2 and not args.expert_bias and args.n_mtp_layers == 0:
        return DEEPSEEK_V2
    named = dict(
        attention=args.attention, n_experts=args.n_experts, score_function=args.score_function, n_group_topk=ranked_by
    )
    named |= dict(route_norm=args.route_norm, expert_bias=args.expert_bias, n_mtp_layers=args.n_mtp_layers)
    shown = ", ".join(f"{name} {value}" for name, value in named.items())
    raise ConfigError(
        f"none of {LLAMA}, {DEEPSEEK_V2} and {DEEPSEEK_V3} computes a model with {shown}. (Multi-token prediction can "
        "be left out: scripts/export_hf.py --skip_mtp.)"
    )


def _rope_scaling(args: ModelArgs) -> dict[str, Any] | None:
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


def require_same_model(args: ModelArgs, folder: str) -> None:
    """ValueError unless a folder's config.json describes the model of `args`, but for what does not change a weight's
    meaning."""
    theirs, ours = config_of_model(model_args_of_folder(folder)), config_of_model(args)
    free = ("initializer_range", "max_position_embeddings")
    differ = [
        f"{name} is {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name) and name not in free
    ]
    if differ:
        raise ConfigError(
            f"{folder} holds another model: {'; '.join(differ)}. With --model.flavor hf:{folder} the model is the "
            "folder's, but for options of [model] that are given."
        )
