"""docs/performance.md and docs/records.md with their pictures: python benchmarks/report.py

`templates/performance.md` is the prose: its numbers are the values of the sections below, by their
names. A section's picture and table stand above its sentences, the runs that it was made of below
them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import report_meshes, report_ops, report_training
from lib.records import records
from lib.report_training import sources
from lib.results import blocks, newest, wrap
from matplotlib.figure import Figure

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SECTIONS: dict[str, Callable[[], tuple[Figure | None, dict[str, Any]]]] = {
    "training": report_training.training,
    "long_rows": report_training.long_rows,
    "steps": report_training.steps,
    "graph": report_training.graph,
    "float8": report_training.float8,
    "optimizers": report_training.optimizers,
    "two": report_meshes.two,
    "four": report_meshes.four,
    "attention": report_ops.attention,
    "lengths": report_ops.lengths,
    "gated": report_ops.gated,
    "fusions": report_ops.fusions,
    "losses": report_ops.losses,
    "decoding": report_training.decoding,
    "training_cpu": report_training.training_cpu,
    "attention_cpu": report_ops.attention_cpu,
    "checks": report_ops.checks,
}


def pages() -> tuple[dict[str, str], dict[str, Figure]]:
    """The texts of the two pages and the pictures in them, by the names of their files."""
    figures: dict[str, Figure] = {"tiles.png": report_ops.tiles()}
    sections = {}
    for name, section in SECTIONS.items():
        figure, values = section()
        picture = ""
        if figure:
            figures[f"{name}.png"] = figure
            picture = f"![{name.replace('_', ' ')}]({name}.png)\n\n"
        sections[name] = values | {
            "figures": f"{picture}{values['table']}",
            "runs": sources(list(values["runs"])),
        }
    templates = {
        name: (HERE / "templates" / name).read_text() for name in ("performance.md", "records.md")
    }
    texts = {
        "performance.md": templates["performance.md"].format_map(sections),
        "records.md": templates["records.md"]
        + "\n"
        + records({newest("ops_sweep")["name"]: "tiles.png"}),
    }
    return {
        name: "\n\n".join(map(wrap, blocks(text))) + "\n" for name, text in texts.items()
    }, figures


def main() -> None:
    texts, figures = pages()
    for name, text in texts.items():
        (DOCS / name).write_text(text)
    for name, figure in figures.items():
        figure.savefig(DOCS / name)


if __name__ == "__main__":
    main()
