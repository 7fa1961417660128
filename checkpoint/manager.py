"""Save, find, load and delete checkpoints, with torch's distributed checkpoint (DCP) for the tensors.

A checkpoint is a folder `step-N`: DCP's files, which describe every tensor as a whole under its name and so load into
any layout, and `state.json` with the numbers that are not tensors. It is written under another name and renamed when
all ranks have finished, so what bears the final name is complete.

Tensors' names: `model.{parameter}` and `optimizer.{parameter}.{slot}`. The optimizer's hyperparameters and the learning
rate's schedule are not stored: they are the configuration's, and a changed one must take effect.
"""

import json
import os
import re
import shutil
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.hf import load_hf
from model.args import ModelArgs
from parallelize.float8 import as_plain

# Of the model's arguments, those that decide how it learns and not what it computes: they may change on the way.
TRAINING_ONLY = ("init_std", "expert_bias_speed", "balance_loss_weight", "mtp_loss_weight")


class CheckpointManager:
    """Owns one folder of checkpoints of one run: of this rank's parameters, by name (a pipeline stage has only some, a
    tied one counts once), what else was learned (buffers), and the optimizer's state. Every method but the constructor
    is a collective."""

    def __init__(
        self,
        folder: str,
        *,
        parameters: dict[str, nn.Parameter],
        buffers: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        model_args: ModelArgs,
        enable: bool,
        interval: int,
        keep_latest_k: int,
    ):
        self.folder, self.parameters, self.buffers = folder, parameters, buffers
        self.optimizer, self.model_args = optimizer, model_args
        self.enable, self.interval, self.keep_latest_k = enable, interval, keep_latest_k
        self.saved_step = None

    # --------------------------------------------------------------------------------------------- save

    def maybe_save(self, step: int, *, is_last: bool, **numbers) -> None:
        """Saves at every interval and at the last step; numbers go to state.json and come back from `load`."""
        if self.enable and step != self.saved_step and (is_last or step % self.interval == 0):
            self.save(step, **numbers)

    def save(self, step: int, **numbers) -> None:
        import torch.distributed.checkpoint as dcp

        final, partial = self._path(step), os.path.join(self.folder, f"incomplete-step-{step}")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
            os.makedirs(partial)
        dist.barrier()
        dcp.save({**self._model_tensors(), **self._optimizer_tensors()}, checkpoint_id=partial)
        if dist.get_rank() == 0:
            state = dict(step=step, model_args=vars(self.model_args), **numbers)
            with open(os.path.join(partial, "state.json"), "w", encoding="utf-8") as file:
                json.dump(state, file, indent=1)
                os.fsync(file.fileno())
            if os.path.exists(final):  # an older run's, which this one was told to start before
                os.rename(final, os.path.join(self.folder, f"incomplete-replaced-{step}"))
            os.rename(partial, final)
            self._delete_old()
            print(f"saved {final}", flush=True)
        dist.barrier()
        self.saved_step = step

    def _delete_old(self) -> None:
        old = self._listed_steps()[: -self.keep_latest_k] if self.keep_latest_k > 0 else []
        for step in old:
            # Renamed first: a folder that is half deleted must not look complete.
            os.rename(self._path(step), os.path.join(self.folder, f"incomplete-deleted-{step}"))
        for name in os.listdir(self.folder):
            if name.startswith("incomplete-"):
                shutil.rmtree(os.path.join(self.folder, name))

    # --------------------------------------------------------------------------------------------- load

    def load(self, load_step: int, initial_load_path: str, initial_load_in_hf: bool) -> dict | None:
        """Resumes from load_step, or from the newest complete checkpoint if it is -1, and returns its state.json. If
        there is none, reads just the weights of initial_load_path, if given, and returns None; that is a checkpoint's
        folder, or with initial_load_in_hf a Hugging Face one.

        ValueError when load_step is not there, or a checkpoint does not hold this model.
        """
        steps = self._complete_steps() if self.enable else []
        if load_step >= 0 and load_step not in steps:
            raise ValueError(
                f"checkpoint.load_step {load_step}: there is no {self._path(load_step)}; complete ones: {steps}."
            )
        if not steps:
            if initial_load_in_hf:
                tensors = {name.removeprefix("model."): t for name, t in self._model_tensors().items()}
                load_hf(initial_load_path, tensors, self.model_args)
            elif initial_load_path:
                self._read(initial_load_path, self._model_tensors(), free=(*TRAINING_ONLY, "max_seq_len", "rope_"))
            return None
        step = load_step if load_step >= 0 else steps[-1]
        slots = self._optimizer_slots(self._path(step))
        state = self._read(self._path(step), {**self._model_tensors(), **slots}, free=TRAINING_ONLY)
        self._load_optimizer(slots)
        self._set_aside([s for s in steps if s > step])
        self.saved_step = step
        return state

    def _set_aside(self, steps: list[int]) -> None:
        """Going back to an older step begins another history: were the newer ones left in place, the next automatic
        resume would take them up."""
        if dist.get_rank() == 0:
            for step in steps:
                aside = os.path.join(self.folder, f"superseded-step-{step}-{int(time.time())}")
                os.rename(self._path(step), aside)
                print(f"checkpoint of step {step} is newer than the one resumed from: kept as {aside}", flush=True)
        dist.barrier()

    def _read(self, path: str, tensors: dict[str, Tensor], free: tuple[str, ...]) -> dict:
        """Fills tensors, in place, from a checkpoint folder, and returns its state.json. The model's shape must be the
        same but for arguments that begin with one of `free`."""
        import torch.distributed.checkpoint as dcp

        stored = self._metadata(path)
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        ours = vars(self.model_args)
        differ = [
            f"{name} is {value} there, {ours.get(name)} here"
            for name, value in state["model_args"].items()
            if ours.get(name) != value and not name.startswith(free)
        ]
        if differ:
            raise ValueError(f"{path} is a checkpoint of another model: {'; '.join(differ)}.")
        for name, tensor in tensors.items():
            if name not in stored:
                raise ValueError(f"{path} is a checkpoint of another model: it has no {name}.")
            # DCP would cast in silence.
            if stored[name].properties.dtype != tensor.dtype:
                raise ValueError(
                    f"{path}: {name} is stored as {stored[name].properties.dtype}, this run has {tensor.dtype}; "
                    "set training.dtype to what it was trained in."
                )
        dcp.load(tensors, checkpoint_id=path)
        return state

    def _metadata(self, path: str) -> dict:
        """DCP's description of every stored tensor, by name."""
        import torch.distributed.checkpoint as dcp

        if not os.path.isfile(os.path.join(path, "state.json")):
            raise ValueError(f"{path} is not a complete checkpoint: it has no state.json.")
        return dcp.FileSystemReader(path).read_metadata().state_dict_metadata

    def _optimizer_slots(self, path: str) -> dict[str, Tensor]:
        """Empty tensors for every optimizer state that the checkpoint holds, laid out as the parameters are."""
        stored, slots = self._metadata(path), {}
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

    def _load_optimizer(self, slots: dict[str, Tensor]) -> None:
        names = {parameter: name for name, parameter in self.parameters.items()}
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {}
        for index, parameter in enumerate(ordered):
            prefix = f"optimizer.{names[parameter]}."
            state[index] = {k.removeprefix(prefix): t for k, t in slots.items() if k.startswith(prefix)}
        # Through torch's own method, which moves scalars to where the fused kernel wants them.
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    # --------------------------------------------------------------------------------------------- names

    def _model_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name. Detached, but the same memory: loading writes into the model."""
        parameters = {f"model.{name}": as_plain(parameter) for name, parameter in self.parameters.items()}
        return parameters | {f"model.{name}": buffer for name, buffer in self.buffers.items()}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by the name of its parameter, whatever group or order that is in."""
        return {
            f"optimizer.{name}.{slot}": tensor
            for name, parameter in self.parameters.items()
            for slot, tensor in self.optimizer.state.get(parameter, {}).items()
        }

    def _path(self, step: int) -> str:
        return os.path.join(self.folder, f"step-{step}")

    def _complete_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending, as rank 0 sees them."""
        steps = [self._listed_steps() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(steps)
        return steps[0]

    def _listed_steps(self) -> list[int]:
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(int(m[1]) for m in (re.fullmatch(r"step-(\d+)", name) for name in names) if m)
