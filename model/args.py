"""The shape of a model: one frozen dataclass, shared by every family."""

from dataclasses import dataclass, field


def _arg(default, help: str, is_option: bool = True):
    """A field; is_option False: only a flavor or a config.json sets it, no option of [model]."""
    return field(default=default, metadata={"help": help, "is_option": is_option})


@dataclass(frozen=True)
class ModelArgs:
    """Everything that decides a model's parameters and its arithmetic; nothing about how it is trained.

    Raises ValueError for sizes that do not fit together.
    """

    dim: int = _arg(128, "width of the residual stream")
    n_layers: int = _arg(4, "number of blocks")
    n_heads: int = _arg(8, "query heads")
    n_kv_heads: int = _arg(4, "key/value heads: n_heads is multi-head attention, 1 multi-query, between them grouped")
    hidden_dim: int = _arg(384, "hidden width of SwiGLU, in dense blocks")
    vocab_size: int = _arg(4096, "rows of the embedding; at least the tokenizer's number of tokens")
    max_seq_len: int = _arg(8192, "the longest sequence the model is meant for")
    norm_eps: float = _arg(1e-5, "RMSNorm's epsilon", is_option=False)
    tie_embeddings: bool = _arg(False, "the head reuses the embedding's weight")

    attention: str = _arg("gqa", '"gqa", or "mla": keys and values from a compressed latent (DeepSeek-V2)')
    q_lora_rank: int = _arg(0, '"mla": width of the queries\' latent; 0: queries are not compressed')
    kv_lora_rank: int = _arg(0, '"mla": width of the latent of keys and values')
    qk_nope_head_dim: int = _arg(0, '"mla": channels of a query or key head without RoPE')
    qk_rope_head_dim: int = _arg(0, '"mla": channels with RoPE; those of the key are shared by all heads')
    v_head_dim: int = _arg(0, '"mla": channels of a value head')

    n_experts: int = _arg(0, "routed experts of a mixture block; 0: every block is dense")
    top_k: int = _arg(0, "routed experts that a token goes to")
    n_shared_experts: int = _arg(0, "experts that every token goes to, as one of so many times the width")
    moe_hidden_dim: int = _arg(0, "hidden width of an expert")
    n_dense_layers: int = _arg(0, "the first blocks, which stay dense")
    score_function: str = _arg("softmax", '"softmax" over the experts or "sigmoid" of each', is_option=False)
    n_expert_groups: int = _arg(1, "groups of equally many experts; a token's experts come from topk_group")
    topk_group: int = _arg(1, "groups that a token may choose from")
    n_group_topk: int = _arg(1, "a group is ranked by the sum of its best so many scores: V2 1, V3 2", is_option=False)
    route_norm: bool = _arg(False, "the scores of a token's experts are divided by their sum", is_option=False)
    route_scale: float = _arg(1.0, "the scores are multiplied by this, last", is_option=False)
    expert_bias: bool = _arg(False, "experts are chosen by score + bias, which balances them without a loss")
    expert_bias_speed: float = _arg(0.001, "what a step adds to the bias of too idle experts, takes from too busy ones")
    balance_loss_weight: float = _arg(0.0, "weight of the sequence-wise balance loss; 0: none")
    n_mtp_layers: int = _arg(0, "how many further tokens are predicted in training, by a block each")
    mtp_loss_weight: float = _arg(0.3, "weight of the mean of their losses", is_option=False)

    rope_theta: float = _arg(500000.0, "RoPE's base")
    rope_scaling: str = _arg(
        "none", '"none", or how long wavelengths are stretched: "llama3" (3.1) or "yarn"', is_option=False
    )
    rope_factor: float = _arg(8.0, '"llama3", "yarn": how much longer the context became', is_option=False)
    rope_original_seq_len: int = _arg(8192, '"llama3", "yarn": the context before it was stretched', is_option=False)
    rope_low_freq_factor: float = _arg(
        1.0, '"llama3": fewer turns than this in the original context: fully slowed', is_option=False
    )
    rope_high_freq_factor: float = _arg(
        4.0, '"llama3": more turns than this in the original context: left alone', is_option=False
    )
    rope_beta_fast: float = _arg(
        32.0, '"yarn": more turns than this in the original context: left alone', is_option=False
    )
    rope_beta_slow: float = _arg(
        1.0, '"yarn": fewer turns than this in the original context: fully slowed', is_option=False
    )
    rope_mscale: float = _arg(
        1.0, '"yarn": attention\'s growth with the factor, by way of the rotated channels', is_option=False
    )
    rope_mscale_all_dim: float = _arg(0.0, '"yarn": the same by way of all channels; 0: none', is_option=False)

    init_std: float = _arg(0.02, "standard deviation of the initial weights", is_option=False)

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} ({getattr(self, name)}) must be at least 1.")
        for name, choices in (
            ("attention", ("gqa", "mla")),
            ("score_function", ("softmax", "sigmoid")),
            ("rope_scaling", ("none", "llama3", "yarn")),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(f'"{choice}"' for choice in choices)
                raise ValueError(f'model.{name} ("{getattr(self, name)}") must be one of {known}.')
        self._check_attention()
        self._check_experts()
        if self.n_mtp_layers < 0:
            raise ValueError(f"model.n_mtp_layers ({self.n_mtp_layers}) must be at least 0.")

    def _check_attention(self):
        if self.attention == "mla":
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) < 1:
                    raise ValueError(f'model.attention "mla" needs model.{name} ({getattr(self, name)}) of at least 1.')
            if self.n_kv_heads != self.n_heads:
                raise ValueError(
                    f'model.attention "mla" has as many key heads as query heads: set model.n_kv_heads '
                    f"({self.n_kv_heads}) to model.n_heads ({self.n_heads})."
                )
        else:
            if self.dim % self.n_heads != 0:
                raise ValueError(f"model.n_heads ({self.n_heads}) must divide model.dim ({self.dim}).")
            if self.n_heads % self.n_kv_heads != 0:
                raise ValueError(f"model.n_kv_heads ({self.n_kv_heads}) must divide model.n_heads ({self.n_heads}).")
        if self.rope_dim % 2 != 0:
            size = f"model.dim / model.n_heads = {self.dim} / {self.n_heads} = {self.rope_dim}"
            size = f"model.qk_rope_head_dim = {self.rope_dim}" if self.attention == "mla" else size
            raise ValueError(f"the head size, {size}, must be even: RoPE rotates pairs.")

    def _check_experts(self):
        if self.n_experts == 0:
            return
        for name in ("n_experts", "top_k", "moe_hidden_dim", "n_expert_groups", "topk_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} ({getattr(self, name)}) must be at least 1 in a mixture of experts.")
        if self.n_experts % self.n_expert_groups != 0:
            raise ValueError(
                f"model.n_expert_groups ({self.n_expert_groups}) must divide model.n_experts ({self.n_experts})."
            )
        group = self.n_experts // self.n_expert_groups
        if self.topk_group > self.n_expert_groups or self.n_group_topk > group or self.n_group_topk < 1:
            raise ValueError(
                f"model.topk_group ({self.topk_group}) of {self.n_expert_groups} groups, ranked by "
                f"model.n_group_topk ({self.n_group_topk}) of {group} experts each, cannot be; lower them."
            )
        if self.top_k > self.topk_group * group:
            raise ValueError(
                f"model.top_k ({self.top_k}) is more than the {self.topk_group} "
                f"groups of {group} experts that a token may choose from have."
            )
        if self.n_dense_layers > self.n_layers:
            raise ValueError(
                f"model.n_dense_layers ({self.n_dense_layers}) is more than model.n_layers ({self.n_layers})."
            )

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
        """Whether block `layer` is a mixture of experts; those of multi-token prediction count on from n_layers."""
        return self.n_experts > 0 and layer >= self.n_dense_layers
