"""Adapters: trained, merged and read by peft, and what binds them to the model that they adapt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import transnormer
from transnormer import LanguageModel
from transnormer.config import TRANSFORMER
from transnormer.run_folder import step_folders
from transnormer.train import lora
from transnormer.train.loop import train
from transnormer.train.recipe import Lora

from ..lazy import Lazy
from .runs import train_on_two
from .tuning import curve, means, small_model, tune, weights

peft, transformers = Lazy("peft"), Lazy("transformers")


def test_an_adapter_is_trained_merged_and_read_by_peft(tuning: Path) -> None:
    before = weights("base")
    targets = 'lora.targets=["qkvu_proj", "glu.down_proj"]'
    run = train(tune("run=adapt", "lora.rank=4", targets, "train.dtype=bfloat16")).folder
    newest = step_folders(run / "checkpoints")[0]
    changed = {
        name for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])
    }
    assert changed == {
        f"layers.{n}.{name}.weight" for n in (0, 1) for name in ("mixer.qkvu_proj", "glu.down_proj")
    }
    ids = torch.randint(300, (2, 30))
    merged = transnormer.load(run)(ids)[0]
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained("base"), str(newest / lora.FOLDER)
    )
    unmerged = theirs(ids).logits
    assert (unmerged - transnormer.load("base")(ids)[0]).abs().max() > 0.1
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, theirs.merge_and_unload()(ids).logits, rtol=1e-5, atol=1e-5)
    memory = (newest / "optimizer.safetensors").stat().st_size
    assert memory < sum(t.nbytes for t in before.values())  # of the adapters alone


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False, "gate_rank": 3, "bias": True}, TRANSFORMER],
    ids=str,
)
def test_merged_and_unmerged_models_agree(tuning: Path, prepared: Path, changes: dict) -> None:
    model = small_model(prepared, tuning / "other", **changes, initializer_range=0.2).eval()
    ids = torch.randint(300, (2, 30))
    before, count = model(ids)[0], model.parameter_count()
    lora.inject(model, Lora(rank=3, alpha=5), tuning / "other")
    torch.testing.assert_close(model(ids)[0], before)  # B begins at zero
    for name, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    after = model(ids)[0]
    whole = LanguageModel.from_tensors(
        model.config, dict(lora.merged(model, model.state_dict())), "the merged model"
    )
    assert (after - before).abs().max() > 0.1
    assert whole.parameter_count() == count
    assert whole.state_dict().keys() == transnormer.load("other").state_dict().keys()
    torch.testing.assert_close(whole(ids)[0], after, rtol=1e-4, atol=1e-4)


# The command line, which kills itself in the middle of a step once there is a checkpoint.
KILLED = """
import os, pathlib, signal
from transnormer.cli import main
from transnormer.train import loop
gradients = loop.gradients
def killed(*inputs):
    loss = gradients(*inputs)
    if any(pathlib.Path("runs/killed/checkpoints").glob("step-*")):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
loop.gradients = killed
main()
"""


def test_a_killed_lora_run_loses_nothing(tuning: Path) -> None:
    options = ("lora.dropout=0.2", "train.steps=40")
    train(tune("run=whole", *options))
    command = [sys.executable, "-c", KILLED, "train", "tune.toml", "run=killed", *options]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    assert done.returncode == -signal.SIGKILL
    train(tune("run=killed", *options))
    assert len(json.loads(Path("runs/killed/run.json").read_text())["starts"]) == 2
    assert curve("killed") == curve("whole")
    adapters = [
        step_folders(Path("runs") / run / "checkpoints")[0] / lora.FOLDER
        for run in ("whole", "killed")
    ]
    for name in (lora.WEIGHTS, "adapter_config.json"):
        assert len({(folder / name).read_bytes() for folder in adapters}) == 1
    one, other = weights("runs/whole"), weights("runs/killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def remembered(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: x
        for path in folder.glob("optimizer*.safetensors")
        for name, x in load_file(path).items()
    }


MESHES = {
    "shard": (),
    "context": ("parallel.context=2", "train.recompute=true"),
    "replicate": ("parallel.replicate=2", "lora.dropout=0.3"),
}


def test_adapters_on_two_processes(tuning: Path) -> None:
    """Those of one process; merged, saved for peft; and gone on with from a step that was also
    evaluated."""
    options = ("lora.rank=4", "checkpoint.every=2", "checkpoint.keep=9", "eval.every=3")
    runs = {name: (f"run={name}", *options, *mesh) for name, mesh in MESHES.items()}
    for name, dropout in (("one", ()), ("one-replicate", ("lora.dropout=0.3",))):
        train(tune(f"run={name}", *options, *dropout))
    train_on_two(*runs.values(), recipe="tune.toml")
    base, whole = weights("base"), {name: (curve(name), weights(f"runs/{name}")) for name in runs}
    for name, (losses, merged) in whole.items():
        dropout = name == "replicate"
        alone = "one-replicate" if dropout else "one"
        one, two = (step_folders(Path("runs") / run / "checkpoints") for run in (alone, name))
        config = f"{lora.FOLDER}/adapter_config.json"
        assert (one[0] / config).read_text() == (two[0] / config).read_text()
        assert len(remembered(one[3])) > 0
        assert remembered(two[3]).keys() == remembered(one[3]).keys() | {"torch_rng/1"}
        # each drops out its own
        assert not torch.equal(*(remembered(two[3])[f"torch_rng/{rank}"] for rank in (0, 1)))
        if not dropout:
            assert means(losses) == pytest.approx(means(curve("one")), rel=1e-3)
            for each, tensor in weights("runs/one").items():
                assert (merged[each] - tensor).norm() <= 0.02 * (tensor - base[each]).norm(), each
        ids = torch.randint(300, (2, 30))
        theirs = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained("base"), str(two[0] / lora.FOLDER)
        )
        torch.testing.assert_close(
            transnormer.load(f"runs/{name}")(ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-4
        )
        for folder in two[:3]:  # back to step 6
            shutil.rmtree(folder)
    train(tune(*runs["shard"]))
    assert means(curve("shard")) == pytest.approx(means(whole["shard"][0]), rel=1e-3)
    again = [name for name in runs if name != "shard"]
    train_on_two(*(runs[name] for name in again), recipe="tune.toml")
    for name in again:
        losses, merged = whole[name]
        assert curve(name) == losses
        found = weights(f"runs/{name}")
        assert all(torch.equal(found[each], tensor) for each, tensor in merged.items())


def test_damage_to_an_adapter_and_another_base_are_named(
    tuning: Path, prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("run=hurt", "lora.rank=2", "train.seq_len=16")
    run = train(tune(*options)).folder
    newest, older = step_folders(run / "checkpoints")
    file = newest / lora.FOLDER / lora.WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    train(tune(*options))
    said = capfd.readouterr().err
    assert "step-0000012: adapter/adapter_model.safetensors is truncated" in said
    assert f"goes on from {older.name}" in said
    assert "conversations do not fit into seq_len 16 and are cut" in said
    assert (newest.with_name(f"damaged-{newest.name}") / lora.FOLDER / lora.WEIGHTS).exists()
    shutil.rmtree(newest)
    small_model(prepared, tuning / "base", initializer_range=0.1)
    with pytest.raises(
        ValueError, match=r"was trained on other weights than model\.from holds now"
    ):
        train(tune(*options))


def test_adapters_need_a_model_to_stand_on(tuning: Path) -> None:
    recipe = Path("tune.toml")
    recipe.write_text(
        recipe.read_text().replace('from = "base"', "hidden_size = 48") + "[lora]\nrank = 4\n"
    )
    with pytest.raises(
        ValueError, match=r"lora needs model\.from, the folder of the model to adapt"
    ):
        tune()
