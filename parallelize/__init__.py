"""Applies every parallelism to a model, each a function of its own, in the one order in which they compose."""

import torch
from torch import nn

from parallelize.fsdp import apply_fsdp, set_last_microbatch
from parallelize.init import init_weights
from parallelize.mesh import Degrees, Mesh, build_mesh

__all__ = ["Degrees", "Mesh", "build_mesh", "init_weights", "parallelize", "set_last_microbatch"]


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Turns a single-device model (on meta) into this rank's part of it, in place.

    FSDP comes last: it shards whatever the others have left of a weight, and its hooks must stay outside of anything
    that is compiled or recomputed.
    """
    apply_fsdp(
        model,
        mesh.data_parallel,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
    )
