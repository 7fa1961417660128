"""Parallel styles beside torch's: modules that keep their parameters as DTensors but compute on local tensors.

A parameter stays a DTensor so that FSDP, checkpoints and the gradient norm know which rank holds which part of it. Its
module computes with a plain tensor, because its arithmetic needs no communication: it works on this rank's tokens,
heads or experts alone. torchtitan calls the replicated case `NoParallel`.

Proof: tests/test_plans.py::test_misspelt_plan_key_is_an_error,
tests/test_plans.py::test_forgotten_parameter_is_an_error.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from errors import ConfigError, did_you_mean
from parallelize.mesh import ParallelMesh

Plan = dict[str, ParallelStyle]


def apply_plan(module: nn.Module, mesh: DeviceMesh, plan: Plan) -> None:
    """Torch's `parallelize_module`, with a ConfigError for a key that names no submodule. Torch only warns, and the run
    would go on with that module's gradients never summed."""
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    for key in plan:
        if key not in names:
            raise ConfigError(
                f'The parallel plan\'s key "{key}" matches no module of {type(module).__name__};'
                f"{did_you_mean(key, names) or ' its modules are ' + ', '.join(names) + '.'}"
            )
    parallelize_module(module, mesh, plan)


def check_parameters(stage: nn.Module, mesh: ParallelMesh) -> None:
    """Checks, after all parallelisms are applied, that every parameter is distributed over its axes: fsdp and tp, or
    for routed experts efsdp and ep. ConfigError for a parameter that no plan has reached: ranks would hold copies of
    it whose gradients differ."""
    is_sharded = any(isinstance(module, FSDPModule) for module in stage.modules())
    for name, parameter in stage.named_parameters():
        is_expert = ".moe.experts." in name
        fsdp = mesh.efsdp if is_expert and mesh.efsdp is not None else mesh.fsdp
        other, where = (mesh.ep, "parallelize/expert.py") if is_expert else (mesh.tp, "parallelize/tensor.py")
        needed = {*(fsdp.mesh_dim_names if is_sharded else ()), *(other.mesh_dim_names if other.size() > 1 else ())}
        found = set(parameter.device_mesh.mesh_dim_names) if isinstance(parameter, DTensor) else set()
        if found != needed:
            raise ConfigError(
                f"{name} is distributed over the mesh axes {sorted(found)}, but it must be over {sorted(needed)}; "
                f"add its module to the plan in {where}."
            )


class LocalWeights(ParallelStyle):
    """Distributes a module's parameters by one placement; the module computes with this rank's part as a plain tensor.
    The module is a linear layer, an RMSNorm, or hands its weights to a child without parameters: the router to its
    gate, experts to their grouped products.

    With Replicate() every rank holds the whole weight and uses it for different tokens or heads. So each rank's
    gradient is a part of a sum, Partial(), and FSDP adds the parts. (pytorch/torchtitan #2387 shipped a router without
    that sum: its copies drifted apart.)"""

    def __init__(self, placement: Placement):
        super().__init__()
        self.placement = placement
        self.grad_placements = [Partial() if isinstance(placement, Replicate) else placement]

    def to_local(self, value: Tensor) -> Tensor:
        return value.to_local(grad_placements=self.grad_placements) if isinstance(value, DTensor) else value

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(weight, mesh, [self.placement])))
        if isinstance(module, nn.RMSNorm):
            module.forward = lambda x: F.rms_norm(x, module.normalized_shape, self.to_local(module.weight), module.eps)
        elif isinstance(module, nn.Linear):
            assert type(module) is nn.Linear, "limits.py refuses float8 for these layers"
            module.forward = lambda x: F.linear(x, self.to_local(module.weight))
        for child in module.children():
            child.register_forward_pre_hook(lambda _, inputs: tuple(self.to_local(value) for value in inputs))
        return module


def gather_sequence(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """All-gathers a plain tensor that is sharded along dim; returns the whole as a plain tensor. Each rank uses it for
    different heads or rows of a weight, so each makes a part of its gradient: backward is a reduce-scatter."""
    x = DTensor.from_local(x, mesh, [Shard(dim)], run_check=False).redistribute(placements=[Replicate()])
    return x.to_local(grad_placements=[Partial()])


class GatherInput(ParallelStyle):
    """All-gathers a module's first input along the sequence, see `gather_sequence`."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(lambda _, inputs: (gather_sequence(inputs[0], mesh), *inputs[1:]))
        return module


class GatherOutput(LocalWeights):
    """Replicated weights that work on this rank's part of the sequence; the output is all-gathered along it."""

    def __init__(self):
        super().__init__(Replicate())

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, mesh)
        module.register_forward_hook(lambda _, inputs, output: gather_sequence(output, mesh))
        return module


class AllReduce(nn.Module):
    """Sums a tensor without a gradient over all ranks of a mesh, by operations that the compiler understands."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            parts = DTensor.from_local(x, self.mesh, [Partial()] * self.mesh.ndim, run_check=False)
            return parts.redistribute(placements=[Replicate()] * self.mesh.ndim).to_local()
