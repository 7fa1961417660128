"""Context parallelism: each rank of the cp axis holds a part of every sequence, and all of the weights.

Everything but attention works on single tokens, so only attention communicates. Under a causal mask later tokens attend
to more: with C ranks, a sequence is cut in 2C chunks, and rank r holds chunks r and 2C - 1 - r, one from the head and
one from the tail, so that all have the same work (Llama 3, arXiv:2407.21783, section 3.3.2). Positions and labels are
cut like the tokens and travel with them; the numbers of documents, where several share a sequence, stay whole, as every
query needs those of all keys.

Three methods, for a rank's b = batch x seq / C tokens of a microbatch and the heads of size d that tensor parallelism
leaves it, H of queries and K of keys and values; in elements, of param_dtype's bytes:

    allgather   Queries stay. Keys and values of the whole sequence are gathered; their gradients are reduce-scattered.
                Per layer a rank receives 2 b K d (C-1) in forward, in one all-gather, and the same in backward, in one
                reduce-scatter, and holds all C parts of the keys and values, 2 b C K d, for backward. Any number of
                heads. It is the one for grouped queries: K is small.
    alltoall    Heads are exchanged for tokens, so that a rank has all tokens of 1/C of the heads (DeepSpeed-Ulysses,
                Jacobs et al. 2023, arXiv:2309.14509), and again after attention. Per layer a rank receives
                b (2H + 2K) d (C-1)/C in forward, in one all-to-all of H + 2K heads and one of H, and the same in
                backward, and holds no more than it would alone. C must divide H and K.

With H = 4K, allgather receives less up to C = 5, and alltoall beyond; memory is alltoall's case at any C. In latent
attention K = H, and d is d_qk for a query or key and d_v for a value: allgather receives b H (d_qk + d_v) (C-1) a layer
in each direction, alltoall b H (2 d_qk + 2 d_v) (C-1)/C.

    latent      For multi-head latent attention: allgather, but of the latents that keys and values are made from, with
                the key that has RoPE: per layer b (kv_lora_rank + qk_rope_head_dim) (C-1) in forward and the same in
                backward, 576 numbers a token where DeepSeek-V3's keys and values are 40,960. Every rank makes keys and
                values of the whole sequence, so it computes C times the product that makes them.

Torch's own ring attention (torch.distributed.tensor.experimental) is not among them: it replaces
F.scaled_dot_product_attention for the whole process, works on CUDA alone, and is not among the stable API.

Proof: tests/test_parity.py; the bytes: tests/test_communication.py and test_communication_of_mixtures.py.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from errors import ConfigError
from model.args import ModelArgs
from model.attention import BlockMask, DocumentMask
from parallelize.styles import gather_sequence
from torch_private import all_to_all_single_autograd


def shard_sequence(batch: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """This rank's part [batch, seq / C] of each tensor [batch, seq] but documents: chunks r and 2C - 1 - r of 2C."""
    size, rank = mesh.size(), mesh.get_local_rank()
    if size == 1:
        return batch
    chunks = {name: tensor.chunk(2 * size, dim=1) for name, tensor in batch.items()}
    parts = {name: torch.cat((c[rank], c[2 * size - 1 - rank]), dim=1) for name, c in chunks.items()}
    return parts | {name: tensor for name, tensor in batch.items() if name == "documents"}


def parallelize_context(model: nn.Module, mesh: DeviceMesh, *, method: str, seq_len: int, tp: int) -> None:
    """Exchanges the core of every block's attention, in place, for one that sees the whole sequence; seq_len is the
    whole sequence's, tp the degree of tensor parallelism. ValueError where the degree does not divide what it must."""
    if mesh.size() == 1:
        return
    require_divisible(model.args, mesh.size(), method, seq_len, tp)
    make = {"allgather": AllGatherKVAttention, "alltoall": UlyssesAttention, "latent": CPAttention}[method]
    for block in model.blocks().values():
        block.attention.core = make(block.attention.core, mesh, seq_len)
        if method == "latent":
            block.attention.latent = GatherTokens(mesh)
    if method != "alltoall":
        model.document_mask = CPDocumentMask(mesh, seq_len)


class CPDocumentMask(DocumentMask):
    """The rows of the mask that are for this rank's two chunks of queries."""

    def __init__(self, mesh: DeviceMesh, seq_len: int):
        super().__init__()
        rank, self.chunk = mesh.get_local_rank(), seq_len // (2 * mesh.size())
        self.starts = (rank * self.chunk, (2 * mesh.size() - 1 - rank) * self.chunk)

    def queries(self, seq_len: int, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(start, start + self.chunk, device=device) for start in self.starts])


class GatherTokens(nn.Module):
    """[batch, seq / C, ...] of this rank's two chunks -> [batch, seq, ...]."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        # Every rank's queries contribute to the gradient of every key: a sum, which gather_sequence scatters. Without
        # that only the own part of it would come back.
        return in_order(gather_sequence(x[None], self.mesh, dim=0))


class CPAttention(nn.Module):
    """Attention of this rank's two chunks of queries to the keys and values of the whole sequence."""

    def __init__(self, core: nn.Module, mesh: DeviceMesh, seq_len: int):
        super().__init__()
        self.core = core
        rank, chunk = mesh.get_local_rank(), seq_len // (2 * mesh.size())
        # A chunk of queries sees the keys up to its own end, and of the last of these only what is past. This mask is
        # never made on a GPU, it picks a kernel. (Made here, as it cannot be under selective recomputation.)
        self.ends = ((rank + 1) * chunk, (2 * mesh.size() - rank) * chunk)
        self.masks = [causal_lower_right(chunk, end) for end in self.ends]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """q [batch, seq / C, heads, d_qk] of the two chunks; k and v [batch, seq, heads, d] -> [.., heads, d_v]. mask:
        `CPDocumentMask`'s, for both chunks at once, or None."""
        if mask is not None:
            return self.core(q, k, v, mask)
        parts = zip(q.chunk(2, dim=1), self.ends, self.masks, strict=True)
        return torch.cat([self.core(part, k[:, :end], v[:, :end], mask) for part, end, mask in parts], dim=1)


class AllGatherKVAttention(CPAttention):
    def __init__(self, core: nn.Module, mesh: DeviceMesh, seq_len: int):
        super().__init__(core, mesh, seq_len)
        self.gather = GatherTokens(mesh)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """q, k, v [batch, seq / C, heads, d] of this rank's two chunks -> [batch, seq / C, heads, d_v]."""
        k, v = self.gather(torch.cat((k, v), dim=-1)).split((k.size(-1), v.size(-1)), dim=-1)
        return super().forward(q, k, v, mask)


class UlyssesAttention(nn.Module):
    def __init__(self, core: nn.Module, mesh: DeviceMesh, seq_len: int):
        super().__init__()
        self.core, self.mesh = core, mesh

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """q, k, v [batch, seq / C, heads, head_dim] of this rank's two chunks; returns q's shape."""
        n = self.mesh.size()
        # [batch, seq / C, heads, d] -> [C, batch, seq / C, heads / C x d]: what goes to each rank; one message for all.
        parts = [x.unflatten(2, (n, -1)).flatten(3).movedim(2, 0) for x in (q, k, v)]
        together = in_order(self._exchange(torch.cat(parts, dim=-1)))
        widths = [x.size(2) // n * x.size(3) for x in (q, k, v)]
        q, k, v = (
            x.unflatten(-1, (-1, d))
            for x, d in zip(together.split(widths, dim=-1), (q.size(3), k.size(3), v.size(3)), strict=True)
        )
        out = self.core(q, k, v, mask)  # all tokens of some heads: nothing here knows that there are others
        back = self._exchange(by_rank(out, n))  # [C, batch, seq / C, heads / C, d], by the heads' rank
        return back.movedim(0, 2).flatten(2, 3)

    def _exchange(self, x: Tensor) -> Tensor:
        """Sends x[i] to rank i; [i] of the result is what rank i sent."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.mesh.get_group())


def in_order(parts: Tensor) -> Tensor:
    """What comes from ranks 0, 1, ... [C, batch, seq / C, ...] -> [batch, seq, ...] in the sequence's order."""
    heads, tails = parts.chunk(2, dim=2)
    return torch.cat((*heads.unbind(), *tails.unbind()[::-1]), dim=1)


def by_rank(x: Tensor, size: int) -> Tensor:
    """The way back: x [batch, seq, ...] -> what belongs to each rank, [C, batch, seq / C, ...]."""
    chunks = x.chunk(2 * size, dim=1)
    return torch.stack([torch.cat((chunks[r], chunks[2 * size - 1 - r]), dim=1) for r in range(size)])


def require_divisible(args: ModelArgs, degree: int, method: str, seq_len: int, tp: int) -> None:
    """ValueError unless a sequence has 2 x degree equal chunks and, for "alltoall", the heads can be shared."""
    if seq_len % (2 * degree) != 0:
        below = seq_len // (2 * degree) * 2 * degree
        raise ConfigError(
            f"training.seq_len ({seq_len}) must be a multiple of 2 x parallelism.context_parallel_degree ({degree}): "
            f"each rank takes one part from the head and one from the tail; use {below} or {below + 2 * degree}."
        )
    if method == "latent" and args.attention != "mla":
        raise ConfigError(
            f'parallelism.context_parallel_method "latent" gathers the latents of model.attention "mla", but it is '
            f'"{args.attention}"; use "allgather".'
        )
    for name, heads in (("model.n_heads", args.n_heads), ("model.n_kv_heads", args.n_kv_heads)):
        if method == "alltoall" and heads // tp % degree != 0:
            raise ConfigError(
                f'parallelism.context_parallel_method "alltoall" needs context_parallel_degree ({degree}) to divide '
                f'{name} / tensor_parallel_degree ({heads} / {tp} = {heads // tp}); use "allgather".'
            )
