"""The configuration: precedence, strictness, and one clear line for each mistake."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest

from config import Config, load_config
from options import help_text, save_config


def write(tmp_path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_command_line_over_file_over_defaults(tmp_path):
    """The command line wins over the file, the file over the defaults; both spellings of an option work."""
    path = write(tmp_path, "[training]\nsteps = 5\nseq_len = 64\n[optimizer]\nbetas = [0.8, 0.9]\nlr = 1\n")
    config = load_config(["--job.config_file", path, "--training.steps=7", "--optimizer.eps", "1e-6"])
    assert (config.training.steps, config.training.seq_len, config.training.seed) == (7, 64, 0)
    assert (config.optimizer.betas, config.optimizer.lr, config.optimizer.eps) == ((0.8, 0.9), 1.0, 1e-6)


def test_values_on_the_command_line_are_toml():
    """Booleans are true and false, lists lists, a bare word is a string, and so is a number where text is asked."""
    config = load_config(
        "--checkpoint.enable true --optimizer.betas [0.5,0.6] --data.path 2024 --job.description hello "
        "--model.dim 64 --checkpoint.load_step -1 --job.dump_folder='a_b'".replace("'", "").split()
    )
    assert config.checkpoint.enable is True and config.optimizer.betas == (0.5, 0.6)
    assert (config.data.path, config.job.description, config.model.dim) == ("2024", "hello", 64)
    assert config.job.dump_folder == "a_b"


def test_saved_config_reproduces_the_run(tmp_path):
    """Every option survives the way through config.toml, strange strings included."""
    strange = 'quo"te \\ back\nslash \x7f é 漢 😀'
    config = load_config(["--model.dim", "64", "--optimizer.lr", "3e-05", "--checkpoint.enable", "true"])
    config.job.description = strange
    save_config(config, str(tmp_path / "config.toml"))
    again = load_config(["--job.config_file", str(tmp_path / "config.toml")])
    again.job.config_file = ""
    assert again == config


@pytest.mark.parametrize(
    "text, message",
    [
        ("[training]\nstepz = 3", "{file}: training.stepz is not an option; did you mean training.steps?"),
        ("[trainin]\nsteps = 3", "{file}: [trainin] is not a section; did you mean training?"),
        ("training = 3", "{file}: training is a section, so write [training] and its keys below."),
        ("[training]\nsteps = '3'", '{file}: training.steps: expected integer, given "3".'),
        ("[training]\nsteps = 3.0", "{file}: training.steps: expected integer, given 3.0."),
        ("[training]\nsteps = true", "{file}: training.steps: expected integer, given true."),
        ("[training]\nsteps = 0", "{file}: training.steps: expected at least 1, given 0."),
        ("[lr_scheduler]\ndecay_ratio = 2", "{file}: lr_scheduler.decay_ratio: expected at most 1, given 2.0."),
        ("[checkpoint]\nenable = 1", "{file}: checkpoint.enable: expected true | false, given 1."),
        ("[optimizer]\nlr = 'fast'", '{file}: optimizer.lr: expected number, given "fast".'),
        ("[optimizer]\nbetas = [0.9]", "{file}: optimizer.betas: expected [number, number], given [0.9]."),
        ("[training]\ndtype = 'float16'",
         '{file}: training.dtype: expected "float32" | "bfloat16" | "float64", given "float16".'),
        ("[model]\ndim = 'wide'", '{file}: model.dim: expected integer, given "wide".'),
        ("[data]\npath = 2024-01-01", "{file}: data.path: expected string, given 2024-01-01 (date)."),
        ("[job]\nconfig_file = 'x'", "{file}: job.config_file belongs on the command line."),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(tmp_path, text, message):
    """File, key, what was expected and what was given, or the nearest valid name."""
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_config(["--job.config_file", path])
    assert str(error.value) == message.replace("{file}", path)


def test_broken_toml_says_where(tmp_path):
    """Line and column of the first thing that is not TOML."""
    path = write(tmp_path, "[training]\nsteps = 3\nlr == 5\n")
    with pytest.raises(ValueError, match=r"run\.toml: not valid TOML: .*line 3, column 5"):
        load_config(["--job.config_file", path])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--job.config_file", "/no/such.toml"], "cannot read /no/such.toml: No such file or directory."),
        (["--training.step", "3"], "--training.step is not an option; did you mean training.steps?"),
        (["--steps", "3"], "--steps is not an option;"),
        (["--training.steps", "many"], '--training.steps: expected integer, given "many".'),
        (["--training.steps"], "--training.steps needs a value"),
        (["--checkpoint.enable", "--training.steps", "3"], "--checkpoint.enable needs a value"),
        (["training.steps=3"], '"training.steps=3" is not an option; options are written --section.key value.'),
        (
            ["--checkpoint.enable", "true", "--checkpoint.interval", "10", "--checkpoint.keep_every", "15"],
            "checkpoint.keep_every (15) must be a multiple of checkpoint.interval (10)",
        ),
        (["--checkpoint.async_mode", "async"], "checkpoint.async_mode has no effect without checkpoint.enable"),
        (
            ["--checkpoint.exclude_from_loading", "output"],
            "checkpoint.exclude_from_loading has no effect without checkpoint.initial_load_path",
        ),
        (["--checkpoint.load_step", "3"], "checkpoint.load_step has no effect without checkpoint.enable"),
        (["--optimizer.betas", "[0.9, 1.0]"], "optimizer.betas: expected two numbers from 0 to below 1"),
        (["--training.global_batch_size", "0"], "training.global_batch_size: expected -1 or more than 0, given 0."),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    """The option as it was written, what was expected and what was given."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(argv)


def test_help_lists_every_option():
    """--help shows each option with type, default and a line of explanation, and leaves with status 0."""
    shown = subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == help_text(Config()).strip()
    lines = shown.splitlines()
    for section in fields(Config):
        for option in fields(section.default_factory):
            (at,) = (i for i, line in enumerate(lines) if line.startswith(f"  --{section.name}.{option.name}  "))
            assert "(default " in lines[at] and len(lines[at + 1].strip()) > 5
    assert "--training.steps  integer  (default 200)" in shown
