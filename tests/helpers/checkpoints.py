"""A manager of a small sharded model, without a run around it, for tests of what becomes of its checkpoints."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from checkpoint import CheckpointManager, ModelState
from checkpoint.manifest import STATE, write_manifest
from model import ModelArgs, Transformer
from parallelize import build_mesh


class Checkpoints:
    """On each rank: a sharded and a replicated parameter and AdamW, and a manager. A value says which step it is of."""

    def __init__(self, folder: Path, **settings):
        mesh = build_mesh("cpu", dist.get_world_size()).fsdp
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            name: nn.Parameter(distribute_tensor(torch.randn(shape, generator=generator), mesh, [placement]))
            for name, shape, placement in (("wide.weight", (16, 64), Shard(0)), ("norm.weight", (64,), Replicate()))
        }
        self.bias = torch.zeros(4)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1, fused=True)
        for p in self.parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        self.folder, self.output = Path(folder), io.StringIO()
        default = dict(
            enable=True, interval=1, async_mode="disabled", keep_latest_k=0, keep_every=0, last_save_dtype=None
        )
        self.manager = CheckpointManager(
            str(folder),
            trained=ModelState(self.parameters, {"expert_bias": self.bias}, optimizer, ModelArgs()),
            **(default | settings),
        )

    def set(self, value: float) -> None:
        with torch.no_grad():
            for tensor in self.manager.trained.tensors().values():
                tensor.fill_(value)

    def save(self, *steps: int, **more) -> bool:
        for step in steps:
            self.set(step)
            with redirect_stdout(self.output):
                ok = self.manager.save(step, **more) and self.manager.wait()
        return ok

    def load(self, load_step: int = -1, path: str = "", exclude=()) -> str:
        """ "step N" with the values that were loaded, or the error."""
        self.set(-1)
        try:
            with redirect_stdout(self.output):
                state = self.manager.load(load_step, path, False, exclude)
        except ValueError as error:
            return str(error)
        values = {name: set(_local(t).unique().tolist()) for name, t in self.manager.trained.tensors().items()}
        if state is None:
            return f"no step, {values}"
        assert all(found == {float(state["step"])} for found in values.values()), values
        return f"step {state['step']}"

    @property
    def lines(self) -> str:
        return self.output.getvalue()

    @property
    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def on_rank_0(do) -> None:
    if dist.get_rank() == 0:
        do()
    dist.barrier()


def whole_model(folder: Path) -> str:
    """A checkpoint of a small model, written by one process."""
    args, path = ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=16, vocab_size=32), folder / "step-1"
    tensors = {f"model.{name}": t.detach() for name, t in Transformer(args).named_parameters()}
    dcp.save(tensors, checkpoint_id=path, no_dist=True)
    (path / STATE).write_text(json.dumps(dict(step=1, model_args=vars(args))))
    write_manifest(str(path))
    return str(path)
