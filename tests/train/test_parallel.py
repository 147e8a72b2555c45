"""A run on many processes is the run on one: loss, gradients and weights after a step, on every
mesh."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from transnormer.config import TRANSFORMER, ModelConfig
from transnormer.data.loader import Batch
from transnormer.planning.mesh_sizes import Parallel, check_mesh, resolve
from transnormer.train.mesh import Mesh, start
from transnormer.train.parallelize import clip, parallelize
from transnormer.train.recipe import Recipe

from ..children import run_processes
from .processes import TINY, Case, build, run

FSDP, HSDP, TP, CP = Parallel(), Parallel(replicate=2), Parallel(tensor=2), Parallel(context=2)
EVERYTHING = {  # that a model of ours may have beside the defaults
    "num_attention_heads": 6, "hidden_size": 36, "norm": "rmsnorm", "bias": True,
    "position_layers": "all",
    "gate_rank": 3, "tie_word_embeddings": False, "pad_token_id": 30, "embed_scale": True,
}  # fmt: skip
OTHER = {
    "norm": "layernorm",
    "position": "ape",
    "decay": "paper",
    "glu": "mlp",
    "activation": "1+elu",
}
BASELINE = {**TRANSFORMER, "num_attention_heads": 6, "hidden_size": 36}
STACK = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "hidden_size": 32,
    "softmax": {"window": 5, "num_key_value_heads": 2, "gate": True},
}
CONVOLVED = {
    "convolution": "heads",
    "position": "rope",
    "position_layers": "all",
    "qk_norm": True,
    "head_norm": True,
}
DECAYED_BASELINE = {**TRANSFORMER, "position": "none", "decay": "alibi"}


def check_equals_one_process(cases: Sequence[Case], world: int, folder: Path) -> None:
    found = run(cases, world, folder)
    for result in found:
        assert not result["error"], f"{result['case']}:\n{result['error']}"
        narrow = "float64" not in result["case"]
        for kind in (
            "loss",
            "norm",
            "weight",
            "gradient",
            "clipped",
            *(() if narrow else ("stepped",)),
        ):
            most = 2.0 if narrow else 0.0 if kind == "weight" else 1e-9
            assert result[kind] <= most, f"{result['case']}: {kind}, {result['worst']}"
    assert [result["case"] for result in found] == [str(case) for case in cases]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    cases = [
        Case(FSDP, accumulate=2), Case(HSDP, EVERYTHING), Case(FSDP, EVERYTHING, dtype="bfloat16"),
        Case(FSDP, BASELINE, recompute=True), Case(FSDP, compile="aot_eager"),
        Case(FSDP, {"num_hidden_layers": 4}, dtype="bfloat16", accumulate=2),
        Case(FSDP, recompute=True, apart=True),
        Case(FSDP, {"intermediate_size": 48}, "bfloat16", recompute=True, float8="rowwise"),
        Case(CP, {"intermediate_size": 48}, "bfloat16", float8="rowwise"),
        Case(FSDP, {"num_hidden_layers": 4}, compile="aot_eager", recompute=True, apart=True),
        Case(TP, EVERYTHING), Case(TP, OTHER, recompute=True), Case(TP, BASELINE),
        Case(TP, DECAYED_BASELINE),
        Case(TP, dtype="bfloat16"), Case(TP, EVERYTHING, compile="aot_eager", recompute=True),
        Case(FSDP, STACK, recompute=True), Case(TP, STACK),
        Case(TP, STACK, recompute=True, packed=True),
        Case(TP, packed=True),
        Case(TP, BASELINE, compile="aot_eager", recompute=True),
        Case(CP, EVERYTHING, accumulate=2), Case(CP, OTHER, recompute=True),
        Case(CP, dtype="bfloat16", apart=True),
        Case(CP, EVERYTHING, packed=True), Case(CP, compile="aot_eager", recompute=True),
        Case(CP, STACK, recompute=True), Case(CP, STACK, packed=True),
        Case(CP, BASELINE, "bfloat16"), Case(CP, DECAYED_BASELINE),
        Case(FSDP, CONVOLVED, recompute=True, segment=6), Case(TP, CONVOLVED, packed=True),
        Case(CP, CONVOLVED, packed=True),
        Case(CP, {**STACK, "convolution": "input"}, recompute=True),
        Case(TP, {"decay": "delta"}), Case(FSDP, {"head_norm": True, "norm": "rmsnorm"}),
        Case(CP, STACK, compile="aot_eager", recompute=True),
        # inductor drops what a rank has no need of, be it an exchange that others wait for
        Case(CP, {**BASELINE, "num_hidden_layers": 1, "convolution": "heads"}, compile="inductor"),
        Case(FSDP, segment=6), Case(HSDP, EVERYTHING, accumulate=2, segment=5, apart=True),
        Case(FSDP, dtype="bfloat16", compile="aot_eager", segment=8),
        Case(TP, EVERYTHING, recompute=True, segment=6),
        Case(FSDP, dtype="bfloat16", segment=6),
        Case(FSDP, dtype="bfloat16", recompute=True, segment=6),
    ]  # fmt: skip
    check_equals_one_process(cases, 2, tmp_path)


def test_two_processes_equal_one_on_the_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    cases = [Case(mesh, dtype="float32", kernels=True) for mesh in (FSDP, TP, CP)]
    convolved = {"convolution": "heads"}
    cases.append(Case(CP, convolved, packed=True, dtype="float32", kernels=True))
    check_equals_one_process(cases, 2, tmp_path)


def test_four_processes_equal_one(tmp_path: Path) -> None:
    both = Parallel(tensor=2, context=2)
    cases = [
        Case(TP, recompute=True), Case(TP, EVERYTHING), Case(TP, BASELINE, accumulate=2),
        Case(CP, recompute=True),
        Case(CP, EVERYTHING, dtype="bfloat16"), Case(both, recompute=True, packed=True),
        Case(both, EVERYTHING),
        Case(both, OTHER), Case(both, STACK), Case(Parallel(replicate=2, tensor=2), EVERYTHING),
        Case(Parallel(replicate=2, context=2)),
        Case(HSDP, accumulate=2, apart=True), Case(FSDP, BASELINE),
        Case(TP, accumulate=2, segment=6), Case(Parallel(tensor=4)),
        Case(Parallel(context=4), packed=True),
    ]  # fmt: skip
    check_equals_one_process(cases, 4, tmp_path)


WAYS = [  # dtype, recompute, compile, accumulate
    ("float64", False, "", 1), ("float64", True, "", 2), ("float64", False, "aot_eager", 2),
    ("float64", True, "inductor", 1), ("bfloat16", False, "", 2), ("bfloat16", True, "inductor", 1),
]  # fmt: skip


MESHES = [
    (world, Parallel(replicate=replicate, context=context, tensor=tensor))
    for world in (2, 4)
    for replicate, context, tensor in itertools.product((1, 2, 4), repeat=3)
    if replicate * context * tensor <= world
]


@pytest.mark.proof
@pytest.mark.parametrize(
    ("world", "mesh"), MESHES, ids=[f"{world}-{Case(mesh)}" for world, mesh in MESHES]
)
def test_every_mesh_equals_one_process(world: int, mesh: Parallel, tmp_path: Path) -> None:
    cases = []
    for model in ({}, EVERYTHING, OTHER, BASELINE, DECAYED_BASELINE, CONVOLVED):
        config = ModelConfig.from_dict(TINY).replace(**model)
        if config.num_attention_heads % mesh.tensor:
            continue
        cases += [Case(mesh, model, *way, apart=number % 2 == 0) for number, way in enumerate(WAYS)]
        if mesh.context == 1 and config.mixer == "gla":
            cases += [
                Case(mesh, model, dtype, accumulate=2, segment=12)
                for dtype in ("float64", "bfloat16")
            ]
        if mesh.context * mesh.tensor == world:
            cases += [Case(mesh, model, packed=True), Case(mesh, model, "bfloat16", packed=True)]
    check_equals_one_process(cases, world, tmp_path)


def test_blocks_alike_are_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    alone = Mesh(torch.device("cpu"))
    model = build(Case(FSDP, {"num_hidden_layers": 6}, compile=counter), alone)  # type: ignore[arg-type]
    for _ in range(2):
        ids = torch.zeros(2, 16, dtype=torch.int64)
        model.loss(ids, ids).backward()
    assert counter.frame_count == 2  # the first layer has LRPE


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with start(Parallel(), "cpu") as mesh:
        assert not torch.distributed.is_initialized()
        assert (mesh.world, mesh.rank, mesh.data_rank, mesh.data_ranks, mesh.context_rank) == (
            1,
            0,
            0,
            1,
            0,
        )
        assert mesh.first
        model = build(Case(FSDP), mesh)
        before = [type(module) for module in model.modules()]
        parallelize(model, mesh)
        assert [type(module) for module in model.modules()] == before
        batch = Batch(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64))
        assert mesh.split(batch).ids.shape == (2, 6)
        assert mesh.total(torch.tensor(3.0)) == 3
        model.loss(*batch[:2]).backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        assert clip(model, mesh, 0) == norm
        clip(model, mesh, norm.item() / 4)
        clipped = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        torch.testing.assert_close(clipped, norm / 4)


def test_rows_are_cut_into_slices_by_context_rank() -> None:
    ids = torch.arange(24).view(2, 12)
    for rank, (data, context, tensor) in enumerate(itertools.product(range(2), range(3), range(2))):
        mesh = Mesh(torch.device("cpu"), shard=2, context=3, tensor=2, rank=rank)
        assert (mesh.data_rank, mesh.context_rank, mesh.tensor_rank) == (data, context, tensor)
        mine = mesh.split(Batch(ids, ids + 1))
        assert mine.ids.equal(ids[:, 4 * context :][:, :4])
        assert mine.targets.equal(mine.ids + 1)
    with pytest.raises(ValueError, match="context x tensor = 6 does not divide rows of 10 tokens"):
        mesh.split(Batch(ids[:, :10], ids[:, :10]))


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (
            Parallel(tensor=3),
            8,
            r"parallel.tensor = 3 does not divide the 8 processes; 1, 2, 4 or 8 would",
        ),
        (
            Parallel(tensor=2, context=3),
            8,
            r"parallel.context = 3 does not divide what is left of 8 processes, 4; 1, 2 or 4 would",
        ),
        (
            Parallel(replicate=4),
            2,
            r"parallel.replicate = 4 does not divide the 2 processes; 1 or 2 would",
        ),
        (
            Parallel(shard=2, tensor=2),
            8,
            r"parallel.shard = 2, but of 8 processes 4 are left for it; write 4, or 0 for all",
        ),
        (
            Parallel(tensor=2),
            1,
            (
                "parallel.tensor = 2 needs that many processes, and there is one; "
                "launch/torchrun.sh "
                "starts several"
            ),
        ),
    ],
)
def test_a_mesh_must_fit_the_processes(parallel: Parallel, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(parallel, world)


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        (
            Parallel(tensor=4),
            {"num_attention_heads": 6, "hidden_size": 36},
            (
                "parallel.tensor = 4 does not divide model.num_attention_heads = 6; 1, 2, 3 or 6 "
                "would fit the model"
            ),
        ),
        (
            Parallel(tensor=4),
            {"vocab_size": 50},
            "parallel.tensor = 4 does not divide model.vocab_size = 50; 1 or 2 would",
        ),
        (
            Parallel(tensor=4),
            {"intermediate_size": 26},
            "parallel.tensor = 4 does not divide model.intermediate_size = 26",
        ),
        (
            Parallel(context=8, tensor=2),
            {},
            (
                "parallel.context x tensor = 16 does not divide train.seq_len = 24; with tensor = "
                "2, "
                "context may be 1, 2, 3, 4, 6 or 12"
            ),
        ),
        (
            Parallel(),
            {},
            "parallel.replicate x shard = 16 does not divide the 8 rows of a microbatch",
        ),
    ],
)
def test_a_mesh_must_fit_the_model_and_the_batch(
    parallel: Parallel, model: dict[str, object], message: str
) -> None:
    config = ModelConfig.from_dict(TINY).replace(**model)
    with pytest.raises(ValueError, match=message):
        check_mesh(config, parallel, 16, seq_len=24, rows=8)
    check_mesh(config, Parallel(replicate=2, shard=2), 4, seq_len=24, rows=8)


def test_the_recipe_names_the_mesh() -> None:
    recipe = {"run": "wide", "data": {"path": "somewhere"}}
    assert Recipe.from_dict(recipe).parallel == Parallel()
    assert Recipe.from_dict({**recipe, "parallel": {"tensor": 2, "shard": 4}}).parallel == Parallel(
        tensor=2, shard=4
    )
    for table, message in (
        ({"tensor": 0}, "parallel.tensor = 0, but must be positive"),
        ({"shard": -1}, "parallel.shard = -1, but must be 0 or more"),
        ({"tenser": 2}, "unknown key parallel.tenser; did you mean parallel.tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.from_dict({**recipe, "parallel": table})


def started_by_torchrun(rank: int, port: int) -> None:
    warnings.simplefilter("error")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    with start(Parallel(tensor=2), "cpu") as mesh:
        found = mesh.world, mesh.data_ranks, mesh.total(torch.tensor(mesh.rank + 1)).item()
        assert found == (2, 1, mesh.rank + 1), found
    assert not torch.distributed.is_initialized()


def test_what_torchrun_sets_is_all_it_needs() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run_processes(started_by_torchrun, store.port, count=2)
