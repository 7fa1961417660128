"""torch.compile, block by block.

Idea: Dynamo reads a block's Python once and turns it into one graph, the backend (inductor) fuses the element-wise work
around the matrix products into few kernels. All blocks of a model are the same code on the same shapes, so compiling a
block and not the whole model costs one compilation, whatever the number of layers, and leaves to FSDP the seams between
blocks where it gathers and frees weights.

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


def apply_compile(model: nn.Module, *, backend: str) -> None:
    """Compiles every block of model in place, at its first call; after recomputation and before FSDP. ValueError for a
    backend that torch does not know."""
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ValueError(f'compile.backend ("{backend}") must be one of {known}; to debug, aot_eager or eager.')
    for block in model.layers.values():
        block.compile(fullgraph=True, dynamic=False, backend=backend)
