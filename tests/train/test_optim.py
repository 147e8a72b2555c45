"""Optimizers: what they decay, what they remember, and that sharded parameters move as whole ones
do."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from transnormer.config import ModelConfig
from transnormer.model.language_model import LanguageModel
from transnormer.planning.check import pretended
from transnormer.planning.memory import Layout
from transnormer.planning.mesh_sizes import Parallel
from transnormer.train.loop import train
from transnormer.train.mesh import Mesh, make_mesh
from transnormer.train.muon import Muon
from transnormer.train.optim import (
    load_optimizer_tensors,
    new_optimizer,
    optimizer_tensors,
    step_unless,
)
from transnormer.train.parallelize import clip, parallelize
from transnormer.train.recipe import OPTIMIZERS, Optim

from ..children import run_processes
from .processes import ROWS, Case, batches, build, full_tensors
from .runs import curve, tiny

WIDE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "norm": "rmsnorm",
    "bias": True,
}
EVERY = [Optim(name=name, lr=1e-2) for name in OPTIMIZERS] + [
    Optim(name=name, bits=8) for name in ("adamw", "adam")
]


def model_and_step(optim: Optim, steps: int = 0) -> tuple[LanguageModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=48, num_hidden_layers=2, **WIDE))
    optimizer = new_optimizer(model, optim)
    for number in range(steps):
        move(model, optimizer, number)
    return model, optimizer


def move(model: LanguageModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    ids = torch.randint(48, (2, 17), generator=torch.Generator().manual_seed(number))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optim", EVERY, ids=lambda optim: f"{optim.name}-{optim.bits}")
def test_matrices_and_embeddings_are_decayed_and_nothing_else(optim: Optim) -> None:
    model, optimizer = model_and_step(optim)
    names = {p: name for name, p in model.named_parameters()}
    decay = {
        names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        spared = name.endswith(("theta", "bias")) or "norm" in name
        assert value == (0.0 if spared else optim.weight_decay), name


@pytest.mark.parametrize("optim", EVERY, ids=lambda optim: f"{optim.name}-{optim.bits}")
def test_what_it_remembers_goes_on_bit_for_bit(optim: Optim) -> None:
    model, optimizer = model_and_step(optim, steps=3)
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    again, fresh = model_and_step(optim)
    again.load_state_dict(model.state_dict())
    load_optimizer_tensors(again, fresh, state)
    for each, other in ((model, optimizer), (again, fresh)):
        move(each, other, 3)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    found = optimizer_tensors(again, fresh)
    assert found.keys() == state.keys()
    assert all(
        torch.equal(x, found[name]) for name, x in optimizer_tensors(model, optimizer).items()
    )
    lost = next(name for name in state if "out_proj.weight" in name)
    del state[lost]
    with pytest.raises(
        ValueError, match=r"the optimizer state of layers\.0\.mixer\.out_proj\.weight is missing"
    ):
        load_optimizer_tensors(again, fresh, state)


def test_eight_bits_need_bitsandbytes_and_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = model_and_step(Optim(bits=8), steps=1)
    state = optimizer_tensors(model, optimizer)
    assert state["state1/layers.0.mixer.qkvu_proj.weight"].dtype == torch.uint8
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"optim\.bits = 8 needs bitsandbytes: pip install 'transnormer\[bits\]'"
    ):
        model_and_step(Optim(bits=8))
    monkeypatch.undo()
    with pretended(Layout(shard=2), torch.device("cpu")) as mesh:
        parallelize(model, mesh)
        with pytest.raises(
            ValueError, match=r"optim\.bits = 8 is for one process; .* write optim\.bits = 32"
        ):
            new_optimizer(model, Optim(bits=8))


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_a_step_that_nobody_has_read_is_taken_or_changes_nothing(name: str) -> None:
    model, optimizer = model_and_step(Optim(name=name, lr=1e-2), steps=2)
    again, other = model_and_step(Optim(name=name, lr=1e-2), steps=2)

    def differ() -> list[str]:
        pairs = [(model.state_dict(), again.state_dict())]
        pairs += [(optimizer_tensors(model, optimizer), optimizer_tensors(again, other))]
        return [key for one, two in pairs for key in one if not torch.equal(one[key], two[key])]

    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    assert step_unless(optimizer, torch.tensor(1.0))
    assert not differ()
    for each, taken in ((model, True), (again, False)):
        for number, p in enumerate(each.parameters()):
            p.grad = torch.full_like(p, 0.1 * (number + 1))
        if taken:
            assert step_unless(optimizer, torch.tensor(0.0))
            assert len(differ()) > 20
        else:
            other.step()
    assert not differ()
    assert not step_unless(new_optimizer(model, Optim(name="muon")), torch.tensor(0.0))
    assert not step_unless(new_optimizer(model, Optim(bits=8)), torch.tensor(0.0))


def test_adam_adds_its_decay_to_the_gradient_and_adamw_does_not() -> None:
    """With weight decay alone AdamW shrinks weights by lr x decay; Adam moves them by lr, whatever
    their size."""
    for name, wanted in (
        ("adamw", lambda p: p * (1 - 1e-2 * 0.1)),
        ("adam", lambda p: p - 1e-2 * p.sign()),
    ):
        model, optimizer = model_and_step(Optim(name=name, lr=1e-2, eps=1e-12))
        weight = model.layers[0].glu.up_proj.weight
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), wanted(before))


def test_muon_is_torchs_on_plain_matrices() -> None:
    weights = [torch.nn.Parameter(torch.randn(48, 32)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    ours = Muon([{"params": weights[:1], "blocks": (1, 0)}], **settings)
    theirs = torch.optim.Muon(weights[1:], adjust_lr_fn="match_rms_adamw", **settings)
    start = weights[0].detach().clone()
    for _ in range(3):
        weights[0].grad = torch.randn(48, 32)
        weights[1].grad = weights[0].grad.clone()
        ours.step()
        theirs.step()
    # both iterate in bfloat16
    assert (weights[0] - weights[1]).norm() < 2e-2 * (weights[1] - start).norm()


def test_muon_moves_q_k_v_and_the_gate_of_every_layer_each_by_itself() -> None:
    model, optimizer = model_and_step(Optim(name="muon", lr=1.0, weight_decay=0.0))
    weights = [layer.mixer.qkvu_proj.weight for layer in model.layers]
    heads = (4, 4, 16, 64)  # H, parts, K, D
    torch.manual_seed(1)
    scales = torch.tensor([1.0, 1e-3, 1e3, 1.0]).view(4, 1, 1)
    for weight in weights:
        weight.grad = torch.randn(heads).mul(scales).reshape(weight.shape)
    before = [weight.detach().clone() for weight in weights]
    optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        assert weight.grad is not None
        moved = (old - weight).detach().view(heads).transpose(0, 1).reshape(4, 64, 64)
        gradient = weight.grad.view(heads).transpose(0, 1).reshape(4, 64, 64)
        for part, of in zip(moved, gradient, strict=True):
            # square: singular values all about 0.2 sqrt(64), however small its gradient was, and
            # its own directions
            left, _, right = torch.linalg.svd(of)
            turned = left.T @ part @ right.T / (0.2 * 64**0.5)
            assert turned.diagonal().median() == pytest.approx(0.95, abs=0.2)
            assert torch.linalg.svdvals(turned).max() < 1.3


def test_processes_that_share_parameters_move_them_as_one(tmp_path: Path) -> None:
    check_shared(Parallel(), 2, tmp_path)


@pytest.mark.proof
@pytest.mark.parametrize(
    "parallel", [Parallel(tensor=2), Parallel(context=2), Parallel(replicate=2), Parallel(tensor=4)]
)
def test_four_processes_move_parameters_as_one(parallel: Parallel, tmp_path: Path) -> None:
    check_shared(parallel, 4, tmp_path)


def check_shared(parallel: Parallel, world: int, folder: Path) -> None:
    run_processes(_steps, world, parallel, str(folder), count=world)
    for name in OPTIMIZERS:
        start, alone = steps(name, parallel, Mesh(torch.device("cpu")))
        found = load_file(folder / f"{name}.safetensors")
        assert found.keys() == alone.keys()
        for key, wanted in alone.items():
            # Muon rounds to bfloat16, where a last bit's difference in a gradient may round
            # otherwise
            most = (1e-2 if name == "muon" else 1e-6) * (wanted - start[key]).norm() + 1e-12
            assert (found[key] - wanted).norm() <= most, f"{name}: {key}"


def _steps(rank: int, world: int, parallel: Parallel, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world
    )
    mesh = make_mesh(parallel, torch.device("cpu"))
    for name in OPTIMIZERS:
        _, found = steps(name, parallel, mesh)
        if mesh.first:
            save_file(found, f"{folder}/{name}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def steps(
    name: str, parallel: Parallel, mesh: Mesh
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Whole weights before and after two steps."""
    case = Case(parallel, model={"norm": "rmsnorm", "position_layers": "all"})
    model = build(case, mesh)
    start = {name: tensor.clone() for name, tensor in full_tensors(model).items()}
    optimizer = new_optimizer(model, Optim(name=name, lr=1e-2))
    (batch,) = batches(case)
    rows = ROWS // mesh.data_ranks
    mine = mesh.split(type(batch)(*(x[mesh.data_rank * rows :][:rows] for x in batch[:2])))
    for _ in range(2):
        (model.loss(mine.ids, mine.targets, reduction="sum") / batch.learned).backward()
        clip(model, mesh, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return start, full_tensors(model)


@pytest.mark.parametrize("setting", ["optim.name=muon", "optim.name=adam", "optim.bits=8"])
def test_a_run_goes_on_with_what_its_optimizer_remembered(work: Path, setting: str) -> None:
    # wide enough for 8 bits
    recipe = tiny("run=kept", "train.steps=6", "model.hidden_size=64", setting)
    run = train(recipe).folder
    whole = curve("kept")
    shutil.rmtree(run / "checkpoints" / "step-0000006")
    train(recipe)
    assert curve("kept") == whole
