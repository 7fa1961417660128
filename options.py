"""A strict reader and writer of options: a dataclass of dataclasses, as TOML `[section]` tables and as
`--section.key value` on the command line.

Nothing is guessed and nothing is ignored. An unknown section or key, a value of the wrong type or out of range, and an
option without effect are a ConfigError of one line: where it stands, what was expected and what was given.

Proof: tests/test_config.py::test_mistake_in_a_file_is_one_line,
tests/test_config.py::test_option_without_what_it_needs_is_refused.
"""

import sys
from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from errors import ConfigError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def option(default: Any, help: str, at_least=None, at_most=None, needs: str | tuple[str, ...] = ()) -> Any:
    """A field of a section. `needs` is what must be set for the option to have an effect, as it is written on the
    command line: "compile.enable true", "activation_checkpoint.mode selective or memory_budget", or, where anything but
    the default will do, an example: "parallelism.pipeline_parallel_degree 2". A tuple means all of them."""
    needs = (needs,) if isinstance(needs, str) else needs
    # Each configuration gets a copy of a list.
    given = dict(default_factory=default.copy) if isinstance(default, list) else dict(default=default)
    return field(**given, metadata=dict(help=help, at_least=at_least, at_most=at_most, needs=needs))


def section(kind: type, help: str) -> Any:
    """A field that holds a section, with its heading in the help."""
    return field(default_factory=kind, metadata={"help": help})


class Option(NamedTuple):
    section: str
    key: str
    kind: Any  # its type; of `int | None`, int
    default: Any
    help: str
    at_least: float | None
    at_most: float | None
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    def value(self, config: Any) -> Any:
        return getattr(getattr(config, self.section), self.key)


def list_options(config: Any) -> Iterator[Option]:
    """All options in the order of their declaration; config is the dataclass of sections, or an instance of it."""
    for section in fields(config):
        table = section.default_factory()
        for f in fields(table):
            kind = get_args(f.type)[0] if isinstance(f.type, UnionType) else f.type
            yield Option(section.name, f.name, kind, getattr(table, f.name), **f.metadata)


def read_options(config: Any, argv: list[str]) -> None:
    """Sets config's options from a command line, over those of the TOML file that it names."""
    options = {option.name: option for option in list_options(config)}
    given = _parse_command_line(config, argv)
    if (file := given.get("job.config_file")) is not None:
        for name, value in _read_toml(config, file):
            _set(config, options, name, value, where=f"{file}: ")
    for name, text in given.items():
        _set(config, options, name, text, where="--", is_text=True)
    for option in options.values():
        for needed in option.needs:
            if option.value(config) != option.default and not _is_met(config, options, needed):
                raise ConfigError(f"{option.name} has no effect without {needed}; add --{needed}.")


def _parse_command_line(config: Any, argv: list[str]) -> dict[str, str]:
    given, rest = {}, list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(help_text(config, rest[0] if rest and not rest[0].startswith("-") else None))
            sys.exit(0)
        if not argument.startswith("--"):
            is_file = argument.endswith(".toml")
            cure = f"write --job.config_file {argument}" if is_file else "options are written --section.key value"
            raise ConfigError(f'"{argument}" is not an option; {cure}.')
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name} VALUE.")
            text = rest.pop(0)
        given[name] = text
    return given


def _read_toml(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The name and the value of each option in a TOML file."""
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"job.config_file: cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    for section, table in tables.items():
        if not is_dataclass(getattr(config, section, None)):
            raise ConfigError(f"{path}: [{section}] is not a section;{_section_hint(config, section)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} is a section, so write [{section}] and its keys below.")
        for key, value in table.items():
            if (section, key) == ("job", "config_file"):
                raise ConfigError(f"{path}: job.config_file belongs on the command line.")
            yield f"{section}.{key}", value


def _section_hint(config: Any, name: str) -> str:
    sections = [f.name for f in fields(config)]
    return did_you_mean(name, sections, cutoff=0.5) or f" sections are {', '.join(sections)}."


def _option_hint(options: dict[str, Option], name: str) -> str:
    """The options that a wrong name may mean: the same key in another section, else the nearest key in its section."""
    section, _, key = name.rpartition(".")
    siblings = [option for option in options.values() if option.section == section]
    candidates = siblings or list(options.values())
    keys = get_close_matches(key, [option.key for option in candidates], n=1)
    near = [option.name for option in options.values() if option.key == key]
    near = near or [option.name for option in candidates if option.key in keys]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"--help {section} lists the section's options." if siblings else "--help lists all options."


def _set(config: Any, options: dict[str, Option], name: str, value: Any, where: str, is_text: bool = False) -> None:
    if name not in options:
        raise ConfigError(f"{where}{name} is not an option; {_option_hint(options, name)}")
    option = options[name]
    value = _checked(_from_text(value, option.kind) if is_text else value, option.kind, f"{where}{name}")
    if option.at_least is not None and not value >= option.at_least:
        raise ConfigError(f"{where}{name}: expected at least {option.at_least}, given {value}.")
    if option.at_most is not None and not value <= option.at_most:
        raise ConfigError(f"{where}{name}: expected at most {option.at_most}, given {value}.")
    setattr(getattr(config, option.section), option.key, value)


def _from_text(text: str, kind: Any) -> Any:
    """A value as written in TOML. What is not TOML is a bare word, and so is anything where text is expected; where a
    list is expected, a bare word is a list of one."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if get_origin(kind) is list:
        is_list = isinstance(value, list) or text.startswith("[") or "," in text  # perhaps without its quotes
        return value if is_list else [value if isinstance(value, str) else text]
    return text if (kind is str or get_origin(kind) is Literal) and not isinstance(value, str) else value


def _checked(value: Any, kind: Any, where: str) -> Any:
    """value as `kind`, or ConfigError. TOML's integers pass for floats; nothing else is converted."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list) and len(value) == len(parts):
        return tuple(_checked(v, k, where) for v, k in zip(value, parts, strict=True))
    if origin is Literal:
        fits = value in parts
    elif origin is list:
        fits = isinstance(value, list) and all(type(v) is parts[0] for v in value)
    else:
        fits = type(value) is kind or (kind is float and type(value) is int)
    if fits:
        return float(value) if kind is float else value
    is_plain = isinstance(value, str | bool | int | float | list)
    given = to_toml(value) if is_plain else f"{value} ({type(value).__name__})"
    raise ConfigError(f"{where}: expected {type_name(kind)}, given {given}.")


def _is_met(config: Any, options: dict[str, Option], needed: str) -> bool:
    """Whether an option has a value that `needed` names; a number, a path or a name: any but its default."""
    name, _, values = needed.partition(" ")
    option, value = options[name], options[name].value(config)
    if option.kind is bool or get_origin(option.kind) is Literal:
        return to_toml(value).strip('"') in values.split(" or ")
    return value != option.default


def type_name(kind: Any) -> str:
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return " | ".join(f'"{choice}"' for choice in parts)
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(type_name, parts))}]"
    if get_origin(kind) is list:
        return f'["{type_name(parts[0])}", ...]'
    return {str: "string", int: "integer", float: "number", bool: "true | false"}[kind]


def help_text(config: Any, section: str | None = None) -> str:
    """Every option of a section, or of all sections."""
    headings = {f.name: f.metadata["help"] for f in fields(config)}
    if section is not None and section not in headings:
        raise ConfigError(f'--help {section}: "{section}" is not a section;{_section_hint(config, section)}')
    lines = ["torchrun --nproc_per_node=N train.py --job.config_file FILE.toml [--section.key value ...]"]
    lines += ["The command line wins over the file; values are written as in TOML. --help SECTION shows one section."]
    for option in (option for option in list_options(config) if section in (None, option.section)):
        if option.section in headings:
            lines += ["", f"[{option.section}]: {headings.pop(option.section)}"]
        shown = "not set" if option.default is None else f"default {to_toml(option.default)}"
        lines += [f"  --{option.name}  {type_name(option.kind)}  ({shown})", f"      {option.help}"]
        lines += [f"      needs {' and '.join(option.needs)}"] if option.needs else []
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
    for section, table in vars(config).items():
        values = {key: value for key, value in vars(table).items() if value is not None and key != "config_file"}
        lines += [f"[{section}]", *(f"{key} = {to_toml(value)}" for key, value in values.items()), ""]
    Path(path).write_text("\n".join(lines), encoding="utf-8")
