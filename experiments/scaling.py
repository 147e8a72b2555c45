"""How the loss falls with parameters and tokens: L(N, D) = E + A / N^alpha + B / D^beta, fitted to
the runs of the table `scaling`, an arm at a time.

    python experiments/run.py scaling --side-by-side 3   # the runs
    python experiments/scaling.py                        # the fits, which `transnormer plan` reads
    python experiments/report.py                         # docs/results.md with them

N counts the parameters without the embedding, D the training tokens. What is fitted is the loss on
the test part, or on the validation part where the table explores. An arm without enough runs has no
fit, and a line says why."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arms
import numpy as np
from matplotlib.figure import Figure

from transnormer.config import ModelConfig
from transnormer.files import write_text
from transnormer.planning.scaling import FITS, architecture, loss
from transnormer.provenance import provenance

RESULTS = Path(__file__).parent / "results"
TABLE = "scaling"
DRAWS = 500  # resamplings of an arm's runs
# Fewer points, or fewer values of N or of D, cannot tell five coefficients. A resampling may have
# fewer points than a fit, but more than coefficients.
LEAST_POINTS, LEAST_RESAMPLED, LEAST_VALUES = 9, 6, 3
# A residual of ln L counts linearly from here on: about what a seed changes.
HUBER = 3e-3
# Bounds of alpha and beta. Below them a term is nearly a constant, which E is already.
EXPONENTS = (0.05, 2.0)
# Where a fit starts: E as a share of the lowest loss, and both exponents.
STARTS = ((0.3, 0.2), (0.3, 0.6), (0.8, 0.2), (0.8, 0.6))
FLOOR = np.log(1e-4)  # of ln E and of the logarithms of the two terms in the middle of the runs


def residuals(free: np.ndarray, points: np.ndarray) -> np.ndarray:
    """ln of the predicted loss less ln of the loss, [R]. free: ln E, ln a, alpha, ln b, beta.
    points: N, D and L, [R, 3], N and D in units in which a and b are terms of the loss."""
    n, d, measured = points.T
    log_e, log_a, alpha, log_b, beta = free
    predicted = np.exp(log_e) + np.exp(log_a) / n**alpha + np.exp(log_b) / d**beta
    return np.log(predicted) - np.log(measured)


def slopes(free: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The derivatives of `residuals` by `free`, [R, 5]."""
    n, d, _ = points.T
    log_e, log_a, alpha, log_b, beta = free
    constant = np.full_like(n, np.exp(log_e))
    of_n, of_d = np.exp(log_a) / n**alpha, np.exp(log_b) / d**beta
    by = np.stack([constant, of_n, -of_n * np.log(n), of_d, -of_d * np.log(d)], 1)
    return by / (constant + of_n + of_d)[:, None]


def refusal(points: np.ndarray, least: int = LEAST_POINTS) -> str | None:
    """Why runs cannot be fitted; None where they can."""
    distinct = len(np.unique(points[:, :2], axis=0))
    if distinct < least:
        return f"{distinct} distinct pairs of parameters and tokens, and {least} are needed"
    for name, column in (("parameters", 0), ("tokens", 1)):
        if (values := len(np.unique(points[:, column]))) < LEAST_VALUES:
            return f"{values} distinct numbers of {name}, and {LEAST_VALUES} are needed"
    return None


def fit(points: np.ndarray, starts: Sequence[tuple[float, float]] = STARTS) -> np.ndarray:
    """The coefficients E, ln A, alpha, ln B and beta that fit runs best, by a Huber loss of ln L.
    points: N, D and L of each run, [R, 3]."""
    from scipy.optimize import least_squares

    units = np.exp(np.log(points[:, :2]).mean(0))
    scaled = points / np.append(units, 1.0)
    lowest, highest = np.log(points[:, 2].min()), np.log(points[:, 2].max())
    bounds = (
        [FLOOR, FLOOR, EXPONENTS[0], FLOOR, EXPONENTS[0]],
        [lowest, highest, EXPONENTS[1], highest, EXPONENTS[1]],
    )
    found = []
    for share, exponent in starts:
        term = lowest + np.log((1 - share) / 2)
        start = [lowest + np.log(share), term, exponent, term, exponent]
        options = {"loss": "huber", "f_scale": HUBER, "x_scale": [1.0, 1.0, 0.3, 1.0, 0.3]}
        found.append(least_squares(residuals, start, slopes, bounds, args=(scaled,), **options))
    log_e, log_a, alpha, log_b, beta = min(found, key=lambda each: each.cost).x
    log_n, log_d = np.log(units)
    return np.array([np.exp(log_e), log_a + alpha * log_n, alpha, log_b + beta * log_d, beta])


def bootstrap(points: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """The coefficients of fits to as many runs, drawn from these with replacement, [draws, 5].

    A resampling that cannot be fitted is drawn again. One start is enough, because in trials with
    made-up runs all of STARTS led to one minimum."""
    random = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < draws:
        resampled = points[random.integers(len(points), size=len(points))]
        if refusal(resampled, LEAST_RESAMPLED) is None:
            found.append(fit(resampled, STARTS[:1]))
    return np.array(found)


def records(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of the table by arm, whichever table they were run for, but for those that
    `left_out` names."""
    found: dict[str, list[dict[str, Any]]] = {
        arm: [] for arm in arms.TABLES["tables"][TABLE]["arms"]
    }
    reasons = left_out(results)
    for run in arms.runs(TABLE):
        if run.name not in reasons:
            found[run.arm].append(json.loads((results / f"{run.name}.json").read_text()))
    return found


def left_out(results: Path) -> dict[str, str]:
    """By their names, the runs of the table that no fit can have, and why: "diverged" or "not run
    yet"."""
    found = {}
    for run in arms.runs(TABLE):
        path = results / f"{run.name}.json"
        if not path.exists():
            found[run.name] = "not run yet"
        elif "diverged" in json.loads(path.read_text()):
            found[run.name] = "diverged"
    return found


def part() -> str:
    """The part of the corpus whose loss is fitted."""
    return "valid" if arms.TABLES["tables"][TABLE].get("exploring") else "test"


def points_of(runs: list[dict[str, Any]]) -> np.ndarray:
    """N, D and L of runs, [R, 3]."""
    rows = [
        (r["parameters_without_embeddings"], r["tokens"], r["scores"][part()]["loss"]) for r in runs
    ]
    return np.array(rows, dtype=float).reshape(-1, 3)


def fit_arm(runs: list[dict[str, Any]], draws: int) -> dict[str, Any]:
    """What FITS holds of one arm. Raises ValueError where its runs differ in architecture."""
    points = points_of(runs)
    found = [architecture(ModelConfig.from_dict(r["model"])) for r in runs]
    if any(each != found[0] for each in found):
        raise ValueError(f"the runs of {runs[0]['arm']} have several architectures: {found}")
    fitted = [rounded(each) for each in fit(points)]
    sample = bootstrap(points, draws)
    away = [np.log(loss(fitted, n, d) / measured) for n, d, measured in points]
    # [draws, 2, 2]: alpha and beta beside both bounds, which a fit approaches without reaching them
    at_bound = np.isclose(sample[:, [2, 4], None], EXPONENTS, rtol=0.01).any((1, 2))
    at_bound |= sample[:, 0] < 0.01  # E is as good as 0
    return {
        "architecture": found[0],
        "runs": len(runs),
        "parameters": [points[:, 0].min(), points[:, 0].max()],
        "tokens": [points[:, 1].min(), points[:, 1].max()],
        "residual": rounded(np.sqrt(np.mean(np.square(away)))),
        "at_bound": rounded(at_bound.mean()),
        "fitted": fitted,
        "sample": [[rounded(each) for each in draw] for draw in sample],
    }


def rounded(number: float) -> float:
    return float(f"{number:.6g}")


def fit_table(results: Path, draws: int, command: str) -> dict[str, Any]:
    """What FITS holds. Prints why an arm has no fit. Raises ValueError where no arm has one, or
    where the runs read different data."""
    by_arm, missing = records(results), left_out(results)
    for arm, runs in [*by_arm.items()]:
        if reason := refusal(points_of(runs)):
            print(f"{arm} is not fitted: {reason}")
            del by_arm[arm]
    if not by_arm:
        raise ValueError("no arm has enough runs")
    read = {
        (r["data"], r["model"]["vocab_size"], r["optimizer"])
        for runs in by_arm.values()
        for r in runs
    }
    if len(read) != 1:
        raise ValueError(f"the runs have {len(read)} corpora, vocabularies or optimizers, not one")
    data, vocabulary, optimizer = read.pop()
    return {
        "unit": "nats a token",
        "part": part(),
        "corpus": arms.TABLES["datasets"]["text"]["title"],
        "tokenizer": f"byte-level BPE of {vocabulary:,}",
        "vocab_size": vocabulary,
        "missing": missing,
        "data": data,
        "optimizer": optimizer,
        "coefficients": ["E", "ln A", "alpha", "ln B", "beta"],
        **provenance("cpu", command=command),
        "architectures": {arm: fit_arm(runs, draws) for arm, runs in by_arm.items()},
    }


def as_text(fits: dict[str, Any]) -> str:
    """The fits as JSON, with each list of numbers on a line."""
    text = json.dumps(fits, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


# What docs/results.md says of the fits.


def rows(fits: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of the coefficients, with 95 % intervals."""

    def cell(fit: dict[str, Any], place: int) -> str:
        low, high = np.quantile(np.array(fit["sample"])[:, place], (0.025, 0.975))
        return f"{fit['fitted'][place]:.3g} ({low:.3g} to {high:.3g})"

    found = [
        [
            name,
            str(fit["runs"]),
            *(cell(fit, place) for place in (0, 2, 4)),
            f"{100 * fit['residual']:.2f} %",
            f"{100 * fit['at_bound']:.0f} %",
        ]
        for name, fit in fits["architectures"].items()
    ]
    return ["arm", "runs", "E", "alpha", "beta", "residual", "draws at a bound"], found


def explained(fits: dict[str, Any]) -> str:
    """What the table of `rows` shows, and where its numbers come from."""
    draws = max(len(fit["sample"]) for fit in fits["architectures"].values())
    return (
        f"L(N, D) = E + A / N^alpha + B / D^beta, fitted to the loss on the {fits['part']} part, "
        f"in {fits['unit']}, of each arm's runs with {fits['optimizer']}. N counts the parameters "
        f"without the embedding, D the training tokens. Intervals are those of fits to {draws} "
        "resamplings of the runs; the residual is the root mean square of ln L. Where many draws "
        f"are at a bound (alpha or beta {EXPONENTS[0]} or {EXPONENTS[1]}, E 0), the runs do not "
        "determine the coefficients, and only what lies between the runs can be told. "
        f"{len(fits['missing'])} runs are left out"
        + "".join(f"; {name}: {why}" for name, why in fits["missing"].items())
        + f". Commit {str(fits['commit'])[:12]}."
    )


def picture(fits: dict[str, Any], folder: Path) -> str:
    """Runs and fits by parameters, at the most tokens, and by tokens, at the most parameters, as
    results-scaling.png in the folder."""
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    by_arm = records(RESULTS)
    for axes, along, name in zip(
        figure.subplots(1, 2), (0, 1), ("parameters", "tokens"), strict=True
    ):
        for color, (arm, fit) in enumerate(fits["architectures"].items()):
            points, style = points_of(by_arm[arm]), {"color": f"C{color}"}
            shown = points[points[:, 1 - along] == points[:, 1 - along].max()]
            axes.plot(shown[:, along], shown[:, 2], "o", markersize=4, label=arm, **style)
            line = np.geomspace(shown[:, along].min(), 10 * shown[:, along].max(), 50)
            places = [(n, shown[0, 1]) if along == 0 else (shown[0, 0], n) for n in line]
            drawn = [[loss(each, *place) for place in places] for each in fit["sample"]]
            axes.plot(line, [loss(fit["fitted"], *place) for place in places], **style)
            axes.fill_between(
                line, *np.quantile(drawn, (0.025, 0.975), axis=0), alpha=0.15, **style
            )
        held = ("the most tokens", "the most parameters")[along]
        axes.set(xscale="log", xlabel=name, ylabel=f"loss ({fits['unit']})", title=f"at {held}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(folder / "results-scaling.png")
    return "![Loss by parameters and tokens, fitted and ten times beyond](results-scaling.png)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder with results")
    parser.add_argument("--out", type=Path, default=FITS, help="the file to write")
    parser.add_argument("--draws", type=int, default=DRAWS, help="resamplings of an arm's runs")
    given = parser.parse_args()
    command = shlex.join(["python", "experiments/scaling.py", *sys.argv[1:]])
    try:
        fits = fit_table(given.results, given.draws, command)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_text(given.out, as_text(fits))
    for name, fit_of_arm in fits["architectures"].items():
        print(
            f"{name}: {fit_of_arm['runs']} runs, E, ln A, alpha, ln B, beta {fit_of_arm['fitted']}"
        )


if __name__ == "__main__":
    main()
