"""The fingerprint beside converted weights: what damage it finds, and what it lets pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import transnormer
from transnormer.files import sha256
from transnormer.formats.convert import PublishedReader, convert
from transnormer.formats.fingerprint import published_logits
from transnormer.formats.published import config_from_published

from ..conftest import PUBLISHED
from ..test_cli import refused
from .published_folders import VALUES, publish, tensors_of


def test_the_published_logits_are_the_published_code_s(tmp_path: Path) -> None:
    """What the fingerprint is taken from agrees with the published code, not only with our
    model."""
    expected = load_file(PUBLISHED / "expected.safetensors")
    config = config_from_published(json.loads((PUBLISHED / "config.json").read_text()))
    read = PublishedReader(PUBLISHED, config).pieces
    found = published_logits(
        read, config, expected["input_ids"][0].long(), torch.arange(68), torch.float32
    )
    assert (found - expected["logits_eval"][0, -1]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "ours"
    convert(PUBLISHED, out)
    return out


@pytest.fixture
def ours(converted: Path, tmp_path: Path) -> Path:
    """A copy of a converted folder, to be changed."""
    return Path(shutil.copytree(converted, tmp_path / "ours"))


def refuse(folder: Path, match: str, error: type[Exception] = ValueError, **options) -> str:
    with pytest.raises(error, match=match) as caught:
        transnormer.load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_flipped_bit_is_found(ours: Path) -> None:
    weights = ours / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-5] ^= 1
    weights.write_bytes(whole)
    refuse(ours, r"model\.safetensors is truncated or damaged.*fingerprint\.json")
    transnormer.load(ours, check=False)
    weights.write_bytes(whole[:-8])
    refuse(ours, r"model\.safetensors is truncated")
    weights.unlink()
    refuse(ours, r"model\.safetensors: no such file", FileNotFoundError)


def test_one_damaged_shard_is_named(tmp_path: Path) -> None:
    convert(PUBLISHED, tmp_path / "ours", shard_bytes=200_000)
    shard = tmp_path / "ours" / "model-00002-of-00004.safetensors"
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 128
    shard.write_bytes(whole)
    refuse(tmp_path / "ours", r"model-00002-of-00004\.safetensors is truncated or damaged")
    shard.unlink()
    refuse(tmp_path / "ours", r"model-00002-of-00004\.safetensors: no such file", FileNotFoundError)


def _misplace(tensors: dict[str, torch.Tensor]) -> None:
    name = "layers.1.mixer.qkvu_proj.weight"
    tensors[name] = (
        tensors[name].unflatten(0, (4, 4, -1)).transpose(0, 1).flatten(0, 2).contiguous()
    )


def _one_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.2.mixer.out_proj.weight"][3, 5] += 1


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.mixer.out_proj.weight"], tensors["layers.1.mixer.out_proj.weight"] = (
        tensors["layers.1.mixer.out_proj.weight"],
        tensors["layers.0.mixer.out_proj.weight"],
    )


@pytest.mark.parametrize("damage", [_misplace, _one_weight, _swap])
def test_wrong_weights_with_right_hashes_are_found_by_their_logits(damage, ours: Path) -> None:
    weights = ours / "model.safetensors"
    tensors = load_file(weights)
    damage(tensors)
    save_file(tensors, weights, {"format": "pt"})
    record = json.loads((ours / "fingerprint.json").read_text())
    record["files"] = {weights.name: {"bytes": weights.stat().st_size, "sha256": sha256(weights)}}
    (ours / "fingerprint.json").write_text(json.dumps(record))
    refuse(ours, r"fingerprint\.json: in float32 on cpu the logit of token \d+ is")


@pytest.mark.parametrize(
    "change", [{"embed_scale": False}, {"decay": "paper"}, {"activation": "gelu"}], ids=str
)
def test_a_changed_configuration_is_found(change: dict, ours: Path) -> None:
    values = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**values, **change}))
    for dtype in (torch.float32, torch.bfloat16):
        refuse(ours, r"the logit of token \d+ is", dtype=dtype)


def test_other_weights_saved_into_the_folder_are_not_held_to_it(ours: Path) -> None:
    model = transnormer.load(ours)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(2)
    model.save_pretrained(ours)
    assert torch.equal(transnormer.load(ours).embed_tokens.weight, model.embed_tokens.weight)


def test_every_dtype_passes_the_check(ours: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert transnormer.load(ours, dtype=dtype).head_weight.dtype == dtype


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": {}}'], ids=["empty", "list", "nothing", "part"]
)
def test_a_damaged_fingerprint_is_named(text: str, ours: Path) -> None:
    (ours / "fingerprint.json").write_text(text)
    refuse(ours, r"fingerprint\.json is damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"files": {}},
            (
                r"model\.safetensors is not listed in fingerprint\.json, so nobody knows whether "
                r"it "
                r"is right"
            ),
        ),
        ({"ids": []}, r"fingerprint\.json is damaged"),
        ({"ids": [True]}, r"fingerprint\.json is damaged"),
        ({"words": [], "logits": []}, r"fingerprint\.json is damaged"),
        ({"words": [1_000], "logits": [0.0]}, r"fingerprint\.json is of another model"),
        (
            {"words": [1], "logits": ["0"]},
            r"fingerprint\.json is damaged \(a logit or tolerance is not a finite",
        ),
        (
            {"tolerance": float("inf")},
            r"fingerprint\.json is damaged \(a logit or tolerance is not a finite",
        ),
    ],
    ids=str,
)
def test_a_fingerprint_that_would_check_nothing_is_refused(
    change: dict, message: str, ours: Path
) -> None:
    record = json.loads((ours / "fingerprint.json").read_text())
    (ours / "fingerprint.json").write_text(json.dumps({**record, **change}))
    refuse(ours, message)


def test_weights_whose_logits_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = tensors_of(VALUES)
    for name in ("l1", "l2"):
        weights[f"model.layers.2.channel_mixer.{name}.weight"] *= 1e30
    publish(tmp_path / "source", weights)
    assert "logits are not finite" in refused("convert", tmp_path / "source", tmp_path / "ours")
