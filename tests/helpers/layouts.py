"""The layouts that are tested to equal one process: every combination that fits 8 ranks, and every option."""

from dataclasses import dataclass, field
from itertools import cycle, product
from math import prod

import helpers.flavors  # noqa: F401 - the settings below name its flavors

SHORT = {  # option: its short name, as in "tp 2"
    "pp": "parallelism.pipeline_parallel_degree",
    "replicate": "parallelism.data_parallel_replicate_degree",
    "fsdp": "parallelism.data_parallel_shard_degree",
    "cp": "parallelism.context_parallel_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "ep": "parallelism.expert_parallel_degree",
}
GLOBAL_BATCH = 8  # sequences a step
# DeepSeek-V3's parts: compressed queries, groups of experts, bias and balance loss, and an MTP layer.
V3 = {
    "model.flavor": "test_v3", "model.attention": "mla", "model.n_kv_heads": "8", "model.q_lora_rank": "24",
    "model.kv_lora_rank": "16", "model.qk_nope_head_dim": "8", "model.qk_rope_head_dim": "4", "model.v_head_dim": "6",
    "model.n_experts": "8", "model.top_k": "3", "model.n_shared_experts": "1", "model.moe_hidden_dim": "24",
    "model.n_dense_layers": "1", "model.n_expert_groups": "4", "model.topk_group": "2", "model.expert_bias": "true",
    "model.expert_bias_speed": "0.01", "model.balance_loss_weight": "0.01", "model.n_mtp_layers": "1",
}  # fmt: skip
# V2's: queries are not compressed, softmax, groups ranked by their best expert, YaRN; and fewer experts than ranks.
V2 = V3 | {
    "model.flavor": "test_v2", "model.q_lora_rank": "0", "model.n_experts": "4", "model.top_k": "2",
    "model.expert_bias": "false", "model.n_mtp_layers": "0",
}  # fmt: skip
# Grouped queries, no dense block, no shared expert, tied embeddings, and two MTP layers.
OTHER = {
    "model.n_experts": "8", "model.top_k": "2", "model.moe_hidden_dim": "24", "model.n_mtp_layers": "2",
    "model.tie_embeddings": "true", "model.balance_loss_weight": "0.01",
}  # fmt: skip
MODELS = {  # what is trained; the reference is one process, all eight sequences at once
    "grouped": {},
    "multi-head": {"model.n_kv_heads": "8"},
    "multi-query": {"model.n_kv_heads": "1"},
    "tied": {"model.tie_embeddings": "true"},
    "4 layers": {"model.n_layers": "4"},
    "4 layers, tied": {"model.n_layers": "4", "model.tie_embeddings": "true"},
    "8 layers": {"model.n_layers": "8"},
    "V3": V3,
    "V3, 4 layers": V3 | {"model.n_layers": "4"},
    "V2": V2,
    "mixture": OTHER,
    "mixture, 4 layers": OTHER | {"model.n_layers": "4"},
    "documents": {"data.packing": "documents"},
    "V3, documents": V3 | {"data.packing": "documents"},
}


@dataclass
class Layout:
    """degrees by short name; accumulation: the number of microbatches in which a rank reads its part of the step."""

    degrees: dict[str, int]
    model: str = "grouped"
    accumulation: int = 1
    options: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return prod(degree for axis, degree in self.degrees.items() if axis != "ep")  # experts borrow their ranks

    @property
    def name(self) -> str:
        degrees = " ".join(f"{axis}{n}" for axis, n in self.degrees.items() if n > 1) or "alone"
        named = {
            "model": self.model if self.model != "grouped" else "",
            "accumulation": f"{self.accumulation} accumulations" if self.accumulation > 1 else "",
        }
        options = [f"{key.split('.')[1]}={value}" for key, value in self.options.items()]
        return ", ".join([degrees, *(v for v in named.values() if v), *options])

    @property
    def needs_torch_2_12(self) -> bool:
        """Before torch 2.12 gloo cannot send to its own rank, but in a V neighbouring stages are on one rank; and where
        backward is split in two, the last stage's embedding loses its gradient."""
        schedule = self.options.get("parallelism.pipeline_parallel_schedule")
        has_mtp = int(MODELS[self.model].get("model.n_mtp_layers", 0)) > 0
        return schedule in ("ZBVZeroBubble", "DualPipeV") or (schedule == "InterleavedZeroBubble" and has_mtp)

    def settings(self) -> dict[str, str]:
        ranks_that_read = self.degrees["replicate"] * self.degrees["fsdp"]
        return {
            **{SHORT[axis]: str(n) for axis, n in self.degrees.items()},
            **MODELS[self.model],
            "training.local_batch_size": str(GLOBAL_BATCH // ranks_that_read // self.accumulation),
            **self.options,
        }


def layout(pp=1, replicate=1, fsdp=1, cp=1, tp=1, model="grouped", accumulation=1, ep=1, **options) -> Layout:
    degrees = dict(pp=pp, replicate=replicate, fsdp=fsdp, cp=cp, tp=tp, ep=ep)
    return Layout(degrees, model, accumulation, {k.replace("__", "."): str(v) for k, v in options.items()})


def every_combination() -> list[Layout]:
    """{fsdp, hsdp} x tp {1, 2, 4} x cp {1, 2, 4} x pp {1, 2, 4} on at most 8 ranks; the other options alternate."""
    accumulations, methods, chunks = cycle((1, 2)), cycle(("allgather", "alltoall")), cycle((0, 24, 5, 2048))
    recomputation = cycle(("none", "full", "selective"))
    layouts = []
    for kind, tp, cp, pp in product(("fsdp", "hsdp"), (1, 2, 4), (1, 2, 4), (1, 2, 4)):
        rest = 8 // (tp * cp * pp)
        if rest < (2 if kind == "hsdp" else 1):
            continue
        replicate = 2 if kind == "hsdp" else 1
        made = layout(
            pp, replicate, min(2, rest // replicate), cp, tp, "4 layers" if pp == 4 else "grouped", next(accumulations)
        )
        share = GLOBAL_BATCH // (made.degrees["fsdp"] * replicate)
        if pp > 1:  # as few microbatches as 1F1B allows
            made.accumulation = min(made.accumulation, share // pp)
            microbatch_size = share // made.accumulation // pp
            made.options["parallelism.pipeline_parallel_microbatch_size"] = str(microbatch_size)
        if cp > 1 and tp * cp <= 4:  # "alltoall" needs a key/value head for each rank
            made.options["parallelism.context_parallel_method"] = next(methods)
        made.options["training.loss_chunk_size"] = str(next(chunks))
        made.options["activation_checkpoint.mode"] = next(recomputation)
        layouts.append(made)
    return layouts


def every_schedule() -> list[Layout]:
    """Each pipeline schedule with FSDP, with tensor or context parallelism, and over four ranks."""
    layouts, name = [], "parallelism__pipeline_parallel_schedule"
    for i, schedule in enumerate(("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")):
        per_rank = 1 if schedule in ("GPipe", "1F1B") else 2
        model = {1: "tied", 2: "4 layers, tied"}[per_rank]
        layouts.append(layout(2, fsdp=2, model=model, **{name: schedule}))
        layouts.append(
            layout(2, **({"tp": 2} if i % 2 else {"cp": 2}), model=model, accumulation=2, **{name: schedule})
        )
        model = {1: "4 layers", 2: "8 layers"}[per_rank]
        layouts.append(layout(4, model=model, accumulation=2, **{name: schedule}))
    for schedule in ("ZBVZeroBubble", "DualPipeV"):
        layouts.append(layout(2, replicate=2, model="4 layers, tied", **{name: schedule}))
        layouts.append(layout(2, tp=2, model="4 layers", accumulation=2, **{name: schedule}))
        layouts.append(layout(4, model="8 layers", **{name: schedule}))
    return layouts


def more() -> list[Layout]:
    """Data parallelism alone, kinds of attention and of embedding, four stages per rank, and the reference loss
    (loss_chunk_size 0) under schedules that split backward."""
    freed = "parallelism__fsdp_reshard_after_forward"
    return [
        layout(accumulation=8),
        layout(fsdp=4, accumulation=2),
        layout(fsdp=8),
        layout(fsdp=4, **{freed: "never"}),
        layout(replicate=2, fsdp=4),
        layout(replicate=2, accumulation=4),
        layout(replicate=2, fsdp=2, model="tied", accumulation=2),
        layout(fsdp=2, model="multi-query"),
        layout(fsdp=2, tp=2, model="tied", accumulation=2, training__loss_chunk_size=7),
        layout(fsdp=2, tp=2, model="multi-head"),
        layout(fsdp=2, cp=2, model="multi-query", accumulation=2),
        layout(fsdp=2, cp=2, model="tied", parallelism__context_parallel_method="alltoall"),
        layout(pp=2, cp=2, model="multi-query", accumulation=2),
        layout(pp=2, tp=2, model="tied"),
        layout(2, model="8 layers", parallelism__pipeline_parallel_schedule="Interleaved1F1B",
               parallelism__pipeline_parallel_stages_per_rank=4),
        *(layout(2, fsdp=2, model=model, parallelism__pipeline_parallel_schedule=schedule, training__loss_chunk_size=0)
          for schedule in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
          for model in ("4 layers, tied", "V3, 4 layers")),
    ]  # fmt: skip


def mixtures() -> list[Layout]:
    """Mixtures of experts: ep {1, 2, 4, 8} across the other axes; options and models alternate."""
    degrees = {  # (pp, replicate, fsdp, cp, tp): ep
        (1, 1, 2, 1, 1): (1, 2), (1, 1, 4, 1, 1): (2, 4), (1, 1, 8, 1, 1): (1, 4, 8),
        (1, 2, 2, 1, 1): (2,), (1, 2, 4, 1, 1): (2, 4), (1, 4, 2, 1, 1): (1,),
        (1, 1, 1, 1, 2): (1, 2), (1, 1, 1, 1, 4): (1, 4), (1, 1, 2, 1, 2): (2, 4), (1, 1, 2, 1, 4): (4, 8),
        (1, 1, 4, 1, 2): (2, 8), (1, 2, 1, 1, 2): (2,), (1, 2, 2, 1, 2): (4,),
        (1, 1, 1, 2, 1): (1, 2), (1, 1, 2, 2, 1): (1, 4), (1, 1, 1, 4, 1): (4,), (1, 2, 1, 2, 1): (2,),
        (1, 1, 1, 2, 2): (1, 2), (1, 1, 2, 2, 2): (2, 8), (1, 2, 1, 2, 2): (4,), (1, 1, 1, 2, 4): (8,),
        (2, 1, 1, 1, 1): (1,), (2, 1, 2, 1, 1): (1, 2), (2, 1, 1, 1, 2): (2,), (2, 1, 1, 2, 1): (2,),
        (2, 1, 2, 1, 2): (4,), (2, 1, 2, 2, 1): (2,), (2, 2, 2, 1, 1): (2,),
    }  # fmt: skip
    models, accumulations = cycle(("V3", "V2", "V3", "mixture")), cycle((1, 2, 1))
    recomputation, chunks = cycle(("none", "full", "none", "selective")), cycle((0, 24, 2048))
    methods = {model: cycle(m) for model, m in (("V3", ("latent", "alltoall", "allgather")), ("V2", ("latent",)))}
    layouts = []
    for (pp, replicate, fsdp, cp, tp), ep in ((axes, ep) for axes, eps in degrees.items() for ep in eps):
        model = next(m for m in models if int(MODELS[m]["model.n_experts"]) % ep == 0)
        made = layout(pp, replicate, fsdp, cp, tp, model, next(accumulations), ep)
        share = GLOBAL_BATCH // (fsdp * replicate)
        made.accumulation = min(made.accumulation, share // pp)
        if cp > 1 and model in methods and tp * cp <= 4:
            made.options["parallelism.context_parallel_method"] = next(methods[model])
        made.options["training.loss_chunk_size"] = str(next(chunks))
        made.options["activation_checkpoint.mode"] = next(recomputation)
        layouts.append(made)
    schedule = "parallelism__pipeline_parallel_schedule"
    for name in ("GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        model = "V3, 4 layers" if name != "LoopedBFS" else "mixture, 4 layers"
        layouts.append(layout(2, fsdp=2, model="V3" if name == "GPipe" else model, ep=2, **{schedule: name}))
        if name in ("Interleaved1F1B", "ZBVZeroBubble"):
            model = "V3, 4 layers" if name == "ZBVZeroBubble" else "mixture, 4 layers"
            layouts.append(layout(2, tp=2, model=model, ep=2, **{schedule: name}))
    return layouts


def packed() -> list[Layout]:
    """Documents packed into sequences, under every parallelism that splits sequences or batches."""
    method, mode = "parallelism__context_parallel_method", "activation_checkpoint__mode"
    documents, v3 = dict(model="documents"), dict(model="V3, documents")
    return [
        layout(fsdp=2, **documents, accumulation=2),
        layout(tp=2, **documents, **{mode: "selective"}),
        *(layout(cp=2, **documents, **{method: m}) for m in ("allgather", "alltoall")),
        layout(2, **documents),
        layout(2, fsdp=2, cp=2, **documents, accumulation=2),
        layout(cp=2, tp=2, **documents, **{mode: "full"}),
        layout(cp=4, **v3, **{method: "latent"}),
        layout(fsdp=2, cp=2, **v3, ep=4, **{method: "latent"}),
        layout(2, fsdp=2, tp=2, **v3, ep=2),
    ]


def own_collectives() -> list[Layout]:
    """FSDP's own collectives, the path that GPUs take. The other layouts shard with the direct messages of gloo."""
    own = dict(comm__direct_messages="false")
    return [
        layout(fsdp=2, **own),
        layout(replicate=2, fsdp=2, **own),
        layout(fsdp=2, tp=2, **own),
        layout(fsdp=2, model="V3", ep=2, **own),
        layout(2, fsdp=2, **own),
    ]


LAYOUTS = {
    made.name: made
    for made in every_combination() + every_schedule() + more() + mixtures() + packed() + own_collectives()
}
