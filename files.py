"""JSON files, read and written in one way, and names of files that are read from other files."""

import json
import os
from typing import Any

from errors import ConfigError


def read_json(path: str | os.PathLike) -> Any:
    """The value that a JSON file holds. ConfigError, which names the file, if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}.") from None


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 1) -> None:
    """Writes a JSON file. When this returns, the file is on the disk and not only in the page cache."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent)
        file.flush()
        os.fsync(file.fileno())


def is_plain_name(name: Any) -> bool:
    """Whether a name that was read from a file names a file in the same folder, and none outside of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
