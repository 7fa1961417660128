"""Export to Hugging Face folders, for Llama 3 and for DeepSeek V2 and V3.

Loading is straight into any layout: a rank reads, of each tensor, the rectangle that it holds, and nothing else. Export
goes from a checkpoint's folder to a Hugging Face one, tensor by tensor.

Proof: tests/test_hf.py, against transformers; tests/test_hf_layouts.py; tests/test_hf_folders.py.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from checkpoint.integrity import SafeReader, find_damage
from checkpoint.state import read_state
from errors import ConfigError
from hf.config import LLAMA, ConfigFile, config_of_model
from hf.names import EXPERT_BIAS, Theirs, copies_of, in_order, theirs
from hf.safetensors import write_tensors
from model import ModelArgs

PASSED_THROUGH = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# --------------------------------------------------------------------------------------------------- out


@torch.no_grad()
def export_hf(
    checkpoint: str,
    folder: str,
    *,
    dtype: torch.dtype | None = None,
    like: str | None = None,
    skip_mtp: bool = False,
    max_bytes: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint folder (.../step-N) as a Hugging Face folder. One of our tensors is in memory at a time: for
    experts, one matrix of all experts of a block.

    dtype        of the weights; None: as stored. The experts' bias stays float32, as published
    like         a Hugging Face folder whose tokenizer, token ids and generation_config.json are taken over
    skip_mtp     leave the blocks of multi-token prediction out
    max_bytes    of a file
    """
    damage = find_damage(checkpoint)
    if damage:
        raise ConfigError(f"{checkpoint} is not a complete checkpoint: {damage}.")
    if os.path.isdir(folder) and os.listdir(folder):
        raise ConfigError(f"{folder} is there already, and is not empty; give another.")
    args = ModelArgs(**read_state(checkpoint)["model_args"])
    args = replace(args, n_mtp_layers=0) if skip_mtp else args
    config = config_of_model(args)

    reader = SafeReader(checkpoint)
    stored = {
        name.removeprefix("model."): meta
        for name, meta in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and not (skip_mtp and name.startswith("model.mtp."))
    }
    rope_in_halves = config["architectures"] == [LLAMA]
    sources = [(name, theirs(name, args, rope_in_halves)) for name in stored]
    # A head that is the embedding has no tensor of its own there; the copies in MTP blocks have.
    sources += [(ours, Theirs((name,))) for name, ours in copies_of(args, is_head_tied=False).items()]
    sources.sort(key=lambda item: in_order(item[1].names[0]))

    def dtype_of(name: str) -> torch.dtype:
        is_bias = name.endswith(EXPERT_BIAS[0])
        return torch.float32 if is_bias else dtype or stored[name].properties.dtype

    def read(name: str) -> Tensor:
        tensor = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({f"model.{name}": tensor}, storage_reader=reader, no_dist=True)
        return tensor.to(dtype_of(name))

    layout = [
        (their_name, source.shape(stored[name].size), dtype_of(name))
        for name, source in sources
        for their_name in source.names
    ]
    tensors = (tensor for name, source in sources for tensor in _as_theirs(read(name), source))
    os.makedirs(folder, exist_ok=True)
    write_tensors(folder, layout, tensors, max_bytes)
    config["torch_dtype"] = str(dtype_of("tok_embeddings.weight")).removeprefix("torch.")
    # Written even where unknown: left out, transformers would put in Llama's, and stop at token 2.
    config |= dict.fromkeys(TOKEN_IDS)
    if like is not None:
        config |= {name: ConfigFile(like).get(name) for name in TOKEN_IDS}
        for name in PASSED_THROUGH:
            if os.path.isfile(os.path.join(like, name)):
                shutil.copyfile(os.path.join(like, name), os.path.join(folder, name))
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)


def _as_theirs(tensor: Tensor, source: Theirs) -> Iterator[Tensor]:
    if source.is_stacked:
        yield from tensor.transpose(1, 2)
    elif source.rotated_rows:
        yield torch.empty_like(tensor).index_copy_(0, source.rows(len(tensor)), tensor)
    else:
        yield tensor
