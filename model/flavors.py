"""The table of named model sizes."""

from difflib import get_close_matches

from model.args import ModelArgs

# Llama 3.1's context stretch (8B, 70B, 405B) and Llama 3.2's (1B, 3B); both start from 8,192 positions.
_LLAMA31_ROPE = dict(rope_scaling="llama3", rope_factor=8.0)
_LLAMA32_ROPE = dict(rope_scaling="llama3", rope_factor=32.0)
_LLAMA3 = dict(vocab_size=128256, max_seq_len=131072, n_kv_heads=8)

FLAVORS: dict[str, ModelArgs] = {
    # Trains on a laptop CPU in minutes; its vocabulary is the tokenizer that is shipped with the repository.
    "llama3_debug": ModelArgs(dim=128, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=384, max_seq_len=2048),
    # GPT-2 small's shape and vocabulary (50,257, padded to a multiple of 64) in Llama's architecture; not published.
    "llama3_125m": ModelArgs(
        dim=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        ffn_dim=2048,
        vocab_size=50304,
        max_seq_len=8192,
        tie_embeddings=True,
    ),
    # Meta's published sizes: 1B and 3B as in Llama 3.2, the others as in Llama 3.1.
    "llama3_1b": ModelArgs(
        dim=2048, n_layers=16, n_heads=32, ffn_dim=8192, tie_embeddings=True, **_LLAMA3, **_LLAMA32_ROPE
    ),
    "llama3_3b": ModelArgs(
        dim=3072, n_layers=28, n_heads=24, ffn_dim=8192, tie_embeddings=True, **_LLAMA3, **_LLAMA32_ROPE
    ),
    "llama3_8b": ModelArgs(dim=4096, n_layers=32, n_heads=32, ffn_dim=14336, **_LLAMA3, **_LLAMA31_ROPE),
    "llama3_70b": ModelArgs(dim=8192, n_layers=80, n_heads=64, ffn_dim=28672, **_LLAMA3, **_LLAMA31_ROPE),
    "llama3_405b": ModelArgs(dim=16384, n_layers=126, n_heads=128, ffn_dim=53248, **_LLAMA3, **_LLAMA31_ROPE),
}


def get_flavor(name: str) -> ModelArgs:
    """The shape behind a name; ValueError with the known names otherwise."""
    if name not in FLAVORS:
        near = get_close_matches(name, FLAVORS, n=1)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f'model.flavor "{name}" is not known; {hint}known: {", ".join(FLAVORS)}.')
    return FLAVORS[name]
