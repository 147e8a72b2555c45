"""The documents of benchmarks from files of a folder, within limits: nothing in them is run or
becomes a path."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.documents import json_objects

# Task -> (its name in the harness, its folder there, the fields of its documents in a data folder).
TASKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "boolq": ("boolq", "super_glue/boolq", ("question", "passage", "label")),
    "piqa": ("piqa", "piqa", ("goal", "sol1", "sol2", "label")),
    "siqa": (
        "social_iqa",
        "siqa",
        ("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
    "hellaswag": (
        "hellaswag",
        "hellaswag",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": ("winogrande", "winogrande", ("sentence", "option1", "option2", "answer")),
    "arc_easy": ("arc_easy", "arc", ("question", "choices", "answerKey")),
    "arc_challenge": ("arc_challenge", "arc", ("question", "choices", "answerKey")),
    "openbookqa": ("openbookqa", "openbookqa", ("question_stem", "choices", "answerKey")),
    "mmlu": ("mmlu", "mmlu/default", ("question", "subject", "choices", "answer")),
    "cmmlu": ("cmmlu", "cmmlu", ("Question", "A", "B", "C", "D", "Answer")),
    "lambada_openai": ("lambada_openai", "lambada", ("text",)),
    "sciq": (
        "sciq",
        "sciq",
        ("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
}
PAPER = tuple(task for task in TASKS if task not in ("lambada_openai", "sciq"))  # the paper's table
SPLITS = ("train", "validation", "test", "dev")
FILE_BYTES = 2**28  # of one file of a data folder, decompressed
MEMBERS = 1_000  # of an archive

# split -> subject ("" where a task has none) -> documents
Splits = dict[str, dict[str, list[dict[str, Any]]]]


@functools.cache
def read_documents(data: Path, task: str) -> Splits:
    """Split -> subject ("" where the task has none) -> documents, of what the folder has of a task:
    maybe nothing.

    Raises ValueError naming the file and line that cannot be used.
    """
    splits: Splits = {}
    if task == "cmmlu":
        return _archive(data / "cmmlu.tar.gz") if (data / "cmmlu.tar.gz").is_file() else splits
    for path in sorted(data.glob(f"{task}.*")):
        found = re.fullmatch(rf"{task}(?:\.({'|'.join(SPLITS)}))?\.jsonl(?:\.gz)?", path.name)
        if not found:
            continue
        documents = splits.setdefault(found[1] or "validation", {})
        if documents:
            raise ValueError(f"{path}: a second file of the same split")
        for where, document in _json_lines(path):
            if (
                task == "boolq"
                and "label" not in document
                and isinstance(document.get("answer"), bool)
            ):
                # SuperGLUE's field, made of BoolQ's own
                document["label"] = int(document["answer"])
            _require_fields(document, TASKS[task][2], where)
            documents.setdefault(document["subject"] if task == "mmlu" else "", []).append(document)
        if not documents:
            raise ValueError(f"{path}: the file is empty")
    return splits


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`json_objects` of a file of at most FILE_BYTES."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(FILE_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as gzip: {error}") from None
    if len(content) > FILE_BYTES:
        raise ValueError(f"{path}: holds more than {FILE_BYTES:,} bytes")
    return json_objects(path, content.split(b"\n"))


def _archive(path: Path) -> Splits:
    """CMMLU's tables, <split>/<subject>.csv in a tar.gz. They are read in memory: no name in it
    becomes a path."""
    splits: Splits = {}
    size, fields = 0, TASKS["cmmlu"][2]
    try:
        with tarfile.open(path, "r:gz") as archive:
            for number, member in enumerate(archive):
                size += member.size
                if size > FILE_BYTES or number >= MEMBERS:
                    raise ValueError(
                        f"{path}: holds more than {FILE_BYTES:,} bytes or {MEMBERS:,} files"
                    )
                *_, split, name = "", *member.name.split("/")
                if (
                    not member.isfile()
                    or split not in SPLITS
                    or not name.endswith(".csv")
                    or name.startswith(".")
                ):
                    continue
                table = archive.extractfile(member)
                assert table is not None  # it is a file
                reader = csv.DictReader(io.StringIO(table.read().decode("utf-8-sig"), newline=""))
                documents = [{key: row.get(key) for key in fields} for row in reader]
                for line, document in enumerate(documents, start=1):
                    _require_fields(document, fields, f"{path}: {member.name} document {line}")
                splits.setdefault(split, {})[name.removesuffix(".csv")] = documents
    except (
        tarfile.TarError,
        gzip.BadGzipFile,
        EOFError,
        zlib.error,
        csv.Error,
        UnicodeDecodeError,
    ) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return splits


def _require_fields(document: dict[str, Any], fields: Sequence[str], where: str) -> None:
    if missing := [name for name in fields if document.get(name) is None]:
        raise ValueError(f"{where}: no field {', '.join(missing)}; wanted are {', '.join(fields)}")
