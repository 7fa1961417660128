"""Fully sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054) with torch's FSDP2.

Idea: every rank keeps 1/N of each weight, gradient and optimizer state. A block's weights are gathered just before it
runs, and freed after; its gradients are summed and scattered as soon as backward has made them.

Who holds what, with N ranks on the fsdp axis and R on dp_replicate: a rank holds 1/N of every weight, and R ranks hold
the same 1/N (HSDP; N = 1 is plain replication, R = 1 plain FSDP).

Experts are sharded over efsdp instead of fsdp, see parallelize/expert.py; a group of their own where that differs.

Weights are communicated in groups: each block, the embedding, the head with the last norm (a tied embedding is in the
head's), what a block of multi-token prediction has besides. For each group of P elements (rows of its weights rounded
up to a multiple of N), of b bytes in param_dtype and s in reduce_dtype, with M microbatches a step:

    fsdp            all-gathers, a rank receives P b (N-1)/N in each: 2 M for a block, M for the embedding and the head,
                    whatever the number of further tokens; 1 for each when weights are not freed after forward
                    M reduce-scatters, P s (N-1)/N each
    dp_replicate    when R > 1, one all-reduce of the gradient's shard: 2 P/N s (R-1)/R

On gloo the first two are messages: to each other rank and from each, the same bytes (see `training/gloo.py`).

Experts that are a group of their own count as a block, with efsdp's ranks for N. Recomputation gathers nothing more.

Proof: tests/test_parity.py; the bytes: tests/test_communication.py and test_communication_of_mixtures.py.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from model.moe import Experts
from training.gloo import use_direct_messages


def parallelize_data(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    expert_mesh: DeviceMesh | None = None,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shards model in place over mesh: (fsdp) or (dp_replicate, fsdp), and its experts over expert_mesh: (efsdp) or
    (dp_replicate, efsdp), if these are other ranks. Weights keep their dtype between steps; compute is in param_dtype,
    gradients are summed in reduce_dtype."""
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
    blocks = list(model.blocks().values())
    for block in blocks:
        place = _placement_of_experts(block, (expert_mesh or mesh).size(-1))
        if expert_mesh is not None and block.moe is not None:
            fully_shard(
                block.moe.experts,
                **policy | dict(mesh=expert_mesh),
                reshard_after_forward=reshard_after_forward,
                shard_placement_fn=place,
            )
        fully_shard(block, **policy, reshard_after_forward=reshard_after_forward, shard_placement_fn=place)
    for layer in model.mtp.values():
        fully_shard(layer, **policy, reshard_after_forward=reshard_after_forward)
    # A tied weight must be in one group: then embedding and head stay in the root's.
    if not (model.args.tie_embeddings and model.output is not None and model.tok_embeddings is not None):
        if model.tok_embeddings is not None:
            fully_shard(model.tok_embeddings, **policy, reshard_after_forward=reshard_after_forward)
            model.tok_embeddings.set_unshard_in_backward(False)  # its gradient does not depend on its weight
        if model.output is not None:
            # Backward begins with the head at once: freeing it after forward would only gather it again.
            fully_shard([model.norm, model.output], **policy, reshard_after_forward=False)
    fully_shard(model, **policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided once, by the whole step's tokens: every reduction is a plain sum. Neither call
            # recurses, and gloo has no pre-multiplied sum to fall back on. (One rank has nothing to divide by, and told
            # to divide by 1 it copies every gradient once more.)
            own_mesh = expert_mesh if expert_mesh is not None and isinstance(module, Experts) else mesh
            if own_mesh.size() > 1:
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
            is_gloo = mesh.device_type == "cpu" and dist.get_backend(own_mesh.get_group(own_mesh.ndim - 1)) == "gloo"
            if own_mesh.size(-1) > 1 and is_gloo:
                use_direct_messages(module)
    _prefetch_around_dispatch(blocks)


def _placement_of_experts(block: nn.Module, ranks: int):
    """Experts are cut by number, or where there are more ranks than experts, along each matrix's rows or columns."""
    experts = set() if block.moe is None else set(block.moe.experts.parameters())
    local_experts = min((_local(p).size(0) for p in experts), default=0)

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter not in experts or local_experts >= ranks:
            return None
        # FSDP cuts only the first dimension in unequal parts: what neither divides is cut by number after all, and the
        # ranks past the last expert hold nothing.
        even = [dim for dim in (1, 2) if parameter.size(dim) % ranks == 0]
        return Shard(even[0]) if even else None

    return place


def _prefetch_around_dispatch(blocks: list[nn.Module]) -> None:
    """Where experts are a group of their own the CPU waits in the middle of each block (see parallelize/expert.py), and
    what is to be gathered meanwhile must have been issued before. (In backward nothing waits.)"""
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.moe is not None and isinstance(block.moe.experts, FSDPModule):
            # Both by the block: its hook does nothing when it is recomputed, but the experts' would, and gather again
            # the block whose backward is done.
            following = [following] if following is not None else []
            block.set_modules_to_forward_prefetch([block.moe.experts, *following])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def set_is_last_backward(stages: list[nn.Module], *, is_last: bool, keeps_weights: bool) -> None:
    """Tells FSDP whether this backward, or pipeline schedule, ends the optimizer step: only then are the R copies'
    gradients summed, and gathered weights freed if keeps_weights.

    Gradients are still reduce-scattered in every microbatch: keeping them whole until the last one would save
    communication, but cost each rank the memory of a full gradient.
    """
    for stage in stages:
        if isinstance(stage, FSDPModule):
            stage.set_requires_all_reduce(is_last)
            stage.set_reshard_after_backward(is_last or not keeps_weights)
