"""Every option, in one place: `--section.key value` on the command line over a strict TOML file over the defaults."""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Literal

from data import DatasetName
from errors import ConfigError
from model.args import ModelArgs
from options import option, read_options

DType = Literal["float32", "bfloat16", "float64"]


@dataclass
class Job:
    config_file: str = option("", "TOML file with any of the options below; command line only")
    description: str = option("", "free text, kept with the run")
    dump_folder: str = option("outputs", "where config.toml, metrics.jsonl, checkpoints and TensorBoard files go")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto is cuda where there is a GPU")


# [model]: a flavor, and any field of ModelArgs in place of the flavor's.
Model = make_dataclass(
    "Model",
    [("flavor", str, option("llama3_debug", "named size, see model/flavors.py, or hf:FOLDER: its config.json"))]
    + [(f.name, f.type | None, option(None, f"{f.metadata['help']} (none: the flavor's)")) for f in fields(ModelArgs)],
)


@dataclass
class Training:
    steps: int = option(200, "optimizer steps in all, counted over resumed runs", 1)
    seq_len: int = option(2048, "tokens a sequence", 1)
    local_batch_size: int = option(1, "sequences per data rank and microbatch", 1)
    global_batch_size: int = option(-1, "sequences per optimizer step; the rest is accumulated; -1: local x data ranks")
    max_norm: float = option(1.0, "gradients are clipped to this norm; 0: only measured", 0)
    seed: int = option(0, "of the initial weights and the order of the data", 0)
    deterministic: bool = option(False, "refuse kernels whose results vary from run to run")
    dtype: DType = option("float32", "of the weights and the optimizer's state")
    mixed_precision_param: DType = option("bfloat16", "weights are cast to this for forward and backward")
    mixed_precision_reduce: DType = option("float32", "gradients are summed over ranks in this")
    enable_cpu_offload: bool = option(False, "keep weights and optimizer state in CPU memory, update them there")
    max_skipped_steps: int = option(0, "steps in a row that may be skipped because their gradient is not finite", 0)
    loss_chunk_size: int = option(2048, "tokens whose logits exist at a time, to save memory; 0: all", 0)


@dataclass
class Optimizer:
    name: Literal["AdamW", "Adam"] = option("AdamW", "AdamW decouples the weight decay from the gradient")
    lr: float = option(3e-4, "highest learning rate", 0)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of the two moments")
    eps: float = option(1e-8, "added to the denominator", 0)
    weight_decay: float = option(0.1, "of all weights but norms", 0)
    decay_embeddings: bool = option(False, "whether the token embedding is decayed too")


@dataclass
class LRScheduler:
    warmup_steps: int = option(0, "steps of linear warm-up", 0)
    decay_ratio: float = option(
        1.0, "last part of the steps, in which the rate falls; 0: none, 1: all after warm-up", 0, 1
    )
    decay_type: Literal["linear", "cosine", "sqrt"] = option("cosine", "how it falls")
    min_lr_factor: float = option(0.1, "where it ends, as a part of optimizer.lr", 0, 1)


@dataclass
class Parallelism:
    data_parallel_replicate_degree: int = option(1, "copies of the model (HSDP; with shard degree 1: replication)", 1)
    data_parallel_shard_degree: int = option(-1, "ways each copy is sharded (FSDP); -1: all the ranks that are left")
    fsdp_reshard_after_forward: Literal["always", "never"] = option(
        "always", "free a block's gathered weights after forward; never: faster, keeps all weights through the step"
    )
    tensor_parallel_degree: int = option(1, "ways each weight is cut, and between blocks the sequence", 1)
    enable_async_tensor_parallel: bool = option(False, "overlap its collectives with matmuls (CUDA, compile)")
    context_parallel_degree: int = option(1, "ways each sequence is cut", 1)
    context_parallel_method: Literal["allgather", "alltoall", "latent"] = option(
        "allgather", "gather keys and values; exchange heads for tokens (Ulysses); gather the latents of MLA"
    )
    expert_parallel_degree: int = option(1, "ranks that share the experts; divides shard x context x tensor degree", 1)
    pipeline_parallel_degree: int = option(1, "ranks that share the layers, one after another", 1)
    pipeline_parallel_schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = option("1F1B", "order of the microbatches' forwards and backwards, see parallelize/pipeline.py")
    pipeline_parallel_microbatch_size: int = option(1, "sequences of a local batch that go through at a time", 1)
    pipeline_parallel_stages_per_rank: int = option(0, "0: 1, or 2 where the schedule interleaves", 0)


@dataclass
class ActivationCheckpoint:
    mode: Literal["none", "full", "selective", "memory_budget"] = option(
        "none", "what backward recomputes: nothing; every block; see selective_option; what the compiler finds cheap"
    )
    selective_option: str = option(
        "op", '"op" keeps what is dear to recompute; a number n: every n-th block is recomputed'
    )
    memory_budget: float = option(0.5, "memory_budget: the part of the activations that may be kept", 0, 1)


@dataclass
class Compile:
    enable: bool = option(False, "compile each block and the loss")
    backend: str = option("inductor", "torch.compile's backend")


@dataclass
class Float8:
    enable: bool = option(False, "matmuls of the blocks' linear layers in float8 (torchao)")
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = option(
        "tensorwise", "a scale per tensor, or per row"
    )
    skip: str = option("", "linear layers that stay as they are: comma-separated patterns, as in layers.0.*,*.wk")
    min_dim: int = option(0, "linear layers with fewer input or output channels stay as they are", 0)
    enable_fsdp_float8_all_gather: bool = option(False, "FSDP gathers weights in float8 (tensorwise)")
    emulate: bool = option(False, "compute in float32 what float8 hardware would: for tests")


@dataclass
class Checkpoint:
    enable: bool = option(False, "save, and resume from what is there")
    folder: str = option("checkpoint", "inside job.dump_folder")
    interval: int = option(500, "steps between saves; the last step is always saved", 1)
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = option(
        "disabled", "training waits for: the save; a copy in CPU memory; a copy made beside the next step (GPU)"
    )
    keep_latest_k: int = option(10, "older ones are deleted; 0: keep all", 0)
    keep_every: int = option(0, "those of every so many steps are never deleted; 0: none", 0)
    last_save_model_only: bool = option(False, "the last step's holds the weights alone: no run can go on from it")
    export_dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the weights saved alone")
    load_step: int = option(-1, "step to resume from; -1: the newest", -1)
    initial_load_path: str = option("", "a checkpoint's folder (.../step-N) whose weights a new run starts from")
    exclude_from_loading: str = option("", "left out of initial_load_path: names, or beginnings, comma-separated")
    initial_load_in_hf: bool = option(False, "initial_load_path is a Hugging Face folder: safetensors and config.json")


@dataclass
class Data:
    dataset: DatasetName = option(
        "python_stdlib", "python_stdlib needs no files; text reads path; shards reads what scripts/prepare_data.py made"
    )
    path: str = option(
        "", "file, folder or glob of text, .jsonl or .parquet files; shards: a folder, or several: A,B or A:0.7,B:0.3"
    )
    packing: Literal["concat", "documents"] = option(
        "concat", "documents in a sequence: one text, or each on its own (no attention across, positions from 0)"
    )
    text_key: str = option("text", "the field of a .jsonl line, or .parquet row, that holds the text")
    tokenizer: str = option(
        "bpe_4096", '"bpe_4096", "byte", a tiktoken encoding\'s name, or a tokenizer.model or .json'
    )
    cache_folder: str = option("outputs/cache", "where tokenised data is kept")
    num_workers: int = option(1, "processes a rank that fetch ahead; 0: none, it fetches when it needs", 0)


@dataclass
class Validation:
    enable: bool = option(False, "measure the loss of held-out sequences")
    interval: int = option(500, "steps between two times; the last step is always one", 1)
    num_sequences: int = option(512, "sequences, every time the same; training never sees them", 1)
    path: str = option("", "where they come from: a corpus's folder, or text; empty: held out of the training data")

    @property
    def num_held_out(self) -> int:
        """Sequences of the training data that are held out."""
        return self.num_sequences if self.enable and not self.path else 0


@dataclass
class Metrics:
    log_freq: int = option(10, "steps between logged ones", 1)
    enable_tensorboard: bool = option(False, "write TensorBoard files to job.dump_folder/tensorboard")


@dataclass
class Comm:
    timeout_seconds: int = option(600, "a collective that waits longer ends the run", 1)


@dataclass
class Config:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    float8: Float8 = field(default_factory=Float8)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    comm: Comm = field(default_factory=Comm)


def load_config(argv: list[str]) -> Config:
    """The configuration that a command line asks for. ValueError, in one line, for whatever is wrong with it."""
    config = Config()
    read_options(config, argv)
    _check(config)
    return config


def _check(config: Config) -> None:
    """What no single option can tell."""
    if config.training.global_batch_size < 1 and config.training.global_batch_size != -1:
        raise ConfigError(
            f"training.global_batch_size: expected -1 or more than 0, given {config.training.global_batch_size}."
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(
            f"optimizer.betas: expected two numbers from 0 to below 1, given {list(config.optimizer.betas)}."
        )
    p, recompute = config.parallelism, config.activation_checkpoint
    for option_name, takes_effect, needed in (
        *(
            (f"checkpoint.{key}", config.checkpoint.enable, "checkpoint.enable true")
            for key in ("load_step", "async_mode", "keep_every", "last_save_model_only")
        ),
        ("checkpoint.export_dtype", config.checkpoint.last_save_model_only, "checkpoint.last_save_model_only true"),
        *(
            (f"checkpoint.{key}", config.checkpoint.initial_load_path != "", "checkpoint.initial_load_path DIR")
            for key in ("initial_load_in_hf", "exclude_from_loading")
        ),
        ("parallelism.context_parallel_method", p.context_parallel_degree > 1, "parallelism.context_parallel_degree 2"),
        *(
            (
                f"parallelism.pipeline_parallel_{key}",
                p.pipeline_parallel_degree > 1,
                "parallelism.pipeline_parallel_degree 2",
            )
            for key in ("schedule", "microbatch_size", "stages_per_rank")
        ),
        (
            "parallelism.enable_async_tensor_parallel",
            p.tensor_parallel_degree > 1,
            "parallelism.tensor_parallel_degree 2",
        ),
        ("parallelism.enable_async_tensor_parallel", config.compile.enable, "compile.enable true"),
        (
            "activation_checkpoint.selective_option",
            recompute.mode == "selective",
            "activation_checkpoint.mode selective",
        ),
        (
            "activation_checkpoint.memory_budget",
            recompute.mode == "memory_budget",
            "activation_checkpoint.mode memory_budget",
        ),
        ("compile.backend", config.compile.enable, "compile.enable true"),
        *((f"float8.{f.name}", config.float8.enable, "float8.enable true") for f in fields(Float8)),
        *((f"validation.{f.name}", config.validation.enable, "validation.enable true") for f in fields(Validation)),
    ):
        section, key = option_name.split(".")
        table = getattr(config, section)
        if not takes_effect and getattr(table, key) != getattr(type(table)(), key):
            raise ConfigError(f"{option_name} has no effect without {needed}; add --{needed}.")
    if config.checkpoint.keep_every % config.checkpoint.interval:
        raise ConfigError(
            f"checkpoint.keep_every ({config.checkpoint.keep_every}) must be a multiple of checkpoint.interval "
            f"({config.checkpoint.interval}): other steps are not saved."
        )
    if recompute.mode == "memory_budget" and not config.compile.enable:
        raise ConfigError('activation_checkpoint.mode "memory_budget" is the compiler\'s; add --compile.enable true.')
    if p.pipeline_parallel_schedule in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        # They run a block's backward twice, once for its input and once for its weights.
        for name, is_on in (
            ("activation_checkpoint.mode", recompute.mode != "none"),
            ("compile.enable", config.compile.enable),
        ):
            if is_on:
                raise ConfigError(
                    f"{name} does not fit {p.pipeline_parallel_schedule}, which splits each block's backward in two: "
                    "each part would recompute it; use Interleaved1F1B, or leave it out."
                )
