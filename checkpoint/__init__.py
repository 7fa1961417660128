"""Checkpoints. A checkpoint is complete or invisible, and it loads into any layout."""

from checkpoint.manager import CheckpointManager
from checkpoint.state import ModelState, TrainState

__all__ = ["CheckpointManager", "ModelState", "TrainState"]
