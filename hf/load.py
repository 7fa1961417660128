"""Loads the weights of a Hugging Face folder into a model in any layout. Each rank reads only what it holds.

Proof: tests/test_hf.py::test_logits_equal_transformers, tests/test_hf.py::test_mtp_logits_equal_transformers,
tests/test_hf_layouts.py::test_load_in_each_layout_equals_one_process,
tests/test_hf_folders.py::test_blockwise_float8_equals_its_dequantized_twin.
"""

import torch
from torch import Tensor

from collectives import local_tensor
from errors import ConfigError
from hf.config import family_of_config, model_args_of_folder
from hf.families import TOP_LEVEL, ConfigFile
from hf.names import HFTensor, hf_tensor_of, layer_of, mtp_copies_in_hf, sort_key
from hf.safetensors import TensorReader
from model import ModelArgs, Transformer
from parallelize.init import held_indices
from resilience.process_group import rank


@torch.no_grad()
def load_hf(folder: str, tensors: dict[str, Tensor], args: ModelArgs) -> None:
    """Fills tensors (by our names, this rank's part of the model of `args`) in place from a folder of safetensors, and
    casts to their dtypes. Raises ConfigError, before anything is read, if the folder's tensors are not the model's."""
    reader, config = TensorReader(folder), ConfigFile(folder)
    family, is_tied_there = family_of_config(config), model_args_of_folder(folder).tie_embeddings
    with torch.device("meta"):
        names = Transformer(args).state_dict().keys()
    sources = {name: hf_tensor_of(name, args, family, config) for name in names}
    repeated, head = set(mtp_copies_in_hf(args, family)), TOP_LEVEL["output.weight"]
    if args.tie_embeddings:
        del sources["output.weight"]
        repeated |= {head} if is_tied_there else set()
    elif is_tied_there and head not in reader.file_of:
        # Tied there and not here: our head starts as a copy of the embedding.
        sources["output.weight"] = HFTensor((TOP_LEVEL["tok_embeddings.weight"],))
    _require_all(reader, {name for source in sources.values() for name in source.names}, repeated, args)
    for name, tensor in tensors.items():
        expected = sources[name].shape(tensor.shape)
        for hf_name in sources[name].names:
            found = reader.shape(hf_name)
            if found != expected:
                raise ConfigError(
                    f"{folder}: {hf_name} is {list(found)}, for {name} it must be {list(expected)}; the model's sizes "
                    "are not the folder's."
                )
    for name, tensor in tensors.items():
        local, held, source = local_tensor(tensor), [i.cpu() for i in held_indices(tensor)], sources[name]
        if local.numel() == 0:  # of a small tensor the last ranks may hold nothing
            continue
        if source.is_stacked:
            for matrix, expert in zip(local, held[0].tolist(), strict=True):
                matrix.copy_(reader.read(source.names[expert], [held[2], held[1]]).T)
        else:
            rows = source.rows(tensor.shape[0])[held[0]]
            local.copy_(reader.read(source.names[0], [rows, *held[1:]]))


def _require_all(reader: TensorReader, needed: set[str], repeated: set[str], args: ModelArgs) -> None:
    """Raises ConfigError for a tensor that the folder lacks, and for a tensor that the model lacks, unless it repeats
    another. Layers beyond the model's last are only reported."""
    folder, num_layers = reader.folder, args.n_layers + args.n_mtp_layers
    missing = sorted(needed - reader.file_of.keys(), key=sort_key)
    if missing:
        is_mtp = layer_of(missing[0]) >= args.n_layers
        cure = "; without multi-token prediction: --model.n_mtp_layers 0" if is_mtp else ""
        raise ConfigError(f"{folder} has no {missing[0]} ({len(missing)} tensors are missing){cure}.")
    known = needed | repeated
    known |= {f"{name}_scale_inv" for name in known}
    unread = [n for n in reader.file_of if n not in known and not n.endswith("rotary_emb.inv_freq")]
    beyond = sorted({layer_of(name) for name in unread if layer_of(name) >= num_layers})
    unread = sorted((name for name in unread if layer_of(name) < num_layers), key=sort_key)
    if unread:
        raise ConfigError(f"{folder} has {unread[0]}, which the model has no place for ({len(unread)} such tensors).")
    if beyond and rank() == 0:
        print(f"{folder}: layers {beyond} are left out, because the model has fewer", flush=True)
