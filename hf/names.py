"""The place of each of our tensors in a Hugging Face folder. The names come from the family's map. Three more things
differ:

    RoPE       Our model rotates channels 2i and 2i + 1 together, as Meta's and DeepSeek's code does. With rotate_half
               channels i and i + d/2 belong together, so the rows of the projections have another order in each head.
    experts    We have one tensor [expert, in, out] each for w1, w2 and w3. They have one matrix [out, in] per expert.
    MTP        Our mtp.{k} is their layer n_layers + k, which also holds a copy of the embedding and of the head.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import ConfigError
from hf.families import TOP_LEVEL, Family
from model.args import ModelArgs


@dataclass(frozen=True)
class HFTensor:
    """Where one of our tensors is in a Hugging Face folder."""

    names: tuple[str, ...]  # one name, or the names of the experts' matrices by expert number
    is_stacked: bool = False  # ours[e] is the transpose of expert e's matrix
    head_rows: int = 0  # rows per head; 0 if all rows have our order
    rotated_rows: int = 0  # the last rows of each head, which have the order of rotate_half

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        """Shape of each of `names`, if our tensor has the shape `ours`."""
        return (ours[2], ours[1]) if self.is_stacked else tuple(ours)

    def rows(self, num_rows: int) -> Tensor:
        """For each of our rows, the number of the same row there: int64 [num_rows]."""
        rows = torch.arange(num_rows)
        if self.head_rows:
            rotated = rows.view(-1, self.head_rows)[:, -self.rotated_rows :]  # a view, so copy_ below changes rows
            # Pair i is at rows 2i and 2i + 1 here, and at rows i and i + half there.
            rotated.copy_(rotated.unflatten(1, (2, -1)).transpose(1, 2).flatten(1).clone())
        return rows


def hf_tensor_of(name: str, args: ModelArgs, family: Family, config: dict[str, Any]) -> HFTensor:
    """Where our tensor `name` is in a folder of the family, which has this config.json. Raises ConfigError if the
    family has no such tensor."""
    if name in TOP_LEVEL:
        return HFTensor((TOP_LEVEL[name],))
    kind, number, rest = re.fullmatch(r"(layers|mtp)\.(\d+)\.(?:block\.)?(.*)", name).groups()
    layer, module = int(number) + (args.n_layers if kind == "mtp" else 0), rest.removesuffix(".weight")
    if module not in family.names:
        cure = "--model.n_mtp_layers 0" if kind == "mtp" else "leave out the options of [model] that add it"
        raise ConfigError(f"{family.architecture} has no tensor for {name}; {cure}.")
    their_name = f"model.layers.{layer}.{family.names[module]}" + (".weight" if rest != module else "")
    if "{expert}" in their_name:
        return HFTensor(tuple(their_name.format(expert=e) for e in range(args.n_experts)), is_stacked=True)
    head_rows = family.rotate_half(args, config).get(module, 0)
    return HFTensor((their_name,), head_rows=head_rows, rotated_rows=args.rope_dim)


def mtp_copies_in_hf(args: ModelArgs, family: Family) -> dict[str, str]:
    """The tensors that each MTP layer of a folder repeats: their name -> our tensor."""
    tied = {"output.weight": "tok_embeddings.weight"} if args.tie_embeddings else {}
    return {
        f"model.layers.{args.n_layers + k}.{name}": tied.get(ours, ours)
        for k in range(args.n_mtp_layers)
        for name, ours in family.mtp_copies.items()
    }


def layer_of(hf_name: str) -> int:
    """Number of the layer that a tensor belongs to, or -1 for a tensor of no layer."""
    found = re.match(r"model\.layers\.(\d+)\.", hf_name)
    return int(found[1]) if found else -1


def sort_key(hf_name: str) -> tuple:
    """Sorts names in the model's order: the head is last, and expert 2 comes before expert 10."""
    parts = re.split(r"(\d+)", hf_name)  # every second part is a number
    return hf_name.startswith("lm_head"), [int(part) if i % 2 else part for i, part in enumerate(parts)]
