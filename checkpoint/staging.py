"""A copy of the tensors in CPU memory, from which a checkpoint is written while training changes the originals.

On a GPU, with pinned memory, the copy runs beside the next step's forward and backward, on a stream of its own; only
the optimizer's step, the first to change a weight, waits for it. Otherwise it is made at once, and all waits for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torch_private import dtensor_with


class Staging:
    """Holds the memory of one copy, which the next copy uses again."""

    def __init__(self, pinned: bool):
        self.pinned, self.memory = pinned, {}
        self.stream = torch.cuda.Stream() if pinned else None
        self.copied = None

    def copy(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The copies, and a function that returns once they are complete. The copies before these are overwritten."""
        self.memory = {name: held for name, held in self.memory.items() if name in tensors}
        if self.stream is None:
            return {name: self._copy(name, tensor) for name, tensor in tensors.items()}, lambda: None
        self.stream.wait_stream(torch.cuda.current_stream())  # for the optimizer's last step
        with torch.cuda.stream(self.stream):
            copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
            copied = self.copied = torch.cuda.Event()
            copied.record()
        return copies, copied.synchronize

    def wait(self) -> None:
        """Makes whatever the device is given from now on come after the copy. Costs the CPU no time."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
        held = self.memory.get(name)
        if held is None or (held.shape, held.dtype) != (local.shape, local.dtype):
            pin = self.pinned and local.device.type == "cuda"
            held = self.memory[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin)
        held.copy_(local, non_blocking=self.pinned)
        if self.stream is not None and local.device.type == "cuda":
            local.record_stream(self.stream)  # one made for this save must outlive its copy
        return dtensor_with(held, tensor) if isinstance(tensor, DTensor) else held
