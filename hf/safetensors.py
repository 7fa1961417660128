"""Reads any rectangle of any tensor in a folder of safetensors files, and writes such a folder one tensor at a time.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header; the header, which is JSON
with the dtype, shape and place of each tensor; the bytes of the tensors. `model.safetensors.index.json` maps the name
of each tensor to its file.
"""

import json
import os
from collections.abc import Iterable, Iterator
from math import prod

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import ConfigError
from files import is_plain_name, read_json, write_json
from hf.families import ConfigFile

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Layout = list[tuple[str, tuple[int, ...], torch.dtype]]  # name, shape and dtype of each tensor, in their order


class TensorReader:
    """The tensors of a folder by name. Raises ConfigError for a folder, file or tensor that cannot be read."""

    def __init__(self, folder: str):
        self.folder, self._open_files = folder, {}
        index = os.path.join(folder, INDEX)
        if os.path.isfile(index):
            self.file_of = read_json(index)["weight_map"]
            for file in self.file_of.values():
                if not is_plain_name(file):
                    raise ConfigError(f'{index} names "{file}", which is not a file in its folder.')
        elif os.path.isfile(os.path.join(folder, SINGLE)):
            self.file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise ConfigError(f"{folder} has neither {INDEX} nor {SINGLE}.")
        default = dict(quant_method="fp8", weight_block_size=(128, 128))
        quantization = ConfigFile(folder).get("quantization_config", default)
        if quantization.get("quant_method") != "fp8" or "weight_block_size" not in quantization:
            given = json.dumps(quantization)
            raise ConfigError(f'{folder}: quantized by {given}; only "fp8" in blocks (weight_block_size) is supported.')
        self.block = quantization["weight_block_size"]  # rows and columns of a float8 weight that share one scale

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, indices: list[Tensor]) -> Tensor:
        """The elements at indices[d] of each dimension d; a float8 weight as float32. Each of indices is int64, 1-D, on
        the CPU and not empty. Reads the smallest box of the file that contains them."""
        box = [(int(i.min()), int(i.max()) + 1) for i in indices]
        values = self._slice(name)[tuple(slice(*bounds) for bounds in box)]
        if values.dtype == torch.float8_e4m3fn:
            values = self._dequantize(name, values, box)
        elif values.dtype not in DTYPES:
            known = f"{', '.join(DTYPES.values())} and F8_E4M3"
            raise ConfigError(f"{self.folder}: {name} is stored as {values.dtype}; only {known} can be read.")
        for dim, ((first, end), index) in enumerate(zip(box, indices, strict=True)):
            if not torch.equal(index, torch.arange(first, end)):
                values = values.index_select(dim, index - first)
        return values

    def _dequantize(self, name: str, values: Tensor, box: list[tuple[int, int]]) -> Tensor:
        """values times the scale of each element's block (`weight_dequant` in DeepSeek-V3's reference code). `box` says
        where the values are in the weight; it may begin and end inside of blocks."""
        scale_name = f"{name}_scale_inv"
        if scale_name not in self.file_of:
            raise ConfigError(f"{self.folder}: {name} is in float8, but there is no {scale_name}.")
        blocks = [(first // size, (end - 1) // size + 1) for (first, end), size in zip(box, self.block, strict=True)]
        scale = self._slice(scale_name)[tuple(slice(*bounds) for bounds in blocks)].to(torch.float32)
        for dim, ((first, end), size) in enumerate(zip(box, self.block, strict=True)):
            scale = scale.index_select(dim, torch.arange(first, end) // size - first // size)
        return values.to(torch.float32) * scale

    def _slice(self, name: str):
        try:
            return self._open(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise ConfigError(f"{self.folder}: {name} is not in {self.file_of[name]}: {error}.") from None

    def _open(self, file: str):
        if file not in self._open_files:
            path = os.path.join(self.folder, file)
            try:
                self._open_files[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"cannot read {path}: {error}.") from None
        return self._open_files[file]


def write_tensors(folder: str, layout: Layout, tensors: Iterable[Tensor], max_bytes: int) -> None:
    """Writes the tensors of `layout` as files of at most max_bytes and their index; a tensor that is larger has a file
    alone. Only one tensor at a time is taken from `tensors`."""
    files, filled, total = [[]], 0, 0
    for name, shape, dtype in layout:
        size = prod(shape) * dtype.itemsize
        if filled + size > max_bytes and files[-1]:
            files.append([])
            filled = 0
        files[-1].append((name, shape, dtype))
        filled += size
        total += size
    weight_map, tensors = {}, iter(tensors)
    for i, entries in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        _write_file(os.path.join(folder, file), entries, tensors)
        weight_map |= {name: file for name, _, _ in entries}
    write_json(os.path.join(folder, INDEX), dict(metadata=dict(total_size=total), weight_map=weight_map), indent=2)


def _write_file(path: str, layout: Layout, tensors: Iterator[Tensor]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # Wide dtypes first, so that each tensor begins at a multiple of its element's size.
    for name, shape, dtype in sorted(layout, key=lambda entry: -entry[2].itemsize):
        first, end = end, end + prod(shape) * dtype.itemsize
        header[name] = dict(dtype=DTYPES[dtype], shape=shape, data_offsets=[first, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape, dtype), tensor in zip(layout, tensors):  # noqa: B905 - the next file takes the rest
            assert tensor.shape == shape and tensor.dtype == dtype, name
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
