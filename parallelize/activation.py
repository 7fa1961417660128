"""Activation checkpointing: backward computes again what forward did not keep.

Idea: backward needs the intermediate values of forward, and at long sequences these, not the weights, fill the memory.
A checkpointed block keeps its input and little else, and runs its forward once more when backward reaches it (Chen et
al. 2016, arXiv:1604.06174). What is cheap to compute is often large to keep, and the other way round, so it pays to
choose operation by operation (selective recomputation: Korthikanti et al. 2022, arXiv:2205.05198).

What a dense block keeps, in bytes per token in bfloat16, and what it computes again, in FLOPs per token; d = dim,
k = n_kv_heads x head_dim, f = hidden_dim, h = n_heads, s = sequence length; 8B: what that is for Llama 3.1 8B (causal
attention at s = 8,192):

    mode             kept                      8B      recomputed                              8B, of its forward
    none             12 d + 4 k + 8 f + 4 h    164 KiB
    selective op      6 d + 2 k + 2 f + 4 h    54 KiB  2 d (d + k + f), element-wise           32 %
    full              2 d                      8 KiB   2 d (2 d + 2 k + 2 f) + 2 s d, element-wise    77 %
    selective n      one block in n as full, the others as none
    memory_budget    about that part of what the compiler would keep by itself, chosen by it

Full recomputation stops before w2, whose result backward does not need; w2 being the last of a block's seven matrices
is also why "op" keeps the second, fourth and sixth product (wk, wo, w3) and not the odd ones. One block more than this
is alive at a time: the one being recomputed. Under tensor parallelism all of it is divided by its degree, but what "op"
keeps of collectives is not (an all-gather's result is a whole 2 d), nor is wo's product before it is summed over ranks.

In a mixture of experts, "op" treats attention, experts and shared experts each on its own; their inputs are kept.

Names of parameters do not change: there is no wrapper module, a block gets a forward of its own.

What does not fit: zero-bubble pipeline schedules, which run each block's graph once for its input and then once per
weight, so that a checkpointed block is recomputed each time ("full": ten times) or has its saved values no more ("op");
and, on torch 2.13, tensor parallelism with compile in any mode but none and "op" (its partitioner fails on the
device mesh that DTensors put into the graph; 2.11 does it).

Proof: tests/test_activation.py.
"""

from collections import Counter
from types import MethodType

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from errors import ConfigError
from torch_private import set_activation_memory_budget

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

MODES = ("none", "full", "selective", "memory_budget")

# What "op" never computes again. Attention, as its FLOPs grow with the sequence and its result does not;
OPS_TO_SAVE = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    # communication (a collective returns before its result is there: waiting for it is an operation of its own);
    c10d.all_gather_into_tensor.default,
    c10d.reduce_scatter_tensor.default,
    c10d.all_reduce.default,
    c10d.all_to_all_single.default,
    c10d.wait_tensor.default,
    # and the choice of experts, which must not fall out differently the second time.
    aten.topk.default,
}
# Of these, every second one.
MATMULS = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_mm.default,
    aten._grouped_mm.default,
    aten._scaled_grouped_mm.default,
}


def apply_activation_checkpointing(model: nn.Module, *, mode: str, selective: str, memory_budget: float) -> None:
    """Makes the blocks of model recompute in backward, in place; before they are compiled and sharded by FSDP.

    selective is "op" or, as text, n: every n-th block of the whole model (not of this pipeline stage) is recomputed.
    memory_budget is from 0 (as "full") to 1 (as the compiler does by itself), and needs compiled blocks. ValueError for
    a value that is none of these.
    """
    if mode not in MODES:
        raise ConfigError(f'activation_checkpoint.mode ("{mode}") must be {_either(MODES)}.')
    if mode == "memory_budget" and not 0 <= memory_budget <= 1:
        raise ConfigError(f"activation_checkpoint.memory_budget ({memory_budget}) must be from 0 to 1.")
    # An option of the whole process, so it is set back for a model that does not ask for it.
    set_activation_memory_budget(memory_budget if mode == "memory_budget" else 1.0)
    if mode == "full":
        _recompute_blocks(model, every=1)
    elif mode == "selective" and selective == "op":
        _recompute_cheap(model)
    elif mode == "selective":
        n_layers = model.args.n_layers
        if not (selective.isdecimal() and 1 <= int(selective) <= n_layers):
            raise ConfigError(
                f'activation_checkpoint.selective_option ("{selective}") must be "op" or a number n from 1 to '
                f"{n_layers} (model.n_layers): every n-th block is recomputed."
            )
        _recompute_blocks(model, every=int(selective))


def _either(choices: tuple[str, ...]) -> str:
    return ", ".join(f'"{c}"' for c in choices[:-1]) + f' or "{choices[-1]}"'


def _recompute_blocks(model: nn.Module, every: int) -> None:
    for number, block in model.blocks().items():
        if (number + 1) % every == 0:
            block.forward = MethodType(_forward_recomputing_all, block)


def _recompute_cheap(model: nn.Module) -> None:
    for block in model.blocks().values():
        if block.moe is None:
            block.forward = MethodType(_forward_recomputing_cheap, block)
            continue
        # Of a mixture, each on its own: experts may be sharded by FSDP apart from the block, and what its hooks do on
        # the way would be operations of the block, other ones when it is recomputed.
        for module in (block.attention, block.moe.shared_experts, block.moe.experts.compute):
            if module is not None:
                module.forward = MethodType(_forward_recomputing_cheap, module)


# A method and not a closure over the block: a copied block calls itself, and the compiler sees the same function in
# every block, so that they share one graph. And functions of ours: dynamo does not trace a forward that is torch's own
# checkpoint function, and then compiles nothing (torch 2.11) or fails (2.13). Nothing in the model draws random
# numbers, so there is no state of a generator to keep and to restore, which would cost a copy from the GPU per block.


def _forward_recomputing_all(module, *args):
    return checkpoint(type(module).forward, module, *args, use_reentrant=False, preserve_rng_state=False)


def _forward_recomputing_cheap(module, *args):
    return _recomputing_cheap(type(module).forward, module, *args)


def _recomputing_cheap(function, *args):
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_save_what_is_dear)


def _save_what_is_dear():
    """The contexts of one forward of one block, and of its recomputation."""
    # Counted apart, as torch 2.11 asks again for each operation while it recomputes (2.13 remembers the answers).
    num_matmuls = Counter()

    def policy(context, op, *args, **kwargs):
        save = op in OPS_TO_SAVE
        if op in MATMULS:
            num_matmuls[context.is_recompute] += 1
            save = num_matmuls[context.is_recompute] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
