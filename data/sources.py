"""Where documents come from: the Source protocol, and sources of files, which are read in one fixed order.

A source is cheap to make: it lists files and reads none. A user's mistake is a ConfigError of one line.

Proof: tests/test_data.py::test_text_source_reads_a_file_a_folder_or_a_glob,
tests/test_data.py::test_cut_jsonl_file_gives_each_line_once.
"""

import codecs
import glob
import json
import os
import sys
import sysconfig
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from errors import ConfigError

# Test folders are left out because some distributions leave them out of the library, and the text should be the same.
# _sysconfigdata* and config-* are written when Python is built, and hold that machine's paths.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
STDLIB_LEFT_OUT_PREFIXES = (".", "_sysconfigdata", "config-")


class Source(Protocol):
    """To add a source, write these three methods, and add its name to `data.dataset` in config.py and to build_source.

    A true stream cannot be a source of a run: sample i must be a pure function of (data, seed, i), so documents are
    read in one fixed order that can be read again. scripts/prepare_data.py makes a corpus of a stream first."""

    def jobs(self, shard_bytes: int) -> Sequence[Iterable[str]]:
        """The documents in order, cut into picklable jobs of about shard_bytes of text each."""

    def fingerprint(self) -> str:
        """A text that changes when the documents change."""

    def __str__(self) -> str:
        """The source's name in an error message."""


@dataclass(frozen=True)
class FileSlice:
    """The lines of a .jsonl file that begin at the bytes start ... stop - 1, the row groups start ... stop - 1 of a
    .parquet file, or a whole text file."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class ShardJob:
    """The documents that become one shard."""

    slices: tuple[FileSlice, ...]
    text_key: str
    skip_unreadable: bool

    def __iter__(self) -> Iterator[str]:
        for piece in self.slices:
            read = {".jsonl": _jsonl, ".parquet": _parquet}.get(piece.file.suffix, _text)
            try:
                yield from filter(None, read(piece, self.text_key))  # without empty documents
            except (UnicodeDecodeError, OSError) as error:
                if not self.skip_unreadable:
                    raise ConfigError(_unreadable(piece.file, error)) from None


class FileSource:
    """The documents of files, in the order of the files' paths. A file that cannot be read or is not UTF-8 is left out
    with skip_unreadable, and is an error without it."""

    def __init__(self, root: Path, files: set[Path], *, text_key: str, skip_unreadable: bool) -> None:
        self.root, self.files = root.absolute(), sorted(files, key=Path.as_posix)
        self.text_key, self.skip_unreadable = text_key, skip_unreadable
        if text_key != "text" and not any(file.suffix in (".jsonl", ".parquet") for file in files):
            raise ConfigError(
                f'data.text_key ("{text_key}") has no effect: no .jsonl or .parquet file is read; leave it out.'
            )

    def __str__(self) -> str:
        return f"the {len(self.files)} file(s) of {self.root}"

    def fingerprint(self) -> str:
        """A text of each file's name, size and time, so that no file is read."""
        try:
            stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        except OSError as error:
            raise ConfigError(f"data.path: {error.filename} cannot be read: {error.strerror}.") from None
        # The folder and the Python version are in it, because archives and images may give every file the same time.
        return repr((str(self.root), sys.version, self.text_key, self.skip_unreadable, stats))

    def jobs(self, shard_bytes: int) -> list[ShardJob]:
        """Small files share a job; large .jsonl and .parquet files are cut."""
        jobs, size = [[]], 0
        for piece, piece_bytes in (item for file in self.files for item in self._slices(file, shard_bytes)):
            if jobs[-1] and size + piece_bytes > shard_bytes:
                jobs.append([])
                size = 0
            jobs[-1].append(piece)
            size += piece_bytes
        return [ShardJob(tuple(slices), self.text_key, self.skip_unreadable) for slices in jobs]

    def _slices(self, file: Path, shard_bytes: int) -> Iterator[tuple[FileSlice, int]]:
        """The file's slices, each with its approximate bytes."""
        try:
            size = file.stat().st_size
            if file.suffix == ".parquet":
                metadata = _parquet_file(file).metadata
                for group in range(metadata.num_row_groups):
                    yield FileSlice(file, group, group + 1), metadata.row_group(group).total_byte_size
            elif file.suffix == ".jsonl" and size > shard_bytes:
                for start in range(0, size, shard_bytes):
                    yield FileSlice(file, start, min(start + shard_bytes, size)), shard_bytes
            else:
                yield FileSlice(file, 0, size), size
        except OSError as error:
            if not self.skip_unreadable:
                raise ConfigError(_unreadable(file, error)) from None

    def __iter__(self) -> Iterator[str]:
        for job in self.jobs(2**62):
            yield from job


def _text(piece: FileSlice, text_key: str) -> Iterator[str]:
    # utf-8-sig drops a byte order mark. Line ends are kept.
    yield piece.file.read_bytes().decode("utf-8-sig")


def _jsonl(piece: FileSlice, text_key: str) -> Iterator[str]:
    with open(piece.file, "rb") as file:
        if piece.start > 0:
            file.seek(piece.start - 1)
            file.readline()  # the end of a line that begins before the slice, or its newline alone
        while (start := file.tell()) < piece.stop and (line := file.readline()):
            if start == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except json.JSONDecodeError as error:
                raise ConfigError(f"{_line(piece.file, start)} is not JSON: {error.msg}.") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = "keys " + ", ".join(record) if isinstance(record, dict) else "no keys: it is not an object"
                raise ConfigError(
                    f'{_line(piece.file, start)} has no string under "{text_key}" (data.text_key); it has {keys}.'
                )
            yield text


def _line(path: Path, start: int) -> str:
    with open(path, "rb") as file:
        chunks = iter(lambda: file.read(min(2**20, start - file.tell())), b"")
        number = 1 + sum(chunk.count(b"\n") for chunk in chunks)
    return f"data.path: {path}:{number}"


def _parquet(piece: FileSlice, text_key: str) -> Iterator[str]:
    file = _parquet_file(piece.file)
    names, groups = file.schema_arrow.names, list(range(piece.start, piece.stop))
    if text_key not in names or str(file.schema_arrow.field(text_key).type) not in ("string", "large_string"):
        raise ConfigError(
            f'data.path: {piece.file} has no column of strings "{text_key}" (data.text_key); it has {", ".join(names)}.'
        )
    for batch in file.iter_batches(batch_size=1024, columns=[text_key], row_groups=groups):
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
        raise ConfigError(f"data.path: {path} is not a Parquet file, or not a complete one.") from None


def build_source(dataset: str, path: str, text_key: str = "text") -> FileSource:
    """The source of "python_stdlib", which has no path, or of "text", whose path is a file, a folder or a glob.

    python_stdlib is the source text of the running Python's standard library, about 12 MB, without its tests.
    text reads UTF-8 files. A .jsonl file holds a document in each line and a .parquet file in each row, under text_key;
    any other file is a document. Files are read in the order of their paths. Files in a folder whose names begin with a
    dot are left out.
    """
    if dataset == "python_stdlib":
        if path:
            raise ConfigError(f'data.path ({path}) is not read by dataset "python_stdlib"; set data.dataset = "text".')
        root = Path(sysconfig.get_paths()["stdlib"])
        files = {file for file in _walk(root, STDLIB_LEFT_OUT, STDLIB_LEFT_OUT_PREFIXES) if file.suffix == ".py"}
        if not files:
            raise ConfigError(
                f"dataset python_stdlib: this Python ({sys.version.split()[0]}) keeps no source text in {root}; "
                'use another Python, or data.dataset = "text" with a path.'
            )
        # Some versions hold a few files outside of test/ that are undecodable on purpose.
        return FileSource(root, files, text_key=text_key, skip_unreadable=True)
    if dataset != "text":
        raise ConfigError(f'data.dataset "{dataset}" has no source; add one to build_source in data/sources.py.')
    if not path:
        raise ConfigError(
            'dataset "text" needs data.path: a file, a folder or a glob of text, .jsonl or .parquet files.'
        )
    root = Path(path).expanduser()
    if root.is_dir():
        files = _walk(root)
    elif root.is_file():
        files = {root}
    else:
        files = {file for match in glob.glob(str(root), recursive=True) if (file := Path(match)).is_file()}
    if not files:
        raise ConfigError(f"data.path ({path}) matches no file; the current folder is {Path.cwd()}.")
    return FileSource(root, files, text_key=text_key, skip_unreadable=False)


def _walk(root: Path, left_out: Container[str] = (), prefixes: tuple[str, ...] = (".",)) -> set[Path]:
    """The files under a folder, without the names left_out, and without names that begin with one of prefixes."""
    files = set()
    for folder, subfolders, names in os.walk(root):
        kept = {name for name in subfolders + names if name not in left_out and not name.startswith(prefixes)}
        subfolders[:] = kept.intersection(subfolders)
        files |= {Path(folder, name) for name in kept.intersection(names)}
    return files


def _unreadable(file: Path, error: UnicodeDecodeError | OSError) -> str:
    if isinstance(error, OSError):
        return f"data.path: {file} cannot be read: {error.strerror}."
    return f"data.path: {file} is not UTF-8 text; convert it, or leave it out with a glob such as dir/**/*.txt."
