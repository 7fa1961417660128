"""Nothing is dropped in silence: a plan key that matches no module is an error, and so is a parameter without a
plan."""

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore  # see test_recipes.py

from errors import ConfigError
from model import ModelArgs, Transformer
from parallelize import build_mesh, check_parameters, expert, parallelize_data, parallelize_experts, parallelize_tensor
from parallelize import tensor as tensor_parallel

GQA = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)
MLA = GQA | dict(attention="mla", n_kv_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MOE = dict(n_experts=4, top_k=2, moe_hidden_dim=16, n_shared_experts=1, n_dense_layers=1, n_mtp_layers=1)
PLANS = {  # name in parallelize/tensor.py: a model that uses the plan
    "GROUPED_QUERY_ATTENTION": ModelArgs(**GQA),
    "LATENT_ATTENTION": ModelArgs(**MLA),
    "LATENT_ATTENTION_WITH_Q_LORA": ModelArgs(**MLA, q_lora_rank=16),
    "FEED_FORWARD": ModelArgs(**GQA),
    "MOE": ModelArgs(**GQA, **MOE),
    "SHARED_EXPERTS": ModelArgs(**GQA, **MOE),
    "MTP_LAYER": ModelArgs(**GQA, **MOE),
    "EMBEDDING": ModelArgs(**GQA),
    "HEAD": ModelArgs(**GQA),
}
FSDP = dict(param_dtype=torch.float32, reduce_dtype=torch.float32, reshard_after_forward=True, cpu_offload=False)


def built(args: ModelArgs, change=lambda model: None, **degrees: int) -> Transformer:
    """A model on meta with tensor, expert and data parallelism applied, as one of four ranks that are not there."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh = build_mesh("cpu", 4, **degrees)
    with torch.device("meta"):
        model = Transformer(args)
        change(model)
    parallelize_tensor(model, mesh.tp)
    parallelize_experts(model, mesh.ep, mesh.sequence)
    parallelize_data(model, mesh.fsdp, mesh.efsdp, **FSDP)
    check_parameters(model, mesh)
    return model


def error_of(do, *args, **kwargs) -> str:
    try:
        do(*args, **kwargs)
    except ConfigError as error:
        return str(error)
    return ""


def misspell_each_key() -> dict[str, str]:
    """For each key of each plan: the error when it is misspelt."""
    errors = {}
    for name, args in PLANS.items():
        plan = getattr(tensor_parallel, name)
        for key in list(plan):
            misspelt = {(k + "_" if k == key else k): style for k, style in plan.items()}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tensor_parallel, name, misspelt)
                errors[f"{name} {key}"] = error_of(built, args, tp=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert, "PLAN", {"moe.expert": expert.ExpertParallel()})
        errors["expert PLAN moe.experts"] = error_of(built, PLANS["MOE"], ep=2)
    return errors


def test_misspelt_plan_key_is_an_error():
    """Each key of each plan, misspelt: one line that names the key."""
    errors = run_ranks(1, misspell_each_key)[0]
    assert {name for name, value in vars(tensor_parallel).items() if isinstance(value, dict) and name.isupper()} == {
        *PLANS
    }
    assert len(errors) == sum(len(getattr(tensor_parallel, name)) for name in PLANS) + 1
    for key, error in errors.items():
        name = key.split(" ")[-1]
        assert f'"{name}_"' in error or '"moe.expert"' in error, (key, error)
        assert "matches no module" in error and "\n" not in error


def add_scale_to_attention(model: nn.Module) -> None:
    model.layers["1"].attention.scale = nn.Parameter(torch.empty(8))


def add_gate_to_moe(model: nn.Module) -> None:
    model.layers["1"].moe.gate = nn.Linear(32, 1, bias=False)


def add_norm_to_model(model: nn.Module) -> None:
    model.first_norm = nn.RMSNorm(32)


def forget_each_parameter() -> list[str]:
    return [
        error_of(built, PLANS["MOE"], change, tp=2)
        for change in (add_scale_to_attention, add_gate_to_moe, add_norm_to_model)
    ]


def test_forgotten_parameter_is_an_error():
    """A new parameter that no plan mentions, in attention, in the MoE layer or in the model, is named in one line."""
    names = ["layers.1.attention.scale", "layers.1.moe.gate.weight", "first_norm.weight"]
    for name, error in zip(names, run_ranks(1, forget_each_parameter)[0], strict=True):
        assert error.startswith(
            f"{name} is distributed over the mesh axes ['fsdp'], but it must be over ['fsdp', 'tp'];"
        )
        assert "parallelize/tensor.py" in error


def build_each_model() -> list[int]:
    return [len(list(built(args, tp=2, ep=1).parameters())) for args in PLANS.values()]


def test_every_parameter_of_the_models_is_placed():
    """The plans as they are reach every parameter of every kind of block."""
    assert min(run_ranks(1, build_each_model)[0]) > 0
