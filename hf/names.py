"""Which tensors of a Hugging Face folder are which of ours, and in which order their rows are. Three things differ
beside names:

    RoPE       ours rotates channels 2i and 2i + 1 together, as Meta's and DeepSeek's files do; Llama's on Hugging Face
               have channel i with i + d/2, so the rows of q_proj and k_proj are in another order, head by head
    experts    ours are one tensor [expert, in, out] each for w1, w2 and w3; theirs a matrix [out, in] an expert
    MTP        block n_layers + k of theirs, with a copy of the embedding and of the head, is mtp.{k} here
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.args import ModelArgs

WHOLE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "moe.router": "mlp.gate",
    "moe.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "moe.shared_experts.w2": "mlp.shared_experts.down_proj",
    "moe.shared_experts.w3": "mlp.shared_experts.up_proj",
}
EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
EXPERT_BIAS = ("moe.router.expert_bias", "mlp.gate.e_score_correction_bias")
MTP = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
MTP_COPIES = {"embed_tokens.weight": "tok_embeddings.weight", "shared_head.head.weight": "output.weight"}


@dataclass(frozen=True)
class Theirs:
    """Where one of our tensors is in a Hugging Face folder."""

    names: tuple[str, ...]  # one, or one an expert, in the order of their numbers
    is_stacked: bool = False  # expert e is ours[e], transposed
    head_rows: int = 0  # rows of a head, if its last rotated_rows are (first halves, second halves) of pairs there
    rotated_rows: int = 0

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        return (ours[2], ours[1]) if self.is_stacked else tuple(ours)

    def rows(self, num_rows: int) -> Tensor:
        """Their row for each of our rows: int64 [num_rows]."""
        rows = torch.arange(num_rows)
        if self.rotated_rows:
            rotated = rows.view(-1, self.head_rows)[:, -self.rotated_rows :]
            # A view into rows: pair i is at 2i and 2i + 1 here, at i and i + half there.
            rotated.copy_(rotated.unflatten(1, (2, -1)).transpose(1, 2).flatten(1).clone())
        return rows


def theirs(name: str, args: ModelArgs, rope_in_halves: bool) -> Theirs:
    """Where our tensor `name` is; rope_in_halves says that their rotated pairs are not neighbours."""
    if name in WHOLE:
        return Theirs((WHOLE[name],))
    kind, number, rest = re.fullmatch(r"(layers|mtp)\.(\d+)\.(.*)", name).groups()
    layer = int(number) + (args.n_layers if kind == "mtp" else 0)
    prefix = f"model.layers.{layer}."
    if kind == "mtp" and not rest.startswith("block."):
        return Theirs((f"{prefix}{MTP[rest.removesuffix('.weight')]}.weight",))
    rest = rest.removeprefix("block.")
    if rest == EXPERT_BIAS[0]:
        return Theirs((prefix + EXPERT_BIAS[1],))
    if rest.startswith("moe.experts."):
        matrix = EXPERTS[rest.removeprefix("moe.experts.")]
        names = (f"{prefix}mlp.experts.{expert}.{matrix}.weight" for expert in range(args.n_experts))
        return Theirs(tuple(names), is_stacked=True)
    module = rest.removesuffix(".weight")
    found = Theirs((f"{prefix}{BLOCK[module]}.weight",))
    heads = {"wq": args.head_dim, "wk": args.head_dim, "wq_b": args.head_dim}
    if args.attention == "mla":
        heads["wkv_a"] = args.kv_lora_rank + args.qk_rope_head_dim
    head_rows = heads.get(module.removeprefix("attention."))
    if rope_in_halves and head_rows:
        return replace(found, head_rows=head_rows, rotated_rows=args.rope_dim)
    return found


def copies_of(args: ModelArgs, is_head_tied: bool) -> dict[str, str]:
    """What a folder has, or may have, twice, by its name there: our tensor that it repeats. is_head_tied: a head beside
    the embedding is such a copy, too."""
    embedding, head = "tok_embeddings.weight", "output.weight"
    copies = {WHOLE[head]: embedding} if args.tie_embeddings and is_head_tied else {}
    for k in range(args.n_mtp_layers):
        for name, ours in MTP_COPIES.items():
            copies[f"model.layers.{args.n_layers + k}.{name}"] = embedding if args.tie_embeddings else ours
    return copies


def layer_of(their_name: str) -> int:
    """Number of the block that a tensor belongs to; -1 if to none."""
    found = re.match(r"model\.layers\.(\d+)\.", their_name)
    return int(found[1]) if found else -1


def in_order(their_name: str) -> tuple:
    """Sorts names as a model has them, with numbers as numbers: expert 2 comes before expert 10, and the head last."""
    parts = re.split(r"(\d+)", their_name)
    rank = [r"model.embed_tokens", "model.layers", "model.norm", "lm_head"]
    first = next((i for i, prefix in enumerate(rank) if their_name.startswith(prefix)), len(rank))
    return (first, [(int(part), "") if part.isdigit() else (-1, part) for part in parts])
