"""The command line as a user meets it: every verb, and one clear line for what was got wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import typing
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import typer

import transnormer
from transnormer.__main__ import interrupt
from transnormer.cli import app, main
from transnormer.data.chat import DEFAULT, Template
from transnormer.inference.sampling import Sampling
from transnormer.inference.session import Session
from transnormer.train.recipe import Recipe

from .conftest import PATIENCE, PUBLISHED, REPOSITORY


def call(
    *arguments: object, text: str | None = None, code: int = 0, folder: Path | None = None
) -> tuple[str, str]:
    """Call a verb as the console script does; returns what it wrote to standard output and
    error."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", ["transnormer", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(text or ""))
        patch.chdir(folder or Path.cwd())
        with pytest.raises(SystemExit) as stop:
            main()
    assert (stop.value.code or 0) == code, error.getvalue()
    return out.getvalue(), error.getvalue()


def refused(*arguments: object, **options) -> str:
    """Run a verb that must fail with exactly one line."""
    _, error = call(*arguments, code=1, **options)
    (line,) = error.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def work(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a text was prepared and a model trained through the command line alone."""
    folder = tmp_path_factory.mktemp("work")
    out, _ = call(
        "prepare", text_file, "--out", "text", "--vocab-size", 320, "--split", 0.1, folder=folder
    )
    train, valid = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens", out))
    assert 0.05 < valid / (train + valid) < 0.2
    (folder / "small.toml").write_text(
        '[data]\npath = "text"\n[model]\nnum_hidden_layers = 2\nhidden_size = '
        "32\nnum_attention_heads = 2\n"
        "intermediate_size = 48\n[train]\nsteps = 30\nseq_len = 32\nbatch_tokens = "
        "256\n[optim]\nlr = 1e-2\nwarmup_steps = 5\n"
    )
    _, progress = call("train", "small.toml", "eval.every=10", folder=folder)
    assert "bits per byte" in progress
    return folder


def test_generate_streams_on_from_the_prompt(work: Path) -> None:
    options = ("generate", "--model", "runs/small", "--max-tokens", 20, "--seed", 3)
    out, _ = call(*options, "--prompt", "To be", folder=work)
    assert out.startswith("To be")
    assert len(out) > len("To be\n")
    again, _ = call(*options, "--prompt", "-", text="To be", folder=work)
    assert again == out
    cut, _ = call(*options, "--prompt", "To be", "--stop", out[8:11], folder=work)
    assert cut == out[:8] + "\n"
    call("generate", "--model", "runs/small", "--max-tokens", 5, folder=work)


def test_chat_takes_turns(work: Path) -> None:
    lines = "Hello\n\nAgain\n"
    out, _ = call("chat", "--model", "runs/small", "--max-tokens", 8, text=lines, folder=work)
    assert out.count("> ") == 4  # an empty line is nothing, the end of the input is the end


@pytest.fixture(scope="module")
def talker(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in a folder with a chat template."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    call("export", "--model", "runs/small", "--out", folder, folder=work)
    (folder / "chat_template.jinja").write_text(DEFAULT)
    return folder


def test_generate_chat_applies_the_template(work: Path, talker: Path) -> None:
    options = ("--max-tokens", 12, "--seed", 3)
    out, _ = call(
        "generate", "--model", talker, *options, "--chat", "--prompt", "To be", "--system", "Speak."
    )
    spelled = "system\nSpeak.<|endoftext|>user\nTo be<|endoftext|>assistant\n"
    model = transnormer.load(talker)
    with Template(DEFAULT, model.tokenizer) as template:
        (part,) = template.parts(
            [{"role": "system", "content": "Speak."}, {"role": "user", "content": "To be"}]
        )
    assert model.tokenizer.decode(part.ids, skip_special_tokens=False) == spelled
    session = Session(model)
    session.read(part.ids)
    ids = list(session.write(12, Sampling(seed=3), 0))
    assert out == model.tokenizer.decode(ids) + "\n"
    assert "--chat needs a chat template, and runs/small has none" in refused(
        "generate", "--model", "runs/small", "--chat", "--prompt", "x", folder=work
    )
    assert "--chat needs a --prompt" in refused("generate", "--model", talker, "--chat")
    assert "--system needs --chat" in refused("generate", "--model", talker, "--system", "x")


def test_perplexity_of_files(work: Path, text_file: Path) -> None:
    (work / "short.txt").write_text("Who goes there?\n")
    out, _ = call(
        "eval", "perplexity", "--model", "runs/small", "--text", text_file, "short.txt", folder=work
    )
    assert "bits per byte" in out
    rows = [line for line in out.splitlines() if "short.txt" in line or "together" in line]
    assert len(rows) == 2
    assert 60_016 - 20 <= int(re.findall(r"[\d,]+", rows[1].replace(",", ""))[1]) <= 61_000


def test_perplexity_of_records_as_json(work: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = ["Who goes there?\n", "Nay, answer me: stand.\n"]
    for number, each in enumerate(texts):
        (work / f"{number}.txt").write_text(each)
    (work / "both.jsonl").write_text(
        "".join(json.dumps({"body": each}) + "\n" for each in [*texts, " "])
    )
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), work / "both.parquet")
    verb = ("eval", "perplexity", "--model", "runs/small", "--json", "--text")
    one = json.loads(call(*verb, "0.txt", "1.txt", folder=work)[0])
    two = json.loads(
        call(*verb, "both.jsonl", "both.parquet", "--text-field", "body", folder=work)[0]
    )
    assert [each["documents"] for each in one["files"]] == [1, 1]
    for each in two["files"]:
        assert each["documents"] == 2
        assert each | one["together"] == each  # the same numbers
    assert {"loss", "perplexity", "bits_per_byte", "word_perplexity", "tokens"} <= two[
        "together"
    ].keys()
    cut = json.loads(call(*verb, "0.txt", "--window", 2, folder=work)[0])
    assert cut["window"] == 2
    assert cut["together"]["tokens"] == one["files"][0]["tokens"]
    assert cut["together"]["nats"] != one["files"][0]["nats"]
    assert "both.jsonl line 1: no field 'text'; it has body" in refused(
        *verb, "both.jsonl", folder=work
    )


def test_info_says_what_a_model_costs(work: Path) -> None:
    out, _ = call("info", folder=work)
    assert re.search(r"385m +398,984,192 parameters", out)
    out, _ = call("info", "7b", folder=work)
    assert "6,836,719,616" in out
    assert "whatever the length" in out
    out, _ = call("info", "--model", "runs/small", folder=work)
    assert "320 words" in out
    assert re.search(
        r"runs/small: 30 of 30 steps\ntraining loss .*\nvalidation loss .* bits per byte", out
    )
    out, _ = call("info", PUBLISHED, folder=work)
    assert "tokenizer       none" in out


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command below the group, by what is typed for it; also the groups."""
    yield name, group
    for word, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {word}".strip())


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_help_lists_the_verbs() -> None:
    out, _ = call("--help")
    for verb in (
        "train",
        "generate",
        "chat",
        "eval",
        "prepare",
        "info",
        "compare",
        "--install-completion",
    ):
        assert re.search(rf"(?<![\w-]){verb}\b", out)
    assert call("-h")[0] == out
    out, _ = call("--version")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_and_a_page(name: str) -> None:
    out, _ = call(*name.split(), "-h")
    example, page = re.search(
        r"Example: +transnormer (.*?)\s+Read on: (\S+)", out, re.DOTALL
    ).groups()
    assert (REPOSITORY / page).is_file()
    verb, *words = example.split()
    if verb == "eval":
        verb = f"eval {words.pop(0)}"
    assert name in ("", "eval", verb)
    COMMANDS[verb].make_context(verb, words)  # or it raises what is wrong with the example
    for param in COMMANDS[name].params:
        if not getattr(param, "hidden", False):
            assert param.help, f"{name} {param.name} is not described"


def test_the_help_of_train_lists_the_settings() -> None:
    out = " ".join(call("train", "-h")[0].split())
    for table, kind in typing.get_type_hints(Recipe).items():
        for part in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(part):
                assert (
                    f"{table}: {', '.join(field.name for field in dataclasses.fields(part))}" in out
                )
    assert "model: size" in out


@pytest.mark.parametrize("words", [(), ("eval",)])
def test_without_a_verb_the_help_is_shown(words: tuple[str, ...]) -> None:
    out, error = call(*words, code=2)
    assert "Commands" in out
    assert error == ""


def test_a_wrong_command_line_is_one_line_that_names_the_help() -> None:
    for words, message in {
        ("train",): "error: Missing argument 'recipe'. (transnormer train --help says more)\n",
        ("eval", "perplexity", "--nonsense"): "(transnormer eval perplexity --help says more)\n",
    }.items():
        _, error = call(*words, code=2)
        assert error.endswith(message)
        assert error.count("\n") == 1


def test_shells_complete_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "_TRANSNORMER_COMPLETE": "complete_bash",
        "COMP_WORDS": "transnormer tr",
        "COMP_CWORD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert call()[0].split() == ["train"]


def test_what_went_wrong_is_one_line(work: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (work / "short.txt").write_text("Who goes there?\n")
    (tmp_path / "latin.txt").write_bytes("Zürich\n".encode("latin-1"))
    assert "did you mean" in refused("train", "small.toml", "optim.lrr=1", folder=work)
    assert "no such recipe" in refused("train", "nothing.toml", folder=work)
    assert "neither a folder nor a size (5m," in refused("info", "2b")
    assert "no such folder" in refused("generate", "--model", "nowhere")
    assert "neither a run" in refused("generate", "--model", tmp_path)
    assert "no tokenizer" in refused("generate", "--model", PUBLISHED, "--prompt", "x")
    assert "temperature" in refused("generate", "--model", PUBLISHED, "--temperature", -1)
    for verb in ("generate", "chat"):
        assert "stop: an empty string" in refused(verb, "--model", PUBLISHED, "--stop", "")
    assert "--prompt is not Unicode" in refused(
        "generate", "--model", "runs/small", "--prompt", "a\udcff", folder=work
    )
    assert "empty.txt" in refused(
        "prepare", tmp_path / "empty.txt", "--out", tmp_path / "o", "--vocab-size", 300
    )
    assert "UTF-8" in refused(
        "prepare", tmp_path / "latin.txt", "--out", tmp_path / "o", "--vocab-size", 300
    )
    assert "257" in refused(
        "prepare", tmp_path / "empty.txt", "--out", tmp_path / "o", "--vocab-size", 30, folder=work
    )
    assert "missing.txt" in refused(
        "prepare", "missing.txt", "--out", tmp_path / "o", "--vocab-size", 300
    )
    assert "exists" in refused(
        "prepare", "short.txt", "--out", "text", "--vocab-size", 300, folder=work
    )
    for both in ((), ("--vocab-size", 300, "--tokenizer", "text")):
        assert "give either --vocab-size, to train" in refused(
            "prepare", "short.txt", "--out", "o", *both, folder=work
        )
    under = ("--out", "short.txt/o")
    line = f"short.txt/o: cannot be made: {work}/short.txt is a file, not a folder"
    assert line in refused("prepare", "short.txt", *under, "--vocab-size", 300, folder=work)
    assert line in refused("convert", PUBLISHED, "short.txt/o", folder=work)
    assert line in refused("export", "--model", PUBLISHED, *under, folder=work)
    assert "there are text, messages, prompt, alpaca" in refused(
        "prepare", "short.txt", "--out", "o", "--tokenizer", "text", "--format", "foo", folder=work
    )
    assert "short.txt: a file, not a folder with a model" in refused(
        "generate", "--model", "short.txt", folder=work
    )
    assert "UTF-8" in refused(
        "eval", "perplexity", "--model", "runs/small", "--text", tmp_path / "latin.txt", folder=work
    )
    assert "empty.txt" in refused(
        "eval", "perplexity", "--model", "runs/small", "--text", tmp_path / "empty.txt", folder=work
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
def test_chat_in_a_terminal(work: Path) -> None:
    """Lines can be edited and called back. Ctrl-C ends an answer or a line, Ctrl-D the chat."""
    verb = [
        sys.executable,
        "-m",
        "transnormer",
        "chat",
        "--model",
        "runs/small",
        "--max-tokens",
        "1000000",
    ]
    # a drawn end of text would end the answer
    verb += ["--stop", "never there", "--temperature", "0"]
    terminal = [sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"]
    chat = subprocess.Popen(
        [*terminal, *verb],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=work,
        env=os.environ | {"TERM": "dumb"},
    )
    shown = b""

    def after(*texts: bytes) -> None:
        """Read on until the texts were shown, one after another."""
        nonlocal shown
        for text in texts:
            while text not in shown:
                more = chat.stdout.read(65_536)
                assert more, shown.decode()
                shown += more
            shown = shown[shown.index(text) + len(text) :]

    watchdog = threading.Timer(PATIENCE, chat.kill)  # then nothing more is shown
    watchdog.start()
    try:
        after(b"This is runs/small", b"/reset", b"> ")
        chat.stdin.write(b"Hello\r")
        after(b"Hello", b"\n")
        while len(shown) < 20:
            shown += chat.stdout.read(65_536)
        chat.stdin.write(b"\x03")  # in the midst of an answer that goes on for a million tokens
        after(b"\n> ")
        chat.stdin.write(b"half a line")
        after(b"half a line")
        # once more where it came just before readline began to wait
        while b"Ctrl-D ends the chat" not in shown:
            chat.stdin.write(b"\x03")
            if select.select([chat.stdout], [], [], 10)[0]:
                shown += chat.stdout.read(65_536)
        after(b"Ctrl-D ends the chat", b"> ")
        chat.stdin.write(b"\xff\r")
        after(b"not UTF-8", b"> ")
        chat.stdin.write(b"/reet\x1b[D\x1b[Ds\r")  # two letters back, and one between
        after(b"begins anew", b"> ")
        chat.stdin.write(b"\x1b[A")  # the line before
        after(b"/reset")
        chat.stdin.write(b"\r")
        after(b"begins anew", b"> ")
        chat.stdin.write(b"\x04")
        assert chat.wait() == 0
    finally:
        watchdog.cancel()
        chat.kill()
        chat.communicate()


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (PermissionError(13, "Permission denied", "book.txt"), "book.txt: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            OSError("a.json: cannot be written: Disk quota exceeded"),
            "a.json: cannot be written: Disk quota exceeded",
        ),
        (MemoryError(), "out of memory"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_the_system_s_errors_are_said_without_their_number(
    raised: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transnormer.data.prepare.prepare", Mock(side_effect=raised))
    assert refused("prepare", "a.txt", "--out", "o", "--vocab-size", 300) == f"error: {line}"


def test_prepare_takes_the_tokenizer_of_a_run(work: Path, tmp_path: Path) -> None:
    (work / "short.txt").write_text("Who goes there?\nWho is it?\n")
    call(
        "prepare",
        "short.txt",
        "--out",
        tmp_path / "again",
        "--tokenizer",
        "runs/small",
        folder=work,
    )
    newest = max(
        (work / "runs" / "small" / "checkpoints").glob("step-*"),
        key=lambda path: int(path.name[5:]),
    )
    assert (tmp_path / "again/tokenizer.json").read_text().strip() == (
        newest / "tokenizer.json"
    ).read_text()
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    options = ("--out", tmp_path / "other", "--tokenizer", tmp_path / "new")
    assert "no checkpoint with a tokenizer yet" in refused(
        "prepare", "short.txt", *options, folder=work
    )


INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["transnormer", "info"]
from transnormer.__main__ import main
main()
"""


# before a verb, in it, and where C code imports
@pytest.mark.parametrize("module", ["typer", "torch", "numpy"])
def test_ctrl_c_while_a_verb_is_imported_is_silent(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_in_a_verb_is_silent(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        interrupt(signal.SIGINT, sys._getframe())

    monkeypatch.setattr("transnormer.data.prepare.prepare", interrupted)
    assert call(
        "prepare", "short.txt", "--out", "o", "--vocab-size", 300, code=130, folder=work
    ) == ("", "")


def test_a_closed_pipe_is_no_error(work: Path) -> None:
    command = (
        f"{sys.executable} -m transnormer generate --model runs/small --prompt To --max-tokens "
        "400 | head -c 5"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=work)
    assert done.stdout.startswith("To")
    assert done.stderr == ""
