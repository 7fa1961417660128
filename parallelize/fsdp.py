"""Fully sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054) with torch's FSDP2.

Idea: every rank keeps 1/N of each weight, gradient and optimizer state. A block's weights are gathered just before it
runs, and freed after; its gradients are summed and scattered as soon as backward has made them.

Who holds what, with N ranks on the fsdp axis and R on dp_replicate: a rank holds 1/N of every weight, and R ranks hold
the same 1/N (HSDP; N = 1 is plain replication, R = 1 plain FSDP).

Weights are communicated in groups: each block, the embedding, the head with the last norm (a tied embedding is in the
head's). For each group of P elements (rows of its weights rounded up to a multiple of N), of b bytes in param_dtype and
s in reduce_dtype, with M microbatches a step:

    fsdp            all-gathers, a rank receives P b (N-1)/N in each: 2 M for a block, M for the embedding and the head;
                    1 for each when weights are not freed after forward
                    M reduce-scatters, P s (N-1)/N each
    dp_replicate    when R > 1, one all-reduce of the gradient's shard: 2 P/N s (R-1)/R

On gloo the first two are messages: to each other rank and from each, the same bytes (see `parallelize/gloo.py`).

Proof: tests/test_parity.py; the bytes: tests/test_communication.py.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallelize.gloo import use_direct_messages


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shards model in place over mesh: (fsdp) or (dp_replicate, fsdp). Weights keep their dtype between steps; compute
    is in param_dtype, gradients are summed in reduce_dtype."""
    nothing_to_do = mesh.size() == 1 and not cpu_offload and all(p.dtype == param_dtype for p in model.parameters())
    if nothing_to_do and not any(isinstance(p, DTensor) for p in model.parameters()):
        return  # one rank that casts and moves nothing: FSDP would only copy each weight before its use
    # (Under tensor parallelism it also sums the norms' gradients over the tp axis.)
    policy = dict(
        mesh=mesh,
        # Inputs keep their dtype: the stream follows the weights' dtype by itself, and RoPE must stay float32.
        mp_policy=MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    )
    for block in model.layers.values():
        fully_shard(block, **policy, reshard_after_forward=reshard_after_forward)
    # A tied weight must be in one group: then embedding and head stay in the root's.
    if not model.args.tie_embeddings:
        if model.tok_embeddings is not None:
            fully_shard(model.tok_embeddings, **policy, reshard_after_forward=reshard_after_forward)
            model.tok_embeddings.set_unshard_in_backward(False)  # its gradient does not depend on its weight
        if model.output is not None:
            # Backward begins with the head at once: freeing it after forward would only gather it again.
            fully_shard([model.norm, model.output], **policy, reshard_after_forward=False)
    fully_shard(model, **policy, reshard_after_forward=False)
    is_gloo = mesh.device_type == "cpu" and dist.get_backend(mesh.get_group(mesh.ndim - 1)) == "gloo"
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided once, by the whole step's tokens: every reduction is a plain sum. Neither call
            # recurses, and gloo has no pre-multiplied sum to fall back on. (One rank has nothing to divide by, and told
            # to divide by 1 it copies every gradient once more.)
            if mesh.size() > 1:
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
            if mesh.size(-1) > 1 and is_gloo:
                use_direct_messages(module)


def set_last_microbatch(stages: list[nn.Module], *, is_last: bool, keeps_weights: bool) -> None:
    """Tells FSDP whether this backward, or pipeline schedule, ends the optimizer step: only then are the R copies'
    gradients summed, and gathered weights freed if keeps_weights.

    Gradients are still reduce-scattered in every microbatch: keeping them whole until the last one would save
    communication, but cost each rank the memory of a full gradient.
    """
    for stage in stages:
        if isinstance(stage, FSDPModule):
            stage.set_requires_all_reduce(is_last)
            stage.set_reshard_after_backward(is_last or not keeps_weights)
