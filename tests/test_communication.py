"""Each parallelism sends in a step what its docstring says: every collective, and the bytes of each.

Each formula is here as a function of its docstring's symbols; helpers/traffic.py counts, and says how. FSDP shards with
its collectives on a fake process group, and with the direct messages of training/gloo.py on gloo ranks. Mixtures of
experts: test_communication_of_mixtures.py.
"""

from collections import Counter

import pytest
from helpers.runs import options
from helpers.traffic import MIXED, as_messages, collective, of_group, of_pp, require, rounded_up, run_step

from torch_private import torch_at_least

DIM, L, F, V, H, K, SEQ, BATCH = 64, 3, 96, 272, 8, 4, 32, 8  # V: vocabulary; BATCH: sequences a step, of all ranks
D = DIM // H  # size of a head
SIZES = options(
    model__dim=DIM, model__n_layers=L, model__hidden_dim=F, model__vocab_size=V, model__n_heads=H, model__n_kv_heads=K,
    training__seq_len=SEQ, training__global_batch_size=BATCH,
)  # fmt: skip


@pytest.fixture
def step(tmp_path):
    """A function of (number of ranks, options, gloo) that runs a step: its traffic, on gloo that of every rank."""

    def run(ranks: int, gloo: bool = False, sizes: dict = SIZES, mixed: bool = False, **settings):
        return run_step(tmp_path, ranks, sizes, MIXED if mixed else {}, options(**settings), gloo=gloo)

    return run


# ------------------------------------------------------------------------------------------------------ the formulas


def of_the_step(loss: int, fsdp: int = 0, tp: int = 1, pp: int = 1, b: int = 8) -> Counter:
    """training/loss.py: one number of tokens and one loss, 8 bytes each, summed over `loss`; the loss over pp too.

    training/optimizer.py: squares of the gradient, b bytes, summed over the axes that a gradient is sharded on, once
    for those of matrices (fsdp, and tp where that is) and, under tp, once for those of norms (fsdp); the sum over pp.
    fsdp = 0: there is none."""
    result = collective("all-reduce", "loss", 8, loss, 2) + collective("all-reduce", "pp", 8, pp, 2)
    if fsdp:
        result += collective("all-reduce", "fsdp", b, fsdp, 2 if tp > 1 else 1)
    if tp > 1:
        result += collective("all-reduce", "tp", b, tp, 1)
    return result


def groups_of_weights(N: int, T: int, F: int = F, V: int = V, K: int = K) -> dict[str, int]:
    """FSDP's groups: the elements that a tp rank has of each, with rows rounded up to a multiple of N."""

    norm, vocabulary = (DIM, 1), (V // T, DIM)
    by_rows = [(H * D // T, DIM), (K * D // T, DIM), (K * D // T, DIM), (F // T, DIM), (F // T, DIM)]
    by_columns = [(DIM, H * D // T), (DIM, F // T)]
    block = rounded_up(N, [*by_rows, *by_columns, norm, norm])
    head = rounded_up(N, [vocabulary, norm])
    return {"block": block, "embedding": rounded_up(N, [vocabulary]), "head": head, "tied": head}


SEPARATE, TIED = {"block": L, "embedding": 1, "head": 1}, {"block": L, "tied": 1}  # how many groups of each kind


def of_fsdp(
    N: int, R: int = 1, M: int = 1, T: int = 1, b: int = 8, s: int = 8, freed: bool = True, groups=SEPARATE, **model
) -> Counter:
    """parallelize/fsdp.py, for M microbatches; s: bytes of a gradient."""
    result = Counter()
    for kind, P in groups_of_weights(N, T, **model).items():
        count = groups.get(kind, 0)
        gathers = (2 * M if kind == "block" else M) if freed else 1
        result += of_group(P, N, R, gathers=gathers * count, scatters=M * count, sums=count, b=b, s=s)
    return result


def of_tp(T: int, A: int, M: int, b: int = 8, w: int = 8, chunks: tuple[int, ...] = ()) -> Counter:
    """parallelize/tensor.py, for M microbatches of A elements each; w: bytes of a number of the loss."""
    result = collective("all-gather", "tp", A * b, T, (4 * L + 2) * M)
    result += collective("reduce-scatter", "tp", A * b, T, (4 * L + 2) * M)
    result += collective("all-reduce", "tp", DIM * b, T, (2 * L + 1) * M)
    for tokens in chunks or (A // DIM,):
        result += collective("all-gather", "tp", 3 * tokens * w * T, T, M)
    return result


def of_cp_allgather(C: int, tokens: int, M: int, K: int = K, b: int = 8) -> Counter:
    """parallelize/context.py, for `tokens` (b there) of a rank; sizes in bytes, b an element."""
    received = 2 * tokens * K * D * (C - 1) * b
    return Counter({("all-gather", "cp", received): L * M, ("reduce-scatter", "cp", received): L * M})


def of_cp_alltoall(C: int, tokens: int, M: int, H: int = H, K: int = K, b: int = 8) -> Counter:
    """parallelize/context.py: one all-to-all of queries, keys and values, one of the result; and back."""
    there = tokens * (H + 2 * K) * D * (C - 1) // C * b
    back = tokens * H * D * (C - 1) // C * b
    return Counter({("all-to-all", "cp", there): 2 * L * M}) + Counter({("all-to-all", "cp", back): 2 * L * M})


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("freed", [True, False])
@pytest.mark.parametrize("M", [1, 2])
def test_fsdp_bytes_equal_formula(step, freed, M):
    """Each group of weights is gathered once for forward and, if freed, again for backward, and its gradients are
    reduce-scattered, in every microbatch, in other bytes per element."""
    [traffic] = step(
        4, mixed=True, training__local_batch_size=BATCH // 4 // M,
        parallelism__fsdp_reshard_after_forward="always" if freed else "never",
    )  # fmt: skip
    require(traffic, of_fsdp(N=4, M=M, b=2, s=4, freed=freed), of_the_step(loss=4, fsdp=4, b=4))


def test_fsdp_bytes_of_uneven_weights_equal_formula(step):
    """Rows are rounded up to a multiple of the ranks: 60 and 268 of them for 8."""
    sizes = {**SIZES, **options(model__hidden_dim=60, model__vocab_size=268)}
    [traffic] = step(8, sizes=sizes)
    require(traffic, of_fsdp(N=8, F=60, V=268), of_the_step(loss=8, fsdp=8))


def test_fsdp_bytes_of_tied_embedding_equal_formula(step):
    """A tied embedding is in the stage's group, with the last norm, and all-gathered once."""
    [traffic] = step(4, model__tie_embeddings="true", training__local_batch_size=2)
    require(traffic, of_fsdp(N=4, groups=TIED), of_the_step(loss=4, fsdp=4))


def test_hsdp_bytes_equal_formula(step):
    """Gradient shards are all-reduced over the replicas once a step, for any number of microbatches."""
    [traffic] = step(8, mixed=True, parallelism__data_parallel_replicate_degree=2, training__global_batch_size=16)
    require(traffic, of_fsdp(N=4, R=2, M=2, b=2, s=4), of_the_step(loss=8, fsdp=4, b=4))


def test_replication_bytes_equal_formula(step):
    """Plain data parallelism: one all-reduce of each group's gradients a step, and nothing is gathered."""
    [traffic] = step(4, parallelism__data_parallel_replicate_degree=4, training__local_batch_size=1)
    require(traffic, of_fsdp(N=1, R=4, M=2), of_the_step(loss=4, fsdp=1))


@pytest.mark.parametrize("T", [2, 4])
def test_tensor_parallel_bytes_equal_formula(step, T):
    """8 L + 4 large collectives a microbatch, the loss's numbers, and a sum for each norm's gradient."""
    [traffic] = step(T, parallelism__tensor_parallel_degree=T, training__local_batch_size=4)
    require(traffic, of_tp(T, A=4 * SEQ * DIM, M=2), of_the_step(loss=1, fsdp=1, tp=T))


def test_tensor_parallel_bytes_in_mixed_precision_equal_formula(step):
    """Activations and norms' gradients have 2 bytes, the loss's numbers 4, with one all-gather for each chunk."""
    [traffic] = step(
        2, mixed=True, parallelism__tensor_parallel_degree=2, training__local_batch_size=8, training__loss_chunk_size=96
    )
    tp = of_tp(2, A=8 * SEQ * DIM, M=1, b=2, w=4, chunks=(96, 96, 64))
    require(traffic, tp, of_the_step(loss=1, fsdp=1, tp=2, b=4))


def test_tensor_parallel_with_fsdp_bytes_equal_formula(step):
    """FSDP communicates the part of a weight that tensor parallelism leaves; tensor parallelism sends the same as
    alone."""
    [traffic] = step(8, parallelism__tensor_parallel_degree=2, training__local_batch_size=1)
    tp, fsdp = of_tp(2, A=SEQ * DIM, M=2), of_fsdp(N=4, M=2, T=2)
    require(traffic, tp, fsdp, of_the_step(loss=4, fsdp=4, tp=2))


@pytest.mark.parametrize("kv_heads", [4, 8, 1])
def test_context_parallel_allgather_bytes_equal_formula(step, kv_heads):
    """Per layer one all-gather of keys and values, and one reduce-scatter of their gradients, smaller with fewer heads.
    FSDP's axis holds the context ranks too."""
    [traffic] = step(
        4, model__n_kv_heads=kv_heads, training__local_batch_size=4, parallelism__context_parallel_degree=4
    )
    cp = of_cp_allgather(C=4, tokens=4 * SEQ // 4, M=2, K=kv_heads)
    require(traffic, cp, of_fsdp(N=4, M=2, K=kv_heads), of_the_step(loss=4, fsdp=4))


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_context_parallel_alltoall_bytes_equal_formula(step, kv_heads):
    """Per layer one all-to-all of queries, keys and values, and one of the result; two more of their gradients."""
    [traffic] = step(
        4, model__n_kv_heads=kv_heads, training__local_batch_size=4, parallelism__context_parallel_degree=4,
        parallelism__context_parallel_method="alltoall",
    )  # fmt: skip
    cp = of_cp_alltoall(C=4, tokens=4 * SEQ // 4, M=2, K=kv_heads)
    require(traffic, cp, of_fsdp(N=4, M=2, K=kv_heads), of_the_step(loss=4, fsdp=4))


@pytest.mark.parametrize("method", ["allgather", "alltoall"])
def test_all_axes_except_pipeline_bytes_equal_formula(step, method):
    """With replicas, FSDP, context and tensor parallelism, each moves what it moves alone, of the part that the others
    leave to a rank: heads and weights are cut by tp, the sequence by cp."""
    [traffic] = step(
        16, mixed=True, training__local_batch_size=1,
        parallelism__data_parallel_replicate_degree=2, parallelism__context_parallel_degree=2,
        parallelism__tensor_parallel_degree=2, parallelism__context_parallel_method=method,
    )  # fmt: skip
    tokens = SEQ // 2
    cp = {"allgather": of_cp_allgather(C=2, tokens=tokens, M=2, K=K // 2, b=2),
          "alltoall": of_cp_alltoall(C=2, tokens=tokens, M=2, H=H // 2, K=K // 2, b=2)}[method]  # fmt: skip
    tp = of_tp(2, A=tokens * DIM, M=2, b=2, w=4)
    fsdp = of_fsdp(N=4, R=2, M=2, T=2, b=2, s=4)
    require(traffic, cp, tp, fsdp, of_the_step(loss=8, fsdp=4, tp=2, b=4))


@pytest.mark.parametrize(
    "schedule, tied, stages",
    [
        ("1F1B", True, [[0], [1]]),
        ("Interleaved1F1B", False, [[0, 2], [1, 3]]),
        ("ZBVZeroBubble", True, [[0, 3], [1, 2]]),
    ],
)
def test_pipeline_messages_equal_formula(step, schedule, tied, stages):
    """For each microbatch and each border between ranks, one activation and one gradient, under any schedule. Where the
    tied embedding is on two ranks: once a step its gradient to the owner and its value back."""
    is_v = 0 in stages[0] and 3 in stages[0]
    if is_v and not torch_at_least(2, 12):
        pytest.skip("gloo cannot send to its own rank before torch 2.12")
    by_rank = step(
        2, gloo=True, model__n_layers=4, model__tie_embeddings=str(tied).lower(),
        training__local_batch_size=4, parallelism__pipeline_parallel_degree=2,
        parallelism__pipeline_parallel_schedule=schedule, parallelism__pipeline_parallel_microbatch_size=2,
    )  # fmt: skip
    schedules, microbatches = 2, 2  # a step accumulates two schedules of two microbatches of two sequences
    weight = Counter({(kind, "pp", V * DIM * 8): 1 for kind in ("send", "receive") if tied and not is_v})
    for traffic, own in zip(by_rank, stages, strict=True):
        pp = of_pp(own, stages, M=schedules * microbatches, size=2 * SEQ * DIM * 8)
        require(traffic, pp, weight, of_the_step(loss=1, pp=2))


def test_fsdp_communicates_once_per_pipeline_schedule(step):
    """A stage's weights are all-gathered once for all microbatches of a schedule, and its gradients reduce-scattered
    once. On gloo, direct messages to and from each other rank of the same bytes replace FSDP's collectives."""
    by_rank = step(4, gloo=True, training__local_batch_size=4, parallelism__pipeline_parallel_degree=2)
    for rank, traffic in enumerate(by_rank):
        pp = of_pp([rank // 2], [[0], [1]], M=4, size=SEQ * DIM * 8)
        groups = [{"block": 2, "embedding": 1}, {"block": 1, "head": 1}][rank // 2]
        fsdp = as_messages(of_fsdp(N=2, freed=False, groups=groups), N=2)
        require(traffic, pp, fsdp, of_the_step(loss=2, fsdp=2, pp=2))
