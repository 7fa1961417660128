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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
    read in one fixed order that can be read again. scripts/prepare_data.py makes a corpus of a stream first.

    jobs         the documents in order, cut into picklable jobs of about shard_bytes of text each
    fingerprint  a text that changes when the documents change
    str()        the source's name in an error message"""

    def jobs(self, shard_bytes: int) -> Sequence[Iterable[str]]: ...
    def fingerprint(self) -> str: ...
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class FileSlice:
    """A part of a file: the lines of a .jsonl that begin at the bytes start ... stop - 1, the row groups start ...
    stop - 1 of a .parquet, or a whole text file."""

    file: Path
    start: int
    stop: int
    num_bytes: int  # about


@dataclass(frozen=True)
class ShardJob:
    """The documents that become one shard."""

    slices: list[FileSlice]
    text_key: str
    skip_unreadable: bool

    def __iter__(self) -> Iterator[str]:
        for piece in self.slices:
            read = {".jsonl": _jsonl, ".parquet": _parquet}.get(piece.file.suffix, _text)
            try:
                yield from filter(None, read(piece, self.text_key))  # without empty documents
            except (UnicodeDecodeError, OSError) as error:
                if not self.skip_unreadable:
                    raise _unreadable(piece.file, error) from None


class FileSource:
    """The documents of files, in the order of the files' paths. With skip_unreadable, files that cannot be read or are
    not UTF-8 are left out; otherwise such a file is an error."""

    def __init__(self, root: Path, files: Iterable[Path], *, text_key: str, skip_unreadable: bool) -> None:
        self.root, self.files = root.absolute(), sorted(files, key=Path.as_posix)
        self.text_key, self.skip_unreadable = text_key, skip_unreadable
        if text_key != "text" and not any(file.suffix in (".jsonl", ".parquet") for file in self.files):
            raise ConfigError(
                f'data.text_key ("{text_key}") has no effect: no .jsonl or .parquet file is read; leave it out.'
            )

    def __str__(self) -> str:
        return f"the {len(self.files)} file(s) of {self.root}"

    def fingerprint(self) -> str:
        """Changes when a file's name, size or time changes, so that no file is read."""
        try:
            stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        except OSError as error:
            raise _unreadable(error.filename, error) from None
        # With the folder and the Python version, because archives and images may give every file the same time.
        return repr((str(self.root), sys.version, self.text_key, self.skip_unreadable, stats))

    def jobs(self, shard_bytes: int) -> list[ShardJob]:
        """Small files share a job; large .jsonl and .parquet files are cut."""
        jobs, size = [[]], 0
        for piece in chain.from_iterable(self._slices(file, shard_bytes) for file in self.files):
            if jobs[-1] and size + piece.num_bytes > shard_bytes:
                jobs.append([])
                size = 0
            jobs[-1].append(piece)
            size += piece.num_bytes
        return [ShardJob(slices, self.text_key, self.skip_unreadable) for slices in jobs]

    def _slices(self, file: Path, shard_bytes: int) -> Iterator[FileSlice]:
        try:
            size = file.stat().st_size
            if file.suffix == ".parquet":
                metadata = _parquet_file(file).metadata
                for group in range(metadata.num_row_groups):
                    yield FileSlice(file, group, group + 1, metadata.row_group(group).total_byte_size)
            elif file.suffix == ".jsonl" and size > shard_bytes:
                for start in range(0, size, shard_bytes):
                    yield FileSlice(file, start, min(start + shard_bytes, size), shard_bytes)
            else:
                yield FileSlice(file, 0, size, size)
        except OSError as error:
            if not self.skip_unreadable:
                raise _unreadable(file, error) from None

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.jobs(2**62))


def _text(piece: FileSlice, text_key: str) -> Iterator[str]:
    yield piece.file.read_bytes().decode("utf-8-sig")  # drops a byte order mark, and keeps line ends


def _jsonl(piece: FileSlice, text_key: str) -> Iterator[str]:
    with open(piece.file, "rb") as file:
        if piece.start > 0:
            file.seek(piece.start - 1)
            file.readline()  # the end of a line that begins before the slice, or its newline alone
        while (start := file.tell()) < piece.stop and (line := file.readline()):
            line = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except json.JSONDecodeError as error:
                raise _wrong_line(piece.file, start, f"is not JSON: {error.msg}.") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = "keys " + ", ".join(record) if isinstance(record, dict) else "no keys: it is not an object"
                wrong = f'has no string under "{text_key}" (data.text_key); it has {keys}.'
                raise _wrong_line(piece.file, start, wrong)
            yield text


def _wrong_line(path: Path, start: int, wrong: str) -> ConfigError:
    """The error of the line that begins at the byte start, with the line's number in the whole file."""
    with open(path, "rb") as file:
        chunks = iter(lambda: file.read(min(2**20, start - file.tell())), b"")
        number = 1 + sum(chunk.count(b"\n") for chunk in chunks)
    return ConfigError(f"data.path: {path}:{number} {wrong}")


def _parquet(piece: FileSlice, text_key: str) -> Iterator[str]:
    file = _parquet_file(piece.file)
    types = {column.name: str(column.type) for column in file.schema_arrow}
    if types.get(text_key) not in ("string", "large_string"):
        raise ConfigError(
            f'data.path: {piece.file} has no column of strings "{text_key}" (data.text_key); it has {", ".join(types)}.'
        )
    groups = list(range(piece.start, piece.stop))
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_key]):
        yield from batch.column(0).to_pylist()


def _parquet_file(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"data.path: {path} is Parquet, which needs pyarrow: pip install pyarrow.") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid:
        raise ConfigError(f"data.path: {path} is not a Parquet file, or not a complete one.") from None


def _unreadable(file: Path | str, error: UnicodeDecodeError | OSError) -> ConfigError:
    if isinstance(error, OSError):
        return ConfigError(f"data.path: {file} cannot be read: {error.strerror}.")
    cure = "convert it, or leave it out with a glob such as dir/**/*.txt."
    return ConfigError(f"data.path: {file} is not UTF-8 text; {cure}")


def build_source(dataset: str, path: str, text_key: str = "text") -> FileSource:
    """The source of "python_stdlib", which has no path, or of "text", whose path is a file, a folder or a glob.

    python_stdlib is the source text of the running Python's standard library, about 12 MB, without its tests. text
    reads UTF-8 files in the order of their paths. A .jsonl file holds a document in each line and a .parquet file in
    each row, under text_key; any other file is a document. A folder's files and folders named ".*" are left out."""
    if dataset == "python_stdlib":
        if path:
            raise ConfigError(f'data.path ({path}) is not read by dataset "python_stdlib"; set data.dataset = "text".')
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _walk(root, lambda name: name in STDLIB_LEFT_OUT or name.startswith(STDLIB_LEFT_OUT_PREFIXES))
        files = {file for file in files if file.suffix == ".py"}
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
        files = _walk(root, lambda name: name.startswith("."))
    else:  # a glob, or a file, whose name may look like a glob
        files = {root} if root.is_file() else set(filter(Path.is_file, map(Path, glob.glob(str(root), recursive=True))))
    if not files:
        raise ConfigError(f"data.path ({path}) matches no file; the current folder is {Path.cwd()}.")
    return FileSource(root, files, text_key=text_key, skip_unreadable=False)


def _walk(root: Path, is_left_out: Callable[[str], bool]) -> set[Path]:
    """All files below root, without files and folders whose names are left out."""
    files = set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not is_left_out(name)]
        files |= {Path(folder, name) for name in names if not is_left_out(name)}
    return files
