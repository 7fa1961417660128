"""The table of named model sizes."""

from errors import did_you_mean
from model.args import ModelArgs

# The context extension of Llama 3.1 (8B, 70B, 405B) and of Llama 3.2 (1B, 3B); both start from 8,192 positions.
_LLAMA31_ROPE = dict(rope_scaling="llama3", rope_factor=8.0)
_LLAMA32_ROPE = dict(rope_scaling="llama3", rope_factor=32.0)
_LLAMA3 = dict(vocab_size=128256, max_seq_len=131072, n_kv_heads=8)
# DeepSeek-V2 and V3 (arXiv:2405.04434, 2412.19437) and their published configurations.
_YARN = dict(rope_theta=10000.0, rope_scaling="yarn", rope_factor=40.0, rope_original_seq_len=4096, norm_eps=1e-6)
_MLA = dict(attention="mla", kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
_V2 = dict(
    **_MLA, **_YARN, vocab_size=102400, max_seq_len=163840,
    top_k=6, n_shared_experts=2, n_dense_layers=1, score_function="softmax", balance_loss_weight=0.001,
)  # fmt: skip
_V3 = dict(
    top_k=8, n_shared_experts=1, score_function="sigmoid", n_group_topk=2, route_norm=True,
    expert_bias=True, balance_loss_weight=0.0001, init_std=0.006,
)  # fmt: skip

FLAVORS: dict[str, ModelArgs] = {
    # Trains on a laptop CPU in minutes; its vocabulary is the tokenizer that is shipped with the repository.
    "llama3_debug": ModelArgs(dim=128, n_layers=4, n_heads=8, n_kv_heads=4, hidden_dim=384, max_seq_len=2048),
    # GPT-2 small's shape and vocabulary (50,257, padded to a multiple of 64) in Llama's architecture; not published.
    "llama3_125m": ModelArgs(
        dim=768, n_layers=12, n_heads=12, n_kv_heads=12, hidden_dim=2048, vocab_size=50304, max_seq_len=8192,
        tie_embeddings=True,
    ),
    # Meta's published sizes: 1B and 3B as in Llama 3.2, the others as in Llama 3.1.
    "llama3_1b": ModelArgs(
        dim=2048, n_layers=16, n_heads=32, hidden_dim=8192, tie_embeddings=True, **_LLAMA3, **_LLAMA32_ROPE
    ),
    "llama3_3b": ModelArgs(
        dim=3072, n_layers=28, n_heads=24, hidden_dim=8192, tie_embeddings=True, **_LLAMA3, **_LLAMA32_ROPE
    ),
    "llama3_8b": ModelArgs(dim=4096, n_layers=32, n_heads=32, hidden_dim=14336, **_LLAMA3, **_LLAMA31_ROPE),
    "llama3_70b": ModelArgs(dim=8192, n_layers=80, n_heads=64, hidden_dim=28672, **_LLAMA3, **_LLAMA31_ROPE),
    "llama3_405b": ModelArgs(dim=16384, n_layers=126, n_heads=128, hidden_dim=53248, **_LLAMA3, **_LLAMA31_ROPE),
    # Every part of DeepSeek-V3, small: trains on a laptop CPU in minutes.
    "deepseek_v3_debug": ModelArgs(
        dim=128, n_layers=4, n_heads=8, n_kv_heads=8, hidden_dim=384, max_seq_len=2048, norm_eps=1e-6,
        attention="mla", q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        n_experts=16, moe_hidden_dim=96, n_dense_layers=1, n_expert_groups=4, topk_group=2, n_mtp_layers=1,
        rope_theta=10000.0, **(_V3 | dict(top_k=4, init_std=0.02)),
    ),
    "deepseek_v2_lite_16b": ModelArgs(
        dim=2048, n_layers=27, n_heads=16, n_kv_heads=16, hidden_dim=10944, n_experts=64, moe_hidden_dim=1408,
        rope_mscale=0.707, rope_mscale_all_dim=0.707, **_V2,
    ),
    # DeepSeek-V2, under the family's name.
    "deepseek_v3_236b": ModelArgs(
        dim=5120, n_layers=60, n_heads=128, n_kv_heads=128, hidden_dim=12288, q_lora_rank=1536, n_experts=160,
        moe_hidden_dim=1536, n_expert_groups=8, topk_group=3, route_scale=16.0, rope_mscale_all_dim=1.0, **_V2,
    ),
    "deepseek_v3_671b": ModelArgs(
        dim=7168, n_layers=61, n_heads=128, n_kv_heads=128, hidden_dim=18432, vocab_size=129280, max_seq_len=163840,
        q_lora_rank=1536, n_experts=256, moe_hidden_dim=2048, n_dense_layers=3, n_expert_groups=8, topk_group=4,
        route_scale=2.5, n_mtp_layers=1, rope_mscale_all_dim=1.0, **_MLA, **_YARN, **_V3,
    ),
    # Moonshot's Kimi K2 (arXiv:2507.20534): the same architecture with more and sparser experts, and fewer heads.
    "kimi_k2_1t": ModelArgs(
        dim=7168, n_layers=61, n_heads=64, n_kv_heads=64, hidden_dim=18432, vocab_size=163840, max_seq_len=131072,
        q_lora_rank=1536, n_experts=384, moe_hidden_dim=2048, n_dense_layers=1, route_scale=2.827,
        rope_mscale_all_dim=1.0, **_MLA, **(_YARN | dict(rope_theta=50000.0, rope_factor=32.0, rope_beta_fast=1.0)),
        **_V3,
    ),
}  # fmt: skip


def get_flavor(name: str) -> ModelArgs:
    """The shape of a named model; ValueError with the known names for any other name."""
    if name not in FLAVORS:
        known = ", ".join(FLAVORS)
        raise ValueError(f'model.flavor "{name}" is not known;{did_you_mean(name, FLAVORS)} known: {known}.')
    return FLAVORS[name]
