"""The state of a run: numbers, and tensors by name. Loading fills the tensors in place, in any layout.

A checkpoint's tensors have names such as `model.norm.weight` and `optimizer.norm.weight.exp_avg`. Hyperparameters and
the learning rate schedule are not stored: they come from the configuration, so that a change takes effect on resume.

Proof: tests/test_train.py::test_resume_in_any_layout, tests/test_saves.py::test_checkpoint_of_first_format_loads.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from checkpoint.integrity import STATE, SafeReader
from errors import ConfigError
from files import read_json
from model.args import ModelArgs
from parallelize.float8 import as_plain

# Names of ModelArgs in the first format of state.json -> names of today, which are those of papers and other projects.
RENAMED_ARGS = {
    "ffn_dim": "hidden_dim", "moe_ffn_dim": "moe_hidden_dim", "n_experts_per_token": "top_k",
    "n_limited_groups": "topk_group", "n_group_top": "n_group_topk", "score_scale": "route_scale",
    "normalize_scores": "route_norm",
}  # fmt: skip


@dataclass
class TrainState:
    """The progress of a run, in numbers."""

    step: int = 0  # optimizer steps done, skipped steps included
    tokens_seen: int = 0  # tokens of these steps, over all ranks
    samples_consumed: int = 0  # sequences of these steps, over all ranks: the position in the data
    data_fingerprint: str = ""  # identifies the order of the samples: data, tokenizer, seed, seq_len, packing

    def advance(self, *, sequences: int, tokens: int) -> None:
        """Counts one step of so many sequences and tokens, over all ranks."""
        self.step += 1
        self.samples_consumed += sequences
        self.tokens_seen += tokens


@dataclass
class ModelState:
    """The tensors of a run, on this rank."""

    parameters: dict[str, nn.Parameter]  # a pipeline stage has only some of them, and a tied weight counts once
    buffers: dict[str, Tensor]  # what is learned without a gradient, such as the expert biases
    optimizer: torch.optim.Optimizer
    model_args: ModelArgs

    def model_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name. They are detached but share the memory: loading writes into the model."""
        parameters = {f"model.{name}": as_plain(parameter) for name, parameter in self.parameters.items()}
        return parameters | {f"model.{name}": buffer for name, buffer in self.buffers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of model and optimizer by name."""
        optimizer_tensors = {
            f"optimizer.{name}.{key}": tensor
            for name, parameter in self.parameters.items()
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        return self.model_tensors() | optimizer_tensors

    def load(self, reader: SafeReader, *, ignored_args: tuple[str, ...], group) -> None:
        """Fills model and optimizer from a checkpoint. Conditions and errors: `load_tensors`."""
        states = {f"optimizer.{name}": {} for name in self.parameters}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            prefix, _, key = name.rpartition(".")
            if prefix in states:
                # Empty tensors, to be filled. A moment has the parameter's layout.
                parameter = self.parameters[prefix.removeprefix("optimizer.")]
                like = as_plain(parameter) if stored.size == parameter.shape else torch.empty(stored.size)
                states[prefix][key] = torch.empty_like(like, dtype=stored.properties.dtype)
        tensors = {f"{prefix}.{key}": t for prefix, state in states.items() for key, t in state.items()}
        self.load_tensors(reader, self.model_tensors() | tensors, ignored_args=ignored_args, group=group)
        # Not by assignment: load_state_dict moves scalars to the device where the fused kernel needs them.
        names = {parameter: name for name, parameter in self.parameters.items()}
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {i: states[f"optimizer.{names[parameter]}"] for i, parameter in enumerate(ordered)}
        self.optimizer.load_state_dict(dict(self.optimizer.state_dict(), state=state))
        lost = [names[p] for i, p in enumerate(ordered) if state[i] and not self.optimizer.state.get(p)]
        assert not lost, f"the optimizer's load_state_dict did not take the state of {lost[0]}"

    def load_tensors(self, reader: SafeReader, tensors: dict, *, ignored_args, group, may_cast: bool = False) -> None:
        """Fills tensors (by name) in place from a checkpoint. A collective. ConfigError, before anything is read, if a
        model argument differs that does not begin with one of ignored_args, if a tensor is missing or has another
        shape, and, unless may_cast, if it has another dtype."""
        path, stored, ours = reader.path, reader.read_metadata().state_dict_metadata, vars(self.model_args)
        differ = [
            f"{name} is {value} there, {ours.get(name)} here"
            for name, value in read_state(path)["model_args"].items()
            if ours.get(name) != value and not name.startswith(ignored_args)
        ]
        if differ:
            raise ConfigError(f"{path} is a checkpoint of another model: {'; '.join(differ)}.")
        for name, tensor in tensors.items():
            if name not in stored:
                raise ConfigError(f"{path} is a checkpoint of another model: it has no {name}.")
            if stored[name].size != tensor.shape:
                raise ConfigError(f"{path}: {name} is {list(stored[name].size)} there, {list(tensor.shape)} here.")
            # DCP would cast without a warning.
            if stored[name].properties.dtype != tensor.dtype and not may_cast:
                raise ConfigError(
                    f"{path}: {name} is stored as {stored[name].properties.dtype}, this run has {tensor.dtype}; "
                    "set training.dtype to the dtype that the checkpoint was trained in."
                )
        dcp.load(tensors, storage_reader=reader, process_group=group)


def read_state(path: str) -> dict[str, Any]:
    """Reads a checkpoint's state.json, of any format, with today's names: the fields of TrainState, `model_args`, and
    `weights_only`, which is true where the checkpoint has no optimizer state. ConfigError if it cannot be read."""
    state = read_json(os.path.join(path, STATE))
    if not isinstance(state, dict) or not isinstance(state.get("model_args"), dict):
        raise ConfigError(f"{path}: its {STATE} does not describe a model.")
    state["model_args"] = {RENAMED_ARGS.get(name, name): value for name, value in state["model_args"].items()}
    if "order_of_data" in state:  # the first format's name
        state["data_fingerprint"] = state.pop("order_of_data")
    return state
