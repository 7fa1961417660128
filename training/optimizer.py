"""AdamW over any mix of layouts, and the one gradient norm."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torch_private import foreach_mul_, foreach_norm

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_embeddings: bool,
) -> torch.optim.Optimizer:
    """Adam or AdamW, fused. Norms (1-D parameters) are never decayed; the token embedding only if decay_embeddings
    (a tied head is the embedding)."""
    decayed, spared = [], []
    for parameter_name, parameter in parameters.items():
        is_embedding = parameter_name.startswith("tok_embeddings.")
        spare = parameter.ndim < 2 or (is_embedding and not decay_embeddings)
        (spared if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return OPTIMIZERS[name]([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, pp_mesh: DeviceMesh, device: torch.device
) -> float:
    """The L2 norm of the whole model's gradient, in float32 at least; gradients are scaled in place so that it becomes
    at most max_norm (0: only measured). Every rank gets the same number. A collective.

    Parameters may live on different meshes (experts and the rest do), where torch's own function refuses them. Each
    gradient's squares are summed over exactly the axes that it is sharded on, whatever its mesh, and all of them over
    the pipeline's stages: clipping each stage by its own norm would train another model (pytorch/torchtitan #596).
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)  # each takes one pass over memory
    for grad in (p.grad for p in parameters if p.grad is not None):
        axes = ()
        if isinstance(grad, DTensor):
            assert not any(p.is_partial() for p in grad.placements), f"a gradient was not summed: {grad.placements}"
            axes = tuple((grad.device_mesh, a) for a, p in enumerate(grad.placements) if not p.is_replicate())
        groups[axes, grad.dtype].append(_local(grad))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (axes, dtype), grads in groups.items():
        norms = foreach_norm(grads, 2, torch.promote_types(dtype, torch.float32))
        square = torch.stack(norms).square().sum().to(device)  # gradients of offloaded parameters are on the CPU
        for mesh, axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        total = total + square
    dist.all_reduce(total, group=pp_mesh.get_group())
    norm = math.sqrt(total.item())
    if max_norm > 0 and max_norm < norm < math.inf:
        for grads in groups.values():
            foreach_mul_(grads, max_norm / (norm + 1e-6))  # the same small number as torch's
    return norm


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
