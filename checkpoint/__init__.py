"""Checkpoints that are complete or invisible, and load into any layout; Hugging Face folders in and out."""

from checkpoint.hf import export_hf, load_hf
from checkpoint.hf_config import model_args_of_folder, require_same_model
from checkpoint.lock import FolderLock
from checkpoint.manager import CheckpointManager
from checkpoint.state import TrainedState

__all__ = [
    "CheckpointManager",
    "FolderLock",
    "TrainedState",
    "export_hf",
    "load_hf",
    "model_args_of_folder",
    "require_same_model",
]
