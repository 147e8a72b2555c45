"""lm-evaluation-harness over our own forward: the one door to `lm_eval`.

Prompts, tokens and metrics are the harness' own. Ours is the reading (`continuations.py`). Tasks
come from the network as usual, or over the files of a folder."""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from .. import __version__
from ..data.tokenizer import encode, end_of_text_id
from ..inference.engine import Engine
from ..inference.scheduler import RequestSettings
from ..layer_config import nearest
from ..model.language_model import LanguageModel
from .continuations import STATE_BYTES, Request, score_requests
from .documents import PAPER, SPLITS, TASKS, Splits, read_documents

try:
    import datasets
    import lm_eval
    import lm_eval.tasks
    import lm_eval.utils
    import tqdm
    from lm_eval.api import metrics as harness_metrics
    from lm_eval.api import task as harness_task
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate as run_harness
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import (
        get_rolling_token_windows,
        handle_non_serializable,
        make_disjoint_window,
    )
except ImportError as error:
    raise ImportError(
        f"the harness needs lm-eval ({error}): pip install 'transnormer[eval]'"
    ) from error

BATCH_TOKENS = 8_192
TEXTS = 512  # to encode at a time: the library keeps some 100 bytes a character
SLOTS = 256  # texts written at a time at most, because the logits of all are held
NEW_TOKENS = 256  # where a task does not say how many to write; the harness' own number, as is
SEED = 1234  # which draws the examples of prompts
RESAMPLES = 1_000  # for the standard error of a metric without a formula: LAMBADA's perplexity


class HarnessLM(TemplateLM):
    """A LanguageModel with its tokenizer, as the harness wants models.

    batch_tokens: how many are read at a time. max_length: of a longer prompt only the last so many
    tokens are read, as the harness' `hf` backend does at 2,048; None reads all of it (learned
    positions end where their table does).
    progress: called with (tokens read, tokens in all), or texts where texts are written.
    Raises ValueError where the model has no tokenizer.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        super().__init__()
        if model.tokenizer is None:
            raise ValueError("the model's folder has no tokenizer, so it cannot read text")
        for name, value in (("batch_tokens", batch_tokens), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more; got {value}")
        if model.config.position == "ape":
            table = model.config.max_position_embeddings
            max_length = min(max_length or table, table)
        self.model, self.tokenizer = model, model.tokenizer
        self.batch_tokens, self.max_length, self.progress = batch_tokens, max_length, progress

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without a prompt: the end of the text before it, as in
        training."""
        end = end_of_text_id(self.tokenizer)
        end = self.model.config.eos_token_id if end is None else end
        if end is None:
            raise ValueError(
                "the tokenizer has no end-of-text token, which stands before a text without a "
                "prompt"
            )
        return end

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return encode(self.tokenizer, string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Per (context, continuation): log-probability of the continuation in nats, and whether
        greedy writes it.

        The continuation's tokens are those by which the whole text is longer than its context,
        blanks at whose end belong to the continuation: the harness' own rule, with many texts
        encoded at a time."""
        asked = []
        for start in range(0, len(requests), TEXTS):
            pairs = [request.args for request in requests[start : start + TEXTS]]
            texts = list(
                {text for context, more in pairs for text in (context.rstrip(), context + more)}
            )
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = {text: encoding.ids for text, encoding in zip(texts, encoded, strict=True)}
            for context, more in pairs:
                before, whole = ids[context.rstrip()], ids[context + more]
                if context == "":  # the prefix token stands for it, once
                    before = [self.prefix_token_id]
                    whole = whole if whole[:1] == before else before + whole
                asked.append(((context, more), before, whole[len(before) :]))
        return self._loglikelihood_tokens(asked)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Per (text,): its log-probability in nats, after the prefix token.

        The state is carried from the first token to the last; with max_length, a longer text is
        read in windows, as the `hf` backend does."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            length = self.max_length or max(len(ids), 1)
            for window in get_rolling_token_windows(
                ids, self.prefix_token_id, length, context_len=1
            ):
                windows.append((("", ""), *make_disjoint_window(window)))
                owners.append(number)
        scores = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            scores[owner] += score
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Per (context, settings): the text that follows, up to a stop string."""
        if not requests:
            return []
        asked = [self._asked(*request.args) for request in requests]
        longest = max(len(ids) + each.max_tokens for ids, each in asked)
        state = self.model.config.state_bytes(longest, self.model.head_weight.element_size())
        slots = max(1, min(len(requests), SLOTS, STATE_BYTES // state))
        engine = Engine(self.model, slots=slots, capacity=longest, piece=self.batch_tokens)
        results = engine.generate([ids for ids, _ in asked], [s for _, s in asked], self.progress)
        if error := next((result.error for result in results if result.error), None):
            raise ValueError(error)
        return [result.text for result in results]

    def _asked(self, context: str, given: dict[str, Any]) -> tuple[list[int], RequestSettings]:
        """The tokens to go on from, and how, as a task of the harness says it."""
        settings = normalize_gen_kwargs(given, NEW_TOKENS)
        stop, max_tokens = settings.pop("until", None) or (), settings.pop("max_gen_toks")
        drawn = settings.pop("do_sample", False)
        wanted = RequestSettings(
            max_tokens=max_tokens,
            temperature=settings.pop("temperature", 1.0) if drawn else 0.0,
            top_k=settings.pop("top_k", 0),
            top_p=settings.pop("top_p", 1.0),
            seed=SEED,
            stop=stop,
        )
        if unknown := ", ".join(sorted(settings.keys() - {"temperature"})):
            raise ValueError(f"a task sets {unknown} for generation, which is not known here")
        ids = self.tok_encode(context) or [self.prefix_token_id]
        if (most := self.max_length) is not None:
            if max_tokens >= most:
                raise ValueError(f"max_length {most} leaves no prompt before {max_tokens} new ones")
            ids = ids[max_tokens - most :]
        return ids, wanted

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._request(number, *request) for number, request in enumerate(requests)]
        return score_requests(self.model, asked, self.batch_tokens, self.progress)

    def _request(
        self, number: int, texts: tuple[str, str], context: list[int], continuation: list[int]
    ) -> Request:
        tokens = [*context, *continuation]
        if self.max_length is not None:
            tokens = tokens[-self.max_length - 1 :]
        if not 0 < len(continuation) < len(tokens):
            raise ValueError(
                f"{texts[1]!r} makes {len(continuation)} tokens of {len(tokens)}: it cannot be "
                "scored"
            )
        return Request(number, np.array(tokens, dtype=np.int64), len(tokens) - len(continuation))


# Tasks over a data folder.


def write_tasks(
    folder: str | Path, data: str | Path, tasks: Sequence[str] = tuple(TASKS)
) -> list[str]:
    """Write task files into `folder`: the harness' own, with documents from the folder `data`.

    data: <task>.jsonl.gz or <task>.<split>.jsonl.gz (or .jsonl; without a split: validation), where
        task is a word of TASKS and the fields are those of the Hugging Face data sets; CMMLU as
        cmmlu.tar.gz of <split>/<subject>.csv.
    tasks: words of TASKS; those that `data` has nothing of get no file. Returns what differs from
    the harness' own tasks, in words. `lm_eval --include_path` reads the files, too. Raises
    ValueError or OSError that names the file and what is wrong with it."""
    if not Path(data).is_dir():
        what = "a file, not a folder with documents" if Path(data).exists() else "no such folder"
        raise FileNotFoundError(f"{data}: {what}")
    data, folder = Path(data).resolve(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        note
        for task in tasks
        for note in _write_task(folder, data, task, read_documents(data, task))
    ]


def _write_task(folder: Path, data: Path, task: str, splits: Splits) -> list[str]:
    """The file of one task, or those of a group with a task per subject."""
    if not splits:
        return []
    index = _manager([task]).task_index
    configs = {name: entry.cfg for name, entry in index.items() if entry.cfg}  # tags have none
    children = {name: sorted(entry.tags) for name, entry in index.items() if not entry.cfg}
    children |= {name: config["task"] for name, config in configs.items() if "group" in config}
    subjects = {TASKS[task][0]: ""}
    if TASKS[task][0] in children:
        subjects = {
            name: config["dataset_name"] for name, config in configs.items() if name not in children
        }
    there = {subject for documents in splits.values() for subject in documents}
    written = [name for name, subject in subjects.items() if subject in there]
    notes = [
        f"{task}: the harness knows no subject {subject}"
        for subject in sorted(there - set(subjects.values()))
    ]
    if len(written) < len(subjects):
        notes.append(f"{task}: {len(written)} of {len(subjects)} subjects are in the data")
    for name in written:
        has = [split for split in SPLITS if splits.get(split, {}).get(subjects[name])]
        own = configs[name].get("test_split") or configs[name].get("validation_split")
        split = next((split for split in (own, "validation", "test") if split in has), None)
        if split is None:
            raise ValueError(f"{data}: {name} has no {own} split, only {', '.join(has)}")
        if (
            split != own
            and (note := f"{task}: {split} stands for {own}, which the data does not have")
            not in notes
        ):
            notes.append(note)
        examples = (configs[name].get("fewshot_split"), configs[name].get("training_split"), split)
        changes = {
            "include": str(index[name].yaml_path),
            "dataset_kwargs": {"data": str(data), "task": task, "subject": subjects[name]},
            "training_split": None,
            "validation_split": None,
            "test_split": split,
            # of the split under test, the harness leaves the question itself out of the examples
            "fewshot_split": next(split for split in examples if split in has),
        }
        _write_yaml(
            folder / f"{name}.yaml",
            changes,
            f"custom_dataset: !function {__name__}.{read_splits.__name__}",
        )

    def exists(name: str) -> bool:
        return name in written or any(map(exists, children.get(name, ())))

    for name in children.keys() & configs.keys():
        if kept := [child for child in children[name] if exists(child)]:
            _write_yaml(
                folder / f"{name}.yaml", {"include": str(index[name].yaml_path), "task": kept}
            )
    return notes


def _write_yaml(path: Path, values: dict[str, Any], *more: str) -> None:
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]  # JSON is YAML
    path.write_text("\n".join([*lines, *more, ""]), encoding="utf-8")


def read_splits(*, data: str, task: str, subject: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents of one task, as its file asks for them; the harness hands in the task's
    metadata as well."""
    splits = read_documents(Path(data), task)
    return {
        split: datasets.Dataset.from_list(found[subject])
        for split, found in splits.items()
        if found.get(subject)
    }


# Running.


def evaluate(
    model: LanguageModel,
    tasks: Sequence[str] = PAPER,
    *,
    data: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks: words of TASKS, or any task, group or tag of the harness.

    data: a folder with the documents, as in `write_tasks`; None lets the harness fetch them from
        the Hugging Face Hub.
    shots: examples before each question; None leaves it to the task. limit: the first so many
        documents of each task.
    batch_tokens, max_length, progress: as in `HarnessLM`. Returns the harness' results as plain
    values, and under "transnormer" what ran: versions, settings, notes. Raises ValueError or
    OSError, in one line, for what the caller can mend."""
    for name, value, least in (("shots", shots, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more; got {value}")
    lm = HarnessLM(model, batch_tokens=batch_tokens, max_length=max_length, progress=progress)
    began = time.perf_counter()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        read_documents.cache_clear()
        notes = [] if data is None else write_tasks(folder, data, _words(tasks))
        manager = (
            _manager(tasks)
            if data is None
            else TaskManager(include_defaults=False, include_path=folder)
        )
        names = [name for task in tasks for name in _find(task, manager, data)]
        loaded = _load(list(dict.fromkeys(names)), manager, shots)
        found = run_harness(lm, loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
        read_documents.cache_clear()
    result: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    for config in result["configs"].values():
        config.pop("custom_dataset", None)  # the text of a function of ours
    result["transnormer"] = {
        "version": __version__,
        "lm_eval": lm_eval.__version__,
        "torch": torch.__version__,
        "tasks": names,
        "data": None if data is None else str(data),
        "shots": shots,
        "limit": limit,
        "batch_tokens": batch_tokens,
        "max_length": lm.max_length,
        "parameters": model.parameter_count(),
        "dtype": str(model.head_weight.dtype).removeprefix("torch."),
        "device": str(model.device),
        "seconds": round(time.perf_counter() - began, 1),
        "notes": notes,
    }
    return result


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """What `evaluate` returned, in rows of (task, version, split, documents, shots, metric,
    value)."""
    groups = result["group_subtasks"]
    lines: list[tuple[str, ...]] = []
    waiting = result["transnormer"]["tasks"][::-1]
    while waiting:
        name = waiting.pop()
        values = result["results"].get(name, {})
        scores = [key for key in values if "," in key and "_stderr," not in key]
        waiting += [child for child in groups.get(name, ())[::-1] if child in groups or not scores]
        leaf = name
        while leaf in groups:
            leaf = groups[leaf][0]
        config = result["configs"][leaf]
        split = config.get("test_split") or config.get("validation_split")
        for key in scores:
            metric, filtered = key.split(",", 1)
            value, error = (_rounded(values.get(k)) for k in (key, f"{metric}_stderr,{filtered}"))
            lines.append(
                (
                    name,
                    f"{result['versions'].get(name, '')}",
                    f"{split}",
                    f"{values['sample_len']:,}",
                    f"{result['n-shot'][leaf]}",
                    metric if filtered == "none" else f"{metric} ({filtered})",
                    value if error in ("", "N/A") else f"{value} ± {error}",
                )
            )
    return lines


def _rounded(value: float | str | None) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def _manager(tasks: Sequence[str]) -> TaskManager:
    """The harness' tasks: those of our words quickly, or everything it has, which takes some ten
    seconds."""
    root = Path(lm_eval.tasks.__path__[0])
    quick = TaskManager(
        include_defaults=False, include_path=[root / TASKS[word][1] for word in _words(tasks)]
    )
    return quick if all(_name(task) in quick.task_index for task in tasks) else TaskManager()


def _words(tasks: Sequence[str]) -> list[str]:
    """The words of TASKS that these tasks seem to belong to."""
    return [
        word
        for word in TASKS
        if any(_name(t) == TASKS[word][0] or t.startswith(f"{word}_") for t in tasks)
    ]


def _name(task: str) -> str:
    """The harness' name of a task."""
    return TASKS[task][0] if task in TASKS else task


def _find(task: str, manager: TaskManager, data: str | Path | None) -> list[str]:
    """The harness' names of a task, group or tag."""
    entry = manager.task_index.get(_name(task))
    if entry is not None:
        return [_name(task)] if entry.cfg else sorted(entry.tags)
    if data is not None and task in TASKS:
        file = "cmmlu.tar.gz" if task == "cmmlu" else f"{task}.jsonl.gz or {task}.<split>.jsonl.gz"
        raise FileNotFoundError(f"{data}: nothing of task {task}; wanted is {file}")
    known = [*TASKS, *manager.all_tasks]
    where = "" if data is None else f" over {data}"
    raise ValueError(
        f"no task {task!r}{where}{nearest(task, known) or '; there are ' + ', '.join(TASKS)}"
    )


def _load(names: list[str], manager: TaskManager, shots: int | None) -> Any:
    """The tasks with their documents, ready to run with so many examples."""
    try:
        loaded = manager.load(names)
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"documents cannot be fetched ({reason}); --data names a folder with them"
        ) from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        count = own or 0 if shots is None or own == 0 else shots  # a task that says 0 means it
        task.set_config("num_fewshot", count)
        task.set_fewshot_seed(SEED)
        if sampler := getattr(task, "sampler", None):
            there = len(sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
            if count > there:
                raise ValueError(f"{name}: {count} examples are asked for, but there are {there}")
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness draws a bar a task, prints, starts a process a core, and compiles a template anew
    for each document.

    It has no other switch for that.
    """
    silent, templates = functools.partial(tqdm.tqdm, disable=True), lm_eval.utils.env
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with (
            patch.object(tqdm, "tqdm", silent),
            patch.object(harness_task, "tqdm", silent),
            patch.object(
                templates, "from_string", functools.lru_cache(1_024)(templates.from_string)
            ),
            patch.object(harness_metrics, "print", lambda *_: None, create=True),
            patch.dict(os.environ, DISABLE_MULTIPROC="1"),
        ):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
