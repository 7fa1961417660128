"""Nano-Train: the whole training run, top to bottom.

    python train.py --job.config_file configs/llama3_debug.toml                        one process, CPU or one GPU
    torchrun --nproc_per_node=8 train.py --job.config_file configs/llama3_8b.toml      eight GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...     two machines

Any option of config.py goes on the command line, `--section.key value`; `--help` lists them.
"""

import sys
import time

STARTED = time.perf_counter()  # before torch, whose import is most of a cold start

import torch
import torch.distributed as dist

from checkpoint import CheckpointManager, ModelState, TrainState
from config import Config, load_config
from data import build_dataset, build_loader, build_tokenizer, build_validation_samples
from hf import get_model_args
from limits import check_layout
from model import ModelArgs, Transformer, add_mtp_targets, flops_per_token, num_params
from parallelize import (
    ParallelMesh,
    TiedEmbedding,
    apply_activation_checkpointing,
    apply_compile,
    apply_float8,
    build_mesh,
    build_pipeline,
    check_parameters,
    init_weights,
    materialize,
    parallelize_context,
    parallelize_data,
    parallelize_experts,
    parallelize_pipeline,
    parallelize_tensor,
    set_is_last_backward,
    shard_sequence,
    sync_float8_scales,
)
from resilience import NonFiniteGuard, Run, clean_exit
from training.balance import ExpertLoadBalancer
from training.gloo import use_direct_messages
from training.loss import count_valid_tokens, sum_over
from training.lr_schedule import learning_rate
from training.metrics import Metrics
from training.optimizer import build_optimizer, clip_grad_norm
from training.validation import Validation


def main(config: Config) -> int:
    """Trains, and returns the exit status of the process: 0 after the last step, EXIT_PREEMPTED after a signal."""
    job, training, p, data, comm = config.job, config.training, config.parallelism, config.data, config.comm

    # The process group and this rank's device. Also the lock of the dump folder, the signals that ask the run to stop,
    # and the watchdog that ends it when a rank fails: resilience/run.py.
    run = Run(job.dump_folder, job.device, comm.timeout_seconds, training.seed, training.deterministic)
    device, log = run.device, run.log

    # The ranks as a grid of five axes: pp x dp_replicate x dp_shard x cp x tp. Drawn in parallelize/mesh.py.
    mesh = build_mesh(device.type, dist.get_world_size(), timeout_seconds=comm.timeout_seconds, **p.degrees)
    global_batch_size = training.global_batch_size
    if global_batch_size == -1:
        global_batch_size = training.local_batch_size * mesh.dp_degree

    # The model's shape, the tokenizer, and whether all of the configuration goes together.
    initial_hf_folder = config.checkpoint.initial_load_path if config.checkpoint.initial_load_in_hf else ""
    model_args = get_model_args(initial_hf_folder=initial_hf_folder, **vars(config.model))
    tokenizer = build_tokenizer(data.tokenizer)
    check_layout(config, model_args, mesh, tokenizer)

    # Data: sample i is a pure function of (data, seed, i), so every layout trains on the same batches.
    with run.first_on_each_machine():  # the other ranks find the tokenised text in the cache
        cache = dict(text_key=data.text_key, cache_folder=data.cache_folder)
        order = dict(seq_len=training.seq_len, seed=training.seed, packing=data.packing)
        num_held_out = config.validation.num_held_out
        dataset = build_dataset(data.dataset, data.path, tokenizer, num_held_out=num_held_out, **order, **cache)
        num, path = config.validation.num_sequences, config.validation.path
        validation_samples = build_validation_samples(path, dataset, tokenizer, num_sequences=num, **cache)
    fingerprints = dict(data=dataset.fingerprint, validation=validation_samples.dataset.fingerprint)
    run.require_same_on_all_ranks(configuration=str({**vars(config), "job": None}), **fingerprints)

    # Model. 1) Shapes on meta: this rank's pipeline stages, with every parallelism applied; see build_stages below.
    stages = build_stages(config, model_args, mesh, global_batch_size, log)
    # 2) Memory. 3) Values, bitwise the same in any layout.
    for stage in stages:
        materialize(stage, device, cpu_offload=training.enable_cpu_offload)
        init_weights(stage, model_args, training.seed)
    tied = TiedEmbedding(stages, mesh.pp, schedule=p.pipeline_parallel_schedule)
    parameters = tied.unique_parameters(stages)  # by name; a tied weight is in it once
    balancer = ExpertLoadBalancer(stages, mesh.tokens, mesh.pp)
    forward_backward, forward = build_forward_backward(config, stages, mesh, device)

    # The optimizer, over the parameters of all stages of this rank. Its state has the dtype of the weights.
    optimizer = build_optimizer(parameters, **vars(config.optimizer))

    # Resume from a checkpoint, in whatever layout it was saved, or start at step 0.
    state = TrainState(data_fingerprint=dataset.fingerprint)
    model_state = ModelState(parameters, balancer.biases, optimizer, model_args)
    checkpoint = CheckpointManager(job.dump_folder, model_state, **vars(config.checkpoint))
    checkpoint.load(state)
    sync_derived_weights(stages, tied)

    # Batches: a step is a list of microbatches, whose gradients are accumulated.
    batch_sizes = dict(global_batch_size=global_batch_size, local_batch_size=training.local_batch_size)
    share = dict(dp_rank=mesh.dp_rank, dp_degree=mesh.dp_degree, samples_consumed=state.samples_consumed)
    loader = build_loader(dataset, **batch_sizes, **share, num_workers=data.num_workers)

    def to_this_rank(batch: dict) -> dict:
        """This rank's part of every sequence of a batch, on its device."""
        return {k: v.to(device, non_blocking=True) for k, v in shard_sequence(batch, mesh.cp).items()}

    # What observes the run: held-out loss, logs, and the guard against gradients that are not finite.
    when = dict(interval=config.validation.interval, last_step=training.steps, batch_size=training.local_batch_size)
    validation = Validation(validation_samples, stages, mesh, forward, to_this_rank, **when)
    work = dict(total_steps=training.steps, flops_per_token=flops_per_token(model_args, training.seq_len))
    metrics = Metrics(job.dump_folder, device, **work, **vars(config.metrics))
    guard = NonFiniteGuard(parameters, training.max_skipped_steps)
    run.save_config(config)
    log(
        f"{config.model.flavor}: {num_params(model_args):,} parameters on {dist.get_world_size()} x {device.type}, "
        f"layout {mesh.degrees}; {global_batch_size} sequences of {training.seq_len} tokens a step; "
        f"set up in {time.perf_counter() - STARTED:.1f} s"
    )

    # The loop. The step changes the weights; everything else only validates, reports and saves.
    metrics.start(state)
    while state.step < training.steps and not run.should_stop():
        # ---------------------------------------------------------------------------------------- the step
        microbatches = [to_this_rank(add_mtp_targets(batch, model_args.n_mtp_layers)) for batch in next(loader)]
        num_tokens = count_valid_tokens(microbatches, mesh.loss)  # of the whole step: the loss is divided by it once
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(microbatches):
            is_last = i == len(microbatches) - 1
            set_is_last_backward(stages, is_last, reshard_after_backward=p.fsdp_reshard_after_forward == "always")
            loss = loss + forward_backward(batch, num_tokens)
        tied.reduce_gradient()
        grad_norm = clip_grad_norm(parameters.values(), training.max_norm, mesh.pp, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step, group["initial_lr"], training.steps, **vars(config.lr_scheduler))
        checkpoint.wait_for_staging()  # the last asynchronous save may still be copying the weights
        if guard.is_finite(state.step + 1, grad_norm, loss):
            optimizer.step()
            balancer.update()
            sync_derived_weights(stages, tied)
        else:
            balancer.reset()
        optimizer.zero_grad()
        state.advance(sequences=global_batch_size, tokens=global_batch_size * training.seq_len)
        # ------------------------------------------------------------------------------- everything else
        held_out_loss = validation.maybe_run(state.step)
        if metrics.is_log_step(state.step) or held_out_loss:
            metrics.log(
                state,
                loss=sum_over(loss, mesh.loss, mesh.pp).item(),
                grad_norm=grad_norm,
                lr=optimizer.param_groups[0]["lr"],
                data_seconds=loader.take_seconds_waited(),
                skipped_steps=guard.skipped,
                failed_saves=checkpoint.failed_saves,
                **balancer.report(),
                **held_out_loss,
            )
        checkpoint.maybe_save(state, is_last=state.step == training.steps)

    # The end: a run that was asked to stop is saved here, and all ranks leave together.
    is_saved = checkpoint.finish(state)
    metrics.close()
    return run.close(step=state.step, is_saved=is_saved)


def build_stages(
    config: Config, args: ModelArgs, mesh: ParallelMesh, sequences_per_step: int, log=print
) -> list[torch.nn.Module]:
    """This rank's pipeline stages of the model (the model itself without a pipeline), on meta, with every parallelism
    applied in the one order in which they compose. Each function does nothing where its axis has size 1."""
    training, p = config.training, config.parallelism
    with torch.device("meta"):
        model = Transformer(args, training.loss_chunk_size, sequences_per_step).to(training.torch_dtype)
    # Before the model is cut into stages, so that float8.skip's patterns are checked against the names of all layers.
    if line := apply_float8(model, mesh.world.device_type, **vars(config.float8)):
        log(line)
    stages = parallelize_pipeline(model, mesh.pp, p.pipeline_parallel_schedule, p.pipeline_parallel_stages_per_rank)
    for stage in stages:
        # Attention sees the whole sequence, of which each rank has a part.
        parallelize_context(stage, mesh.cp, method=p.context_parallel_method, seq_len=training.seq_len)
        # Each weight matrix is cut, and the activations between the blocks are sharded along the sequence.
        parallelize_tensor(stage, mesh.tp, use_async=p.enable_async_tensor_parallel)
        # Experts live on different ranks, and tokens travel to them.
        parallelize_experts(stage, mesh.ep, mesh.sequence)
        # Before compile, so that the recomputed region is inside of the graph.
        apply_activation_checkpointing(stage, **vars(config.activation_checkpoint))
        # Before FSDP, whose hooks must stay outside of the graphs.
        separate_experts = mesh.efsdp is not None
        apply_compile(
            stage, **vars(config.compile), param_dtype=training.param_dtype, separate_experts=separate_experts
        )
        # Last: FSDP, HSDP or replication shards what the others have left of each weight.
        parallelize_data(
            stage,
            mesh.fsdp,
            mesh.efsdp,
            param_dtype=training.param_dtype,
            reduce_dtype=training.reduce_dtype,
            # A stage runs many forwards and backwards in a row: gathering its weights for each would be slow.
            reshard_after_forward=p.fsdp_reshard_after_forward == "always" and mesh.degrees.pp == 1,
            cpu_offload=training.enable_cpu_offload,
        )
        if config.comm.direct_messages:
            use_direct_messages(stage)  # on CPUs: 2 to 3 times as fast as gloo's collectives
        check_parameters(stage, mesh)  # no parameter was forgotten
    return stages


def build_forward_backward(config: Config, stages: list[torch.nn.Module], mesh: ParallelMesh, device: torch.device):
    """Two functions. forward_backward(batch, num_tokens) computes gradients and returns this rank's part of the batch's
    loss: a sum over tokens, divided by num_tokens before backward, so that every gradient reduction is a plain sum (see
    training/loss.py). forward(batch) returns the same sum, undivided, for validation."""
    training, p = config.training, config.parallelism
    if mesh.degrees.pp > 1:
        return build_pipeline(
            stages,
            mesh.pp,
            schedule=p.pipeline_parallel_schedule,
            batch_size=training.local_batch_size,
            microbatch_size=p.pipeline_parallel_microbatch_size,
            seq_len=training.seq_len // (mesh.degrees.cp * mesh.degrees.tp),
            dtype=training.param_dtype,
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


def sync_derived_weights(stages: list[torch.nn.Module], tied: TiedEmbedding) -> None:
    """Updates what is derived from the weights, after these have changed: the last stage's copy of a tied embedding,
    and the scales of float8 weights."""
    tied.broadcast_weight()
    for stage in stages:
        sync_float8_scales(stage)


if __name__ == "__main__":
    with clean_exit():
        sys.exit(main(load_config(sys.argv[1:])))
