"""Reads and writes a dataclass of dataclasses as TOML sections and `--section.key value` options, strictly.

Nothing is guessed and nothing ignored: an unknown section or key, a value of the wrong type or out of range is a
ValueError of one line that says where, what was expected and what was given.
"""

import os
import sys
from dataclasses import field, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def option(default: Any, help: str, at_least: float | None = None, at_most: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "at_least": at_least, "at_most": at_most})


def read_options(config: Any, argv: list[str]) -> None:
    """Sets config's options from a command line, over those of the TOML file that it names. ValueError, in one line,
    for whatever is wrong with them."""
    given = _parse_command_line(config, argv)
    config_file = given.get("job.config_file")
    if config_file is not None:
        for section, table in _read_toml(config_file).items():
            if not is_dataclass(getattr(config, section, None)):
                raise ConfigError(
                    f"{config_file}: [{section}] is not a section; {_nearest(section, _sections(config))}"
                )
            if not isinstance(table, dict):
                raise ConfigError(f"{config_file}: {section} is a section, so write [{section}] and its keys below.")
            for key, value in table.items():
                if (section, key) == ("job", "config_file"):
                    raise ConfigError(f"{config_file}: job.config_file belongs on the command line.")
                _set(config, f"{section}.{key}", value, where=f"{config_file}: ")
    for name, text in given.items():
        _set(config, name, text, where="--", is_text=True)


def _parse_command_line(config: Any, argv: list[str]) -> dict[str, str]:
    given, rest = {}, list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(help_text(config))
            sys.exit(0)
        if not argument.startswith("--"):
            raise ConfigError(f'"{argument}" is not an option; options are written --section.key value.')
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name} VALUE.")
            text = rest.pop(0)
        given[name] = text
    return given


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"job.config_file: cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None


def _sections(config: Any) -> list[str]:
    return [f.name for f in fields(config)]


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."


def _set(config: Any, name: str, value: Any, where: str, is_text: bool = False) -> None:
    section, _, key = name.partition(".")
    table = getattr(config, section, None) if section in _sections(config) else None
    known = {f.name: f for f in fields(table)} if table else {}
    if key not in known:
        names = [f"{section}.{key}" for key in known] if table else [n for n, *_ in _options(config)]
        near = get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "--help lists all of them."
        raise ConfigError(f"{where}{name} is not an option; {hint}")
    kind = get_type_hints(type(table))[key]
    if is_text:
        value = _from_text(value, kind)
    value = _checked(value, kind, f"{where}{name}")
    at_least, at_most = (known[key].metadata.get(bound) for bound in ("at_least", "at_most"))
    if at_least is not None and value < at_least:
        raise ConfigError(f"{where}{name}: expected at least {at_least}, given {value}.")
    if at_most is not None and value > at_most:
        raise ConfigError(f"{where}{name}: expected at most {at_most}, given {value}.")
    setattr(table, key, value)


def _from_text(text: str, kind: Any) -> Any:
    """A value as written in TOML; what is not TOML is a bare word, and so is anything where text is expected."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str) or not _accepts_text(kind) else text


def _accepts_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal or any(_accepts_text(k) for k in get_args(kind) if k is not kind)


def _checked(value: Any, kind: Any, where: str) -> Any:
    """value as `kind`, or ValueError. TOML's integers pass for floats; nothing else is converted."""
    if get_origin(kind) is UnionType:
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
        return _checked(value, kind, where)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif get_origin(kind) is tuple:
        if isinstance(value, list) and len(value) == len(get_args(kind)):
            return tuple(_checked(v, k, where) for v, k in zip(value, get_args(kind), strict=True))
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    given = (
        to_toml(value) if isinstance(value, str | bool | int | float | list) else f"{value} ({type(value).__name__})"
    )
    raise ConfigError(f"{where}: expected {type_name(kind)}, given {given}.")


# ------------------------------------------------------------------------------------------------- writing


def type_name(kind: Any) -> str:
    if get_origin(kind) is UnionType:
        return " | ".join(type_name(k) for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is Literal:
        return " | ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{', '.join(type_name(k) for k in get_args(kind))}]"
    return {str: "string", int: "integer", float: "number", bool: "true | false"}[kind]


def _options(config: Any) -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, help) of every option."""
    rows = []
    for section in fields(config):
        table = section.default_factory
        hints = get_type_hints(table)
        rows += [(f"{section.name}.{f.name}", hints[f.name], f.default, f.metadata["help"]) for f in fields(table)]
    return rows


def help_text(config: Any) -> str:
    lines = ["torchrun --nproc_per_node=N train.py --job.config_file FILE.toml [--section.key value ...]", ""]
    for name, kind, default, text in _options(config):
        shown = "none" if default is None else to_toml(default)
        lines += [f"  --{name}  {type_name(kind)}  (default {shown})", f"      {text}"]
    return "\n".join(lines)


def to_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(to_toml(v) for v in value)}]"
    return repr(value)


def save_config(config: Any, path: str) -> None:
    """Writes every option, so that running from that file repeats the run even if a default changes."""
    lines = []
    for section in fields(config):
        lines.append(f"[{section.name}]")
        for key, value in vars(getattr(config, section.name)).items():
            if value is not None and (section.name, key) != ("job", "config_file"):
                lines.append(f"{key} = {to_toml(value)}")
        lines.append("")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
