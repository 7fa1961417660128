"""torch.compile, block by block.

Idea: Dynamo reads a block's Python once and turns it into one graph, the backend (inductor) fuses the element-wise work
around the matrix products into few kernels. All blocks of a model are the same code on the same shapes, so compiling a
block and not the whole model costs one compilation, whatever the number of layers, and leaves to FSDP the seams between
blocks where it gathers and frees weights. The loss is compiled too: its float32 logits then exist in registers only.

Graphs are whole (`fullgraph`): a spot that cannot be compiled is an error, not a silent break that costs the speed it
was meant to bring. They hold for one shape: batch and sequence do not change between the steps of a training run, and a
graph for any shape would be a slower one.

The order is recomputation, compile, FSDP: what is recomputed must be inside of the graph, where the compiler decides
what to keep, and FSDP's hooks outside. Zero-bubble pipeline schedules do not fit: a compiled block has one backward for
input and weights together, and torch 2.11 fails to run it for the weights alone, 2.13 runs all of it twice.

Proof: tests/test_compile.py.
"""

import torch
from torch import nn

from errors import ConfigError


def apply_compile(
    model: nn.Module, *, backend: str, param_dtype: torch.dtype = torch.bfloat16, separate_experts: bool = False
) -> None:
    """Compiles every block of model and its loss, in place, at their first call; after recomputation and before FSDP.
    Of a mixture whose experts FSDP shards apart, or computed in another type (param_dtype) than the compiler's grouped
    product has, the parts. ValueError for a backend that torch does not know."""
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ConfigError(f'compile.backend ("{backend}") must be one of {known}; to debug, aot_eager or eager.')
    options = dict(fullgraph=True, dynamic=False, backend=backend)
    compiles_experts = param_dtype == torch.bfloat16
    for block in model.blocks().values():
        moe = block.moe
        if moe is None or (compiles_experts and not separate_experts):
            block.compile(**options)
            continue
        # FSDP's hooks on the experts, and the wait for the sizes of what arrives, are in the middle of the block.
        for module in (block.attention, moe.router, moe.shared_experts):
            if module is not None:
                module.compile(**options)
        moe.combine.compile(**options)
        if compiles_experts:
            # How many rows arrive is another number each time.
            moe.experts.compute.compile(**options | dict(dynamic=True))
    if model.output is not None:
        # The loss of a chunk, in two parts: between them, ranks that share the vocabulary exchange what they found.
        for part in model.output.core.children():
            part.compile(**options)
