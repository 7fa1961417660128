"""Direct messages in place of FSDP's collectives: that they are used, and that gradients stay the same.

(The bytes: tests/test_communication.py.)
"""

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from resilience.process_group import init_distributed
from training.gloo import DirectAllGather, use_direct_messages

CASES = {  # (dp_replicate, fsdp, tp), and how many of the three FSDP modules below all-gather by direct messages
    "fsdp 4": ((1, 4, 1), 3),
    "dp_replicate 2 x fsdp 2": ((2, 2, 1), 3),
    "fsdp 2 x tp 2": ((1, 2, 2), 3),
    "tp 4, the expert over all ranks": ((1, 1, 4), 1),
    "dp_replicate 4": ((4, 1, 1), 0),
}


def _gradients(shape: tuple[int, int, int], is_direct: bool) -> tuple[list[torch.Tensor], int]:
    """Whole gradients of a model with a tensor-parallel layer and an expert, which is sharded over fsdp x tp; and the
    number of FSDP modules that gathered their weights by direct messages."""
    replicate, fsdp, tp = shape
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "fsdp", "tp"))
    expert_mesh = init_device_mesh("cpu", (replicate, fsdp * tp), mesh_dim_names=("dp_replicate", "efsdp"))
    copies = ("dp_replicate",) if replicate > 1 else ()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)).double()
    block, expert = model[0], model[0][0]
    if tp > 1:
        parallelize_module(block[1], mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
    for module, its_mesh in (
        (expert, expert_mesh[(*copies, "efsdp")]),
        (block, mesh[(*copies, "fsdp")]),
        (model, mesh[(*copies, "fsdp")]),
    ):
        fully_shard(module, mesh=its_mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    used, gather = set(), DirectAllGather.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectAllGather, "__call__", lambda self, *a, **k: (used.add(self), gather(self, *a, **k))[1])
        if is_direct:
            use_direct_messages(model)
        torch.manual_seed(dist.get_rank() // tp)
        model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()], len(used)


def _compare() -> dict[str, int]:
    init_distributed("cpu", 60)
    numbers = {}
    for name, (shape, _) in CASES.items():
        (expected, _), (gradients, numbers[name]) = (_gradients(shape, is_direct) for is_direct in (False, True))
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    return numbers


def test_direct_messages_equal_fsdp_collectives():
    """In every layout of four ranks the gradients are those of FSDP's own collectives, and exactly the modules that are
    sharded over more than one rank send messages."""
    assert run_ranks(4, _compare) == [{name: number for name, (_, number) in CASES.items()}] * 4


def test_direct_messages_do_nothing_without_fsdp():
    """A model that is not sharded stays as it is."""
    use_direct_messages(nn.Linear(2, 2))
