"""What is read from disk is whole and right, or one line names the file; what cannot be written is
told beforehand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import transnormer
from transnormer import LanguageModel, ModelConfig
from transnormer.files import OFFSETS, PIECES, check_can_write, new_folder, read_json, read_weights
from transnormer.run_folder import SEAL, damage, seal

TINY = ModelConfig(
    vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
)


def refused(error: type[Exception], match: str, call, *arguments: object) -> None:
    with pytest.raises(error, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert "[Errno" not in str(caught.value)


# JSON.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}',
            r"a\.json: not JSON \(the key 'c' stands twice in one object\)",
        ),
        (b'{"a": ', r"a\.json: not JSON \(Expecting value"),
        (b"\xff\xfe\xff", r"a\.json: not JSON"),
        (b"[" * 100_000, r"a\.json: not JSON \(nested too deeply\)"),
        (b"", r"a\.json: not JSON"),
    ],
)
def test_json_is_whole_or_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    refused(ValueError, message, read_json, tmp_path / "a.json")


def test_json_that_cannot_be_read_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(FileNotFoundError, r"gone\.json: no such file", read_json, tmp_path / "gone.json")
    refused(OSError, "cannot be read: Is a directory", read_json, tmp_path)
    monkeypatch.setattr("transnormer.files.LARGEST_JSON_BYTES", 3)
    (tmp_path / "a.json").write_text("[10]")
    refused(ValueError, r"a\.json: 4 bytes are too many", read_json, tmp_path / "a.json")


# Sealed folders.


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A run with one sealed checkpoint of a tiny model; returns the checkpoint."""
    folder = tmp_path / "run" / "checkpoints" / "step-0000001"
    LanguageModel(TINY).save_pretrained(folder)
    seal(folder)
    return folder


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "",
        "3",
        '["config.json"]',
        '{"config.json": 3}',
        '{"config.json": {"bytes": "1"}}',
        '{"../config.json": {"bytes": 1, "sha256": ""}}',
        '{"/etc/hosts": {"bytes": 1, "sha256": ""}}',
    ],
)
def test_a_seal_that_says_nothing_is_damaged(sealed: Path, content: str) -> None:
    assert damage(sealed) is None
    (sealed / SEAL).write_text(content)
    for names in (None, [], ["config.json"]):
        assert damage(sealed, names) == "complete.json is damaged"
    refused(
        ValueError,
        "step-0000001: complete.json is damaged; no earlier checkpoint",
        transnormer.load,
        sealed.parents[1],
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_the_seal_does_not_list_is_not_loaded(sealed: Path, name: str) -> None:
    record = json.loads((sealed / SEAL).read_text())
    del record[name]
    (sealed / SEAL).write_text(json.dumps(record))
    refused(
        ValueError,
        rf"{re.escape(name)} is not listed in complete\.json",
        transnormer.load,
        sealed.parents[1],
    )


# Weights.


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = LanguageModel(TINY)
    model.save_pretrained(tmp_path)
    save_file(
        {name: tensor.to(dtype) for name, tensor in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    kind = str(dtype).removeprefix("torch.")
    refused(
        ValueError,
        rf"model\.safetensors: \S+ holds {kind}; weights are floating-point",
        transnormer.load,
        tmp_path,
    )


def test_a_folder_that_its_index_says_nothing_of(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(
        ValueError,
        r"index\.json: damaged, or not an index of shards \(it names no tensor\)",
        read_weights,
        tmp_path,
    )


def write_halves(folder: Path, begins: tuple[int, int], rows: int = 4) -> None:
    """A matrix [4, 2] in two files of two rows each, which say where they begin."""
    for number, begin in enumerate(begins, start=1):
        layout = {"a": {"saved_offsets": [begin, 0], "shape": [rows, 2]}}
        pieces: dict[str, Tensor] = {"a": torch.full((2, 2), float(number))}
        save_file(pieces, folder / PIECES.format(number, 2), {OFFSETS: json.dumps(layout)})


def test_pieces_fill_a_tensor_once(tmp_path: Path) -> None:
    write_halves(tmp_path, (0, 2))
    assert read_weights(tmp_path)["a"].tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]]


@pytest.mark.parametrize(
    ("begins", "message"),
    [
        ((0, 0), "a piece of a lies over another"),
        ((0, 1), "lies over another"),
        ((-2, 0), "lies outside of it"),
        ((0, 3), "lies outside of it"),
    ],
)
def test_pieces_that_leave_a_hole_are_refused(
    tmp_path: Path, begins: tuple[int, int], message: str
) -> None:
    """As many numbers as the tensor has are no proof that all of it is there."""
    write_halves(tmp_path, begins)
    refused(
        ValueError,
        rf"weights-0000[12]-of-00002\.safetensors: damaged.*{message}",
        read_weights,
        tmp_path,
    )


def test_pieces_of_which_one_is_missing(tmp_path: Path) -> None:
    write_halves(tmp_path, (0, 2), rows=6)
    refused(ValueError, "8 of 12 numbers of a are there", read_weights, tmp_path)


# Configurations.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "a model of the type 'llama', not 'transnormer'"),
        ({"hidden_size": None}, "no hidden_size, so the model's shape is not known"),
        ({"vocab_size": None, "num_hidden_layers": None}, "no vocab_size, num_hidden_layers, so"),
        (
            {"num_hidden_layers": 10**20},
            "num_hidden_layers is 100,000,000,000,000,000,000, more than 4,096",
        ),
        ({"head_dim": 10**20}, "head_dim is 100,000,000,000,000,000,000, more than 1,048,576"),
        ({"hidden_size": "4"}, "model config: hidden_size = '4', but must be a positive integer"),
        ({"hidden_sizes": 4}, "unknown model config key 'hidden_sizes'; did you mean hidden_size"),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    LanguageModel(TINY).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    values = {
        key: value for key, value in values.items() if key not in change or change[key] is not None
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    refused(ValueError, rf"config\.json: {message}", transnormer.load, tmp_path)


def test_a_config_that_says_a_thing_twice_is_refused(tmp_path: Path) -> None:
    LanguageModel(TINY).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        text.replace('"decay_scale"', '"decay_scale": 2.0,\n  "decay_scale"')
    )
    refused(
        ValueError,
        r"config\.json: not JSON \(the key 'decay_scale' stands twice",
        transnormer.load,
        tmp_path,
    )


def test_a_file_in_the_place_of_a_models_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    refused(
        FileNotFoundError,
        "model: a file, not a folder with a model",
        transnormer.load,
        tmp_path / "model",
    )
    refused(FileNotFoundError, "gone: no such folder", transnormer.load, tmp_path / "gone")


# Writing.


def make(out: Path) -> None:
    with new_folder(out) as folder:
        (folder / "a").write_text("a")


def deny(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", "/somewhere/.else.partial")


def test_a_folder_that_cannot_be_made_is_told_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        refused(
            OSError, rf"out: cannot be made: {tmp_path}/file is a file, not a folder$", make, out
        )
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", deny)  # as a read-only folder does; root may write into any
        refused(
            OSError, rf"^{tmp_path}/out: cannot be made: Permission denied$", make, tmp_path / "out"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
def test_a_folder_that_cannot_be_filled_is_told_by_its_own_name(
    tmp_path: Path, error: OSError | None
) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "out") as folder:
            if error is not None:
                raise error
            (folder / "missing" / "a").write_text("")

    where, why = (
        ("out", "No space left on device")
        if error
        else ("out/missing/a", "No such file or directory")
    )
    refused(OSError, rf"^{tmp_path}/{where}: cannot be written: {why}$", fill)
    assert not list(tmp_path.iterdir())


def test_errors_about_other_files_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, new_folder(tmp_path / "out"):
        (tmp_path / "input").read_text()
    assert caught.value.filename == str(tmp_path / "input")


def test_whether_a_file_can_be_written_is_known_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    for path, message in (
        (tmp_path, "cannot be written: it is a folder; name a file"),
        (
            tmp_path / "gone" / "a.json",
            r"gone/a\.json: cannot be written: No such file or directory",
        ),
        (tmp_path / "file" / "a.json", r"file/a\.json: cannot be written: Not a directory"),
    ):
        refused(OSError, message, check_can_write, path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", deny)
        refused(
            OSError,
            r"a\.json: cannot be written: Permission denied",
            check_can_write,
            tmp_path / "a.json",
        )
    check_can_write(tmp_path / "file")
    check_can_write(tmp_path / "a.json")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "kept"}
