"""What of a run is saved: tensors by name, and how they are filled again, in any layout, from a checkpoint's folder.

Names: `model.{parameter or buffer}` and `optimizer.{parameter}.{slot}`. The optimizer's hyperparameters and the
learning rate's schedule are not stored: they are the configuration's, and a changed one must take effect.
"""

import json
import os
from dataclasses import dataclass

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from checkpoint.manifest import STATE
from checkpoint.safe_metadata import SafeReader
from errors import ConfigError
from model.args import ModelArgs
from parallelize.float8 import as_plain


@dataclass
class ModelState:
    """This rank's parameters, by name (a pipeline stage has only some, a tied one counts once), what else was learned
    (buffers), and the optimizer's state."""

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    model_args: ModelArgs

    def model_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name. Detached, but the same memory: loading writes into the model."""
        parameters = {f"model.{name}": as_plain(parameter) for name, parameter in self.parameters.items()}
        return parameters | {f"model.{name}": buffer for name, buffer in self.buffers.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by the name of its parameter, whatever group or order that is in."""
        return {
            f"optimizer.{name}.{slot}": tensor
            for name, parameter in self.parameters.items()
            for slot, tensor in self.optimizer.state.get(parameter, {}).items()
        }

    def tensors(self) -> dict[str, Tensor]:
        return self.model_tensors() | self.optimizer_tensors()

    def exported_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights in dtype; what is no parameter (the experts' bias) keeps its own."""
        return {
            name: tensor if name.removeprefix("model.") in self.buffers else tensor.detach().to(dtype)
            for name, tensor in self.model_tensors().items()
        }

    def read(
        self,
        reader: SafeReader,
        tensors: dict[str, Tensor],
        *,
        free: tuple[str, ...],
        may_cast: bool = False,
        group=None,
    ) -> None:
        """Fills tensors, in place, from a checkpoint. The model's shape must be the same but for arguments that begin
        with one of `free`. A collective; ValueError, before anything is read, for what does not fit."""
        path, stored, ours = reader.folder, reader.read_metadata().state_dict_metadata, vars(self.model_args)
        differ = [
            f"{name} is {value} there, {ours.get(name)} here"
            for name, value in read_state(path)["model_args"].items()
            if ours.get(name) != value and not name.startswith(free)
        ]
        if differ:
            raise ConfigError(f"{path} is a checkpoint of another model: {'; '.join(differ)}.")
        for name, tensor in tensors.items():
            if name not in stored:
                raise ConfigError(f"{path} is a checkpoint of another model: it has no {name}.")
            if stored[name].size != tensor.shape:
                raise ConfigError(f"{path}: {name} is {list(stored[name].size)} there, {list(tensor.shape)} here.")
            # DCP would cast in silence.
            if stored[name].properties.dtype != tensor.dtype and not may_cast:
                raise ConfigError(
                    f"{path}: {name} is stored as {stored[name].properties.dtype}, this run has {tensor.dtype}; "
                    "set training.dtype to what it was trained in."
                )
        dcp.load(tensors, storage_reader=reader, process_group=group)

    def empty_optimizer_slots(self, reader: SafeReader) -> dict[str, Tensor]:
        """Empty tensors for every optimizer state that the checkpoint holds, laid out as the parameters are."""
        stored, slots = reader.read_metadata().state_dict_metadata, {}
        for name, parameter in self.parameters.items():
            prefix = f"optimizer.{name}."
            for key, meta in stored.items():
                if key.startswith(prefix):
                    dtype = meta.properties.dtype
                    like_parameter = meta.size == parameter.shape
                    slots[key] = (
                        torch.empty_like(as_plain(parameter), dtype=dtype)
                        if like_parameter
                        else torch.empty(meta.size, dtype=dtype)
                    )
        return slots

    def load_optimizer(self, slots: dict[str, Tensor]) -> None:
        names = {parameter: name for name, parameter in self.parameters.items()}
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {}
        for index, parameter in enumerate(ordered):
            prefix = f"optimizer.{names[parameter]}."
            state[index] = {k.removeprefix(prefix): t for k, t in slots.items() if k.startswith(prefix)}
        # Through torch's own method, which moves scalars to where the fused kernel wants them.
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def read_state(path: str) -> dict:
    """A checkpoint's state.json."""
    try:
        with open(os.path.join(path, STATE), encoding="utf-8") as file:
            state = json.load(file)
    except OSError as error:
        raise ConfigError(f"{path} is not a complete checkpoint: {STATE}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path}: its {STATE} is not valid JSON: {error}.") from None
    if not isinstance(state, dict) or not isinstance(state.get("model_args"), dict):
        raise ConfigError(f"{path}: its {STATE} does not describe a model.")
    return state
