"""What a rank sends in a step of the real `train.main`: every collective and message, and the bytes of each.

The rank is one of a fake process group, on which nothing is sent and everything is counted, by torch's CommDebugMode.
Pipelines run on gloo ranks, because torch 2.13 waits for the content of a first message. The second step is counted,
because the first step creates communicators.

Bytes are the bytes that a rank receives. Of an all-gather, a reduce-scatter or an all-to-all over n ranks it receives
(n-1)/n of the larger side; of an all-reduce, which is the first two in a row, twice that; of a message all. Of an
uneven all-to-all it receives the rows from the other ranks."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from helpers.ranks import run_ranks
from helpers.runs import TINY, argv, options, write_ragged_text

MIXED = options(
    training__dtype="float32", training__mixed_precision_param="bfloat16", training__mixed_precision_reduce="float32"
)
KINDS = {  # torch's names
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_to_all_single": "all-to-all",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
}
LOCAL = ("wait_tensor", "_wrap_tensor_autograd")  # in the collectives' namespaces, but they send nothing


class Traffic(NamedTuple):
    calls: Counter[tuple[str, str, int]]  # (kind, name of the group, bytes): how often
    groups: dict[str, str]  # axis: name of its group
    rows: list[tuple[int, int]]  # of each exchange of tokens, the rows that go to other ranks, and that come from them


class Recorder(CommDebugMode):
    """CommDebugMode that also notes the group and the bytes of each collective, and messages, which it does not count:
    they too go through torch's dispatcher, whatever function sends them."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[tuple[str, str, int]] = Counter()  # (kind, name of the group, bytes)
        # CommDebugMode also sorts calls by module, which is not needed here and fails in a second microbatch.
        self.advanced_module_tracker = NoModules()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._overloadpacket.__name__
        # An operation on a DTensor comes here again, as operations on its local part.
        if result is not NotImplemented and func.namespace in ("c10d", "_c10d_functional") and name not in LOCAL:
            kind, group = KINDS[name], group_of(args)
            splits = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], int)]
            if kind == "all-to-all" and splits:  # rows received from each rank, rows sent
                received = result if torch.is_tensor(result) else args[0]
                rows = sum(splits[0]) - splits[0][group.rank()]
                size = rows * received[:1].nbytes if len(received) else 0
            else:
                larger = max(t.numel() * t.element_size() for t in tree_leaves((args, result)) if torch.is_tensor(t))
                size = moved(kind, larger, group.size())
            self.calls[kind, group.group_name, size] += 1
        return result


class NoModules(nullcontext):
    name, is_bw, activation_checkpointing, module_parents_dict = "", False, False, {"": ()}


def group_of(args) -> dist.ProcessGroup:
    """A functional collective is given its group's name, the others the group itself."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in arg._type().name():
            return dist.ProcessGroup.unbox(arg)
    return torch._C._distributed_c10d._resolve_process_group([arg for arg in args if isinstance(arg, str)][-1])


def moved(kind: str, size: int, n: int) -> int:
    """Bytes that one of n ranks receives, for `size` bytes on the larger side."""
    if kind in ("send", "receive"):
        return size
    size *= 2 if kind == "all-reduce" else 1
    assert size * (n - 1) % n == 0, "sizes are chosen so that bytes are whole"
    return size * (n - 1) // n


def collective(kind: str, axis: str, size: int, n: int, count: int) -> Counter:
    return Counter({(kind, axis, moved(kind, size, n)): count})


def axes_of(mesh) -> dict[str, str]:
    """The name of each axis's group."""
    parts = dict(pp=mesh.pp, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep)
    parts |= dict(loss=mesh.loss, tokens=mesh.tokens, sequence=mesh.sequence, efsdp=mesh.sparse["efsdp"])
    parts |= {axis: mesh.dense[axis] for axis in ("dp_replicate", "fsdp")}
    parts["experts.dp_replicate"] = mesh.sparse["dp_replicate"]
    return {axis: part.get_group().group_name for axis, part in parts.items()}


def record_step(fake_ranks: int | None, arguments: list[str]) -> Traffic:
    """What this rank sends in step 2. With fake_ranks it is the last rank of so many, with meaningless weights and
    gradients, and all experts get equally many tokens."""
    import resilience.run
    import train
    from config import load_config
    from model.moe import Router
    from parallelize import expert

    recorder, groups, rows = Recorder(), {}, []
    build_mesh, count_valid_tokens, clip_grad_norm = train.build_mesh, train.count_valid_tokens, train.clip_grad_norm
    all_to_all_single, to_lists = dist.all_to_all_single, expert.to_lists
    meshes = []
    steps = []

    def build(*args, **degrees):
        mesh = build_mesh(*args, **degrees)
        meshes.append(mesh)
        groups.update(axes_of(mesh))
        return mesh

    def begin(*args):
        steps.append(len(steps) + 1)
        if steps[-1] == 2:
            recorder.__enter__()
        return count_valid_tokens(*args)

    def end(*_, **__):
        if steps[-1] == 2:
            recorder.__exit__(None, None, None)

    def noting(sent, received):
        lists, own = to_lists(sent, received), meshes[0].ep.get_local_rank()
        if steps[-1] == 2:
            rows.append(tuple(sum(numbers) - numbers[own] for numbers in lists))
        return lists

    def select_in_turn(self, scores):
        tokens, k = len(scores), self.args.top_k
        return torch.arange(tokens * k).view(tokens, k) % self.args.n_experts

    def all_send_the_same(output, input, **kwargs):
        all_to_all_single(output, input, **kwargs)
        output.copy_(input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_mesh", build)
        patch.setattr(train, "count_valid_tokens", begin)  # a step's first communication
        patch.setattr(train.Metrics, "log", end)  # comes after its last
        patch.setattr(expert, "to_lists", noting)
        if fake_ranks:
            dist.init_process_group("fake", store=FakeStore(), rank=fake_ranks - 1, world_size=fake_ranks)
            patch.setattr(resilience.run, "init_distributed", lambda *_: torch.device("cpu"))
            patch.setattr(train.Run, "require_same_on_all_ranks", lambda *_, **__: None)
            patch.setattr(train, "clip_grad_norm", lambda *args: (clip_grad_norm(*args), 1.0)[1])
            patch.setattr(Router, "select_experts", select_in_turn)
            patch.setattr(dist, "all_to_all_single", all_send_the_same)
        train.main(load_config(arguments))
    counted = sum(n for (kind, *_), n in recorder.calls.items() if kind not in ("send", "receive"))
    assert counted == recorder.get_total_counts(), "the recorder and CommDebugMode see the same collectives"
    return Traffic(recorder.calls, groups, rows)


def run_step(folder: Path, ranks: int, *settings: dict[str, str], gloo: bool = False) -> list[Traffic]:
    """A step's traffic with these settings, on gloo that of every rank."""
    folders = {"job.dump_folder": str(folder / "run"), "data.cache_folder": str(folder / "cache")}
    text = options(data__path=str(write_ragged_text(folder)), training__steps=2)
    return run_ranks(ranks if gloo else 1, record_step, None if gloo else ranks, argv(TINY, text, folders, *settings))


def require(traffic: Traffic, *formulas: Counter) -> None:
    """AssertionError unless the calls are those of the formulas, no more and no fewer."""
    __tracebackhide__ = True
    calls, groups, _ = traffic
    # Axes of the same ranks share a group.
    axes = {group: "=".join(a for a, g in groups.items() if g == group) for group in groups.values()}
    expected = Counter()
    for formula in formulas:
        for (kind, axis, size), count in formula.items():
            expected[kind, axes[groups[axis]], size] += count
    counted = {(kind, axes.get(group, group), size): n for (kind, group, size), n in calls.items()}
    assert counted == {key: n for key, n in expected.items() if n}


def as_messages(formula: Counter, N: int) -> Counter:
    """training/gloo.py: in each all-gather and reduce-scatter a message to, and one from, every other rank."""
    result = Counter()
    for (_, axis, size), count in formula.items():
        for kind in ("send", "receive"):
            result[kind, axis, size // (N - 1)] += count * (N - 1)
    return result


def rounded_up(N: int, shapes: list[tuple[int, ...]]) -> int:
    """Elements of weights whose rows are rounded up to a multiple of N ranks."""
    return sum(-(-rows // N) * N * torch.Size(rest).numel() for rows, *rest in shapes)


def of_group(
    P: int, N: int, R: int = 1, *, gathers: int, scatters: int, sums: int, b: int = 8, s: int = 8, experts: bool = False
) -> Counter:
    """parallelize/fsdp.py: all-gathers and reduce-scatters of a group of P elements over N ranks, and all-reduces over
    its R replicas, of b bytes a weight and s a gradient. experts: a separate group, sharded over efsdp."""
    axis, copies = ("efsdp", "experts.dp_replicate") if experts else ("fsdp", "dp_replicate")
    result = Counter()
    if N > 1:
        result += collective("all-gather", axis, P * b, N, gathers)
        result += collective("reduce-scatter", axis, P * s, N, scatters)
    if R > 1:
        result += collective("all-reduce", copies, P // N * s, R, sums)
    return result


def of_pp(stages: list[int], of: list[list[int]], M: int, size: int) -> Counter:
    """parallelize/pipeline.py, for the rank with `stages`, of the stages `of` every rank: M activations of `size` bytes
    arrive for each stage whose predecessor is on another rank, and M gradients for each whose successor is. The same
    numbers are sent."""
    last = max(s for rank in of for s in rank)
    away = sum(n not in stages for stage in stages for n in (stage - 1, stage + 1) if 0 <= n <= last)
    return Counter({("send", "pp", size): M * away}) + Counter({("receive", "pp", size): M * away})
