"""Four blocks of a tiny model, what runs through them, and their gradients: for recomputation and compilation."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from model import ModelArgs, Transformer
from model.rope import rope_cos_sin
from parallelize.styles import apply_plan
from parallelize.tensor import block_plan

ARGS = ModelArgs(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)
BATCH, SEQ = 2, 16
POSITIONS = torch.arange(SEQ).expand(BATCH, SEQ)
ROPE = rope_cos_sin(POSITIONS, ARGS)


def tokens_and_positions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(ARGS.vocab_size, (BATCH, SEQ), generator=generator), POSITIONS


def stream(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The input of the first block, [BATCH, SEQ, dim]."""
    # Cast and not drawn in dtype: torch draws other numbers for other types.
    return torch.randn(BATCH, SEQ, ARGS.dim, generator=torch.Generator().manual_seed(2)).to(dtype)


def run_blocks(model: Transformer, x: torch.Tensor) -> torch.Tensor:
    for block in model.layers.values():
        x, _ = block(x, *ROPE)
    return x


def shard_blocks(model: Transformer, tp: DeviceMesh) -> None:
    """Tensor and sequence parallelism of the blocks alone."""
    for block in model.layers.values():
        apply_plan(block, tp, block_plan(ARGS, block))


def whole_gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """The blocks' gradients by name. A collective."""
    gradients = {name: p.grad for name, p in model.layers.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
