"""Tokenizers: every text round-trips, files are read strictly, and the trainer agrees with a naive BPE."""

import base64
import json
import random
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken

from data import build_tokenizer
from data.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIALS, MAX_PIECE_CHARS
from scripts.train_tokenizer import count_words, train_bpe, write_ranks
from scripts.train_tokenizer import main as train_main

BYTES = [bytes([i]) for i in range(256)]
TEXTS = [
    "",
    "def f(x):\n    return x + 1\n",
    "naïve café, 東京 🙂🏽 \u200d ﷽ ",
    " \t\r\n\r\n   \u00a0 \u2003 x  ",
    "".join(map(chr, range(256))),
    "<|end_of_text|><|begin_of_text|><|endoftext|>",
]


@pytest.mark.parametrize("name", ["byte", "bpe_4096"])
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(name, text):
    """Any text comes back exactly, and encoding a text never makes a special token."""
    tokenizer = build_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_encode_batch_equals_encode():
    """This holds also for texts that are longer than one call of tiktoken can take."""
    tokenizer = build_tokenizer("bpe_4096")
    texts = [*TEXTS, " " * 1_200_000, "é" * (MAX_PIECE_CHARS + 1)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text


def test_long_text_cut_at_line_ends_has_the_same_tokens():
    """A long text of lines has the tokens that it has in one piece."""
    tokenizer = build_tokenizer("bpe_4096")
    text = "def function(argument):\n    return argument\n" * (MAX_PIECE_CHARS // 30)
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


def test_half_a_surrogate_pair_becomes_ufffd():
    """It is not a character, but JSON can hold it."""
    tokenizer = build_tokenizer("byte")
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_decode_of_unknown_ids_gives_ufffd():
    """Special tokens decode to their names. Ids beyond the vocabulary, which a padded model can sample, decode to
    U+FFFD."""
    tokenizer = build_tokenizer("byte")
    assert tokenizer.decode([104, tokenizer.eos_id, 999, 0xFF]) == "h<|end_of_text|>\ufffd\ufffd"


def test_shipped_tokenizers_have_their_sizes():
    """bpe_4096 has exactly 4096 ids and encodes at least 3 bytes of Python per token; byte has 258 ids."""
    tokenizer = build_tokenizer("bpe_4096")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (4096, 4094, 4095)
    source = Path(base64.__file__).read_text("utf-8")
    assert len(source.encode()) / len(tokenizer.encode(source)) > 3
    byte = build_tokenizer("byte")
    assert (byte.vocab_size, byte.bos_id, byte.eos_id) == (258, 256, 257)
    assert byte.encode("hi") == [104, 105]


def test_llama3_file_gets_its_specials(tmp_path):
    """A file of 128,000 ranks gets Llama 3's special tokens in published order, 128,256 ids; its folder may be given
    too."""
    tokens = BYTES + [b"%06d" % i for i in range(128_000 - 256)]
    write_ranks(tmp_path / "tokenizer.model", tokens)
    tokenizer = build_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (128_256, 128_000, 128_001)
    assert len(set(LLAMA3_SPECIALS)) == 256
    names = {128_004: "<|finetune_right_pad_id|>", 128_006: "<|start_header_id|>", 128_009: "<|eot_id|>"}
    assert {i: tokenizer.decode([i]) for i in names} == names
    assert tokenizer.decode([128_255]) == "<|reserved_special_token_245|>"
    assert tokenizer.decode(tokenizer.encode("123456 <|eot_id|>")) == "123456 <|eot_id|>"


def test_other_file_gets_bos_and_eos(tmp_path):
    """They are the next two ids. The fingerprints of two different files differ."""
    paths = [tmp_path / "a.tiktoken", tmp_path / "b.tiktoken", tmp_path / "c.tiktoken"]
    for path, token in zip(paths, [b"ab", b"ab", b"ac"], strict=True):
        write_ranks(path, [*BYTES, token])
    a, b, c = (build_tokenizer(str(path)) for path in paths)
    assert (a.vocab_size, a.bos_id, a.eos_id) == (259, 257, 258)
    assert a.encode("ab ac") == [256, 32, 97, 99]
    assert a.fingerprint == b.fingerprint != c.fingerprint
    # A file that changed under its name is read again.
    write_ranks(paths[0], [*BYTES, b"ac"])
    assert build_tokenizer(str(paths[0])).fingerprint == c.fingerprint


def test_tiktoken_encoding_keeps_its_ids(monkeypatch):
    """A named encoding keeps its ids and its end of text, and has no bos if the encoding has none."""
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks={token: i for i, token in enumerate([*BYTES, b"he"])},
        special_tokens={"<|endoftext|>": 300},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = build_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (
        "gpt2",
        301,
        None,
        300,
    )
    assert tokenizer.encode("hex") == [256, 120]


def test_encoding_without_network_is_a_clear_error(monkeypatch, tmp_path):
    """The error is one line that names the tokenizers that work offline."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for scheme in ("http", "https", "all"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r'^tokenizer "r50k_base" is downloaded .* use a tokenizer that works offline: "bpe_4096"'
    ):
        build_tokenizer("r50k_base")


def error_of(name) -> str:
    with pytest.raises(ValueError) as error:
        build_tokenizer(str(name))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_build_tokenizer_rejects_wrong_names_and_files(tmp_path):
    """The error is one line that says what is wrong and what is valid."""
    assert 'did you mean "bpe_4096"? Valid are byte, bpe_4096, gpt2' in error_of("bpe_4069")
    assert "no such file" in error_of(tmp_path / "none.model")
    assert "a folder without a tokenizer.json or tokenizer.model" in error_of(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original/tokenizer.model").touch()
    assert f"tokenizer {tmp_path}/original/tokenizer.model: 256 of the 256 single bytes" in error_of(tmp_path)
    for content in (b"\x0a\x0e\x0a\x05", b'{"model": 1}\n', b"YQ== 0\nYQ== 1\n", b"YQ== 7\n", b"YQ= 0\n"):
        (tmp_path / "bad.model").write_bytes(content)
        assert "not tiktoken's format" in error_of(tmp_path / "bad.model")
    (tmp_path / "bad.model").write_bytes(b"YQ== 0\n")
    assert "255 of the 256 single bytes have no rank (the first is 0)" in error_of(tmp_path / "bad.model")


def naive_bpe(words: Counter, num_tokens: int) -> list[bytes]:
    """BPE by its definition: encode every word with the present tokens, count neighbours, add the most frequent,
    repeat."""
    tokens = list(BYTES)
    while len(tokens) < num_tokens:
        encoding = tiktoken.Encoding(
            "naive",
            pat_str=r"(?s:.+)",
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={},
        )
        counts = Counter()
        for word, frequency in words.items():
            parts = [tokens[i] for i in encoding._encode_single_piece(word)]
            for left, right in pairwise(parts):
                counts[left + right] += frequency
        tokens.append(min(counts, key=lambda token: (-counts[token], token)))
    return tokens


@pytest.mark.parametrize("seed", range(3))
def test_trainer_equals_naive_bpe(seed):
    """The incremental trainer finds the same tokens in the same order as counting all neighbours at each step."""
    rng = random.Random(seed)
    # Few letters and long words: many ties, overlaps ("aaaa") and tokens that two different pairs make.
    words = ["".join(rng.choices("aab", k=rng.randint(1, 14))) for _ in range(60)]
    words = count_words([" ".join(words), "naïve 東京 東京\n\n    indent"])
    assert train_bpe(words, 340) == naive_bpe(words, 340)


def test_train_script_makes_exactly_vocab_size_ids(tmp_path):
    """If --vocab_size is too large, the error gives the number of tokens that the text can give."""
    (tmp_path / "a.txt").write_text("the theme of the thesis\n" * 9)
    output = tmp_path / "out.tiktoken"
    options = ["--dataset", "text", "--path", str(tmp_path / "a.txt"), "--output", str(output)]
    train_main([*options, "--vocab_size", "262"])
    tokenizer = build_tokenizer(str(output))
    assert tokenizer.vocab_size == 262
    assert b"the" in tokenizer._ranks and len(tokenizer.encode(" the")) < 4
    with pytest.raises(ValueError, match=r"gives at most \d+ tokens, not 4094"):
        train_main([*options, "--vocab_size", "4096"])
    with pytest.raises(ValueError, match="must be at least 258"):
        train_main([*options, "--vocab_size", "200"])


# ---------------------------------------------------------------------------------- tokenizer.json


@pytest.fixture
def hf_folder(tmp_path):
    """A folder like DeepSeek's or Llama's on Hugging Face, with a small byte-level BPE."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<begin>", "<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["some text to learn some merges from", "and some more text"] * 20, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    # DeepSeek's folder gives a token with its properties, Llama's gives the name alone.
    config = {"bos_token": {"content": "<begin>", "lstrip": False}, "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_tokenizer_json_round_trips(hf_folder):
    """A folder, or its tokenizer.json, is read by Hugging Face's library. Text never makes special tokens, and a batch
    gives the same ids as single texts."""
    folder, file = build_tokenizer(str(hf_folder)), build_tokenizer(str(hf_folder / "tokenizer.json"))
    assert folder.fingerprint == file.fingerprint != build_tokenizer("byte").fingerprint
    assert (folder.bos_id, folder.eos_id) == (0, 1) and folder.vocab_size <= 300
    for text in ("some more text", "höher <end> \ud83d alone", "", " leading and trailing "):
        ids = folder.encode(text)
        assert folder.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert not {folder.bos_id, folder.eos_id} & set(ids)
        assert folder.encode_batch([text, "x"])[0].tolist() == ids
    assert len(folder.encode("some text")) < 5


def test_tokenizer_json_rejects_missing_or_torn_files(hf_folder, monkeypatch):
    """The error is one line that names the library, the token or the file."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is read with Hugging Face's tokenizers: pip install tokenizers"
    ):
        build_tokenizer(str(hf_folder))
    monkeypatch.undo()
    (hf_folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names no eos_token, which ends each document"):
        build_tokenizer(str(hf_folder))
    (hf_folder / "tokenizer_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"cannot read .*tokenizer_config\.json: No such file or directory\. It names the tokens"
    ):
        build_tokenizer(str(hf_folder / "tokenizer.json"))
    (hf_folder / "tokenizer.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"tokenizer .*tokenizer\.json: not a tokenizer\.json, or not a complete one"):
        build_tokenizer(str(hf_folder))
