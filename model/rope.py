"""Rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864), with two extensions to longer contexts.

Angles and rotation are computed in float32 at least, for every dtype of the weights: bfloat16 cannot tell position
4,096 from 4,100 (and a compiler must not fuse the cast away: pytorch/torchtitan #2575).

Proof: tests/test_model.py::test_rope_rotates_each_pair_by_its_angle, tests/test_model.py::test_llama31_rope_scaling,
tests/test_hf.py::test_logits_equal_transformers (YaRN).
"""

import math

import torch
from torch import Tensor

from model.args import ModelArgs


def rope_frequencies(args: ModelArgs, device: torch.device) -> Tensor:
    """Angle per position of each pair of channels, in radians: float32 [rope_dim / 2]."""
    exponent = torch.arange(0, args.rope_dim, 2, dtype=torch.float32, device=device) / args.rope_dim
    frequency = 1.0 / args.rope_theta**exponent
    if args.rope_scaling == "none":
        return frequency
    # Pairs that rotate many times within the original context keep their frequency, pairs that rotate less than about
    # once are slowed by the factor; between them the two are blended.
    if args.rope_scaling == "llama3":
        # Blended by the number of turns (Llama 3.1, arXiv:2407.21783, and its reference code).
        turns = args.rope_original_seq_len * frequency / (2 * math.pi)
        low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    else:
        # Blended by the index of the pair (YaRN, Peng et al. 2023, arXiv:2309.00071, section 3.2, and its code).
        low = max(math.floor(_pair_with_turns(args.rope_beta_fast, args)), 0)
        high = min(math.ceil(_pair_with_turns(args.rope_beta_slow, args)), args.rope_dim - 1)
        pairs = torch.arange(len(frequency), dtype=torch.float32, device=device)
        keep = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return frequency * keep + frequency / args.rope_factor * (1 - keep)


def _pair_with_turns(turns: float, args: ModelArgs) -> float:
    """Index (a fraction) of the pair of channels that rotates `turns` times within the original context."""
    frequency_ratio = args.rope_original_seq_len / (turns * 2 * math.pi)
    return args.rope_dim * math.log(frequency_ratio) / (2 * math.log(args.rope_theta))


def yarn_mscale(args: ModelArgs, mscale: float) -> float:
    """YaRN's factor on queries and keys, which makes attention sharper in longer contexts (section 3.4); 1 without."""
    if args.rope_scaling != "yarn" or args.rope_factor <= 1:
        return 1.0
    return 0.1 * mscale * math.log(args.rope_factor) + 1.0


def rope_cos_sin(positions: Tensor, args: ModelArgs) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: float32 [batch, seq, 1, rope_dim / 2] each, for positions [batch, seq]."""
    angles = positions[..., None, None].float() * rope_frequencies(args, positions.device)
    # DeepSeek applies rope_mscale_all_dim to all channels, in attention's scale (model/attention.py), so it divides the
    # RoPE channels by it here. The quotient is 1 when both are the same.
    mscale = yarn_mscale(args, args.rope_mscale) / yarn_mscale(args, args.rope_mscale_all_dim)
    return angles.cos() * mscale, angles.sin() * mscale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channels (2i, 2i + 1) of x [batch, seq, heads, rope_dim] by their angle; same shape and dtype. Adjacent
    channels form a pair, as in Meta's and DeepSeek's checkpoints. Hugging Face's Llama pairs channel i with i +
    rope_dim / 2 ("rotate_half"), which is the same model with the rows of wq and wk permuted."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
