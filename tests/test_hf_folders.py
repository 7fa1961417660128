"""The content of a Hugging Face folder: config.json, blockwise float8 weights, and folders that are refused."""

import dataclasses
import json

import pytest
import torch
from helpers.flavors import BUILT_IN_FLAVORS
from helpers.hf_models import (
    DEEPSEEK,
    LATENT,
    LLAMA,
    build,
    load_ours,
    quantize,
    read_config,
    save,
    stored,
    tensors_of,
    write_config,
)
from safetensors.torch import load_file, save_file

from errors import ConfigError
from hf import get_model_args, model_args_of_folder, require_same_model
from hf.config import config_of_model, family_of_model
from hf.families import FAMILIES
from hf.names import hf_tensor_of
from hf.safetensors import TensorReader, write_tensors
from model import Transformer, get_flavor, num_params


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(model, folder) by name."""
    folder = tmp_path_factory.mktemp("sources")
    models = {
        "grouped-query": build("Llama", **LLAMA),
        "tied": build("Llama", **dict(LLAMA, tie_word_embeddings=True)),
        "V3": build("DeepseekV3", **dict(DEEPSEEK, q_lora_rank=24, n_group=4, topk_group=2)),
    }
    return {name: (model, save(model, folder / name)) for name, model in models.items()}


# ------------------------------------------------------------------------------------------------ the model of a run


def test_get_model_args_takes_flavor_and_overrides():
    """An override of None, which is an option that was not given, keeps the flavor's value."""
    expected = dataclasses.replace(get_flavor("llama3_debug"), n_layers=3)
    assert get_model_args("llama3_debug", n_layers=3, dim=None) == expected


def test_get_model_args_rejects_unknown_flavor_and_wrong_sizes():
    """A ValueError of model/ arrives as ConfigError, which ends a run with one line."""
    with pytest.raises(ConfigError, match=r'did you mean "llama3_debug"'):
        get_model_args("llama3_debu")
    with pytest.raises(ConfigError, match=r"model.n_heads \(3\) must divide model.dim \(128\)"):
        get_model_args("llama3_debug", n_heads=3)


def test_get_model_args_of_folder_takes_overrides_for_the_same_folder(sources, tmp_path):
    """The folder of the weights is compared as a place, whatever its spelling."""
    folder = sources["V3"][1]
    (tmp_path / "link").symlink_to(folder)
    expected = dataclasses.replace(model_args_of_folder(str(folder)), n_layers=1)
    for spelling in (str(folder), f"{folder}/", f"{folder}/../{folder.name}", str(tmp_path / "link")):
        assert get_model_args(f"hf:{folder}", spelling, n_layers=1) == expected, spelling
        assert get_model_args(f"hf:{spelling}", str(folder), n_layers=1) == expected, spelling


def test_get_model_args_rejects_weights_of_another_model(sources):
    """The error names the difference and the flavor that fits."""
    folder, other = sources["tied"][1], sources["grouped-query"][1]
    for flavor in ("llama3_debug", f"hf:{other}"):
        with pytest.raises(ConfigError, match=rf"tie_word_embeddings is True there, False here.*hf:{folder}"):
            get_model_args(flavor, str(folder))


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("flavor", BUILT_IN_FLAVORS)
def test_every_tensor_of_a_flavor_has_its_own_hf_name(flavor):
    """The maps of the family know each tensor, and no two of our tensors have one name there."""
    args = dataclasses.replace(get_flavor(flavor), n_layers=4, n_experts=min(16, get_flavor(flavor).n_experts))
    with torch.device("meta"):
        names = Transformer(args).state_dict().keys() - ({"output.weight"} if args.tie_embeddings else set())
    hf_names = [hf_name for name in names for hf_name in hf_tensor_of(name, args, family_of_model(args), {}).names]
    assert len(hf_names) == len(set(hf_names)) and len(hf_names) >= len(names)


def test_name_map_belongs_to_its_family():
    """A family in which `attention.q_norm` is a norm of each head, and not MLA's norm of the latent, is one entry."""
    llama, _, v3 = FAMILIES
    norms = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
    with_norms = dataclasses.replace(
        llama,
        architecture="Qwen3ForCausalLM",
        names=llama.names | norms,
        rotate_half=lambda args, config: llama.rotate_half(args, config) | dict.fromkeys(norms, args.head_dim),
    )
    found = hf_tensor_of("layers.0.attention.q_norm.weight", get_flavor("llama3_debug"), with_norms, config={})
    assert found.names == ("model.layers.0.self_attn.q_norm.weight",)
    assert found.rows(16).tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    found = hf_tensor_of("layers.0.attention.q_norm.weight", get_flavor("deepseek_v3_debug"), v3, config={})
    assert found.names == ("model.layers.0.self_attn.q_a_layernorm.weight",)


# ------------------------------------------------------------------------------------------------ float8


@pytest.mark.parametrize("block", [(16, 8), (5, 7), (128, 128)])
def test_blockwise_float8_equals_its_dequantized_twin(sources, block, tmp_path):
    """Whole tensors, and rectangles that begin and end inside of blocks, with rows in any order."""
    quantize(sources["V3"][1], tmp_path / "float8", tmp_path / "twin", block)
    ours, twin = (tensors_of(load_ours(tmp_path / name, torch.float32)) for name in ("float8", "twin"))
    for name, tensor in twin.items():
        assert torch.equal(ours[name], tensor), name
    reader, expected = TensorReader(str(tmp_path / "float8")), load_file(tmp_path / "twin" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"  # [32, 48]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        first = [int(torch.randint(size, (), generator=generator)) for size in (32, 48)]
        end = [
            int(torch.randint(f + 1, size + 1, (), generator=generator))
            for f, size in zip(first, (32, 48), strict=True)
        ]
        rows, columns = (torch.arange(f, e) for f, e in zip(first, end, strict=True))
        rows = rows[torch.randperm(len(rows), generator=generator)]
        assert torch.equal(reader.read(name, [rows, columns]), expected[name][rows][:, columns])


# ------------------------------------------------------------------------------------------------ refused


def without_tensor(name):
    def change(folder):
        tensors = stored(folder)
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


def with_tensor(name, tensor):
    return lambda folder: save_file(stored(folder) | {name: tensor}, folder / "model.safetensors")


def with_config(**values):
    return lambda folder: write_config(folder, read_config(folder) | values)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
REFUSED = {
    K_PROJ + r" \(1 tensors are missing\)": without_tensor(K_PROJ),
    rf"{K_PROJ} is \[32, 32\], for layers.1.attention.wk.weight it must be \[16, 32\]": with_tensor(
        K_PROJ, torch.zeros(32, 32)
    ),
    r"q_proj.bias, which the model has no place for \(1 such": with_tensor(
        "model.layers.0.self_attn.q_proj.bias", torch.zeros(32)
    ),
    "is in float8, but there is no": with_tensor(K_PROJ, torch.zeros(16, 32).to(torch.float8_e4m3fn)),
    "is stored as torch.int8": with_tensor(K_PROJ, torch.zeros(16, 32, dtype=torch.int8)),
    "architecture Qwen2ForCausalLM is not supported": with_config(architectures=["Qwen2ForCausalLM"]),
    "architecture missing": with_config(architectures=None),
    "attention_bias is true; only false": with_config(attention_bias=True),
    "head_dim is 16; only 8": with_config(head_dim=16),
    "hidden_act": with_config(hidden_act="gelu"),
    "has no vocab_size": with_config(vocab_size=None),
    "num_nextn_predict_layers is 1; only 0": with_config(
        **dict(LATENT, architectures=["DeepseekV2ForCausalLM"]), num_nextn_predict_layers=1
    ),
    'RoPE of type "linear"': with_config(rope_parameters=dict(rope_type="linear", factor=2.0)),
    "YaRN is supported": with_config(rope_parameters=dict(rope_type="yarn", factor=2.0, attention_factor=2.0)),
    'only "fp8" in blocks': with_config(quantization_config=dict(quant_method="gptq")),
    "cannot read .*model.safetensors: .*header": lambda folder: (folder / "model.safetensors").write_bytes(
        b"12345678nothing"
    ),
    "lack low_freq_factor": with_config(rope_parameters=dict(rope_type="llama3", factor=2.0)),
    "cannot read .*model-2.safetensors: No such file": lambda folder: (
        folder / "model.safetensors.index.json"
    ).write_text(json.dumps(dict(weight_map=dict.fromkeys(stored(folder), "model-2.safetensors")))),
    "index.json: not valid JSON": lambda folder: (folder / "model.safetensors.index.json").write_text("["),
    "has neither": lambda folder: (folder / "model.safetensors").unlink(),
    "not valid JSON": lambda folder: (folder / "config.json").write_text("{"),
    "cannot read .*config.json: No such file": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_load_rejects_bad_folder_and_names_the_cause(sources, message, tmp_path):
    """The error is one line with the tensor, field or file that is wrong."""
    folder = save(sources["grouped-query"][0], tmp_path / "hf")
    REFUSED[message](folder)
    with pytest.raises(ConfigError, match=message) as raised:
        load_ours(folder)
    assert "\n" not in str(raised.value)


def test_load_of_fewer_layers_reports_the_layers_left_out(sources, capsys):
    """A model of one layer takes the first layer of a folder of two."""
    _, folder = sources["grouped-query"]
    args = dataclasses.replace(model_args_of_folder(str(folder)), n_layers=1)
    model = load_ours(folder, args=args)
    assert "layers [1] are left out" in capsys.readouterr().out
    assert torch.equal(model.layers["0"].feed_forward.w1.weight, stored(folder)["model.layers.0.mlp.gate_proj.weight"])


def test_load_rejects_missing_mtp_layer_and_names_the_option(sources, tmp_path):
    """config.json counts an MTP layer that no file holds, as in a folder that transformers has saved."""
    folder = save(sources["V3"][0], tmp_path / "hf")
    with_config(num_nextn_predict_layers=1)(folder)
    with pytest.raises(ConfigError, match=r"has no model.layers.2.*--model.n_mtp_layers 0"):
        load_ours(folder)


def test_load_rejects_options_that_add_tensors_to_a_family(sources):
    """Llama has no MoE layer, and no tensor is read for one."""
    _, folder = sources["grouped-query"]
    args = dataclasses.replace(model_args_of_folder(str(folder)), n_experts=4, top_k=2, moe_hidden_dim=8)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no tensor for layers\.0\.moe\..*options of \[model\]"):
        load_ours(folder, args=args)


def test_untied_model_loads_tied_folder(sources):
    """The head starts as a copy of the embedding."""
    _, folder = sources["tied"]
    model = load_ours(folder, args=dataclasses.replace(model_args_of_folder(str(folder)), tie_embeddings=False))
    assert torch.equal(model.output.weight, model.tok_embeddings.weight)
    assert model.output.weight is not model.tok_embeddings.weight


def test_tied_model_rejects_untied_folder(sources):
    """Loading would lose the folder's head."""
    _, folder = sources["grouped-query"]
    with pytest.raises(ConfigError, match=r"has lm_head.weight, which the model has no place for"):
        load_ours(folder, args=dataclasses.replace(model_args_of_folder(str(folder)), tie_embeddings=True))


@pytest.mark.parametrize("name", BUILT_IN_FLAVORS)
def test_flavor_survives_config_json(name, tmp_path):
    """A flavor that is written as config.json and read again is the same, except for what only training uses."""
    args = get_flavor(name)
    write_config(tmp_path, config_of_model(args))
    training = dict(balance_loss_weight=args.balance_loss_weight)
    assert dataclasses.replace(model_args_of_folder(str(tmp_path)), **training) == args
    require_same_model(args, str(tmp_path))
    with pytest.raises(ConfigError, match=rf"hidden_size is {args.dim} there, {2 * args.dim} here.*hf:{tmp_path}"):
        require_same_model(dataclasses.replace(args, dim=2 * args.dim), str(tmp_path))


PUBLISHED = {  # the fields that decide the model, from the config.json of the published folder
    "llama3_8b": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "mlp_bias": false, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "vocab_size": 128256}""",
    "deepseek_v2_lite_16b": """{"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling":
        {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy",
        "v_head_dim": 128, "vocab_size": 102400}""",
    "deepseek_v3_671b": """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1,
        "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
        "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280}""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flavor_equals_published_config(name, tmp_path):
    """A run of the flavor accepts the published folder, and config.json alone gives the flavor's sizes."""
    (tmp_path / "config.json").write_text(PUBLISHED[name])
    require_same_model(get_flavor(name), str(tmp_path))
    assert num_params(model_args_of_folder(str(tmp_path))) == num_params(get_flavor(name))


@pytest.mark.parametrize(
    "change",
    [
        dict(attention="gqa"),
        dict(score_function="softmax"),
        dict(n_group_topk=1),
        dict(rope_scaling="yarn", rope_mscale=0.7),
    ],
)
def test_config_of_model_rejects_what_no_family_computes(change):
    """transformers would compute another model from the exported folder."""
    with pytest.raises(ConfigError, match=r"none of LlamaForCausalLM|Hugging Face's YaRN has no rope_mscale 0.7"):
        config_of_model(dataclasses.replace(get_flavor("deepseek_v3_debug"), **change))


def test_write_tensors_aligns_each_tensor_in_its_file(tmp_path):
    """A tensor begins at a multiple of its element's size, whatever dtypes the tensors before it have."""
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5), "c": torch.randn(1).bfloat16()}
    write_tensors(str(tmp_path), [(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], tensors.values(), 1000)
    content = next(tmp_path.glob("*.safetensors")).read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and json.loads(content[8 : 8 + length])["b"]["data_offsets"] == [0, 20]
    assert all(torch.equal(found, tensors[name]) for name, found in stored(tmp_path).items())
