"""DeepSeek-V3 671B on the 2,048 ranks of its recipe, simulated on one core: the place of each element of each
parameter, and a step of the real `train.main`.

Each simulated rank is a process with a fake process group, which sends nothing, and fake tensors, which have a shape
and a dtype but no memory. So the shapes and dtypes of a step are real, and its values are not.
"""

from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.recipes import parameters_by_stage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from config import load_config
from hf import get_model_args
from model import get_flavor
from parallelize import build_mesh, expert
from parallelize.init import indices_at

RECIPE = Path(__file__).parent.parent / "configs" / "deepseek_v3_671b.toml"
RANKS, STAGES, EP = 2048, 16, 64
STAGE = RANKS // STAGES  # ranks of a stage; they have consecutive numbers
EFSDP = STAGE // EP
LAYERS = [3, 5, *[4] * 13, 1]  # by stage: the first stage has the embedding, the last has the head and the MTP layer
ARGS = get_flavor("deepseek_v3_671b")


def start_fake(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)


def rows_of(name: str, shape: torch.Size, rank: int) -> range:
    """The range of whole rows of a parameter that a rank of its stage should hold, from the rank's number alone."""
    place = rank % STAGE
    if ".moe.experts." in name:  # an ep rank has consecutive experts; its efsdp ranks share them
        efsdp, ep = divmod(place, EP)
        here = shape[0] // STAGE
        first = ep * shape[0] // EP + efsdp * here
    else:  # FSDP's parts have equal size, except for those of the last ranks, which may be smaller or empty
        here = -(-shape[0] // STAGE)
        first = place * here
    return range(min(first, shape[0]), min(first + here, shape[0]))


def _check_places(rank: int) -> tuple[set[str], dict[str, list[int]]]:
    """Builds a rank's stage and checks which rank holds which part of it. Returns the names of its parameters, and the
    ranks that it communicates with on each axis."""
    import train

    start_fake(rank)
    config = load_config([f"--job.config_file={RECIPE}", "--compile.enable=false"])
    mesh = build_mesh("cpu", RANKS, **config.parallelism.degrees)
    args = get_model_args(**vars(config.model))
    (stage,) = train.build_stages(config, args, mesh, config.training.global_batch_size)
    checked = set()
    for name, p in stage.named_parameters():
        rows, others = rows_of(name, p.shape, rank), p.shape[1:]
        assert list(p.to_local().shape) == [len(rows), *others], name
        kind = (p.shape, p.placements, p.device_mesh, ".moe.experts." in name)
        if kind not in checked:
            everywhere = [indices_at(p, c, "cpu") for c in product(*map(range, p.device_mesh.shape))]
            for place, (first, *rest) in enumerate(everywhere):  # in the order of the ranks
                assert first.tolist() == list(rows_of(name, p.shape, place)), (name, place)
                assert [len(r) for r in rest] == list(others), (name, place)
            assert torch.cat([first for first, *_ in everywhere]).sort().values.tolist() == list(range(len(p))), name
            checked.add(kind)
    axes = dict(pp=mesh.pp, fsdp=mesh.fsdp, ep=mesh.ep, efsdp=mesh.efsdp, tokens=mesh.tokens)
    names = {name for name, _ in stage.named_parameters()}
    return names, {axis: dist.get_process_group_ranks(m.get_group()) for axis, m in axes.items()}


@pytest.mark.parametrize("rank", [0, 127, 1000, 2047])
def test_671b_rank_holds_its_part_of_each_parameter(rank):
    """A rank has the layers of its stage and no others, and of each parameter the part that follows from its number.
    The ranks of a stage together hold each element once. On each axis the rank communicates with the right ranks."""
    names, axes = run_ranks(1, _check_places, rank)[0]
    stage, place = divmod(rank, STAGE)
    is_first, is_last = stage == 0, stage == STAGES - 1
    first_layer = sum(LAYERS[:stage])
    expected = {f"layers.{i}" for i in range(first_layer, first_layer + LAYERS[stage])}
    expected |= {"tok_embeddings.weight"} if is_first or is_last else set()
    expected |= {"norm.weight", "output.weight", "mtp.0"} if is_last else set()
    assert {".".join(name.split(".")[:2]) for name in names} == expected
    assert any(".moe.experts." in name for name in names) != is_first  # the first three blocks are dense
    start, efsdp = stage * STAGE, place // EP
    assert axes == dict(
        pp=list(range(place, RANKS, STAGE)),
        fsdp=list(range(start, start + STAGE)),
        ep=list(range(start + efsdp * EP, start + (efsdp + 1) * EP)),
        efsdp=list(range(start + place % EP, start + STAGE, EP)),
        tokens=list(range(start, start + STAGE)),
    )


class ItemIsOne(TorchDispatchMode):
    """Makes `.item()` return 1: a tensor without memory has no value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return function(*args, **(kwargs or {}))


def _one_step_on(rank: int, folder: str, text: str) -> dict:
    """Runs `train.main` for one step, and returns what was recorded of it. These are not real: the process group, the
    memory, the initial values, and the choice of the routers, which is balanced. The pipeline's schedule reads what it
    receives, so the stage runs one microbatch without it. Nothing is compiled or saved."""
    import resilience.run
    import train
    from model import moe

    seen = dict(experts=[], gradients={}, counted=[])
    without_memory = ExitStack()
    real = dict(vars(train)) | dict(experts_grouped=moe.experts_grouped, update=train.ExpertLoadBalancer.update)

    def init_distributed(*_):
        start_fake(rank)
        return torch.device("cpu")

    def build_stages(*args):
        stages = real["build_stages"](*args)
        # Only from here on: the mesh needs real tensors for its slices.
        without_memory.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        without_memory.enter_context(ItemIsOne())
        return stages

    def build_forward_backward(config, stages, mesh, device):
        (stage,) = stages
        arrives = torch.empty(1, config.training.seq_len, ARGS.dim, dtype=torch.bfloat16, requires_grad=True)

        def forward_backward(batch, num_tokens):
            seen["batch"] = tuple(batch["tokens"].shape)
            inputs = {name: tensor[:1] for name, tensor in batch.items()}
            tokens = inputs.pop("tokens")
            result = stage(arrives if mesh.pp.get_local_rank() > 0 else tokens, **inputs)
            seen["result"] = tuple(result.shape), result.dtype
            (result / num_tokens).sum().backward()
            return result.detach().sum()

        return forward_backward, None

    def to_lists(sent, received):
        assert sent.shape == received.shape == (EP,)
        rows = config.training.seq_len * ARGS.top_k // EP
        return [rows] * EP, [rows] * EP

    def experts_grouped(rows, counts, *weights):
        seen["experts"].append([tuple(x.shape) for x in (rows, counts, *weights)])
        return real["experts_grouped"](rows, counts, *weights)

    def build_optimizer(parameters, **options):
        seen["parameters"], seen["optimizer"] = parameters, real["build_optimizer"](parameters, **options)
        return seen["optimizer"]

    def clip_grad_norm(*args):
        for name, p in seen["parameters"].items():
            is_alike = p.grad.placements == p.placements and p.grad.to_local().shape == p.to_local().shape
            seen["gradients"][name] = is_alike, p.grad.dtype
        return real["clip_grad_norm"](*args)

    def update(balancer):
        real["update"](balancer)
        seen["counted"] += balancer.shares

    def all_gather_object(everywhere, mine, group=None):
        everywhere[:] = [mine] * len(everywhere)

    arguments = [f"--job.config_file={RECIPE}", f"--job.dump_folder={folder}", f"--data.cache_folder={folder}"]
    arguments += ["--data.dataset=text", f"--data.path={text}", "--data.tokenizer=byte", "--training.steps=1"]
    arguments += ["--checkpoint.enable=false", "--compile.enable=false", "--data.num_workers=0"]
    config = load_config(arguments)
    replaced = {
        resilience.run: (init_distributed,),
        train: (build_stages, build_forward_backward, build_optimizer, clip_grad_norm),
        train.ExpertLoadBalancer: (update,),
        moe: (experts_grouped,),
        expert: (to_lists,),
        dist: (all_gather_object,),
    }
    with pytest.MonkeyPatch.context() as patch, without_memory:
        patch.setattr(train, "init_weights", lambda *_: None)
        for place, functions in replaced.items():
            for function in functions:
                patch.setattr(place, function.__name__, function)
        train.main(config)
    parameters, optimizer = seen.pop("parameters"), seen.pop("optimizer")
    seen["updated"] = [name for name, p in parameters.items() if {"exp_avg", "exp_avg_sq"} <= optimizer.state[p].keys()]
    return seen


@pytest.mark.parametrize("rank", [0, 1000, 2047], ids=["first stage", "middle stage", "last stage"])
def test_671b_step_updates_every_parameter(rank, tmp_path):
    """`train.main` runs one stage's forward, backward with recomputation, clipping, optimizer step and update of expert
    biases. Each expert gets its rows; each parameter gets a float32 gradient, sharded like itself, and an update."""
    (tmp_path / "text.txt").write_text("abcdefg " * 2000)
    seen = run_ranks(1, _one_step_on, rank, str(tmp_path), str(tmp_path / "text.txt"))[0]
    stage = rank // STAGE
    is_last = stage == STAGES - 1
    assert seen["batch"] == (120, 4096)
    assert seen["result"] == (((), torch.float32) if is_last else ((1, 4096, ARGS.dim), torch.bfloat16))
    # A rank receives as many rows as it sends, for the experts of its ep rank, gathered over efsdp. Blocks are
    # recomputed, so each block's experts run twice.
    mixtures = [i for i in range(sum(LAYERS[:stage]), sum(LAYERS[: stage + 1])) if i >= ARGS.n_dense_layers]
    mixtures += [ARGS.n_layers] if is_last else []  # the block of multi-token prediction
    n, d, f = ARGS.n_experts // EP, ARGS.dim, ARGS.moe_hidden_dim
    rows = (4096 * ARGS.top_k, d)
    assert seen["experts"] == [[rows, (n,), (n, d, f), (n, f, d), (n, d, f)]] * (2 * len(mixtures))
    assert seen["counted"] == mixtures
    assert set(seen["gradients"].values()) == {(True, torch.float32)}
    assert seen["updated"] == list(seen["gradients"])
    # All parameters of the stage, except for the last stage's copy of the embedding, which the first stage updates.
    held = parameters_by_stage(load_config([f"--job.config_file={RECIPE}"]), STAGES)[stage]
    assert set(seen["updated"]) == held.keys() - ({"tok_embeddings.weight"} if is_last else set())
