"""The options: precedence, strictness, help, and one clear line for each mistake."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.distributed.pipelining.schedules import get_schedule_class

from config import Config, load_config
from model import ModelArgs
from options import help_text, list_options, save_config
from parallelize.float8 import NEEDED_CAPABILITY
from training.lr_schedule import learning_rate
from training.optimizer import OPTIMIZERS

OPTIONS = {option.name: option for option in list_options(Config)}


def write(tmp_path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def error_of(argv: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        load_config(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------- what is read


def test_command_line_wins_over_file_and_file_over_defaults(tmp_path):
    """The command line wins over the file, the file over the defaults; both spellings of an option work."""
    path = write(tmp_path, "[training]\nsteps = 5\nseq_len = 64\n[optimizer]\nbetas = [0.8, 0.9]\nlr = 1\n")
    config = load_config(["--job.config_file", path, "--training.steps=7", "--optimizer.eps", "1e-6"])
    assert (config.training.steps, config.training.seq_len, config.training.seed) == (7, 64, 0)
    assert (config.optimizer.betas, config.optimizer.lr, config.optimizer.eps) == ((0.8, 0.9), 1.0, 1e-6)


def test_values_on_the_command_line_are_toml():
    """Booleans are true and false, lists lists, a bare word is a string, and so is a number where text is expected."""
    config = load_config(
        "--checkpoint.enable true --optimizer.betas [0.5,0.6] --data.path 2024 --job.description hello "
        "--model.dim 64 --checkpoint.load_step -1 --job.dump_folder='a_b'".replace("'", "").split()
    )
    assert config.checkpoint.enable is True and config.optimizer.betas == (0.5, 0.6)
    assert (config.data.path, config.job.description, config.model.dim) == ("2024", "hello", 64)
    assert config.job.dump_folder == "a_b"


@pytest.mark.parametrize(
    "text, value",
    [
        ('["layers.0.*","*.wk"]', ["layers.0.*", "*.wk"]),
        ("*.wk", ["*.wk"]),
        ('"*.wk"', ["*.wk"]),
        ("layers.[01].*", ["layers.[01].*"]),
        ("3", ["3"]),
        ("[]", []),
    ],
)
def test_list_option_takes_a_toml_list_or_one_word(text, value):
    """On the command line a bare word is a list of one."""
    assert load_config(["--float8.enable", "true", "--float8.skip", text]).float8.skip == value


def test_list_option_is_not_shared_between_configurations():
    """Changing the list of one configuration leaves the default as it is."""
    Config().float8.skip.append("*.wk")
    assert Config().float8.skip == []


def test_sections_hold_exactly_their_options():
    """vars(section) are the keywords of the function that the section configures: options, and nothing else."""
    names = [f"{section}.{key}" for section, table in vars(load_config([])).items() for key in vars(table)]
    assert names == list(OPTIONS)


def test_model_section_has_the_fields_of_model_args_that_are_options():
    """A field of ModelArgs that only a flavor or a config.json sets is no option."""
    fixed = {f.name for f in fields(ModelArgs)} - {name.removeprefix("model.") for name in OPTIONS}
    assert {"norm_eps", "rope_factor", "mtp_loss_weight", "score_function"} <= fixed
    assert {"model.flavor", "model.dim", "model.n_experts", "model.rope_theta"} <= set(OPTIONS)
    assert "--model.norm_eps is not an option" in error_of(["--model.norm_eps", "1e-6"])


def test_there_are_at_most_100_options():
    """A new option takes the place of another."""
    assert len(OPTIONS) <= 100


def test_every_value_of_an_enumeration_is_implemented():
    """config.py alone lists the values; the code that implements them knows each."""
    assert set(get_args(OPTIONS["optimizer.name"].kind)) == set(OPTIMIZERS)
    for decay_type in get_args(OPTIONS["lr_scheduler.decay_type"].kind):
        section = load_config(["--lr_scheduler.decay_type", decay_type]).lr_scheduler
        assert 0 < learning_rate(step=5, lr=1.0, total_steps=10, **vars(section)) < 1
    for schedule in get_args(OPTIONS["parallelism.pipeline_parallel_schedule"].kind):
        get_schedule_class(schedule)
    assert set(get_args(OPTIONS["float8.recipe"].kind)) == set(NEEDED_CAPABILITY)
    for dtype in get_args(OPTIONS["training.dtype"].kind):
        assert isinstance(getattr(torch, dtype), torch.dtype)


def test_properties_name_what_functions_take():
    """Degrees by axis, dtypes of torch, and the number of sequences held out of the training data."""
    held_out = ["--validation.enable=true", "--validation.num_sequences=7"]
    config = load_config(["--parallelism.tensor_parallel_degree=2", "--training.dtype=float64", *held_out])
    assert config.parallelism.degrees == dict(pp=1, dp_replicate=1, dp_shard=-1, cp=1, tp=2, ep=1)
    assert config.training.torch_dtype is torch.float64
    assert (config.training.param_dtype, config.training.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert config.validation.num_held_out == 7
    assert load_config([*held_out, "--validation.path=x"]).validation.num_held_out == 0
    assert load_config([]).validation.num_held_out == 0


def test_saved_config_reproduces_the_run(tmp_path):
    """Every option survives the way through config.toml, strange strings and lists included."""
    strange = 'quo"te \\ back\nslash \x7f é 漢 😀'
    float8 = ["--float8.enable", "true", "--float8.skip", '["layers.0.*", "*.wk"]']
    config = load_config(["--model.dim=64", "--optimizer.lr=3e-05", "--checkpoint.enable=true", *float8])
    config.job.description = strange
    save_config(config, str(tmp_path / "config.toml"))
    again = load_config(["--job.config_file", str(tmp_path / "config.toml")])
    again.job.config_file = ""
    assert again == config


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "text, message",
    [
        ("[training]\nstepz = 3", "{file}: training.stepz is not an option; did you mean training.steps?"),
        ("[training]\nlr = 3", "{file}: training.lr is not an option; did you mean optimizer.lr?"),
        ("[trainin]\nsteps = 3", '{file}: [trainin] is not a section; did you mean "training"?'),
        ("training = 3", "{file}: training is a section, so write [training] and its keys below."),
        ("[training]\nsteps = '3'", '{file}: training.steps: expected integer, given "3".'),
        ("[training]\nsteps = 3.0", "{file}: training.steps: expected integer, given 3.0."),
        ("[training]\nsteps = true", "{file}: training.steps: expected integer, given true."),
        ("[training]\nsteps = 0", "{file}: training.steps: expected at least 1, given 0."),
        ("[lr_scheduler]\ndecay_ratio = 2", "{file}: lr_scheduler.decay_ratio: expected at most 1, given 2.0."),
        ("[lr_scheduler]\ndecay_ratio = nan", "{file}: lr_scheduler.decay_ratio: expected at least 0, given nan."),
        ("[checkpoint]\nenable = 1", "{file}: checkpoint.enable: expected true | false, given 1."),
        ("[optimizer]\nlr = 'fast'", '{file}: optimizer.lr: expected number, given "fast".'),
        ("[optimizer]\nbetas = [0.9]", "{file}: optimizer.betas: expected [number, number], given [0.9]."),
        ("[training]\ndtype = 'float16'",
         '{file}: training.dtype: expected "float32" | "bfloat16" | "float64", given "float16".'),
        ("[model]\ndim = 'wide'", '{file}: model.dim: expected integer, given "wide".'),
        ("[data]\npath = 2024-01-01", "{file}: data.path: expected string, given 2024-01-01 (date)."),
        ("[float8]\nskip = '*.wk'", '{file}: float8.skip: expected ["string", ...], given "*.wk".'),
        ("[float8]\nskip = [1]", '{file}: float8.skip: expected ["string", ...], given [1].'),
        ("[job]\nconfig_file = 'x'", "{file}: job.config_file belongs on the command line."),
    ],
)  # fmt: skip
def test_mistake_in_a_file_is_one_line(tmp_path, text, message):
    """File, key, what was expected and what was given, or the nearest valid name."""
    path = write(tmp_path, text)
    assert error_of(["--job.config_file", path]) == message.replace("{file}", path)


def test_broken_toml_is_reported_with_line_and_column(tmp_path):
    """Line and column of the first thing that is not TOML."""
    path = write(tmp_path, "[training]\nsteps = 3\nlr == 5\n")
    assert re.search(r"run\.toml: not valid TOML: .*line 3, column 5", error_of(["--job.config_file", path]))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--job.config_file", "/no/such.toml"], "cannot read /no/such.toml: No such file or directory."),
        (["--training.step", "3"], "--training.step is not an option; did you mean training.steps?"),
        (["--steps", "3"], "--steps is not an option; did you mean training.steps?"),
        (["--lr", "3"], "--lr is not an option; did you mean optimizer.lr?"),
        (["--seqlen", "3"], "--seqlen is not an option; did you mean training.seq_len?"),
        (["--interval", "3"], "did you mean checkpoint.interval or validation.interval?"),
        (["--trainin.steps", "3"], "--trainin.steps is not an option; did you mean training.steps?"),
        (["--comm.zzz", "3"], "--comm.zzz is not an option; --help comm lists the section's options."),
        (["--zzz", "3"], "--zzz is not an option; --help lists all options."),
        (["--training.steps", "many"], '--training.steps: expected integer, given "many".'),
        (["--training.steps"], "--training.steps needs a value"),
        (["--checkpoint.enable", "--training.steps", "3"], "--checkpoint.enable needs a value"),
        (["training.steps=3"], '"training.steps=3" is not an option; options are written --section.key value.'),
        (
            ["configs/x.toml"],
            '"configs/x.toml" is not an option; write --job.config_file configs/x.toml.',
        ),
        (["--float8.skip", "*.wq,*.wk"], '--float8.skip: expected ["string", ...], given "*.wq,*.wk".'),
        (["--float8.skip", "[*.wq]"], '--float8.skip: expected ["string", ...], given "[*.wq]".'),
        (
            ["--checkpoint.enable", "true", "--checkpoint.interval", "10", "--checkpoint.keep_every", "15"],
            "checkpoint.keep_every (15) must be a multiple of checkpoint.interval (10)",
        ),
        (["--optimizer.betas", "[0.9, 1.0]"], "optimizer.betas: expected two numbers from 0 to below 1"),
        (["--training.global_batch_size", "0"], "training.global_batch_size: expected -1 or more than 0, given 0."),
        (["--help", "trainin"], '--help trainin: "trainin" is not a section; did you mean "training"?'),
        (["--help", "xyz"], '"xyz" is not a section; sections are job, training, data, parallelism,'),
    ],
)
def test_mistake_on_the_command_line_is_one_line(argv, message):
    """The option as it was written, what was expected and what was given, or what to write instead."""
    assert message in error_of(argv)


# ------------------------------------------------------------------------------ options without effect


def is_met_by_default(needed: str) -> bool:
    name, value = needed.split(" ", 1)
    return OPTIONS[name].default == value


NEEDS = [(o, needed) for o in OPTIONS.values() for needed in o.needs if not is_met_by_default(needed)]


@pytest.mark.parametrize("option, needed", NEEDS, ids=lambda value: getattr(value, "name", value))
def test_option_without_what_it_needs_is_refused(option, needed):
    """The error names what the option needs, in the words that the command line takes; with it, the option passes."""
    other = {bool: str(not option.default).lower(), int: "2", float: "0.25"}.get(option.kind, "x")
    choices = [choice for choice in get_args(option.kind) if choice != option.default]
    given = [f"--{option.name}", choices[0] if option.kind != list[str] and choices else other]
    met = [argument for need in option.needs for argument in f"--{need.split(' or ')[0]}".split()]
    without = [argument for need in option.needs if need != needed for argument in f"--{need}".split()]
    assert error_of([*given, *without]) == f"{option.name} has no effect without {needed}; add --{needed}."
    section, key = option.name.split(".")
    extra = ["--checkpoint.interval", "1"]  # keep_every must be a multiple
    assert getattr(getattr(load_config([*given, *met, *extra]), section), key) != option.default


def test_option_is_refused_where_another_value_excludes_it():
    """What an option needs may be a default, which the user has replaced."""
    given = ["--float8.enable=true", "--float8.enable_fsdp_float8_all_gather=true"]
    assert load_config(given).float8.enable_fsdp_float8_all_gather
    assert "has no effect without float8.recipe tensorwise; add" in error_of([*given, "--float8.recipe=rowwise"])


def test_option_at_its_default_needs_nothing(tmp_path):
    """A file may write out a default, as a saved config.toml does."""
    path = write(tmp_path, "[float8]\nenable = false\nskip = []\n[comm]\ndirect_messages = true\n")
    assert load_config(["--job.config_file", path]).float8.skip == []


def test_alternatives_of_a_need_are_all_accepted():
    """`selective or memory_budget`: each of the two values is enough."""
    budget = ["--activation_checkpoint.selective_option", "0.3", "--compile.enable", "true"]
    for mode in ("selective", "memory_budget"):
        config = load_config([*budget, "--activation_checkpoint.mode", mode])
        assert config.activation_checkpoint.selective_option == "0.3"


# ---------------------------------------------------------------------------------------------------- help


def test_help_lists_every_option_under_its_section():
    """--help shows each option with type, default and a line of explanation, and leaves with status 0."""
    command = [sys.executable, "train.py", "--help"]
    folder = Path(__file__).parent.parent
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
    assert shown.strip() == help_text(Config).strip()
    lines, section = shown.splitlines(), None
    for option in OPTIONS.values():
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"  --{option.name}  "))
        assert lines[at].endswith(")") and len(lines[at + 1].strip()) > 5
        assert "".join(lines[at + 2 : at + 3]).startswith("      needs ") == bool(option.needs)
        if option.section != section:  # its first option, right below the heading
            section = option.section
            assert re.fullmatch(rf"\[{section}\]: .{{5,}}", lines[at - 1])
    assert "  --training.steps  integer  (default 200)" in lines
    assert '  --float8.skip  ["string", ...]  (default [])' in lines
    assert "      needs parallelism.tensor_parallel_degree 2 and compile.enable true" in lines


def test_help_of_one_section_lists_this_section_only(capsys):
    """--help SECTION leaves all other sections out."""
    with pytest.raises(SystemExit) as left:
        load_config(["--help", "lr_scheduler"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "[lr_scheduler]: " in shown
    assert re.findall(r"^  --(\w+\.\w+)", shown, re.M) == [n for n in OPTIONS if n.startswith("lr_scheduler.")]


def test_model_options_are_last_in_the_help():
    """The sections come in the order of train.py's story; the model's, the longest, at the end."""
    sections = list(dict.fromkeys(option.section for option in OPTIONS.values()))
    assert sections[0] == "job" and sections[-1] == "model" and sections.index("data") < sections.index("optimizer")
