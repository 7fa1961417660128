"""Hugging Face folders, in and out, for Llama 3 and for DeepSeek V2 and V3.

Loading is straight into any layout: a rank reads, of each tensor, the rectangle that it holds, and nothing else. Export
goes from a checkpoint's folder to a Hugging Face one, tensor by tensor.

Proof: tests/test_hf.py, against transformers; tests/test_hf_layouts.py; tests/test_hf_folders.py.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from errors import ConfigError
from hf.config import LLAMA, ConfigFile
from hf.names import WHOLE, Theirs, copies_of, in_order, layer_of, theirs
from hf.safetensors import TensorReader
from model import ModelArgs, Transformer
from parallelize.init import held_indices
from resilience.process_group import rank

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


# --------------------------------------------------------------------------------------------------- in


@torch.no_grad()
def load_hf(folder: str, tensors: dict[str, Tensor], args: ModelArgs) -> None:
    """Fills tensors (by our names; DTensors or plain ones; this rank's part of a model of `args`), in place and cast to
    their dtypes, from a folder of safetensors. ValueError if that is not such a model's; nothing is read then."""
    reader, config = TensorReader(folder), ConfigFile(folder)
    is_llama = config.architecture == LLAMA
    rope_in_halves = is_llama or not config.get("rope_interleave", True)
    with torch.device("meta"):
        names = Transformer(args).state_dict().keys()
    sources = {name: theirs(name, args, rope_in_halves) for name in names}
    if args.tie_embeddings:
        del sources["output.weight"]
    elif config["tie_word_embeddings"] and WHOLE["output.weight"] not in reader.file_of:
        sources["output.weight"] = Theirs((WHOLE["tok_embeddings.weight"],))  # tied there, to be two from now on
    _require_all(reader, sources, copies_of(args, is_head_tied=config["tie_word_embeddings"]), args)
    for name, tensor in tensors.items():
        _require_shape(reader, name, sources[name], tensor.shape)
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel() > 0:  # the last ranks may hold nothing of a small tensor
            _read_into(local, [i.cpu() for i in held_indices(tensor)], tensor.shape, sources[name], reader)


def _read_into(local: Tensor, held: list[Tensor], shape: torch.Size, source: Theirs, reader: TensorReader) -> None:
    if source.is_stacked:
        for part, expert in zip(local, held[0].tolist(), strict=True):
            part.copy_(reader.read(source.names[expert], [held[2], held[1]]).T)
    else:
        rows = source.rows(shape[0])[held[0]]
        local.copy_(reader.read(source.names[0], [rows, *held[1:]]))


def _require_all(reader: TensorReader, sources: dict[str, Theirs], copies: dict[str, str], args: ModelArgs) -> None:
    """ValueError unless the folder has every tensor of the model, and none that the model lacks, but for copies."""
    needed = {name for source in sources.values() for name in source.names}
    missing = sorted(needed - reader.file_of.keys(), key=in_order)
    if missing:
        is_mtp = layer_of(missing[0]) >= args.n_layers
        cure = "; without multi-token prediction: --model.n_mtp_layers 0" if is_mtp else ""
        raise ConfigError(f"{reader.folder} has no {missing[0]} ({len(missing)} tensors are missing){cure}.")
    known = needed | copies.keys()
    known |= {f"{name}_scale_inv" for name in known}
    unread = [n for n in reader.file_of if n not in known and not n.endswith("rotary_emb.inv_freq")]
    beyond = {layer_of(name) for name in unread if layer_of(name) >= args.n_layers + args.n_mtp_layers}
    unread = sorted((name for name in unread if layer_of(name) not in beyond), key=in_order)
    if unread:
        raise ConfigError(
            f"{reader.folder} has {unread[0]}, which the model has no place for ({len(unread)} such tensors)."
        )
    if beyond and rank() == 0:
        print(
            f"{reader.folder}: its layers {sorted(beyond)} are left out, the model has none of these numbers",
            flush=True,
        )


def _require_shape(reader: TensorReader, name: str, source: Theirs, ours: torch.Size) -> None:
    for their_name in source.names:
        found, expected = reader.shape(their_name), source.shape(ours)
        if found != expected:
            raise ConfigError(
                f"{reader.folder}: {their_name} is {list(found)}, for {name} it must be {list(expected)}; "
                "the model's sizes are not the folder's."
            )
