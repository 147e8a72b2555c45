"""Decoding in few kernels: the same step as by the parts, no further from float64, and refused with
a reason where a block cannot take it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from transnormer import LanguageModel
from transnormer.model.slots import Slots

from ..interpreter import faster_interpreter
from .test_language_model import small
from .test_stacks import small as stack

launch_triton = pytest.importorskip("transnormer.ops.launch_triton")
DEVICE = "cuda" if torch.cuda.is_available() and not launch_triton.INTERPRETED else "cpu"
if DEVICE == "cpu" and not launch_triton.INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

MODELS = {
    "published": {},
    "gains": {"norm": "rmsnorm", "glu": "swiglu", "position_layers": "all"},
    "no gate": {"gate": False, "position": "none"},
    "convolved": {"convolution": "heads", "qk_norm": True, "head_norm": True},
    "softmax": {"mixer": "softmax", "position": "rope", "activation": "none"},
    "hybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "softmax": {"position": "none", "num_key_value_heads": 2, "gate": False},
    },
}


@pytest.fixture(scope="module", autouse=True)
def _fast_interpreter() -> Iterator[None]:
    with faster_interpreter():
        yield


def build(name: str) -> LanguageModel:
    make = stack if name == "hybrid" else small
    layers = {"num_hidden_layers": 3 if name == "hybrid" else 2}
    return make(torch.float64, **layers, **MODELS[name]).to(DEVICE)


def steps(model: LanguageModel, ids: torch.Tensor, backend: str) -> tuple[torch.Tensor, Slots]:
    """Logits of one token and of two more, and the slots: of 3 rows one has no slot."""
    slots = Slots.new(model, 4, capacity=8)
    slots.poison_([1])
    slots.zero_([0, 2])
    rows = torch.tensor([2, -1, 0], device=DEVICE)
    lengths = torch.tensor([1, 0, 1], device=DEVICE)
    first = model.step_(ids[:, :1], slots, rows, lengths, backend)
    rest = model.step_(ids[:, 1:], slots, rows, backend=backend)
    return torch.cat([first, rest], dim=1)[[0, 2]], slots


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS), ("published", torch.bfloat16)],
    ids=str,
)
@torch.inference_mode()
def test_error_is_at_most_twice_that_of_the_parts(name: str, dtype: torch.dtype) -> None:
    exact = build(name).to(dtype).double()  # of weights as they are rounded
    model = copy.deepcopy(exact).to(dtype)
    ids = torch.randint(29, (3, 3), device=DEVICE)
    true, after = steps(exact, ids, "parts")
    usual, usual_slots = steps(model, ids, "parts")
    found, slots = steps(model, ids, "fused")
    # interpreted, bfloat16 is cut, not rounded
    cut = DEVICE == "cpu" and dtype == torch.bfloat16
    assert distance(found, true) <= (6 if cut else 2) * distance(usual, true)
    assert slots.seen.equal(after.seen)
    for layer, other, want in zip(slots.layers, usual_slots.layers, after.layers, strict=True):
        for part, usually, exactly in zip(layer, other, want, strict=True):
            assert part[1].isnan().all()
            of = [x[[0, 2]] for x in (part, usually, exactly)]
            of = [
                x if x.shape[1] != 9 else x[:, :3] for x in of
            ]  # of the keys, those that are there
            assert distance(of[0], of[2]) <= (6 if cut else 2) * distance(of[1], of[2])


def distance(found: torch.Tensor, true: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - true).norm() / true.norm().clamp(min=1e-300))


@torch.inference_mode()
def test_what_is_no_such_step_is_refused() -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    hooked = small(torch.float32)
    hooked.blocks()[0].mixer.out_proj.register_forward_hook(lambda *_: None)
    for model, reason in (
        (small(torch.float32, norm="layernorm"), "the norm is LayerNorm"),
        (small(torch.float32, glu="mlp"), "the GLU is MLP"),
        (small(torch.float32, bias=True), "linear maps have biases"),
        (small(torch.float32, gate_rank=3), "more than one product reads"),
        (small(torch.float32, convolution="input"), "more than one product reads"),
        (small(torch.float32, decay="gated"), "more than one product reads"),
        (small(torch.float64), "float64 inputs"),
        (hooked, "has hooks"),
    ):
        model.to(DEVICE)
        with pytest.raises(RuntimeError, match=f"'fused' cannot run this call: .*{reason}"):
            model.step_(ids, Slots.new(model, 1), backend="fused")
        model.step_(ids, Slots.new(model, 1))
    model = small(torch.float32).to(DEVICE)
    with pytest.raises(RuntimeError, match="17 rows are not from 1 to 16"):
        model.step_(ids.expand(17, 1), Slots.new(model, 17), backend="fused")
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast is on"),
    ):
        model.step_(ids, Slots.new(model, 1), backend="fused")
    with pytest.raises(ValueError, match="no backend 'wings'; there are auto, fused, parts"):
        model.step_(ids, Slots.new(model, 1), backend="wings")


@pytest.mark.gpu
@torch.inference_mode()
def test_a_recorded_step_is_the_step() -> None:
    model, ids = small(torch.bfloat16).cuda(), torch.randint(29, (3, 1), device="cuda")
    recorded, stepped = Slots.new(model, 3), Slots.new(model, 3)
    model.step_(ids, Slots.new(model, 3), backend="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.step_(ids, recorded, backend="fused")
    for _ in range(3):
        graph.replay()
        assert torch.equal(logits, model.step_(ids, stepped, backend="fused"))
        ids.copy_(logits.argmax(-1))
