"""Steps recorded as one CUDA graph: what the same steps are without it, to the bit, whatever
happens to the run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transnormer.config import ModelConfig
from transnormer.data.loader import Batch
from transnormer.model.cuda_graph import Graph
from transnormer.model.language_model import LanguageModel
from transnormer.train.loop import Interrupted, train
from transnormer.train.mesh import Mesh
from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Train
from transnormer.train.step import MicrobatchRunner

from .runs import curve, tiny
from .test_checkpoints import BAD, OFTEN, same, state

pytestmark = pytest.mark.gpu
SHORT = ("train.steps=12", "eval.every=5", "checkpoint.every=4")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.accumulate=2",),
        ("train.recompute=true",),
        ("train.segment=16",),
        ("train.compile=true", "train.dtype=bfloat16"),
        ("train.compile=true", "train.recompute=true"),
        ("model.mixer=softmax", "model.position=rope", "model.position_layers=all"),
        ("model.position=ape", "model.decay=none", "model.max_position_embeddings=32"),
    ],
    ids=[
        "plain",
        "accumulated",
        "recomputed",
        "segments",
        "compiled",
        "compiled and recomputed",
        "softmax",
        "learned",
    ],
)
def test_a_recorded_run_is_the_same_run(
    work: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three is not looked at: the compiler tries its kernels there, and may take
    others afterwards."""
    replays: list[str] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(name), replay(graph))[1]
    )
    for name, graph in (("tried", "false"), ("plain", "false"), ("recorded", "true")):
        if name != "tried" or "train.compile=true" in overrides:
            train(tiny(f"run={name}", f"train.graph={graph}", *SHORT, *overrides))
    assert timeless("recorded") == timeless("plain")
    assert replays == ["recorded"] * (24 if "train.accumulate=2" in overrides else 12)


def timeless(run: str) -> list[dict[str, object]]:
    lines = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [
        {key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines
    ]


def test_every_replay_draws_anew() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)
    ).cuda()
    x = torch.randn(16, 64, device="cuda")

    def compute(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    def losses(function: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        torch.cuda.manual_seed(1)
        return [function(x).item() for _ in range(4)]

    graph = Graph(model, compute, adds=False)
    found = losses(graph)
    assert len(set(found)) == 4
    assert losses(graph) == found
    assert losses(compute) == found
    graph.close()


def test_a_recorded_run_goes_back_past_refused_steps(
    work: Path, spoil: Callable[..., None]
) -> None:
    spoil(*BAD)
    for graph in ("false", "true"):
        train(tiny(f"run=graph-{graph}", f"train.graph={graph}", *OFTEN))
    assert curve("graph-true") == curve("graph-false")
    assert same(state("graph-true", 24), state("graph-false", 24))


def test_a_recorded_run_resumes_exactly(work: Path, spoil: Callable[..., None]) -> None:
    train(tiny("run=whole", "train.graph=true", *OFTEN))
    for run, error in (("stopped", None), ("killed", RuntimeError)):
        spoil(stop_at=41, error=error)
        with pytest.raises(error or Interrupted):
            train(tiny(f"run={run}", "train.graph=true", *OFTEN))
        spoil()
        train(tiny(f"run={run}", "train.graph=true", *OFTEN))
        assert curve(run) == curve("whole")
        assert same(state(run, 24), state("whole", 24))


def read_on_the_host(_: int) -> None:
    model = torch.nn.Linear(8, 1).cuda()

    def compute(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        return loss * float(loss.isfinite())

    with pytest.raises(ValueError, match="captur"):
        Graph(model, compute, adds=False)(torch.ones(4, 8, device="cuda"))


def test_what_reads_on_the_host_is_refused() -> None:
    """In a process of its own, as what was recorded in part is never undone."""
    torch.multiprocessing.spawn(read_on_the_host)


def test_other_shapes_are_refused() -> None:
    model = torch.nn.Linear(8, 1).cuda()

    def compute(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    graph = Graph(model, compute, adds=False)
    graph(torch.ones(4, 8, device="cuda"))
    with pytest.raises(
        ValueError, match=r"an input of shape \(1, 8\), where \(4, 8\) was recorded"
    ):
        graph(torch.ones(1, 8, device="cuda"))
    graph.close()


def test_the_memory_is_let_go_of() -> None:
    device = torch.device("cuda")
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    ids = torch.randint(config.vocab_size, (2, 65), device=device)

    def left() -> int:
        model = LanguageModel(config).to(device)
        with MicrobatchRunner(model, Mesh(device), Train(graph=True)) as runner:
            for _ in range(3):
                runner(Batch(ids[:, :-1], ids[:, 1:]), torch.full((), 128.0, device=device))
            held = torch.cuda.memory_reserved()
        del model, runner
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < held
        return torch.cuda.memory_reserved()

    assert left() == left()
