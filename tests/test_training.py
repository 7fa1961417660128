"""The parts of a step, each against its definition: schedule, optimizer groups, loss, gradient norm."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import IGNORE_INDEX, ModelArgs, Transformer
from model.head import Head, reference_loss
from resilience import Run
from resilience.health import LossSpikes
from resilience.process_group import init_distributed
from training.lr_schedule import learning_rate
from training.metrics import PEAK_FLOPS
from training.optimizer import build_optimizer, clip_grad_norm


def schedule(**changes) -> list[float]:
    options = dict(lr=2.0, total_steps=100, warmup_steps=10, decay_ratio=0.2, decay_type="linear", min_lr_factor=0.1)
    options.update(changes)
    return [learning_rate(step, **options) for step in range(options["total_steps"])]


def test_warmup_stable_decay():
    """Rises linearly to lr in warmup_steps, stays, and falls in the last fifth towards lr x min_lr_factor."""
    rates = schedule()
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert rates[10:81] == [2.0] * 71
    assert rates[90] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)) and rates[99] == pytest.approx(2.0 * (0.1 + 0.9 * 0.05))


def test_cosine_from_the_warmup_on():
    """decay_ratio 1 is the usual cosine: half way between warm-up and end it is the mean of both ends."""
    rates = schedule(decay_ratio=1.0, decay_type="cosine")
    assert rates[10] == 2.0 and rates[55] == pytest.approx(2.0 * 0.55)
    assert rates[32] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 22 / 90)) / 2))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_sqrt_and_constant():
    """sqrt falls steepest at once; decay_ratio 0 never falls; a warm-up longer than the run just goes on."""
    assert schedule(decay_type="sqrt")[85] == pytest.approx(2.0 * (0.1 + 0.9 * (1 - math.sqrt(5 / 20))))
    assert schedule(decay_ratio=0.0)[10:] == [2.0] * 90
    assert schedule(warmup_steps=200)[99] == pytest.approx(1.0)


def test_only_matrices_are_decayed():
    """Norms, the token embedding and a head that is tied to it are not decayed. Every parameter is in one group, and
    each group keeps its peak learning rate."""
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)
    options = dict(name="AdamW", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for tied in (False, True):
        model = Transformer(ModelArgs(**shape, tie_embeddings=tied))
        optimizer = build_optimizer(dict(model.named_parameters()), **options)
        decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay.keys() == set(model.parameters())
        for name, p in model.named_parameters():
            assert decay[p] == (0.0 if "norm" in name or "tok_embeddings" in name else 0.1), name
        assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 64])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunked_loss_equals_reference_loss(chunk_size, dtype, tolerance):
    """Each part's loss and both gradients equal those of one F.cross_entropy of all logits, for every chunk size, also
    where a part has ignored labels or no valid label; low precision is summed in float32."""
    torch.manual_seed(0)
    head = Head(8, 11, chunk_size).to(dtype)
    h = torch.randn(6, 5, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(11, (6, 5))
    labels[0, 3] = labels[1, :2] = labels[4:] = IGNORE_INDEX
    losses = head(h, labels, num_losses=3)
    expected = torch.stack([reference_loss(h[i : i + 2].flatten(0, 1), head.weight, labels[i : i + 2].flatten())
                            for i in (0, 2, 4)])  # fmt: skip
    assert losses.dtype == expected.dtype == torch.promote_types(dtype, torch.float32) and losses[2] == 0
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    factors = torch.tensor([1 / 3, -2.0, 1.0])
    ours, theirs = (torch.autograd.grad((x * factors).sum(), (h, head.weight)) for x in (losses, expected))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert (ours[0][labels == IGNORE_INDEX] == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(head(h, labels, num_losses=3), losses)


def test_chunk_size_0_runs_the_reference_loss(monkeypatch):
    """A fork that changes `reference_loss` changes what is trained."""
    head, h, labels = Head(8, 11, chunk_size=0), torch.randn(2, 5, 8), torch.randint(11, (2, 5))
    expected = reference_loss(h.flatten(0, 1), head.weight, labels.flatten())
    assert torch.equal(head(h, labels), expected[None])
    monkeypatch.setattr("model.head.reference_loss", lambda *_: expected + 1)
    assert torch.equal(head(h, labels), expected[None] + 1)


def test_chunks_bound_the_logits():
    """No tensor of forward or backward has more elements than a chunk's logits; with chunk_size 0 all logits exist."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    h, labels = torch.randn(1, 64, 4, requires_grad=True), torch.randint(100, (1, 64))
    for chunk_size, largest in ((0, 6400), (16, 1600)):
        head = Head(4, 100, chunk_size)
        with Largest() as seen:
            head(h, labels).sum().backward()
        assert seen.numel == largest


@pytest.fixture
def pp():
    """A pipeline axis of one rank, this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_gradient_norm_equals_torch(pp):
    """Norm and clipped gradients agree with torch's on plain parameters; 0 only measures; parameters without a
    gradient do not matter."""
    torch.manual_seed(0)

    def parameters():
        torch.manual_seed(0)
        made = [torch.nn.Parameter(torch.randn(n, 7)) for n in (3, 5, 2)]
        for p in made[:2]:
            p.grad = torch.randn_like(p)
        return made

    for max_norm in (0.5, 100.0):
        ours, theirs = parameters(), parameters()
        norm = clip_grad_norm(ours, max_norm, pp, torch.device("cpu"))
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=1e-6)
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    measured = parameters()
    before = [p.grad.clone() for p in measured[:2]]
    clip_grad_norm(measured, 0.0, pp, torch.device("cpu"))
    assert all(torch.equal(p.grad, b) for p, b in zip(measured, before, strict=False))


def test_norm_of_bfloat16_gradients_is_not_rounded(pp):
    """Squares are summed in float32: a million ones have the norm 1000, not what bfloat16 can hold of it."""
    p = torch.nn.Parameter(torch.ones(1000, 1003, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    assert clip_grad_norm([p], 0.0, pp, torch.device("cpu")) == pytest.approx(math.sqrt(1003000), rel=1e-6)


def _refused_difference():
    init_distributed("cpu", 60)
    Run.require_same_on_all_ranks(data="the same")
    with pytest.raises(ValueError) as error:
        Run.require_same_on_all_ranks(configuration="the same", data=f"from machine {dist.get_rank()}")
    return str(error.value)


def test_ranks_that_read_different_data_are_refused():
    """Machines whose files or options differ end with an error on every rank, instead of training on different data."""
    messages = run_ranks(2, _refused_difference)
    assert messages[0] == "data differs between ranks: 0 and [1]; give all the same."


def test_peak_flops_finds_the_most_exact_name():
    """The PCIe part does not get the peak of the faster SXM part, nor GH200 that of H200, nor H20 that of either."""
    first = lambda name: next(part for part in PEAK_FLOPS if part in name)  # noqa: E731
    assert first("NVIDIA H100 PCIe") == "H100 PCIe" and first("NVIDIA H100 80GB HBM3") == "H100"
    assert first("NVIDIA H200") == "H200" and first("NVIDIA H20") == "H20" and first("NVIDIA GH200 480GB") == "GH200"


def test_loss_spike_is_reported_once():
    """A jump of the loss is reported once. Noise and a falling loss are no spike, nor is any loss without a history."""
    spikes, noise = LossSpikes(), torch.Generator().manual_seed(0)
    losses = [3 - 0.01 * i + 0.05 * torch.randn((), generator=noise).item() for i in range(80)]
    assert [spikes.warning(i, loss) for i, loss in enumerate([9.0, *losses])] == [None] * 81
    assert spikes.warning(81, math.nan) is None  # NonFiniteGuard reports it
    assert "loss spike at step 82: 9.5000" in spikes.warning(82, 9.5)
    assert spikes.warning(83, 2.2) is None
