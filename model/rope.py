"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with Llama 3.1's stretch of long wavelengths.

Angles and rotation are computed in float32 at least, whatever the weights' dtype: bfloat16 cannot tell position
4,096 from 4,100 (and a compiler must not fuse the cast away: pytorch/torchtitan #2575).
"""

import math

import torch
from torch import Tensor

from model.args import ModelArgs


def rope_frequencies(args: ModelArgs, device: torch.device) -> Tensor:
    """Angle per position of each pair of channels, in radians: float32 [head_dim / 2]."""
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device=device) / args.head_dim
    frequency = 1.0 / args.rope_theta**exponent
    if args.rope_scaling == "none":
        return frequency
    # Llama 3.1 (arXiv:2407.21783 and its reference code): wavelengths that fitted many times into the original
    # context keep their frequency, those that did not fit are slowed by the factor, between them it is blended.
    turns = args.rope_original_seq_len * frequency / (2 * math.pi)  # rotations within the original context
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequency * (keep + (1 - keep) / args.rope_factor)


def rope_cos_sin(positions: Tensor, args: ModelArgs) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: float32 [batch, seq, 1, head_dim / 2] each, for positions [batch, seq]."""
    angles = positions[..., None, None].float() * rope_frequencies(args, positions.device)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channels (2i, 2i + 1) of x [batch, seq, heads, head_dim] by their angle; same shape and dtype.

    Neighbouring channels form a pair, as in Meta's checkpoints; Hugging Face's pair channel i with i + head_dim / 2,
    which is the same model with the rows of wq and wk permuted.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
