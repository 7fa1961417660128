"""Every private name of torch that this project uses, each with its reason; tried on torch 2.11 and 2.13. No other file
may import or call a private name.

Two private methods are overridden elsewhere, because torch names the hooks so: ParallelStyle._apply, which torch
documents as the method that a style overrides, and nn.Module._apply, the hook behind .to(), in model/moe.py.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# The norms of many tensors in one pass, and their scaling. The public torch.nn.utils.get_total_norm computes the norm
# of bfloat16 gradients in bfloat16.
from torch import _foreach_mul_ as foreach_mul_
from torch import _foreach_norm as foreach_norm

# The only all-to-all that autograd and the compiler understand. The public one suits neither.
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import DTensor

# The placement of a dimension that another axis has cut before FSDP cuts it. It says which elements a rank holds.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

# The operators behind functional collectives, which activation checkpointing sees. They have no public names.
COLLECTIVE_OPS = {
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.wait_tensor.default,
}
# The kernels behind F.scaled_dot_product_attention, of which torch picks one, and FlexAttention.
ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
# Matrix products. The scaled and the grouped ones have public functions, but their operators are private.
MATMUL_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_grouped_mm.default,
}

# Names of loggers. DTensor's warns when it reduces over one axis after the other; pytree's when torchao is imported.
REDISTRIBUTE_LOGGER, PYTREE_LOGGER = "torch.distributed.tensor._redistribute", "torch.utils._pytree"


def torch_at_least(major: int, minor: int) -> bool:
    """Whether this torch is that release or a later one."""
    return torch.__version__ >= (major, minor)  # TorchVersion compares with tuples, number by number


def default_store() -> dist.Store:
    """The store that the process group began with, through which a failing rank reaches the others. It has no public
    getter."""
    return dist.distributed_c10d._get_default_store()


def dtensor_with(local: Tensor, like: DTensor) -> DTensor:
    """A DTensor laid out like `like`, whose local part is `local` and may be on another device. DTensor.from_local
    would move it to the mesh's device, and DefaultStager can stage only once in torch 2.11."""
    return DTensor(local, like._spec, requires_grad=False)


def enable_micro_pipelining(group: dist.ProcessGroup) -> None:
    """Turns on asynchronous tensor parallelism, an option of the compiler without a public switch."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.group_name)


def set_activation_memory_budget(budget: float) -> None:
    """Sets which part of the activations the compiler may keep, from 0 to 1, its default. It is an option of the whole
    process, without a public setter."""
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = budget


@contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Silences what the named loggers say below an error."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
