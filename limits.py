"""The combinations of options that do not work, on one page: each with its reason, and the torch version if it matters.

train.py calls `check_layout` once, before it reads data. Each function below yields a message for each rule of its
group that the configuration breaks. A message names the option, its value and the cure. config.py checks what one
option alone can tell, parallelize/mesh.py whether the degrees multiply to the number of ranks.

Proof: tests/test_bad_layouts.py::test_layout_is_refused_in_one_line.
"""

from collections.abc import Iterator
from re import sub

import torch

from config import Config
from data import Tokenizer
from errors import ConfigError
from model import ModelArgs, Transformer
from parallelize import ParallelMesh
from parallelize.float8 import choose_layers, linear_layers
from parallelize.pipeline import SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES, interleaves, num_stages_per_rank
from torch_private import torch_at_least


def check_layout(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> None:
    """ConfigError, in one line, for the first rule that the configuration breaks."""
    for group in (device, data, tensor, context, experts, pipeline, recomputation, float8):
        for message in group(config, args, mesh, tokenizer):
            raise ConfigError(message)


def device(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> Iterator[str]:
    if mesh.world.device_type != "cpu":
        return
    if config.training.enable_cpu_offload:
        yield "training.enable_cpu_offload has no effect where the device is the CPU; leave it out."
    if config.parallelism.enable_async_tensor_parallel:
        yield "parallelism.enable_async_tensor_parallel needs GPUs with symmetric memory; leave it out."
    if config.checkpoint.async_mode == "async_with_pinned_mem":
        yield 'checkpoint.async_mode "async_with_pinned_mem" needs a GPU to copy from; use "async".'


def data(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> Iterator[str]:
    if tokenizer.vocab_size > args.vocab_size:
        yield (
            f"data.tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
            f"{args.vocab_size}; set --model.vocab_size {tokenizer.vocab_size} or take another tokenizer."
        )
    if config.training.seq_len > args.max_seq_len:
        yield (
            f"training.seq_len ({config.training.seq_len}) is longer than model.max_seq_len ({args.max_seq_len}); "
            "shorten it, or raise model.max_seq_len if longer positions are meant."
        )


def tensor(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> Iterator[str]:
    """A matrix, and the sequence, is cut into equal parts."""
    tp, seq_len = mesh.degrees.tp, config.training.seq_len // mesh.degrees.cp
    sizes = {
        "model.n_heads": args.n_heads,
        "model.n_kv_heads": args.n_kv_heads,
        "model.hidden_dim": args.hidden_dim if args.n_dense_layers or not args.n_experts else 0,
        "model.n_shared_experts x model.moe_hidden_dim": args.n_shared_experts * args.moe_hidden_dim,
        "model.vocab_size": args.vocab_size,
        "the sequence length of a context rank": seq_len,
    }
    fitting = [n for n in range(1, args.n_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
    for name, size in sizes.items():
        if size % tp != 0:
            yield f"parallelism.tensor_parallel_degree ({tp}) must divide {name} ({size}); use one of {fitting}."


def context(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> Iterator[str]:
    cp, tp, seq_len = mesh.degrees.cp, mesh.degrees.tp, config.training.seq_len
    method = config.parallelism.context_parallel_method
    if cp == 1:
        return
    if seq_len % (2 * cp) != 0:
        below = seq_len // (2 * cp) * 2 * cp
        yield (
            f"training.seq_len ({seq_len}) must be a multiple of 2 x parallelism.context_parallel_degree ({cp}): "
            f"each rank takes one part from the head and one from the tail; use {below} or {below + 2 * cp}."
        )
    if method == "latent" and args.attention != "mla":
        yield (
            f'parallelism.context_parallel_method "latent" gathers the latents of model.attention "mla", but it is '
            f'"{args.attention}"; use "allgather".'
        )
    for name, heads in (("model.n_heads", args.n_heads), ("model.n_kv_heads", args.n_kv_heads)):
        if method == "alltoall" and heads // tp % cp != 0:
            yield (
                f'parallelism.context_parallel_method "alltoall" needs context_parallel_degree ({cp}) to divide '
                f'{name} / tensor_parallel_degree ({heads} / {tp} = {heads // tp}); use "allgather".'
            )


def experts(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> Iterator[str]:
    option = f"parallelism.expert_parallel_degree ({mesh.degrees.ep})"
    if mesh.degrees.ep > 1 and args.n_experts == 0:
        yield f"{option} needs a mixture of experts, model.n_experts is 0; leave it out."
    if args.n_experts % mesh.degrees.ep != 0:
        yield f"{option} must divide model.n_experts ({args.n_experts}); use one of {divisors(args.n_experts)}."


def pipeline(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> Iterator[str]:
    p, pp, schedule = config.parallelism, mesh.degrees.pp, config.parallelism.pipeline_parallel_schedule
    if pp == 1:
        return
    asked, per_rank = p.pipeline_parallel_stages_per_rank, num_stages_per_rank(schedule, 0)
    splits_backward = schedule in SPLIT_BACKWARD_SCHEDULES
    if asked and asked != per_rank and (schedule in V_SCHEDULES or not interleaves(schedule)):
        yield f"parallelism.pipeline_parallel_stages_per_rank ({asked}) must be {per_rank} for {schedule}."
    if splits_backward and args.n_mtp_layers > (0 if args.tie_embeddings else 1):
        # torch would begin the weight's backward at each of its uses, and run into the later uses a second time.
        yield (
            f"{schedule} cuts each backward in two, which cannot be where the last stage uses the embedding at several "
            f"depths: model.n_mtp_layers is {args.n_mtp_layers}, model.tie_embeddings "
            f"{str(args.tie_embeddings).lower()}; use Interleaved1F1B."
        )
    if splits_backward and args.n_mtp_layers and not torch_at_least(2, 12):
        # Sharded by FSDP, the last stage's copy of the embedding would lose its gradient (seen in 2.11, not in 2.13).
        yield (
            f"{schedule} with multi-token prediction (model.n_mtp_layers {args.n_mtp_layers}) needs torch 2.12: in "
            f"{torch.__version__} a gradient of the embedding is lost; use Interleaved1F1B."
        )
    per_rank = asked or per_rank
    num_stages = per_rank * pp
    if num_stages > args.n_layers:
        yield (
            f"parallelism.pipeline_parallel_degree ({pp}) x {per_rank} stages a rank needs {num_stages} "
            f"layers, model.n_layers is {args.n_layers}; use a degree of at most {args.n_layers // per_rank}."
        )
    yield from microbatches(config, schedule, pp, num_stages)
    if schedule in V_SCHEDULES and mesh.world.device_type == "cpu" and not torch_at_least(2, 12):
        yield f"{schedule} on CPUs needs torch 2.12: in {torch.__version__} gloo cannot send to its own rank."
    # A schedule that splits backward runs a block's backward twice, for its input and for its weights. A checkpointed
    # block would be recomputed for each ("full": ten times) or has lost its saved values ("op"). A compiled block has
    # one backward for both: torch 2.11 fails to run it for the weights alone, and 2.13 runs all of it twice.
    has_checkpoints, compiles = config.activation_checkpoint.mode != "none", config.compile.enable
    for name, is_on in (("activation_checkpoint.mode", has_checkpoints), ("compile.enable", compiles)):
        if is_on and splits_backward:
            yield (
                f"{name} does not fit {schedule}, which splits each block's backward in two: "
                "each part would recompute it; use Interleaved1F1B, or leave it out."
            )


def microbatches(config: Config, schedule: str, pp: int, num_stages: int) -> Iterator[str]:
    """torch's schedules ask for enough microbatches to fill the pipeline, or for rounds of equal length."""
    batch_size, size = config.training.local_batch_size, config.parallelism.pipeline_parallel_microbatch_size
    option = f"parallelism.pipeline_parallel_microbatch_size ({size})"
    batch = f"training.local_batch_size ({batch_size})"
    if batch_size % size != 0:
        yield f"{option} must divide {batch}; use one of {divisors(batch_size)}."
    given = batch_size // size
    least = {"1F1B": pp, "DualPipeV": num_stages}.get(schedule, 1)
    rounds = max(1, given // pp) if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") else 1
    if given < least or given % rounds != 0:
        need = f"at least {least} microbatches" if given < least else f"microbatches in rounds: a multiple of {pp}"
        yield (
            f"{schedule} with {num_stages} stages needs {need}, but {batch} / {option} gives {given}; "
            "change one of them."
        )


def recomputation(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> Iterator[str]:
    mode, option = config.activation_checkpoint.mode, config.activation_checkpoint.selective_option
    name = f'activation_checkpoint.selective_option ("{option}")'
    if mode == "selective" and option != "op" and not (option.isdecimal() and 1 <= int(option) <= args.n_layers):
        yield (
            f'{name} must be "op" or a number n from 1 to {args.n_layers} (model.n_layers): every n-th block is '
            "recomputed."
        )
    if mode == "memory_budget" and not is_fraction(option):
        yield f'{name} must be a number from 0 to 1 with activation_checkpoint.mode "memory_budget", as in "0.5".'
    if mode == "memory_budget" and not config.compile.enable:
        yield 'activation_checkpoint.mode "memory_budget" is the compiler\'s; add --compile.enable true.'
    recomputes_collectives = mode in ("full", "memory_budget") or (mode == "selective" and option != "op")
    if config.compile.enable and mesh.degrees.tp > 1 and recomputes_collectives and torch_at_least(2, 12):
        # The compiler takes the DeviceMesh of a recomputed collective for a tensor (seen in 2.13, not in 2.11).
        yield (
            f"torch {torch.__version__} cannot compile blocks that recompute the collectives of tensor parallelism; "
            'set activation_checkpoint.mode to "selective" with selective_option "op", which keeps them, or to "none".'
        )


def float8(config: Config, args: ModelArgs, mesh: ParallelMesh, tokenizer: Tokenizer) -> Iterator[str]:
    """Layers that compute with a rank's part of a weight, as a local tensor, would scale it by this part's values."""
    if not config.float8.enable or mesh.degrees.tp == 1:
        return
    with torch.device("meta"):
        converted, _ = choose_layers(linear_layers(Transformer(args)), config.float8.skip)
    of_latents = ("wq", "wq_a", "wq_b", "wkv_a", "wkv_b") if args.attention == "mla" else ()
    local = sorted(name for name in converted if name.split(".")[-1] in (*of_latents, "eh_proj"))
    if local:
        patterns = ", ".join(dict.fromkeys(f'"{sub("[0-9]+", "*", name)}"' for name in local))
        yield (
            "float8 does not fit latent attention or multi-token prediction under tensor parallelism; add "
            f"{patterns} to float8.skip, or set parallelism.tensor_parallel_degree to 1."
        )


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def is_fraction(text: str) -> bool:
    """Whether a text is a number from 0 to 1."""
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
