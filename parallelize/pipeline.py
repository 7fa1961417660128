"""Pipeline parallelism with torch.distributed.pipelining: each rank of the pp axis runs some of the blocks.

Idea: the model is cut into stages, which run one after another. A batch is cut into M microbatches, which follow each
other through the stages, so that all stages work at the same time except for a bubble at both ends. Schedules differ in
the order of forwards and backwards. With P ranks:

    GPipe                  all forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965); bubble
                           (P-1) / (M+P-1) of the time; M microbatches' activations are kept
    1F1B                   the same bubble, at most P microbatches kept (Narayanan et al. 2021, arXiv:2104.04473)
    Interleaved1F1B        several stages a rank: the bubble falls as 1 / stages, communication grows as stages
    LoopedBFS              the same stages, all microbatches through one before the next (arXiv:2211.05953)
    InterleavedZeroBubble  backward cut in two: the gradient of the input at once, the gradient of the weights where
                           there would be a bubble (Qi et al. 2023, arXiv:2401.10241)
    ZBVZeroBubble          the same, two stages a rank in a V: rank r has r and 2P-1-r, so rank 0 the first and the last
    DualPipeV              the V of DeepSeek's DualPipe: forward and backward of two microbatches side by side

Who holds what: a rank has its stages, and FSDP shards only these. All ranks of the axis read the same samples: the
first stage uses the tokens, the last stage the labels, all stages the positions.

Messages per step: between neighbouring stages on different ranks, one activation [microbatch, seq / (cp x tp), dim] of
param_dtype per microbatch in forward, and its gradient in backward. The first step adds one small send per neighbour,
which creates the communicators. A tied embedding adds two messages, see `parallelize/tied_embedding.py`. With FSDP,
weights stay gathered through a schedule, and gradients are reduced once, after it, as for one microbatch whose weights
are not freed.

Proof: tests/test_one_step.py::test_pipeline_equals_one_process; the messages:
tests/test_communication.py::test_pipeline_messages_equal_formula,
tests/test_communication.py::test_fsdp_communicates_once_per_pipeline_schedule,
tests/test_communication_of_mixtures.py::test_pipeline_messages_equal_formula.
"""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from model import num_params

V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")
SPLIT_BACKWARD_SCHEDULES = ("InterleavedZeroBubble", *V_SCHEDULES)  # by input, then by weight


def parallelize_pipeline(model: nn.Module, mesh: DeviceMesh, schedule: str, stages_per_rank: int) -> list[nn.Module]:
    """This rank's stages of a model on meta, in the model's order: copies of the model, each without the parts of
    other stages; without a pipeline the model itself. stages_per_rank: see `num_stages_per_rank`."""
    if mesh.size() == 1:
        return [model]
    per_rank = num_stages_per_rank(schedule, stages_per_rank)
    num_stages = per_rank * mesh.size()
    counts = layers_per_stage(model, num_stages)
    stages = []
    for index in stage_indices(mesh.get_local_rank(), mesh.size(), schedule, per_rank):
        stage = copy.deepcopy(model)
        first = sum(counts[:index])
        for name in list(stage.layers):
            if not first <= int(name) < first + counts[index]:
                del stage.layers[name]
        is_last = index == num_stages - 1
        if index != 0 and not (is_last and model.args.n_mtp_layers):
            stage.tok_embeddings = None
        if not is_last:
            stage.norm = stage.output = None
            stage.mtp.clear()
        stages.append(stage)
    return stages


def num_stages_per_rank(schedule: str, asked: int) -> int:
    """Stages on each rank: `asked`, or for 0 the schedule's default: 2 if it interleaves stages, else 1."""
    return asked or (2 if interleaves(schedule) else 1)


def interleaves(schedule: str) -> bool:
    """Whether a rank has several stages under this schedule."""
    return issubclass(get_schedule_class(schedule), PipelineScheduleMulti)


def layers_per_stage(model: nn.Module, num_stages: int) -> list[int]:
    """The number of blocks of each stage, such that the heaviest stage is as light as possible. Embedding and head
    weigh as many blocks as have their number of parameters: both cost memory, and the head costs time too. A depth of
    multi-token prediction weighs a block and a head."""
    args = model.args
    block = (num_params(args, active=True) - args.vocab_size * args.dim) / args.n_layers
    embedding = args.vocab_size * args.dim / block
    weights = [1.0] * num_stages
    weights[0] += embedding
    weights[-1] += embedding + args.n_mtp_layers * (1 + embedding)
    counts = [1] * num_stages
    while sum(counts) < args.n_layers:
        lightest = weights.index(min(weights))
        weights[lightest] += 1
        counts[lightest] += 1
    return counts


def stage_indices(rank: int, size: int, schedule: str, per_rank: int) -> list[int]:
    """The numbers of the stages that a rank of the pp axis has."""
    return [rank, 2 * size - 1 - rank] if schedule in V_SCHEDULES else [rank + size * i for i in range(per_rank)]


def build_pipeline(
    stages: list[nn.Module],
    mesh: DeviceMesh,
    *,
    schedule: str,
    batch_size: int,
    microbatch_size: int,
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Callable[[dict[str, Tensor], Tensor], Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    """Two functions that run a batch of batch_size sequences through the stages. forward_backward(batch, num_tokens)
    returns this rank's part of the batch's loss divided by num_tokens, which is 0 except on the rank with the last
    stage. forward(batch), to be called without gradients, returns this rank's part of the undivided loss. seq_len and
    dtype are those of the activations between the stages."""
    size, rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
    rank_of = {i: r for r in range(size) for i in stage_indices(r, size, schedule, len(stages))}
    indices, num_stages = stage_indices(rank, size, schedule, len(stages)), len(stages) * size
    num_microbatches = batch_size // microbatch_size
    activation = dict(size=(microbatch_size, seq_len, stages[0].args.dim), dtype=dtype)
    # We give the shapes, so that torch need not infer them by an extra forward, which would count tokens of experts
    # twice. They must say what requires a gradient, or no gradient is sent.
    with torch.device("meta"):
        tokens = torch.empty(microbatch_size, seq_len, dtype=torch.int64)
        between = torch.empty(**activation, requires_grad=True)
        loss = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    pipeline_stages = []
    for stage, index in zip(stages, indices, strict=True):
        ends = (tokens if index == 0 else between,), (loss if index == num_stages - 1 else between,)
        pipeline_stages.append(PipelineStage(stage, index, num_stages, device, *ends, group=group))
    run = get_schedule_class(schedule)(
        pipeline_stages if interleaves(schedule) else pipeline_stages[0],
        num_microbatches,
        # The loss is divided here, before backward, by the whole step's tokens. Dividing gradients later would divide
        # them again in every accumulation (pytorch/torchtitan #1732, #2972).
        loss_fn=lambda loss_sum, num_tokens: (loss_sum / num_tokens).sum(),
        scale_grads=False,
    )

    def forward_backward(batch: dict[str, Tensor], num_tokens: Tensor) -> Tensor:
        losses = []
        target = num_tokens.expand(num_microbatches)  # a copy for each microbatch
        inputs = {name: tensor for name, tensor in batch.items() if name != "tokens"}
        tokens = [batch["tokens"]] if rank == 0 else []
        run.step(*tokens, **inputs, target=target, losses=losses, return_outputs=False)
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=device)

    # Torch's schedules are made for backwards, and their eval() makes the stages anew at every entry and exit. Here
    # each microbatch goes from stage to stage, and the next microbatch follows.
    def forward(batch: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for parts in zip(*(tensor.chunk(num_microbatches) for tensor in batch.values()), strict=True):
            inputs = dict(zip(batch, parts, strict=True))
            x = inputs.pop("tokens")
            for index, stage in zip(indices, stages, strict=True):
                if index > 0 and rank_of[index - 1] != rank:
                    x = torch.empty(**activation, device=device)
                    dist.recv(x, group=group, group_src=rank_of[index - 1])
                x = stage(x, **inputs)
                if index == num_stages - 1:
                    total += x
                elif rank_of[index + 1] != rank:
                    dist.send(x.contiguous(), group=group, group_dst=rank_of[index + 1])
        return total

    return forward_backward, forward
