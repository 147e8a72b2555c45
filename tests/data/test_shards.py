"""Token shards: windows over them, and folders that are damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from transnormer.data.shards import TokenData


def test_windows_cross_shard_borders(prepared_scenes):
    data = TokenData(prepared_scenes)
    paths = sorted(prepared_scenes.glob("train-*.bin"))
    raw = np.concatenate([np.fromfile(path, "<u2") for path in paths])
    assert data.tokens == len(raw) > 3000
    for start, length in (
        (0, 10),
        (995, 10),
        (1000, 1000),
        (999, 1),
        (990, 2050),
        (0, len(raw)),
        (len(raw), 0),
    ):
        window = data.window(start, length)
        assert window.dtype == np.int64
        assert np.array_equal(window, raw[start : start + length])
    for start, length in ((-1, 5), (len(raw) - 4, 5), (5, -1)):
        with pytest.raises(ValueError, match=f"has {len(raw)} tokens; there is no window"):
            data.window(start, length)


@pytest.fixture
def copy(prepared_scenes, tmp_path):
    return Path(shutil.copytree(prepared_scenes, tmp_path / "copy"))


def test_damaged_folders_are_refused(copy, tmp_path):
    def refused(message, split="train"):
        with pytest.raises(ValueError, match=message) as caught:
            TokenData(copy, split)
        assert "\n" not in str(caught.value)

    for path, message in (
        (tmp_path, "has no data.json"),
        (tmp_path / "gone", "is not there"),
        (copy / "data.json", "is a file"),
    ):
        with pytest.raises(ValueError, match=f"not a prepared folder, because it {message}; run "):
            TokenData(path)
    refused("split must be one of train, valid; got 'test'", "test")
    shard = copy / "train-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused("train-00001.bin: damaged; it has 1999 bytes, not 2000")
    assert TokenData(copy, "valid").tokens > 0  # is whole
    shard.write_bytes(whole + b"x")
    refused("train-00001.bin: damaged")
    shard.unlink()
    refused("train-00001.bin: this shard is missing")
    shard.write_bytes(whole)
    (copy / "tokenizer.json").write_text("{}")
    refused("tokenizer.json: is not the tokenizer that made these tokens")
    (copy / "tokenizer.json").unlink()
    refused("tokenizer.json: is not the tokenizer")


def test_damaged_records_are_refused(copy):
    path = copy / "data.json"
    whole = json.loads(path.read_text())
    TokenData(copy)
    path.write_text(json.dumps(whole | {"format": 3}))
    with pytest.raises(ValueError, match="has format 3, not 1 or 2; prepare the folder again"):
        TokenData(copy)
    parts = [json.dumps(whole)[:-5], "[]", "{}", '"x"', b"\xff"]
    parts += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    parts += [json.dumps(whole | {"format": 2})]
    parts += [
        json.dumps(whole | {"dtype": "int8"}),
        json.dumps(whole | {"splits": {"train": {}, "valid": {}}}),
    ]
    for key in ("tokens", "bytes", "documents", "shards"):
        train = {k: v for k, v in whole["splits"]["train"].items() if k != key}
        parts.append(json.dumps(whole | {"splits": whole["splits"] | {"train": train}}))
    shards = whole["splits"]["train"]["shards"]
    outside = [{**shard, "file": f"../copy/{shard['file']}"} for shard in shards]
    for change in ({"tokens": 5}, {"documents": "many"}, {"bytes": None}, {"shards": outside}):
        parts.append(
            json.dumps(
                whole | {"splits": whole["splits"] | {"train": whole["splits"]["train"] | change}}
            )
        )
    for key, value in (
        ("vocab_size", "400"),
        ("vocab_size", 0),
        ("end_of_text", 400),
        ("source", {}),
    ):
        parts.append(json.dumps(whole | {key: value}))
    for part in parts:
        path.write_bytes(part if isinstance(part, bytes) else part.encode())
        with pytest.raises(ValueError, match=r"data.json: (damaged, or not the record|not JSON)"):
            TokenData(copy)
    path.write_text(json.dumps(whole).replace('"dtype"', '"dtype": "uint32", "dtype"'))
    with pytest.raises(ValueError, match=r"data.json: not JSON \(the key 'dtype' stands twice"):
        TokenData(copy)
