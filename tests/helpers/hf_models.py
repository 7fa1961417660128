"""Tiny random models of transformers: their folders, and their logits in float64."""

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama import modeling_llama

from helpers.checkpoints import write_manifest_of
from hf import load_hf, model_args_of_folder
from model import ModelArgs, Transformer
from model.rope import rope_frequencies

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(SMALL, num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
LATENT = dict(SMALL, num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8)
# More than ten experts, because text order puts 10 and 11 before 2.
MIXTURE = dict(LATENT, moe_intermediate_size=16, n_routed_experts=12, num_experts_per_tok=3, first_k_dense_replace=1)
DEEPSEEK = dict(MIXTURE, max_position_embeddings=4096, tie_word_embeddings=False)
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=1024, beta_fast=2, beta_slow=1
)


class WideTorch:
    """torch with float64 under the name float32, because norms, softmax and router of transformers compute in float32
    in a model of any dtype."""

    float32 = torch.float64

    @staticmethod
    def polar(length, angle):  # torch.polar rounds differently than cos and sin
        return torch.complex(length * angle.cos(), length * angle.sin())

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def wide():
    """transformers computes in float64 everywhere."""
    rotate = modeling_deepseek_v2.apply_rotary_emb

    def rotate_wide(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return rotate(*args)

    with pytest.MonkeyPatch.context() as patch:
        for module in (modeling_llama, modeling_deepseek_v2, modeling_deepseek_v3):
            patch.setattr(module, "torch", WideTorch())
        patch.setattr(modeling_deepseek_v2, "apply_rotary_emb", rotate_wide)
        yield


def build(kind: str, seed: int = 0, **shape) -> transformers.PreTrainedModel:
    """A float64 model with random weights, norms and biases; kind is "Llama", "DeepseekV2" or "DeepseekV3"."""
    config = getattr(transformers, f"{kind}Config")(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2 + (tensor.dim() == 1)
            # transformers, from 5.24 on, reads a router's weight as float32 whatever the model's dtype.
            tensor.copy_(values.float() if name.endswith("gate.weight") else values)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
                buffer.data = buffer.data.float()  # as published
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def save(model: transformers.PreTrainedModel, folder: Path, published: bool = False, max_shard_size="1GB") -> Path:
    """Writes the model's folder. `published` gives config.json the fields of the published folders, not those of
    transformers 5."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    config = read_config(folder)
    if not model.config.model_type.startswith("llama"):
        config["num_nextn_predict_layers"] = 0  # transformers writes 1, but not the block
    if published:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else dict(rope, type=kind, rope_type=kind)
        if config["model_type"] == "deepseek_v3":
            config |= dict(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    write_config(folder, config)
    return folder


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a model by name; a tied weight counts once."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}


def load_ours(folder: Path, dtype: torch.dtype = torch.float64, args: ModelArgs | None = None) -> Transformer:
    args = args or model_args_of_folder(str(folder))
    model = Transformer(args).to(dtype).eval()
    load_hf(str(folder), tensors_of(model), args)
    return model


def share_frequencies(reference: transformers.PreTrainedModel, args: ModelArgs) -> None:
    """Gives the reference our RoPE frequencies, so that everything else can be compared in float64. The frequencies of
    both are float32 and differ by rounding only, which is asserted here."""
    theirs, ours = reference.get_decoder().rotary_emb.inv_freq, rope_frequencies(args, torch.device("cpu"))
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0, check_dtype=False)
    reference.get_decoder().rotary_emb.inv_freq = ours


def some_tokens(vocab_size: int = 99) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions, [2, 40]. 40 is well beyond the original context of the models with scaled RoPE."""
    tokens = torch.randint(vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(40).expand(2, -1)


def random_weights(model: Transformer) -> Transformer:
    """The model with every parameter and buffer random, norms around 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tensors_of(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.dim() == 1))
    return model.eval()


def checkpoint_of(model: Transformer, folder: Path, step: int = 1) -> str:
    """Writes the checkpoint that a run on one process would write; returns its folder."""
    path = folder / f"step-{step}"
    dcp.save({f"model.{name}": t.detach() for name, t in tensors_of(model).items()}, checkpoint_id=path, no_dist=True)
    (path / "state.json").write_text(json.dumps(dict(step=step, model_args=dataclasses.asdict(model.args))))
    write_manifest_of(path)
    return str(path)


def quantize(folder: Path, to: Path, twin: Path, block: tuple[int, int]) -> None:
    """Copies a folder to `to` with its matrices in blockwise float8, and to `twin` with them dequantized again."""
    tensors, eights, twins = stored(folder), {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or "embed" in name or "lm_head" in name or "mlp.gate.weight" in name:
            eights[name] = twins[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = [(size - 1) // b + 1 for size, b in zip(tensor.shape, block, strict=True)]
        scale = torch.rand(blocks, generator=torch.Generator().manual_seed(len(eights))) + 0.5
        spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        eights[name], eights[f"{name}_scale_inv"] = (tensor / spread).to(torch.float8_e4m3fn), scale
        twins[name] = eights[name].float() * spread
    for path, content in ((to, eights), (twin, twins)):
        path.mkdir()
        save_file(content, path / "model.safetensors")
    write_config(twin, read_config(folder))
    quantization = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=list(block))
    write_config(to, read_config(folder) | dict(quantization_config=quantization))
