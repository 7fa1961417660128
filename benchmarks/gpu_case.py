"""One case of `benchmark_gpu.py` in a process of its own: `gpu_case.py KIND FOLDER --section.key value ...`

    train      the trainer, as `python train.py` runs it; besides its metrics, what the allocator holds at three points
    plain      the plain loop below, with the same options
    profile    the trainer; one of its steps recorded by torch.profiler
    compile    the trainer, for what it leaves in the compiler's cache
    ceiling    single large matrix products, in bfloat16 and float8
    experts    the grouped product of DeepSeek-V2-Lite's experts, likewise (not a part of benchmark_gpu.py)

Imports what it needs, then waits for a line on stdin. Writes FOLDER/metrics.jsonl (the trainer's own or, by the same
class, the plain loop's) and FOLDER/facts.json.
"""

import importlib
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import train
from config import Config, load_config
from model import Transformer, flops_per_token
from parallelize import init_weights
from parallelize.activation import apply_activation_checkpointing
from parallelize.compile import apply_compile
from resilience import clean_exit
from resilience.process_group import init_distributed
from training.metrics import Metrics

PROFILED_AFTER, PROFILED_STEPS = 2, 1


def plain_loop(config: Config) -> None:
    """What the trainer is measured against: the model, compiled by block, random tokens, torch's clipping, fused AdamW.

    Weights in the dtype of computation need nothing else. Others have to be cast, and bare FSDP2 of one rank is the
    fastest way to it that torch has: the same work as the trainer's, with none of its settings.
    """
    training = config.training
    device = init_distributed(config.job.device, 600)
    args = train.model_args_of(config)
    with torch.device("meta"):
        model = Transformer(args, training.loss_chunk_size).to(getattr(torch, training.dtype))
    if config.float8.enable:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = replace(Float8LinearConfig.from_recipe_name(config.float8.recipe), emulate=config.float8.emulate)
        convert_to_float8_training(model, config=recipe, module_filter_fn=lambda _, name: name != "output")
    recompute = config.activation_checkpoint
    apply_activation_checkpointing(
        model, mode=recompute.mode, selective=recompute.selective_option, memory_budget=recompute.memory_budget
    )
    if config.compile.enable:
        apply_compile(model, backend=config.compile.backend)
    if training.dtype != training.mixed_precision_param:
        mesh = init_device_mesh(device.type, (1,))
        policy = MixedPrecisionPolicy(
            getattr(torch, training.mixed_precision_param), torch.float32, cast_forward_inputs=False
        )
        for module in (*model.layers.values(), model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    init_weights(model, args, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, betas=(0.9, 0.95), fused=True)
    batch, seq_len = training.local_batch_size, training.seq_len
    microbatches = max(1, training.global_batch_size // batch)
    positions = torch.arange(seq_len, device=device).expand(batch, seq_len)
    metrics = Metrics(
        config.job.dump_folder,
        device,
        total_steps=training.steps,
        flops_per_token=flops_per_token(args, seq_len),
        log_freq=config.metrics.log_freq,
        enable_tensorboard=False,
    )
    state = SimpleNamespace(step=0, tokens_seen=0)
    metrics.start(state)
    for step in range(1, training.steps + 1):
        total = torch.zeros((), device=device)
        for _ in range(microbatches):
            tokens = torch.randint(args.vocab_size, (batch, seq_len + 1), device=device)
            loss = model(tokens[:, :-1], positions, tokens[:, 1:]) / (microbatches * batch * seq_len)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.step, state.tokens_seen = step, step * microbatches * batch * seq_len
        if metrics.is_log_step(step):
            metrics.log(state, loss=total.item(), grad_norm=0.0, lr=config.optimizer.lr, data_seconds=0.0)


def ceiling(device: torch.device, size: int) -> dict[str, float]:
    """TFLOP/s of a product of two size x size matrices of random numbers (zeros run faster), the median of 20."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    products = {"bfloat16": lambda: a @ b.T}
    if device.type == "cuda":
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one, rows = torch.ones((), device=device), torch.ones(size, 1, device=device)
        options = dict(out_dtype=torch.bfloat16, use_fast_accum=True)
        products["float8 tensorwise"] = lambda: torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, **options)
        products["float8 rowwise"] = lambda: torch._scaled_mm(a8, b8.T, scale_a=rows, scale_b=rows.T, **options)
    return {name: 2 * size**3 / _seconds(product, device) / 1e12 for name, product in products.items()}


def experts(device: torch.device) -> dict[str, float]:
    """TFLOP/s of one grouped product of DeepSeek-V2-Lite's experts, forward and both of backward, compiled: 64 experts
    of 2,048 x 1,408 over 98,304 rows; in bfloat16, and by torchao's prototype in float8 rowwise, casts included."""
    from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm as in_float8

    groups, rows, d_in, d_out = 64, 98304, 2048, 1408
    ends = torch.arange(1, groups + 1, dtype=torch.int32, device=device) * (rows // groups)
    x, weight, gradient = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=grad)
        for shape, grad in (((rows, d_in), True), ((groups, d_out, d_in), True), ((rows, d_out), False))
    )
    products = {
        "experts bfloat16": torch.compile(lambda: torch.nn.functional.grouped_mm(x, weight.mT, offs=ends)),
        "experts float8 rowwise": torch.compile(
            lambda: in_float8(x, weight.mT, offs=ends, pad_token_groups_for_grouped_mm=False)
        ),
    }

    def both_ways(product) -> None:
        torch.autograd.grad(product(), (x, weight), gradient)

    return {
        name: 3 * 2 * rows * d_in * d_out / _seconds(lambda p=product: both_ways(p), device) / 1e12
        for name, product in products.items()
    }


def _seconds(function, device: torch.device) -> float:
    times = []
    for _ in range(25):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):  # so that starting and waiting for them does not count
            function()
        synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return median(times[5:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def watching_memory(facts: dict):
    """Notes the most bytes that the allocator holds where a step starts, after forward and before clipping. Counters
    only: nothing waits for the GPU."""
    held = torch.cuda.memory_allocated if torch.cuda.is_available() else lambda: 0
    build_stages, count_valid_tokens, clip_grad_norm = (
        train.build_stages,
        train.count_valid_tokens,
        train.clip_grad_norm,
    )

    def note(point: str) -> None:
        facts[point] = max(facts.get(point, 0), held())

    def watched_stages(*args, **kwargs):
        stages = build_stages(*args, **kwargs)
        for stage in stages:
            stage.register_forward_hook(lambda *_: note("after_forward"))
        return stages

    def watched_count(*args):
        note("at_step_start")
        return count_valid_tokens(*args)

    def watched_clip(*args):
        note("before_clip")
        return clip_grad_norm(*args)

    train.build_stages, train.count_valid_tokens, train.clip_grad_norm = watched_stages, watched_count, watched_clip
    yield
    if torch.cuda.is_available():
        stats = torch.cuda.memory_stats()
        facts["peak"], facts["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        # Not 0: the allocator had to hand memory back and ask again, and the speed is not the model's.
        facts["alloc_retries"] = stats["num_alloc_retries"]


@contextmanager
def profiling(folder: Path):
    """Records PROFILED_STEPS steps of the trainer in folder/trace.json, kernels only."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    profiler = profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU])
    count, steps = train.Metrics.count, 0

    def count_and_record(self, *args):
        nonlocal steps
        count(self, *args)
        steps += 1
        if steps == PROFILED_AFTER:
            synchronize(device)
            profiler.start()
        if steps == PROFILED_AFTER + PROFILED_STEPS:
            synchronize(device)
            profiler.stop()

    train.Metrics.count = count_and_record
    yield
    profiler.export_chrome_trace(str(folder / "trace.json"))


def main() -> None:
    kind, folder, options = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config([*options, "--job.dump_folder", str(folder)])
    facts = {"torch": torch.__version__}
    if config.compile.enable:
        importlib.import_module("torch._inductor.compile_fx")
    if config.float8.enable:
        importlib.import_module("torchao.float8")
    sys.stdin.readline()
    if kind == "train":
        with watching_memory(facts):
            train.main(config)
    elif kind == "compile":
        train.main(config)
    elif kind == "profile":
        with profiling(folder):
            train.main(config)
    elif kind == "plain":
        plain_loop(config)
    elif kind == "ceiling":
        is_cuda = config.job.device != "cpu" and torch.cuda.is_available()
        facts["ceiling"] = ceiling(torch.device("cuda" if is_cuda else "cpu"), 8192 if is_cuda else 256)
    elif kind == "experts":
        facts["experts"] = experts(torch.device("cuda"))
        print(facts["experts"])
    facts["machine"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    with clean_exit():
        main()
