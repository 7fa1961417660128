"""The table of families: one entry per Hugging Face architecture, with everything that is special to it.

    LlamaForCausalLM        Llama 3, 3.1 and 3.2
    DeepseekV2ForCausalLM   DeepSeek-V2 and V2-Lite
    DeepseekV3ForCausalLM   DeepSeek-V3 and Kimi K2; also a dense model with MLA

To add a family, add an entry to FAMILIES; it may reuse the maps below. No other file names an architecture.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from errors import ConfigError
from files import read_json
from model.args import ModelArgs


class ConfigFile(dict):
    """The fields of a folder's config.json. A field that is null counts as absent."""

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "config.json")
        super().__init__((name, value) for name, value in read_json(self.path).items() if value is not None)

    def require(self, name: str, *allowed: Any) -> None:
        """Raises ConfigError for a value other than those in `allowed`. An absent field has the first of them."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            known = " or ".join(json.dumps(choice) for choice in allowed)
            raise ConfigError(f"{self.path}: {name} is {json.dumps(value)}; only {known} is supported.")


@dataclass(frozen=True)
class Family:
    """How the config.json and the tensors of one architecture correspond to ours."""

    architecture: str
    model_type: str
    computes: dict[str, tuple]  # field of ModelArgs -> values that it has here; None where the field has no effect

    # config.json
    fields: dict[str, tuple[str, Any]]  # its scalar field -> (ModelArgs field, value if absent)
    allowed: dict[str, tuple]  # its field -> the values that our model computes; an absent field means the first
    args: dict[str, Any]  # what the architecture fixes in ModelArgs
    read: Callable[[ConfigFile, dict[str, Any]], dict[str, Any]]  # (config, ModelArgs so far) -> more ModelArgs
    write: Callable[[ModelArgs], dict[str, Any]]  # more of its fields

    # Tensors. `names` maps the modules of our block, and of our MTP layer, to theirs. Other tensors than weights have
    # full names there. {expert} stands for an expert's number: they have one matrix per expert, we have one tensor.
    names: dict[str, str]
    # Module whose rows RoPE rotates in the order of rotate_half -> rows of one head. rotate_half rotates channels i and
    # i + d/2 together; our RoPE, and interleaved RoPE there, channels 2i and 2i + 1.
    rotate_half: Callable[[ModelArgs, dict[str, Any]], dict[str, int]]
    mtp_copies: dict[str, str] = field(default_factory=dict)  # tensor that each MTP layer repeats -> ours


# -------------------------------------------------------------------------------------------- pieces of maps

REQUIRED = None  # the default of a field that a folder must have
FIELDS = {
    "hidden_size": ("dim", REQUIRED),              "num_hidden_layers": ("n_layers", REQUIRED),
    "num_attention_heads": ("n_heads", REQUIRED),  "intermediate_size": ("hidden_dim", REQUIRED),
    "vocab_size": ("vocab_size", REQUIRED),        "max_position_embeddings": ("max_seq_len", REQUIRED),
    "rms_norm_eps": ("norm_eps", REQUIRED),        "tie_word_embeddings": ("tie_embeddings", False),
    "initializer_range": ("init_std", 0.02),
}  # fmt: skip
MLA_FIELDS = {"q_lora_rank": ("q_lora_rank", 0)}
MLA_FIELDS |= {n: (n, REQUIRED) for n in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
MOE_FIELDS = {
    "n_routed_experts": ("n_experts", 0),            "num_experts_per_tok": ("top_k", 0),
    "n_shared_experts": ("n_shared_experts", 0),     "moe_intermediate_size": ("moe_hidden_dim", 0),
    "first_k_dense_replace": ("n_dense_layers", 0),  "n_group": ("n_expert_groups", 1),
    "topk_group": ("topk_group", 1),                 "norm_topk_prob": ("route_norm", False),
    "routed_scaling_factor": ("route_scale", 1.0),
}  # fmt: skip
MTP_FIELDS = {"num_nextn_predict_layers": ("n_mtp_layers", 0)}
ALLOWED = dict(hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), pretraining_tp=(1,))

TOP_LEVEL = {  # the same in all families
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attention_norm": "input_layernorm",     "attention.wq": "self_attn.q_proj",
    "ffn_norm": "post_attention_layernorm",  "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
GQA = {"attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj"}
MLA = {
    "attention.wq_a": "self_attn.q_a_proj",           "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",           "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",  "attention.wkv_b": "self_attn.kv_b_proj",
}  # fmt: skip
MOE = {
    "moe.router": "mlp.gate",
    "moe.experts.w1": "mlp.experts.{expert}.gate_proj.weight",
    "moe.experts.w2": "mlp.experts.{expert}.down_proj.weight",
    "moe.experts.w3": "mlp.experts.{expert}.up_proj.weight",
    "moe.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "moe.shared_experts.w2": "mlp.shared_experts.down_proj",
    "moe.shared_experts.w3": "mlp.shared_experts.up_proj",
}
MTP = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}


def _mla_rotate_half(args: ModelArgs, config: dict[str, Any]) -> dict[str, int]:
    latent = args.kv_lora_rank + args.qk_rope_head_dim  # all heads share the rotated channels of the key
    rows = {"attention.wq": args.head_dim, "attention.wq_b": args.head_dim, "attention.wkv_a": latent}
    return {} if config.get("rope_interleave", True) else rows


def _read_llama(config: ConfigFile, args: dict[str, Any]) -> dict[str, Any]:
    config.require("head_dim", args["dim"] // args["n_heads"])
    return dict(n_kv_heads=config.get("num_key_value_heads", args["n_heads"]))


def _read_v2(config: ConfigFile, args: dict[str, Any]) -> dict[str, Any]:
    is_greedy = config.get("topk_method", "greedy") == "greedy"  # over all experts, whatever n_group says
    return _read_v3(config, args) | (dict(n_expert_groups=1, topk_group=1) if is_greedy else {})


def _read_v3(config: ConfigFile, args: dict[str, Any]) -> dict[str, Any]:
    is_dense = args["n_experts"] == 0 or args["n_dense_layers"] >= args["n_layers"] + args.get("n_mtp_layers", 0)
    dense = dict(n_experts=0, n_dense_layers=0, expert_bias=False)
    return dict(n_kv_heads=args["n_heads"]) | (dense if is_dense else {})


def _write_v2(args: ModelArgs) -> dict[str, Any]:
    method = "group_limited_greedy" if args.topk_group < args.n_expert_groups else "greedy"
    return dict(num_key_value_heads=args.n_heads, q_lora_rank=args.q_lora_rank or None, topk_method=method)


def _write_v3(args: ModelArgs) -> dict[str, Any]:
    # A dense model: the architecture wants an expert, so all layers count as those before the first MoE layer.
    dense = dict(first_k_dense_replace=args.n_layers + args.n_mtp_layers, n_routed_experts=1)
    written = dict(num_key_value_heads=args.n_heads, q_lora_rank=args.q_lora_rank or None, rope_interleave=True)
    return written | (dense if args.n_experts == 0 else {})


# ------------------------------------------------------------------------------------------------- the table

FAMILIES = (
    Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        computes=dict(attention=("gqa",), n_experts=(0,), n_mtp_layers=(0,)),
        fields=FIELDS,
        allowed=ALLOWED,
        args=dict(attention="gqa"),
        read=_read_llama,
        write=lambda args: dict(num_key_value_heads=args.n_kv_heads, head_dim=args.head_dim),
        names=BLOCK | GQA,
        rotate_half=lambda args, config: {"attention.wq": args.head_dim, "attention.wk": args.head_dim},
    ),
    Family(
        architecture="DeepseekV2ForCausalLM",
        model_type="deepseek_v2",
        computes=dict(
            attention=("mla",),
            score_function=("softmax",),
            route_norm=(False,),
            expert_bias=(False,),
            n_group_topk=(1, None),
            n_mtp_layers=(0,),
        ),
        fields=FIELDS | MLA_FIELDS | MOE_FIELDS,
        allowed=dict(
            ALLOWED,
            moe_layer_freq=(1,),
            scoring_func=("softmax",),
            topk_method=("greedy", "group_limited_greedy"),
            norm_topk_prob=(False,),  # implementations disagree on route_scale after it; no published model has it
            num_nextn_predict_layers=(0,),
        ),
        args=dict(attention="mla", score_function="softmax", expert_bias=False, n_group_topk=1),
        read=_read_v2,
        write=_write_v2,
        names=BLOCK | MLA | MOE,
        rotate_half=_mla_rotate_half,
    ),
    Family(
        architecture="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        computes=dict(attention=("mla",), score_function=("sigmoid", None), n_group_topk=(2, None)),
        fields=FIELDS | MLA_FIELDS | MOE_FIELDS | MTP_FIELDS,
        allowed=dict(ALLOWED, moe_layer_freq=(1,), scoring_func=("sigmoid",), topk_method=("noaux_tc",)),
        args=dict(attention="mla", score_function="sigmoid", expert_bias=True, n_group_topk=2),
        read=_read_v3,
        write=_write_v3,
        names=BLOCK | MLA | MOE | MTP | {"moe.router.expert_bias": "mlp.gate.e_score_correction_bias"},
        rotate_half=_mla_rotate_half,
        mtp_copies={"embed_tokens.weight": "tok_embeddings.weight", "shared_head.head.weight": "output.weight"},
    ),
)
