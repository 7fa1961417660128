"""Hugging Face folders, in and out."""

from hf.config import model_args_of_folder, require_same_model
from hf.load import load_hf

__all__ = ["load_hf", "model_args_of_folder", "require_same_model"]
