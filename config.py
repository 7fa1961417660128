"""Every option with its type, default and help. The command line (`--section.key value`) wins over the TOML file.

The values that an option may take are listed here and nowhere else. A section may be passed on whole, as the keywords
of the function that it configures: `build_optimizer(parameters, **vars(config.optimizer))`.
"""

from dataclasses import dataclass, fields, make_dataclass
from typing import Literal

import torch

from errors import ConfigError
from model.args import ModelArgs
from options import option, read_options, section

DType = Literal["float32", "bfloat16", "float64"]

# For option(needs=...): an option that differs from its default without them is an error.
TENSOR, CONTEXT, PIPELINE = (f"parallelism.{axis}_parallel_degree 2" for axis in ("tensor", "context", "pipeline"))
COMPILE, FLOAT8 = "compile.enable true", "float8.enable true"
CHECKPOINT, VALIDATION = "checkpoint.enable true", "validation.enable true"
INITIAL_LOAD = "checkpoint.initial_load_path DIR"


@dataclass
class Job:
    config_file: str = option("", "TOML file that sets any of these options; only on the command line")
    description: str = option("", "a note about the run, kept in config.toml")
    dump_folder: str = option("outputs", "folder for config.toml, metrics.jsonl, checkpoints and TensorBoard files")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is a GPU, else cpu")


@dataclass
class Training:
    steps: int = option(200, "optimizer steps in total; a resumed run counts on", 1)
    seq_len: int = option(2048, "tokens per sequence", 1)
    local_batch_size: int = option(1, "sequences per data-parallel rank in each forward and backward", 1)
    global_batch_size: int = option(-1, "sequences per step, accumulated; -1: local_batch_size x data-parallel ranks")
    max_norm: float = option(1.0, "largest global grad norm; larger gradients are scaled down to it; 0: no clipping", 0)
    seed: int = option(0, "seed of the initial weights and of the order of the data", 0)
    deterministic: bool = option(False, "use deterministic kernels only; an operation that has none is an error")
    dtype: DType = option("float32", "dtype of the weights and of the optimizer state")
    mixed_precision_param: DType = option("bfloat16", "dtype that weights are cast to for forward and backward")
    mixed_precision_reduce: DType = option("float32", "dtype in which gradients are summed over the ranks")
    enable_cpu_offload: bool = option(False, "keep weights and optimizer state in CPU memory, and update them there")
    max_skipped_steps: int = option(0, "steps in a row to skip if the gradient is not finite; 0: the run ends", 0)
    loss_chunk_size: int = option(2048, "tokens whose logits are in memory at the same time; 0: the whole batch", 0)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def param_dtype(self) -> torch.dtype:
        return getattr(torch, self.mixed_precision_param)

    @property
    def reduce_dtype(self) -> torch.dtype:
        return getattr(torch, self.mixed_precision_reduce)


@dataclass
class Data:
    dataset: Literal["python_stdlib", "text", "shards"] = option(
        "python_stdlib", "python_stdlib needs no files; text reads files; shards: made by scripts/prepare_data.py"
    )
    path: str = option(
        "", "text: a file, folder or glob; shards: a folder, or several with weights (A:0.7,B:0.3) or without (by size)"
    )
    packing: Literal["concat", "documents"] = option(
        "concat", "concat: tokens attend across documents; documents: each document alone, with positions from 0"
    )
    text_key: str = option("text", "field of a .jsonl line, or column of a .parquet file, that holds the text")
    tokenizer: str = option("bpe_4096", "bpe_4096, byte, a tiktoken encoding, a tokenizer.model or tokenizer.json file")
    cache_folder: str = option("outputs/cache", "folder for tokenized data, which later runs use again")
    num_workers: int = option(1, "processes per rank that load batches ahead; 0: the training process loads them", 0)


@dataclass
class Parallelism:
    data_parallel_replicate_degree: int = option(1, "replicas of the model (DDP; if they are sharded: HSDP)", 1)
    data_parallel_shard_degree: int = option(-1, "ranks that shard each replica (FSDP); -1: all ranks that are left")
    fsdp_reshard_after_forward: Literal["always", "never"] = option(
        "always", "always: a block's gathered weights are freed after its forward; never: faster, takes more memory"
    )
    tensor_parallel_degree: int = option(1, "ranks that split weight matrices, and the sequence between them", 1)
    enable_async_tensor_parallel: bool = option(False, "overlap its collectives with matmuls", needs=(TENSOR, COMPILE))
    context_parallel_degree: int = option(1, "ranks that split each sequence", 1)
    context_parallel_method: Literal["allgather", "alltoall", "latent"] = option(
        "allgather", "allgather: keys and values; alltoall: heads (Ulysses); latent: MLA's latents", needs=CONTEXT
    )
    expert_parallel_degree: int = option(1, "ranks that split the experts; divides shard x context x tensor degree", 1)
    pipeline_parallel_degree: int = option(1, "ranks that split the layers", 1)
    pipeline_parallel_schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = option("1F1B", "order of the microbatches' forwards and backwards; see parallelize/pipeline.py", needs=PIPELINE)
    pipeline_parallel_microbatch_size: int = option(1, "sequences per pipeline microbatch", 1, needs=PIPELINE)
    pipeline_parallel_stages_per_rank: int = option(
        0, "pipeline stages per rank; 0: 2 if the schedule interleaves stages, else 1", 0, needs=PIPELINE
    )

    @property
    def degrees(self) -> dict[str, int]:
        return dict(  # under the names of the mesh's axes
            dp_replicate=self.data_parallel_replicate_degree, dp_shard=self.data_parallel_shard_degree,
            pp=self.pipeline_parallel_degree, cp=self.context_parallel_degree,
            tp=self.tensor_parallel_degree, ep=self.expert_parallel_degree,
        )  # fmt: skip


@dataclass
class ActivationCheckpoint:
    mode: Literal["none", "full", "selective", "memory_budget"] = option(
        "none", "full: recompute all blocks; selective: see selective_option; memory_budget: the compiler chooses"
    )
    selective_option: str = option(
        "op",
        'selective: "op" keeps expensive results, "2" recomputes every 2nd block; memory_budget: part to keep, "0.5"',
        needs="activation_checkpoint.mode selective or memory_budget",
    )


@dataclass
class Compile:
    enable: bool = option(False, "compile the blocks and the loss")
    backend: str = option("inductor", "backend of torch.compile", needs=COMPILE)


@dataclass
class Float8:
    enable: bool = option(False, "compute the matmuls of the blocks' linear layers in float8")
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = option(
        "tensorwise", "one scale per tensor (the fastest) or per row; rowwise_with_gw_hp: the most exact", needs=FLOAT8
    )
    skip: list[str] = option([], 'linear layers left in high precision, as in ["layers.0.*", "*.wk"]', needs=FLOAT8)
    enable_fsdp_float8_all_gather: bool = option(
        False, "all-gather FSDP's weights in float8", needs=(FLOAT8, "float8.recipe tensorwise")
    )
    emulate: bool = option(False, "round to float8, but multiply in float32, on any device; for tests", needs=FLOAT8)


@dataclass
class Optimizer:
    name: Literal["AdamW", "Adam"] = option("AdamW", "AdamW decouples the weight decay from the gradient")
    lr: float = option(3e-4, "peak learning rate", 0)
    betas: tuple[float, float] = option((0.9, 0.95), "decay rates of the first and the second moment")
    eps: float = option(1e-8, "number that is added to the denominator", 0)
    weight_decay: float = option(0.1, "weight decay of all weights except norms and the token embedding; 0: none", 0)


@dataclass
class LRScheduler:
    warmup_steps: int = option(0, "steps in which the learning rate rises linearly to optimizer.lr", 0)
    decay_ratio: float = option(1.0, "final share of steps in which lr decays; 0: none; 1: all after warmup", 0, 1)
    decay_type: Literal["linear", "cosine", "sqrt"] = option("cosine", "shape of the decay; sqrt is steepest at first")
    min_lr_factor: float = option(0.1, "final learning rate as a fraction of optimizer.lr", 0, 1)


@dataclass
class Checkpoint:
    enable: bool = option(False, "save checkpoints, and resume from the newest one")
    folder: str = option("checkpoint", "folder of the checkpoints inside job.dump_folder")
    interval: int = option(500, "steps between saves; the last step is always saved", 1)
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = option(
        "disabled",
        "wait for the save; async: for a copy in CPU memory; async_with_pinned_mem: copy during the next step (GPU)",
        needs=CHECKPOINT,
    )
    keep_latest_k: int = option(10, "checkpoints to keep; older ones are deleted; 0: keep all", 0)
    keep_every: int = option(0, "steps between checkpoints that are never deleted; 0: none", 0, needs=CHECKPOINT)
    load_step: int = option(-1, "step to resume from; -1: the newest", -1, needs=CHECKPOINT)
    initial_load_path: str = option("", "checkpoint (.../step-N) whose weights a new run starts from")
    initial_load_in_hf: bool = option(False, "initial_load_path is a Hugging Face folder", needs=INITIAL_LOAD)
    exclude_from_loading: list[str] = option(
        [], 'parameters of initial_load_path to leave out, by beginnings of names: ["output"]', needs=INITIAL_LOAD
    )


@dataclass
class Validation:
    enable: bool = option(False, "measure the loss of sequences that are not trained on")
    interval: int = option(500, "steps between validations; the last step always has one", 1, needs=VALIDATION)
    num_sequences: int = option(512, "sequences per validation, each time the same", 1, needs=VALIDATION)
    path: str = option("", "shards, or text as in data.path; empty: held out of the training data", needs=VALIDATION)

    @property
    def num_held_out(self) -> int:
        return self.num_sequences if self.enable and not self.path else 0


@dataclass
class Metrics:
    log_freq: int = option(10, "steps between log lines; 1: every step", 1)
    enable_tensorboard: bool = option(False, "write TensorBoard files to job.dump_folder/tensorboard")


@dataclass
class Comm:
    timeout_seconds: int = option(600, "seconds after which a collective that does not finish ends the run", 1)
    direct_messages: bool = option(
        True, "CPU: FSDP sends messages, 2 to 3 times as fast as gloo's collectives", needs="job.device cpu"
    )


Model = make_dataclass(
    "Model",
    [("flavor", str, option("llama3_debug", "a size of model/flavors.py, or hf:FOLDER for the folder's config.json"))]
    + [(f.name, f.type | None, option(None, f.metadata["help"])) for f in fields(ModelArgs) if f.metadata["is_option"]],
)


@dataclass
class Config:
    job: Job = section(Job, "the recipe, the output folder and the device")
    training: Training = section(Training, "the length of the run, the batches and the dtypes")
    data: Data = section(Data, "what to train on")
    parallelism: Parallelism = section(Parallelism, "ranks along each axis of the mesh, and how each parallelism works")
    activation_checkpoint: ActivationCheckpoint = section(
        ActivationCheckpoint, "what backward recomputes, so that it need not be kept; see parallelize/activation.py"
    )
    compile: Compile = section(Compile, "torch.compile")
    float8: Float8 = section(Float8, "matmuls in float8; see parallelize/float8.py")
    optimizer: Optimizer = section(Optimizer, "Adam and its learning rate")
    lr_scheduler: LRScheduler = section(LRScheduler, "the learning rate over the steps: warmup, constant, decay")
    checkpoint: Checkpoint = section(Checkpoint, "saving, resuming, and starting from other weights")
    validation: Validation = section(Validation, "the loss of data that is not trained on")
    metrics: Metrics = section(Metrics, "what is logged to the console, metrics.jsonl and TensorBoard")
    comm: Comm = section(Comm, "communication between the ranks")
    model: Model = section(Model, "a flavor; an option that is set replaces the flavor's value")


def load_config(argv: list[str]) -> Config:
    """The configuration that a command line asks for. ConfigError, in one line, for whatever is wrong with it."""
    config = Config()
    read_options(config, argv)
    # What a type and two bounds cannot describe:
    batch, betas, checkpoint = config.training.global_batch_size, config.optimizer.betas, config.checkpoint
    if batch < 1 and batch != -1:
        raise ConfigError(f"training.global_batch_size: expected -1 or more than 0, given {batch}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas: expected two numbers from 0 to below 1, given {list(betas)}.")
    if checkpoint.keep_every % checkpoint.interval:
        raise ConfigError(
            f"checkpoint.keep_every ({checkpoint.keep_every}) must be a multiple of checkpoint.interval "
            f"({checkpoint.interval}): other steps are not saved."
        )
    return config
