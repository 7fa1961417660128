"""The shape of a model: one frozen dataclass, shared by every family."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial


def _arg(default, help: str, choices: tuple[str, ...] | None = None, is_option: bool = True):
    return field(default=default, metadata={"help": help, "choices": choices, "is_option": is_option})


_fixed = partial(_arg, is_option=False)  # not a --model.NAME option: comes from the flavor or from a config.json
# Fields that must be at least 1: always, with multi-head latent attention, in a mixture of experts.
_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "max_seq_len")
_MLA_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOE_SIZES = ("n_experts", "top_k", "moe_hidden_dim", "n_expert_groups", "topk_group")


@dataclass(frozen=True)
class ModelArgs:
    """Everything that decides a model's parameters and its arithmetic; nothing about how it is trained. ValueError for
    sizes that do not fit together."""

    dim: int = _arg(128, "width of the residual stream")
    n_layers: int = _arg(4, "number of transformer blocks")
    n_heads: int = _arg(8, "number of query heads")
    n_kv_heads: int = _arg(4, "number of key/value heads: n_heads is multi-head attention, 1 is multi-query attention")
    hidden_dim: int = _arg(384, "hidden width of the feed-forward (SwiGLU) in a dense block")
    vocab_size: int = _arg(4096, "number of rows of the embedding; at least the tokenizer's number of tokens")
    max_seq_len: int = _arg(8192, "longest sequence that the model is meant for")
    norm_eps: float = _fixed(1e-5, "epsilon of RMSNorm")
    tie_embeddings: bool = _arg(False, "use the embedding's weight as the head's weight")

    attention: str = _arg(
        "gqa", '"gqa": grouped-query attention; "mla": multi-head latent attention (DeepSeek-V2)', ("gqa", "mla")
    )
    q_lora_rank: int = _arg(0, '"mla": width of the latent of the queries; 0 means that queries are not compressed')
    kv_lora_rank: int = _arg(0, '"mla": width of the latent of keys and values')
    qk_nope_head_dim: int = _arg(0, '"mla": channels of a query or key head that RoPE does not rotate')
    qk_rope_head_dim: int = _arg(0, '"mla": channels of a query or key head that RoPE rotates; key heads share them')
    v_head_dim: int = _arg(0, '"mla": channels of a value head')

    n_experts: int = _arg(0, "number of routed experts in an MoE block; 0 makes every block dense")
    top_k: int = _arg(0, "number of routed experts that each token goes to")
    n_shared_experts: int = _arg(0, "number of experts that every token goes to; they run as a single wide expert")
    moe_hidden_dim: int = _arg(0, "hidden width of an expert")
    n_dense_layers: int = _arg(0, "number of blocks at the start of the model that stay dense")
    score_function: str = _fixed("softmax", "softmax over the experts, or sigmoid of each", ("softmax", "sigmoid"))
    n_expert_groups: int = _arg(1, "number of groups that the experts are divided into, all of the same size")
    topk_group: int = _arg(1, "number of groups that a token's experts may come from")
    n_group_topk: int = _fixed(1, "a group ranks by the sum of this many of its highest scores (V2: 1, V3: 2)")
    route_norm: bool = _fixed(False, "divide the scores of a token's experts by their sum")
    route_scale: float = _fixed(1.0, "factor on the scores, after route_norm")
    expert_bias: bool = _arg(False, "balance experts without a loss: choose them by score + bias")
    expert_bias_speed: float = _arg(0.001, "change of an expert's bias per step: up if underloaded, down if overloaded")
    balance_loss_weight: float = _arg(0.0, "weight of the sequence-wise balance loss; 0 turns it off")
    n_mtp_layers: int = _arg(0, "multi-token prediction: number of extra blocks, each predicts a token further ahead")
    mtp_loss_weight: float = _fixed(0.3, "weight of the mean of the MTP losses")

    rope_theta: float = _arg(500000.0, "base of RoPE's frequencies")
    # The rest extends a pretrained model's context: channels that rotate slowly are slowed further. "Turns" are a
    # channel's full rotations within the original context.
    rope_scaling: str = _fixed("none", "Llama 3.1's or YaRN's extension of the context", ("none", "llama3", "yarn"))
    rope_factor: float = _fixed(8.0, "the long context divided by the original one")
    rope_original_seq_len: int = _fixed(8192, "the original context")
    rope_low_freq_factor: float = _fixed(1.0, '"llama3": channels with fewer turns than this are slowed fully')
    rope_high_freq_factor: float = _fixed(4.0, '"llama3": channels with more turns than this are not slowed')
    rope_beta_fast: float = _fixed(32.0, '"yarn": channels with more turns than this are not slowed')
    rope_beta_slow: float = _fixed(1.0, '"yarn": channels with fewer turns than this are slowed fully')
    rope_mscale: float = _fixed(1.0, '"yarn": growth of attention\'s logits with rope_factor, by the RoPE channels')
    rope_mscale_all_dim: float = _fixed(0.0, '"yarn": the same growth, by all channels; 0: none')

    init_std: float = _fixed(0.02, "standard deviation of the initial weights")

    def __post_init__(self):
        for message in self._errors():
            raise ValueError(message)

    def _errors(self) -> Iterator[str]:
        """A message for each value that is impossible or does not fit the others."""
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                known = ", ".join(f'"{choice}"' for choice in choices)
                yield f'model.{f.name} ("{value}") must be one of {known}.'
        is_mla, is_moe = self.attention == "mla", self.n_experts != 0
        for is_used, names, message in (
            (True, _SIZES, "model.{} ({}) must be at least 1."),
            (is_mla, _MLA_SIZES, 'model.attention "mla" needs model.{} ({}) of at least 1.'),
            (is_moe, _MOE_SIZES, "model.{} ({}) must be at least 1 in a mixture of experts."),
        ):
            for name in names if is_used else ():
                if getattr(self, name) < 1:
                    yield message.format(name, getattr(self, name))
        if self.n_mtp_layers < 0:
            yield f"model.n_mtp_layers ({self.n_mtp_layers}) must be at least 0."
        if is_mla and self.n_kv_heads != self.n_heads:
            yield (
                f'model.attention "mla" has as many key heads as query heads; set model.n_kv_heads '
                f"({self.n_kv_heads}) to model.n_heads ({self.n_heads})."
            )
        if not is_mla and self.dim % self.n_heads != 0:
            yield f"model.n_heads ({self.n_heads}) must divide model.dim ({self.dim})."
        if not is_mla and self.n_heads % self.n_kv_heads != 0:
            yield f"model.n_kv_heads ({self.n_kv_heads}) must divide model.n_heads ({self.n_heads})."
        if self.rope_dim % 2 != 0:
            size = f"model.dim / model.n_heads = {self.dim} / {self.n_heads} = {self.rope_dim}"
            size = f"model.qk_rope_head_dim = {self.rope_dim}" if is_mla else size
            yield f"the head size, {size}, must be even: RoPE rotates pairs."
        if not is_moe:
            return
        if self.n_experts % self.n_expert_groups != 0:
            yield f"model.n_expert_groups ({self.n_expert_groups}) must divide model.n_experts ({self.n_experts})."
        group = self.n_experts // self.n_expert_groups
        if self.topk_group > self.n_expert_groups or self.n_group_topk > group or self.n_group_topk < 1:
            yield (
                f"model.topk_group ({self.topk_group}) of {self.n_expert_groups} groups, ranked by "
                f"model.n_group_topk ({self.n_group_topk}) of {group} experts each, is impossible; lower them."
            )
        if self.top_k > self.topk_group * group:
            yield (
                f"model.top_k ({self.top_k}) is more than the {self.topk_group * group} experts in the "
                f"{self.topk_group} groups (model.topk_group) that a token may choose from; lower it."
            )
        if self.n_dense_layers > self.n_layers:
            yield f"model.n_dense_layers ({self.n_dense_layers}) is more than model.n_layers ({self.n_layers})."

    @property
    def head_dim(self) -> int:
        """Channels of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention == "mla" else self.dim // self.n_heads

    @property
    def value_head_dim(self) -> int:
        """Channels of a value head."""
        return self.v_head_dim if self.attention == "mla" else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` is a mixture of experts. The MTP blocks are numbered from n_layers on."""
        return self.n_experts > 0 and layer >= self.n_dense_layers
