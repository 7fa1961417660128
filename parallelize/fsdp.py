"""Fully sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054) with torch's FSDP2.

Idea: every rank keeps 1/N of each weight, gradient and optimizer state. A block's weights are all-gathered just before
the block runs, and freed after it. Its gradients are reduce-scattered as soon as backward has computed them.

Who holds what, with N ranks on the fsdp axis and R on dp_replicate: a rank holds 1/N of every weight, and R ranks hold
the same 1/N (HSDP; N = 1 is plain replication, R = 1 plain FSDP). Where efsdp differs from fsdp (see
parallelize/expert.py), routed experts are sharded over efsdp, as a separate group.

FSDP communicates weights in groups: each block; the embedding; the head with the last norm (a tied embedding belongs to
this group); the norms and the projection of an MTP layer. For each group of P elements (rows of its weights are rounded
up to a multiple of N), of b bytes in param_dtype and s in reduce_dtype, with M microbatches a step:

    fsdp            all-gathers, a rank receives P b (N-1)/N in each: 2 M for a block, M for the embedding and for the
                    head, at any depth of MTP; 1 for each group when weights are not freed after forward
                    M reduce-scatters, P s (N-1)/N each
    dp_replicate    when R > 1, one all-reduce of the gradient's shard: 2 P/N s (R-1)/R

A separate group of experts counts as a block, with efsdp's ranks for N. Activation checkpointing adds no all-gather.

Proof: tests/test_one_step.py::test_fsdp_equals_one_process, tests/test_one_step.py::test_hsdp_equals_one_process; the
bytes: tests/test_communication.py::test_fsdp_bytes_equal_formula,
tests/test_communication.py::test_hsdp_bytes_equal_formula,
tests/test_communication_of_mixtures.py::test_fsdp_bytes_equal_formula.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from collectives import local_tensor
from model.moe import Experts


def parallelize_data(
    stage: nn.Module,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None = None,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shards a stage in place over mesh, (fsdp) or (dp_replicate, fsdp), and its routed experts over expert_mesh,
    (efsdp) or (dp_replicate, efsdp); None: experts are sharded like the rest. Weights keep their dtype between steps;
    a block computes in param_dtype, and gradients are summed in reduce_dtype."""
    has_dtensors = any(isinstance(p, DTensor) for p in stage.parameters())  # tensor parallelism needs FSDP's sums
    casts = any(p.dtype != param_dtype for p in stage.parameters())
    if mesh.size() == 1 and not (has_dtensors or casts or cpu_offload):
        return  # On one rank FSDP would only copy each weight before its use.
    policy = dict(
        # Inputs keep their dtype: activations take the weights' dtype by themselves, and RoPE must stay float32.
        mp_policy=MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    )
    freed = dict(mesh=mesh, reshard_after_forward=reshard_after_forward, **policy)
    kept = dict(mesh=mesh, reshard_after_forward=False, **policy)
    blocks = list(stage.blocks().values())
    for block in blocks:
        place = shard_placement_of_experts(block, (expert_mesh or mesh).size(-1))
        if expert_mesh is not None and block.moe is not None:
            experts = dict(mesh=expert_mesh, reshard_after_forward=reshard_after_forward, **policy)
            fully_shard(block.moe.experts, shard_placement_fn=place, **experts)
        fully_shard(block, shard_placement_fn=place, **freed)
    for layer in stage.mtp.values():
        fully_shard(layer, **freed)
    has_embedding, has_head = stage.tok_embeddings is not None, stage.output is not None
    # A tied weight must be in one group: then embedding and head stay in the stage's.
    if not (stage.args.tie_embeddings and has_embedding and has_head):
        if has_embedding:
            fully_shard(stage.tok_embeddings, **freed)
            stage.tok_embeddings.set_unshard_in_backward(False)  # its gradient does not depend on its weight
        if has_head:
            # Backward begins with the head: freeing it after forward would only gather it again.
            fully_shard([stage.norm, stage.output], **kept)
    fully_shard(stage, **kept)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            is_expert = expert_mesh is not None and isinstance(module, Experts)
            # On one rank there is nothing to sum, and a factor of 1 would copy every gradient once more.
            if (expert_mesh if is_expert else mesh).size() > 1:
                # The loss is divided once, by the whole step's number of tokens. Neither call recurses.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # a plain sum: not every backend has others
    prefetch_around_dispatch(blocks)


def shard_placement_of_experts(block: nn.Module, ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """The function that tells fully_shard which dimension of a block's weights to cut. Experts are cut by number or,
    with more ranks than experts, along the rows or the columns of each matrix."""
    experts = set() if block.moe is None else set(block.moe.experts.parameters())
    local_experts = min((local_tensor(p).size(0) for p in experts), default=0)

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter not in experts or local_experts >= ranks:
            return None
        # FSDP cuts only the first dimension into unequal parts. Where the ranks divide neither rows nor columns,
        # experts are cut by number after all, and the ranks past the last expert hold nothing.
        even = [dim for dim in (1, 2) if parameter.size(dim) % ranks == 0]
        return Shard(even[0]) if even else None

    return place


def prefetch_around_dispatch(blocks: list[nn.Module]) -> None:
    """Issues a block's all-gathers early where its experts are a group of their own: the CPU waits in the middle of the
    block for the sizes of the dispatch (see parallelize/expert.py) and could not issue them there. In backward nothing
    waits."""
    for i, block in enumerate(blocks):
        if block.moe is not None and isinstance(block.moe.experts, FSDPModule):
            # The block prefetches both. Its hook does nothing when it is recomputed in backward. The experts' hook
            # would run again, and gather the next block, whose backward is over.
            block.set_modules_to_forward_prefetch([block.moe.experts, *blocks[i + 1 : i + 2]])


def set_is_last_backward(stages: list[nn.Module], is_last: bool, *, reshard_after_backward: bool) -> None:
    """Tells FSDP whether the next backward, or pipeline schedule, is the last of the optimizer step: only the last one
    all-reduces gradients over the R replicas, and frees weights that stay gathered (reshard_after_backward False).
    Gradients are reduce-scattered in every microbatch all the same. To keep them whole until the last microbatch would
    save communication, but each rank would need the memory of a full gradient."""
    for stage in stages:
        if isinstance(stage, FSDPModule):
            stage.set_requires_all_reduce(is_last)
            stage.set_reshard_after_backward(is_last or reshard_after_backward)
