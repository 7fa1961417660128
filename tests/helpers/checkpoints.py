"""A small sharded model with a checkpoint manager, without a training run, and checkpoints made by hand."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from checkpoint import CheckpointManager, ModelState, TrainState
from checkpoint.integrity import MANIFEST, STATE, digest
from checkpoint.state import RENAMED_ARGS
from checkpoint.writer import write_checkpoint
from collectives import local_tensor
from files import write_json
from model import ModelArgs, Transformer

OPTIONS = dict(
    enable=True, interval=1, async_mode="disabled", keep_latest_k=0, keep_every=0, load_step=-1, initial_load_path="",
    initial_load_in_hf=False, exclude_from_loading=[],
)  # fmt: skip
ARGS = ModelArgs(n_experts=4, top_k=2, moe_hidden_dim=64)  # Compared when loading. The tensors have other sizes.


class Checkpoints:
    """On each rank: a sharded and a replicated parameter, AdamW, and a manager. Every element that is saved is equal to
    the step of the save."""

    def __init__(self, folder: Path, **options):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            name: nn.Parameter(distribute_tensor(torch.randn(shape, generator=generator), mesh, [placement]))
            for name, shape, placement in (("wide.weight", (16, 64), Shard(0)), ("norm.weight", (64,), Replicate()))
        }
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1, fused=True)
        for p in self.parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        self.folder, self.output = Path(folder), io.StringIO()
        self.state = ModelState(self.parameters, {"expert_bias": torch.zeros(4)}, optimizer, ARGS)
        self.manager = CheckpointManager(str(folder), self.state, **dict(OPTIONS, folder="", **options))

    def set(self, value: float) -> None:
        with torch.no_grad():
            for tensor in self.state.tensors().values():
                tensor.fill_(value)

    def save(self, *steps: int) -> bool:
        """Saves the steps one after the other. Returns whether the last save succeeded."""
        for step in steps:
            self.set(step)
            with redirect_stdout(self.output):
                self.manager.save(progress(step))
                self.manager.wait()
        return self.manager.saved_step == steps[-1]

    def save_in_first_format(self, step: int, dtype: torch.dtype | None = None) -> None:
        """Writes what the first version wrote: other names of arguments; with dtype the weights alone."""
        self.set(step)
        tensors = self.state.tensors()
        if dtype:
            tensors = {name: tensor.to(dtype) for name, tensor in self.state.model_tensors().items()}
        first_names = {new: old for old, new in RENAMED_ARGS.items()}
        args = {first_names.get(name, name): value for name, value in vars(ARGS).items()}
        numbers = dict(step=step, weights_only=dtype is not None, model_args=args, tokens_seen=10 * step)
        numbers |= dict(samples_consumed=2 * step, order_of_data="data")
        write_checkpoint(str(self.folder), f"step-{step}", tensors, numbers, self.manager.group)

    def load(self, load_step: int = -1, path: str = "", exclude: list[str] | None = None) -> str:
        """Loads. Returns "step N", where N is also the loaded value; "no step" and the loaded values; or the error."""
        self.set(-1)
        manager, state = self.manager, TrainState(data_fingerprint="data")
        manager.load_step, manager.initial_load_path, manager.exclude_from_loading = load_step, path, exclude or []
        try:
            with redirect_stdout(self.output):
                manager.load(state)
        except ValueError as error:
            return str(error)
        values = {name: set(local_tensor(t).unique().tolist()) for name, t in self.state.tensors().items()}
        if state.step == 0:
            return f"no step, {values}"
        assert all(found == {float(state.step)} for found in values.values()), values
        assert state == progress(state.step), state
        return f"step {state.step}"

    @property
    def lines(self) -> str:
        return self.output.getvalue()

    @property
    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


def progress(step: int) -> TrainState:
    """The state after some steps of 2 sequences of 5 tokens."""
    return TrainState(step, tokens_seen=10 * step, samples_consumed=2 * step, data_fingerprint="data")


def only_rank0(do) -> None:
    """Calls `do` on rank 0 while the other ranks wait."""
    if dist.get_rank() == 0:
        do()
    dist.barrier()


def write_manifest_of(folder: str | Path) -> None:
    """Writes a manifest of the files as they are: the folder passes for an intact checkpoint."""
    names = [name for name in os.listdir(folder) if name != MANIFEST]
    write_json(Path(folder) / MANIFEST, dict(files={name: digest(os.path.join(folder, name)) for name in names}))


def whole_model(folder: Path) -> str:
    """Makes a checkpoint of a small model in one process. Returns its path."""
    args, path = ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=16, vocab_size=32), folder / "step-1"
    tensors = {f"model.{name}": t.detach() for name, t in Transformer(args).named_parameters()}
    dcp.save(tensors, checkpoint_id=path, no_dist=True)
    (path / STATE).write_text(json.dumps(dict(step=1, model_args=vars(args))))
    write_manifest_of(path)
    return str(path)
