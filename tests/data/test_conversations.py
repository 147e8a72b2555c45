"""Conversations in prepared folders: their ids, what is learned of them, and their windows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import read, say, write

from transnormer.data import chat
from transnormer.data.chat import DEFAULT, PLAIN, Template
from transnormer.data.loader import Loader
from transnormer.data.prepare import prepare
from transnormer.data.shards import TokenData
from transnormer.data.tokenizer import encode, load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def talks():
    """Thirty conversations of one to three turns."""
    turns = [
        [f"user: {n} and {n + k}?", f"assistant: {'so ' * (n % 7)}{2 * n + k}"]
        for n in range(30)
        for k in range(3)
    ]
    return [
        say(*(turn for pair in turns[3 * n : 3 * n + 1 + n % 3] for turn in pair))
        for n in range(30)
    ]


@pytest.fixture(scope="module")
def folder(talks, prepared, tmp_path_factory):
    work = tmp_path_factory.mktemp("talks")
    path = write(work / "talks.jsonl", [{"messages": talk} for talk in talks])
    prepare(
        [path], work / "data", tokenizer=prepared, format="messages", split=0.2, shard_tokens=101
    )
    return work / "data"


def test_a_prepared_folder_holds_ids_and_flags(folder, talks, tokenizer):
    record = json.loads((folder / "data.json").read_text())
    assert (record["format"], record["flags"], record["dtype"]) == (2, True, "uint32")
    assert (folder / chat.FILE).read_text() == DEFAULT == TokenData(folder).chat_template
    with Template(DEFAULT, tokenizer) as template:
        wanted = [template.parts(talk) for talk in talks]
    found = []
    for split in ("train", "valid"):
        data = TokenData(folder, split)
        ids, (learned, begins) = data.window(0, data.tokens), data.marks(0, data.tokens)
        assert ids.max() < 300
        assert data.learned == learned.sum()
        for start, stop in zip(np.flatnonzero(begins), data.document_ends(), strict=True):
            found.append((ids[start:stop].tolist(), learned[start:stop].tolist()))
        assert data.documents == begins.sum() > 2
    ours = [
        ([t for p in talk for t in p.ids], [p.learned for p in talk for _ in p.ids])
        for talk in wanted
    ]
    assert sorted(found) == sorted(ours)
    sizes = [record["splits"][split]["bytes"] for split in ("train", "valid")]
    assert sum(sizes) == sum(
        len(m["content"].strip()) for talk in talks for m in talk if m["role"] == "assistant"
    )


def test_windows_hold_whole_conversations(folder):
    data = TokenData(folder)
    ends = set(data.document_ends().tolist())
    loader = Loader(data, seq_len=120, batch_size=1, seed=0, reset_state=True)
    seen = 0
    for number in range(loader.count):
        batch = loader.batch([number])
        start, stop = loader._windows[number].tolist()
        assert {start, stop} <= {0, *ends}
        # no more fit
        assert stop + min(n - stop for n in [*ends, stop + 999] if n > stop) > start + 121
        bounds = batch.cu_seqlens.tolist()
        inside = sorted(n - start for n in ends | {0} if 0 <= n - start < 120 and n < data.tokens)
        assert bounds == [*(inside if inside[0] == 0 else [0, *inside]), 120]
        ids, (learned, begins) = data.window(start, stop - start), data.marks(start, stop - start)
        wanted = np.where(learned & ~begins, ids, -100)[1:]
        assert batch.targets[0, : len(wanted)].tolist() == wanted.tolist()
        assert (batch.targets[0, len(wanted) :] == -100).all()
        seen += batch.learned
    assert seen == data.learned  # each once an epoch


def test_a_conversation_longer_than_a_window_is_cut_and_wholly_learned(folder):
    for length in (5, 17, 40):
        loader = Loader(TokenData(folder), seq_len=length, batch_size=3, seed=0)
        seen = sum(loader.batch([number]).learned for number in range(loader.count))
        assert seen == TokenData(folder).learned


def test_conversations_that_are_cut_are_counted(folder, prepared, tmp_path):
    data = TokenData(folder)
    lengths = np.diff(data.document_ends(), prepend=0)

    def cut(length):
        return Loader(data, seq_len=length, batch_size=1, seed=0).cut_warning()

    longest = lengths.max() - 1  # a window holds one token more than it predicts
    assert cut(longest) is None
    assert f"1 of {len(lengths)} conversations do not fit into seq_len {longest - 1}" in cut(
        longest - 1
    )
    assert f"{(lengths > 21).sum()} of {len(lengths)} conversations" in cut(20)
    assert f"seq_len {longest} would cut none" in cut(20)
    path = write(tmp_path / "a.jsonl", [{"text": "one two " * 99}])
    prepare([path], tmp_path / "out", tokenizer=prepared, split=0)
    text = Loader(TokenData(tmp_path / "out"), seq_len=9, batch_size=1, seed=0)
    assert text.cut_warning() is None


def test_text_resets_after_each_end_of_text(prepared, tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [{"text": "one two"}, {"text": "three"}, {"text": "four five six"}])
    prepare([path], tmp_path / "out", tokenizer=prepared, split=0)
    data = TokenData(tmp_path / "out")
    ids = data.window(0, data.tokens)
    ends = (np.flatnonzero(ids == 0) + 1).tolist()
    batch = Loader(data, seq_len=data.tokens - 1, batch_size=1, seed=0, reset_state=True).batch([0])
    assert batch.cu_seqlens.tolist() == [0, *ends[:-1], data.tokens - 1]
    wanted = torch.from_numpy(ids[1:].copy())
    wanted[[end - 1 for end in ends[:-1]]] = -100
    assert torch.equal(batch.targets[0], wanted)
    assert [data.marks(n, 1)[1].item() for n in range(data.tokens)] == [
        n in {0, *ends} for n in range(data.tokens)
    ]


def test_templates_and_arguments_of_prepare(folder, talks, prepared, tmp_path):
    path = write(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    (tmp_path / "own.jinja").write_text(PLAIN)
    prepare(
        [path],
        tmp_path / "own",
        tokenizer=prepared,
        format="messages",
        chat_template=tmp_path / "own.jinja",
    )
    # the folder's own
    prepare([path], tmp_path / "again", tokenizer=tmp_path / "own", format="messages")
    assert TokenData(tmp_path / "again").chat_template == PLAIN
    assert TokenData(tmp_path / "again").fingerprint != TokenData(folder).fingerprint
    write(tmp_path / "pairs.jsonl", [{"prompt": "to be", "completion": " or not"}] * 2)
    prepare(
        [tmp_path / "pairs.jsonl"],
        tmp_path / "pairs",
        tokenizer=tmp_path / "own",
        format="prompt",
        split=0,
    )
    words = load_tokenizer(prepared)
    wanted = [*encode(words, "to be"), *encode(words, " or not"), 0]
    assert TokenData(tmp_path / "pairs").window(0, 2 * len(wanted)).tolist() == wanted * 2
    (tmp_path / "again" / chat.FILE).write_text("other")
    with pytest.raises(
        ValueError, match=r"chat_template\.jinja: is not the template that made these tokens"
    ):
        TokenData(tmp_path / "again")
    for options, message in (
        (
            {"format": "messages", "vocab_size": 300},
            "format 'messages' needs the tokenizer of the model",
        ),
        ({"format": "chatml", "tokenizer": prepared}, "format 'chatml' is unknown"),
        (
            {"tokenizer": prepared, "chat_template": "x"},
            "a chat template needs a format of conversations",
        ),
        (
            {"format": "messages", "tokenizer": prepared, "chat_template": "gone"},
            "gone: no such file",
        ),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            prepare([path], tmp_path / "no", **options)
    assert not Path(tmp_path / "no").exists()


def test_the_example_records_are_what_their_script_makes():
    script = ROOT / "examples" / "instructions.py"
    made = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    ).stdout
    assert made == script.with_suffix(".jsonl").read_text()
    assert len(read(script.with_suffix(".jsonl"))) == 160
