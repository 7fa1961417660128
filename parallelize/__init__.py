"""Applies every parallelism to a model, each a function of its own, in the one order in which they compose."""

import torch
from torch import nn

from errors import ConfigError
from parallelize.activation import apply_activation_checkpointing
from parallelize.compile import apply_compile
from parallelize.context import parallelize_context, shard_sequence
from parallelize.expert import parallelize_experts
from parallelize.float8 import apply_float8, sync_float8_scales
from parallelize.fsdp import parallelize_data, set_is_last_backward
from parallelize.init import init_weights, materialize
from parallelize.mesh import ParallelDims, ParallelMesh, build_mesh
from parallelize.pipeline import TiedEmbedding, build_pipeline, parallelize_pipeline
from parallelize.tensor import parallelize_tensor

__all__ = [
    "ParallelDims",
    "ParallelMesh",
    "TiedEmbedding",
    "apply_float8",
    "build_mesh",
    "build_pipeline",
    "init_weights",
    "materialize",
    "parallelize",
    "parallelize_pipeline",
    "set_is_last_backward",
    "shard_sequence",
    "sync_float8_scales",
]


def parallelize(
    stage: nn.Module,
    mesh: ParallelMesh,
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
    parallelize_context(stage, mesh.cp, method=context_parallel_method, seq_len=seq_len, tp=degrees.tp)
    parallelize_tensor(stage, mesh.tp, seq_len=seq_len // degrees.cp, use_async=async_tensor_parallel)
    parallelize_experts(stage, mesh.ep, mesh.sequence)
    recomputes_collectives = recompute_mode in ("full", "memory_budget") or (
        recompute_mode == "selective" and recompute_option != "op"
    )
    if compile_backend and degrees.tp > 1 and recomputes_collectives and torch.__version__ >= "2.12":
        # Its compiler takes the DeviceMesh of a recomputed collective for a tensor (seen in 2.13, not in 2.11).
        raise ConfigError(
            f"torch {torch.__version__} cannot compile blocks that recompute the collectives of tensor parallelism; "
            'set activation_checkpoint.mode to "selective" with selective_option "op", which keeps them, or to "none".'
        )
    apply_activation_checkpointing(stage, mode=recompute_mode, selective=recompute_option, memory_budget=memory_budget)
    if compile_backend is not None:
        apply_compile(stage, backend=compile_backend, param_dtype=param_dtype, separate_experts=mesh.efsdp is not None)
    parallelize_data(
        stage,
        mesh.fsdp,
        expert_mesh=mesh.efsdp,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        # A stage runs many forwards and backwards in a row: gathering its weights for each would be dear.
        reshard_after_forward=reshard_after_forward and degrees.pp == 1,
        cpu_offload=cpu_offload,
    )
