"""docs/results.md and its pictures, made of experiments/results alone: python experiments/report.py"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import numpy as np
from corpus import WIKITEXT
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

from transnormer.files import write_text

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
RESULTS = HERE / "results"
BITS = math.log(2)  # nats
WORDS = {f"wikitext-{part}": words for part, (_, words) in WIKITEXT.items()}
Setting = tuple[str, int, str]  # size, tokens, optimizer
TABLES: dict[str, Any] = arms.TABLES["tables"]

INTRODUCTION = """# Results: quality

Each cell is the mean over seeds, with the standard deviation between seeds where there are several. **Loss** is nats a
token on held-out text, **BPB** bits per byte, **WikiText-103** perplexity per word by the official word counts: models
here have not been trained on WikiText, so that figure compares them with each other and with nothing published.
Every row of every arm, and every window that is scored, begins from an empty state. The **difference** to the first
arm is a mean over pairs of runs with equal seeds (equal initial weights by name, equal data in equal order), with its
95 % t interval; *p* is two-sided and corrected by Holm's method over the table. Where the interval holds 0 or *p* is
not below 0.05, the arms are not distinguishable. Tables that explore use seeds below 11 and never read the test part.

Arms are described in `experiments/tables.toml`; all have the parameters of `published` within 0.5 %, by the width of
the GLU, except those called *fewer*. What was decided before the runs, and what went wrong, is in
[experiments/LOG.md](../experiments/LOG.md).
"""


@dataclass(frozen=True)
class Difference:
    """Of one arm to the reference, over paired seeds: mean, half the width of its 95 % interval, p before correction."""

    mean: float
    half: float
    p: float
    pairs: int


def paired(ours: dict[int, float], reference: dict[int, float]) -> Difference | None:
    """The difference ours - reference over the seeds that both have; None with fewer than two."""
    seeds = sorted(ours.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    differences = [ours[seed] - reference[seed] for seed in seeds]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(seeds))
    half = float(stats.t.ppf(0.975, len(seeds) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(seeds) - 1)) if error else float(mean == 0)
    return Difference(mean, half, p, len(seeds))


def holm(values: list[float]) -> list[float]:
    """p values corrected for being several: each times the number of those not smaller, never falling."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda one: values[one])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def spread(values: list[float], digits: int = 3) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def per_word(record: dict[str, Any], part: str) -> float | None:
    found = record["scores"].get(part)
    return math.exp(found["nats"] / WORDS[part]) if found else None


def of_table(name: str, results: list[dict[str, Any]]) -> dict[Setting, dict[str, list[dict[str, Any]]]]:
    """The results that a table is made of, by setting and arm. A run serves every table that asks for it."""
    entry = TABLES[name]
    found: dict[Setting, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in results:
        exploring = record["seed"] < arms.CONFIRMING_SEED
        if record["arm"] in entry["arms"] and exploring == bool(entry.get("exploring")):
            found[record["size"], record["tokens"], record["optimizer"]][record["arm"]].append(record)
    return {setting: dict(by_arm) for setting, by_arm in found.items()}


def compare(name: str, setting: Setting, by_arm: dict[str, list[dict[str, Any]]]) -> str:
    """One table of arms, with differences to its first arm."""
    entry = TABLES[name]
    present = [arm for arm in entry["arms"] if arm in by_arm]
    part = "valid" if entry.get("exploring") else "test"
    losses = {arm: {r["seed"]: r["scores"][part]["loss"] for r in by_arm[arm]} for arm in present}
    reference = losses.get(entry["arms"][0], {})
    found = {arm: paired(losses[arm], reference) for arm in present[1:]}
    known = {arm: difference for arm, difference in found.items() if difference is not None}
    corrected = dict(zip(known, holm([each.p for each in known.values()]), strict=True))
    paper: dict[str, float] = entry.get("paper", {})
    rows = []
    for arm in present:
        runs, difference = by_arm[arm], known.get(arm)
        words = [value for r in runs if (value := per_word(r, f"wikitext-{part}")) is not None]
        verdict = ""
        if difference is not None:
            share = 100 * difference.mean / statistics.fmean(reference.values())
            clear = corrected[arm] < 0.05 and abs(difference.mean) > difference.half
            verdict = f"{difference.mean:+.3f} ± {difference.half:.3f} ({share:+.1f} %), p {corrected[arm]:.2g}"
            verdict += "" if clear else ": not distinguishable"
        theirs = ""
        if arm in paper:
            away = paper[arm] - paper[entry["arms"][0]]
            theirs = f"{paper[arm] * BITS:.3f}" + (f" ({100 * away / paper[entry['arms'][0]]:+.1f} %)" if away else "")
        rows.append([
            arm, str(len(runs)), f"{runs[0]['parameters'] / 1e6:.2f}M", f"{runs[0]['lr']:g}", spread([r["valid_loss"] for r in runs]),
            spread([r["test_loss"] for r in runs if r["test_loss"]]) if any(r["test_loss"] for r in runs) and part == "test" else "–",
            spread([r["bits_per_byte"] for r in runs], 4), spread(words, 1) if words else "–",
            f"{runs[0]['state_bytes'] / 2**20:.1f}", str(sum(r["refused"] for r in runs)), verdict or "–", *([theirs or "–"] if paper else []),
        ])  # fmt: skip
    head = [
        "arm",
        "seeds",
        "parameters",
        "rate",
        "valid",
        "test",
        "BPB",
        f"WikiText-103 {part}",
        "state, MiB",
        "refused",
        f"difference ({part})",
    ]
    return markdown([*head, *(["paper, nats"] if paper else [])], rows)


def rates(by_setting: dict[Setting, dict[str, list[dict[str, Any]]]]) -> str:
    """Loss by rate for each family, and whether the best lies inside its grid."""
    rows = []
    for (size, tokens, optimizer), by_arm in sorted(by_setting.items()):
        for arm, runs in by_arm.items():
            family = arms.TABLES["arms"][arm]["family"]
            grid = TABLES["rates"]["grid"].get(optimizer, {}).get(family, [])
            found = {r["lr"]: r["valid_loss"] for r in runs if r["seed"] == 0 and r["lr"] in grid}
            if not found:
                continue
            best = min(found, key=lambda lr: found[lr])
            inside = len(found) == len(grid) and best not in (min(grid), max(grid))
            cells = ", ".join(
                f"{lr:g}: {'**' * (lr == best)}{loss:.4f}{'**' * (lr == best)}" for lr, loss in sorted(found.items())
            )
            verdict = (
                "inside" if inside else "grid not complete" if len(found) < len(grid) else "at its edge: to be widened"
            )
            rows.append([size, f"{tokens / 1e6:.0f}M", optimizer, family, cells, verdict])
    return markdown(["size", "tokens", "optimizer", "family", "validation loss by rate", "the best is"], rows)


def picture(name: str, by_arm: dict[str, list[dict[str, Any]]], title: str) -> str:
    """Loss by position and the curve of training, a line an arm, as docs/results-<name>.png."""
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    curve, place = figure.subplots(1, 2)
    for arm, runs in by_arm.items():
        length = arms.TABLES["recipe"]["train.seq_len"]
        losses = np.mean([r["scores"]["valid"]["loss_by_position"] for r in runs], axis=0)
        place.plot(np.arange(1, len(losses) + 1) * length / len(losses), losses, label=arm)
        points = np.mean([r["valid_curve"] for r in runs], axis=0)
        curve.plot(points[1:, 0], points[1:, 1], marker="o", markersize=3, label=arm)
    place.set(xlabel="position in the row", ylabel="loss (nats a token)", title="by position", xscale="log")
    curve.xaxis.set_major_formatter(EngFormatter())
    curve.set(xlabel="tokens read", ylabel="validation loss (nats a token)", title=title)
    for axes in (curve, place):
        axes.grid(alpha=0.3)
    place.legend(fontsize=8)
    figure.savefig(DOCS / f"results-{name}.png")
    return f"![{title}](results-{name}.png)"


def sources(by_arm: dict[str, list[dict[str, Any]]]) -> str:
    """Where the numbers of a table come from."""
    runs = list(itertools.chain.from_iterable(by_arm.values()))
    devices = ", ".join(sorted({r["device"] for r in runs}))
    commits = ", ".join(sorted({str(r["commit"])[:12] for r in runs}))
    versions = ", ".join(sorted({r["versions"]["torch"] for r in runs}))
    return (
        f"{len(runs)} runs; {devices}; torch {versions}; commit {commits}; files `experiments/results/*-ARM-SEED.json`."
    )


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    text = [INTRODUCTION]
    for name, entry in TABLES.items():
        by_setting = of_table(name, results)
        if name == "rates":
            text += [f"## {entry['title']}", rates(by_setting)]
            continue
        for setting, by_arm in sorted(by_setting.items()):
            size, tokens, optimizer = setting
            if name == "spread":  # one rate an arm, the table's own
                by_arm = {
                    arm: [r for r in runs if r["lr"] == arms.rate(size, optimizer, r["family"])]
                    for arm, runs in by_arm.items()
                }
            seeds = [len(runs) for runs in by_arm.values() if runs]
            if len(seeds) < 2 or (name == "spread" and max(seeds) < 2):
                continue
            title = f"{entry['title']}: {size}, {tokens / 1e6:.0f}M tokens, {optimizer}"
            text += [
                f"## {title}",
                picture(f"{name}-{size}-{optimizer}", by_arm, entry["title"]),
                compare(name, setting, by_arm),
            ]
            text += [sources(by_arm)]
    write_text(DOCS / "results.md", "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
