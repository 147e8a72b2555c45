"""The memory and the speed of plans against measured runs, real shards and what autograd really
keeps."""

from __future__ import annotations

import json
import os
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transnormer.config import TRANSFORMER, ModelConfig
from transnormer.model.language_model import LanguageModel, init_weights
from transnormer.model.layers import TokenPositions, rotation
from transnormer.ops import convolution, gla, lightning, loss, lrpe, norm
from transnormer.planning import hardware, memory, speed
from transnormer.planning.check import held, pretended, weight_bytes
from transnormer.planning.hardware import GPUS
from transnormer.planning.memory import (
    WORKSPACE_BYTES,
    Layout,
    expected_memory,
    parameter_shapes,
    saved_bytes,
)
from transnormer.planning.search import Job
from transnormer.planning.speed import find_speed, sent_bytes
from transnormer.train import sharding
from transnormer.train.mesh import make_mesh
from transnormer.train.optim import new_optimizer
from transnormer.train.parallelize import parallelize
from transnormer.train.recipe import Optim

from ..children import run_processes
from ..train.processes import TINY

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((ROOT / "benchmarks/results/train_h100_2026-11-25.json").read_text())
ROWS = [row for row in MEASURED["rows"] if row["model"] in ("transnormer", "softmax")]
EVERYTHING = {
    "num_attention_heads": 6, "hidden_size": 36, "norm": "rmsnorm", "bias": True,
    "position_layers": "all",
    "gate_rank": 3, "tie_word_embeddings": False,
}  # fmt: skip
OTHER = {"norm": "layernorm", "position": "ape", "glu": "mlp", "vocab_size": 44}
BASELINE = {**TRANSFORMER, "num_attention_heads": 6, "hidden_size": 36}
FULL = ["full_attention"] * 2
MIXED = {
    "layer_types": ["linear_attention", *FULL, "sliding_attention", "linear_attention"],
    "num_attention_heads": 6, "hidden_size": 36,
    "softmax": {"window": 9, "num_key_value_heads": 2, "gate": True},
}  # fmt: skip


def named(row: dict[str, Any]) -> ModelConfig:
    return ModelConfig.named(row["size"], **(TRANSFORMER if row["model"] == "softmax" else {}))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']} {row['size']} {row['rows']}")
def test_one_gpu_as_measured(row: dict[str, Any]) -> None:
    shapes = parameter_shapes(named(row), row["seq_len"])
    memory = expected_memory(shapes, Layout(), row["rows"], row["seq_len"])
    assert memory.allocated == pytest.approx(row["peak_bytes"], rel=0.01)
    speed, sent = find_speed(shapes, Layout(), GPUS["h100"], row["rows"], row["seq_len"])
    assert speed == pytest.approx(row["tokens_per_second"], rel=0.04)
    assert not any(sent.values())


def test_shares_are_those_measured() -> None:
    assert (
        pytest.approx(MEASURED["matmul_tflop_per_second"], rel=1e-4)
        == hardware.MATMUL_SHARE * 989.4
    )
    assert pytest.approx(MEASURED["copy_tb_per_second"], rel=1e-3) == hardware.COPY_SHARE * 3.35
    for mixer, shares in hardware.PASSES_SHARE.items():
        for width, share in shares.items():
            if width < 4_096:  # which is of several GPUs
                rows = [
                    row
                    for row in ROWS
                    if (named(row).mixer, named(row).hidden_size) == (mixer, width)
                ]
                assert share == pytest.approx(sum(map(of_the_passes, rows)) / len(rows), abs=6e-4)


def of_the_passes(row: dict[str, Any]) -> float:
    """What a step reaches of the rate of matrix products while it does not update the weights."""
    step = row["rows"] * row["seq_len"] / row["tokens_per_second"]
    update = row["parameters"] * speed.UPDATE_BYTES / (MEASURED["copy_tb_per_second"] * 1e12)
    return float(row["flop_share"] / (1 - update / step))


def meshes() -> Iterator[tuple[str, dict[str, Any]]]:
    """Steps for which no GPU waited for its host, and was not filled by what ran before in the same
    process."""
    for name in (
        "meshes_h100x2_2026-11-26",
        "meshes_385m_h100x4_2026-11-27",
        "meshes_7b_alone_h100x4_2026-11-27",
        "meshes_7b_graph_h100x4_2026-11-27",
        "meshes_7b_d_h100x4_2026-11-27",
        "meshes_7b_tensor_h100x4_2026-11-27",
    ):
        for row in json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]:
            mesh = row["mesh"].split()[0]
            if mesh in ("shard", "replicate") or (row.get("graph") and mesh != "one"):
                yield (
                    f"{row['size']} {row['mesh']} {row['rows']} {name[:17]} {row.get('graph', '')}",
                    row,
                )


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in meshes()])
def test_meshes_as_measured(row: dict[str, Any]) -> None:
    layout = Layout(**{name: int(size) for name, size in map(str.split, row["mesh"].split(", "))})
    shapes = parameter_shapes(ModelConfig.named(row["size"]), row["seq_len"])
    if row["peak_bytes"] is not None:
        memory = expected_memory(shapes, layout, row["rows"], row["seq_len"])
        assert memory.allocated == pytest.approx(row["peak_bytes"], rel=0.01)
    speed, _ = find_speed(shapes, layout, GPUS["h100"], row["rows"], row["seq_len"])
    # its kernels are short
    small = row["size"] == "385m" and max(layout.tensor, layout.context) > 1
    assert speed == pytest.approx(
        row["tokens_per_second"],
        rel=0.16 if small else 0.06 if layout.tensor * layout.context > 1 else 0.04,
    )


BLOCKS: list[dict[str, Any]] = [
    {},
    {"position_layers": "all"},
    {"gate_rank": 8},
    {"gate": False},
    TRANSFORMER,
]
KEPT = [(words, 1) for words in BLOCKS]
KEPT += [
    (words, 2)
    for words in ({}, {"gate_rank": 8}, {"norm": "rmsnorm"}, {"norm": "layernorm"}, TRANSFORMER)
]
KEPT += [({}, 4)]
GROUPED = {"layer_types": ["linear_attention", *FULL[1:]], "softmax": {"num_key_value_heads": 2}}
CONVOLVED = {"convolution": "heads", "position": "rope", "position_layers": "all"}
KEPT += [
    (CONVOLVED, 1),
    (CONVOLVED, 2),
    ({"convolution": "input"}, 1),
    ({"convolution": "heads"}, 1),
]
KEPT += [
    ({"qk_norm": True}, 1),
    ({"head_norm": True}, 1),
    ({"head_norm": True, "norm": "rmsnorm"}, 1),
    ({**TRANSFORMER, **CONVOLVED}, 1),
]
KEPT += [(GROUPED, n) for n in (1, 2)]
GATED = {**TRANSFORMER, "gate": True}
KEPT += [(GATED, n) for n in (1, 2)]
KEPT += [({**GATED, "gate_rank": 8}, 1), ({**GATED, "position": "none"}, 1)]
KEPT += [({**GROUPED, "softmax": {"num_key_value_heads": 2, "gate": True}}, 1)]


@pytest.mark.parametrize(("words", "tensor"), KEPT, ids=lambda value: str(value)[:30])
def test_what_a_block_keeps(
    words: dict[str, Any], tensor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_dict(TINY).replace(hidden_size=64, intermediate_size=176, **words)
    layer, rows, length = (0 if words.get("position_layers") == "all" else 1), 4, 200
    kept: dict[int, int] = {}
    if config.convolution != "none":
        # as on a GPU, it is a kernel; what that computes does not matter here
        kernels = pytest.importorskip("transnormer.ops.convolution_triton")
        monkeypatch.setattr(convolution, "choose", lambda *_: "triton")
        monkeypatch.setattr(kernels, "launch", lambda *_, **__: None)

    def pack(x: Tensor) -> Tensor:
        part = held(x)
        of_tokens = {length, length // tensor, rows * length} & set(
            part.shape[:3]
        ) and part.numel() >= rows * length
        if of_tokens:  # and not of weights
            kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return x

    torch.compiler.reset()  # so many kinds of blocks would be too many for one function
    with pretended(Layout(tensor=tensor), torch.device("cpu")) as mesh:
        model = LanguageModel(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, 0.0, 0.02)
        if tensor > 1:
            sharding.cut(model, mesh)
        block = model.blocks()[layer]
        block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        x = torch.randn(rows, length // tensor, 64, requires_grad=True)
        positions = torch.arange(length)
        turns = rotation(model.rope_widths, config.rope_theta, positions, x.dtype)
        place = TokenPositions(positions, rotation=turns)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", torch.bfloat16),
        ):
            block(x, None, place)
    planned = saved_bytes(config, config.layers[layer], tensor)
    assert sum(kept.values()) / (rows * length) == pytest.approx(planned, rel=0.03)


class Trace(TorchDispatchMode):
    """Bytes of all tensors at their most, and of what collectives gathered or scattered, by their
    namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.sent: Counter[str] = Counter()
        self._there: dict[int, weakref.ref[Any]] = {}

    def see(self, *tensors: Any) -> None:
        for x in tensors:
            storage = held(x).untyped_storage()
            self._there[storage._cdata] = weakref.ref(storage)
        storages = {
            key: storage for key, ref in self._there.items() if (storage := ref()) is not None
        }
        self._there = {key: self._there[key] for key in storages}
        self.most = max(self.most, sum(storage.nbytes() for storage in storages.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.see(*(x for x in tree_leaves(found) if isinstance(x, Tensor)))
        # the whole is on one side; all but the own part is sent
        if re.match("_?c10d.*(gather|scatter)", str(func)):
            self.sent[func.namespace] += max(
                x.nbytes for x in tree_leaves((args, found)) if isinstance(x, Tensor)
            )
        return found


def trace(
    config: ModelConfig, layout: Layout, rows: int, seq_len: int, patch: pytest.MonkeyPatch
) -> Trace:
    """A step of the real sharded model, every tensor of which only says how large it is.

    As on a GPU: kernels where Triton has them, logits of a slice in bfloat16, AdamW's state. As
    compiled: no cache of weights that autocast has cast."""
    for module in (convolution, gla, lightning, lrpe, norm):
        patch.setattr(module, "choose", lambda *_: "triton")
    patch.setattr(loss, "SLICE_ELEMENTS", loss.CUDA_SLICE_BYTES // 2)
    for name in ("_softmax_loss_", "_add_product"):
        patch.setattr(loss, name, lambda *_: None)
    with pretended(layout, torch.device("cpu")) as mesh:
        with torch.device("meta"):
            model = LanguageModel(config)
        parallelize(model, mesh, recompute=layout.recompute, dtype="bfloat16")
        with FakeTensorMode(allow_non_fake_inputs=True), Trace() as found:
            model.to_empty(device="cpu")
            weights = [held(p) for p in model.parameters()]
            moments = [torch.empty_like(p) for p in weights for _ in range(2)]
            found.see(*weights, *moments)
            ids = torch.zeros(rows, seq_len // layout.context, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                total = model.loss(ids, ids, reduction="sum")
            total.backward()
    return found


SMALL = ModelConfig(vocab_size=2_048, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
                    intermediate_size=1_408)  # fmt: skip
WIDE = {"position_layers": "all"}
MANY = [Layout(), Layout(shard=8), Layout(tensor=2), Layout(shard=4, tensor=2), Layout(context=2)]
# rows, tokens a row, whether blocks are gathered apart
TRACED: list[tuple[Layout, dict[str, Any], int, int, bool]] = [
    *((replace(layout, recompute=True), {}, 4, 1_024, layout.tensor == 2) for layout in MANY),
    (replace(MANY[1], recompute=True), {}, 4, 1_024, True),
    (replace(MANY[1], recompute=True), WIDE, 4, 1_024, False),
    (MANY[1], WIDE, 1, 256, True), (MANY[3], WIDE, 1, 256, False),
    (MANY[1], {"norm": "layernorm"}, 1, 256, True),
    (MANY[0], {"vocab_size": 2**16}, 1, 256, False),  # fullest at the embedding
    (MANY[4], {"num_attention_heads": 2}, 32, 64, False),  # large states
    # hardly more than weights
    (MANY[1], {}, 1, 256, False), (MANY[2], {}, 1, 256, False), (MANY[2], {}, 1, 256, True),
    (Layout(replicate=2), {}, 1, 256, True), (Layout(replicate=2), {}, 4, 1_024, False),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "words", "rows", "seq_len", "apart"), TRACED)
def test_memory_and_collectives_as_traced(
    layout: Layout,
    words: dict[str, Any],
    rows: int,
    seq_len: int,
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    if apart:
        monkeypatch.setattr(memory, "GATHERED_BYTES", 0)
    config = SMALL.replace(**words)
    real, shapes = (
        trace(config, layout, rows, seq_len, monkeypatch),
        parameter_shapes(config, seq_len),
    )
    planned = expected_memory(shapes, layout, rows, seq_len)
    assert planned.allocated - WORKSPACE_BYTES == pytest.approx(real.most, rel=0.1)
    sent, ranks = sent_bytes(shapes, layout, rows, seq_len), layout.shard * layout.context
    assert sent["shard"] == pytest.approx(real.sent["c10d"] * (ranks - 1) / ranks, rel=0.01)
    others = (layout.tensor - 1) / layout.tensor
    assert sent["tensor"] == pytest.approx(real.sent["_c10d_functional"] * others, rel=0.01)


def test_which_blocks_are_gathered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GATHERED_BYTES", 10)
    assert memory.gathered_at_once([4, 4, 4, 4, 4], "wnnnn") == [range(1), range(1, 3), range(3, 5)]
    assert memory.gathered_at_once([11, 11, 3], "nnn") == [range(1), range(1, 2), range(2, 3)]
    assert memory.gathered_at_once([], "") == []


@pytest.mark.parametrize(
    "words", [{}, {"position_layers": (1, 2)}, EVERYTHING, OTHER, BASELINE, MIXED], ids=str
)
def test_one_block_of_each_kind_stands_for_all(words: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(TINY).replace(num_hidden_layers=5, **words)
    with torch.device("meta"):
        model = LanguageModel(config)
    shapes = parameter_shapes(config, 64)
    assert shapes.share(Layout()) == (model.parameter_count(), len(list(model.parameters())))
    assert shapes.flops_per_token == model.flops_per_token(64)
    assert shapes.blocks == sum(p.numel() for p in model.layers.parameters())
    for layout in (Layout(), Layout(shard=3), Layout(replicate=2, shard=2, tensor=2)):
        with pretended(layout, torch.device("cpu")) as mesh:
            parallelize(model, mesh)
        assert weight_bytes(config, layout) == sum(held(p).nbytes for p in model.parameters())
        with torch.device("meta"):
            model = LanguageModel(config)


def test_stacks_are_planned_by_their_layers() -> None:
    half = {"layer_types": ["linear_attention", "full_attention"] * 3}
    config = SMALL.replace(**half, softmax={"num_key_value_heads": 2})
    ours, theirs = speed.passes_share(SMALL), speed.passes_share(SMALL.replace(mixer="softmax"))
    assert speed.passes_share(config) == pytest.approx((ours + theirs) / 2)
    assert Job(config=config, gpus=2, seq_len=1_024).best()
    with pytest.raises(ValueError, match=r"--tensor 4 does not divide model.softmax.num_key_value"):
        Job(config=config, gpus=4, tensor=4)
    with pytest.raises(ValueError, match=r"--context 2 is planned for linear attention alone"):
        Job(config=config, gpus=2, context=2)
    slides = SMALL.replace(layer_types=["linear_attention", "sliding_attention"] * 3)
    with pytest.raises(ValueError, match="no run with sliding_attention layers was measured"):
        Job(config=slides, gpus=1).best()
    least, more = (
        expected_memory(parameter_shapes(c, 1_024), Layout(), 4, 1_024).total
        for c in (SMALL, config)
    )
    assert more < least  # no norm over heads, and keys and values of few heads


MESHES = [Layout(shard=4), Layout(replicate=2, shard=2), Layout(shard=2, tensor=2),
          Layout(context=2, tensor=2),
          Layout(tensor=2, replicate=2), Layout(replicate=2, context=2)]  # fmt: skip
CASES = [
    (layout, words)
    for layout in MESHES
    for words in (EVERYTHING, OTHER if layout.context > 1 else BASELINE)
]
CASES += [(MESHES[0], {}), (MESHES[2], OTHER), (MESHES[3], {})]


def test_shards_of_four_processes(tmp_path: Path) -> None:
    run_processes(_hold, str(tmp_path), count=4)
    for rank in range(4):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        for (layout, words), found in zip(CASES, real, strict=True):
            shapes = parameter_shapes(ModelConfig.from_dict(TINY).replace(**words), 16)
            place = rank // layout.tensor % (layout.shard * layout.context)
            numbers, tensors = shapes.share(layout, place)
            assert found == [4 * numbers, 4 * numbers, 8 * numbers + 4 * tensors], (
                layout,
                words,
                rank,
            )
            if place == 0:
                memory = expected_memory(shapes, replace(layout, accumulate=2), 4, 16)
                assert [memory.weights, memory.gradients, memory.optimizer] == found


def _hold(rank: int, folder: str) -> None:
    """Bytes of weights, gradients and optimizer after a step of this process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(os.path.join(folder, "store"), 4), rank=rank, world_size=4
    )
    found = []
    meshes = {layout: make_mesh(layout, torch.device("cpu")) for layout in MESHES}
    for layout, words in CASES:
        with torch.device("meta"):
            model = LanguageModel(ModelConfig.from_dict(TINY).replace(**words))
        parallelize(model, meshes[layout], dtype="bfloat16")
        model.to_empty(device="cpu")
        init_weights(model, 1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = new_optimizer(model, Optim())
        optimizer.step()
        parts = [model.parameters(), [p.grad for p in model.parameters()],
                 [x for state in optimizer.state.values() for x in state.values()]]  # fmt: skip
        found.append([sum(held(x).nbytes for x in part) for part in parts])
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
