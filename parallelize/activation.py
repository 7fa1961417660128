"""Activation checkpointing: backward recomputes what forward did not keep.

Idea: backward needs the intermediate values of forward. At long sequences these values fill the memory, not the
weights. A checkpointed block keeps its input and little else, and runs its forward once more when backward reaches it
(Chen et al. 2016, arXiv:1604.06174). A value that is cheap to compute is often large to keep, and the other way round,
so it pays to choose by operation (selective activation checkpointing: Korthikanti et al. 2022, arXiv:2205.05198).

A dense block keeps these bytes per token in bfloat16 and recomputes these FLOPs per token; d = dim, k = n_kv_heads x
head_dim, f = hidden_dim, h = n_heads, s = sequence length; 8B is Llama 3.1 8B (causal attention, s = 8,192):

    mode             kept                      8B      recomputed                              8B, of its forward
    none             12 d + 4 k + 8 f + 4 h    164 KiB
    selective op      6 d + 2 k + 2 f + 4 h    54 KiB  2 d (d + k + f), element-wise           32 %
    full              2 d                      8 KiB   2 d (2 d + 2 k + 2 f) + 2 s d, element-wise    77 %
    selective n      every n-th block as full, the others as none
    memory_budget b  about the part b of what the compiler would keep by default; the compiler chooses

Full checkpointing stops before w2, whose output backward does not need. Because w2 is the last of a block's seven
matrices, "op" keeps the second, fourth and sixth product (wk, wo, w3). In addition, the one block that is being
recomputed has all of its values. Tensor parallelism divides these numbers by its degree, except what "op" keeps of
collectives (an all-gather's output is a whole 2 d) and wo's product before it is summed over ranks.

In a mixture of experts, "op" treats attention, routed experts and shared experts separately, and keeps their inputs.

Two combinations do not work, see limits.py: schedules that split backward, and on torch 2.13 tensor parallelism with
compile in any mode except "none" and "op".

Proof: tests/test_activation.py::test_recomputed_gradients_equal_kept_ones,
tests/test_activation.py::test_bytes_kept_equal_docstring,
tests/test_activation.py::test_recomputation_on_two_ranks_equals_one_process.
"""

from collections import Counter
from types import MethodType

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torch_private import ATTENTION_OPS, COLLECTIVE_OPS, MATMUL_OPS, set_activation_memory_budget

# Mode "op" keeps the outputs of these operators, and recomputes all others except every second matrix product.
OPS_TO_SAVE = {
    # Attention: its FLOPs grow with the sequence, its output does not.
    *ATTENTION_OPS,
    # Collectives would communicate twice. (A collective returns before its output is there: waiting is an operator
    # too.)
    *COLLECTIVE_OPS,
    # The choice of experts must not come out differently the second time.
    torch.ops.aten.topk.default,
}


def apply_activation_checkpointing(stage: nn.Module, *, mode: str, selective_option: str) -> None:
    """Makes a stage's blocks recompute activations in backward, in place, before they are compiled and sharded by FSDP.
    There is no wrapper module, so parameters keep their names.

    selective_option, with mode "selective", is "op" or a number n: every n-th block of the whole model (not of this
    pipeline stage) is checkpointed. With mode "memory_budget" it is a number from 0 (as "full") to 1 (the compiler's
    default), and blocks must be compiled."""
    # The budget is an option of the whole process, so a model that does not ask for it sets it back.
    set_activation_memory_budget(float(selective_option) if mode == "memory_budget" else 1.0)
    if mode == "selective" and selective_option == "op":
        for block in stage.blocks().values():
            checkpoint_by_operator(block)
    elif mode in ("full", "selective"):
        every = 1 if mode == "full" else int(selective_option)
        for number, block in stage.blocks().items():
            if (number + 1) % every == 0:
                block.forward = MethodType(forward_recomputing_all, block)


def checkpoint_by_operator(block: nn.Module) -> None:
    """Checkpoints a block, but keeps the outputs of expensive operators."""
    modules = [block]
    if block.moe is not None:
        # Each part separately: FSDP may shard the experts as a group, and its hooks in the middle of the block run
        # other operators in the recomputation than in forward.
        modules = [block.attention, block.moe.shared_experts, block.moe.experts.compute]
    for module in modules:
        if module is not None:
            module.forward = MethodType(forward_saving_some_ops, module)


# A block's forward is replaced by one of these methods, and not by a closure over the block: a deep copy of a block
# must call itself, and the compiler must see the same function in every block, so that all blocks share one graph.
# They are functions of this file, because Dynamo does not trace a forward that is torch's own checkpoint function: it
# compiles nothing (torch 2.11) or fails (2.13). preserve_rng_state: the model draws no random numbers, and to keep and
# restore a generator's state would cost a copy from the GPU per block.
OPTIONS = dict(use_reentrant=False, preserve_rng_state=False)


def forward_recomputing_all(module, *args):
    return checkpoint(type(module).forward, module, *args, **OPTIONS)


def forward_saving_some_ops(module, *args):
    return checkpoint(type(module).forward, module, *args, **OPTIONS, context_fn=selective_contexts)


def selective_contexts():
    """The contexts of one forward of one block, and of its recomputation."""
    # Counted separately: torch 2.11 asks again for each operator in the recomputation, 2.13 remembers the answers.
    num_matmuls = Counter()

    def policy(context, op, *args, **kwargs):
        save = op in OPS_TO_SAVE
        if op in MATMUL_OPS:
            num_matmuls[context.is_recompute] += 1
            save = num_matmuls[context.is_recompute] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
