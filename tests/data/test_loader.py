"""Prepared folders and the loader: what is written, what is refused, and that a position is the whole state."""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from transnormer.data import prepare as preparing
from transnormer.data.loader import Loader, window_index
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
def texts():
    """120 scenes of uneven length, two of which spell the end of text."""
    found = SHAKESPEARE.read_text()[:60_000].split("\n\n")[:120]
    found[3] += END_OF_TEXT + " 1599 \U0001f600"
    found[50] = END_OF_TEXT
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    return write_documents(tmp_path_factory.mktemp("corpus") / "scenes.jsonl", texts)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare([corpus], out, vocab_size=400, split=0.2, shard_tokens=1000)
    return out


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return prepared / "tokenizer.json"


# Preparing.


def test_documents_of_their_own_are_the_validation_split(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one two three four\n")
    (tmp_path / "held.jsonl").write_text('{"text": "five six"}\n{"text": "seven"}\n')
    record = prepare([tmp_path / "train.txt"], tmp_path / "out", vocab_size=260, valid=[tmp_path / "held.jsonl"])
    assert [record["splits"][name]["documents"] for name in ("train", "valid")] == [1, 2]
    valid = TokenData(tmp_path / "out", "valid")
    text = load_tokenizer(tmp_path / "out").decode(valid.window(0, valid.tokens).tolist(), skip_special_tokens=False)
    assert text == "five six<|endoftext|>seven<|endoftext|>"


def test_both_splits_hold_every_document_once_in_order(prepared, texts):
    train, valid = (read_documents(prepared, split) for split in ("train", "valid"))
    assert Counter(train) + Counter(valid) == Counter(texts)
    assert train == [text for text in texts if text in set(train)]
    assert 10 < len(valid) < 40


def test_the_record_says_what_is_there(prepared, corpus, texts):
    record = json.loads((prepared / "data.json").read_text())
    assert (record["format"], record["dtype"], record["vocab_size"], record["end_of_text"]) == (1, "uint16", 400, 0)
    assert record["tokenizer_sha256"] == hashlib.sha256((prepared / "tokenizer.json").read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert record["source"] == {
        "inputs": [str(corpus)], "text_field": "text", "documents_sha256": digest.hexdigest(),
        "vocab_size": 400, "tokenizer": None, "split": 0.2, "seed": 0,
    }  # fmt: skip
    names = {"data.json", "tokenizer.json"}
    for split in ("train", "valid"):
        data, found = TokenData(prepared, split), record["splits"][split]
        documents = read_documents(prepared, split)
        assert data.source == record["source"]
        assert (data.documents, data.bytes) == (len(documents), sum(len(text.encode()) for text in documents))
        assert [shard["tokens"] for shard in found["shards"][:-1]] == [1000] * (len(found["shards"]) - 1)
        assert data.tokens == sum((prepared / shard["file"]).stat().st_size // 2 for shard in found["shards"])
        names |= {shard["file"] for shard in found["shards"]}
    assert "train-00002.bin" in names
    assert {path.name for path in prepared.iterdir()} == names
    assert list(prepared.parent.iterdir()) == [prepared]


def test_the_same_call_gives_the_same_bytes_and_shards_do_not_matter(prepared, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "BATCH_CHARS", 500)
    prepare([corpus], tmp_path / "again", vocab_size=400, split=0.2, shard_tokens=1000)
    assert {p.name: p.read_bytes() for p in prepared.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }
    prepare([corpus], tmp_path / "one", vocab_size=400, split=0.2)
    small, large = TokenData(prepared), TokenData(tmp_path / "one")
    assert (tmp_path / "one" / "train-00000.bin").stat().st_size == 2 * small.tokens
    assert np.array_equal(small.window(0, small.tokens), large.window(0, large.tokens))


def test_the_tokenizer_is_trained_on_training_documents_alone(tmp_path):
    texts = ["xyzzy " * 30 if n % 2 else "plugh " * 30 for n in range(20)]
    held_out = preparing._choose_held_out(0, 0.5, 20)
    words = [("only train " * 9 if not held_out(n) else "hidden quux " * 9) + text for n, text in enumerate(texts)]
    with pytest.warns(UserWarning, match="too small"):
        prepare([write_documents(tmp_path / "a.jsonl", words)], tmp_path / "out", vocab_size=400, split=0.5)
    vocab = load_tokenizer(tmp_path / "out").get_vocab()
    assert "Ġtrain" in vocab
    assert not {"quux", "Ġquux", "hidden"} & vocab.keys()


def test_the_tokenizer_is_trained_on_a_bounded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "SAMPLE_BYTES", 1000)
    texts = ["early " * 30] * 10 + ["later " * 30] * 10
    with pytest.warns(UserWarning, match="too small"):
        prepare([write_documents(tmp_path / "a.jsonl", texts)], tmp_path / "out", vocab_size=400, split=0)
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
    marking.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    marking.save(str(tmp_path / "marking.json"))
    for name, path in (("plain", tokenizer), ("marking", tmp_path / "marking.json")):
        prepare([tmp_path / "a.txt"], tmp_path / name, tokenizer=path, split=0)
        data = TokenData(tmp_path / name)
        wanted = load_tokenizer(path).encode(text, add_special_tokens=False).ids
        assert data.window(0, data.tokens).tolist() == [*wanted, 0]


def test_large_vocabularies_take_four_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*letters, *(f"<{n}>" for n in range(70_000)), "ab"])}
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


def test_arguments_that_do_not_fit(tmp_path, corpus, tokenizer):
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
        ({"vocab_size": 300, "format": "foo"}, "format 'foo' is unknown; there are text, messages, prompt, alpaca"),
        ({"tokenizer": tokenizer, "format": "prompt", "text_field": "body"}, "text_field = 'body' is for text alone"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([corpus], out, **options)
        assert not out.exists()
        assert not (out.parent.exists() and list(out.parent.iterdir()))
    with pytest.raises(ValueError, match="no such file"):
        prepare([tmp_path / "gone.txt"], out, vocab_size=300)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path, corpus):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no token for the end of a text"):
        prepare([corpus], tmp_path / "out", tokenizer=tmp_path)


def test_an_existing_folder_is_not_overwritten(tmp_path, corpus, tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    prepare([corpus], out, tokenizer=tokenizer)  # an empty one may be there
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ValueError, match="out exists; remove it or choose another folder"):
        prepare([corpus], out, tokenizer=tokenizer)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists"):
        prepare([corpus], tmp_path / "file", tokenizer=tokenizer)
    with pytest.raises(OSError, match=r"file/out: cannot be made: .*file is a file, not a folder$"):
        prepare([corpus], tmp_path / "file" / "out", tokenizer=tokenizer)


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
    return subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


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
    assert "".join(read_documents(out, "train") + read_documents(out, "valid")) == SHAKESPEARE.read_text()


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, tokenizer):
    done = run("full", SHAKESPEARE, tmp_path / "out", tokenizer)
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path / 'out'}: cannot be written: File too large\n"
    assert not list(tmp_path.iterdir())


def test_two_runs_at_once_do_not_mix(tmp_path, corpus, tokenizer):
    refused = []

    def meanwhile(task, done, total):
        if not refused:
            with pytest.raises(ValueError, match="is being written by another process") as caught:
                prepare([corpus], tmp_path / "out", tokenizer=tokenizer)
            refused.append(caught)

    prepare([corpus], tmp_path / "out", tokenizer=tokenizer, progress=meanwhile)
    assert refused
    assert TokenData(tmp_path / "out").documents > 100


def test_progress_counts_every_byte(tmp_path, corpus, texts):
    calls = []
    prepare([corpus], tmp_path / "out", vocab_size=300, progress=lambda *call: calls.append(call))
    total = sum(len(text.encode()) for text in texts)
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


# Reading.


def test_windows_cross_shard_borders(prepared):
    data = TokenData(prepared)
    raw = np.concatenate([np.fromfile(path, "<u2") for path in sorted(prepared.glob("train-*.bin"))])
    assert data.tokens == len(raw) > 3000
    for start, length in ((0, 10), (995, 10), (1000, 1000), (999, 1), (990, 2050), (0, len(raw)), (len(raw), 0)):
        window = data.window(start, length)
        assert window.dtype == np.int64
        assert np.array_equal(window, raw[start : start + length])
    for start, length in ((-1, 5), (len(raw) - 4, 5), (5, -1)):
        with pytest.raises(ValueError, match=f"has {len(raw)} tokens; there is no window"):
            data.window(start, length)


@pytest.fixture
def copy(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_damaged_folders_are_refused(copy, tmp_path):
    def refused(message, split="train"):
        with pytest.raises(ValueError, match=message) as caught:
            TokenData(copy, split)
        assert "\n" not in str(caught.value)

    for path, message in (
        (tmp_path, "has no data.json"),
        (tmp_path / "gone", "is not there"),
        (copy / "data.json", "is a file"),
    ):
        with pytest.raises(ValueError, match=f"not a prepared folder, because it {message}; run "):
            TokenData(path)
    refused("split must be one of train, valid; got 'test'", "test")
    shard = copy / "train-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused("train-00001.bin: damaged; it has 1999 bytes, not 2000")
    assert TokenData(copy, "valid").tokens > 0  # is whole
    shard.write_bytes(whole + b"x")
    refused("train-00001.bin: damaged")
    shard.unlink()
    refused("train-00001.bin: this shard is missing")
    shard.write_bytes(whole)
    (copy / "tokenizer.json").write_text("{}")
    refused("tokenizer.json: is not the tokenizer that made these tokens")
    (copy / "tokenizer.json").unlink()
    refused("tokenizer.json: is not the tokenizer")


def test_damaged_records_are_refused(copy):
    path = copy / "data.json"
    whole = json.loads(path.read_text())
    TokenData(copy)
    path.write_text(json.dumps(whole | {"format": 3}))
    with pytest.raises(ValueError, match="has format 3, not 1 or 2; prepare the folder again"):
        TokenData(copy)
    parts = [json.dumps(whole)[:-5], "[]", "{}", '"x"', b"\xff"]
    parts += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    parts += [json.dumps(whole | {"format": 2})]
    parts += [json.dumps(whole | {"dtype": "int8"}), json.dumps(whole | {"splits": {"train": {}, "valid": {}}})]
    for key in ("tokens", "bytes", "documents", "shards"):
        train = {k: v for k, v in whole["splits"]["train"].items() if k != key}
        parts.append(json.dumps(whole | {"splits": whole["splits"] | {"train": train}}))
    shards = whole["splits"]["train"]["shards"]
    outside = [{**shard, "file": f"../copy/{shard['file']}"} for shard in shards]
    for change in ({"tokens": 5}, {"documents": "many"}, {"bytes": None}, {"shards": outside}):
        parts.append(json.dumps(whole | {"splits": whole["splits"] | {"train": whole["splits"]["train"] | change}}))
    for key, value in (("vocab_size", "400"), ("vocab_size", 0), ("end_of_text", 400), ("source", {})):
        parts.append(json.dumps(whole | {key: value}))
    for part in parts:
        path.write_bytes(part if isinstance(part, bytes) else part.encode())
        with pytest.raises(ValueError, match=r"data.json: (damaged, or not the record|not JSON)"):
            TokenData(copy)
    path.write_text(json.dumps(whole).replace('"dtype"', '"dtype": "uint32", "dtype"'))
    with pytest.raises(ValueError, match=r"data.json: not JSON \(the key 'dtype' stands twice"):
        TokenData(copy)


# The permutation.


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 100, 255, 256, 257, 1000, 4097])
def test_every_window_comes_once_an_epoch(count):
    for seed, epoch in ((0, 0), (0, 1), (7, 0), (-3, 2**40)):
        order = [window_index(seed, epoch, position, count) for position in range(count)]
        assert sorted(order) == list(range(count))


def test_the_order_changes_with_the_epoch_and_the_seed():
    def order(seed, epoch):
        return tuple(window_index(seed, epoch, position, 1000) for position in range(1000))

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(1, 2) == order(1, 2) != tuple(range(1000))
    # as few fixed points and neighbours as chance leaves: one or two expected of each
    assert sum(a == b for a, b in zip(order(0, 0), order(1, 0), strict=True)) < 12
    assert sum(b == a + 1 for a, b in itertools.pairwise(order(0, 0))) < 12


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_all_orders_are_about_as_likely(count):
    rounds = 400 * count
    firsts = Counter(window_index(0, epoch, 0, count) for epoch in range(rounds))
    assert all(abs(firsts[n] - 400) < 110 for n in range(count))  # over 5 standard deviations
    if count <= 4:
        seen = {tuple(window_index(0, e, p, count) for p in range(count)) for e in range(rounds)}
        assert len(seen) == [0, 1, 2, 6, 24][count]


def test_far_positions_cost_no_more():
    count = 10**15 + 37
    found = {window_index(3, 10**6, position, count) for position in range(count - 500, count)}
    assert len(found) == 500
    assert all(0 <= index < count for index in found)
    assert max(found) - min(found) > count // 2


def test_the_permutation_is_the_same_in_every_version():
    # a saved position means this order: a change here breaks every run that resumes
    assert [window_index(0, 0, position, 10) for position in range(10)] == [4, 3, 9, 8, 6, 7, 2, 1, 5, 0]
    assert window_index(1234, 5, 678, 10**9) == 64_814_430


def test_positions_outside_are_refused():
    for position, count in ((5, 5), (-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="position must be at least 0 and below count"):
            window_index(0, 0, position, count)


# The loader.


def take(batches, n):
    """The next n batches as windows, each torch.int64 [B, T + 1]."""
    found = [next(batches) for _ in range(n)]
    assert all(torch.equal(batch.ids[:, 1:], batch.targets[:, :-1]) for batch in found)
    assert all(batch.cu_seqlens is None for batch in found)
    return [torch.cat([batch.ids, batch.targets[:, -1:]], dim=1) for batch in found]


def test_batches_are_windows_that_overlap_by_one(prepared):
    data = TokenData(prepared)
    loader = Loader(data, seq_len=64, batch_size=3, seed=0)
    assert loader.count == (data.tokens - 1) // 64
    seen = torch.cat(take(loader, -(-loader.count // 3)))[: loader.count]
    assert seen.dtype == torch.int64
    assert seen.shape == (loader.count, 65)
    wanted = [tuple(data.window(64 * n, 65).tolist()) for n in range(loader.count)]
    assert Counter(map(tuple, seen.tolist())) == Counter(wanted)
    assert seen.tolist() != [list(row) for row in wanted]


def test_the_next_epoch_has_another_order(prepared):
    loader = Loader(TokenData(prepared), seq_len=128, batch_size=1, seed=0)
    first, second = (torch.cat(take(loader, loader.count)) for _ in range(2))
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert loader.position == 2 * loader.count


@pytest.mark.parametrize(("ranks", "rows"), [(2, 4), (4, 2), (8, 1)])
def test_the_global_batch_does_not_depend_on_the_ranks(prepared, ranks, rows):
    data = TokenData(prepared)
    alone = Loader(data, seq_len=50, batch_size=8, seed=5)
    shared = [Loader(data, seq_len=50, batch_size=rows, seed=5, rank=r, ranks=ranks) for r in range(ranks)]
    for _ in range(2 * alone.count // 8 + 2):  # over two epochs' ends
        assert torch.equal(take(alone, 1)[0], torch.cat([take(each, 1)[0] for each in shared]))
    assert {each.position for each in shared} == {alone.position}


def test_seek_goes_on_where_another_stopped(prepared):
    data = TokenData(prepared)
    whole = Loader(data, seq_len=40, batch_size=4, seed=9, rank=1, ranks=2)
    batches = take(whole, 40)
    other = Loader(data, seq_len=40, batch_size=4, seed=9, rank=1, ranks=2)
    next(other)
    other.seek(8 * 17)
    assert all(torch.equal(a, b) for a, b in zip(take(other, 23), batches[17:], strict=True))
    assert other.position == whole.position == 8 * 40
    # as many samples on, with other rows and ranks
    single = Loader(data, seq_len=40, batch_size=1, seed=9)
    single.seek(8 * 17 + 4)
    assert torch.equal(torch.cat(take(single, 4)), batches[17])


def test_another_seed_gives_other_batches(prepared):
    data = TokenData(prepared)
    first, second = (take(Loader(data, seq_len=16, batch_size=8, seed=seed), 1)[0] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_rows_are_the_callers_to_change(prepared):
    loader = Loader(TokenData(prepared), seq_len=16, batch_size=2, seed=0)
    batch = next(loader)
    batch.ids.zero_()
    assert batch.targets.any()
    loader.seek(0)
    assert next(loader).ids.any()


def test_loader_errors(prepared):
    data = TokenData(prepared)
    with pytest.raises(
        ValueError, match=f"train has {data.tokens} tokens, and one window of seq_len {data.tokens} needs"
    ):
        Loader(data, seq_len=data.tokens, batch_size=1, seed=0)
    assert Loader(data, seq_len=data.tokens - 1, batch_size=1, seed=0).count == 1
    for options, message in (
        ({"seq_len": 0}, "seq_len must be positive; got 0"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"ranks": 0}, "ranks must be positive"),
        ({"rank": 2, "ranks": 2}, "rank must be at least 0 and below ranks 2; got 2"),
        ({"rank": -1}, "rank must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Loader(data, **{"seq_len": 8, "batch_size": 1, "seed": 0, **options})
    with pytest.raises(ValueError, match="position must be 0 or more; got -1"):
        Loader(data, seq_len=8, batch_size=1, seed=0).seek(-1)
