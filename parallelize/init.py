"""Initial weights in any layout: a rank finds which elements of a parameter it holds, and writes only these. No rank
ever makes a whole parameter, and nothing is communicated. `model/init.py` computes each value from the seed, the
parameter's name and the element's index in the whole parameter.

Proof: tests/test_mesh.py::test_held_indices_equal_local_elements,
tests/test_mesh.py::test_initial_weights_are_equal_in_any_layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from collectives import local_tensor
from model.args import ModelArgs
from model.init import fill_initial_values
from torch_private import StridedShard


def materialize(stage: nn.Module, device: torch.device, *, cpu_offload: bool) -> None:
    """Allocates the memory of a stage on meta, without values. Buffers are on the device, where the tokens are, also
    when FSDP keeps the weights in CPU memory."""
    stage.to_empty(device="cpu" if cpu_offload else device)
    for module in stage.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


@torch.no_grad()
def init_weights(stage: nn.Module, args: ModelArgs, seed: int) -> None:
    """Writes the initial values of every parameter, bitwise the same in any layout, and zeros into the buffers. The
    stage's memory must exist (`materialize`)."""
    stage.tie_weights()
    for buffer in stage.buffers():
        buffer.zero_()
    for name, parameter in stage.named_parameters():
        fill_initial_values(local_tensor(parameter), name, parameter.shape, held_indices(parameter), args, seed)


def held_indices(tensor: Tensor) -> list[Tensor]:
    """For each dimension of a tensor, the positions in the whole tensor that this rank holds: int64, 1-D."""
    if not isinstance(tensor, DTensor):
        return [torch.arange(size, device=tensor.device) for size in tensor.shape]
    local = tensor.to_local()
    held = indices_at(tensor, tensor.device_mesh.get_coordinate(), local.device)
    assert [len(h) for h in held] == list(local.shape), f"{tensor.placements} of {tuple(tensor.shape)}"
    return held


def indices_at(tensor: DTensor, coordinate: Sequence[int], device: torch.device | str) -> list[Tensor]:
    """The positions, as `held_indices`, that the rank at a coordinate of the tensor's mesh holds.

    Rows 0 to 7, cut by tensor parallelism over tp 2 and then by FSDP over fsdp 2, on the mesh (fsdp, tp):

        placements (_StridedShard(0), Shard(0))      tp 0             tp 1
                                            fsdp 0   rows 0 1         rows 4 5
                                            fsdp 1   rows 2 3         rows 6 7

    The strided shard says that the mesh axes to its right have cut the dimension first. So the plain shards cut first,
    from left to right, then the strided shards, from right to left.
    """
    held = [torch.arange(size, device=device) for size in tensor.shape]
    axes = list(enumerate(tensor.placements))
    plain = [(axis, p) for axis, p in axes if isinstance(p, Shard)]  # a StridedShard is not a Shard
    strided = [(axis, p) for axis, p in reversed(axes) if isinstance(p, StridedShard)]
    for axis, placement in plain + strided:
        parts = held[placement.dim].chunk(tensor.device_mesh.size(axis))
        # With fewer rows than ranks, the last ranks hold nothing.
        held[placement.dim] = parts[coordinate[axis]] if coordinate[axis] < len(parts) else parts[0][:0]
    return held
