"""Hugging Face folders: the model they describe, their weights into any layout, and export."""

from hf.config import get_model_args, model_args_of_folder, require_same_model
from hf.load import load_hf

__all__ = ["get_model_args", "load_hf", "model_args_of_folder", "require_same_model"]
