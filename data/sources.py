"""Where documents come from: named sources, each a list of files read in one fixed order.

A source is cheap to make (it lists files, and reads none). Iterating it yields the documents, one string
each, empty ones left out. What a user got wrong is a ValueError of one line.
"""

import difflib
import glob
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Test folders: some distributions leave them out of the library, and there the text should be the same.
# _sysconfigdata* and config-* are written when Python is built, and name that machine's folders.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
STDLIB_LEFT_OUT_PREFIXES = (".", "_sysconfigdata", "config-")


class Source:
    """Documents of files, in the order of their paths.

    skip_unreadable leaves out files that cannot be read or are not UTF-8, which are an error otherwise.
    """

    def __init__(self, root: Path, files: set[Path], *, text_key: str, skip_unreadable: bool) -> None:
        self.root, self.files = root.absolute(), sorted(files, key=Path.as_posix)
        self.text_key, self.skip_unreadable = text_key, skip_unreadable

    def identity(self) -> str:
        """What a cache of the documents is filed under: changes when a file does, without reading any.

        With the folder and the Python, since archives and images may give every file the same time.
        """
        try:
            stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        except OSError as error:
            raise ValueError(f"data.path: {error.filename} cannot be read: {error.strerror}.") from None
        return repr((str(self.root), sys.version, self.text_key, self.skip_unreadable, stats))

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            try:
                documents = self._jsonl(file) if file.suffix == ".jsonl" else self._text(file)
                yield from filter(None, documents)
            except (UnicodeDecodeError, OSError) as error:
                if not self.skip_unreadable:
                    raise ValueError(_unreadable(file, error)) from None

    def _text(self, file: Path) -> Iterator[str]:
        # utf-8-sig: a byte order mark is no part of the text. Line ends stay as they are.
        yield file.read_bytes().decode("utf-8-sig")

    def _jsonl(self, file: Path) -> Iterator[str]:
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"data.path: {file}:{number} is not JSON: {error.msg}.") from None
                text = record.get(self.text_key) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    keys = "keys " + ", ".join(record) if isinstance(record, dict) else "no keys: it is no object"
                    raise ValueError(
                        f'data.path: {file}:{number} has no string under "{self.text_key}" (data.text_key); '
                        f"it has {keys}."
                    )
                yield text


def build_source(dataset: str, path: str, text_key: str = "text") -> Source:
    """The source of a name: "python_stdlib" (no path) or "text" (path: a file, folder or glob, also `**`).

    python_stdlib is the source text of the running Python's standard library, about 12 MB, without its tests.
    text reads UTF-8 files as one document each, and .jsonl files as one document a line, the string under
    text_key. Files come in the order of their paths; hidden ones (a name that begins with a dot) are left out
    of folders.
    """
    if dataset == "python_stdlib":
        if path:
            raise ValueError(f'data.path ({path}) is not read by dataset "python_stdlib"; set data.dataset = "text".')
        source = _python_stdlib(text_key)
    elif dataset == "text":
        if not path:
            raise ValueError('dataset "text" needs data.path: a file, a folder or a glob of text or .jsonl files.')
        source = _text_files(path, text_key)
    else:
        names = ["python_stdlib", "text"]
        near = difflib.get_close_matches(dataset, names, n=1)
        did_you_mean = f' did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'dataset "{dataset}" is unknown;{did_you_mean} Valid are {" and ".join(names)}.')
    if text_key != "text" and not any(file.suffix == ".jsonl" for file in source.files):
        raise ValueError(f'data.text_key ("{text_key}") has no effect: no .jsonl file is read; leave it out.')
    return source


def _python_stdlib(text_key: str) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if _in_stdlib(name)]
        files |= {Path(folder, name) for name in names if name.endswith(".py") and _in_stdlib(name)}
    if not files:
        raise ValueError(
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
        raise ValueError(f"data.path ({path}) matches no file; the current folder is {Path.cwd()}.")
    return Source(root, files, text_key=text_key, skip_unreadable=False)


def _unreadable(file: Path, error: UnicodeDecodeError | OSError) -> str:
    if isinstance(error, OSError):
        return f"data.path: {file} cannot be read: {error.strerror}."
    return f"data.path: {file} is not UTF-8 text; convert it, or leave it out by a glob such as dir/**/*.txt."
