"""manifest.json of a checkpoint: the size and SHA-256 of each of its files. It is written last, and read first.

DCP alone loads a shard with a flipped bit without an error (298 of 300 trials), so nothing is read that is not what was
written. Hashing costs a read of the checkpoint, which ranks share.
"""

import hashlib
import json
import os
from typing import Any

from errors import ConfigError
from files import is_plain_name, write_json

MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"
BLOCK = 2**20  # bytes that are hashed at a time


def digest(path: str) -> dict[str, Any]:
    """A file's entry."""
    sha256, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            size += len(block)
    return dict(bytes=size, sha256=sha256.hexdigest())


def write_manifest(folder: str, files: dict[str, dict] | None = None) -> None:
    """files: their entries, by name; None: of all that the folder holds."""
    files = files or {name: digest(os.path.join(folder, name)) for name in os.listdir(folder) if name != MANIFEST}
    write_json(os.path.join(folder, MANIFEST), dict(files=dict(sorted(files.items()))))


def find_damage(folder: str, part: int = 0, parts: int = 1) -> str | None:
    """Why a folder is no complete and intact checkpoint, or None. Of the files' contents only one part in `parts` is
    looked at; all parts together see all. ValueError where the file system does not let it be told."""
    try:
        return _find_damage(folder, part, parts)
    except FileNotFoundError as error:
        return f"it has no {os.path.basename(error.filename)}"
    except OSError as error:  # a disk or a permission, which may come back: not the checkpoint's fault
        raise ConfigError(f"cannot read {error.filename or folder}: {error.strerror}.") from None


def _find_damage(folder: str, part: int, parts: int) -> str | None:
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            files = json.load(file)["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name in (METADATA, STATE):
        if name not in expected:
            return f"its {MANIFEST} does not list {name}"
    for name, (size, _) in expected.items():
        if not is_plain_name(name):
            return f'its {MANIFEST} names "{name}", which is not a file in it'
        path = os.path.join(folder, name)
        if os.path.islink(path):
            return f"its {name} is a link, which may lead out of it"
        if os.stat(path).st_size != size:
            return f"its {name} has {os.stat(path).st_size:,} bytes, {size:,} were written"
    # The largest first, so that ranks get about the same.
    by_size = sorted(expected, key=lambda name: (-expected[name][0], name))
    for name in by_size[part::parts]:
        if digest(os.path.join(folder, name))["sha256"] != expected[name][1]:
            return f"its {name} is not what was written (SHA-256)"
    return None
