"""Exports a checkpoint as a Hugging Face folder, one tensor at a time.

Proof: tests/test_hf.py::test_exported_folder_equals_its_source,
tests/test_hf.py::test_export_casts_splits_and_copies_the_tokenizer,
tests/test_hf_layouts.py::test_run_from_folder_resumes_and_exports_in_any_layout.
"""

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
from files import write_json
from hf.config import config_of_model, family_of_model
from hf.families import ConfigFile
from hf.names import HFTensor, hf_tensor_of, mtp_copies_in_hf, sort_key
from hf.safetensors import write_tensors
from model import ModelArgs

COPIED_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@torch.no_grad()
def export_hf(
    checkpoint: str,
    folder: str,
    *,
    dtype: torch.dtype | None = None,  # of the weights; None keeps the checkpoint's
    like: str | None = None,  # Hugging Face folder to copy the tokenizer, token ids and generation_config.json from
    skip_mtp: bool = False,  # leaves out the MTP layers
    max_bytes: int = 5 * 10**9,  # of a safetensors file
) -> None:
    """Writes a checkpoint folder (.../step-N) as a Hugging Face folder. Memory holds one of our tensors at a time; of
    the experts, that is one matrix of all experts of a block. The expert bias stays float32, as published.

    Raises ConfigError for a damaged checkpoint, a folder that is not empty, and a model that no family computes.
    """
    damage = find_damage(checkpoint)
    if damage:
        raise ConfigError(f"{checkpoint} is not a complete checkpoint: {damage}.")
    if os.path.isdir(folder) and os.listdir(folder):
        raise ConfigError(f"{folder} exists and is not empty; give another.")
    args = ModelArgs(**read_state(checkpoint)["model_args"])
    args = replace(args, n_mtp_layers=0) if skip_mtp else args
    family, config = family_of_model(args), config_of_model(args)
    # Unknown token ids are written as null. If they were absent, transformers would take Llama's and stop at token 2.
    config |= {name: ConfigFile(like).get(name) if like is not None else None for name in TOKEN_IDS}

    reader = SafeReader(checkpoint)
    stored = {
        name.removeprefix("model."): metadata
        for name, metadata in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and not (skip_mtp and name.startswith("model.mtp."))
    }
    sources = [(name, hf_tensor_of(name, args, family, config)) for name in stored]
    # A tied head is not stored in the folder. The copies of embedding and head in MTP layers are.
    sources += [(name, HFTensor((hf_name,))) for hf_name, name in mtp_copies_in_hf(args, family).items()]
    sources.sort(key=lambda item: sort_key(item[1].names[0]))

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name.endswith("expert_bias") else dtype or stored[name].properties.dtype

    def to_hf(name: str, source: HFTensor) -> Iterator[Tensor]:
        tensor = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({f"model.{name}": tensor}, storage_reader=reader, no_dist=True)
        tensor = tensor.to(dtype_of(name))
        if source.is_stacked:
            yield from tensor.transpose(1, 2)
        elif source.head_rows:
            yield torch.empty_like(tensor).index_copy_(0, source.rows(len(tensor)), tensor)
        else:
            yield tensor

    layout = [(n, source.shape(stored[name].size), dtype_of(name)) for name, source in sources for n in source.names]
    tensors = (tensor for source in sources for tensor in to_hf(*source))
    os.makedirs(folder, exist_ok=True)
    write_tensors(folder, layout, tensors, max_bytes)
    config["torch_dtype"] = str(dtype_of("tok_embeddings.weight")).removeprefix("torch.")
    write_json(os.path.join(folder, "config.json"), config, indent=2)
    for name in COPIED_FILES if like is not None else ():
        if os.path.isfile(os.path.join(like, name)):
            shutil.copyfile(os.path.join(like, name), os.path.join(folder, name))
