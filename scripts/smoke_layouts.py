"""The twenty layouts of scripts/smoke.py, of the two debug models; each has a feature that no other layout has.

FSDP takes the ranks that a layout leaves. With fewer than 8 ranks, the largest degree of a layout is halved until the
layout fits.
"""

from dataclasses import dataclass
from math import prod

from helpers.layouts import SHORT

GLOBAL_BATCH = 16  # sequences a step
SCHEDULE, METHOD = "parallelism.pipeline_parallel_schedule", "parallelism.context_parallel_method"
RECOMPUTE, COMPILE = "activation_checkpoint.mode", "compile.enable"
LABELS = {  # (option, value): its text in a layout's name, where that is not the value
    (RECOMPUTE, "full"): "all recomputed",
    (RECOMPUTE, "selective"): "some recomputed",
    (COMPILE, "true"): "compiled",
}


@dataclass(frozen=True)
class Layout:
    model: str
    degrees: tuple[tuple[str, int], ...]  # by short name
    accumulation: int  # number of microbatches of a rank per step
    options: tuple[tuple[str, str], ...]

    @property
    def ranks(self) -> int:
        return prod(n for axis, n in self.degrees if axis != "ep")  # experts borrow their ranks

    @property
    def name(self) -> str:
        degrees = ", ".join(f"{axis} {n}" for axis, n in self.degrees if n > 1)
        extras = [LABELS.get(setting, setting[1]) for setting in self.options]
        extras += [f"{self.accumulation} accumulations"] if self.accumulation > 1 else []
        return ", ".join([degrees or "alone", *extras])

    def settings(self) -> list[str]:
        degrees = dict(self.degrees)
        local_batch = GLOBAL_BATCH // (degrees["replicate"] * degrees["fsdp"]) // self.accumulation
        values = {SHORT[axis]: n for axis, n in self.degrees} | dict(self.options)
        values["training.local_batch_size"] = local_batch
        return [f"--{option}={value}" for option, value in values.items()]


def layout(model: str, ranks: int, pp=1, replicate=1, cp=1, tp=1, ep=1, accumulation=1, **options: str) -> Layout:
    """The layout, with degrees halved until they fit the ranks. Of equal degrees tensor parallelism's is halved first,
    the pipeline's last, because the layouts with a pipeline differ most from each other."""
    degrees = dict(tp=tp, cp=cp, replicate=replicate, pp=pp)
    while ranks % prod(degrees.values()):
        degrees[max(degrees, key=degrees.get)] //= 2
    degrees["fsdp"] = ranks // prod(degrees.values())
    while degrees["fsdp"] * degrees["cp"] * degrees["tp"] % ep:
        ep //= 2
    degrees["ep"] = ep
    named = {"schedule": SCHEDULE, "method": METHOD, "recompute": RECOMPUTE, "compile": COMPILE}
    without_effect = {"schedule": degrees["pp"] == 1, "method": degrees["cp"] == 1}
    kept = tuple((named[key], value) for key, value in options.items() if not without_effect.get(key))
    return Layout(model, tuple((axis, degrees[axis]) for axis in SHORT), accumulation, kept)


def reference_layout(model: str) -> Layout:
    return layout(model, ranks=1)


def all_layouts(ranks: int) -> list[Layout]:
    """Each layout once, even if several become the same on fewer ranks."""
    dense = [
        dict(),
        dict(replicate=8),
        dict(replicate=2, recompute="selective"),
        dict(tp=2),
        dict(tp=4, accumulation=2),
        dict(cp=2, method="allgather"),
        dict(cp=4, method="alltoall"),
        dict(pp=4, schedule="1F1B"),
        dict(pp=2, replicate=2, schedule="InterleavedZeroBubble"),
        dict(pp=2, schedule="DualPipeV"),
        dict(pp=2, tp=2, schedule="Interleaved1F1B"),
        dict(cp=2, tp=2, method="allgather", recompute="full"),
        dict(compile="true"),
    ]
    moe = [
        dict(),
        dict(ep=8),
        dict(replicate=2, ep=4),
        dict(tp=2, ep=2),
        dict(cp=2, ep=4, method="latent"),
        dict(pp=2, ep=2, schedule="Interleaved1F1B"),
        dict(pp=2, tp=2, ep=4, schedule="1F1B", recompute="full"),
    ]
    made = [layout("dense", ranks, **d) for d in dense] + [layout("moe", ranks, **d) for d in moe]
    return [made for made in dict.fromkeys(made) if made != reference_layout(made.model)]


def all_chains(ranks: int) -> list[list[Layout]]:
    """Runs that are stopped after a third and after two thirds of their steps, and resume in the next layout."""
    return [
        [
            layout("dense", ranks),
            layout("dense", ranks, pp=2, tp=2, schedule="Interleaved1F1B"),
            layout("dense", ranks, replicate=2, cp=2, method="allgather"),
        ],
        [
            layout("moe", ranks, ep=8),
            layout("moe", ranks, pp=2, ep=2, schedule="Interleaved1F1B"),
            layout("moe", ranks, replicate=2, tp=2, ep=2),
        ],
    ]


def name_of(plan: list[Layout]) -> str:
    return f"{plan[0].model}: {', then '.join(made.name for made in plan)}"
