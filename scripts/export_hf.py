"""Export a checkpoint as a Hugging Face folder, for transformers and vLLM:

    python scripts/export_hf.py outputs/checkpoint/step-1000 exported --dtype bfloat16 --like Llama-3.1-8B

It needs no GPU, and memory for the largest tensor only. --like copies the tokenizer, the token ids and
generation_config.json from another Hugging Face folder, such as the folder that the run started from.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from hf.export import export_hf
from resilience import clean_exit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a checkpoint, .../step-N")
    parser.add_argument("folder", help="folder to write; must not exist, or be empty")
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--like", help="Hugging Face folder to copy the tokenizer from")
    parser.add_argument("--skip_mtp", action="store_true", help="leave out the layers of multi-token prediction")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="largest file, in 10^9 bytes (default 5)")
    given = parser.parse_args()
    with clean_exit():
        export_hf(
            given.checkpoint,
            given.folder,
            dtype=getattr(torch, given.dtype) if given.dtype else None,
            like=given.like,
            skip_mtp=given.skip_mtp,
            max_bytes=int(given.max_shard_gb * 10**9),
        )
        print(f"wrote {given.folder}")


if __name__ == "__main__":
    main()
