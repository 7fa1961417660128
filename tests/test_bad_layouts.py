"""A layout that cannot be is one clear line, with the numbers and what to write instead."""

import re

import pytest
import torch
import torch.distributed as dist
from helpers.layouts import V3
from helpers.ranks import run_ranks
from helpers.runs import TINY, argv
from torch.testing._internal.distributed.fake_pg import FakeStore  # see test_recipes.py

from config import load_config
from data import build_tokenizer
from parallelize import build_mesh
from torch_private import torch_at_least

TP, CP, PP = (f"parallelism.{axis}_parallel_degree" for axis in ("tensor", "context", "pipeline"))
SCHEDULE, MICROBATCH = "parallelism.pipeline_parallel_schedule", "parallelism.pipeline_parallel_microbatch_size"
EP = "parallelism.expert_parallel_degree"
BATCH, MODE = "training.local_batch_size", "activation_checkpoint.mode"
FLOAT8 = {"float8.enable": "true", "float8.emulate": "true", "training.dtype": "float32"}

CASES = [  # options of a run on eight ranks, and what the message says
    ({TP: 3, CP: 3}, "context_parallel_degree 3 x tensor_parallel_degree 3 does not multiply to the number of ranks"),
    ({TP: 2, "model.n_heads": 3, "model.n_kv_heads": 3}, "tensor_parallel_degree (2) must divide model.n_heads (3)"),
    ({TP: 8}, "tensor_parallel_degree (8) must divide model.n_kv_heads (4); use one of [1, 2, 4]."),
    ({TP: 2, "model.hidden_dim": 61}, "must divide model.hidden_dim (61)"),
    ({TP: 2, "model.vocab_size": 269}, "must divide model.vocab_size (269)"),
    ({TP: 4, CP: 2, "training.seq_len": 36}, "must divide the sequence length of a context rank (18)"),
    ({CP: 4, "training.seq_len": 36}, "training.seq_len (36) must be a multiple of 2 x"
     " parallelism.context_parallel_degree (4): each rank takes one part from the head and one from the tail;"
     " use 32 or 40."),
    ({CP: 4, TP: 2, "parallelism.context_parallel_method": "alltoall"},
     '"alltoall" needs context_parallel_degree (4) to divide model.n_kv_heads / tensor_parallel_degree (4 / 2 = 2); use'
     ' "allgather".'),
    ({PP: 4}, "pipeline_parallel_degree (4) x 1 stages a rank needs 4 layers, model.n_layers is 2; use a degree of"
     " at most 2."),
    ({PP: 2, SCHEDULE: "Interleaved1F1B"}, "(2) x 2 stages a rank needs 4 layers, model.n_layers is 2"),
    ({PP: 2, BATCH: 1}, "1F1B with 2 stages needs at least 2 microbatches, but training.local_batch_size (1) /"
     " parallelism.pipeline_parallel_microbatch_size (1) gives 1; change one of them."),
    ({PP: 2, BATCH: 4, MICROBATCH: 3}, "pipeline_parallel_microbatch_size (3) must divide training.local_batch_size"
     " (4); use one of [1, 2, 4]."),
    ({PP: 2, BATCH: 5, SCHEDULE: "Interleaved1F1B", "model.n_layers": 4}, "microbatches in rounds: a multiple of 2"),
    ({PP: 2, BATCH: 5, SCHEDULE: "InterleavedZeroBubble", "model.n_layers": 4}, "a multiple of 2"),
    ({PP: 2, BATCH: 2, SCHEDULE: "DualPipeV", "model.n_layers": 4}, "DualPipeV with 4 stages needs at least 4 micro"),
    ({PP: 2, SCHEDULE: "GPipe", "parallelism.pipeline_parallel_stages_per_rank": 2}, "(2) must be 1 for GPipe."),
    ({PP: 2, SCHEDULE: "ZBVZeroBubble", "parallelism.pipeline_parallel_stages_per_rank": 3}, "(3) must be 2 for ZBV"),
    ({PP: 2, SCHEDULE: "DualPipeV", "model.n_layers": 4, "model.n_mtp_layers": 2}, "cannot be where the last stage uses"
     " the embedding at several depths: model.n_mtp_layers is 2, model.tie_embeddings false; use Interleaved1F1B."),
    ({PP: 2, SCHEDULE: "InterleavedZeroBubble", "model.n_layers": 4, MODE: "full"},
     "activation_checkpoint.mode does not fit InterleavedZeroBubble, which splits each block's backward in two"),
    ({PP: 2, SCHEDULE: "InterleavedZeroBubble", "model.n_layers": 4, "compile.enable": "true"},
     "compile.enable does not fit InterleavedZeroBubble"),
    ({EP: 2}, "expert_parallel_degree (2) needs a mixture of experts, model.n_experts is 0; leave it out."),
    ({EP: 8, **V3, "model.n_experts": 12}, "(8) must divide model.n_experts (12); use one of [1, 2, 3, 4, 6, 12]."),
    ({EP: 3, **V3}, "expert_parallel_degree (3) must divide dp_shard x cp x tp (8); use one of [1, 2, 4, 8]."),
    ({TP: 4, **V3, "model.moe_hidden_dim": 6}, "must divide model.n_shared_experts x model.moe_hidden_dim (6)"),
    ({CP: 2, "parallelism.context_parallel_method": "latent"}, '"latent" gathers the latents of model.attention "mla",'
     ' but it is "gqa"; use "allgather".'),
    ({MODE: "selective", "activation_checkpoint.selective_option": "3"}, "a number n from 1 to 2 (model.n_layers)"),
    ({MODE: "memory_budget", "activation_checkpoint.selective_option": "2"}, "must be a number from 0 to 1 with"),
    ({MODE: "memory_budget", "activation_checkpoint.selective_option": "0.5"}, "is the compiler's; add --compile.en"),
    ({TP: 2, **V3, **FLOAT8}, "float8 does not fit latent attention or multi-token prediction under tensor parallelism;"
     ' add "layers.*.attention.wkv_b", "mtp.*.block.attention.wkv_b", "mtp.*.eh_proj" to float8.skip, or set'),
    ({"compile.enable": "true", "compile.backend": "inductr"}, 'compile.backend ("inductr") must be one of'),
    ({"float8.enable": "true", "training.dtype": "float32"}, "needs a GPU of compute capability 8.9"),
]  # fmt: skip


def _messages(cases: list[dict]) -> list[str]:
    """What train.py says to each, on rank 0 of a group of eight that is only told to exist."""
    import train

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    messages = []
    for options in cases:
        try:
            config = load_config(argv(TINY, {BATCH: 8}, options))
            mesh = build_mesh("cpu", 8, **config.parallelism.degrees)
            args = train.get_model_args(**vars(config.model))
            train.check_layout(config, args, mesh, build_tokenizer("byte"))
            stages = train.build_stages(config, args, mesh, 8, log=lambda _: None)
            train.build_forward_backward(config, stages, mesh, torch.device("cpu"))
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def messages():
    return run_ranks(1, _messages, [options for options, _ in CASES])[0]


def test_compiling_recomputed_collectives_is_refused_where_torch_cannot():
    """Recomputed collectives of tensor parallelism, where the compiler fails on them."""
    options = {TP: 2, "compile.enable": "true", MODE: "full"}
    found = run_ranks(1, _messages, [options, options | {MODE: "selective"}])[0]
    assert found[1] == "" and ("cannot compile blocks that recompute" in found[0]) == torch_at_least(2, 12)


def test_cure_of_float8_under_tensor_parallelism_works():
    """With the patterns that the error names in float8.skip, the same layout is accepted."""
    skip = '["layers.*.attention.wkv_b", "mtp.*.eh_proj", "mtp.*.block.attention.wkv_b"]'
    assert run_ranks(1, _messages, [{TP: 2, **V3, **FLOAT8, "float8.skip": skip}])[0] == [""]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_layout_is_refused_in_one_line(number, messages):
    """The line says which option, its value, and what would fit."""
    assert CASES[number][1] in messages[number] and "\n" not in messages[number], messages[number]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {SCHEDULE: "GPipe"},
            "pipeline_parallel_schedule has no effect without parallelism.pipeline_parallel_degree",
        ),
        ({MICROBATCH: 2}, "pipeline_parallel_microbatch_size has no effect without"),
        ({"parallelism.context_parallel_method": "alltoall"}, "context_parallel_method has no effect without"),
        (
            {"parallelism.enable_async_tensor_parallel": "true"},
            "has no effect without parallelism.tensor_paral",
        ),
        ({"parallelism.enable_async_tensor_parallel": "true", TP: 2}, "has no effect without compile.enable true"),
        ({"activation_checkpoint.selective_option": "2"}, "has no effect without activation_checkpoint.mode select"),
        (
            {"activation_checkpoint.selective_option": "0.3", MODE: "full"},
            "has no effect without activation_checkpoint.mode selective or memory_budget; add",
        ),
        (
            {"float8.skip": '["*.wk"]'},
            "float8.skip has no effect without float8.enable true; add --float8.enable true.",
        ),
        ({"comm.direct_messages": "false"}, "comm.direct_messages has no effect without job.device cpu; add"),
        ({"compile.backend": "eager"}, "compile.backend has no effect without compile.enable true"),
        (
            {"float8.recipe": "rowwise"},
            "float8.recipe has no effect without float8.enable true; add --float8.en",
        ),
        ({PP: 2, SCHEDULE: "2F2B"}, "pipeline_parallel_schedule: expected"),
    ],
)
def test_option_without_effect_is_refused(options, message):
    """An option that cannot take effect is an error, which names what it needs."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(argv(options))
