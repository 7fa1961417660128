"""Nano-Train: the whole training run, top to bottom.

    python train.py --job.config_file configs/llama3_debug.toml                        one process, CPU or one GPU
    torchrun --nproc_per_node=8 train.py --job.config_file configs/llama3_8b.toml      eight GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...     two machines

Any option of config.py goes on the command line, `--section.key value`; `--help` lists them.
"""

import os
import sys
import time
from types import SimpleNamespace

from errors import ConfigError

STARTED = time.perf_counter()  # before torch, whose import is most of a cold start

import torch
import torch.distributed as dist

from assembly import (
    build_stages,
    build_validation,
    check_data_fits_model,
    degrees_of,
    global_batch_size_of,
    holds_out,
    model_args_of,
    words,
)
from checkpoint import CheckpointManager, ModelState
from config import Config, load_config
from data import build_dataset, build_loader, build_tokenizer
from model import flops_per_token, mtp_targets, num_params
from parallelize import (
    ParallelMesh,
    TiedEmbedding,
    build_mesh,
    build_pipeline,
    init_weights,
    materialize,
    set_is_last_backward,
    shard_sequence,
    sync_float8_scales,
)
from resilience import NonFiniteGuard, Run, clean_exit
from training.balance import ExpertLoadBalancer
from training.loss import count_valid_tokens, sum_over
from training.lr_schedule import learning_rate
from training.metrics import Metrics
from training.optimizer import build_optimizer, clip_grad_norm


def main(config: Config) -> int:
    """Trains, and returns the process's exit status: 0 after the last step, EXIT_PREEMPTED after a signal."""
    training = config.training
    run = Run(
        config.job.dump_folder,
        device=config.job.device,
        timeout_seconds=config.comm.timeout_seconds,
        seed=training.seed,
        deterministic=training.deterministic,
    )
    device, log = run.device, run.log
    if training.enable_cpu_offload and device.type == "cpu":
        raise ConfigError("training.enable_cpu_offload has no effect where the device is the CPU; leave it out.")
    if config.parallelism.enable_async_tensor_parallel and device.type == "cpu":
        raise ConfigError("parallelism.enable_async_tensor_parallel needs GPUs with symmetric memory; leave it out.")
    if config.checkpoint.async_mode == "async_with_pinned_mem" and device.type == "cpu":
        raise ConfigError('checkpoint.async_mode "async_with_pinned_mem" needs a GPU to copy from; use "async".')

    # The ranks as a five-dimensional grid.
    mesh = build_mesh(degrees_of(config), device.type, dist.get_world_size())

    # What is read: text, through a tokenizer, as samples that depend on nothing but (data, seed, number of the sample).
    tokenizer = build_tokenizer(config.data.tokenizer)
    with run.first_on_each_machine():
        dataset = build_dataset(
            config.data.dataset,
            config.data.path,
            tokenizer,
            seq_len=training.seq_len,
            seed=training.seed,
            packing=config.data.packing,
            held_out=config.validation.samples if holds_out(config) else 0,
            weights=config.data.weights,
            text_key=config.data.text_key,
            cache_folder=config.data.cache_folder,
        )
    data_fingerprint = f"{dataset.fingerprint} seed {training.seed} seq_len {training.seq_len} {config.data.packing}"
    if holds_out(config):
        data_fingerprint += f" held out {config.validation.samples}"
    run.require_same_on_all_ranks(configuration=str({**vars(config), "job": None}), data=data_fingerprint)
    global_batch_size = global_batch_size_of(config, mesh)

    # What is trained. 1) shapes, on meta: this rank's part of the model
    model_args = model_args_of(config)
    check_data_fits_model(model_args, tokenizer, training.seq_len)
    stages = build_stages(config, model_args, mesh, device.type, log)
    # 2) memory  3) values, the same in any layout
    for stage in stages:
        materialize(stage, device, cpu_offload=training.enable_cpu_offload)
        init_weights(stage, model_args, training.seed)
    shared = TiedEmbedding(stages, mesh.pp, schedule=config.parallelism.pipeline_parallel_schedule)
    named = [item for stage in stages for item in stage.named_parameters()]
    parameters = {name: parameter for name, parameter in named if not shared.is_copy(parameter)}
    balance = ExpertLoadBalancer(stages, mesh.tokens, mesh.pp)

    optimizer = build_optimizer(
        parameters,
        name=config.optimizer.name,
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        decay_embeddings=config.optimizer.decay_embeddings,
    )

    # Where it stands: at the beginning, or where an earlier run has left it.
    step = tokens_seen = samples_consumed = 0
    checkpoint = CheckpointManager(
        os.path.join(config.job.dump_folder, config.checkpoint.folder),
        trained=ModelState(parameters, balance.biases, optimizer, model_args),
        enable=config.checkpoint.enable,
        interval=config.checkpoint.interval,
        async_mode=config.checkpoint.async_mode,
        keep_latest_k=config.checkpoint.keep_latest_k,
        keep_every=config.checkpoint.keep_every,
        last_save_dtype=getattr(torch, config.checkpoint.export_dtype)
        if config.checkpoint.last_save_model_only
        else None,
    )
    resumed = checkpoint.load(
        config.checkpoint.load_step,
        config.checkpoint.initial_load_path,
        config.checkpoint.initial_load_in_hf,
        exclude=words(config.checkpoint.exclude_from_loading),
    )
    sync_derived_weights(stages, shared)
    if resumed is not None:
        step, tokens_seen, samples_consumed = resumed["step"], resumed["tokens_seen"], resumed["samples_consumed"]
        log(f"resumed at step {step} ({tokens_seen:,} tokens seen)")
        if resumed["data_fingerprint"] != data_fingerprint:
            log("warning: data, tokenizer, seed or seq_len is not that checkpoint's; samples go on in the new order")

    loader = build_loader(
        dataset,
        global_batch_size=global_batch_size,
        local_batch_size=training.local_batch_size,
        data_rank=mesh.dp_rank,
        data_ranks=mesh.dp_degree,
        samples_consumed=samples_consumed,
        num_workers=config.data.num_workers,
    )
    batches = iter(loader)
    metrics = Metrics(
        config.job.dump_folder,
        device,
        total_steps=training.steps,
        flops_per_token=flops_per_token(model_args, training.seq_len),
        **vars(config.metrics),
    )
    run.save_config(config)
    log(
        f"{config.model.flavor}: {num_params(model_args):,} parameters on {dist.get_world_size()} x {device.type}, "
        f"layout {mesh.degrees}; {global_batch_size} sequences of {training.seq_len} tokens a step; "
        f"set up in {time.perf_counter() - STARTED:.1f} s"
    )

    forward_backward, forward = build_forward_backward(config, stages, mesh, device)
    validation = build_validation(config, dataset, tokenizer, stages, forward, mesh, device)

    guard = NonFiniteGuard(parameters, training.max_skipped_steps)
    keeps_weights = config.parallelism.fsdp_reshard_after_forward == "never"
    state = SimpleNamespace(step=step, tokens_seen=tokens_seen)
    metrics.start(state)
    while step < training.steps and not run.should_stop():
        # ---------------------------------------------------------------------------------------- the step
        microbatches = [add_mtp_targets(batch, model_args.n_mtp_layers) for batch in next(batches)]
        microbatches = [shard_sequence(batch, mesh.cp) for batch in microbatches]
        microbatches = [{k: v.to(device, non_blocking=True) for k, v in batch.items()} for batch in microbatches]
        num_tokens = count_valid_tokens(microbatches, mesh.loss)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(microbatches):
            set_is_last_backward(stages, is_last=i == len(microbatches) - 1, keeps_weights=keeps_weights)
            loss = loss + forward_backward(batch, num_tokens)
        shared.reduce_gradient()
        grad_norm = clip_grad_norm(parameters.values(), training.max_norm, mesh.pp, device)
        lr = learning_rate(step, lr=config.optimizer.lr, total_steps=training.steps, **vars(config.lr_scheduler))
        for group in optimizer.param_groups:
            group["lr"] = lr
        checkpoint.wait_for_staging()  # of the last save: nothing before this has changed a weight
        if guard.is_finite(step + 1, grad_norm, loss):
            optimizer.step()
            balance.update()
            sync_derived_weights(stages, shared)
        else:
            balance.forget()
        optimizer.zero_grad()
        step += 1
        # ------------------------------------------------------------------------------- everything else
        tokens_seen += global_batch_size * training.seq_len
        state.step, state.tokens_seen = step, tokens_seen
        held_out = validation.run(step) if validation else {}
        if metrics.is_log_step(step) or held_out:
            metrics.log(
                state,
                loss=sum_over(loss, mesh.loss, mesh.pp).item(),
                grad_norm=grad_norm,
                lr=lr,
                data_seconds=loader.take_seconds_waited(),
                skipped_steps=guard.skipped,
                failed_saves=checkpoint.failed_saves,
                **balance.report(),
                **held_out,
            )
        numbers = dict(
            tokens_seen=tokens_seen, samples_consumed=loader.samples_consumed, data_fingerprint=data_fingerprint
        )
        checkpoint.maybe_save(step, is_last=step == training.steps, **numbers)
    if config.checkpoint.enable and step < training.steps:
        checkpoint.save(step, **numbers)
    checkpoint.close()
    is_saved = checkpoint.saved_step == step if config.checkpoint.enable else None
    metrics.close()
    return run.close(step=step, is_saved=is_saved)


def build_forward_backward(config: Config, stages: list[torch.nn.Module], mesh: ParallelMesh, device: torch.device):
    """A function of (batch, num_tokens): this rank's part of the batch's loss, divided by num_tokens, the valid tokens
    of the whole step; see training/loss.py. Gradients are summed: over batches, and over ranks. And a
    function of a batch alone, for where no gradient is wanted: this rank's part of its summed loss."""
    training, p = config.training, config.parallelism
    if mesh.degrees.pp > 1:
        return build_pipeline(
            stages,
            mesh.pp,
            schedule=p.pipeline_parallel_schedule,
            batch_size=training.local_batch_size,
            microbatch_size=p.pipeline_parallel_microbatch_size,
            seq_len=training.seq_len // (mesh.degrees.cp * mesh.degrees.tp),
            dtype=getattr(torch, training.mixed_precision_param),
            device=device,
        )

    (model,) = stages

    def forward(batch):
        return model(batch["tokens"], **{name: tensor for name, tensor in batch.items() if name != "tokens"})

    def forward_backward(batch, num_tokens):
        loss = forward(batch) / num_tokens
        loss.backward()
        return loss.detach()

    return forward_backward, forward


def add_mtp_targets(batch: dict, depth: int) -> dict:
    """The batch and, for multi-token prediction, the tokens behind each of its tokens: while sequences are whole."""
    return batch | mtp_targets(batch["tokens"], batch["labels"], depth) if depth else batch


def sync_derived_weights(stages, shared) -> None:
    """What is derived from the weights follows them: the copy of a shared one, and float8's scales."""
    shared.broadcast_weight()
    for stage in stages:
        sync_float8_scales(stage)


if __name__ == "__main__":
    with clean_exit():
        sys.exit(main(load_config(sys.argv[1:])))
