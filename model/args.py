"""The shape of a model: one frozen dataclass, shared by every family."""

from dataclasses import dataclass, field


def _arg(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelArgs:
    """Everything that decides a model's parameters and its arithmetic; nothing about how it is trained.

    Raises ValueError for sizes that do not fit together.
    """

    dim: int = _arg(128, "width of the residual stream")
    n_layers: int = _arg(4, "number of blocks")
    n_heads: int = _arg(8, "query heads")
    n_kv_heads: int = _arg(4, "key/value heads: n_heads is multi-head attention, 1 multi-query, between them grouped")
    ffn_dim: int = _arg(384, "hidden width of SwiGLU")
    vocab_size: int = _arg(4096, "rows of the embedding; at least the tokenizer's number of tokens")
    max_seq_len: int = _arg(8192, "the longest sequence the model is meant for")
    norm_eps: float = _arg(1e-5, "RMSNorm's epsilon")
    tie_embeddings: bool = _arg(False, "the head reuses the embedding's weight")

    rope_theta: float = _arg(500000.0, "RoPE's base")
    rope_scaling: str = _arg("none", '"none" or "llama3", the stretch of long wavelengths of Llama 3.1')
    rope_factor: float = _arg(8.0, '"llama3": how much longer the context became')
    rope_low_freq_factor: float = _arg(1.0, '"llama3": fewer turns than this in the original context: fully slowed')
    rope_high_freq_factor: float = _arg(4.0, '"llama3": more turns than this in the original context: left alone')
    rope_original_seq_len: int = _arg(8192, '"llama3": the context before it was stretched')

    init_std: float = _arg(0.02, "standard deviation of the initial weights")

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} ({getattr(self, name)}) must be at least 1.")
        if self.dim % self.n_heads != 0:
            raise ValueError(f"model.n_heads ({self.n_heads}) must divide model.dim ({self.dim}).")
        if self.n_heads % self.n_kv_heads != 0:
            raise ValueError(f"model.n_kv_heads ({self.n_kv_heads}) must divide model.n_heads ({self.n_heads}).")
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"the head size, model.dim / model.n_heads = {self.dim} / {self.n_heads} = {self.head_dim}, must be "
                "even: RoPE rotates pairs."
            )
        if self.rope_scaling not in ("none", "llama3"):
            raise ValueError(f'model.rope_scaling ("{self.rope_scaling}") must be "none" or "llama3".')

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads
