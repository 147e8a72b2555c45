"""The two kinds of picture in the report: lines over a length or a step, and bars of one
measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]


def panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), dpi=120, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def lines(
    axis: Axes,
    series: Mapping[str, Points],
    x: str,
    y: str,
    title: str = "",
    lengths: bool = True,
    log: bool = False,
) -> None:
    """Over lengths the horizontal axis is logarithmic to base 2, with a tick at each length."""
    for n, (label, points) in enumerate(series.items()):
        at, values = zip(*points, strict=True)
        if label == "floor":
            axis.plot(at, values, label=label, color="black", linestyle=":")
        else:  # each thinner than the one below it, so that equal lines are all seen
            axis.plot(
                at, values, label=label, marker="o", markersize=4, linewidth=max(1, 3 - 0.4 * n)
            )
    axis.set(xlabel=x, ylabel=y, title=title)
    if lengths:
        axis.set_xscale("log", base=2)
        ticks = sorted({at for points in series.values() for at, _ in points})
        axis.set_xticks(
            ticks, [f"{n / 1024:,.0f}k" if n >= 1_024 else f"{n:,}" for n in ticks], minor=False
        )
        axis.tick_params(axis="x", labelsize="small")
    if log:
        axis.set_yscale("log")
    elif lengths:
        axis.set_ylim(0, None)
        axis.yaxis.set_major_formatter(
            lambda value, _: f"{value:,.4g}" if value < 100 else f"{value:,.0f}"
        )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def bars(
    axis: Axes,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    x: str,
    title: str = "",
    stacked: bool = False,
    form: str = ",.0f",
) -> None:
    """One horizontal bar a label and series, with its value written at its end; stacked ones share
    a bar."""
    left = [0.0] * len(labels)
    height = 0.8 / (1 if stacked else len(series))
    for n, (name, values) in enumerate(series.items()):
        places = [
            at + (0 if stacked else (n - (len(series) - 1) / 2) * height)
            for at in range(len(labels))
        ]
        widths = [value or 0.0 for value in values]
        drawn = axis.barh(places, widths, height=height, left=left if stacked else None, label=name)
        if stacked:
            left = [a + b for a, b in zip(left, widths, strict=True)]
        else:
            axis.bar_label(
                drawn,
                [format(value, form) if value else "" for value in values],
                fontsize="x-small",
                padding=2,
            )
    axis.set_yticks(range(len(labels)), labels, fontsize="small")
    axis.invert_yaxis()
    axis.set(xlabel=x, title=title)
    axis.margins(x=0.2)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.grid(alpha=0.3, axis="x")
    if len(series) > 1:
        beside = (1, 1) if stacked else None  # no bar may be hidden
        axis.legend(
            fontsize="x-small", loc="upper left" if stacked else "best", bbox_to_anchor=beside
        )
