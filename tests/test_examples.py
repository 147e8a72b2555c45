"""What README, the pages and the examples show is run as it stands, on one small run that all of
them share.

Blocks of Python and of commands are taken from the pages. `NOT_RUN` says why a command is not run
here. Trainings get a few settings more (`SMALLER`), so that each takes a second. All run in this
process: libraries are imported once."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from transnormer.config import ModelConfig
from transnormer.train.recipe import Recipe

from .conftest import REPOSITORY
from .test_cli import COMMANDS, call

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
# The records hold commands of older commits, which are not run again.
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *(path for path in DOCS if path.stem != "records"),
]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))

NOT_RUN = {
    r"(git clone|make |\. \.venv|\.venv/bin/)": "sets up or tests a checkout, as CI does",
    r"pip install": "installs what CI has installed before",
    r"launch/torchrun\.sh": "needs GPUs; tests/train/test_cluster.py starts it on CPUs",
    r"python examples/": "is run by test_examples",
    r"transnormer prepare INPUT": "is a synopsis",
    r"transnormer eval harness (?!.*--data)": "fetches documents; the commands with --data do not",
    r"python -m transnormer\.hub lm_eval (?!.*--include_path)": "fetches documents from a network",
}
RUN = re.compile(r"\$ |transnormer |python |mkdir |echo ")
SMALLER = ["train.steps=4", "train.seq_len=64", "train.batch_tokens=128", "eval.every=2",
           "eval.tokens=128",
           "checkpoint.every=2", "optim.warmup_steps=1"]  # fmt: skip
SMALLER_DATA = ["data.vocab_size=300"]
SMALLER_MODEL = ["model.num_hidden_layers=1", "model.hidden_size=32",
                 "model.num_attention_heads=2", "model.intermediate_size=48"]  # fmt: skip


class Block(NamedTuple):
    """One block of a page: the language of its fence, or "" where it is indented; and its lines."""

    language: str
    lines: list[str]
    number: int  # of its first line


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks, and indented ones that follow an empty line."""
    language, lines, before = None, [], ""
    for number, line in enumerate([*page.read_text().splitlines(), ""], 1):
        if fence := re.fullmatch(r"```(\w*)", line):
            if language is None:
                if lines:
                    yield Block("", lines, number - len(lines))
                language, lines = fence[1], []
            else:
                yield Block(language or "text", lines, number - len(lines))
                language, lines = None, []
        elif language is not None:
            lines.append(line)
        elif line.startswith("    ") and (lines or not before.strip()):
            lines.append(line[4:])
        elif lines and line.strip():
            yield Block("", lines, number - len(lines))
            lines = []
        elif lines:
            lines.append("")
        before = line
    if lines:
        yield Block("", [line for line in lines if line], number - len(lines))


def commands(block: Block) -> list[str]:
    """The command lines of an indented block; [] where it holds something else."""
    lines = [line for line in block.lines if line and not line.startswith("error: ")]
    known = re.compile("|".join([RUN.pattern, *NOT_RUN]))
    return lines if all(known.match(line) for line in lines) else []


@pytest.fixture(scope="module", autouse=True)
def smaller() -> Iterator[None]:
    """The recipes of the repository train a small model for four steps, whoever loads them."""
    load = Recipe.load

    def load_smaller(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        if Path(path).parent.name != "recipes":
            return load(path, overrides)
        model = [] if "from" in tomllib.loads(Path(path).read_text())["model"] else SMALLER_MODEL
        data = [] if any(given.startswith("data.path=") for given in overrides) else SMALLER_DATA
        more = [*SMALLER, *model, *(data if model else [])]
        ours = {setting.partition("=")[0] for setting in more}
        return load(
            path, [*(given for given in overrides if given.partition("=")[0] not in ours), *more]
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "load", load_smaller)
        yield


@pytest.fixture(scope="module")
def work(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone in which the demo was run, with the files that the pages name."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "examples").mkdir()
    for name in ("recipes", "launch"):
        (folder / name).symlink_to(REPOSITORY / name)
    for path in (REPOSITORY / "examples").iterdir():
        (folder / "examples" / path.name).symlink_to(
            text_file if path.name == "shakespeare.txt" else path
        )
    text = text_file.read_text()
    (folder / "book.txt").write_text(text[:2_000])
    (folder / "papers").mkdir()
    (folder / "papers" / "a.md").write_text(text[2_000:20_000])
    (folder / "dump.jsonl").write_text(
        "".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")[:200])
    )
    call("train", "recipes/demo.toml", folder=folder)
    call(
        "export",
        "--model",
        "runs/demo",
        "--out",
        "TransNormerLLM-1B",
        "--format",
        "published",
        folder=folder,
    )
    return folder


@pytest.fixture
def place(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, to stand in."""
    shutil.copytree(work, tmp_path / "clone", symlinks=True)
    monkeypatch.chdir(tmp_path / "clone")
    return tmp_path / "clone"


def run_python(code: str, monkeypatch: pytest.MonkeyPatch, argv: list[str] | None = None) -> None:
    monkeypatch.setattr(sys, "argv", argv or ["-c"])
    exec(compile(code, "a block", "exec"), {"__name__": "__main__"})


def run_harness(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the harness' own thirteen thousand files of tasks, which it would read for half a
    minute."""
    from lm_eval.tasks import TaskManager

    build = TaskManager.__init__

    def only_given(self: TaskManager, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **{**options, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", only_given)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def run_command(line: str, following: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one line of a block. following: the line after it, which may show what it answers."""
    words = shlex.split(line, comments=True)
    if words[0] == "$":
        _, error = call(*words[2:], code=1)
        assert error == f"{following}\n"
    elif words[0] == "transnormer":
        call(*words[1:], text="Hello\n" if words[1] == "chat" else None)
    elif words[:2] == ["python", "-c"]:
        run_python(words[2], monkeypatch)
    elif words[:2] == ["python", "-m"]:
        run_harness(words[2:], monkeypatch)
    else:
        subprocess.run(line, shell=True, check=True)


# "proof" alone would be taken for the mark
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page):
        try:
            if block.language == "python":
                run_python("\n".join(block.lines), monkeypatch)
            for line, following in zip(commands(block), [*block.lines[1:], ""], strict=False):
                if not any(re.match(pattern, line) for pattern in NOT_RUN):
                    run_command(line, following, monkeypatch)
        except BaseException as error:
            error.add_note(f"in the block that begins at {page.name}:{block.number}")
            raise


def test_every_block_is_run_or_known() -> None:
    found = [(page, block) for page in PAGES for block in blocks(page)]
    other = {
        (page.stem, block.number)
        for page, block in found
        if not block.language and not commands(block)
    }
    # a template's text, equations
    assert {name for name, _ in other} <= {"finetuning", "math"}, other
    assert {block.language for _, block in found} == {"", "python", "text", "toml"}
    lines = [line for _, block in found for line in commands(block)]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, line) for line in lines), f"nothing is left of {pattern}"
    assert sum(block.language == "python" for _, block in found) > 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(
    path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(path.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(path), "runs/demo"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_both_commands_are_named_and_ci_runs_the_second_as_it_is() -> None:
    text = PAGES[0].read_text()
    section = text[text.index("## Two commands") : text.index("## Eight lines")]
    first, second = (line.strip() for line in section.splitlines() if line.startswith("    make "))
    assert (first, second) == ("make demo", "make test")
    assert f"`{first}`" in section
    assert f"`{second}`" in section
    ci = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert second in ci
    assert "make lint" in ci


TABLES = {
    name: [field.name for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)
           for field in dataclasses.fields(part)]
    for name, kind in typing.get_type_hints(Recipe).items()
} | {"model": ["size", "kind", "from",
               *(field.name for field in dataclasses.fields(ModelConfig))]}  # fmt: skip
SETTING = re.compile(rf"(?<![\w.-])({'|'.join(TABLES)})\.([a-z_0-9]+)( ?= ?([^\s`'\"{{;,]+))?")
OTHERS = {
    "safetensors",
    "json",
    "py",
    "md",
    "key",
    "config",
    "language_model",
    "state",
    "embed_tokens",
    "layers",
    "final_norm",
    "parameter_count",
    "reshard",
    "clip",
}  # files, modules, and names of weights


def advised() -> Iterator[tuple[str, str]]:
    """(where, text) of all that is in backticks on the pages, and of all texts in the package's
    code."""
    for page in PAGES:
        shown = re.findall(r"`([^`\n]+)`", page.read_text())
        yield from ((page.name, text) for text in shown if not FOREIGN.match(text))
    for path in sorted((REPOSITORY / "transnormer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            # a sentence, or a part of one
            if isinstance(text, str) and " " in text and "\n" not in text:
                yield path.name, text


def test_settings_that_are_advised_are_there_and_can_be_given(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "recipes" / "demo.toml", tmp_path)
    found = set()
    for where, text in advised():
        given = []
        for table, key, _, value in SETTING.findall(text):
            assert key in OTHERS.union(TABLES[table]), f"{where} names {table}.{key} in {text!r}"
            if value and key in TABLES[table]:
                given.append(f"{table}.{key}={value.rstrip('.):')}")
        once = len({setting.partition("=")[0] for setting in given}) == len(given)
        # "8, or 32" are two recipes
        found.update([tuple(given)] if once else ((setting,) for setting in given))
    assert len(found) > 30
    for overrides in sorted(found):
        try:
            Recipe.load(tmp_path / "demo.toml", overrides)
        except ValueError as error:
            if not re.search("model.from says|train.float8 needs", str(error)):
                raise


# other programs, with options of their own
FOREIGN = re.compile(r"(hf|python|sbatch|torchrun|py-spy|ncu) ")
FOREIGN_OPTIONS = {"--max-restarts", "--nproc-per-node", "--signal", "--include", "--help", "--no-"}


def test_options_that_are_advised_are_there() -> None:
    known = [
        option
        for each in COMMANDS.values()
        for param in each.params
        for option in (*param.opts, *param.secondary_opts)
    ]
    for where, text in advised():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in {*known, *FOREIGN_OPTIONS}, f"{where} names {option} in {text!r}"


OTHER_DATA = "run=tuned data.format=text data.text=[]"
PREPARED = "prepare book.txt --vocab-size 280 --out data"
ADVICE = [  # a line that is refused, what is said, and lines that do what it says
    (f"train recipes/sft.toml data.path=data/other {OTHER_DATA}",
     ("data/other was not encoded .*; prepare its text again with --tokenizer runs/demo and "
      "another --out"),
     ["prepare book.txt --tokenizer runs/demo --out data/again",
      f"train recipes/sft.toml data.path=data/again {OTHER_DATA}"]),
    (f"train recipes/sft.toml data.path=data/larger {OTHER_DATA}",
     ("data/larger has 310 words, runs/demo 300; prepare its text again with --tokenizer runs/demo "
      "and another --out"),
     ["prepare book.txt --tokenizer runs/demo --out data/again",
      f"train recipes/sft.toml data.path=data/again {OTHER_DATA}"]),
    ("train recipes/demo.toml run=new data.path=data/none data.text=[]",
     "data.path = data/none: no such folder; make it with `transnormer prepare`, or set data.text",
     [f"{PREPARED}/none", "train recipes/demo.toml run=new data.path=data/none data.text=[]",
      ("train recipes/demo.toml run=newer data.path=data/newer data.text=book.txt "
       "data.vocab_size=280")]),
    ("train recipes/demo.toml optim.lr=1e-3",
     ("runs/demo was started with other settings: optim.lr was 0.006 and is now 0.001; give "
      "another run=NAME"),
     ["train recipes/demo.toml optim.lr=1e-3 run=slower"]),
    ("train recipes/demo.toml run=new data.split=0.2",
     ("data/shakespeare was prepared with data.split = 0.05, but the recipe says 0.2; choose "
      "another data.path"),
     ["train recipes/demo.toml run=new data.split=0.2 data.path=data/new data.vocab_size=300"]),
    (f"{PREPARED}/other", "data/other exists; remove it or choose another",
     [f"{PREPARED}/another"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message", "advice"), ADVICE, ids=[message[:40] for _, message, _ in ADVICE]
)
def test_the_advice_of_an_error_works(
    line: str, message: str, advice: list[str], place: Path
) -> None:
    call(*f"{PREPARED}/other".split())
    call("prepare", "examples/shakespeare.txt", "--vocab-size", 310, "--out", "data/larger")
    _, error = call(*line.split(), code=1)
    assert re.search(f"error: .*{message}", error)
    for each in advice:
        call(*each.split())


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
