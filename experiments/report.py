"""docs/results.md and its pictures, made of experiments/results alone: python
experiments/report.py"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import numpy as np
import recall_report
import scaling
import sequences
from corpus import WIKITEXT
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from paired import Difference, holm, paired

from transnormer.files import write_text
from transnormer.planning.scaling import read_fits

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
RESULTS = HERE / "results"
BITS = math.log(2)  # nats
WORDS = {f"wikitext-{part}": words for part, (_, words) in WIKITEXT.items()}
Setting = tuple[str, int, str]  # size, tokens, optimizer
TABLES: dict[str, Any] = arms.TABLES["tables"]

INTRODUCTION = """# Results: quality

Each cell is the mean over seeds, with the standard deviation between seeds where there are several.
**Loss** is nats a token on held-out text, **BPB** bits per byte, **WikiText-103** perplexity per
word by the official word counts: models here have not been trained on WikiText, so that figure
compares them with each other and with nothing published. Every row of every arm, and every window
that is scored, begins from an empty state. The **difference** to the first arm, or to the arm that
is named, is a mean over pairs of runs with equal seeds (equal initial weights by name, equal data
in equal order), with its 95 % t interval; *p* is two-sided and corrected by Holm's method over the
table. Where the interval holds 0 or *p* is not below 0.05, the arms are not distinguishable. Tables
that explore use seeds below 11 and never read the test part.

Where the data are digits or speech, a token is a sample of 256 levels, and **bits a sample**, which
others call bits per dimension, are measured on the same part as the difference.

Arms are described in `experiments/tables.toml`; all have the parameters of `published` within 0.5
%, by the width of the GLU, except those called *fewer*. What was decided before the runs, and what
went wrong, is in [experiments/LOG.md](../experiments/LOG.md).
"""


def spread(values: list[float], digits: int = 3) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def per_word(record: dict[str, Any], part: str) -> float | None:
    found = record["scores"].get(part)
    return math.exp(found["nats"] / WORDS[part]) if found else None


def of_table(
    name: str, results: list[dict[str, Any]]
) -> dict[Setting, dict[str, list[dict[str, Any]]]]:
    """The results that a table is made of, by setting and arm. A run serves every table that asks
    for it."""
    entry = TABLES[name]
    # these have their runs for themselves
    alone = {other for other, table in TABLES.items() if "dtypes" in table}
    found: dict[Setting, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in results:
        exploring = record["seed"] < arms.CONFIRMING_SEED
        if record.get("dataset", "text") != entry.get("dataset", "text"):
            continue
        if name != record["table"] and alone & {name, record["table"]}:
            continue
        asked = record["arm"] in entry["arms"] and exploring == bool(entry.get("exploring"))
        if asked and ("grid" in entry or _has_chosen_rate(record)):
            found[record["size"], record["tokens"], record["optimizer"]][record["arm"]].append(
                record
            )
    # A table has no use for a setting in which only tables of several sizes have runs.
    several = {other for other, table in TABLES.items() if "sizes" in table}
    return {
        setting: dict(by_arm)
        for setting, by_arm in found.items()
        if any(r["table"] not in several for runs in by_arm.values() for r in runs)
    }


def _has_chosen_rate(record: dict[str, Any]) -> bool:
    """Whether a run has the learning rate that was chosen for its family, and not another one of
    the grid that it was chosen from. Where none was chosen, every run counts."""
    family = arms.TABLES["arms"][record["arm"]]["family"]
    dataset = record.get("dataset", "text")
    try:
        chosen = arms.rate(record["size"], record["optimizer"], family, dataset)
    except ValueError:
        return True
    return bool(record["lr"] == chosen)


@dataclass(frozen=True)
class Verdict:
    """What a table says of an arm beside another: their difference, p after correction, and the
    mean of the other."""

    difference: Difference
    p: float
    base: float

    @property
    def clear(self) -> bool:
        return self.p < 0.05 and abs(self.difference.mean) > self.difference.half

    @property
    def word(self) -> str:
        return (
            "not distinguishable from"
            if not self.clear
            else "worse than"
            if self.difference.mean > 0
            else "better than"
        )


def other(name: str, arm: str) -> str:
    """The arm that a table compares an arm with: its first, unless it names another."""
    return str(TABLES[name].get("against", {}).get(arm, TABLES[name]["arms"][0]))


def verdicts(name: str, by_arm: dict[str, list[dict[str, Any]]], part: str) -> dict[str, Verdict]:
    """Of every arm that has two seeds in common with the arm it is compared with."""
    losses = {
        arm: {r["seed"]: r["scores"][part]["loss"] for r in runs} for arm, runs in by_arm.items()
    }
    pairs = {
        arm: paired(found, losses.get(other(name, arm), {}))
        for arm, found in losses.items()
        if arm != other(name, arm)
    }
    known = {arm: difference for arm, difference in pairs.items() if difference is not None}
    corrected = holm([each.p for each in known.values()])
    bases = [statistics.fmean(losses[other(name, arm)].values()) for arm in known]
    return {
        arm: Verdict(known[arm], p, base)
        for arm, p, base in zip(known, corrected, bases, strict=True)
    }


def conclusion(name: str, found: dict[str, Verdict]) -> str:
    """One sentence for each arm: what these runs say of it, and whether the paper says so too."""
    paper: dict[str, float] = TABLES[name].get("paper", {})
    sentences = []
    for arm, verdict in found.items():
        share = f"{100 * verdict.difference.mean / verdict.base:+.1f} %"
        sentence = f"`{arm}` is {verdict.word} `{other(name, arm)}` ({share}"
        if arm in paper and other(name, arm) in paper:
            away = paper[arm] - paper[other(name, arm)]
            agrees = (
                "as in the paper, "
                if verdict.clear and away * verdict.difference.mean > 0
                else "in the paper "
            )
            sentence += f"; {agrees}{100 * away / paper[other(name, arm)]:+.1f} %"
        sentences.append(f"{sentence}).")
    return " ".join(sentences)


def _of_one_seed(name: str, arm: str, by_arm: dict[str, list[dict[str, Any]]], part: str) -> str:
    """The difference to the arm that is compared with where one seed is all that both have, which
    tells nothing of chance; otherwise a dash."""
    reference = other(name, arm)
    losses = [
        {r["seed"]: r["scores"][part]["loss"] for r in by_arm.get(each, [])}
        for each in (arm, reference)
    ]
    seeds = losses[0].keys() & losses[1].keys()
    if arm == reference or len(seeds) != 1:
        return "–"
    (seed,) = seeds
    ours, base = losses[0][seed], losses[1][seed]
    beside = "" if reference == TABLES[name]["arms"][0] else f" to {reference}"
    return f"{ours - base:+.3f}{beside} ({100 * (ours - base) / base:+.1f} %), one seed"


def compare(name: str, setting: Setting, by_arm: dict[str, list[dict[str, Any]]]) -> str:
    """One table of arms, with differences to its first arm or to those that it names, and what
    follows from them."""
    entry = TABLES[name]
    present = [arm for arm in entry["arms"] if arm in by_arm]
    part, text = "valid" if entry.get("exploring") else "test", "dataset" not in entry
    found = verdicts(name, {arm: by_arm[arm] for arm in present}, part)
    paper: dict[str, float] = entry.get("paper", {})
    rows = []
    for arm in present:
        runs, verdict = by_arm[arm], _of_one_seed(name, arm, by_arm, part)
        bits = [r["bits_per_byte"] if text else r["scores"][part]["bits_per_sample"] for r in runs]
        words = [value for r in runs if (value := per_word(r, f"wikitext-{part}")) is not None]
        speed = f"{statistics.median(r['tokens_per_second'] for r in runs) / 1e6:.2f}M"
        if arm in found:
            difference, clear = (
                found[arm].difference,
                "" if found[arm].clear else ": not distinguishable",
            )
            beside = "" if other(name, arm) == entry["arms"][0] else f" to {other(name, arm)}"
            share = f"{100 * difference.mean / found[arm].base:+.1f} %"
            verdict = (
                f"{difference.mean:+.3f} ± {difference.half:.3f}{beside} ({share}), p "
                f"{found[arm].p:.2g}{clear}"
            )
        theirs = ""
        if arm in paper:
            away = paper[arm] - paper[entry["arms"][0]]
            theirs = f"{paper[arm] * BITS:.3f}" + (
                f" ({100 * away / paper[entry['arms'][0]]:+.1f} %)" if away else ""
            )
        rows.append(
            [
                arm,
                str(len(runs)),
                f"{runs[0]['parameters'] / 1e6:.2f}M",
                f"{runs[0]['lr']:g}",
                spread([r["valid_loss"] for r in runs]),
                spread([r["test_loss"] for r in runs if r["test_loss"]])
                if any(r["test_loss"] for r in runs) and part == "test"
                else "–",
                spread(bits, 4),
                (spread(words, 1) if words else "–") if text else speed,
                f"{runs[0]['state_bytes'] / 2**20:.1f}",
                str(sum(r["refused"] for r in runs)),
                verdict,
                *([theirs or "–"] if paper else []),
            ]
        )
    head = [
        "arm",
        "seeds",
        "parameters",
        "rate",
        "valid",
        "test",
        "BPB" if text else "bits a sample",
        f"WikiText-103 {part}" if text else "tokens/s",
        "state, MiB",
        "refused",
        f"difference ({part})",
    ]
    table = markdown([*head, *(["paper, nats"] if paper else [])], rows)
    if not found:
        return table
    return f"{table}\n\n{textwrap.fill(conclusion(name, found), 120, break_on_hyphens=False)}"


def rates(name: str, by_setting: dict[Setting, dict[str, list[dict[str, Any]]]]) -> str:
    """Loss by rate for each family, and whether the best lies inside its grid."""
    rows = []
    for (size, tokens, optimizer), by_arm in sorted(by_setting.items()):
        for arm, runs in by_arm.items():
            family = arms.TABLES["arms"][arm]["family"]
            grid = TABLES[name]["grid"].get(optimizer, {}).get(family, [])
            found = {r["lr"]: r["valid_loss"] for r in runs if r["seed"] == 0 and r["lr"] in grid}
            # the others diverged
            known = {lr: loss for lr, loss in found.items() if loss is not None}
            if not known:
                continue
            best = min(known, key=lambda lr: known[lr])
            inside = len(found) == len(grid) and best not in (min(grid), max(grid))
            cells = ", ".join(
                f"{lr:g}: "
                + (
                    "diverged"
                    if loss is None
                    else f"{'**' * (lr == best)}{loss:.4f}{'**' * (lr == best)}"
                )
                for lr, loss in sorted(found.items())
            )
            verdict = (
                "inside"
                if inside
                else "grid not complete"
                if len(found) < len(grid)
                else "at its edge: to be widened"
            )
            rows.append([size, f"{tokens / 1e6:.0f}M", optimizer, family, cells, verdict])
    return markdown(
        ["size", "tokens", "optimizer", "family", "validation loss by rate", "the best is"], rows
    )


def picture(name: str, setting: Setting, by_arm: dict[str, list[dict[str, Any]]]) -> str:
    """Loss by position and the curve of training, a line an arm, as
    docs/results-<table>-<size>-<optimizer>.png."""
    (size, _, optimizer), entry = setting, TABLES[name]
    length, title = (
        arms.settings_of(size, entry.get("dataset", "text"))["train.seq_len"],
        entry["title"],
    )
    figure = Figure(figsize=(11, 3.8), dpi=110, layout="constrained")
    curve, place = figure.subplots(1, 2)
    # the best last, so that its line lies above the others
    ordered = sorted(
        by_arm, key=lambda arm: -statistics.fmean(r["valid_loss"] for r in by_arm[arm])
    )
    colors = colormaps["tab10" if len(ordered) <= 10 else "tab20"]
    for number, arm in enumerate(ordered):
        runs, color = by_arm[arm], colors(number)
        losses = np.mean([r["scores"]["valid"]["loss_by_position"] for r in runs], axis=0)
        at = np.arange(1, len(losses) + 1) * length / len(losses)
        place.plot(at, losses, label=arm, color=color)
        points = np.mean([r["valid_curve"] for r in runs], axis=0)
        curve.plot(points[1:, 0], points[1:, 1], marker="o", markersize=3, color=color)
    place.set(
        xlabel="position in the row",
        ylabel="loss (nats a token)",
        title="by position",
        xscale="log",
    )
    curve.xaxis.set_major_formatter(EngFormatter())
    curve.set(xlabel="tokens read", ylabel="validation loss (nats a token)", title=title)
    for axes in (curve, place):
        axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    file = f"results-{name}-{size}-{optimizer}.png"
    figure.savefig(DOCS / file)
    return f"![{title}]({file})"


def stability(name: str, setting: Setting, by_arm: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Loss and largest gradient norm by rate and dtype, and a picture of these and of the layers at
    the lowest rate."""
    rows, files = [], f"results-{name}-{setting[0]}-{setting[2]}.png"
    figure = Figure(figsize=(13, 3.8), dpi=110, layout="constrained")
    by_rate, activations, gradients = figure.subplots(1, 3)
    rates = sorted({r["lr"] for runs in by_arm.values() for r in runs})
    for color, (arm, runs) in enumerate(by_arm.items()):
        for dtype, line in (("bfloat16", "-"), ("float32", "--")):
            found = {r["lr"]: r for r in runs if r["dtype"] == dtype}
            whole = {lr: r for lr, r in sorted(found.items()) if r["valid_loss"] is not None}
            if not found:
                continue
            cells = [
                f"{whole[lr]['valid_loss']:.3f} ({whole[lr]['gradient_norm']['largest']:.1f})"
                if lr in whole
                else "diverged"
                if lr in found
                else "–"
                for lr in rates
            ]
            rows.append([arm, dtype, *cells])
            style = {
                "color": f"C{color}",
                "linestyle": line,
                "marker": "o",
                "markersize": 3,
                "label": f"{arm}, {dtype}",
            }
            by_rate.plot(list(whole), [r["valid_loss"] for r in whole.values()], **style)
            if whole:
                layers = next(iter(whole.values()))["by_layer"]
                activations.plot(layers["largest_activation"], **style)
                gradients.plot(layers["gradient_norm"], **style)
    by_rate.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="validation loss (nats a token)",
        title="up to divergence",
    )
    by_rate.set_xticks(rates, [f"{lr:g}" for lr in rates])
    by_rate.minorticks_off()
    activations.set(
        yscale="log", xlabel="layer", ylabel="largest activation", title="after training"
    )
    gradients.set(yscale="log", xlabel="layer", ylabel="gradient norm", title="after training")
    for axes in (by_rate, activations, gradients):
        axes.grid(alpha=0.3)
    by_rate.legend(fontsize=7)
    figure.savefig(DOCS / files)
    head = ["arm", "computed in", *(f"{lr:g}" for lr in rates)]
    says = (
        "Validation loss by learning rate, and in brackets the largest gradient norm of any step "
        "before it is clipped."
    )
    return [f"![{TABLES[name]['title']}]({files})", says, markdown(head, rows)]


def drawn(name: str, by_arm: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What each arm has drawn: digits as docs/results-<table>-drawn.png, speech as
    docs/results-<table>-<arm>.wav."""
    paths = {
        arm: path
        for arm, runs in by_arm.items()
        for r in runs
        if (path := r["path"].with_suffix(".npz")).exists()
    }
    levels = {arm: dict(np.load(path)) for arm, path in paths.items()}
    if not levels:
        return []
    first = next(iter(levels.values()))
    if "real" not in first:
        for arm, found in levels.items():
            sequences.write_wav(DOCS / f"results-{name}-{arm}.wav", found["drawn"].flatten())
        files = ", ".join(f"[{arm}](results-{name}-{arm}.wav)" for arm in levels)
        return [f"Speech that each arm drew from nothing, at temperature 1: {files}."]
    sheets = {"real": first["real"]} | {arm: found["drawn"] for arm, found in levels.items()}
    figure = Figure(figsize=(3.4 * len(sheets), 3.6), dpi=110, layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(sheets)), sheets.items(), strict=True):
        columns = math.isqrt(len(images))
        sheet = (
            images[: columns * columns]
            .reshape(columns, columns, 28, 28)
            .swapaxes(1, 2)
            .reshape(columns * 28, -1)
        )
        axes.imshow(sheet, cmap="gray_r")
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(DOCS / f"results-{name}-drawn.png")
    return [
        (
            "![Digits of the test part, and digits that each arm drew at temperature "
            f"1](results-{name}-drawn.png)"
        )
    ]


def sources(by_arm: dict[str, list[dict[str, Any]]]) -> str:
    """Where the numbers of a table come from."""
    runs = list(itertools.chain.from_iterable(by_arm.values()))
    devices = ", ".join(sorted({r["device"] for r in runs}))
    commits = ", ".join(sorted({str(r["commit"])[:12] for r in runs}))
    versions = ", ".join(sorted({r["versions"]["torch"] for r in runs}))
    return (
        f"{len(runs)} runs; {devices}; torch {versions}; commit {commits}; files "
        "`experiments/results/*-ARM-SEED.json`."
    )


def fitted(title: str) -> list[str]:
    """The fits that experiments/scaling.py has written, where it has, and a picture of them."""
    if (fits := read_fits()) is None:
        return []
    table = markdown(*scaling.rows(fits))
    says = textwrap.fill(scaling.explained(fits), 120, break_on_hyphens=False)
    return [f"## {title}", scaling.picture(fits, DOCS), table, says]


def main() -> None:
    results = [
        json.loads(path.read_text()) | {"path": path} for path in sorted(RESULTS.glob("*.json"))
    ]
    text = [INTRODUCTION]
    for name, entry in TABLES.items():
        if name == scaling.TABLE:
            text += fitted(entry["title"])
            continue
        by_setting = of_table(name, results)
        if "dtypes" in entry:
            for setting, by_arm in sorted(by_setting.items()):
                title = (
                    f"## {entry['title']}: {setting[0]}, {setting[1] / 1e6:.0f}M tokens, "
                    f"{setting[2]}"
                )
                text += [title, *stability(name, setting, by_arm), sources(by_arm)]
            continue
        if "grid" in entry:
            text += [f"## {entry['title']}", rates(name, by_setting)] if by_setting else []
            continue
        for setting, all_by_arm in sorted(by_setting.items()):
            size, tokens, optimizer = setting
            by_arm = {
                arm: [r for r in runs if "diverged" not in r] for arm, runs in all_by_arm.items()
            }
            diverged = {arm: len(all_by_arm[arm]) - len(runs) for arm, runs in by_arm.items()}
            by_arm = {arm: runs for arm, runs in by_arm.items() if runs}
            own = [r for runs in by_arm.values() for r in runs if r["table"] == name]
            if entry.get("exploring") and not own:
                continue  # its arms have run for other tables alone
            seeds = [len(runs) for runs in by_arm.values() if runs]
            if len(seeds) < 2 or (name == "spread" and max(seeds) < 2):
                continue
            title = f"{entry['title']}: {size}, {tokens / 1e6:.0f}M tokens, {optimizer}"
            text += [
                f"## {title}",
                picture(name, setting, by_arm),
                compare(name, setting, by_arm),
                *drawn(name, by_arm),
                *(
                    f"{count} runs of `{arm}` diverged and count nowhere."
                    for arm, count in diverged.items()
                    if count
                ),
            ]
            if wanting := [arm for arm in entry["arms"] if arm not in all_by_arm]:
                text += [f"Not run yet: {', '.join(f'`{arm}`' for arm in wanting)}."]
            text += [sources(by_arm)]
    text += recall_report.sections(RESULTS / "recall", DOCS)
    write_text(DOCS / "results.md", "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
