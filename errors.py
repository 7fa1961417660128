"""Errors that a user can cure, and the hint that names the nearest valid word."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A mistake in what the user configured, or in a file that the user named. It ends the run as one line without a
    traceback (`resilience/clean_exit.py`), so its message gives the option or file, the value, and the cure."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """' did you mean "X"?' for the nearest of the known names; empty if none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f' did you mean "{near[0]}"?' if near else ""
