"""Keeps a run alive and ends it well: process group, preemption, watchdog, lock, bad numbers, one-line errors."""

from resilience.clean_exit import clean_exit
from resilience.health import NonFiniteGuard
from resilience.preemption import EXIT_PREEMPTED
from resilience.run import Run

__all__ = ["EXIT_PREEMPTED", "NonFiniteGuard", "Run", "clean_exit"]
