"""Checkpoints that are complete or invisible, and load into any layout."""

from checkpoint.manager import CheckpointManager
from checkpoint.state import ModelState

__all__ = ["CheckpointManager", "ModelState"]
