"""Our classes as transformers' own: configuration, tokenizer, and what importing them loads."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys

import pytest

from transnormer import ModelConfig

from ..conftest import PUBLISHED, TEXT
from ..lazy import Lazy

hf, transformers = Lazy("transnormer.hub.hf"), Lazy("transformers")


# The configuration.


def test_the_configuration_is_ours_and_survives(folders, tmp_path) -> None:
    for folder in folders.values():
        config = transformers.AutoConfig.from_pretrained(folder)
        assert type(config) is hf.TransNormerConfig
        config.use_cache, config.output_hidden_states = False, True  # a Trainer sets the first
        config.save_pretrained(tmp_path)
        assert ModelConfig.from_json(tmp_path / "config.json") == config.own()
        assert transformers.AutoConfig.from_pretrained(tmp_path).own() == config.own()
        again = hf.TransNormerConfig(**json.loads(json.dumps(config.to_dict())))
        assert again.own() == config.own()
        assert "layer_types" not in config.to_diff_dict() or config.own().layer_types
    assert hf.TransNormerConfig(hidden_size=64, num_attention_heads=4).head_dim == 16
    assert hf.TransNormerConfig(**hf.TransNormerConfig().to_dict()).own() == ModelConfig()


def test_a_configuration_that_no_model_can_have_is_refused(copied) -> None:
    values = json.loads((copied / "config.json").read_text())

    def refused(changes: dict, match: str) -> None:
        (copied / "config.json").write_text(json.dumps({**values, **changes}))
        with pytest.raises(ValueError, match=match):
            transformers.AutoConfig.from_pretrained(copied)

    refused({"hidden_sise": 3}, "unknown model config key 'hidden_sise'; did you mean hidden_size")
    refused({"auto_map": {"AutoConfig": "evil.Config"}}, "unknown model config key 'auto_map'")
    refused({"mixer": "gal"}, "mixer = 'gal', but must be one of gla, softmax; did you mean gla")
    (copied / "config.json").write_text(
        json.dumps({key: values[key] for key in values if key != "hidden_size"})
    )
    with pytest.raises(
        ValueError, match=r"config\.json: no hidden_size, so the model's shape is not known"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(copied)
    (copied / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.from_pretrained(copied)
    config.position_layers = (17,)
    with pytest.raises(ValueError, match="position_layers"):
        transformers.AutoModelForCausalLM.from_config(config)


def test_published_checkpoints_are_sent_to_convert() -> None:
    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        with pytest.raises(
            ValueError, match=r"published TransNormerLLM checkpoint.*transnormer convert"
        ):
            auto.from_pretrained(PUBLISHED)


# Tokenizers.


def test_the_tokenizer_is_ours(folders, loaded, tmp_path) -> None:
    tokenizer, own = (
        transformers.AutoTokenizer.from_pretrained(folders["tied"]),
        loaded["tied"][0].tokenizer,
    )
    text = TEXT.read_text()[:3_000]
    assert tokenizer(text)["input_ids"] == own.encode(text).ids
    assert tokenizer.decode(own.encode(text).ids) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.eos_token == "<|endoftext|>"
    batch = tokenizer(["O", "Speak, speak."], padding=True, return_tensors="pt")
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["attention_mask"][0].tolist() == [0] * (batch["input_ids"].shape[1] - 1) + [1]
    shutil.copytree(folders["tied"], tmp_path / "named")
    values = json.loads((tmp_path / "named" / "config.json").read_text())
    (tmp_path / "named" / "config.json").write_text(
        json.dumps({**values, "bos_token_id": 3, "eos_token_id": 5})
    )
    named = transformers.AutoTokenizer.from_pretrained(tmp_path / "named")
    assert (named.eos_token_id, named.bos_token_id, named.pad_token_id) == (5, 3, 5)
    assert named(text)["input_ids"] == own.encode(text).ids
    tokenizer.pad_token = "!"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(folders["tied"] / "config.json", tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == own.encode(text).ids
    assert (again.pad_token, again.eos_token) == ("!", "<|endoftext|>")
    chat = [{"role": "user", "content": "Speak."}]
    assert again.apply_chat_template(chat, tokenize=False) == "user: Speak.\n"
    again.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        again.apply_chat_template(chat, tokenize=False)


# Importing.


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_transformers_the_hub_says_what_to_install() -> None:
    done = python("""
import importlib.metadata, sys, transnormer
found = [None, "5.15.2"]
def version(name):
    if not (here := found.pop(0)):
        raise importlib.metadata.PackageNotFoundError(name)
    return here
importlib.metadata.version = version
sys.modules["transformers"] = None
while found:
    try:
        import transnormer.hub
    except ImportError as error:
        print(error)
""")
    assert done.stdout.splitlines() == [
        (
            f"transnormer.hub needs transformers 5.16 or newer, and there is {here}: pip install "
            "'transnormer[hf]'"
        )
        for here in ("none", "5.15.2")
    ], done.stderr


def test_another_librarys_command_knows_our_classes(folders, tmp_path, monkeypatch) -> None:
    (tmp_path / "command.py").write_text(
        "import sys, transformers\n"
        "if __name__ == '__main__':\n"
        "    print(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__name__, "
        "len(sys.argv))\n"
    )
    command = [sys.executable, "-m", "transnormer.hub"]
    done = subprocess.run(
        [*command, "command", folders["tied"]], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["TransNormerConfig", "2"], done.stderr
    # nothing of what torchao says of itself while transformers imports it
    assert done.stderr == ""
    monkeypatch.setattr(sys, "argv", ["transnormer.hub"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("transnormer.hub", run_name="__main__")
    assert str(ended.value).startswith("error: which module?")
