"""Training a tokenizer, in a process of its own, because Ctrl-C could not end it otherwise.

The library trains in Rust for as long as a minute and looks at no signal meanwhile, but a process
can be ended. `tokenizer.train_tokenizer` starts this file with the size of the vocabulary and the
special token as arguments. Standard input holds pieces of text, each after its number of bytes, and
then END. Standard output gets the tokenizer.json.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends this process, also inside the library

from collections.abc import Iterator
from typing import BinaryIO

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HEADER_BYTES = 8  # of the number before each piece: little-endian, signed
END = (-1).to_bytes(HEADER_BYTES, "little", signed=True)


def texts(source: BinaryIO) -> Iterator[str]:
    """The pieces. Raises EOFError where they stop without END, because who wrote them is gone."""
    while (header := source.read(HEADER_BYTES)) != END:
        size = int.from_bytes(header, "little", signed=True)
        content = source.read(size)
        if len(header) < HEADER_BYTES or len(content) < size:
            raise EOFError("the text stopped before its end")
        yield content.decode()


def train(source: BinaryIO, vocab_size: int, special: str) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens: `special`, the 256 bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(source), trainer)
    return tokenizer


if __name__ == "__main__":
    try:
        trained = train(sys.stdin.buffer, int(sys.argv[1]), sys.argv[2])
    except EOFError:
        sys.exit(1)
    sys.stdout.buffer.write(trained.to_str().encode())
