"""Where documents come from, and the cache of those that a run tokenises itself."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from data import build_dataset, build_tokenizer
from data.dataset import TokenDataset
from data.sources import Stream, build_source

BYTE = build_tokenizer("byte")


def text_dataset(folder, text="", *, seq_len=8, seed=0, tokenizer=BYTE) -> TokenDataset:
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts/a.txt").write_text(text or "".join(f"line {i}\n" for i in range(60)))
    return build_dataset(
        "text", str(folder / "texts"), tokenizer, seq_len=seq_len, seed=seed, cache_folder=folder / "cache"
    )


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


def test_parquet(tmp_path):
    """A .parquet file gives one document a row, of the column asked for, row group by row group."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", "", None, "two", "three"], "id": [1, 2, 3, 4, 5]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = build_source("text", str(tmp_path))
    assert list(source) == ["one", "two", "three"]
    assert [list(unit) for unit in source.units(1)] == [["one"], ["two"], ["three"]]
    with pytest.raises(ValueError, match=r'a\.parquet has no column of strings "id" .* it has text, id\.'):
        list(build_source("text", str(tmp_path), "id"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"a\.parquet is no Parquet file, or not a whole one"):
        list(build_source("text", str(tmp_path)))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    """Says what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.parquet is Parquet, which needs pyarrow: pip install pyarrow\."):
        list(build_source("text", str(tmp_path)))


@pytest.mark.parametrize("unit_bytes", [1, 7, 20, 50, 10**6])
def test_units_of_jsonl(tmp_path, unit_bytes):
    """However a file is cut, each line is in one part, in order; an error names its line in the file."""
    texts = ["one", "two, longer", "", "\u00e9\u2028", "x" * 40, "last"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    units = build_source("text", str(tmp_path)).units(unit_bytes)
    assert [text for unit in units for text in unit] == 2 * [text for text in texts if text]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[:4], "{", *lines]))
    with pytest.raises(ValueError, match=r"b\.jsonl:5 is not JSON"):
        [list(unit) for unit in build_source("text", str(tmp_path)).units(unit_bytes)]


class FakeStream:
    """What is used of a dataset of Hugging Face's."""

    def __init__(self, shards):
        self.shards, self.num_shards = shards, len(shards)

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return FakeStream([self.shards[index]])

    def __iter__(self):
        return ({"text": text} for shard in self.shards for text in shard)


def test_stream_of_hugging_face(monkeypatch):
    """A unit for each of the dataset's shards, streamed; and what to install where there is no such library."""

    def load_dataset(*args, **kwargs):
        assert (args, kwargs) == (("owner/name", "en"), {"split": "train", "streaming": True})
        return FakeStream([["one", "two"], [], ["", "three"]])

    source = Stream("owner/name", "en", "train", "text")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"owner/name is read with Hugging Face's datasets: pip install datasets\."):
        source.units(1)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [list(unit) for unit in source.units(1)] == [["one", "two"], [], ["three"]]
    with pytest.raises(ValueError, match=r'no string under "body" \(text_key\); it has keys text\.'):
        list(Stream("owner/name", "en", "train", "body").units(1)[0])


# ---------------------------------------------------------------------------------- text that a run tokenises itself


def test_cache_is_found_and_follows_its_inputs(tmp_path):
    """The same inputs are tokenised once; another tokenizer or text gives another folder and fingerprint."""

    def build(tokenizer):
        return build_dataset("text", f"{tmp_path}/texts", tokenizer, seq_len=4, seed=0, cache_folder=cache)

    def folder(dataset):
        return dataset.corpora[0].folder

    cache = tmp_path / "cache"
    first = text_dataset(tmp_path, "some text, long enough")
    written = (folder(first) / "00000.tokens").stat().st_mtime_ns
    again = build(BYTE)
    assert folder(again) == folder(first) and (folder(first) / "00000.tokens").stat().st_mtime_ns == written
    assert again.fingerprint == first.fingerprint
    bpe = build(build_tokenizer("bpe_4096"))
    other = text_dataset(tmp_path, "some text, long_enough")
    assert len({folder(d) for d in (first, bpe, other)}) == 3
    assert len({first.fingerprint, bpe.fingerprint, other.fingerprint}) == 3
    assert sorted(os.listdir(cache)) == sorted(folder(d).name for d in (first, bpe, other))
    assert sorted(os.listdir(folder(first))) == ["00000.tokens", "index.json"]


@pytest.mark.parametrize("keep", [0, 100, -1])
@pytest.mark.parametrize("name", ["00000.tokens", "index.json"])
def test_torn_cache_is_rebuilt(tmp_path, keep, name):
    """A cached shard cut anywhere is made again, to the same bytes; an index that is no index is an error."""
    path = text_dataset(tmp_path).corpora[0].folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    if name == "index.json":
        with pytest.raises(ValueError, match="is not a corpus' index; prepare the corpus again"):
            build_again(tmp_path)
        return
    build_again(tmp_path)
    assert path.read_bytes() == whole


def build_again(folder):
    build_dataset("text", str(folder / "texts"), BYTE, seq_len=8, seed=0, cache_folder=folder / "cache")


def test_failed_writer_leaves_no_corpus(tmp_path):
    """A document that cannot be read, or no text at all, is an error and leaves nothing that would be used."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("fine")
    (tmp_path / "texts/b.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        text_dataset(tmp_path)
    assert not [name for *_, names in os.walk(tmp_path / "cache") for name in names]
    (tmp_path / "texts/b.txt").unlink()
    (tmp_path / "texts/a.txt").write_text("")
    with pytest.raises(ValueError, match=r"no text in the 1 file\(s\) of .*texts: nothing, or only empty documents"):
        build_again(tmp_path)
    assert not list((tmp_path / "cache").glob("*/index.json"))


def test_cache_that_cannot_be_written(tmp_path):
    """A cache folder that cannot be one is the user's error, in one line."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"/cache/\w+ cannot be used: Not a directory\.$"):
        text_dataset(tmp_path)
