"""Checkpoints that are complete or invisible, and load into any layout."""

from checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager"]
