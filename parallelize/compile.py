"""torch.compile, block by block.

Idea: Dynamo reads a block's Python once and turns it into one graph; the backend (inductor) fuses the element-wise work
around the matrix products into few kernels. All blocks of a model run the same code on the same shapes. So compiling a
block instead of the whole model costs one compilation for any number of layers, and leaves the seams between blocks to
FSDP, which gathers and frees weights there. The loss is compiled too: its float32 logits then exist in registers only.

Graphs are whole (`fullgraph`): code that cannot be compiled is an error, not a silent graph break that makes training
slow. A graph holds for one shape, because batch and sequence do not change between the steps of a training run, and a
graph for any shape would be slower.

The order is activation checkpointing, compile, FSDP: recomputation must be inside of the graph, where the compiler
decides what to keep, and FSDP's hooks outside. Schedules that split backward do not work, see limits.py.

A mixture of experts whose experts FSDP shards as a separate group is compiled in parts: FSDP's hooks on the experts,
and the wait for the sizes of the dispatch, are in the middle of the block. A module that a fork adds to the MoE beside
these parts stays eager.

Proof: tests/test_compile.py::test_compiled_gradients_equal_eager_with_one_graph,
tests/test_compile.py::test_compiled_blocks_on_two_ranks_equal_eager_on_one.
"""

import torch
from torch import nn

from errors import ConfigError


def apply_compile(
    stage: nn.Module, *, enable: bool, backend: str, param_dtype: torch.dtype, separate_experts: bool
) -> None:
    """Compiles every block of a stage and its loss, in place; each is compiled at its first call. separate_experts:
    FSDP will shard experts as a separate group. param_dtype is the compute dtype: the compiler's grouped product exists
    in bfloat16 only. ConfigError for a backend that torch does not know."""
    if not enable:
        return
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ConfigError(f'compile.backend ("{backend}") must be one of {known}; to debug, aot_eager or eager.')
    options = dict(fullgraph=True, dynamic=False, backend=backend)
    compiles_experts = param_dtype == torch.bfloat16
    for block in stage.blocks().values():
        moe = block.moe
        if moe is None or (compiles_experts and not separate_experts):
            block.compile(**options)
            continue
        for module in (block.attention, moe.router, moe.shared_experts, moe.combine):
            if module is not None:
                module.compile(**options)
        if compiles_experts:
            moe.experts.compute.compile(**options | dict(dynamic=True))  # the number of rows changes at every call
    # A chunk's loss is in two parts: between them, ranks that share the vocabulary exchange their statistics.
    for part in stage.output.core.children() if stage.output is not None else ():
        part.compile(**options)
