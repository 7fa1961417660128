"""Small texts, and datasets of them."""

from pathlib import Path

from data import TokenDataset, build_dataset, build_tokenizer

BYTE = build_tokenizer("byte")
LINES = "".join(f"line {i}\n" for i in range(60))


def text_dataset(folder: Path, text: str = LINES, *, seq_len: int = 8, seed: int = 0, **options) -> TokenDataset:
    """The samples of folder/texts/a.txt, which this writes, by the byte tokenizer; options are build_dataset's."""
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts/a.txt").write_text(text)
    options = {"tokenizer": BYTE, "cache_folder": folder / "cache", **options}
    return build_dataset("text", str(folder / "texts"), seq_len=seq_len, seed=seed, **options)
