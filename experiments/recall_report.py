"""What experiments/results/recall says, as the end of docs/results.md and two pictures."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

TITLES = {
    "associations": "Recall: associations (MQAR)",
    "copies": "Recall: copying",
}
INTRODUCTION = {
    "associations": "Rows begin with pairs of a key and a value, and ask for the value of each key "
    "later. A cell is the share of right answers at the most pairs, in rows as long as those of "
    "training and in longer ones, by the best of at most {rates} learning rates.",
    "copies": "Rows are random tokens, and then the same once more. A cell is the share of the "
    "second half that is told right, by the best of at most {rates} learning rates.",
}
ENOUGH = 0.9  # of right answers, which the Transformer must reach, or the task is too hard
Records = dict[tuple[str, int], list[dict[str, Any]]]  # of an arm and a width, one a rate


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the most right answers on average, among those of one arm and width."""
    return max(runs, key=lambda run: statistics.fmean(run["accuracy"].values()))


def asked(record: dict[str, Any]) -> list[str]:
    """The hardest of a record's questions at each length, in the order of training."""
    hardest: dict[str, str] = {}
    for question in record["accuracy"]:
        hardest[question.rpartition(", ")[2]] = question
    return list(hardest.values())


def table(found: Records) -> str:
    widths = sorted({width for _, width in found})
    names = sorted({arm for arm, _ in found})
    questions = asked(next(iter(found.values()))[0])
    head = ["arm", *(f"{width} wide: {q}" for width in widths for q in [*questions, "state, KiB"])]
    lines = [head, ["---"] * len(head)]
    for arm in names:
        cells = [arm]
        for width in widths:
            if (arm, width) not in found:
                cells += ["–"] * (len(questions) + 1)
                continue
            record = best(found[arm, width])
            cells += [f"{record['accuracy'][question]:.3f}" for question in questions]
            cells.append(f"{record['state_bytes'] / 1024:,.0f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def picture(task: str, found: Records, folder: Path) -> str:
    """Right answers against the bytes of the state, a line an arm and a point a width."""
    figure = Figure(figsize=(7.5, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = sorted({arm for arm, _ in found})
    for number, arm in enumerate(names):
        runs = [best(found[key]) for key in sorted(found) if key[0] == arm]
        shares = [run["accuracy"][asked(run)[0]] for run in runs]
        sizes = [run["state_bytes"] / 1024 for run in runs]
        color = colormaps["tab10" if len(names) <= 10 else "tab20"](number)
        axes.plot(sizes, shares, marker="o", color=color, label=arm)
    question = asked(next(iter(found.values()))[0])[0]
    axes.set(xlabel="state of a row, KiB", ylabel="right answers", title=question, xscale="log")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    file = f"results-recall-{task}.png"
    figure.savefig(folder / file)
    return f"![{TITLES[task]}]({file})"


def control(found: Records) -> str:
    """Whether the Transformer solves the task where it was trained, without which the others'
    failing says nothing."""
    runs = [best(found[key]) for key in sorted(found) if key[0] == "llama-scaled"]
    if not runs:
        return "The Transformer has not been asked, so that these figures say little yet."
    reached = [run["width"] for run in runs if run["accuracy"][asked(run)[0]] >= ENOUGH]
    where = f"at widths {', '.join(map(str, reached))} alone" if reached else "at no width"
    return (
        f"The control, `llama-scaled`, reaches {ENOUGH:.0%} at the length of training {where}: "
        "elsewhere the failing of others says nothing."
    )


def sections(results: Path, docs: Path) -> list[str]:
    """A title, what was asked, a picture and a table for every task that has results.

    results: the folder of one JSON a run; docs: where the pictures go."""
    tasks: dict[str, Records] = defaultdict(lambda: defaultdict(list))
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        tasks[record["task"]][record["arm"], record["width"]].append(record)
    text = []
    for task, found in sorted(tasks.items()):
        runs = [run for of_one in found.values() for run in of_one]
        rates, devices = max(map(len, found.values())), {run["device"] for run in runs}
        commits = {str(run["commit"])[:12] for run in runs}
        text += [
            f"## {TITLES[task]}",
            f"{INTRODUCTION[task].format(rates=rates)} {control(found)}",
            picture(task, found, docs),
            table(found),
            f"{len(runs)} runs; {', '.join(sorted(devices))}; commit {', '.join(sorted(commits))}; "
            f"files `experiments/results/recall/{task}-ARM-WIDTH-RATE.json`.",
        ]
    return text
