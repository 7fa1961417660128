"""Initial weights in any layout: finds which elements of a parameter this rank holds, and fills in just those.

No communication, and no rank ever makes a whole parameter. The values themselves are `model/init.py`'s matter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from model.args import ModelArgs
from model.init import fill_initial_values
from torch_private import StridedShard


def materialize(model: nn.Module, device: torch.device, *, cpu_offload: bool) -> None:
    """Memory, without values, for a model on meta. What is counted or learned without a gradient (buffers) is where
    the tokens are, also when FSDP keeps the weights in CPU memory."""
    model.to_empty(device="cpu" if cpu_offload else device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


@torch.no_grad()
def init_weights(model: nn.Module, args: ModelArgs, seed: int) -> None:
    """Writes every parameter's initial values, the same in any layout, and zeros to what is counted and learned
    without a gradient (buffers); model's memory must exist (`materialize`)."""
    model.tie_weights()
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        fill_initial_values(local, name, parameter.shape, held_indices(parameter), args, seed)


def held_indices(tensor: Tensor) -> list[Tensor]:
    """For each dimension of a tensor, the positions in the whole tensor that this rank holds: int64, 1-D."""
    if not isinstance(tensor, DTensor):
        return [torch.arange(size, device=tensor.device) for size in tensor.shape]
    local = tensor.to_local()
    held = indices_at(tensor, tensor.device_mesh.get_coordinate(), local.device)
    assert [len(h) for h in held] == list(local.shape), f"{tensor.placements} of {tuple(tensor.shape)}"
    return held


def indices_at(tensor: DTensor, coordinate: Sequence[int], device: torch.device | str) -> list[Tensor]:
    """What the rank at a coordinate of tensor's mesh holds of it, as `held_indices`, on a device."""
    held = [torch.arange(size, device=device) for size in tensor.shape]
    shards = [(axis, p) for axis, p in enumerate(tensor.placements) if isinstance(p, Shard | StridedShard)]
    # A strided shard says that the axes to its right split the dimension first (FSDP shards what TP left).
    shards.sort(key=lambda s: (-s[0] if isinstance(s[1], StridedShard) else -len(coordinate), s[0]))
    for axis, placement in shards:
        parts = held[placement.dim].chunk(tensor.device_mesh.size(axis))
        # The last ranks get nothing when there are fewer pieces than ranks.
        held[placement.dim] = parts[coordinate[axis]] if coordinate[axis] < len(parts) else parts[0][:0]
    return held
