"""Context parallelism: each rank of the cp axis holds a part of every sequence, and all of the weights.

Idea: everything except attention works on single tokens, so only attention communicates. Under a causal mask later
tokens attend to more keys. With C ranks, a sequence is cut into 2C chunks, and rank r holds chunks r and 2C - 1 - r,
one from the head and one from the tail, so that all ranks have the same work. This is the zigzag order, also called
head-tail load balancing (Llama 3, arXiv:2407.21783, section 3.3.2):

    C = 2, chunks 0 1 2 3 of a sequence:    rank 0 holds 0 3    rank 1 holds 1 2

Positions and labels are cut like the tokens. Document numbers, where several documents share a sequence, stay whole,
because every query needs the numbers of all keys.

There are three methods. A rank has b = batch x seq / C tokens of a microbatch and, after tensor parallelism, H heads of
queries and K heads of keys and values, of size d. Numbers are elements, of param_dtype's bytes:

    allgather   Queries stay. Keys and values of the whole sequence are all-gathered; their gradients are
                reduce-scattered. Per layer a rank receives 2 b K d (C-1) in forward, in one all-gather, and the same
                in backward, in one reduce-scatter. For backward it holds the whole sequence's keys and values,
                2 b C K d. Works for any number of heads; best for grouped queries, where K is small.
    alltoall    Ulysses: heads are exchanged for tokens, so that a rank has all tokens of 1/C of the heads
                (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509), and back after attention. Per layer a rank
                receives b (2H + 2K) d (C-1)/C in forward, in one all-to-all of H + 2K heads and one of H, and the same
                in backward. It holds no more than a rank without context parallelism. C must divide H and K.
    latent      For multi-head latent attention: an all-gather of the latents that keys and values are computed from,
                together with the key's RoPE channels. Per layer b (kv_lora_rank + qk_rope_head_dim) (C-1) in forward
                and the same in backward: 576 numbers a token, where DeepSeek-V3's keys and values are 40,960. Every
                rank computes keys and values of the whole sequence, so it does C times the work of that product.

With H = 4K, allgather receives less up to C = 5, and alltoall beyond; alltoall needs less memory at any C. In latent
attention K = H, and d is d_qk for a query or key and d_v for a value: allgather receives b H (d_qk + d_v) (C-1) a layer
in each direction, alltoall b H (2 d_qk + 2 d_v) (C-1)/C.

Torch's ring attention (torch.distributed.tensor.experimental) is not among them: it replaces
F.scaled_dot_product_attention for the whole process, works on CUDA alone, and is not part of the stable API.

Proof: tests/test_one_step.py::test_context_parallel_equals_one_process; the bytes:
tests/test_communication.py::test_context_parallel_allgather_bytes_equal_formula,
tests/test_communication.py::test_context_parallel_alltoall_bytes_equal_formula,
tests/test_communication_of_mixtures.py::test_context_parallel_bytes_equal_formula.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from model.attention import BlockMask, DocumentMask
from parallelize.styles import gather_sequence
from torch_private import all_to_all_single_autograd


def shard_sequence(batch: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """This rank's chunks, [batch, seq / C], of each tensor [batch, seq, ...] of a batch; `documents` stays whole."""
    if mesh.size() == 1:
        return batch
    parts = {name: zigzag(tensor, mesh.size())[mesh.get_local_rank()] for name, tensor in batch.items()}
    return parts | {name: tensor for name, tensor in batch.items() if name == "documents"}


def parallelize_context(stage: nn.Module, mesh: DeviceMesh, *, method: str, seq_len: int) -> None:
    """Replaces the core of every block's attention, in place, by a module that sees the whole sequence, of seq_len
    tokens."""
    if mesh.size() == 1:
        return
    make = {"allgather": AllGatherKVAttention, "alltoall": UlyssesAttention, "latent": CPAttention}[method]
    for block in stage.blocks().values():
        block.attention.core = make(block.attention.core, mesh, seq_len)
        if method == "latent":
            block.attention.latent = AllGatherSequence(mesh)
    if method != "alltoall":
        stage.document_mask = CPDocumentMask(mesh, seq_len)


class CPDocumentMask(DocumentMask):
    """The rows of the document mask that belong to this rank's two chunks of queries."""

    def __init__(self, mesh: DeviceMesh, seq_len: int):
        super().__init__()
        rank, self.chunk = mesh.get_local_rank(), seq_len // (2 * mesh.size())
        self.starts = (rank * self.chunk, (2 * mesh.size() - 1 - rank) * self.chunk)

    def queries(self, seq_len: int, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(start, start + self.chunk, device=device) for start in self.starts])


class AllGatherSequence(nn.Module):
    """All-gathers [batch, seq / C, ...] of every rank's two chunks into [batch, seq, ...]."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        # Every rank's queries contribute to the gradient of every key: gather_sequence's backward sums them.
        return undo_zigzag(gather_sequence(x[None], self.mesh, dim=0))


class CPAttention(nn.Module):
    """Attention of this rank's two chunks of queries to the keys and values of the whole sequence."""

    def __init__(self, core: nn.Module, mesh: DeviceMesh, seq_len: int):
        super().__init__()
        self.core = core
        rank, chunk = mesh.get_local_rank(), seq_len // (2 * mesh.size())
        # A chunk of queries sees the keys up to its end, with a causal mask on the last chunk of keys. On a GPU this
        # mask takes no memory, it only picks a kernel. Selective checkpointing cannot trace how it is made.
        self.ends = ((rank + 1) * chunk, (2 * mesh.size() - rank) * chunk)
        self.masks = [causal_lower_right(chunk, end) for end in self.ends]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """q [batch, seq / C, heads, d_qk] of the two chunks; k and v [batch, seq, heads, d] of the whole sequence ->
        [batch, seq / C, heads, d_v]. mask: `CPDocumentMask`'s, for both chunks, or None."""
        if mask is not None:
            return self.core(q, k, v, mask)
        parts = zip(q.chunk(2, dim=1), self.ends, self.masks, strict=True)
        return torch.cat([self.core(part, k[:, :end], v[:, :end], mask) for part, end, mask in parts], dim=1)


class AllGatherKVAttention(CPAttention):
    """Attention of this rank's queries to all-gathered keys and values (method "allgather")."""

    def __init__(self, core: nn.Module, mesh: DeviceMesh, seq_len: int):
        super().__init__(core, mesh, seq_len)
        self.gather = AllGatherSequence(mesh)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """q, k, v [batch, seq / C, heads, d] of this rank's two chunks -> [batch, seq / C, heads, d_v]."""
        k, v = self.gather(torch.cat((k, v), dim=-1)).split((k.size(-1), v.size(-1)), dim=-1)
        return super().forward(q, k, v, mask)


class UlyssesAttention(nn.Module):
    """Attention of all tokens in 1/C of the heads, between two all-to-alls (method "alltoall")."""

    def __init__(self, core: nn.Module, mesh: DeviceMesh, seq_len: int):
        super().__init__()
        self.core, self.mesh = core, mesh

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """q, k, v [batch, seq / C, heads, head_dim] of this rank's two chunks; returns q's shape."""
        n, sizes = self.mesh.size(), [x.size(3) for x in (q, k, v)]
        # [batch, seq / C, heads, d] -> [C, batch, seq / C, heads / C x d]: what goes to each rank, in one all-to-all.
        parts = [x.unflatten(2, (n, -1)).flatten(3).movedim(2, 0) for x in (q, k, v)]
        arrived = undo_zigzag(self._exchange(torch.cat(parts, dim=-1))).split([x.size(3) for x in parts], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, d)) for x, d in zip(arrived, sizes, strict=True))
        out = self.core(q, k, v, mask)  # all tokens of some heads: to the core, a model with fewer heads
        back = self._exchange(zigzag(out, n))  # [C, batch, seq / C, heads / C, d], by the heads' rank
        return back.movedim(0, 2).flatten(2, 3)

    def _exchange(self, x: Tensor) -> Tensor:
        """Sends x[i] to rank i; the result's [i] is what rank i sent."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.mesh.get_group())


def undo_zigzag(parts: Tensor) -> Tensor:
    """Puts the chunks of ranks 0, 1, ..., [C, batch, seq / C, ...], in the sequence's order: [batch, seq, ...]."""
    heads, tails = parts.chunk(2, dim=2)
    return torch.cat((*heads.unbind(), *tails.unbind()[::-1]), dim=1)


def zigzag(x: Tensor, size: int) -> Tensor:
    """Cuts [batch, seq, ...] into each rank's chunks, [C, batch, seq / C, ...]: the inverse of `undo_zigzag`."""
    chunks = x.chunk(2 * size, dim=1)
    return torch.stack([torch.cat((chunks[r], chunks[2 * size - 1 - r]), dim=1) for r in range(size)])
