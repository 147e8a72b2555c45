"""The harness' tasks run over the files of a folder, with its own prompts and answers."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from transnormer import LanguageModel
from transnormer.evaluation import documents
from transnormer.evaluation.documents import PAPER, TASKS

from ..lazy import Lazy
from ..test_cli import call, refused

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

harness = Lazy("transnormer.evaluation.harness")


def lines(path: Path, documents: list[dict]) -> None:
    text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as file:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            file.addfile(member, io.BytesIO(text.encode()))


def chinese(subject: str, count: int) -> str:
    rows = [f"{n},{subject}第{n}题是,甲{n},乙,丙,丁,{'ABCD'[n % 4]}" for n in range(count)]
    return "\n".join([",Question,A,B,C,D,Answer", *rows, ""])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task's files in miniature, in the formats of the real ones."""
    folder = tmp_path_factory.mktemp("documents")
    numbers = range(6)
    choices = {"text": ["red", "green", "blue", "grey"], "label": ["A", "B", "C", "D"]}
    lines(folder / "boolq.jsonl.gz", [
        {"question": f"is {n} even", "answer": n % 2 == 0,
         "passage": f"The number is {n}."} for n in numbers
    ])  # fmt: skip
    lines(folder / "piqa.jsonl", [
        {"goal": f"Cook {n} eggs", "sol1": "Boil them.", "sol2": "Paint them blue.",
         "label": n % 2} for n in numbers
    ])  # fmt: skip
    lines(folder / "siqa.jsonl.gz", [
        {"context": f"Ann met {n} friends.", "question": "How does she feel?", "answerA": "happy",
         "answerB": "sad",
         "answerC": "old", "label": str(1 + n % 3)} for n in numbers
    ])  # fmt: skip
    lines(folder / "hellaswag.jsonl.gz", [
        {"activity_label": "Sailing", "ctx_a": f"A man boards boat {n}.", "ctx_b": "he",
         "label": str(n % 4),
         "endings": ["sails away [title] home.", "sinks.", "eats the boat.",
                     "sings a song."]} for n in numbers
    ])  # fmt: skip
    lines(folder / "winogrande.jsonl.gz", [
        {"sentence": f"The {n} dogs chased the cats because _ were fast.", "option1": "dogs",
         "option2": "cats",
         "answer": str(1 + n % 2)} for n in numbers
    ])  # fmt: skip
    for task in ("arc_easy", "arc_challenge"):
        lines(folder / f"{task}.validation.jsonl.gz", [
            {"id": str(n), "question": f"Which colour is {n}?", "choices": choices,
             "answerKey": "ABCD"[n % 4]}
            for n in numbers
        ])  # fmt: skip
    lines(folder / "openbookqa.validation.jsonl.gz", [
        {"id": str(n), "question_stem": f"Number {n} is", "choices": choices,
         "answerKey": "ABCD"[n % 4]}
        for n in numbers
    ])  # fmt: skip
    for split, count in (("dev", 5), ("test", 4)):
        lines(folder / f"mmlu.{split}.jsonl.gz", [
            {"question": f" {split} {subject} {n}? ", "subject": subject,
             "choices": ["one", "two", "three", "four"],
             "answer": n % 4} for subject in ("anatomy", "astronomy",
             "professional_law") for n in range(count)
        ])  # fmt: skip
    archive(folder / "cmmlu.tar.gz", {
        f"{split}/{subject}.csv": chinese(subject, count)
        for split, count in (("dev", 5), ("test", 4)) for subject in ("arts", "virology")
    })  # fmt: skip
    lines(
        folder / "lambada_openai.test.jsonl.gz",
        [{"text": f"He had {n} dogs and loved every dog"} for n in numbers],
    )
    lines(folder / "sciq.jsonl.gz", [
        {"question": f"What is {n}?", "distractor1": "a fish", "distractor2": "a bird",
         "distractor3": "a tree",
         "correct_answer": "a number", "support": ""} for n in numbers
    ])  # fmt: skip
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked for")

    for name in ("socket.getaddrinfo", "socket.socket.connect"):
        monkeypatch.setattr(name, refuse)


def prompts(
    task: str, data: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[tuple]:
    """The (context, continuation) pairs of a task's first documents."""
    seen: list[tuple] = []
    original = harness.HarnessLM.loglikelihood

    def spy(self: harness.HarnessLM, asked: list[Instance], *rest: Any) -> list[tuple[float, bool]]:
        seen.extend(request.args for request in asked)
        return original(self, asked, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(harness.HarnessLM, "loglikelihood", spy)
        harness.evaluate(model, [task], data=data, **options)
    return seen


def test_every_task_runs_over_a_folder_as_the_harness_would(
    make, llama: HFLM, data: Path, tmp_path: Path, no_network
) -> None:
    from lm_eval.evaluator import evaluate as run_harness
    from lm_eval.tasks import TaskManager

    from transnormer.evaluation.harness import _quiet

    result = harness.evaluate(make("softmax"), list(TASKS), data=data)
    harness.write_tasks(tmp_path / "tasks", data)
    manager = TaskManager(include_defaults=False, include_path=tmp_path / "tasks")
    with _quiet():
        loaded = manager.load([name for name, *_ in TASKS.values()])
        theirs = run_harness(llama, loaded, bootstrap_iters=0, log_samples=False)["results"]
    ours = result["results"]
    assert (
        ours.keys()
        == theirs.keys()
        >= {"mmlu", "mmlu_stem", "mmlu_professional_law", "cmmlu", "cmmlu_virology"}
    )
    for name in ours:
        scores = [key for key in ours[name] if "," in key and "stderr" not in key]
        assert scores
        assert [ours[name][key] for key in scores] == pytest.approx(
            [theirs[name][key] for key in scores], rel=1e-3
        )
    documents = {
        name: sum(
            count["effective"]
            for task, count in result["n-samples"].items()
            if task.startswith(name)
        )
        for name in ("mmlu", "cmmlu")
    }
    assert documents == {"mmlu": 12, "cmmlu": 8}
    assert {
        result["n-samples"][TASKS[task][0]]["effective"] for task in TASKS if "mmlu" not in task
    } == {6}
    assert result["transnormer"]["notes"] == [
        "arc_easy: validation stands for test, which the data does not have",
        "arc_challenge: validation stands for test, which the data does not have",
        "openbookqa: validation stands for test, which the data does not have",
        "mmlu: 3 of 57 subjects are in the data",
        "cmmlu: 2 of 67 subjects are in the data",
        "sciq: validation stands for test, which the data does not have",
    ]
    rows = harness.table(result)
    named = {row[0] for row in rows}
    assert {
        "social_iqa",
        "mmlu",
        "mmlu_stem",
        "mmlu_humanities",
        "cmmlu",
        "lambada_openai",
    } <= named
    # no documents; parts of a group
    assert not {"mmlu_social_sciences", "mmlu_anatomy", "cmmlu_arts"} & named
    assert ("mmlu", "2", "test", "12", "0", "acc") in {row[:6] for row in rows}
    json.dumps(result)


def test_prompts_and_answers_are_the_harness_own(
    make, data: Path, monkeypatch: pytest.MonkeyPatch, no_network
) -> None:
    model = make("linear")
    asked = prompts("boolq", data, model, monkeypatch, limit=1)
    assert asked == [
        ("The number is 0.\nQuestion: is 0 even?\nAnswer:", answer) for answer in (" no", " yes")
    ]
    asked = prompts("hellaswag", data, model, monkeypatch, limit=1)
    assert asked[0] == ("Sailing: A man boards boat 0. He", " sails away. home.")
    asked = prompts("winogrande", data, model, monkeypatch, limit=1)
    assert asked[0] == ("The 0 dogs chased the cats because dogs", " were fast.")
    asked = prompts("mmlu_astronomy", data, model, monkeypatch, limit=1, shots=2)
    options = "A. one\nB. two\nC. three\nD. four\nAnswer:"
    context = "The following are multiple choice questions (with answers) about astronomy.\n\n"
    context += (
        f"dev astronomy 0?\n{options} A\n\ndev astronomy 1?\n{options} B\n\ntest astronomy "
        f"0?\n{options}"
    )
    assert asked == [(context, f" {letter}") for letter in "ABCD"]
    asked = prompts("cmmlu_arts", data, model, monkeypatch, limit=1, shots=1)
    assert asked[0][0].endswith(
        "arts第0题是\nA. 甲0\nB. 乙\nC. 丙\nD. 丁\n答案： A\n\n"
        "arts第0题是\nA. 甲0\nB. 乙\nC. 丙\nD. 丁\n答案："
    )
    asked = prompts("lambada_openai", data, model, monkeypatch, limit=1)
    assert asked == [("He had 0 dogs and loved every", " dog")]


def test_examples_from_the_split_under_test_leave_the_question_out(
    make, data: Path, monkeypatch
) -> None:
    for task, word in (
        ("piqa", "Cook {} eggs"),
        ("arc_easy", "colour is {}?"),
        ("lambada_openai", "had {} dogs"),
    ):
        asked = prompts(task, data, make("linear"), monkeypatch, shots=5)
        contexts = list(dict.fromkeys(context for context, _ in asked))
        assert len(contexts) == 6
        for context, n in itertools.product(contexts, range(6)):
            assert context.count(word.format(n)) == 1  # five others and itself
        with pytest.raises(ValueError, match="6 examples are asked for, but there are 5"):
            harness.evaluate(make("linear"), [task], data=data, shots=6)


def test_right_answers_count(make, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knows each document's answer has all points: labels of every format mean what they
    should."""
    colours, letters = ("red", "green", "blue", "grey"), "ABCD"
    right = {
        "boolq": lambda n: (" no", " yes")[n % 2 == 0],
        "piqa": lambda n: (" Boil them.", " Paint them blue.")[n % 2],
        "siqa": lambda n: (" happy", " sad", " old")[n % 3],
        "hellaswag": lambda n: (
            " sails away. home.",
            " sinks.",
            " eats the boat.",
            " sings a song.",
        )[n % 4],
        "winogrande": lambda n: ("dogs were fast.", "cats were fast.")[n % 2],
        "sciq": lambda n: " a number",
        "lambada_openai": lambda n: " dog",
    }
    right |= dict.fromkeys(
        ("arc_easy", "arc_challenge", "openbookqa"), lambda n: " " + colours[n % 4]
    )
    right |= dict.fromkeys(("mmlu", "cmmlu"), lambda n: " " + letters[n % 4])
    assert right.keys() == TASKS.keys()
    for task, answer in right.items():

        def know(
            self: harness.HarnessLM, asked: list[Instance], answer: Callable[[int], str] = answer
        ) -> list:
            answers = [answer(int(re.findall(r"\d+", request.args[0])[-1])) for request in asked]
            matches = [
                "".join(request.args).endswith(word)
                for request, word in zip(asked, answers, strict=True)
            ]
            assert {True} <= set(matches) <= {True, False}
            return [(0.0, True) if match else (-9.0, False) for match in matches]

        with monkeypatch.context() as patch:
            patch.setattr(harness.HarnessLM, "loglikelihood", know)
            result = harness.evaluate(make("linear"), [task], data=data)
        assert result["results"][TASKS[task][0]]["acc,none"] == 1, task


@pytest.mark.parametrize(
    ("tasks", "files", "options", "message"),
    [
        (["piqua"], {}, {}, "no task 'piqua'.*did you mean piqa?"),
        (["piqa", "boolq"], {}, {}, "nothing of task boolq; wanted is boolq.jsonl.gz"),
        (["mmlu_virology"], {}, {}, "no task 'mmlu_virology' over"),
        (["boolq"], {"boolq.jsonl.gz": b"no gzip"}, {}, "boolq.jsonl.gz: cannot be read as gzip"),
        (
            ["boolq"],
            {"boolq.jsonl.gz": gzip.compress(b"{}\n" * 999)[:-12]},
            {},
            "boolq.jsonl.gz: cannot be read as gzip",
        ),
        (
            ["boolq"],
            {"boolq.jsonl": b"{}\n"},
            {},
            "boolq.jsonl line 1: no field question, passage, label",
        ),
        (
            ["boolq"],
            {"boolq.jsonl": b"\n[1]\n"},
            {},
            "boolq.jsonl line 2: not a JSON object but list",
        ),
        (["boolq"], {"boolq.jsonl": b"{,}\n"}, {}, "boolq.jsonl line 1: not JSON"),
        (["boolq"], {"boolq.jsonl": b"\n"}, {}, "boolq.jsonl: the file is empty"),
        (
            ["piqa"],
            {"piqa.validation.jsonl": b"{}"},
            {},
            "piqa.validation.jsonl: a second file of the same split",
        ),
        (["piqa"], {"piqa.jsonl": b"x" * 5_000}, {}, "piqa.jsonl: holds more than 4,000 bytes"),
        (
            ["piqa"],
            {"piqa.jsonl": None},
            {},
            "piqa.train.jsonl|has no validation split, only train",
        ),
        (["cmmlu"], {"cmmlu.tar.gz": b"no archive"}, {}, "cmmlu.tar.gz: cannot be read"),
        (["piqa"], {}, {"shots": -1}, "shots must be 0 or more; got -1"),
        (["piqa"], {}, {"limit": 0}, "limit must be 1 or more; got 0"),
        (["piqa"], {}, {"batch_tokens": 0}, "batch_tokens must be 1 or more"),
        (["piqa"], {}, {"max_length": 2}, "cannot be scored"),
    ],
)
def test_what_is_wrong_is_named(
    make, data: Path, tmp_path: Path, monkeypatch, tasks, files, options, message
) -> None:
    (tmp_path / "piqa.jsonl").write_bytes((data / "piqa.jsonl").read_bytes())
    for name, content in files.items():
        if content is None:
            (tmp_path / name).rename(tmp_path / "piqa.train.jsonl")
        else:
            (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(documents, "FILE_BYTES", 4_000)
    with pytest.raises((ValueError, OSError), match=message) as error:
        harness.evaluate(make("linear"), tasks, data=tmp_path, **options)
    assert "\n" not in str(error.value)


def test_archives_are_read_within_limits_and_write_nowhere(
    make, tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    good = {"test/arts.csv": chinese("arts", 4), "dev/arts.csv": chinese("arts", 5)}
    strange = {
        "../../test/virology.csv": chinese("virology", 4),
        "test/._arts.csv": "\0",
        "elsewhere/x.csv": "x",
        "README": "x",
    }
    archive(folder / "cmmlu.tar.gz", good | strange)
    before = sorted(tmp_path.rglob("*"))
    result = harness.evaluate(make("linear"), ["cmmlu"], data=folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert result["n-samples"].keys() == {"cmmlu_arts", "cmmlu_virology"}
    archive(folder / "cmmlu.tar.gz", {"test/arts.csv": ",Question,A,B\n0,q,a,b\n"})
    with pytest.raises(
        ValueError, match=r"cmmlu.tar.gz: test/arts.csv document 1: no field C, D, Answer"
    ):
        harness.evaluate(make("linear"), ["cmmlu"], data=folder)
    archive(folder / "cmmlu.tar.gz", good | {f"test/{n}.csv": "" for n in range(7)})
    for name, limit in (("FILE_BYTES", 100), ("MEMBERS", 8)):
        with monkeypatch.context() as patch:
            patch.setattr(documents, name, limit)
            with pytest.raises(ValueError, match=f"holds more than .*{limit} "):
                harness.evaluate(make("linear"), ["cmmlu"], data=folder)
    harness.evaluate(make("linear"), ["cmmlu"], data=folder)


def test_the_verb(make, data: Path, tmp_path: Path) -> None:
    make("linear").save_pretrained(tmp_path / "model")
    verb = ("eval", "harness", "--model", tmp_path / "model", "--data", data)
    out, _ = call(*verb, "--tasks", "piqa, mmlu", "--shots", 2, "--out", tmp_path / "out.json")
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in out.splitlines()
        if "acc" in line
    ]
    assert [row[:6] for row in cells[:3]] == [
        ["piqa", "1.0", "validation", "6", "2", "acc"],
        ["piqa", "1.0", "validation", "6", "2", "acc_norm"],
        ["mmlu", "2", "test", "12", "2", "acc"],
    ]
    assert f"lm-eval {version('lm_eval')}" in out
    assert "mmlu: 3 of 57 subjects are in the data" in out
    saved = json.loads((tmp_path / "out.json").read_text())
    ran = saved["transnormer"]
    assert ran["model"] == str(tmp_path / "model")
    assert ran["command"][:3] == ["transnormer", "eval", "harness"]
    assert ran["parameters"] == make("linear").parameter_count()
    assert cells[0][6].startswith(f"{saved['results']['piqa']['acc,none']:.4f} ± ")
    out, _ = call(*verb, "--limit", 1)
    assert all(TASKS[task][0] in out for task in PAPER)
    assert "lambada" not in out
    with pytest.MonkeyPatch.context() as patch:  # known before the hours: nothing is evaluated
        patch.setattr("transnormer.evaluation.harness.evaluate", None)
        for path in (
            tmp_path / "nowhere" / "out.json",
            tmp_path,
            tmp_path / "out.json" / "more.json",
        ):
            assert f"{path}: cannot be written: " in refused(*verb, "--out", path)
    with pytest.MonkeyPatch.context() as patch:  # and a disk that is full after them costs no table

        def full(path: Path, text: str) -> None:
            raise OSError(f"{path}: cannot be written: No space left on device")

        patch.setattr("transnormer.files.write_text", full)
        out, error = call(
            *verb, "--tasks", "piqa", "--limit", 1, "--out", tmp_path / "new.json", code=1
        )
        assert "acc_norm" in out
        assert error == f"error: {tmp_path}/new.json: cannot be written: No space left on device\n"
    assert not (tmp_path / "new.json").exists()
    assert "out.json: a file, not a folder" in refused(
        *verb[:-1], tmp_path / "out.json", "--tasks", "piqa"
    )
    assert "did you mean hellaswag?" in refused(*verb, "--tasks", "helaswag")


def test_transformers_is_not_needed_and_nothing_else_is_printed(
    make, data: Path, tmp_path: Path
) -> None:
    make("linear").save_pretrained(tmp_path / "model")
    code = """if True:
        import sys

        class Absent:
            def find_spec(name, path=None, target=None):
                if name.partition(".")[0] == "transformers":
                    raise ModuleNotFoundError(f"No module named {name}")

        sys.meta_path.insert(0, Absent)
        from transnormer.cli import main
        main()
    """
    verb = (
        "eval",
        "harness",
        "--model",
        tmp_path / "model",
        "--data",
        data,
        "--tasks",
        "piqa,lambada_openai",
    )
    done = subprocess.run([sys.executable, "-c", code, *verb], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [word in done.stdout for word in ("piqa", "perplexity", "bootstrapping")] == [
        True,
        True,
        False,
    ]


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "transnormer.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused("eval", "harness", "--model", tmp_path)
    assert line.startswith("error: the harness needs lm-eval")
    assert line.endswith("pip install 'transnormer[eval]'")
