"""What train.py makes from several sections of the options at once: with it the only file that sees all of them."""

from dataclasses import replace

import torch

from config import Config
from data import build_dataset
from errors import ConfigError
from hf import model_args_of_folder, require_same_model
from model import ModelArgs, Transformer, get_flavor
from parallelize import ParallelDims, ParallelMesh, apply_float8, parallelize, parallelize_pipeline, shard_sequence
from resilience.process_group import first_on_each_machine, require_same_on_all_ranks
from training.validation import Validation


def words(text: str) -> list[str]:
    """What a comma-separated option lists."""
    return [word.strip() for word in text.split(",") if word.strip()]


def degrees_of(config: Config) -> ParallelDims:
    p = config.parallelism
    return ParallelDims(
        pp=p.pipeline_parallel_degree,
        dp_replicate=p.data_parallel_replicate_degree,
        dp_shard=p.data_parallel_shard_degree,
        cp=p.context_parallel_degree,
        tp=p.tensor_parallel_degree,
        ep=p.expert_parallel_degree,
    )


def global_batch_size_of(config: Config, mesh: ParallelMesh) -> int:
    """Sequences of an optimizer step."""
    given = config.training.global_batch_size
    return config.training.local_batch_size * mesh.dp_degree if given == -1 else given


def model_args_of(config: Config) -> ModelArgs:
    """The flavor's shape (a named one's, or a Hugging Face folder's), with what was set in its place."""
    flavor, start = config.model.flavor, config.checkpoint
    overrides = {k: v for k, v in vars(config.model).items() if k != "flavor" and v is not None}
    shape = model_args_of_folder(flavor.removeprefix("hf:")) if flavor.startswith("hf:") else get_flavor(flavor)
    model_args = replace(shape, **overrides)
    if start.initial_load_in_hf and flavor != f"hf:{start.initial_load_path}":
        require_same_model(model_args, start.initial_load_path)
    return model_args


def build_stages(
    config: Config, model_args: ModelArgs, mesh: ParallelMesh, device_type: str, log=print
) -> list[torch.nn.Module]:
    """The whole model on meta, this rank's pipeline stages of it (the model itself where there is no pipeline), and
    every parallelism applied to each."""
    training, p, float8 = config.training, config.parallelism, config.float8
    with torch.device("meta"):
        model = Transformer(model_args, training.loss_chunk_size, global_batch_size_of(config, mesh))
    model.to(getattr(torch, training.dtype))
    if float8.enable:  # before the split, so that what is to be skipped is looked for in the whole model
        report = apply_float8(
            model,
            recipe=float8.recipe,
            skip=words(float8.skip),
            min_dim=float8.min_dim,
            emulate=float8.emulate,
            fsdp_all_gather=float8.enable_fsdp_float8_all_gather,
            device_type=device_type,
        )
        log(report)
    stages = parallelize_pipeline(
        model,
        mesh.pp,
        schedule=p.pipeline_parallel_schedule,
        stages_per_rank=p.pipeline_parallel_stages_per_rank,
    )
    for stage in stages:
        parallelize(
            stage,
            mesh,
            seq_len=training.seq_len,
            context_parallel_method=p.context_parallel_method,
            async_tensor_parallel=p.enable_async_tensor_parallel,
            recompute_mode=config.activation_checkpoint.mode,
            recompute_option=config.activation_checkpoint.selective_option,
            memory_budget=config.activation_checkpoint.memory_budget,
            compile_backend=config.compile.backend if config.compile.enable else None,
            param_dtype=getattr(torch, training.mixed_precision_param),
            reduce_dtype=getattr(torch, training.mixed_precision_reduce),
            reshard_after_forward=p.fsdp_reshard_after_forward == "always",
            cpu_offload=training.enable_cpu_offload,
        )
    return stages


def check_data_fits_model(model_args, tokenizer, seq_len: int) -> None:
    """ValueError when the tokenizer's ids or the positions go beyond what the model is made for."""
    if tokenizer.vocab_size > model_args.vocab_size:
        raise ConfigError(
            f"data.tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
            f"{model_args.vocab_size}; set --model.vocab_size {tokenizer.vocab_size} or take another tokenizer."
        )
    if seq_len > model_args.max_seq_len:
        raise ConfigError(
            f"training.seq_len ({seq_len}) is longer than model.max_seq_len ({model_args.max_seq_len}); shorten it, or "
            "raise model.max_seq_len if longer positions are meant."
        )


def build_validation(
    config: Config, dataset, tokenizer, stages, forward, mesh: ParallelMesh, device
) -> Validation | None:
    """What measures the loss of held-out sequences, or None."""
    options, training = config.validation, config.training
    if not options.enable:
        return None
    sample = dataset.held_out_sample
    if not holds_out(config):
        with first_on_each_machine():
            own = build_dataset(
                options.dataset,
                options.path,
                tokenizer,
                seq_len=training.seq_len,
                seed=0,
                packing=config.data.packing,
                text_key=config.data.text_key,
                cache_folder=config.data.cache_folder,
            )
        require_same_on_all_ranks(validation=own.fingerprint)
        if options.samples > len(own):
            raise ConfigError(f"validation.samples ({options.samples}) is more than there are: use at most {len(own)}.")
        sample = own.__getitem__
    return Validation(
        sample,
        options.samples,
        interval=options.interval,
        last_step=training.steps,
        batch_size=training.local_batch_size,
        data_rank=mesh.dp_rank,
        data_ranks=mesh.dp_degree,
        forward=forward,
        place=lambda batch: {k: v.to(device) for k, v in shard_sequence(batch, mesh.cp).items()},
        stages=stages,
        loss_mesh=mesh.loss,
        pp_mesh=mesh.pp,
    )


def holds_out(config: Config) -> bool:
    """Whether a part of the training data is held out."""
    return config.validation.enable and config.validation.dataset == "training"
