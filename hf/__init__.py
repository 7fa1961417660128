"""Hugging Face folders, in and out."""

from hf.config import model_args_of_folder, require_same_model
from hf.load import export_hf, load_hf

__all__ = ["export_hf", "load_hf", "model_args_of_folder", "require_same_model"]
