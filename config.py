"""Every option, in one place: `--section.key value` on the command line over a strict TOML file over the defaults.

Nothing is guessed and nothing ignored: an unknown section or key, a value of the wrong type or out of range is a
ValueError of one line that says where, what was expected and what was given.
"""

import os
import sys
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.args import ModelArgs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DType = Literal["float32", "bfloat16", "float64"]


def option(default: Any, help: str, at_least: float | None = None, at_most: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "at_least": at_least, "at_most": at_most})


@dataclass
class Job:
    config_file: str = option("", "TOML file with any of the options below; command line only")
    description: str = option("", "free text, kept with the run")
    dump_folder: str = option("outputs", "where config.toml, metrics.jsonl, checkpoints and TensorBoard files go")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto is cuda where there is a GPU")


# [model]: a flavor, and any field of ModelArgs in place of the flavor's.
Model = make_dataclass(
    "Model",
    [("flavor", str, option("llama3_debug", "named size, see model/flavors.py"))]
    + [(f.name, f.type | None, option(None, f"{f.metadata['help']} (none: the flavor's)")) for f in fields(ModelArgs)],
)


@dataclass
class Training:
    steps: int = option(200, "optimizer steps in all, counted over resumed runs", 1)
    seq_len: int = option(2048, "tokens a sequence", 1)
    local_batch_size: int = option(1, "sequences per data rank and microbatch", 1)
    global_batch_size: int = option(-1, "sequences per optimizer step; the rest is accumulated; -1: local x data ranks")
    max_norm: float = option(1.0, "gradients are clipped to this norm; 0: only measured", 0)
    seed: int = option(0, "of the initial weights and the order of the data", 0)
    deterministic: bool = option(False, "refuse kernels whose results vary from run to run")
    dtype: DType = option("float32", "of the weights and the optimizer's state")
    mixed_precision_param: DType = option("bfloat16", "weights are cast to this for forward and backward")
    mixed_precision_reduce: DType = option("float32", "gradients are summed over ranks in this")
    enable_cpu_offload: bool = option(False, "keep weights and optimizer state in CPU memory, update them there")


@dataclass
class Optimizer:
    name: Literal["AdamW", "Adam"] = option("AdamW", "AdamW decouples the weight decay from the gradient")
    lr: float = option(3e-4, "highest learning rate", 0)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of the two moments")
    eps: float = option(1e-8, "added to the denominator", 0)
    weight_decay: float = option(0.1, "of all weights but norms", 0)
    decay_embeddings: bool = option(False, "whether the token embedding is decayed too")


@dataclass
class LRScheduler:
    warmup_steps: int = option(0, "steps of linear warm-up", 0)
    decay_ratio: float = option(
        1.0, "last part of the steps, in which the rate falls; 0: none, 1: all after warm-up", 0, 1
    )
    decay_type: Literal["linear", "cosine", "sqrt"] = option("cosine", "how it falls")
    min_lr_factor: float = option(0.1, "where it ends, as a part of optimizer.lr", 0, 1)


@dataclass
class Parallelism:
    data_parallel_replicate_degree: int = option(1, "copies of the model (HSDP; with shard degree 1: replication)", 1)
    data_parallel_shard_degree: int = option(-1, "ways each copy is sharded (FSDP); -1: all the ranks that are left")
    fsdp_reshard_after_forward: Literal["always", "never"] = option(
        "always", "free a block's gathered weights after forward; never: faster, keeps all weights through the step"
    )


@dataclass
class Checkpoint:
    enable: bool = option(False, "save, and resume from what is there")
    folder: str = option("checkpoint", "inside job.dump_folder")
    interval: int = option(500, "steps between saves; the last step is always saved", 1)
    keep_latest_k: int = option(10, "older ones are deleted; 0: keep all", 0)
    load_step: int = option(-1, "step to resume from; -1: the newest", -1)
    initial_load_path: str = option("", "a checkpoint's folder (.../step-N) whose weights a new run starts from")


@dataclass
class Data:
    dataset: Literal["python_stdlib", "text"] = option("python_stdlib", "python_stdlib needs no files; text reads path")
    path: str = option("", "file, folder or glob of text or .jsonl files")
    text_key: str = option("text", "the field of a .jsonl line that holds the text")
    tokenizer: str = option("bpe_4096", '"bpe_4096", "byte", a tiktoken encoding\'s name, or a tokenizer.model file')
    cache_folder: str = option("outputs/cache", "where tokenised data is kept")
    num_workers: int = option(0, "processes a rank that fetch ahead; 0: none", 0)


@dataclass
class Metrics:
    log_freq: int = option(10, "steps between logged ones", 1)
    enable_tensorboard: bool = option(False, "write TensorBoard files to job.dump_folder/tensorboard")


@dataclass
class Comm:
    timeout_seconds: int = option(600, "a collective that waits longer ends the run", 1)


@dataclass
class Config:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    data: Data = field(default_factory=Data)
    metrics: Metrics = field(default_factory=Metrics)
    comm: Comm = field(default_factory=Comm)


# ------------------------------------------------------------------------------------------------- reading


def load_config(argv: list[str]) -> Config:
    """The configuration that a command line asks for. ValueError, in one line, for whatever is wrong with it."""
    given = _parse_command_line(argv)
    config = Config()
    config_file = given.get("job.config_file")
    if config_file is not None:
        for section, table in _read_toml(config_file).items():
            if not is_dataclass(getattr(config, section, None)):
                raise ValueError(f"{config_file}: [{section}] is not a section; {_nearest(section, _sections())}")
            if not isinstance(table, dict):
                raise ValueError(f"{config_file}: {section} is a section, so write [{section}] and its keys below.")
            for key, value in table.items():
                if (section, key) == ("job", "config_file"):
                    raise ValueError(f"{config_file}: job.config_file belongs on the command line.")
                _set(config, f"{section}.{key}", value, where=f"{config_file}: ")
    for name, text in given.items():
        _set(config, name, text, where="--", is_text=True)
    _check(config)
    return config


def _check(config: Config) -> None:
    """What no single option can tell."""
    if config.training.global_batch_size < 1 and config.training.global_batch_size != -1:
        raise ValueError(
            f"training.global_batch_size: expected -1 or more than 0, given {config.training.global_batch_size}."
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ValueError(
            f"optimizer.betas: expected two numbers from 0 to below 1, given {list(config.optimizer.betas)}."
        )
    if config.checkpoint.load_step != -1 and not config.checkpoint.enable:
        raise ValueError("checkpoint.load_step has no effect without checkpoint.enable; add --checkpoint.enable true.")


def _parse_command_line(argv: list[str]) -> dict[str, str]:
    given, rest = {}, list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(help_text())
            sys.exit(0)
        if not argument.startswith("--"):
            raise ValueError(f'"{argument}" is not an option; options are written --section.key value.')
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value: --{name} VALUE.")
            text = rest.pop(0)
        given[name] = text
    return given


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ValueError(f"job.config_file: cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}.") from None


def _sections() -> list[str]:
    return [f.name for f in fields(Config)]


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."


def _set(config: Config, name: str, value: Any, where: str, is_text: bool = False) -> None:
    section, _, key = name.partition(".")
    table = getattr(config, section, None) if section in _sections() else None
    known = {f.name: f for f in fields(table)} if table else {}
    if key not in known:
        names = [f"{section}.{key}" for key in known] if table else [n for n, *_ in _options()]
        near = get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "--help lists all of them."
        raise ValueError(f"{where}{name} is not an option; {hint}")
    kind = get_type_hints(type(table))[key]
    if is_text:
        value = _from_text(value, kind)
    value = _checked(value, kind, f"{where}{name}")
    at_least, at_most = (known[key].metadata.get(bound) for bound in ("at_least", "at_most"))
    if at_least is not None and value < at_least:
        raise ValueError(f"{where}{name}: expected at least {at_least}, given {value}.")
    if at_most is not None and value > at_most:
        raise ValueError(f"{where}{name}: expected at most {at_most}, given {value}.")
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
    raise ValueError(f"{where}: expected {type_name(kind)}, given {given}.")


# ------------------------------------------------------------------------------------------------- writing


def type_name(kind: Any) -> str:
    if get_origin(kind) is UnionType:
        return " | ".join(type_name(k) for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is Literal:
        return " | ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{', '.join(type_name(k) for k in get_args(kind))}]"
    return {str: "string", int: "integer", float: "number", bool: "true | false"}[kind]


def _options() -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, help) of every option."""
    rows = []
    for section in fields(Config):
        table = section.default_factory
        hints = get_type_hints(table)
        rows += [(f"{section.name}.{f.name}", hints[f.name], f.default, f.metadata["help"]) for f in fields(table)]
    return rows


def help_text() -> str:
    lines = ["torchrun --nproc_per_node=N train.py --job.config_file FILE.toml [--section.key value ...]", ""]
    for name, kind, default, text in _options():
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


def save_config(config: Config, path: str) -> None:
    """Writes every option, so that running from that file repeats the run even if a default changes."""
    lines = []
    for section in fields(Config):
        lines.append(f"[{section.name}]")
        for key, value in vars(getattr(config, section.name)).items():
            if value is not None and (section.name, key) != ("job", "config_file"):
                lines.append(f"{key} = {to_toml(value)}")
        lines.append("")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
