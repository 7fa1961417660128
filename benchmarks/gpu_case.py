"""Runs one case of `benchmark_gpu.py`.

    python benchmarks/gpu_case.py KIND FOLDER --section.key value ...

KIND is one of

    train      the trainer, as `python train.py` runs it; also records the allocated memory at three points of a step
    plain      the plain loop below, with the same options
    profile    the trainer; torch.profiler records one step
    compile    the trainer; fills the compiler's cache
    ceiling    large matrix products, in bfloat16 and float8
    experts    the grouped product of DeepSeek-V2-Lite's experts, in bfloat16 and float8 (benchmark_gpu.py has no such
               case)

The process imports its modules, then waits for a line on stdin. It writes FOLDER/metrics.jsonl (the plain loop through
the trainer's class Metrics) and FOLDER/facts.json.
"""

import importlib
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import train
from checkpoint import TrainState
from config import Config, load_config
from hf import get_model_args
from model import Transformer, flops_per_token
from parallelize import apply_activation_checkpointing, apply_compile, init_weights
from resilience import clean_exit
from resilience.process_group import init_distributed
from training.metrics import Metrics

PROFILED_AFTER, PROFILED_STEPS = 2, 1


def plain_loop(config: Config) -> None:
    """A plain training loop over the same model: random tokens, blocks compiled one by one, torch's clipping, fused
    AdamW. The trainer's speed is divided by the speed of this loop.

    Where weights must be cast to the compute dtype, the loop uses FSDP2 on one rank, with torch's default settings: it
    is torch's fastest way to do so.
    """
    training = config.training
    device = init_distributed(config.job.device, 600)
    args = get_model_args(**vars(config.model))
    with torch.device("meta"):
        model = Transformer(args, training.loss_chunk_size).to(training.torch_dtype)
    if config.float8.enable:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = replace(Float8LinearConfig.from_recipe_name(config.float8.recipe), emulate=config.float8.emulate)
        convert_to_float8_training(model, config=recipe, module_filter_fn=lambda _, name: name != "output")
    apply_activation_checkpointing(model, **vars(config.activation_checkpoint))
    apply_compile(model, **vars(config.compile), param_dtype=training.param_dtype, separate_experts=False)
    if training.torch_dtype != training.param_dtype:
        mesh = init_device_mesh(device.type, (1,))
        policy = MixedPrecisionPolicy(training.param_dtype, torch.float32, cast_forward_inputs=False)
        for module in (*model.layers.values(), model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    init_weights(model, args, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, betas=(0.9, 0.95), fused=True)
    batch, seq_len = training.local_batch_size, training.seq_len
    microbatches = max(1, training.global_batch_size // batch)
    positions = torch.arange(seq_len, device=device).expand(batch, seq_len)
    flops, state = flops_per_token(args, seq_len), TrainState()
    metrics = Metrics(
        config.job.dump_folder, device, total_steps=training.steps, flops_per_token=flops, **vars(config.metrics)
    )
    metrics.start(state)
    for _ in range(training.steps):
        total = torch.zeros((), device=device)
        for _ in range(microbatches):
            tokens = torch.randint(args.vocab_size, (batch, seq_len + 1), device=device)
            loss = model(tokens[:, :-1], positions, tokens[:, 1:]) / (microbatches * batch * seq_len)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.advance(sequences=microbatches * batch, tokens=microbatches * batch * seq_len)
        if metrics.is_log_step(state.step):
            metrics.log(state, loss=total.item(), grad_norm=0.0, lr=config.optimizer.lr, data_seconds=0.0)


def ceiling(device: torch.device, size: int) -> dict[str, float]:
    """TFLOP/s of a product of two size x size matrices, by dtype; the median of 20 measurements. The matrices hold
    random numbers, because a GPU multiplies zeros faster."""
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
    """TFLOP/s of one grouped product of DeepSeek-V2-Lite's experts, compiled, with the two products of its backward: 64
    experts of 2,048 x 1,408 over 98,304 rows. In bfloat16, and in float8 rowwise by torchao's prototype, with the time
    of its casts."""
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
        for _ in range(4):  # so that the launch and the wait count less
            function()
        synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return median(times[5:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def watching_memory(facts: dict):
    """Records the largest number of allocated bytes at the start of a step, after forward, and before clipping. It
    reads counters of the allocator, so nothing waits for the GPU."""
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
        # If this is not 0, the allocator returned memory to the driver and requested it again: the speed is then not
        # the model's.
        facts["alloc_retries"] = stats["num_alloc_retries"]


@contextmanager
def profiling(folder: Path):
    """Records the kernels of PROFILED_STEPS steps of the trainer in folder/trace.json."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    profiler = profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU])
    advance = train.TrainState.advance

    def advance_and_record(state, **counts):
        advance(state, **counts)
        if state.step == PROFILED_AFTER:
            synchronize(device)
            profiler.start()
        if state.step == PROFILED_AFTER + PROFILED_STEPS:
            synchronize(device)
            profiler.stop()

    train.TrainState.advance = advance_and_record
    yield
    profiler.export_chrome_trace(str(folder / "trace.json"))


def main() -> None:
    if len(sys.argv) < 3:
        print(__doc__)
        return
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
