"""Weights that are DTensors, so that FSDP, checkpoints and the gradient's norm know who holds what, but that their
module computes with as plain local tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from errors import ConfigError
from model.moe import Experts, Router


class LocalWeights(ParallelStyle):
    """Distributes a module's own parameters; the module then sees its local part of them.

    Whole weights (`Replicate()`) work on other tokens on each rank, or for other heads, so their gradients are parts of
    a sum: FSDP adds them up (pytorch/torchtitan #2387 shipped a router whose copies drifted apart without that).
    """

    def __init__(self, placement: Placement):
        super().__init__()
        self.placement = placement

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(weight, mesh, [self.placement])))
        gradient = [Partial() if isinstance(self.placement, Replicate) else self.placement]

        def local(weight: Tensor) -> Tensor:
            return weight.to_local(grad_placements=gradient)

        if isinstance(module, Router | Experts):
            seam = module.gate if isinstance(module, Router) else module.compute
            seam.register_forward_pre_hook(lambda _, xs: tuple(local(x) if isinstance(x, DTensor) else x for x in xs))
        elif isinstance(module, nn.RMSNorm):
            module.forward = lambda x: F.rms_norm(x, module.normalized_shape, local(module.weight), module.eps)
        elif type(module) is nn.Linear:
            module.forward = lambda x: F.linear(x, local(module.weight))
        else:
            raise ConfigError(
                'float8 does not fit the latents of model.attention "mla" under tensor parallelism; add '
                "layers.*.attention.w* and mtp.*.w* to float8.skip, or set parallelism.tensor_parallel_degree to 1."
            )
        return module


def gather_sequence(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """The whole of what is cut along dim, as a plain tensor. Ranks use it for different heads or rows of a weight, so
    each makes a part of its gradient: a sum, which is scattered."""
    x = DTensor.from_local(x, mesh, [Shard(dim)], run_check=False).redistribute(placements=[Replicate()])
    return x.to_local(grad_placements=[Partial()])


class GatherInput(ParallelStyle):
    """Gathers a module's first input along the sequence, see `gather_sequence`."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(lambda _, inputs: (gather_sequence(inputs[0], mesh), *inputs[1:]))
        return module


class GatherOutput(LocalWeights):
    """Whole weights that work on a part of the sequence; their result is gathered, see `gather_sequence`."""

    def __init__(self):
        super().__init__(Replicate())

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, mesh)
        module.register_forward_hook(lambda _, inputs, output: gather_sequence(output, mesh))
        return module


class SumOverRanks(nn.Module):
    """The sum of a tensor without a gradient over all ranks of a mesh, by operations that the compiler understands."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            parts = DTensor.from_local(x, self.mesh, [Partial()] * self.mesh.ndim, run_check=False)
            return parts.redistribute(placements=[Replicate()] * self.mesh.ndim).to_local()
