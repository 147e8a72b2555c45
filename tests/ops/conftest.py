"""Triton's interpreter is chosen where triton is first imported: on a machine without a GPU, the tests choose it."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
