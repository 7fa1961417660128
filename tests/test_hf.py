"""Hugging Face folders against transformers, an independent implementation: equal logits from the same files, and equal
files after export."""

import dataclasses
import json

import pytest
import torch
import transformers
from helpers.hf_models import (
    DEEPSEEK,
    LLAMA,
    LLAMA3_ROPE,
    YARN,
    build,
    checkpoint_of,
    load_ours,
    random_weights,
    read_config,
    save,
    share_frequencies,
    some_tokens,
    stored,
    tensors_of,
    wide,
    write_config,
)
from transformers.modeling_layers import MtpModel

from hf import model_args_of_folder
from hf.export import export_hf
from model import Transformer, get_flavor
from model.rope import rope_cos_sin

MODELS = {  # name: (kind, shape, whether config.json has the published fields)
    "grouped-query": ("Llama", dict(), False),
    "grouped-query, llama3": ("Llama", dict(rope_parameters=LLAMA3_ROPE), False),
    "multi-head, tied, llama3": (
        "Llama",
        dict(num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
        True,
    ),
    "multi-query, tied, yarn": (
        "Llama",
        dict(num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=YARN),
        False,
    ),
    "V3": (
        "DeepseekV3",
        dict(q_lora_rank=24, n_group=4, topk_group=2, n_shared_experts=2, rope_parameters=YARN),
        False,
    ),
    "V3, yarn with mscale": (
        "DeepseekV3",
        dict(q_lora_rank=24, n_group=2, topk_group=1, rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0)),
        True,
    ),
    "V3 without q_lora_rank, one group, scores not normalized": (
        "DeepseekV3",
        dict(q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False),
        True,
    ),
    "V3, tied, rotate_half": (
        "DeepseekV3",
        dict(q_lora_rank=None, n_group=1, topk_group=1, tie_word_embeddings=True, rope_interleave=False),
        False,
    ),
    "V3, dense": ("DeepseekV3", dict(q_lora_rank=24, first_k_dense_replace=2), False),
    "V2 Lite": (
        "DeepseekV2",
        dict(q_lora_rank=None, rope_parameters=dict(YARN, mscale=0.707, mscale_all_dim=0.707)),
        True,
    ),
    "V2": (
        "DeepseekV2",
        dict(
            q_lora_rank=24,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=4.0,
        ),
        False,
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(model, folder) of each of MODELS. Every second folder has several files."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for i, (name, (kind, shape, published)) in enumerate(MODELS.items()):
        model = build(kind, seed=i, **{**(LLAMA if kind == "Llama" else DEEPSEEK), **shape})
        made[name] = model, save(model, folder / str(i), published, max_shard_size="40KB" if i % 2 else "1GB")
    return made


# ------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(sources, name):
    """A loaded model computes transformers' logits: in float64 to 1e-10, in float32 to 1e-5."""
    reference, folder = sources[name]
    tokens, positions = some_tokens()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = load_ours(folder, dtype)
        share_frequencies(reference, model.args)
        with torch.no_grad():
            ours = model(tokens, positions)
            if dtype == torch.float64:
                with wide():
                    theirs = reference(tokens).logits
            else:
                theirs = (
                    type(reference).from_pretrained(folder, dtype=dtype, experts_implementation="eager")(tokens).logits
                )
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest)
        assert 1 < largest < 1e3, "logits of a size that tells models apart"


def test_mtp_logits_equal_transformers(tmp_path):
    """MTP of depth 2: transformers computes our logits from the exported folder, and we load our weights back from it.
    Each MTP layer of the folder holds a copy of the embedding and of the head."""
    small = dict(dim=32, n_layers=2, vocab_size=99, n_mtp_layers=2, max_seq_len=64, balance_loss_weight=0.0)
    args = dataclasses.replace(get_flavor("deepseek_v3_debug"), **small)
    model = random_weights(Transformer(args).double())
    folder = tmp_path / "hf"
    export_hf(checkpoint_of(model, tmp_path), str(folder), max_bytes=100_000)
    assert model_args_of_folder(str(folder)) == args
    for name, tensor in tensors_of(load_ours(folder)).items():
        assert torch.equal(tensor, tensors_of(model)[name]), name
    files = stored(folder)
    for layer in (2, 3):
        assert torch.equal(files[f"model.layers.{layer}.embed_tokens.weight"], model.tok_embeddings.weight)
        assert torch.equal(files[f"model.layers.{layer}.shared_head.head.weight"], model.output.weight)

    tokens, positions = some_tokens()
    with wide(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        kind = transformers.DeepseekV3ForCausalLM  # ignores only layer 61, the MTP layer of the published V3
        patch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*", r"model\.layers\.3.*"])
        reference = kind.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
        mtp = MtpModel.from_pretrained(reference)
        share_frequencies(reference, args)
        assert len(mtp.layers) == 2
        theirs = reference.model(tokens).last_hidden_state
        head, model.output = model.output, None
        ours = model(tokens, positions)
        for k in range(2):
            following = torch.nn.functional.pad(tokens[:, k + 1 :], (0, k + 1))
            theirs = mtp.forward_layer(k, theirs, positions, None, input_ids=following)
            ours, _ = model.mtp[str(k)](ours, model.tok_embeddings(following), *rope_cos_sin(positions, args))
            torch.testing.assert_close(head(ours), reference.lm_head(theirs), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------ back


@pytest.mark.parametrize("name", MODELS)
def test_exported_folder_equals_its_source(sources, name, tmp_path):
    """Every tensor equals the source's to the last bit, in name, shape and dtype. config.json describes the same model.
    transformers opens the folder without missing or unexpected tensors, and computes the same logits."""
    reference, folder = sources[name]
    model = load_ours(folder)
    export_hf(checkpoint_of(model, tmp_path), str(tmp_path / "hf"), max_bytes=30_000)
    expected, found = stored(folder), stored(tmp_path / "hf")
    reordered = (
        ("q_proj", "q_b_proj", "kv_a_proj_with_mqa") if not read_config(folder).get("rope_interleave", True) else ()
    )
    assert found.keys() == expected.keys()
    for their_name, tensor in expected.items():
        assert found[their_name].dtype == tensor.dtype and found[their_name].shape == tensor.shape, their_name
        if not any(part in their_name for part in reordered):
            assert torch.equal(found[their_name], tensor), their_name
    assert model_args_of_folder(str(tmp_path / "hf")) == model.args
    again, report = type(reference).from_pretrained(
        tmp_path / "hf", dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.generation_config.eos_token_id is None, "without a known end token, no token ends a text"
    share_frequencies(again, model.args)
    share_frequencies(reference, model.args)
    with torch.no_grad(), wide():
        torch.testing.assert_close(
            again(some_tokens()[0]).logits, reference(some_tokens()[0]).logits, rtol=0, atol=1e-9
        )


def test_export_casts_splits_and_copies_the_tokenizer(sources, tmp_path):
    """All weights are bfloat16 except the expert bias. No file is larger than the limit. Tokenizer, token ids and
    generation_config.json come from `like`. A folder that is not empty is refused."""
    _, folder = sources["V3"]
    like = tmp_path / "like"
    like.mkdir()
    write_config(like, read_config(folder) | dict(bos_token_id=7, eos_token_id=[8, 9], quantization_config={"a": 1}))
    for name in ("tokenizer.json", "generation_config.json", "modeling_deepseek.py"):
        (like / name).write_text(name)
    model = load_ours(folder)
    checkpoint = checkpoint_of(model, tmp_path)
    export_hf(checkpoint, str(tmp_path / "hf"), dtype=torch.bfloat16, like=str(like), max_bytes=20_000)
    for name, tensor in stored(tmp_path / "hf").items():
        assert tensor.dtype == (torch.float32 if name.endswith("_bias") else torch.bfloat16), name
        assert torch.equal(tensor, stored(folder)[name].to(tensor.dtype)), name
    sizes = [file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 23_000
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(tmp_path / "hf").values())
    config = read_config(tmp_path / "hf")
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (7, [8, 9], "bfloat16")
    assert "quantization_config" not in config
    assert (tmp_path / "hf" / "tokenizer.json").exists() and (tmp_path / "hf" / "generation_config.json").exists()
    assert not (tmp_path / "hf" / "modeling_deepseek.py").exists()
    with pytest.raises(ValueError, match="is not empty"):
        export_hf(checkpoint, str(tmp_path / "hf"))
