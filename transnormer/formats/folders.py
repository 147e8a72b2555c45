"""`transnormer.load(path)`: which kind of folder this is, and its model and tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ..data.tokenizer import GPT2_FILES, load_tokenizer
from ..files import WEIGHTS
from ..model.language_model import LanguageModel
from ..run_folder import CHECKPOINTS, damage, read_seal, step_folders
from . import published
from .fingerprint import Fingerprint


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> LanguageModel:
    """The model of any folder, its `tokenizer` attribute set where the folder has one (else None).

    path: a run folder (its newest good checkpoint is taken, with a warning where newer ones are
        damaged), a checkpoint or exported folder (config.json, model.safetensors, tokenizer.json),
        or a folder in the published format.
    dtype: of the weights in memory; None keeps the stored one.
    check: where the folder has a fingerprint.json, compare its weight files' hashes and the model's
    logits with it. Raises OSError or ValueError: one line that names the file and what is wrong.
    """
    folder = find_model(Path(path))
    values = published.read_config(folder)
    read = (
        published.load_published
        if published.is_published(values)
        else LanguageModel.from_pretrained
    )
    fingerprint = Fingerprint.read(folder) if check else None
    model = read(folder, device=device, dtype=dtype)
    if fingerprint is not None:
        fingerprint.check(model, folder)
    if any(
        all((folder / name).is_file() for name in names)
        for names in (("tokenizer.json",), *GPT2_FILES)
    ):
        model.tokenizer = load_tokenizer(folder)
        size = model.tokenizer.get_vocab_size()
        if size > model.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {size:,} words, the model {model.config.vocab_size:,}"
            )
    return model


def find_model(path: Path) -> Path:
    """The folder with config.json that `path` stands for: itself, or the newest good checkpoint of
    a run."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: {'a file, not a folder with a model' if path.exists() else 'no such folder'}"
        )
    if (path / CHECKPOINTS).is_dir():
        checkpoints = step_folders(path / CHECKPOINTS)
        if not checkpoints:
            raise FileNotFoundError(f"{path}: the run has no complete checkpoint yet")
        damages: list[str] = []
        for folder in checkpoints:
            if (wrong := damage(folder, _sealed_model(folder))) is None:
                for line in damages:
                    warnings.warn(f"{line}; {folder.name} is taken instead", stacklevel=2)
                return folder
            damages.append(f"{folder}: {wrong}")
        raise ValueError(f"{damages[0]}; no earlier checkpoint is good")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: neither a run (checkpoints/) nor a model folder (config.json)"
        )
    return path


def _sealed_model(folder: Path) -> list[str]:
    """The files of a checkpoint that are the model."""
    try:
        weights = [name for name in read_seal(folder) if name.startswith(("model", "weights"))]
    except (OSError, ValueError):
        return []  # and `damage` will say what is wrong with the seal
    return ["config.json", *(weights or [WEIGHTS])]
