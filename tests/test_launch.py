"""The launch scripts are what their systems read, and agree with each other and with the
recipes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from transnormer.train.recipe import Recipe

from .conftest import REPOSITORY

LAUNCH = REPOSITORY / "launch"


@pytest.mark.parametrize(
    "path", [LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch"], ids=lambda path: path.name
)
def test_scripts_are_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("torchrun.sh", ()),
        ("torchrun.sh", ("1", "localhost:29400")),
        ("torchrun.sh", ("a.toml", "1", "x")),
        ("slurm.sbatch", ()),
    ],
)
def test_a_script_without_its_arguments_says_how_it_is_called(
    script: str, arguments: tuple[str, ...]
) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.search(rf"launch/{script} .*RECIPE \[key=value", done.stderr)
    assert "unbound" not in done.stderr


def test_kubernetes_counts_its_nodes_once() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    name, pods = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pods["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    [container] = pods["containers"]
    script, nodes, head, recipe = container["command"]
    assert int(nodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert head.startswith(f"{name}-0.{pods['subdomain']}:")
    assert Path(script).name == "torchrun.sh"
    parallel = Recipe.load(REPOSITORY / "recipes" / Path(recipe).name).parallel
    each = container["resources"]["limits"]["nvidia.com/gpu"]
    assert (
        parallel.replicate * parallel.shard * parallel.context * parallel.tensor
        == int(nodes) * each
    )


def test_recipes_and_pages_name_scripts_that_are_there() -> None:
    for page in [
        *(REPOSITORY / "recipes").glob("*.toml"),
        *(REPOSITORY / "docs").glob("*.md"),
        *LAUNCH.iterdir(),
    ]:
        for script in re.findall(r"(?<![\w/])(launch/[\w.]+\w)", page.read_text()):
            assert (REPOSITORY / script).is_file(), f"{page.name} names {script}"
