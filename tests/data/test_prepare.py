"""Prepared folders: what is written, what is refused, and that they are whole or absent."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from transnormer.data import prepare as preparing
from transnormer.data.prepare import prepare, progress_bar
from transnormer.data.shards import TokenData
from transnormer.data.tokenizer import END_OF_TEXT, load_tokenizer

ROOT = Path(__file__).parents[2]
SHAKESPEARE = ROOT / "examples" / "shakespeare.txt"


def write_documents(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read_documents(folder, split):
    """The split's texts: decoded between the ends of text."""
    data, tokenizer = TokenData(folder, split), load_tokenizer(folder)
    ids = data.window(0, data.tokens)
    ends = np.flatnonzero(ids == data.end_of_text)
    assert not len(ids) or ends[-1] == len(ids) - 1
    starts = [0, *(ends + 1)]
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=False)]


@pytest.fixture(scope="module")
def tokenizer(prepared_scenes):
    return prepared_scenes / "tokenizer.json"


def test_documents_of_their_own_are_the_validation_split(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one two three four\n")
    (tmp_path / "held.jsonl").write_text('{"text": "five six"}\n{"text": "seven"}\n')
    record = prepare(
        [tmp_path / "train.txt"], tmp_path / "out", vocab_size=260, valid=[tmp_path / "held.jsonl"]
    )
    assert [record["splits"][name]["documents"] for name in ("train", "valid")] == [1, 2]
    valid = TokenData(tmp_path / "out", "valid")
    text = load_tokenizer(tmp_path / "out").decode(
        valid.window(0, valid.tokens).tolist(), skip_special_tokens=False
    )
    assert text == "five six<|endoftext|>seven<|endoftext|>"


def test_both_splits_hold_every_document_once_in_order(prepared_scenes, scenes):
    train, valid = (read_documents(prepared_scenes, split) for split in ("train", "valid"))
    assert Counter(train) + Counter(valid) == Counter(scenes)
    assert train == [text for text in scenes if text in set(train)]
    assert 10 < len(valid) < 40


def test_the_record_says_what_is_there(prepared_scenes, scenes_file, scenes):
    record = json.loads((prepared_scenes / "data.json").read_text())
    assert (record["format"], record["dtype"], record["vocab_size"], record["end_of_text"]) == (
        1,
        "uint16",
        400,
        0,
    )
    tokenizer = (prepared_scenes / "tokenizer.json").read_bytes()
    assert record["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    digest = hashlib.sha256()
    for text in scenes:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert record["source"] == {
        "inputs": [str(scenes_file)], "text_field": "text", "documents_sha256": digest.hexdigest(),
        "vocab_size": 400, "tokenizer": None, "split": 0.2, "seed": 0,
    }  # fmt: skip
    names = {"data.json", "tokenizer.json"}
    for split in ("train", "valid"):
        data, found = TokenData(prepared_scenes, split), record["splits"][split]
        documents = read_documents(prepared_scenes, split)
        assert data.source == record["source"]
        assert (data.documents, data.bytes) == (
            len(documents),
            sum(len(text.encode()) for text in documents),
        )
        assert [shard["tokens"] for shard in found["shards"][:-1]] == [1000] * (
            len(found["shards"]) - 1
        )
        sizes = [(prepared_scenes / shard["file"]).stat().st_size for shard in found["shards"]]
        assert data.tokens == sum(size // 2 for size in sizes)
        names |= {shard["file"] for shard in found["shards"]}
    assert "train-00002.bin" in names
    assert {path.name for path in prepared_scenes.iterdir()} == names
    assert list(prepared_scenes.parent.iterdir()) == [prepared_scenes]


def test_the_same_call_gives_the_same_bytes_and_shards_do_not_matter(
    prepared_scenes, scenes_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(preparing, "BATCH_CHARS", 500)
    prepare([scenes_file], tmp_path / "again", vocab_size=400, split=0.2, shard_tokens=1000)
    assert {p.name: p.read_bytes() for p in prepared_scenes.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }
    prepare([scenes_file], tmp_path / "one", vocab_size=400, split=0.2)
    small, large = TokenData(prepared_scenes), TokenData(tmp_path / "one")
    assert (tmp_path / "one" / "train-00000.bin").stat().st_size == 2 * small.tokens
    assert np.array_equal(small.window(0, small.tokens), large.window(0, large.tokens))


def test_the_tokenizer_is_trained_on_training_documents_alone(tmp_path):
    texts = ["xyzzy " * 30 if n % 2 else "plugh " * 30 for n in range(20)]
    held_out = preparing._choose_held_out(0, 0.5, 20)
    leads = ["hidden quux " * 9 if held_out(n) else "only train " * 9 for n in range(20)]
    texts = [lead + text for lead, text in zip(leads, texts, strict=True)]
    with pytest.warns(UserWarning, match="too small"):
        prepare(
            [write_documents(tmp_path / "a.jsonl", texts)],
            tmp_path / "out",
            vocab_size=400,
            split=0.5,
        )
    vocab = load_tokenizer(tmp_path / "out").get_vocab()
    assert "Ġtrain" in vocab
    assert not {"quux", "Ġquux", "hidden"} & vocab.keys()


def test_the_tokenizer_is_trained_on_a_bounded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "SAMPLE_BYTES", 1000)
    texts = ["early " * 30] * 10 + ["later " * 30] * 10
    with pytest.warns(UserWarning, match="too small"):
        prepare(
            [write_documents(tmp_path / "a.jsonl", texts)],
            tmp_path / "out",
            vocab_size=400,
            split=0,
        )
    vocab = load_tokenizer(tmp_path / "out").get_vocab()
    assert "Ġearly" in vocab
    assert "Ġlater" not in vocab


@pytest.mark.parametrize("count", [2, 3, 10, 500])
@pytest.mark.parametrize("split", [1e-9, 0.01, 0.3, 0.999999])
def test_some_documents_are_held_out_and_never_all(count, split):
    for seed in range(20):
        held_out = preparing._choose_held_out(seed, split, count)
        assert 0 < sum(map(held_out, range(count))) < count


def test_held_out_documents_follow_the_seed_and_the_share():
    choices = [preparing._choose_held_out(seed, 0.2, 5000) for seed in (0, 1)]
    first, second = (set(filter(held_out, range(5000))) for held_out in choices)
    assert 850 < len(first) < 1150
    assert 850 < len(second) < 1150
    assert 100 < len(first & second) < 300
    assert first == {n for n in range(5000) if preparing._choose_held_out(0, 0.2, 9000)(n)}
    assert not any(map(preparing._choose_held_out(0, 0.0, 99), range(99)))


def test_the_tail_of_a_single_document_is_held_out(tmp_path, tokenizer):
    text = SHAKESPEARE.read_text()
    record = prepare([SHAKESPEARE], tmp_path / "out", tokenizer=tokenizer, split=0.1)
    (train,), (valid,) = (read_documents(tmp_path / "out", split) for split in ("train", "valid"))
    assert train + valid == text
    assert train.endswith("\n")
    assert abs(len(valid) - 0.1 * len(text)) < 100
    assert record["splits"]["valid"]["documents"] == 1


@pytest.mark.parametrize(
    ("text", "share", "tail"),
    [
        ("a\nb\nc\nd\n", 0.25, "d\n"),
        ("a\nb\nc\nd\n", 0.5, "c\nd\n"),
        ("a\nb", 0.001, "b"),
        ("a\nb", 0.999, "b"),
        ("\n\na\nb\n\n\n", 0.01, "b\n\n\n"),
        ("\n\na\nb\n\n\n", 0.99, "b\n\n\n"),
        ("long line\nx\ny", 0.5, "x\ny"),
    ],
)
def test_where_a_tail_starts(text, share, tail):
    assert text[preparing._tail_start(text, share) :] == tail


def test_a_single_line_cannot_be_split(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n\none line only\n\n")
    with pytest.raises(ValueError, match="the only document is one line"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer, split=0)
    assert read_documents(tmp_path / "out", "train") == ["\n\none line only\n\n"]
    assert TokenData(tmp_path / "out", "valid").tokens == 0


def test_a_long_document_is_the_same_whole_and_in_pieces(tmp_path, monkeypatch, tokenizer):
    from tokenizers import Tokenizer, pre_tokenizers, processors

    text = SHAKESPEARE.read_text()[:100_000]
    (tmp_path / "a.txt").write_text(text)
    marking = Tokenizer.from_file(str(tokenizer))
    marking.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    marking.post_processor = processors.TemplateProcessing(
        f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    marking.save(str(tmp_path / "marking.json"))
    for name, path in (("plain", tokenizer), ("marking", tmp_path / "marking.json")):
        prepare([tmp_path / "a.txt"], tmp_path / name, tokenizer=path, split=0)
        data = TokenData(tmp_path / name)
        wanted = load_tokenizer(path).encode(text, add_special_tokens=False).ids
        assert data.window(0, data.tokens).tolist() == [*wanted, 0]


def test_large_vocabularies_take_four_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        token: n for n, token in enumerate([*letters, *(f"<{n}>" for n in range(70_000)), "ab"])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write_documents(tmp_path / "a.jsonl", ["ab c", "ab"])
    record = prepare([path], tmp_path / "out", tokenizer=tmp_path, split=0)
    assert (record["dtype"], record["vocab_size"]) == ("uint32", 70_258)
    assert read_documents(tmp_path / "out", "train") == ["ab c", "ab"]
    assert TokenData(tmp_path / "out").window(0, 1) == [70_256]


def test_arguments_that_do_not_fit(tmp_path, scenes_file, tokenizer):
    out = tmp_path / "new" / "out"
    for options, message in (
        ({}, "either vocab_size.* or tokenizer"),
        ({"vocab_size": 300, "tokenizer": tokenizer}, "either vocab_size.* or tokenizer"),
        ({"vocab_size": 256}, "at least 257"),
        ({"tokenizer": tmp_path / "nowhere"}, "nowhere: no such file"),
        ({"vocab_size": 300, "split": 1.0}, "split must be a share.* got 1.0"),
        ({"vocab_size": 300, "split": -0.1}, "split must be a share"),
        ({"vocab_size": 300, "shard_tokens": 0}, "shard_tokens must be positive; got 0"),
        ({"vocab_size": 300, "text_field": "body"}, "no field 'body'"),
        (
            {"vocab_size": 300, "format": "foo"},
            "format 'foo' is unknown; there are text, messages, prompt, alpaca",
        ),
        (
            {"tokenizer": tokenizer, "format": "prompt", "text_field": "body"},
            "text_field = 'body' is for text alone",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([scenes_file], out, **options)
        assert not out.exists()
        assert not (out.parent.exists() and list(out.parent.iterdir()))
    with pytest.raises(ValueError, match="no such file"):
        prepare([tmp_path / "gone.txt"], out, vocab_size=300)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path, scenes_file):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no token for the end of a text"):
        prepare([scenes_file], tmp_path / "out", tokenizer=tmp_path)


def test_an_existing_folder_is_not_overwritten(tmp_path, scenes_file, tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    prepare([scenes_file], out, tokenizer=tokenizer)  # an empty one may be there
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ValueError, match="out exists; remove it or choose another folder"):
        prepare([scenes_file], out, tokenizer=tokenizer)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists"):
        prepare([scenes_file], tmp_path / "file", tokenizer=tokenizer)
    with pytest.raises(OSError, match=r"file/out: cannot be made: .*file is a file, not a folder$"):
        prepare([scenes_file], tmp_path / "file" / "out", tokenizer=tokenizer)


def test_inputs_that_change_meanwhile_are_noticed(tmp_path, tokenizer):
    path = write_documents(tmp_path / "a.jsonl", ["one", "two"])

    def edit(task, done, total):
        if (task, done) == ("reading", 6):
            write_documents(path, ["ones", "two"])

    with pytest.raises(ValueError, match="changed while they were read"):
        prepare([path], tmp_path / "out", tokenizer=tokenizer, progress=edit)
    assert list(tmp_path.iterdir()) == [path]


RUN = """
import os, resource, signal, sys
from transnormer.data.prepare import prepare
how, corpus, out, tokenizer = sys.argv[1:]
def progress(task, done, total):
    if how == "kill" and task == "tokenizing":
        os.kill(os.getpid(), signal.SIGKILL)
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    prepare([corpus], out, tokenizer=tokenizer, progress=progress)
except OSError as error:
    sys.exit(str(error))
"""


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


def test_a_killed_run_leaves_nothing_under_the_name_and_the_next_clears_up(tmp_path, tokenizer):
    out = tmp_path / "out"
    assert run("kill", SHAKESPEARE, out, tokenizer).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.partial"
    assert (left / "tokenizer.json").exists()
    (left / "valid-00007.bin").write_bytes(b"of an earlier run")
    prepare([SHAKESPEARE], out, tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == [out]
    assert sorted(path.name for path in out.iterdir()) == [
        "data.json", "tokenizer.json", "train-00000.bin", "valid-00000.bin",
    ]  # fmt: skip
    assert (
        "".join(read_documents(out, "train") + read_documents(out, "valid"))
        == SHAKESPEARE.read_text()
    )


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, tokenizer):
    done = run("full", SHAKESPEARE, tmp_path / "out", tokenizer)
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path / 'out'}: cannot be written: File too large\n"
    assert not list(tmp_path.iterdir())


def test_two_runs_at_once_do_not_mix(tmp_path, scenes_file, tokenizer):
    refused = []

    def meanwhile(task, done, total):
        if not refused:
            with pytest.raises(ValueError, match="is being written by another process") as caught:
                prepare([scenes_file], tmp_path / "out", tokenizer=tokenizer)
            refused.append(caught)

    prepare([scenes_file], tmp_path / "out", tokenizer=tokenizer, progress=meanwhile)
    assert refused
    assert TokenData(tmp_path / "out").documents > 100


def test_progress_counts_every_byte(tmp_path, scenes_file, scenes):
    calls = []
    prepare(
        [scenes_file], tmp_path / "out", vocab_size=300, progress=lambda *call: calls.append(call)
    )
    total = sum(len(text.encode()) for text in scenes)
    last = {task: (done, total) for task, done, total in calls}
    assert list(last) == ["reading", "training the tokenizer", "tokenizing"]
    assert last["reading"] == (total, 0)
    assert last["tokenizing"] == (total, total)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_drawn_on_a_terminal_alone_and_only_for_long_work(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as progress:
        progress("reading", 10, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(preparing, "BAR_AFTER_S", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar() as progress:
        progress("reading", 10, 0)
        progress("tokenizing", 10, 20)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("tokenizing" in err) == terminal
