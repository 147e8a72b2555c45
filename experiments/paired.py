"""Differences between arms over seeds that both have, and p values of several of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """How far one arm lies from the reference over paired seeds: the mean, half the width of its
    95 % interval, and p before correction."""

    mean: float
    half: float
    p: float
    pairs: int


def paired(ours: dict[int, float], reference: dict[int, float]) -> Difference | None:
    """The difference ours - reference over the seeds that both have; None with fewer than two."""
    seeds = sorted(ours.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    from scipy import stats  # half a second, which only this function needs

    differences = [ours[seed] - reference[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    half = float(stats.t.ppf(0.975, len(seeds) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(seeds) - 1)) if error else float(mean == 0)
    return Difference(mean, half, p, len(seeds))


def holm(values: list[float]) -> list[float]:
    """p values corrected for being several: each times the number of those not smaller, never
    falling."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda one: values[one])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected
