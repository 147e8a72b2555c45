"""Byte-level BPE: lossless, deterministic, and blind to special tokens spelled in a text."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transnormer.data import tokenizer as tokenizing
from transnormer.data import train_bpe
from transnormer.data.tokenizer import (
    END_OF_TEXT,
    encodes_in_pieces,
    end_of_text_id,
    load_tokenizer,
    pieces,
    train_tokenizer,
)

SHAKESPEARE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"
TEXT = SHAKESPEARE.read_text()[:200_000]
AWKWARD = [
    "", " ", "  a", "a  ", "\n\n\n", "\r\n\t\v\f", "\x00\x01\x1b\x7f\x85", "\ufeffx",
    "a\u00a0b\u2028c",
    "\U0001f469\u200d\U0001f680", "e\u0301é", "１２３½²",
    "漢字とかな", END_OF_TEXT, f"a{END_OF_TEXT}{END_OF_TEXT} b", "don't  can't'll",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 600)


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer that has learned runs of blanks and line ends, so that a run cut in the wrong
    place shows."""
    runs = [a * n + b * m for a in " \n" for b in " \n" for n in (1, 2, 3) for m in (0, 1, 2)]
    found = train_tokenizer(
        [TEXT[:20_000], "".join(run + end for run in runs for end in "1a-") * 40], 500
    )
    assert len(ids(found, "  ")) == len(ids(found, "\n\n")) == 1
    return found


@pytest.fixture(scope="module")
def gpt2_files():
    """A small vocabulary in GPT-2's two files: the bytes, two merges, END_OF_TEXT last as GPT-2 has
    it."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*letters, "Ġa", "Ġab", END_OF_TEXT])}
    return json.dumps(vocab), "#version: 0.2\nĠ a\nĠa b\n"


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_any_text_comes_back(tokenizer):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def check(text):
        assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text

    check()


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.token_to_id(END_OF_TEXT) == end_of_text_id(tokenizer) == 0
    assert len(ids(tokenizer, TEXT)) < len(TEXT) / 2  # it has learned something


def test_digits_stand_alone_and_no_space_is_added(tokenizer):
    trained = train_tokenizer(["the year 1999 1999 1999\n"] * 50, 263)
    encoding = trained.encode("1999")
    assert encoding.tokens == ["1", "9", "9", "9"]
    assert not any(
        len(token) > 1 and any(c.isdigit() for c in token) for token in trained.get_vocab()
    )
    assert ids(tokenizer, "the") != ids(tokenizer, " the")


def test_end_of_text_spelled_in_a_text_is_text(tokenizer, tmp_path):
    trained = train_tokenizer([f"{END_OF_TEXT} and {END_OF_TEXT}\n"] * 99, 270)
    trained.save(str(tmp_path / "tokenizer.json"))
    for each in (tokenizer, trained, load_tokenizer(tmp_path)):
        assert 0 not in ids(each, f"a{END_OF_TEXT}b {END_OF_TEXT}")
        assert 0 not in each.encode_batch_fast([END_OF_TEXT], add_special_tokens=False)[0].ids


def saved(tokenizer):
    """What `torch.save` keeps of it, as an attribute of a module, which is how a model holds its
    tokenizer."""
    module, file = torch.nn.Linear(1, 1), io.BytesIO()
    module.tokenizer = tokenizer
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False).tokenizer


def averaged(tokenizer):
    module = torch.nn.Linear(1, 1)
    module.tokenizer = tokenizer
    return torch.optim.swa_utils.AveragedModel(module).module.tokenizer


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each)), saved, averaged],
)
def test_special_tokens_are_text_to_copies_too(tokenizer, copied):
    twice = copied(copied(tokenizer))
    assert ids(twice, f"a{END_OF_TEXT}b") == ids(tokenizer, f"a{END_OF_TEXT}b")
    assert twice.to_str() == tokenizer.to_str()
    # a tokenizer that is not ours is copied as the library does
    theirs = type(tokenizer).from_str(tokenizer.to_str())
    assert ids(copied(theirs), END_OF_TEXT) == ids(theirs, END_OF_TEXT) == [0]


def test_the_same_text_gives_the_same_file_in_any_process(tokenizer):
    script = (
        "import sys; from pathlib import Path; from transnormer.data.tokenizer import "
        "train_tokenizer\n"
        "print(train_tokenizer([Path(sys.argv[1]).read_text()[:200_000]], 600).to_str())"
    )
    command = [sys.executable, "-c", script, str(SHAKESPEARE)]
    again = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={"RAYON_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert again.stdout.strip() == tokenizer.to_str()


def test_ctrl_c_ends_a_training_at_once(tmp_path, monkeypatch):
    """The trainer is one that never ends, and presses Ctrl-C once it has read all."""
    trainer, number = tmp_path / "trainer.py", tmp_path / "number"
    trainer.write_text(
        "import os, pathlib, signal, sys, time\n"
        "sys.stdin.buffer.read()\n"
        f"pathlib.Path({str(number)!r}).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(tokenizing, "TRAINER", trainer)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer([TEXT], 300)
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_a_training_that_somebody_ends_says_so(tmp_path, monkeypatch):
    (tmp_path / "trainer.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(tokenizing, "TRAINER", tmp_path / "trainer.py")
    with pytest.raises(ValueError, match=r"training the tokenizer was stopped: .* code 3"):
        train_tokenizer([TEXT] * 9, 300)


def test_a_document_that_cannot_be_read_ends_the_training():
    def documents():
        yield TEXT
        raise ValueError("a.txt: not UTF-8")

    with pytest.raises(ValueError, match="not UTF-8"):
        train_tokenizer(documents(), 300)


def test_a_trainer_left_alone_with_half_a_text_trains_nothing():
    half = (5).to_bytes(8, "little") + b"hello" + (5).to_bytes(8, "little") + b"he"
    with pytest.raises(EOFError):
        list(train_bpe.texts(io.BytesIO(half)))
    with pytest.raises(EOFError):
        list(train_bpe.texts(io.BytesIO(half[:13])))
    assert list(train_bpe.texts(io.BytesIO(half[:13] + train_bpe.END))) == ["hello"]


def test_a_small_vocabulary_is_refused_and_a_small_text_told():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257.* got 256"):
        train_tokenizer(["abc"], 256)
    with pytest.warns(UserWarning, match="too small for 1000 tokens; this tokenizer has 259"):
        tokenizer = train_tokenizer(["ab ab ab"], 1000)
    assert tokenizer.get_vocab_size() == 259
    assert train_tokenizer(["abc"], 257).decode(ids(tokenizer, "ü")) == "ü"


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_pieces_have_the_tokens_of_the_whole(spaced, size):
    text = TEXT[:20_000] + "".join(AWKWARD) * 3 + "a  b \n c\n\nd 1 2\n3 e\t f \u3000 g " * 20
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    assert len(cut) > len(text) / size / 12
    assert max(map(len, cut)) < size + 200
    assert [token for piece in cut for token in ids(spaced, piece)] == ids(spaced, text)


def test_pieces_of_any_text(spaced):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.sampled_from(" \n\t\u00a0\u3000ab1½'-é漢\u0301\x1c\x85"), max_size=60))
    def check(text):
        cut = list(pieces(text, 1))
        assert "".join(cut) == text
        assert [token for piece in cut for token in ids(spaced, piece)] == ids(spaced, text)

    check()


def test_a_text_without_a_place_to_cut_stays_whole():
    assert list(pieces("x" * 99, 10)) == ["x" * 99]
    assert list(pieces("", 10)) == []


def test_tokenizers_that_mark_the_start_do_not_encode_in_pieces(tokenizer):
    from tokenizers import Tokenizer, pre_tokenizers

    marking = Tokenizer.from_str(tokenizer.to_str())
    marking.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert encodes_in_pieces(tokenizer)
    assert not encodes_in_pieces(marking)


def test_load_from_file_and_folder(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        loaded = load_tokenizer(path)
        assert ids(loaded, TEXT[:2000]) == ids(tokenizer, TEXT[:2000])
        assert end_of_text_id(loaded) == 0


def test_truncation_and_padding_of_a_file_are_dropped(tokenizer, tmp_path):
    from tokenizers import Tokenizer

    short = Tokenizer.from_str(tokenizer.to_str())
    short.enable_truncation(4)
    short.enable_padding(length=4)
    short.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert len(ids(loaded, TEXT[:100])) > 4
    assert len(ids(loaded, "\x00")) == 1


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_load_gpt2(tmp_path, gpt2_files, names):
    for name, content in zip(names, gpt2_files, strict=True):
        (tmp_path / name).write_text(content)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a ab 12").tokens == ["a", "Ġab", "Ġ", "1", "2"]
    assert end_of_text_id(tokenizer) == 258
    assert 258 not in ids(tokenizer, END_OF_TEXT)
    assert tokenizer.decode(ids(tokenizer, "  é\n" + END_OF_TEXT)) == "  é\n" + END_OF_TEXT


def test_end_of_text_of_other_tokenizers(gpt2_files):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2}, merges=[]))
    assert end_of_text_id(tokenizer) is None  # in the vocabulary, but a text may hold it
    tokenizer.add_tokens([END_OF_TEXT])
    assert end_of_text_id(tokenizer) is None  # added, and yet a text may hold it
    tokenizer.add_special_tokens(["<s>", "</s>"])
    assert end_of_text_id(tokenizer) == 1


def test_load_errors(tmp_path, gpt2_files):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    message = "no tokenizer in this folder; it needs tokenizer.json, or encoder.json with"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
    vocab, merges = gpt2_files
    (tmp_path / "encoder.json").write_text(vocab)
    with pytest.raises(ValueError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.bpe").write_text(merges + "q zz\n")
    with pytest.raises(ValueError, match=r"vocab.bpe: does not fit encoder.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "encoder.json").write_text(vocab[:-9])
    with pytest.raises(ValueError, match=r"encoder.json: not JSON"):
        load_tokenizer(tmp_path)
    for content, message in (
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"a": 1}', "not a tokenizer.json"),
    ):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"tokenizer.json: {message}") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
