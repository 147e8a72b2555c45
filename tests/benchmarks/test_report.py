"""The report of the benchmarks: its pages say what the results say, and can be read."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"
sys.path.insert(0, str(BENCHMARKS))

from lib import report_meshes, results  # noqa: E402

PAGES = ("performance.md", "records.md")


def load_report() -> Any:
    """`benchmarks/report.py`, under another name than `experiments/report.py` has in the tests of
    the experiments."""
    spec = importlib.util.spec_from_file_location("benchmarks_report", BENCHMARKS / "report.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(page: str) -> dict[str, str]:
    return {part.splitlines()[0]: part for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]}


def test_the_pages_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the plans of 7b, which take long and are left out."""
    monkeypatch.setattr(report_meshes, "planned", lambda row: (1.0, 1.0))
    texts, figures = load_report().pages()
    assert texts["records.md"] == (DOCS / "records.md").read_text(), (
        "run `python benchmarks/report.py`"
    )
    written = sections((DOCS / "performance.md").read_text())
    made = sections(texts["performance.md"])
    assert made.keys() == written.keys()
    for title in made.keys() - {"Two GPUs", "Four GPUs"}:
        assert made[title].strip() == written[title].strip(), (
            f"{title}: run `python benchmarks/report.py`"
        )
    shown = {
        name for page in PAGES for name in re.findall(r"!\[.*\]\((.+)\)", (DOCS / page).read_text())
    }
    assert shown == figures.keys()
    assert all((DOCS / name).exists() for name in shown)


@pytest.mark.parametrize("name", PAGES)
def test_no_line_is_too_long_to_read(name: str) -> None:
    assert max(map(len, (DOCS / name).read_text().splitlines())) <= 200


def test_links_to_the_pages_lead_to_a_heading() -> None:
    anchors = {
        name: {
            title.lower().replace(",", "").replace(" ", "-")
            for title in sections((DOCS / name).read_text())
        }
        for name in PAGES
    }
    found = 0
    for path in (ROOT / "README.md", *DOCS.glob("*.md")):
        for name, anchor in re.findall(r"(performance\.md|records\.md)#([\w-]+)", path.read_text()):
            assert anchor in anchors[name], f"{path.name} links to {name}#{anchor}"
            found += 1
    assert found > 20
    assert {path.stem.lower() for path in results.RESULTS.glob("*.json")} == anchors["records.md"]


def test_a_run_is_called_the_same_whichever_files_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> dict[tuple[Any, ...], str]:
        by_mesh = report_meshes.by_mesh(report_meshes.runs_of_four())
        return {
            (mesh, row["tokens_per_second"]): report_meshes.run_name(result)
            for mesh, runs in by_mesh.items()
            for row, result in runs
        }

    before = names()
    shutil.copytree(results.RESULTS, tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    (missing,) = (tmp_path / "results").glob("meshes_7b_alone_*.json")
    missing.unlink()
    after = names()
    assert after == {row: name for row, name in before.items() if name != "7b_alone"}
    assert {"385m", "7b", "7b_alone", "7b_graph"} <= set(before.values())


def test_no_measured_number_is_written_in_the_prose() -> None:
    """What was measured has a point or a comma, and the templates take it from a result by its
    name."""
    for name in PAGES:
        prose = re.sub(r"\{[^}]*\}", "", (BENCHMARKS / "templates" / name).read_text())
        assert re.findall(r"\d\.\d+|\d,\d{3}", prose) == []
