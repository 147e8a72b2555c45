"""`transnormer.load(path)`: which kind of folder this is, and its model and tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data.tokenizer import GPT2_FILES, load_tokenizer
from ..files import damage, step_folders
from ..model.language_model import LanguageModel
from . import released
from .fingerprint import Fingerprint

MODEL_FILES = ("config.json", "model.safetensors")


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> LanguageModel:
    """The model of any folder, its `tokenizer` attribute set where the folder has one (else None).

    path: a run folder (its newest checkpoint is taken), a checkpoint or exported folder (config.json,
        model.safetensors, tokenizer.json), or a folder in the published format.
    dtype: of the weights in memory; None keeps the stored one.
    check: where the folder has a fingerprint.json, compare its weight files' hashes and the model's logits with it.
    Raises OSError or ValueError: one line that names the file and what is wrong, and for a damaged checkpoint the
    newest good one.
    """
    folder = find_model(Path(path))
    values = released.read_config(folder)
    read = released.load_published if released.is_published(values) else LanguageModel.from_pretrained
    fingerprint = Fingerprint.read(folder) if check else None
    model = read(folder, device=device, dtype=dtype)
    if fingerprint is not None:
        fingerprint.check(model, folder)
    if any(all((folder / name).is_file() for name in names) for names in (("tokenizer.json",), *GPT2_FILES)):
        model.tokenizer = load_tokenizer(folder)
        size = model.tokenizer.get_vocab_size()
        if size > model.config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {size:,} words, the model {model.config.vocab_size:,}")
    return model


def find_model(path: Path) -> Path:
    """The folder with config.json that `path` stands for: itself, or the newest checkpoint of a run."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if (path / "checkpoints").is_dir():
        checkpoints = step_folders(path / "checkpoints")
        if not checkpoints:
            raise FileNotFoundError(f"{path}: the run has no complete checkpoint yet")
        if wrong := damage(checkpoints[0], MODEL_FILES):
            good = next((folder for folder in checkpoints[1:] if not damage(folder, MODEL_FILES)), None)
            offer = f"the newest good one is {good}" if good else "no earlier one is good"
            raise ValueError(f"{checkpoints[0]}: {wrong}; {offer}")
        return checkpoints[0]
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: neither a run (checkpoints/) nor a model folder (config.json)")
    return path
