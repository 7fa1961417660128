"""Where documents come from: named sources, each a list of files read in one fixed order.

A source is cheap to make (it lists files, and reads none). Iterating it, or its units one after the other, yields the
documents, one string each, empty ones left out. What a user got wrong is a ValueError of one line.
"""

import codecs
import difflib
import glob
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from errors import ConfigError

# Test folders: some distributions leave them out of the library, and there the text should be the same.
# _sysconfigdata* and config-* are written when Python is built, and name that machine's folders.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
STDLIB_LEFT_OUT_PREFIXES = (".", "_sysconfigdata", "config-")


@dataclass(frozen=True)
class Part:
    """Of a file: the lines of a .jsonl that begin at bytes start to stop, row groups of a .parquet, or all of it."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """Documents that are read one after another: what becomes a shard."""

    parts: tuple[Part, ...]
    text_key: str
    skip_unreadable: bool

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            read = {".jsonl": _jsonl, ".parquet": _parquet}.get(part.file.suffix, _text)
            try:
                yield from filter(None, read(part, self.text_key))
            except (UnicodeDecodeError, OSError) as error:
                if not self.skip_unreadable:
                    raise ConfigError(_unreadable(part.file, error)) from None


class Source:
    """Documents of files, in the order of their paths.

    skip_unreadable leaves out files that cannot be read or are not UTF-8, which are an error otherwise.
    """

    def __init__(self, root: Path, files: set[Path], *, text_key: str, skip_unreadable: bool) -> None:
        self.root, self.files = root.absolute(), sorted(files, key=Path.as_posix)
        self.text_key, self.skip_unreadable = text_key, skip_unreadable

    def __str__(self) -> str:
        return f"the {len(self.files)} file(s) of {self.root}"

    def identity(self) -> str:
        """What a corpus of the documents is filed under: changes when a file does, without reading any.

        With the folder and the Python, since archives and images may give every file the same time.
        """
        try:
            stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        except OSError as error:
            raise ConfigError(f"data.path: {error.filename} cannot be read: {error.strerror}.") from None
        return repr((str(self.root), sys.version, self.text_key, self.skip_unreadable, stats))

    def units(self, unit_bytes: int) -> list[Unit]:
        """The documents in parts of about unit_bytes: small files together, large ones cut where their format allows
        it."""
        units, parts, size = [], [], 0
        for part, part_bytes in (item for file in self.files for item in self._parts(file, unit_bytes)):
            if parts and size + part_bytes > unit_bytes:
                units.append(parts)
                parts, size = [], 0
            parts.append(part)
            size += part_bytes
        return [Unit(tuple(parts), self.text_key, self.skip_unreadable) for parts in [*units, parts]]

    def _parts(self, file: Path, unit_bytes: int) -> Iterator[tuple[Part, int]]:
        try:
            yield from _parts(file, file.stat().st_size, unit_bytes)
        except OSError as error:
            if not self.skip_unreadable:
                raise ConfigError(_unreadable(file, error)) from None

    def __iter__(self) -> Iterator[str]:
        for unit in self.units(2**62):
            yield from unit


def _parts(file: Path, size: int, unit_bytes: int) -> Iterator[tuple[Part, int]]:
    """The file's parts, and about how many bytes each has."""
    if file.suffix == ".parquet":
        metadata = _parquet_file(file).metadata
        for group in range(metadata.num_row_groups):
            yield Part(file, group, group + 1), metadata.row_group(group).total_byte_size
    elif file.suffix == ".jsonl" and size > unit_bytes:
        for start in range(0, size, unit_bytes):
            yield Part(file, start, min(start + unit_bytes, size)), unit_bytes
    else:
        yield Part(file, 0, size), size


def _text(part: Part, text_key: str) -> Iterator[str]:
    # utf-8-sig: a byte order mark is no part of the text. Line ends stay as they are.
    yield part.file.read_bytes().decode("utf-8-sig")


def _jsonl(part: Part, text_key: str) -> Iterator[str]:
    with open(part.file, "rb") as file:
        if part.start > 0:
            file.seek(part.start - 1)
            file.readline()  # the end of a line that began before, or just its newline
        while (start := file.tell()) < part.stop and (line := file.readline()):
            if start == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace() or not line:
                continue
            try:
                record = json.loads(line.decode())
            except json.JSONDecodeError as error:
                number = _line_number(part.file, start)
                raise ConfigError(f"data.path: {part.file}:{number} is not JSON: {error.msg}.") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = "keys " + ", ".join(record) if isinstance(record, dict) else "no keys: it is no object"
                raise ConfigError(
                    f'data.path: {part.file}:{_line_number(part.file, start)} has no string under "{text_key}" '
                    f"(data.text_key); it has {keys}."
                )
            yield text


def _line_number(path: Path, start: int) -> int:
    with open(path, "rb") as file:
        return 1 + sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(min(2**20, start - file.tell())), b""))


def _parquet(part: Part, text_key: str) -> Iterator[str]:
    file = _parquet_file(part.file)
    column = file.schema_arrow.field(text_key) if text_key in file.schema_arrow.names else None
    if column is None or str(column.type) not in ("string", "large_string"):
        raise ConfigError(
            f'data.path: {part.file} has no column of strings "{text_key}" (data.text_key); it has '
            f"{', '.join(file.schema_arrow.names)}."
        )
    for batch in file.iter_batches(batch_size=1024, columns=[text_key], row_groups=list(range(part.start, part.stop))):
        yield from batch.column(0).to_pylist()


def _parquet_file(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"data.path: {path} is Parquet, which needs pyarrow: pip install pyarrow.") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid:
        raise ConfigError(f"data.path: {path} is no Parquet file, or not a whole one.") from None


@dataclass(frozen=True)
class StreamUnit:
    """One of the shards of a dataset of Hugging Face's `datasets`, read as it arrives."""

    name: str
    subset: str
    split: str
    text_key: str
    number: int

    def __iter__(self) -> Iterator[str]:
        stream = _stream(self.name, self.subset, self.split)
        for record in stream.shard(num_shards=stream.num_shards, index=self.number):
            text = record.get(self.text_key)
            if not isinstance(text, str):
                raise ConfigError(
                    f'{self.name} has no string under "{self.text_key}" (text_key); it has keys {", ".join(record)}.'
                )
            if text:
                yield text


@dataclass(frozen=True)
class Stream:
    """A dataset of Hugging Face's `datasets`, by name or folder; streamed: it is never on this machine whole."""

    name: str
    subset: str
    split: str
    text_key: str

    def __str__(self) -> str:
        return f"{self.name}, {self.split}"

    def identity(self) -> str:
        return repr(self)

    def units(self, unit_bytes: int) -> list[StreamUnit]:
        """By the shards that it comes in; unit_bytes is not what decides."""
        return [
            StreamUnit(self.name, self.subset, self.split, self.text_key, number)
            for number in range(_stream(self.name, self.subset, self.split).num_shards)
        ]


def _stream(name: str, subset: str, split: str):
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{name} is read with Hugging Face's datasets: pip install datasets.") from None
    return datasets.load_dataset(name, subset or None, split=split, streaming=True)


def build_source(dataset: str, path: str, text_key: str = "text") -> Source:
    """The source of a name: "python_stdlib" (no path) or "text" (path: a file, folder or glob, also `**`).

    python_stdlib is the source text of the running Python's standard library, about 12 MB, without its tests.
    text reads UTF-8 files as one document each, and .jsonl files as one document a line, .parquet files as one a
    row: the string under text_key. Files come in the order of their paths; hidden ones (a name that begins with a
    dot) are left out of folders.
    """
    if dataset == "python_stdlib":
        if path:
            raise ConfigError(f'data.path ({path}) is not read by dataset "python_stdlib"; set data.dataset = "text".')
        source = _python_stdlib(text_key)
    elif dataset == "text":
        if not path:
            raise ConfigError(
                'dataset "text" needs data.path: a file, a folder or a glob of text, .jsonl or .parquet files.'
            )
        source = _text_files(path, text_key)
    else:
        names = ["python_stdlib", "text", "shards"]
        near = difflib.get_close_matches(dataset, names, n=1)
        did_you_mean = f' did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f'dataset "{dataset}" is unknown;{did_you_mean} Valid are {", ".join(names)}.')
    if text_key != "text" and not any(file.suffix in (".jsonl", ".parquet") for file in source.files):
        raise ConfigError(
            f'data.text_key ("{text_key}") has no effect: no .jsonl or .parquet file is read; leave it out.'
        )
    return source


def _python_stdlib(text_key: str) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if _in_stdlib(name)]
        files |= {Path(folder, name) for name in names if name.endswith(".py") and _in_stdlib(name)}
    if not files:
        raise ConfigError(
            f"dataset python_stdlib: this Python ({sys.version.split()[0]}) keeps no source text in {root}; "
            'use another Python, or data.dataset = "text" with a path.'
        )
    # Skipped are the few files that some versions have outside test/ to be undecodable on purpose.
    return Source(root, files, text_key=text_key, skip_unreadable=True)


def _in_stdlib(name: str) -> bool:
    return name not in STDLIB_LEFT_OUT and not name.startswith(STDLIB_LEFT_OUT_PREFIXES)


def _text_files(path: str, text_key: str) -> Source:
    root = Path(path).expanduser()
    if root.is_file():
        files = {root}
    elif root.is_dir():
        files = set()
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            files |= {Path(folder, name) for name in names if not name.startswith(".")}
    else:
        files = {file for match in glob.glob(str(root), recursive=True) if (file := Path(match)).is_file()}
    if not files:
        raise ConfigError(f"data.path ({path}) matches no file; the current folder is {Path.cwd()}.")
    return Source(root, files, text_key=text_key, skip_unreadable=False)


def _unreadable(file: Path, error: UnicodeDecodeError | OSError) -> str:
    if isinstance(error, OSError):
        return f"data.path: {file} cannot be read: {error.strerror}."
    return f"data.path: {file} is not UTF-8 text; convert it, or leave it out by a glob such as dir/**/*.txt."
