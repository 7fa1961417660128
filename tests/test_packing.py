"""Documents that are packed into one sequence: each is trained on as if it were alone."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.layouts import V3
from helpers.runs import TINY
from helpers.texts import BYTE

from config import load_config
from data import build_dataset
from model import IGNORE_INDEX, Transformer, add_mtp_targets, attention, get_flavor
from model.attention import BlockMask, CoreAttention, DocumentMask
from parallelize.context import CPDocumentMask

# The balance loss is of whole sequences, so it cannot be a sum over documents.
WITHOUT_BALANCE = V3 | {"model.balance_loss_weight": "0", "model.n_mtp_layers": "2"}


def model_of(settings: dict[str, str]) -> Transformer:
    arguments = {name: value for name, value in (TINY | settings).items() if name.startswith("model.")}
    torch.manual_seed(0)
    shape = vars(load_config([f"--{name}={value}" for name, value in arguments.items()]).model)
    overrides = {name: value for name, value in shape.items() if name != "flavor" and value is not None}
    model = Transformer(replace(get_flavor(shape["flavor"]), **overrides)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def packed_dataset(folder, texts: list[str], seq_len: int, packing: str = "documents"):
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    more = dict(seq_len=seq_len, seed=0, packing=packing, cache_folder=folder)
    return build_dataset("text", str(path), BYTE, **more)


def test_packed_sample_numbers_documents_and_positions(tmp_path):
    """Positions restart with each document, and each document has a number. The rest of a document that a window's end
    has cut off is a document of the next window."""
    dataset = packed_dataset(tmp_path, ["hi", "you", "", "long text"], seq_len=8)
    samples = sorted([dataset[i] for i in range(len(dataset))], key=lambda sample: sample["tokens"][0] != 256)
    assert len(samples) == 2 and all(tensor.dtype == torch.int64 for s in samples for tensor in s.values())
    assert samples[0]["tokens"].tolist() == [256, *b"hi", 257, 256, *b"you"]
    assert samples[0]["labels"].tolist() == [*b"hi", 257, -100, *b"you", 257]
    assert samples[0]["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert samples[0]["documents"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert samples[1]["tokens"].tolist() == [257, 256, *b"long t"]  # the end of "you" alone, then another
    assert samples[1]["positions"].tolist() == [0, *range(7)]
    assert samples[1]["documents"].tolist() == [0] + [1] * 7
    plain = packed_dataset(tmp_path, ["hi", "you", "", "long text"], 8, "concat")[0]
    assert "documents" not in plain and plain["positions"].tolist() == list(range(8))


@pytest.mark.parametrize("settings", [{}, WITHOUT_BALANCE], ids=["grouped queries", "latent attention, experts, MTP"])
def test_packed_documents_equal_each_document_alone(settings, tmp_path):
    """The loss, every gradient, and the number of tokens of each expert are sums over the documents, each trained
    alone."""
    texts = ["one", "a second, longer one", "", "and the third", "x", "the last is cut off by the window's end"]
    dataset = packed_dataset(tmp_path, texts, seq_len=64)
    sample = dataset[0]
    assert sample["documents"].max() == 4
    whole, alone = model_of(settings), model_of(settings)
    depth = whole.args.n_mtp_layers

    def train(model, batch):
        inputs = add_mtp_targets(batch, depth)
        loss = model(inputs["tokens"], **{name: inputs[name] for name in inputs if name != "tokens"})
        loss.backward()
        return loss.item()

    loss = train(whole, {name: tensor[None] for name, tensor in sample.items()})
    losses = []
    for number in range(5):
        here = sample["documents"] == number
        document = {name: sample[name][here][None] for name in ("tokens", "labels")}
        losses.append(train(alone, document | {"positions": torch.arange(int(here.sum()))[None]}))
    assert loss == pytest.approx(sum(losses), rel=1e-12) and (sample["labels"] == IGNORE_INDEX).sum() == 4
    for (name, parameter), other in zip(whole.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for (name, buffer), other in zip(whole.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_loss_without_document_mask_differs(tmp_path):
    """This makes the test above strict: without the mask the loss is another, by far more than the tolerance. Positions
    that do not restart change nothing, since RoPE depends on differences of positions only."""
    texts = ["one", "a second, longer one", "and the third one is long enough for the window"]
    batch = {name: tensor[None] for name, tensor in packed_dataset(tmp_path, texts, 64)[0].items()}
    model = model_of({})

    def loss(**change):
        inputs = batch | change
        return model(inputs["tokens"], inputs["positions"], inputs["labels"], documents=inputs["documents"]).item()

    assert abs(loss() / loss(documents=None) - 1) > 1e-4
    assert abs(loss() / loss(positions=torch.arange(64)[None]) - 1) < 1e-9
    assert loss(documents=torch.zeros(1, 64, dtype=torch.int64)) == pytest.approx(loss(documents=None), rel=1e-12)


def heads(dtype=torch.float32, device="cpu"):
    """q, k, v of two sequences of 48 tokens, four heads in two groups, v narrower than q; and document numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 48, 4, 32), (2, 48, 2, 32), (2, 48, 2, 16))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    ends = torch.rand(2, 48, generator=generator) < 0.2
    qkv = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    return qkv, ends.cumsum(1).to(device)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_mask_equals_explicit_mask(monkeypatch):
    """FlexAttention's forward with the block mask equals the explicit mask's, for all queries and for the queries of a
    context rank. Uncompiled and forward only: FlexAttention has no backward on CPUs."""
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    qkv, documents = heads()
    q, k, v = (x.detach() for x in qkv)
    mesh = SimpleNamespace(size=lambda: 3, get_local_rank=lambda: 1)
    core = CoreAttention(scale=0.3)
    for part in (DocumentMask(), CPDocumentMask(mesh, 48)):
        q_here = q[:, part.queries(48, q.device)]
        explicit, blocks = (part(documents, as_blocks) for as_blocks in (False, True))
        assert isinstance(blocks, BlockMask) and explicit.shape == (2, 1, q_here.size(1), 48)
        torch.testing.assert_close(core(q_here, k, v, blocks), core(q_here, k, v, explicit))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward needs a GPU")
def test_block_mask_gradients_equal_explicit_mask():
    """Compiled on a GPU, FlexAttention's result and gradients equal the explicit mask's."""
    results = []
    for as_blocks in (False, True):
        (q, k, v), documents = heads(device="cuda")
        out = CoreAttention(scale=0.3)(q, k, v, DocumentMask()(documents, as_blocks))
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for explicit, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, explicit, rtol=1e-2, atol=1e-2)  # TF32 in its kernel
