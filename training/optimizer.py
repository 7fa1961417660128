"""AdamW over any mix of layouts, and one gradient norm for the whole model.

Proof: tests/test_training.py::test_gradient_norm_equals_torch, tests/test_training.py::test_only_matrices_are_decayed.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from collectives import local_tensor
from torch_private import foreach_mul_, foreach_norm

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


def build_optimizer(
    parameters: dict[str, nn.Parameter], *, name: str, lr: float, betas: tuple, eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Adam or AdamW, fused, in two parameter groups: matrices are decayed; norms (1-D parameters) and the token
    embedding are not, and neither is a tied head, which is the embedding. Each group keeps its peak learning rate as
    "initial_lr", which the schedule scales at every step: groups may have different ones."""
    decayed, not_decayed = [], []
    for parameter_name, parameter in parameters.items():
        is_decayed = parameter.ndim >= 2 and not parameter_name.startswith("tok_embeddings.")
        (decayed if is_decayed else not_decayed).append(parameter)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=not_decayed, weight_decay=0.0)]
    groups = [group | dict(initial_lr=lr) for group in groups if group["params"]]
    return OPTIMIZERS[name](groups, lr=lr, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float, pp: DeviceMesh, device: torch.device) -> float:
    """Returns the L2 norm of the whole model's gradient, the same on every rank, computed in float32 at least; scales
    gradients in place so that the norm becomes at most max_norm (0: no scaling). A collective.

    Parameters may live on different meshes, as experts and the rest do, and torch's function refuses these. Each
    gradient's squares are summed over exactly the axes that the gradient is sharded on, and then over the pipeline's
    stages: clipping each stage by its own norm would train another model (pytorch/torchtitan #596).
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)  # each group takes one pass over memory
    for grad in (p.grad for p in parameters if p.grad is not None):
        placements = grad.placements if isinstance(grad, DTensor) else ()
        assert not any(p.is_partial() for p in placements), f"a gradient was not summed: {placements}"
        axes = tuple((grad.device_mesh, axis) for axis, p in enumerate(placements) if not p.is_replicate())
        groups[axes, grad.dtype].append(local_tensor(grad))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (axes, dtype), grads in groups.items():
        norms = foreach_norm(grads, 2, torch.promote_types(dtype, torch.float32))
        square = torch.stack(norms).square().sum().to(device)  # gradients of offloaded parameters are on the CPU
        for mesh, axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        total = total + square
    dist.all_reduce(total, group=pp.get_group())
    norm = math.sqrt(total.item())
    if max_norm > 0 and max_norm < norm < math.inf:
        for grads in groups.values():
            foreach_mul_(grads, max_norm / (norm + 1e-6))  # the same small number as torch's
    return norm
