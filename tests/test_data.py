"""Sources of documents, and the cache of documents that a run tokenises itself."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
from helpers.texts import BYTE, text_dataset

from data import build_dataset, build_tokenizer
from data.sources import build_source
from scripts.hf_stream import HFStream


def test_python_stdlib_holds_the_library_alone():
    """python_stdlib is the library in the order of its paths, without tests, installed packages and files that hold a
    machine's paths."""
    source = build_source("python_stdlib", "")
    names = [file.relative_to(source.root).as_posix() for file in source.files]
    assert names == sorted(names) and {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test"}
    assert not any("_sysconfigdata" in name for name in names)
    assert next(iter(source)) == source.files[0].read_text("utf-8")


def test_text_source_reads_a_file_a_folder_or_a_glob(tmp_path):
    """Each gives the documents in the order of their paths, without hidden and empty files."""
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


def test_jsonl_file_gives_a_document_per_line(tmp_path):
    """The document is the string under text_key."""
    records = [{"text": "one", "body": "1"}, {"text": "two\u2028lines", "body": "2"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    assert list(build_source("text", str(tmp_path))) == ["one", "two\u2028lines"]
    assert list(build_source("text", str(tmp_path), "body")) == ["1", "2"]


def test_source_rejects_wrong_path_key_or_file(tmp_path):
    """The error is one line that names the option, the file and the line."""

    def error_of(*arguments) -> str:
        with pytest.raises(ValueError) as error:
            list(build_source(*map(str, arguments)))
        assert "\n" not in str(error.value)
        return str(error.value)

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
    assert "it has no keys: it is not an object" in error_of("text", lines)


def test_parquet_file_gives_a_document_per_row(tmp_path):
    """The document is the string in the column text_key, row group by row group."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", "", None, "two", "three"], "id": [1, 2, 3, 4, 5]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = build_source("text", str(tmp_path))
    assert list(source) == ["one", "two", "three"]
    assert [list(job) for job in source.jobs(1)] == [["one"], ["two"], ["three"]]
    with pytest.raises(ValueError, match=r'a\.parquet has no column of strings "id" .* it has text, id\.'):
        list(build_source("text", str(tmp_path), "id"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file, or not a complete one"):
        list(build_source("text", str(tmp_path)))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    """The error names the file and the command."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.parquet is Parquet, which needs pyarrow: pip install pyarrow\."):
        list(build_source("text", str(tmp_path)))


@pytest.mark.parametrize("shard_bytes", [1, 7, 20, 50, 10**6])
def test_cut_jsonl_file_gives_each_line_once(tmp_path, shard_bytes):
    """For any size of the jobs, the lines come once and in order, and an error names the line in the whole file."""
    texts = ["one", "two, longer", "", "\u00e9\u2028", "x" * 40, "last"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    jobs = build_source("text", str(tmp_path)).jobs(shard_bytes)
    assert [text for job in jobs for text in job] == 2 * [text for text in texts if text]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[:4], "{", *lines]))
    with pytest.raises(ValueError, match=r"b\.jsonl:5 is not JSON"):
        [list(job) for job in build_source("text", str(tmp_path)).jobs(shard_bytes)]


class FakeStream:
    """The part of a Hugging Face dataset's interface that HFStream uses."""

    def __init__(self, shards):
        self.shards, self.num_shards = shards, len(shards)

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return FakeStream([self.shards[index]])

    def __iter__(self):
        return ({"text": text} for shard in self.shards for text in shard)


def test_hf_stream_makes_a_job_per_shard(monkeypatch):
    """Each of the dataset's shards is streamed by a job; without the library, the error says what to install."""

    def load_dataset(*args, **kwargs):
        assert (args, kwargs) == (("owner/name", "en"), {"split": "train", "streaming": True})
        return FakeStream([["one", "two"], [], ["", "three"]])

    source = HFStream("owner/name", "en", "train", "text")
    # In the index of corpora that were made by earlier versions.
    assert source.fingerprint() == "Stream(name='owner/name', subset='en', split='train', text_key='text')"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"owner/name is read with Hugging Face's datasets: pip install datasets\."):
        source.jobs(1)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [list(job) for job in source.jobs(1)] == [["one", "two"], [], ["three"]]
    with pytest.raises(ValueError, match=r'no string under "body" \(text_key\); it has keys text\.'):
        list(HFStream("owner/name", "en", "train", "body").jobs(1)[0])


# ---------------------------------------------------------------------------------- text that a run tokenises itself


def test_cache_is_reused_until_an_input_changes(tmp_path):
    """The same inputs are tokenised once; a different tokenizer or text gives a different folder and fingerprint."""

    def build(tokenizer):
        return build_dataset("text", f"{tmp_path}/texts", tokenizer, seq_len=8, seed=0, cache_folder=cache)

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


def build_again(folder):
    build_dataset("text", str(folder / "texts"), BYTE, seq_len=8, seed=0, cache_folder=folder / "cache")


@pytest.mark.parametrize("keep", [0, 100, -1])
@pytest.mark.parametrize("name", ["00000.tokens", "index.json"])
def test_truncated_cache_is_rebuilt(tmp_path, keep, name):
    """A truncated shard is made again with the same bytes; a truncated index is an error."""
    path = text_dataset(tmp_path).corpora[0].folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    if name == "index.json":
        with pytest.raises(ValueError, match="is not the index of a corpus; prepare the corpus again"):
            build_again(tmp_path)
        return
    build_again(tmp_path)
    assert path.read_bytes() == whole


def test_failed_prepare_leaves_no_corpus(tmp_path):
    """A document that cannot be read, or no text at all, is an error and leaves nothing that a run would use."""
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


def test_unusable_cache_folder_is_an_error(tmp_path):
    """The error is one line that names the folder."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"/cache/\w+ cannot be used: Not a directory\.$"):
        text_dataset(tmp_path)
