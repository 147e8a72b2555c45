"""Models out of our folders, in our format and in the published one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import transnormer
from transnormer import TRANSFORMER, LanguageModel, ModelConfig
from transnormer.data.tokenizer import encode, train_tokenizer
from transnormer.files import sha256
from transnormer.run_folder import seal

from ..conftest import TEXT
from ..test_cli import call, refused


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it: a sealed checkpoint with weights, tokenizer and what only
    training needs."""
    model = LanguageModel(
        ModelConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
        )
    )
    model.tokenizer = train_tokenizer([TEXT.read_text()[:20_000]], 300)
    folder = tmp_path / "runs" / "x" / "checkpoints" / "step-0000007"
    model.save_pretrained(folder)
    (folder / "optimizer.safetensors").write_bytes(b"much")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    seal(folder)
    return tmp_path / "runs" / "x"


def test_export_of_a_run(run: Path, tmp_path: Path) -> None:
    out, _ = call("export", "--model", run, "--out", tmp_path / "ours")
    assert "fingerprint     checked by every load" in out
    names = [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "fingerprint.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    model, wanted = transnormer.load(tmp_path / "ours"), transnormer.load(run)
    assert model.config == wanted.config
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in wanted.state_dict().items()
    )
    assert encode(model.tokenizer, "To be") == encode(wanted.tokenizer, "To be")

    call(
        "export",
        "--model",
        run,
        "--out",
        tmp_path / "half",
        "--dtype",
        "bfloat16",
        "--max-shard",
        "30KB",
    )
    half = transnormer.load(tmp_path / "half")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    assert all(
        torch.equal(t.bfloat16(), half.state_dict()[name])
        for name, t in wanted.state_dict().items()
    )
    transnormer.load(tmp_path / "half", dtype=torch.float32)

    out, _ = call("export", "--model", run, "--out", tmp_path / "theirs", "--format", "published")
    assert "fingerprint     none" in out
    ids = torch.randint(300, (1, 40))
    with torch.no_grad():
        assert torch.equal(transnormer.load(tmp_path / "theirs")(ids)[0], wanted(ids)[0])
    call("convert", tmp_path / "theirs", tmp_path / "round")
    for name in ("model.safetensors", "chat_template.jinja"):
        assert sha256(tmp_path / "round" / name) == sha256(tmp_path / "ours" / name)


def test_the_softmax_baseline_is_exported_but_not_as_published(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=41, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **TRANSFORMER
    )
    LanguageModel(config).save_pretrained(tmp_path / "model")
    call("export", "--model", tmp_path / "model", "--out", tmp_path / "ours")
    transnormer.load(tmp_path / "ours")
    line = refused(
        "export",
        "--model",
        tmp_path / "model",
        "--out",
        tmp_path / "theirs",
        "--format",
        "published",
    )
    assert "the published format knows no mixer = 'softmax'" in line
    assert "'onnx' is unknown; there are transnormer, published" in refused(
        "export", "--model", tmp_path / "model", "--out", tmp_path / "theirs", "--format", "onnx"
    )
    assert "'int4' is unknown" in refused(
        "export", "--model", tmp_path / "model", "--out", tmp_path / "theirs", "--dtype", "int4"
    )
    assert "ours exists" in refused(
        "export", "--model", tmp_path / "model", "--out", tmp_path / "ours"
    )
    broken = LanguageModel(config)
    broken.layers[1].glu.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    assert "layers.1.glu.up_proj.weight holds a number that is not finite" in refused(
        "export", "--model", tmp_path / "broken", "--out", tmp_path / "theirs"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "model", "ours"]
