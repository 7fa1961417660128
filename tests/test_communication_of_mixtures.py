"""DeepSeek-V3's parts send in a step what the docstrings say: latent attention, mixtures of experts and multi-token
prediction, under every parallelism. See test_communication.py, and helpers/traffic.py for what is counted.

All experts get equally many tokens, except in the test with real routing.
"""

from collections import Counter

import pytest
from helpers.runs import options
from helpers.traffic import MIXED, as_messages, collective, of_group, of_pp, require, rounded_up, run_step

from torch_private import torch_at_least

DIM, F, V, H, SEQ, BATCH = 64, 96, 272, 8, 32, 8
L, DEPTH, MIXTURES = 2, 1, 2  # blocks, the first of them dense; MTP layers; mixtures of experts among both
E, K, WIDTH = 8, 2, 32  # experts, experts per token, hidden channels of an expert
Q_LATENT, KV_LATENT, NOPE, ROPE, D_V = 32, 16, 8, 4, 8
SIZES = options(
    model__dim=DIM, model__n_layers=L, model__hidden_dim=F, model__vocab_size=V, model__n_heads=H, model__n_kv_heads=H,
    model__attention="mla", model__q_lora_rank=Q_LATENT, model__kv_lora_rank=KV_LATENT, model__qk_nope_head_dim=NOPE,
    model__qk_rope_head_dim=ROPE, model__v_head_dim=D_V, model__n_experts=E, model__top_k=K,
    model__n_shared_experts=1, model__moe_hidden_dim=WIDTH, model__n_dense_layers=1, model__n_mtp_layers=DEPTH,
    model__expert_bias="true", training__seq_len=SEQ, training__global_batch_size=BATCH,
)  # fmt: skip


@pytest.fixture
def step(tmp_path):
    """A function of (number of ranks, options, gloo) that runs a step: its traffic, on gloo that of every rank."""

    def run(ranks: int, gloo: bool = False, mixed: bool = False, **settings):
        return run_step(tmp_path, ranks, SIZES, MIXED if mixed else {}, options(**settings), gloo=gloo)

    return run


# ------------------------------------------------------------------------------------------------------ the formulas


def of_the_step(loss: int, fsdp: int = 0, tokens: int = 1, tp: int = 1, ep: int = 1, efsdp: int = 1, pp: int = 1,
                mixtures: int = MIXTURES, b: int = 8) -> Counter:  # fmt: skip
    """training/loss.py and training/optimizer.py, as in a dense model; the experts' squares are summed over their axes.

    training/balance.py: counts of all experts of a rank's layers, over all ranks with tokens; three numbers a layer of
    the whole model over pp."""
    result = collective("all-reduce", "loss", 8, loss, 2) + collective("all-reduce", "pp", 8, pp, 2)
    if tp > 1:
        result += collective("all-reduce", "tp", b, tp, 1)
    if fsdp:
        result += collective("all-reduce", "fsdp", b, fsdp, 2 if tp > 1 else 1)
    if ep > 1:
        result += collective("all-reduce", "ep", b, ep, 1)
    if ep > 1 or tp > 1:
        result += collective("all-reduce", "efsdp", b, efsdp, 1)
    if mixtures:
        result += collective("all-reduce", "tokens", mixtures * E * 8, tokens, 1)
    return result + collective("all-reduce", "pp", MIXTURES * 24, pp, 1)


def attention_shapes(T: int, compresses: bool) -> list[tuple[int, ...]]:
    queries = H * (NOPE + ROPE) // T
    q = [(Q_LATENT, DIM), (Q_LATENT,), (queries, Q_LATENT)] if compresses else [(queries, DIM)]
    kv = [(KV_LATENT + ROPE, DIM), (KV_LATENT,), (H * (NOPE + D_V) // T, KV_LATENT)]
    return [*q, *kv, (DIM, H * D_V // T)]


def groups_of_weights(N: int, T: int, E_p: int, separate: bool, compresses: bool = True) -> dict[str, int]:
    """FSDP's groups: the elements that a tp rank has of each, with rows rounded up to a multiple of N."""

    def feed_forward(width: int) -> list[tuple[int, ...]]:
        return [(width // T, DIM), (width // T, DIM), (DIM, width // T)]

    common = [*attention_shapes(T, compresses), (DIM,), (DIM,)]
    experts = 3 * E // E_p * DIM * WIDTH
    mixture = rounded_up(N, [*common, (E, DIM), *feed_forward(WIDTH)])
    return {
        "dense": rounded_up(N, [*common, *feed_forward(F)]),
        "mixture": mixture + (0 if separate else experts),
        "experts": experts if separate else 0,
        "mtp": rounded_up(N, [(DIM,), (DIM,), (DIM,), (DIM, 2 * DIM)]),
        "embedding": rounded_up(N, [(V // T, DIM)]),
        "head": rounded_up(N, [(V // T, DIM), (DIM,)]),
    }


WHOLE = {"dense": 1, "mixture": 2, "experts": 2, "mtp": 1, "embedding": 1, "head": 1}


def of_fsdp(
    N: int,
    R: int = 1,
    M: int = 1,
    T: int = 1,
    E_p: int = 1,
    efsdp: int = 0,
    b: int = 8,
    s: int = 8,
    freed: bool = True,
    groups=WHOLE,
    compresses: bool = True,
) -> Counter:
    """parallelize/fsdp.py, for M microbatches; efsdp: ranks that share an expert, where these are others than N."""
    result = Counter()
    for kind, P in groups_of_weights(N, T, E_p, efsdp > 0, compresses).items():
        count = groups.get(kind, 0) if P else 0
        gathers = (M if kind in ("embedding", "head") else 2 * M) if freed else 1
        of_experts = kind == "experts"
        result += of_group(
            P,
            efsdp if of_experts else N,
            R,
            gathers=gathers * count,
            scatters=M * count,
            sums=count,
            b=b,
            s=s,
            experts=of_experts,
        )
    return result


def of_tp(T: int, tokens: int, M: int, b: int = 8, w: int = 8, compresses: bool = True) -> Counter:
    """parallelize/tensor.py, for M microbatches of so many tokens; w: bytes of a number of the loss."""
    A, blocks = tokens * DIM, L + DEPTH
    result = Counter()
    for kind in ("all-gather", "reduce-scatter"):
        result += collective(kind, "tp", A * b, T, 3 * blocks * M)  # around wo and the feed-forward, there and back
        for width in (Q_LATENT, KV_LATENT + ROPE) if compresses else (DIM,):
            result += collective(kind, "tp", tokens * width * b, T, blocks * M)
        result += collective(kind, "tp", (1 + DEPTH) * A * b, T, 2 * M)  # embedding and head
    result += collective("all-gather", "tp", 3 * tokens * w * T, T, (1 + DEPTH) * M)
    latents = [Q_LATENT * DIM, Q_LATENT] if compresses else []
    latents += [(KV_LATENT + ROPE) * DIM, KV_LATENT]
    summed = {DIM: 2 * blocks + 1 + 3 * DEPTH, E * DIM: MIXTURES, 2 * DIM * DIM: DEPTH}
    for elements in latents:
        summed[elements] = summed.get(elements, 0) + blocks
    for elements, count in summed.items():
        result += collective("all-reduce", "tp", elements * b, T, count * M)
    return result


def of_ep(E_p: int, tokens: int, M: int, b: int = 8, recomputed: bool = False, mixtures: int = MIXTURES) -> Counter:
    """parallelize/expert.py, for M microbatches of so many tokens of a rank."""
    forwards = 2 if recomputed else 1
    counts = collective("all-to-all", "ep", E * 8, E_p, forwards * mixtures * M)
    return counts + collective("all-to-all", "ep", tokens * K * DIM * b, E_p, (2 * forwards + 2) * mixtures * M)


def of_balance_loss(sequences: int, M: int, ranks: int) -> Counter:
    """parallelize/expert.py: counts of the experts for each sequence, over the ranks that share it."""
    return collective("all-reduce", "sequence", sequences * E * 8, ranks, MIXTURES * M)


def of_cp(method: str, C: int, tokens: int, M: int, H: int = H, b: int = 8) -> Counter:
    """parallelize/context.py, for `tokens` (b there) of a rank; b is the bytes of an element."""
    times, d_qk, result = (L + DEPTH) * M, NOPE + ROPE, Counter()
    if method == "alltoall":
        for width in (H * (2 * d_qk + D_V), H * D_V):
            result["all-to-all", "cp", tokens * width * b * (C - 1) // C] += 2 * times
    else:
        width = KV_LATENT + ROPE if method == "latent" else H * (d_qk + D_V)
        for kind in ("all-gather", "reduce-scatter"):
            result[kind, "cp", tokens * width * b * (C - 1)] += times
    return result


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("freed", [True, False])
def test_fsdp_bytes_equal_formula(step, freed):
    """Experts belong to their block's group while efsdp equals fsdp; the norms and projection of MTP are a group.
    Embedding and head are all-gathered once for all depths."""
    [traffic] = step(
        4,
        mixed=True,
        training__local_batch_size=1,
        parallelism__fsdp_reshard_after_forward="always" if freed else "never",
    )
    require(traffic, of_fsdp(N=4, M=2, b=2, s=4, freed=freed), of_the_step(loss=4, tokens=4, fsdp=4, b=4))


@pytest.mark.parametrize("E_p", [2, 4])
def test_expert_parallel_bytes_equal_formula(step, E_p):
    """Rows travel twice in forward and twice in backward, after an all-to-all of counts. The ranks that are left shard
    the experts' weights, as a separate group."""
    [traffic] = step(4, mixed=True, training__local_batch_size=1, parallelism__expert_parallel_degree=E_p)
    fsdp = of_fsdp(N=4, M=2, E_p=E_p, efsdp=4 // E_p, b=2, s=4)
    require(
        traffic, fsdp, of_ep(E_p, SEQ, M=2, b=2), of_the_step(loss=4, tokens=4, fsdp=4, ep=E_p, efsdp=4 // E_p, b=4)
    )


def test_expert_parallel_bytes_with_recomputation_equal_formula(step):
    """A recomputed block sends its rows, and the counts, once more; no weights are all-gathered for it."""
    [traffic] = step(
        4, training__local_batch_size=2, parallelism__expert_parallel_degree=2, activation_checkpoint__mode="full"
    )
    require(
        traffic,
        of_fsdp(N=4, E_p=2, efsdp=2),
        of_ep(2, 2 * SEQ, M=1, recomputed=True),
        of_the_step(loss=4, tokens=4, fsdp=4, ep=2, efsdp=2),
    )


@pytest.mark.parametrize("compresses", [True, False])
def test_tensor_parallel_bytes_equal_formula(step, compresses):
    """Latent attention all-gathers only the latents, or the activations where queries have no latent. Experts are not
    cut: FSDP shards them over all ranks. Counts are summed over tp for the balance loss."""
    [traffic] = step(
        2, parallelism__tensor_parallel_degree=2, training__local_batch_size=4, model__balance_loss_weight=0.01,
        model__q_lora_rank=Q_LATENT if compresses else 0,
    )  # fmt: skip
    require(
        traffic, of_tp(2, 4 * SEQ, M=2, compresses=compresses), of_fsdp(N=1, M=2, T=2, efsdp=2, compresses=compresses),
        of_balance_loss(4, M=2, ranks=2), of_the_step(loss=1, tokens=2, fsdp=1, tp=2, efsdp=2),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["latent", "allgather", "alltoall"])
def test_context_parallel_bytes_equal_formula(step, method):
    """Per block, in both directions: latents, or the keys and values made from them, or heads."""
    [traffic] = step(
        4, training__local_batch_size=4, parallelism__context_parallel_degree=4,
        parallelism__context_parallel_method=method, model__balance_loss_weight=0.01,
    )  # fmt: skip
    cp, balance = of_cp(method, C=4, tokens=SEQ, M=2), of_balance_loss(4, M=2, ranks=4)
    require(traffic, cp, balance, of_fsdp(N=4, M=2), of_the_step(loss=4, tokens=4, fsdp=4))


@pytest.mark.parametrize("method", ["latent", "alltoall"])
def test_all_axes_except_pipeline_bytes_equal_formula(step, method):
    """With replicas, FSDP, context, tensor and expert parallelism, each moves what it moves alone, of what is left."""
    [traffic] = step(
        16, mixed=True, training__local_batch_size=1, parallelism__data_parallel_replicate_degree=2,
        parallelism__context_parallel_degree=2, parallelism__tensor_parallel_degree=2,
        parallelism__expert_parallel_degree=4, parallelism__context_parallel_method=method,
        model__balance_loss_weight=0.01,
    )  # fmt: skip
    tokens = SEQ // 2
    require(
        traffic, of_cp(method, C=2, tokens=tokens, M=2, H=H // 2, b=2), of_tp(2, tokens, M=2, b=2, w=4),
        of_fsdp(N=4, R=2, M=2, T=2, E_p=4, efsdp=2, b=2, s=4), of_ep(4, tokens // 2, M=2, b=2),
        of_balance_loss(1, M=2, ranks=4),
        of_the_step(loss=8, tokens=16, fsdp=4, tp=2, ep=4, efsdp=2, b=4),
    )  # fmt: skip


def test_expert_parallel_bytes_follow_real_routing(step):
    """Rows come from the other ranks, and their results go back; in backward the gradients of both. A rank receives the
    rows that the router sent to it, not an equal share."""
    for traffic in step(2, gloo=True, training__local_batch_size=4, parallelism__expert_parallel_degree=2):
        assert len(traffic.rows) == MIXTURES and len({n for pair in traffic.rows for n in pair}) > 1
        exchanged = collective("all-to-all", "ep", E * 8, 2, MIXTURES)
        for sent, received in traffic.rows:
            for rows in (sent, received):
                exchanged["all-to-all", "ep", rows * DIM * 8] += 2
        fsdp = as_messages(of_fsdp(N=2, E_p=2, efsdp=1), N=2)
        require(traffic, fsdp, exchanged, of_the_step(loss=2, tokens=2, fsdp=2, ep=2, efsdp=1))


@pytest.mark.parametrize("schedule, stages", [("1F1B", [[0], [1]]), ("ZBVZeroBubble", [[0, 3], [1, 2]])])
def test_pipeline_messages_equal_formula(step, schedule, stages):
    """The last stage looks up the tokens of MTP, so its copy of the embedding costs what a tied embedding does: once a
    step its gradient to the owner and its value back; nothing where one rank has both. Counts are of a rank's
    layers."""
    is_v = len(stages[0]) == 2
    if is_v and not torch_at_least(2, 12):
        pytest.skip("gloo cannot send to its own rank before torch 2.12")
    by_rank = step(
        2, gloo=True, training__local_batch_size=4, parallelism__pipeline_parallel_degree=2,
        parallelism__pipeline_parallel_schedule=schedule, parallelism__pipeline_parallel_microbatch_size=2,
        model__n_layers=4 if is_v else 2, model__n_dense_layers=3 if is_v else 1,
    )  # fmt: skip
    embedding = Counter({(kind, "pp", V * DIM * 8): 1 for kind in ("send", "receive") if not is_v})
    for traffic, own in zip(by_rank, stages, strict=True):
        pp = of_pp(own, stages, M=4, size=2 * SEQ * DIM * 8)
        has_last = max(map(max, stages)) in own
        require(traffic, pp, embedding, of_the_step(loss=1, pp=2, mixtures=MIXTURES if has_last else 0))
