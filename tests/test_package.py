"""The package as a whole: who imports whom, what importing costs, and that it stands on its feet
alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import transnormer

PACKAGE = Path(transnormer.__file__).parent

# Each part and the parts it may import: the first table of docs/architecture.md.
ARCHITECTURE = (PACKAGE.parent / "docs" / "architecture.md").read_text()
ARROWS = {
    part: set(re.findall(r"`(\w+)`", allowed))
    for part, allowed in re.findall(
        r"^\| `(\w+)` \| (.*)\|$", ARCHITECTURE.partition("\n## How data flows")[0], re.MULTILINE
    )
}
# Heavy libraries and the one door of each.
DOORS = {
    "triton": "_triton.py",
    "pyarrow": "documents.py",
    "zstandard": "documents.py",
    "matplotlib": "metrics.py",
    "psutil": "validate.py",
    "sentencepiece": "tokenizers.py",
    "tiktoken": "tokenizers.py",
    "lm_eval": "harness.py",
    "datasets": "harness.py",
    "transformers": "hf.py",
    "peft": "lora.py",
    "bitsandbytes": "optim.py",
    "torchao": "float8.py",
    "jinja2": "render.py",
}


def _imports(path: Path) -> set[tuple[str, ...]]:
    """Modules a file imports, as parts; those of the package begin with "transnormer"."""
    found = set()
    here = ("transnormer", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            found |= {module} if node.module else {(*module, alias.name) for alias in node.names}
    return found


def test_imports_follow_the_arrows() -> None:
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part not in ARROWS:
            continue
        for module in _imports(path):
            if module[0] == "transnormer" and len(module) > 1 and module[1] != "__version__":
                checked += 1
                allowed = {part} | ARROWS[part]
                allowed |= {"train"} if path.match("planning/check.py") else set()
                assert module[1] in allowed, f"{path} imports {'.'.join(module)}"
            if module[:3] == ("transnormer", "evaluation", "harness"):
                assert part in ("evaluation", "cli")
            if module[0] in DOORS:
                assert path.name.endswith(DOORS[module[0]]), f"{path} imports {module[0]}"
    assert checked > 30
    rooms = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")
    }
    assert rooms - ARROWS.keys() == {"__init__", "__main__"}


def test_the_tree_in_readme_is_the_tree_that_is_there() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    tree = readme[readme.index("```\ntransnormer/\n") :].split("```")[1].partition("\nrecipes/")[0]
    folder, named = "", set()
    for line in tree.splitlines()[2:]:
        indent = len(line) - len(line.lstrip())
        if indent == 2:
            folder = (
                line.strip()
                if line.rstrip().endswith("/")
                else line.split()[0]
                if "/" in line.split()[0]
                else ""
            )
        named |= {folder + name for name in re.findall(r"\b\w+\.py\b", line)}
    there = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if not path.name.startswith("__")
    }
    assert named == there


HEAVY = {
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
    "pyarrow",
    "psutil",
}


def _loaded(*codes: str) -> list[set[str]]:
    """The modules that a fresh Python has loaded after each of these, one after another."""
    lines = "; ".join(f"{code}; print(*sys.modules)" for code in codes)
    command = [sys.executable, "-c", f"import sys; {lines}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [set(line.split()) for line in said.splitlines()]


def test_importing_and_loading_a_model_is_light(tmp_path: Path) -> None:
    config = transnormer.ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    transnormer.LanguageModel(config).save_pretrained(tmp_path)
    package, names, loaded = _loaded(
        "import transnormer", "from transnormer import *", f"load({str(tmp_path)!r})"
    )
    assert package & {*HEAVY, "torch", "numpy"} == set()
    assert names & HEAVY == set()
    assert loaded & {*HEAVY, "torch._dynamo"} == {"safetensors"}


def test_help_needs_no_torch() -> None:
    (loaded,) = _loaded("from transnormer.cli import app")
    assert "torch" not in loaded


def test_predicting_a_loss_needs_the_standard_library_alone() -> None:
    (loaded,) = _loaded("from transnormer.planning import scaling")
    assert loaded & {*HEAVY, "torch", "numpy", "scipy"} == set()


def test_the_public_names_are_there() -> None:
    for name in transnormer.__all__:
        assert getattr(transnormer, name) is not None
