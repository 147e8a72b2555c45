"""Where and how a result was made."""

from __future__ import annotations

import pytest
import torch

from transnormer.provenance import device_name


def test_of_several_gpus_the_one_that_is_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name("cuda:1") == device_name(torch.device("cuda", 1)) == "GPU 1"
    assert device_name("cuda") == "GPU None"  # torch's current one
    assert device_name("cpu").endswith(" threads")
