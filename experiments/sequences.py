"""Corpora that are not language, one token a sample: handwritten digits and raw speech.

    python experiments/sequences.py digits FOLDER --out build/corpus/digits
    python experiments/sequences.py speech FOLDER --out build/corpus/speech
    python experiments/sequences.py speech FOLDER --pack build/speech.npz
    python experiments/sequences.py speech build/speech.npz --out build/corpus/speech

The folder of digits holds MNIST's *-images-idx3-ubyte.gz, that of speech WAV files, which --pack
makes into one file for another machine.

A sample has 256 levels and is written as one of the 256 Braille patterns. So a corpus is text like
any other, its tokenizer knows the end of a text and 256 characters, and neither the shards nor the
model know of samples.

An image is a document of 784 samples, row by row from the top. MNIST's test images are the test
part, and the last 5,000 of its training images are for validation. A recording is a document of
8-bit mu-law samples, 8,000 a second. A hash of its samples decides its part, one in 20 for
validation and one in 20 for the test.

Each part begins with one dummy sample, because no end-of-text token stands before the first
document. So every row of 785 tokens holds one end-of-text token (the first row the dummy) and one
image."""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import wave
from pathlib import Path

import corpus
import numpy as np

from transnormer.data.tokenizer import END_OF_TEXT
from transnormer.files import write_text

LEVELS = 256
FIRST = 0x2800  # the code point of the first Braille pattern
PIXELS = 28 * 28
VALID_IMAGES = 5_000
HELD_OUT = 1 / 20  # of the recordings for validation, and as many for the test
RATE = 8_000  # samples of speech a second


def encode(amplitudes: np.ndarray) -> np.ndarray:
    """Samples of 16 bits as mu-law levels from 0 to 255, which are finest near silence."""
    x = amplitudes.astype(np.float64) / 2**15
    y = np.sign(x) * np.log1p((LEVELS - 1) * np.abs(x)) / np.log(LEVELS)  # from -1 to 1
    return np.rint((y + 1) / 2 * (LEVELS - 1)).astype(np.uint8)


def decode(levels: np.ndarray) -> np.ndarray:
    """The inverse of `encode`, within half a level: int16."""
    y = levels / (LEVELS - 1) * 2 - 1
    x = np.sign(y) * (LEVELS ** np.abs(y) - 1) / (LEVELS - 1)
    return np.rint(x * (2**15 - 1)).astype(np.int16)


def write_wav(path: Path, levels: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(decode(levels).astype("<i2").tobytes())


def read_wav(path: Path) -> np.ndarray:
    """The levels of a recording. Raises ValueError where it is not mono of 16 bits at RATE."""
    with wave.open(str(path)) as file:
        if (found := file.getparams()[:3]) != (1, 2, RATE):
            raise ValueError(
                f"{path}: channels, bytes a sample and rate are {found}, not {(1, 2, RATE)}"
            )
        return encode(np.frombuffer(file.readframes(file.getnframes()), "<i2"))


def read_images(path: Path) -> np.ndarray:
    """The images of an IDX file, uint8 [N, PIXELS]. Raises ValueError where it is not one of images
    of 28 x 28."""
    content = gzip.decompress(path.read_bytes())
    magic, count, height, width = np.frombuffer(content, ">u4", 4).tolist()
    if (magic, height, width) != (0x803, 28, 28):
        raise ValueError(f"{path}: not an IDX file of images of 28 x 28")
    return np.frombuffer(content, np.uint8, count * PIXELS, 16).reshape(count, PIXELS)


def as_text(samples: np.ndarray) -> str:
    return (samples.astype("<u2") + FIRST).tobytes().decode("utf-16-le")


def digits(folder: Path) -> dict[str, list[str]]:
    """The images of each part."""
    train, test = (
        [
            as_text(image)
            for name in folder.glob(f"*{part}-images-idx3-ubyte.gz")
            for image in read_images(name)
        ]
        for part in ("train", "t10k")
    )
    return {"train": train[:-VALID_IMAGES], "valid": train[-VALID_IMAGES:], "test": test}


def recordings(source: Path) -> dict[str, np.ndarray]:
    """Levels by name, of a folder of WAV files or of the file that --pack made of one."""
    if source.is_dir():
        return {
            str(path.relative_to(source)): read_wav(path) for path in sorted(source.rglob("*.wav"))
        }
    with np.load(source) as packed:
        return dict(packed)


def speech(source: Path) -> dict[str, list[str]]:
    """The recordings of each part."""
    parts: dict[str, list[str]] = {part: [] for part in corpus.PARTS}
    for text in map(as_text, recordings(source).values()):
        parts[corpus.part_of(text, False, HELD_OUT)].append(text)
    return parts


def tokenizer() -> str:
    """A tokenizer.json with the end of a text as id 0 and level n as id n + 1."""
    from tokenizers import Tokenizer, decoders, models

    ids = {chr(FIRST + level): level + 1 for level in range(LEVELS)}
    bpe = Tokenizer(models.BPE({END_OF_TEXT: 0} | ids, merges=[]))
    bpe.add_special_tokens([END_OF_TEXT])
    bpe.decoder = decoders.Fuse()
    return bpe.to_str(pretty=True) + "\n"


def build(parts: dict[str, list[str]], out: Path) -> None:
    """Prepared folders in `out`, as corpus.py makes them: train, with valid as its validation
    split, and test."""
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary)
        write_text(text / "tokenizer.json", tokenizer())
        for part, documents in parts.items():
            with (text / f"{part}.jsonl").open("w", encoding="utf-8") as file:
                lead = chr(FIRST)
                for document in documents:
                    file.write(json.dumps({"text": lead + document}, ensure_ascii=False) + "\n")
                    lead = ""
        corpus.build(text, None, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("digits", "speech"))
    parser.add_argument(
        "source", type=Path, help="the folder with the files, or what --pack made of it"
    )
    parser.add_argument("--out", type=Path, help="the folder to prepare")
    parser.add_argument(
        "--pack",
        type=Path,
        help="the .npz to pack recordings into; MNIST's files are small as they are",
    )
    given = parser.parse_args()
    if given.pack:
        if given.kind != "speech":
            parser.error("--pack is for speech")
        np.savez_compressed(given.pack, **recordings(given.source))  # type: ignore[arg-type]
    if given.out:
        build({"digits": digits, "speech": speech}[given.kind](given.source), given.out)


if __name__ == "__main__":
    main()
