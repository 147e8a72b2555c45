"""The corpus of the experiments: one text, one tokenizer, one split, from any folder of documents.

    python experiments/corpus.py TEXT... --out build/corpus [--wikitext FOLDER]   # prepare it here

or, for another machine, pack the files here and prepare them there:

    python experiments/corpus.py TEXT... --pack build/pack [--wikitext FOLDER]
    python experiments/corpus.py build/pack --out build/corpus

Every document is in exactly one of three parts. A file whose name contains "valid" is held out
whole, half of it for validation and half for the test; of every other file one document in 200 is
for validation and one in 200 for the test. A hash of the document's text decides, so the split does
not depend on the order of files. The test part is looked at only by runs that confirm an analysis
which was written down before."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

from transnormer.data.documents import read_documents
from transnormer.data.prepare import prepare
from transnormer.data.tokenizer import train_tokenizer
from transnormer.files import new_folder, write_text

PARTS = ("train", "valid", "test")
HELD_OUT = 1 / 200  # of the documents for validation, and as many for the test
VOCABULARY = 16_384
ARCHIVE_BYTES = 47 * 2**20
# WikiText-103's held-out files, and their words with line ends counted, which its literature
# divides by.
WIKITEXT = {
    "valid": ("wikitext-103.valid.txt.gz", 217_646),
    "test": ("wikitext-103.test.txt.gz", 245_569),
}


def part_of(text: str, held_out: bool, each: float = HELD_OUT) -> str:
    """Which of PARTS a document belongs to.

    held_out: whether its whole file is. each: else the share of documents for validation, and as
    large a one for the test."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    if held_out:
        return "valid" if share < 0.5 else "test"
    return "valid" if share < each else "test" if share < 2 * each else "train"


def find_files(inputs: list[Path]) -> list[Path]:
    return [
        file
        for given in inputs
        for file in (sorted(given.iterdir()) if given.is_dir() else [given])
    ]


def collect(files: list[Path], text: Path) -> None:
    """Split the documents of the files into text/train.jsonl, valid.jsonl and test.jsonl."""
    parts = {part: (text / f"{part}.jsonl").open("w", encoding="utf-8") for part in PARTS}
    for file in files:
        for document in read_documents([file]):
            part = part_of(document.content, "valid" in file.name)
            line = json.dumps({"text": document.content}, ensure_ascii=False)
            parts[part].write(line + "\n")
    for opened in parts.values():
        opened.close()


def train_on(text: Path, vocab_size: int) -> None:
    """Train the tokenizer on the training part: text/tokenizer.json."""
    lines = (json.loads(line)["text"] for line in (text / "train.jsonl").open(encoding="utf-8"))
    write_text(
        text / "tokenizer.json", train_tokenizer(lines, vocab_size).to_str(pretty=True) + "\n"
    )


def build(text: Path, wikitext: Path | None, out: Path) -> None:
    """Prepared folders in `out`: train (with valid as its validation split), and test and
    WikiText's for scoring."""
    tokenizer = text / "tokenizer.json"
    scored = [text / "test.jsonl"]
    for part, (name, official) in WIKITEXT.items():
        if wikitext is None:
            break
        content = gzip.decompress((wikitext / name).read_bytes()).decode()
        if (words := len(content.split()) + content.count("\n")) != official:
            raise ValueError(
                f"{wikitext / name} has {words:,} words, and WikiText-103's {part} has {official:,}"
            )
        scored.append(text / f"wikitext-{part}.txt")
        scored[-1].write_text(content, encoding="utf-8")
    with new_folder(out) as folder:
        prepare(
            [text / "train.jsonl"],
            folder / "train",
            tokenizer=tokenizer,
            valid=[text / "valid.jsonl"],
        )
        for file in scored:
            prepare([file], folder / file.stem, tokenizer=tokenizer, split=0)


def pack(files: list[Path], out: Path) -> None:
    """The files as one archive in pieces of at most ARCHIVE_BYTES: out/pack-00, pack-01, ..."""
    with new_folder(out) as folder, tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            for file in files:
                archive.add(file, file.name)
        whole.seek(0)
        number = 0
        while piece := whole.read(ARCHIVE_BYTES):
            (folder / f"pack-{number:02}").write_bytes(piece)
            number += 1


def unpack(pieces: Path, folder: Path) -> None:
    """The inverse of `pack`."""
    with tempfile.TemporaryFile() as whole:
        for piece in sorted(pieces.glob("pack-*")):
            with piece.open("rb") as opened:
                shutil.copyfileobj(opened, whole)
        whole.seek(0)
        with tarfile.open(fileobj=whole, mode="r") as archive:
            archive.extractall(folder, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        help="files or folders of text, or one folder made by --pack",
    )
    parser.add_argument(
        "--wikitext", type=Path, help="the folder with WikiText-103's held-out files"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json to take; by default one is trained"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=VOCABULARY, help="of the tokenizer that is trained"
    )
    parser.add_argument("--out", type=Path, help="the folder to prepare")
    parser.add_argument("--pack", type=Path, help="the folder to pack the files into")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        text, files, wikitext = Path(temporary), find_files(given.inputs), given.wikitext
        if (given.inputs[0] / "pack-00").exists():
            (wikitext := text / "packed").mkdir()
            unpack(given.inputs[0], wikitext)
            (wikitext / "tokenizer.json").rename(text / "tokenizer.json")
            files = [
                file for file in find_files([wikitext]) if not file.name.startswith("wikitext-")
            ]
            wikitext = wikitext if (wikitext / WIKITEXT["test"][0]).exists() else None
        elif given.tokenizer:
            shutil.copyfile(given.tokenizer, text / "tokenizer.json")
        packed = (text / "tokenizer.json").exists()
        if given.out or not packed:
            collect(files, text)
        if not packed:
            train_on(text, given.vocab_size)
        if given.pack:
            held_out = [wikitext / name for name, _ in WIKITEXT.values()] if wikitext else []
            pack([*files, *held_out, text / "tokenizer.json"], given.pack)
        if given.out:
            build(text, wikitext, given.out)


if __name__ == "__main__":
    main()
