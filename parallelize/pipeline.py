"""Pipeline parallelism with torch.distributed.pipelining: each rank of the pp axis runs some of the blocks.

Idea: the model is cut in stages, one after another. A batch is cut in M microbatches, which follow each other through
the stages, so that all stages work at once, but for a bubble at both ends. Schedules differ in the order of forwards
and backwards. With P ranks:

    GPipe                  all forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965); bubble
                           (P-1) / (M+P-1) of the time; M microbatches' activations are kept
    1F1B                   the same bubble, at most P microbatches kept (Narayanan et al. 2021, arXiv:2104.04473)
    Interleaved1F1B        several stages a rank: the bubble falls as 1 / stages, communication grows as stages
    LoopedBFS              the same stages, all microbatches through one before the next (arXiv:2211.05953)
    InterleavedZeroBubble  backward cut in two: the gradient of the input at once, that of the weights when there
                           would be a bubble (Qi et al. 2023, arXiv:2401.10241)
    ZBVZeroBubble          the same, two stages a rank in a V: rank r has r and 2P-1-r, so rank 0 the first and the last
    DualPipeV              the V of DeepSeek's DualPipe: forward and backward of two microbatches side by side

Who holds what: a rank its stages, and of FSDP's shards only theirs. All ranks of the axis read the same samples; the
first stage uses the tokens, the last one the labels, all the positions.

Messages per step: between neighbouring stages on different ranks, one stream [microbatch, seq / (cp x tp), dim] of
param_dtype per microbatch in forward, and its gradient in backward; for an embedding that the last stage uses too (as
the head, or for multi-token prediction), where they are on different ranks, the gradient of a rank's shard of it to the
first stage and its value back, in the weight's own dtype. (The first step begins with a greeting.) With FSDP, weights
stay gathered through a schedule, and gradients are reduced once, after it: as for one microbatch whose weights are not
freed.

Proof: tests/test_parity.py; the messages: tests/test_communication.py and test_communication_of_mixtures.py.
"""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.distributed.tensor import DTensor

from errors import ConfigError
from model import num_params

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")  # by input, then by weight


def parallelize_pipeline(model: nn.Module, mesh: DeviceMesh, *, schedule: str, stages_per_rank: int) -> list[nn.Module]:
    """This rank's stages of a model on meta, in the order of the model: copies of it, each without what is elsewhere.
    stages_per_rank 0: what the schedule is made for, 1 or 2. ValueError if the schedule or the model does not allow
    it."""
    if mesh.size() == 1:
        return [model]
    args = model.args
    per_rank = _stages_per_rank(schedule, stages_per_rank)
    if schedule in SPLIT_BACKWARD and (args.n_mtp_layers > 1 or (args.tie_embeddings and args.n_mtp_layers)):
        # torch would begin the weight's backward at each of its uses, and run into the uses below a second time.
        tied = str(args.tie_embeddings).lower()
        raise ConfigError(
            f"{schedule} cuts each backward in two, which cannot be where the last stage uses the embedding at several "
            f"depths: model.n_mtp_layers is {args.n_mtp_layers}, model.tie_embeddings {tied}; use Interleaved1F1B."
        )
    if schedule in SPLIT_BACKWARD and args.n_mtp_layers and torch.__version__ < "2.12":
        # Sharded by FSDP, the last stage's copy of the embedding would lose its gradient (seen in 2.11, not in 2.13).
        raise ConfigError(
            f"{schedule} with multi-token prediction (model.n_mtp_layers {args.n_mtp_layers}) needs torch 2.12: in "
            f"{torch.__version__} a gradient of the embedding is lost; use Interleaved1F1B."
        )
    num_stages = per_rank * mesh.size()
    if num_stages > args.n_layers:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree ({mesh.size()}) x {per_rank} stages a rank needs {num_stages} "
            f"layers, model.n_layers is {args.n_layers}; use a degree of at most {args.n_layers // per_rank}."
        )
    counts = layers_per_stage(model, num_stages)
    stages = []
    for index in stage_indices(mesh.get_local_rank(), mesh.size(), schedule, per_rank):
        stage = copy.deepcopy(model)
        first = sum(counts[:index])
        for name in list(stage.layers):
            if not first <= int(name) < first + counts[index]:
                del stage.layers[name]
        is_last = index == num_stages - 1
        if index != 0 and not (is_last and args.n_mtp_layers):
            stage.tok_embeddings = None
        if not is_last:
            stage.norm = stage.output = None
            stage.mtp.clear()
        stages.append(stage)
    return stages


def layers_per_stage(model: nn.Module, num_stages: int) -> list[int]:
    """How many blocks each stage gets: the heaviest stage is as light as can be. Embedding and head weigh what their
    parameters weigh in blocks: memory for both, and for the head time as well. A block weighs what works on a token, a
    depth of multi-token prediction as a block and the head."""
    args = model.args
    block = (num_params(args, active=True) - args.vocab_size * args.dim) / args.n_layers
    embedding = args.vocab_size * args.dim / block
    weights = [1.0] * num_stages
    weights[0] += embedding
    weights[-1] += embedding + args.n_mtp_layers * (1 + embedding)
    counts = [1] * num_stages
    for _ in range(len(model.layers) - num_stages):
        lightest = weights.index(min(weights))
        weights[lightest] += 1
        counts[lightest] += 1
    return counts


def stage_indices(rank: int, size: int, schedule: str, per_rank: int) -> list[int]:
    """Which stages a rank has."""
    if schedule in V_SHAPED:
        return [rank, 2 * size - 1 - rank]
    return [rank + size * i for i in range(per_rank)]


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
    """A function of (batch, num_tokens) that runs forward and backward of a batch of batch_size sequences through the
    stages, and returns this rank's part of its loss divided by num_tokens: 0 but on the rank with the last stage. And
    one of a batch that runs forward alone, where no gradient is wanted, and returns its part of the summed loss.

    seq_len is that of the stream between the stages, dtype its dtype. ValueError if the schedule cannot be run with so
    many microbatches."""
    cls, per_rank = get_schedule_class(schedule), len(stages)
    num_stages, num_microbatches = per_rank * mesh.size(), batch_size // microbatch_size
    _require_enough_microbatches(schedule, mesh.size(), num_stages, batch_size, microbatch_size)
    if schedule in V_SHAPED and device.type == "cpu" and torch.__version__ < "2.12":
        raise ConfigError(
            f"{schedule} on CPUs needs torch 2.12: in {torch.__version__} gloo cannot send to its own rank."
        )
    stream = dict(size=(microbatch_size, seq_len, stages[0].args.dim), dtype=dtype)
    pipeline_stages = []
    indices = stage_indices(mesh.get_local_rank(), mesh.size(), schedule, per_rank)
    for stage, index in zip(stages, indices, strict=True):
        # Shapes are told, not found out by a forward more. They must say what wants a gradient, or none is sent.
        with torch.device("meta"):
            tokens = torch.empty(microbatch_size, seq_len, dtype=torch.int64)
            loss = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
            inputs = tokens if index == 0 else torch.empty(**stream, requires_grad=True)
            outputs = loss if index == num_stages - 1 else torch.empty(**stream, requires_grad=True)
        pipeline_stages.append(
            PipelineStage(stage, index, num_stages, device, (inputs,), (outputs,), group=mesh.get_group())
        )
    run = cls(
        pipeline_stages if issubclass(cls, PipelineScheduleMulti) else pipeline_stages[0],
        num_microbatches,
        # Divided here, before backward, by the whole step's tokens; dividing gradients later would divide them again
        # in every accumulation (pytorch/torchtitan #1732, #2972).
        loss_fn=lambda loss_sum, num_tokens: (loss_sum / num_tokens).sum(),
        scale_grads=False,
    )
    is_first = mesh.get_local_rank() == 0

    def forward_backward(batch: dict[str, Tensor], num_tokens: Tensor) -> Tensor:
        losses = []
        run.step(
            *([batch["tokens"]] if is_first else []),
            positions=batch["positions"],
            **{name: batch[name] for name in batch if name not in ("tokens", "positions")},
            target=num_tokens.expand(num_microbatches),  # a copy for each microbatch
            losses=losses,
            return_outputs=False,
        )
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=device)

    return forward_backward, _forward_alone(stages, mesh, schedule, num_microbatches, stream, device)


def _forward_alone(
    stages: list[nn.Module],
    mesh: DeviceMesh,
    schedule: str,
    num_microbatches: int,
    stream: dict,
    device: torch.device,
) -> Callable[[dict[str, Tensor]], Tensor]:
    """See `build_pipeline`. A schedule is made for backwards (and its own eval() makes its stages anew whenever it is
    entered, and left). Here each microbatch just goes from stage to stage, and the next one follows it."""
    size, rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
    rank_of = {i: r for r in range(size) for i in stage_indices(r, size, schedule, len(stages))}
    last = len(stages) * size - 1

    def forward(batch: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for parts in zip(*(tensor.chunk(num_microbatches) for tensor in batch.values()), strict=True):
            inputs = dict(zip(batch, parts, strict=True))
            x = inputs.pop("tokens")
            for index, stage in zip(stage_indices(rank, size, schedule, len(stages)), stages, strict=True):
                if index > 0 and rank_of[index - 1] != rank:
                    x = torch.empty(**stream, device=device)
                    dist.recv(x, group=group, group_src=rank_of[index - 1])
                x = stage(x, **inputs)
                if index == last:
                    total += x
                elif rank_of[index + 1] != rank:
                    dist.send(x.contiguous(), group=group, group_dst=rank_of[index + 1])
        return total

    return forward


class TiedEmbedding:
    """The last stage uses the embedding too, as the head (tied) or for multi-token prediction: the first stage owns it,
    the last one has a copy.

    The copy's gradient is added to the owner's, the owner's value is copied back. So norm, optimizer and checkpoint
    know of one weight, wherever its users are. Does nothing where there is no such copy. Every method is a collective
    of the pp axis; a rank sends or receives its shard of the weight.
    """

    def __init__(self, stages: list[nn.Module], mesh: DeviceMesh, *, schedule: str):
        self.owner = self.copy = None
        self.group, self.owner_rank = mesh.get_group(), 0
        self.copy_rank = 0 if schedule in V_SHAPED else mesh.size() - 1
        args = stages[0].args
        if mesh.size() == 1 or not (args.tie_embeddings or args.n_mtp_layers):
            return
        for stage in stages:
            if stage.output is not None:
                self.copy = stage.output.weight if args.tie_embeddings else stage.tok_embeddings.weight
            elif stage.tok_embeddings is not None:
                self.owner = stage.tok_embeddings.weight

    def is_copy(self, parameter: nn.Parameter) -> bool:
        return parameter is self.copy

    @torch.no_grad()
    def reduce_gradient(self) -> None:
        """Owner's gradient += copy's; the copy's is dropped."""
        owner, copied = (None if p is None else _local(p.grad) for p in (self.owner, self.copy))
        arrived = self._move(copied, owner, self.copy_rank, self.owner_rank)
        if owner is not None:
            owner += arrived
        if self.copy is not None:
            self.copy.grad = None

    @torch.no_grad()
    def broadcast_weight(self) -> None:
        """Copy's value = owner's."""
        owner, copied = (None if p is None else _local(p) for p in (self.owner, self.copy))
        arrived = self._move(owner, copied, self.owner_rank, self.copy_rank)
        if copied is not None:
            copied.copy_(arrived)

    def _move(self, source: Tensor | None, like: Tensor | None, source_rank: int, target_rank: int) -> Tensor | None:
        """source, of one rank, on the other one, where `like` has its shape; a rank that has neither does nothing."""
        if source is not None and like is not None:
            return source
        if source is not None:
            dist.send(source.contiguous(), group=self.group, group_dst=target_rank)
        if like is not None:
            arrived = torch.empty_like(like)
            dist.recv(arrived, group=self.group, group_src=source_rank)
            return arrived
        return None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _stages_per_rank(schedule: str, asked: int) -> int:
    is_multi = issubclass(get_schedule_class(schedule), PipelineScheduleMulti)
    if asked == 0:
        return 2 if is_multi else 1
    if (schedule in V_SHAPED and asked != 2) or (not is_multi and asked != 1):
        raise ConfigError(
            f"parallelism.pipeline_parallel_stages_per_rank ({asked}) must be {2 if is_multi else 1} for {schedule}."
        )
    return asked


def _require_enough_microbatches(schedule: str, ranks: int, stages: int, batch_size: int, microbatch_size: int) -> None:
    option = "parallelism.pipeline_parallel_microbatch_size"
    if batch_size % microbatch_size != 0:
        fitting = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ConfigError(
            f"{option} ({microbatch_size}) must divide training.local_batch_size ({batch_size}); use one of {fitting}."
        )
    given = batch_size // microbatch_size
    # What torch's schedules ask for: a filled pipeline, or rounds of equal length.
    least = {"1F1B": ranks, "DualPipeV": stages}.get(schedule, 1)
    rounds = max(1, given // ranks) if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") else 1
    if given < least or given % rounds != 0:
        need = f"at least {least} microbatches" if given < least else f"microbatches in rounds: a multiple of {ranks}"
        raise ConfigError(
            f"{schedule} with {stages} stages needs {need}, but training.local_batch_size ({batch_size}) / "
            f"{option} ({microbatch_size}) gives {given}; change one of them."
        )
