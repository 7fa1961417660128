"""The data: documents, and the cached stream of tokens that they become."""

import json
import os

import numpy as np
import pytest

from data import build_dataset, build_tokenizer
from data.dataset import TokenDataset
from data.packing import HEADER_BYTES, open_tokens, pack, read_header
from data.prepare import main as prepare
from data.sources import build_source

BYTE = build_tokenizer("byte")


def text_dataset(folder, text="", *, seq_len=8, seed=0, tokenizer=BYTE) -> TokenDataset:
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts/a.txt").write_text(text or "".join(f"line {i}\n" for i in range(60)))
    return build_dataset(
        "text", str(folder / "texts"), tokenizer, seq_len=seq_len, seed=seed, cache_folder=folder / "cache"
    )


# ---------------------------------------------------------------------------------- sources


def test_stdlib_documents():
    """python_stdlib is the library alone, in the order of its paths: no tests, nothing installed, no build's
    paths.
    """
    source = build_source("python_stdlib", "")
    names = [file.relative_to(source.root).as_posix() for file in source.files]
    assert names == sorted(names) and {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test"}
    assert not any("_sysconfigdata" in name for name in names)
    assert next(iter(source)) == source.files[0].read_text("utf-8")


def test_text_files(tmp_path):
    """A file, a folder and a glob each give documents by path; hidden and empty files do not count."""
    for name, text in {
        "b.txt": "bee",
        "a/z.md": "zed\r\n",
        "a/.hidden": "no",
        ".git/x.txt": "no",
        "c.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert list(build_source("text", str(tmp_path))) == ["zed\r\n", "bee", "marked"]
    assert list(build_source("text", str(tmp_path / "b.txt"))) == ["bee"]
    assert list(build_source("text", str(tmp_path / "**/*.txt"))) == ["bee", "marked"]
    assert list(build_source("text", str(tmp_path / "**/*"))) == ["zed\r\n", "bee", "marked"]


def test_jsonl(tmp_path):
    """A .jsonl file gives one document a line, under the key asked for."""
    records = [{"text": "one", "body": "1"}, {"text": "two\u2028lines", "body": "2"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    assert list(build_source("text", str(tmp_path))) == ["one", "two\u2028lines"]
    assert list(build_source("text", str(tmp_path), "body")) == ["1", "2"]


def test_source_errors(tmp_path):
    """What is wrong with a name, a path or a file is one line that says where."""

    def error_of(*arguments) -> str:
        with pytest.raises(ValueError) as error:
            list(build_source(*map(str, arguments)))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert 'did you mean "python_stdlib"?' in error_of("python_stdlb", "")
    assert "data.path (x) is not read by" in error_of("python_stdlib", "x")
    assert 'data.text_key ("body") has no effect' in error_of("python_stdlib", "", "body")
    assert "needs data.path" in error_of("text", "")
    assert "matches no file" in error_of("text", tmp_path / "*.txt")

    (tmp_path / "a.txt").write_bytes(b"fine \xff not")
    assert f"{tmp_path}/a.txt is not UTF-8" in error_of("text", tmp_path)
    assert "text_key" in error_of("text", tmp_path, "body")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "dead").symlink_to("nowhere")
    assert f"{tmp_path}/dead cannot be read: No such file" in error_of("text", tmp_path)

    lines = tmp_path / "b.jsonl"
    lines.write_text('{"text": "a"}\n{"text": \n')
    assert f"{lines}:2 is not JSON" in error_of("text", lines)
    lines.write_text('{"text": "a"}\n{"body": "b", "id": 3}\n')
    assert f'{lines}:2 has no string under "text" (data.text_key); it has keys body, id.' in error_of("text", lines)
    lines.write_text('{"text": 5}\n')
    assert ':1 has no string under "text"' in error_of("text", lines)
    lines.write_text('["a"]\n')
    assert "it has no keys: it is no object" in error_of("text", lines)


# ---------------------------------------------------------------------------------- the stream's cache


def test_stream(tmp_path):
    """The stream is bos, ids, eos of each document in order; without a bos token just ids and eos."""
    (tmp_path / "a.jsonl").write_text('{"text": "hi"}\n{"text": "you"}\n')
    path = pack(build_source("text", str(tmp_path / "*.jsonl")), BYTE, tmp_path / "cache")
    header = read_header(path)
    tokens = open_tokens(path, header)
    assert tokens.dtype == np.uint16 and tokens.tolist() == [256, *b"hi", 257, 256, *b"you", 257]
    assert (header.num_tokens, header.num_documents, header.text_bytes) == (9, 2, 5)

    no_bos = build_tokenizer("byte")
    no_bos.bos_id, no_bos.vocab_size = None, 70_000
    path = pack(build_source("text", str(tmp_path / "*.jsonl")), no_bos, tmp_path / "cache32")
    tokens = open_tokens(path, read_header(path))
    assert tokens.dtype == np.uint32 and tokens.tolist() == [*b"hi", 257, *b"you", 257]


def test_cache_is_found_and_follows_its_inputs(tmp_path):
    """The same inputs are tokenised once; another tokenizer or text gives another file and fingerprint."""

    def build(tokenizer):
        return build_dataset("text", f"{tmp_path}/texts", tokenizer, seq_len=4, seed=0, cache_folder=cache)

    cache = tmp_path / "cache"
    first = text_dataset(tmp_path, "some text, long enough")
    written = first.path.stat().st_mtime_ns
    again = build(BYTE)
    assert again.path == first.path and first.path.stat().st_mtime_ns == written
    assert again.fingerprint == first.fingerprint
    bpe = build(build_tokenizer("bpe_4096"))
    other = text_dataset(tmp_path, "some text, long_enough")
    assert len({first.path, bpe.path, other.path}) == 3
    assert len({first.fingerprint, bpe.fingerprint, other.fingerprint}) == 3
    assert sorted(os.listdir(cache)) == sorted(d.path.name for d in (first, bpe, other))


@pytest.mark.parametrize("keep", [0, 100, HEADER_BYTES, -1])
def test_torn_cache_is_rebuilt(tmp_path, keep):
    """A cache file cut anywhere is made again, to the same bytes."""
    path = text_dataset(tmp_path).path
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    build_dataset("text", str(tmp_path / "texts"), BYTE, seq_len=8, seed=0, cache_folder=tmp_path / "cache")
    assert path.read_bytes() == whole


def test_failed_writer_leaves_nothing(tmp_path):
    """A document that cannot be read, or no text at all, is an error and leaves no file in the cache."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("fine")
    (tmp_path / "texts/b.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        text_dataset(tmp_path)
    (tmp_path / "texts/b.txt").unlink()
    (tmp_path / "texts/a.txt").write_text("")
    with pytest.raises(ValueError, match=r"no text in the 1 file\(s\) of .*texts: all are empty"):
        pack(build_source("text", str(tmp_path / "texts")), BYTE, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_cache_that_cannot_be_written(tmp_path):
    """A cache folder that cannot be one is the user's error, in one line."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"^data\.cache_folder \(.*/cache\) cannot be used: Not a directory\.$"):
        text_dataset(tmp_path)


def test_prepare(tmp_path, capsys):
    """prepare fills the cache that a run with the same options uses."""
    path = text_dataset(tmp_path, "0123456789").path
    path.unlink()
    prepare(["--dataset=text", f"--path={tmp_path}/texts", "--tokenizer=byte", f"--cache_folder={tmp_path}/cache"])
    assert path.exists()
    said = capsys.readouterr().out
    assert "1 documents, 10 bytes" in said and "12 tokens, 0.83 bytes a token; 258 ids" in said and str(path) in said
