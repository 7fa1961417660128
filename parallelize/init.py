"""Initial weights in any layout: finds which elements of a parameter this rank holds, and fills in just those.

No communication, and no rank ever makes a whole parameter. The values themselves are `model/init.py`'s matter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from model.args import ModelArgs
from model.init import fill_initial_values
from parallelize.compat import StridedShard


@torch.no_grad()
def init_weights(model: nn.Module, args: ModelArgs, seed: int) -> None:
    """Writes every parameter's initial values, the same in any layout, and zeros to what is counted and learned
    without a gradient (buffers); model's memory must exist (`to_empty`)."""
    model.tie_weights()
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        fill_initial_values(local, name, parameter.shape, held_indices(parameter), args, seed)


def held_indices(tensor: Tensor, coordinate: Sequence[int] | None = None) -> list[Tensor]:
    """For each dimension of a tensor, the positions in the whole tensor that this rank holds, or the one at coordinate
    of the tensor's mesh: int64, 1-D."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    held = [torch.arange(size, device=local.device) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return held
    own = tensor.device_mesh.get_coordinate()
    coordinate = own if coordinate is None else coordinate
    shards = [(axis, p) for axis, p in enumerate(tensor.placements) if isinstance(p, Shard | StridedShard)]
    # A strided shard says that the axes to its right split the dimension first (FSDP shards what TP left).
    shards.sort(key=lambda s: (-s[0] if isinstance(s[1], StridedShard) else -len(own), s[0]))
    for axis, placement in shards:
        parts = held[placement.dim].chunk(tensor.device_mesh.size(axis))
        # The last ranks get nothing when there are fewer pieces than ranks.
        held[placement.dim] = parts[coordinate[axis]] if coordinate[axis] < len(parts) else parts[0][:0]
    if coordinate == own:
        assert [len(h) for h in held] == list(local.shape), f"{tensor.placements} of {tuple(tensor.shape)}"
    return held
