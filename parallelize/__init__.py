"""Applies every parallelism to a model, each a function of its own, in the one order in which they compose."""

import torch
from torch import nn

from parallelize.activation import apply_activation_checkpoint
from parallelize.compile import apply_compile
from parallelize.context import apply_context_parallel, shard_sequences
from parallelize.expert import apply_expert_parallel
from parallelize.float8 import apply_float8, update_float8_scales
from parallelize.fsdp import apply_fsdp, set_last_microbatch
from parallelize.init import init_weights
from parallelize.mesh import Degrees, Mesh, build_mesh
from parallelize.pipeline import SharedEmbedding, build_pipeline, split_into_stages
from parallelize.tensor import apply_tensor_parallel

__all__ = [
    "Degrees",
    "Mesh",
    "SharedEmbedding",
    "apply_float8",
    "build_mesh",
    "build_pipeline",
    "init_weights",
    "parallelize",
    "set_last_microbatch",
    "shard_sequences",
    "split_into_stages",
    "update_float8_scales",
]


def parallelize(
    stage: nn.Module,
    mesh: Mesh,
    *,
    seq_len: int,
    context_parallel_method: str,
    async_tensor_parallel: bool,
    recompute_mode: str,
    recompute_option: str,
    memory_budget: float,
    compile_backend: str | None,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Turns a single-device model, or a pipeline stage of one (on meta), into this rank's part of it, in place. seq_len
    is that of the whole sequences; without a compile_backend nothing is compiled.

    Recomputation goes before compile, so that the compiler sees what is recomputed. FSDP comes last: it shards whatever
    the others have left of a weight, and its hooks must stay outside of anything that is compiled or recomputed.
    """
    degrees = mesh.degrees
    experts_apart = degrees.ep > 1 or degrees.tp > 1
    apply_context_parallel(stage, mesh.cp, method=context_parallel_method, seq_len=seq_len, tp=degrees.tp)
    apply_tensor_parallel(stage, mesh.tp, seq_len=seq_len // degrees.cp, use_async=async_tensor_parallel)
    apply_expert_parallel(stage, mesh.ep, mesh.sequence)
    recomputes_collectives = recompute_mode in ("full", "memory_budget") or (
        recompute_mode == "selective" and recompute_option != "op"
    )
    if compile_backend and degrees.tp > 1 and recomputes_collectives and torch.__version__ >= "2.12":
        # Its compiler takes the DeviceMesh of a recomputed collective for a tensor (seen in 2.13, not in 2.11).
        raise ValueError(
            f"torch {torch.__version__} cannot compile blocks that recompute the collectives of tensor parallelism; "
            'set activation_checkpoint.mode to "selective" with selective_option "op", which keeps them, or to "none".'
        )
    apply_activation_checkpoint(stage, mode=recompute_mode, selective=recompute_option, memory_budget=memory_budget)
    if compile_backend is not None:
        apply_compile(stage, backend=compile_backend, param_dtype=param_dtype, experts_apart=experts_apart)
    apply_fsdp(
        stage,
        mesh.data_parallel,
        expert_mesh=mesh.expert_data_parallel if experts_apart else None,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        # A stage runs many forwards and backwards in a row: gathering its weights for each would be dear.
        reshard_after_forward=reshard_after_forward and degrees.pp == 1,
        cpu_offload=cpu_offload,
    )
