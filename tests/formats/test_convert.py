"""Published checkpoints into our format: every number as it was, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import transnormer
from transnormer import LanguageModel
from transnormer.files import sha256
from transnormer.formats.convert import convert, export
from transnormer.formats.published import (
    config_from_published,
    published_config,
    published_shapes,
    published_tensors,
)

from ..conftest import PUBLISHED, REPOSITORY
from ..test_cli import call, refused
from .published_folders import VALUES, publish, stored, tensors_of

# Every kind of model and file, there and back.

MODELS = [
    ({}, torch.float32, "bin"),
    ({}, torch.bfloat16, "safetensors"),
    ({"decoder_attention_heads": 3, "decoder_embed_dim": 24, "hidden_dim": 24}, torch.float32,
     "3 bin"),
    ({"decoder_attention_heads": 5, "decoder_embed_dim": 20, "hidden_dim": 40, "glu_dim": -1},
     torch.float16, "bin"),
    ({"decoder_attention_heads": 6, "decoder_embed_dim": 30, "hidden_dim": 42}, torch.bfloat16,
     "2 safetensors"),
    ({"decoder_attention_heads": 1, "decoder_layers": 1, "linear_use_lrpe_list": [0]},
     torch.float32, "old"),
    ({"linear_use_lrpe_list": [0, 1, 1], "no_scale_embedding": False}, torch.bfloat16, "3 bin"),
    ({"linear_use_lrpe_list": [], "linear_use_lrpe": 1, "bias": True}, torch.float32, "2 old"),
    ({"linear_use_lrpe_list": [], "linear_act_fun": "1+elu", "tie_word_embeddings": False},
     torch.float32, "bin"),
    ({"norm_type": "layernorm", "linear_act_fun": "relu", "bias": True}, torch.float16,
     "safetensors"),
    ({"linear_act_fun": "exp", "no_scale_embedding": False, "pad_token_id": None}, torch.float32,
     "4 safetensors"),
    ({"linear_act_fun": "identity", "decoder_layers": 2, "linear_use_lrpe_list": [1, 1]},
     torch.bfloat16, "bin"),
    ({"linear_act_fun": "sine", "eos_token_id": [7, 8], "bos_token_id": 50_260}, torch.float64,
     "bin"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "dtype", "kind"), MODELS, ids=str)
def test_there_and_back(change: dict, dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    values = {**VALUES, **change}
    source = publish(tmp_path / "source", weights := tensors_of(values, dtype), values, kind)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    convert(source, tmp_path / "ours")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before

    model, wanted = transnormer.load(tmp_path / "ours"), transnormer.load(source)
    assert model.config == wanted.config
    for name, tensor in wanted.state_dict().items():
        assert model.state_dict()[name].dtype == dtype, name
        assert torch.equal(model.state_dict()[name], tensor), name
    ids = torch.randint(values["vocab_size"], (2, 50))
    with torch.no_grad():
        assert torch.equal(model(ids)[0], wanted(ids)[0])

    export(tmp_path / "ours", tmp_path / "back", format="published")
    back = stored(tmp_path / "back")
    assert back.keys() == weights.keys()
    assert all(
        torch.equal(back[name], tensor) and back[name].dtype == dtype
        for name, tensor in weights.items()
    )
    back_values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back_values["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert config_from_published(back_values) == config_from_published(values)


def test_the_published_numbers_come_out_of_a_converted_folder(tmp_path: Path) -> None:
    expected = load_file(PUBLISHED / "expected.safetensors")
    out, error = call("convert", PUBLISHED, tmp_path / "ours")
    assert error == ""
    assert "167,232" in out
    assert "float32 in 1 file" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
    files = ["README.md", "config.json", "fingerprint.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    model, ids = transnormer.load(tmp_path / "ours"), expected["input_ids"].long()
    with torch.no_grad():
        assert (model(ids)[0] - expected["logits_eval"]).abs().max() < 1e-4
    out, _ = call("info", tmp_path / "ours")
    assert "167,232" in out


def test_shapes_are_those_of_the_modules() -> None:
    for change, _, _ in MODELS:
        config = config_from_published({**VALUES, **change})
        found = published_tensors(LanguageModel(config).state_dict(), config)
        assert [(name, tuple(tensor.shape)) for name, tensor in found.items()] == [
            *published_shapes(config).items()
        ]


def test_published_configs_say_what_ours_say() -> None:
    for change, _, _ in MODELS:
        config = config_from_published({**VALUES, **change})
        assert config_from_published(published_config(config)) == config


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", tensors_of(VALUES))
    out, _ = call("convert", source, tmp_path / "ours", "--max-shard", "20KB")
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert f"in {len(files)} files" in out
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        with safe_open(file, "pt") as shard:
            names = list(shard.keys())
            assert {index["weight_map"].pop(name) for name in names} == {file.name}
            assert shard.metadata() == {"format": "pt"}
            size = sum(shard.get_tensor(name).nbytes for name in names)
        assert size <= 20_000
        total += size
    assert index == {"metadata": {"total_size": total}, "weight_map": {}}
    model, wanted = transnormer.load(tmp_path / "ours"), transnormer.load(source)
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in wanted.state_dict().items()
    )
    for size in ("5 parsecs", "0", "GB", "-1GB"):
        assert f"{size!r} is no size in bytes" in refused(
            "convert", source, tmp_path / "no", f"--max-shard={size}"
        )


def test_dtypes_are_kept_tensor_by_tensor(tmp_path: Path) -> None:
    weights = tensors_of(VALUES, torch.bfloat16)
    theta = "model.layers.0.token_mixer.lrpe.theta"
    weights[theta] = weights[theta].float() * 1.001
    convert(publish(tmp_path / "source", weights), tmp_path / "ours")
    found = stored(tmp_path / "ours")
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float32} == {
        "layers.0.mixer.position.theta"
    }
    assert transnormer.load(tmp_path / "ours").layers[0].mixer.position.theta.dtype == torch.float32

    some = "model.layers.1.channel_mixer.l1.weight"
    convert(publish(tmp_path / "mixed", {**weights, some: weights[some].float()}), tmp_path / "two")
    with pytest.raises(ValueError, match=r"several dtypes \(bfloat16, float32\)"):
        transnormer.load(tmp_path / "two")
    transnormer.load(tmp_path / "two", dtype=torch.float32)


def test_a_stored_copy_of_the_tied_head_is_left_out(tmp_path: Path) -> None:
    weights = tensors_of(VALUES)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    convert(publish(tmp_path / "source", weights, kind="2 bin"), tmp_path / "ours")
    assert "lm_head.weight" not in stored(tmp_path / "ours")


def test_views_and_parameters_are_tensors_too(tmp_path: Path) -> None:
    weights = tensors_of(VALUES)
    some, other = "model.layers.0.channel_mixer.l3.weight", "model.layers.0.channel_mixer.l1.weight"
    odd = {
        **weights,
        some: weights[some].T.contiguous().T,
        other: torch.nn.Parameter(weights[other]),
    }
    assert not odd[some].is_contiguous()
    for name, source in (("odd", odd), ("plain", weights)):
        convert(publish(tmp_path / name, source), tmp_path / f"{name} ours")
    assert sha256(tmp_path / "odd ours/model.safetensors") == sha256(
        tmp_path / "plain ours/model.safetensors"
    )


def test_memory_stays_below_the_largest_shard(tmp_path: Path) -> None:
    width, layers = 1_024, 4
    values = {**VALUES, "decoder_embed_dim": width, "hidden_dim": width, "glu_dim": 2_816,
              "decoder_layers": layers,
              "vocab_size": 30_000, "decoder_attention_heads": 8,
              "linear_use_lrpe_list": [1, 0, 0, 0]}  # fmt: skip
    shapes = published_shapes(config_from_published(values))
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        for name, shape in shapes.items()
    }
    source = publish(tmp_path / "source", weights, values, "3 bin")
    largest = max(path.stat().st_size for path in source.glob("*.bin"))
    assert largest > 55e6
    script = (
        "import sys, tokenizers\nfrom transnormer.formats.convert import convert\n"
        "def memory(key): return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') "
        "if l.startswith(key))\n"
        "before = memory('VmRSS')\nconvert(sys.argv[1], sys.argv[2])\nprint(memory('VmHWM') - "
        "before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "ours")],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(run.stdout) < 1.3 * largest, (
        f"{int(run.stdout) / 1e6:.0f} MB beside a shard of {largest / 1e6:.0f} MB"
    )


def test_progress_goes_to_the_end_and_never_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(PUBLISHED, tmp_path / "ours", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert 0.9 < seen[-1][0] / seen[-1][1] <= 1


# What is refused: one line that names the thing, and nothing is written.


class _Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


SOME = "model.layers.1.channel_mixer.l2.weight"


def _with(name: str, value: object):
    def spoil(weights: dict, tmp_path: Path) -> dict:
        return {**weights, name: value(weights[name]) if callable(value) else value}

    return spoil


def _set(weights: torch.Tensor, number: float) -> torch.Tensor:
    weights = weights.clone()
    weights[-1, -1] = number
    return weights


WEIGHTS = [
    (lambda w, _: {k: v for k, v in w.items() if k != SOME}, f"{SOME} is missing"),
    (_with("model.layers.0.surprise", torch.ones(2, 2)), "model.layers.0.surprise is unknown"),
    (_with("model.layers.3.channel_mixer.l2.weight", torch.ones(48, 32)),
     "layers.3.channel_mixer.l2.weight is unknown"),
    (_with("model.layers.1.token_mixer.lrpe.theta", torch.ones(4, 1, 8)),
     "layers.1.token_mixer.lrpe.theta is unknown"),
    (_with(SOME, lambda w: w[:-1]), f"{SOME} is [47, 32], not [48, 32]"),
    (_with("model.layers.0.token_mixer.lrpe.theta", lambda w: w.squeeze(1)),
     "lrpe.theta is [4, 8], not [4, 1, 8]"),
    (_with(SOME, lambda w: _set(w, float("nan"))),
     f"{SOME} in pytorch_model.bin holds a number that is not finite"),
    (_with(SOME, lambda w: _set(w, float("-inf"))),
     f"{SOME} in pytorch_model.bin holds a number that is not finite"),
    (_with("lm_head.weight", torch.ones(41, 32)),
     "lm_head.weight differs from model.embed_tokens.weight"),
    (_with(SOME, lambda w: w.int()),
     f"{SOME} is no plain tensor of floating-point numbers (int32)"),
    (_with(SOME, lambda w: w.to_sparse()), f"{SOME} is no plain tensor"),
    (_with(SOME, lambda w: w.to("meta")), f"{SOME} is no plain tensor"),
    (_with("epoch", 3), "'epoch': int"),
    (_with("optimizer", {"lr": 1.0}), "'optimizer': dict"),
    (lambda w, _: [*w.values()], "something else than named tensors (list)"),
    (lambda w, tmp_path: {**w, "trap": _Trap(tmp_path / "sprung")},
     "bin holds more than tensors: io.open; nothing of it"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "named"), WEIGHTS, ids=[named for _, named in WEIGHTS])
def test_weights_that_do_not_fit(spoil, named: str, tmp_path: Path) -> None:
    source = publish(tmp_path / "source", tensors_of(VALUES))
    torch.save(
        spoil(torch.load(source / "pytorch_model.bin"), tmp_path), source / "pytorch_model.bin"
    )
    line = refused("convert", source, tmp_path / "new" / "ours")
    assert named in line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


CONFIGS = [
    ({"gate_dim": 16},
     "TransNormerLLM3 (config key 'gate_dim'): its modelling code is not at hand"),
    ({"use_rope": True}, "unknown published config key 'use_rope'"),
    ({"no_scale_embeding": True}, "'no_scale_embeding'; did you mean no_scale_embedding?"),
    ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
    ({"decoder_attention_heads": 5}, "hidden_dim 32 is not divisible by decoder_attention_heads 5"),
    ({"linear_use_lrpe_list": [1]}, "linear_use_lrpe_list has 1 flags for 3 layers"),
    ({"decoder_layers": "three"}, "wrong kind"),
    ({"decoder_layers": 10**9}, "decoder_layers is 1,000,000,000, more than"),
    ({"vocab_size": 10**15}, "vocab_size is 1,000,000,000,000,000, more than"),
    ({"decoder_layers": 4, "linear_use_lrpe_list": [1, 0, 0, 0]},
     "model.layers.3.token_mixer.qkvu_proj.weight is missing"),
    ({"linear_use_lrpe_list": [1, 1, 0]}, "model.layers.1.token_mixer.lrpe.theta is missing"),
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ({"bias": True}, "qkvu_proj.bias is missing"),
    ({"vocab_size": 40, "bos_token_id": 1}, "model.embed_tokens.weight is [41, 32], not [40, 32]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named"), CONFIGS, ids=[named for _, named in CONFIGS])
def test_configurations_that_do_not_fit(change: dict, named: str, tmp_path: Path) -> None:
    publish(tmp_path / "source", tensors_of(VALUES), {**VALUES, **change})
    assert named in refused("convert", tmp_path / "source", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_folders_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    weights = tensors_of(VALUES)
    source = publish(tmp_path / "source", weights, kind="2 bin")
    shard, index = (
        source / "pytorch_model-00002-of-00002.bin",
        source / "pytorch_model.bin.index.json",
    )

    def line(folder: Path = source, out: str = "ours") -> str:
        before = sorted(path for path in tmp_path.rglob("*"))
        found = refused("convert", folder, tmp_path / out)
        assert sorted(path for path in tmp_path.rglob("*")) == before
        return found

    assert "no config.json" in line(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert "full exists; remove it or choose another" in line(out="full")
    assert "source exists" in line(out="source")

    whole, map_text = shard.read_bytes(), index.read_text()
    shard.write_bytes(whole[: len(whole) // 2])
    assert "pytorch_model-00002-of-00002.bin is truncated, damaged" in line()
    shard.unlink()
    assert "pytorch_model-00002-of-00002.bin: no such file" in line()
    torch.save({**torch.load(source / "pytorch_model-00001-of-00002.bin"), **weights}, shard)
    assert (
        "model.embed_tokens.weight is in pytorch_model-00001-of-00002.bin and again in "
        "pytorch_model-0000"
    ) in line()
    shard.write_bytes(whole)
    index.write_text("{")
    assert "pytorch_model.bin.index.json: damaged" in line()
    listed = json.loads(map_text)
    listed["weight_map"]["model.ghost"] = shard.name
    index.write_text(json.dumps(listed))
    assert "model.ghost" in line()
    index.write_text(map_text)
    (source / "config.json").write_text("{")
    assert "config.json: not JSON" in line()
    (source / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert "not a published TransNormerLLM" in line()
    (source / "config.json").write_text(json.dumps(VALUES))
    # read before any .bin
    save_file({name: torch.ones(1) for name in weights}, source / "model.safetensors")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-9])
    assert "model.safetensors: truncated, damaged" in line()


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".ours.partial").mkdir()
    (tmp_path / ".ours.partial" / "model.safetensors").write_text("half")
    convert(PUBLISHED, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    transnormer.load(tmp_path / "ours")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        line = refused("convert", PUBLISHED, tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/ours/model.safetensors: cannot be written: File too large" in line
    assert not list(tmp_path.iterdir())
