"""Byte-level BPE with Hugging Face `tokenizers`: train one, load one. Importing this module imports no library."""

from __future__ import annotations

import copyreg
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>")  # what may end a text, the first of them that a tokenizer has
SMALLEST = 257  # END_OF_TEXT and the 256 bytes
LARGEST = 2**24
TRAINER = Path(__file__).with_name("train_bpe.py")
PIECE_CHARS = 2**16  # of a long document, encoded at a time

# GPT-2's own file names, then those that Hugging Face gave them.
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def _byte_letters() -> dict[int, str]:
    """Printable bytes stand for themselves; the others have letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


BYTE_LETTERS = _byte_letters()  # the letter that byte-level BPE writes for each byte
_GAP = re.compile(r"[ \n](?=\w)")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE: any text encodes, without an unknown token, and decodes to itself.

    Words are split as GPT-2's, and every digit stands alone. END_OF_TEXT is id 0, the 256 bytes follow, then the
    merges, none of a pair that was seen but once. The same text gives the same tokenizer. As with `load_tokenizer`,
    an END_OF_TEXT spelled in a text is text. Warns where the text is too small to fill the vocabulary, and returns
    the smaller tokenizer. Works in a process of its own, so that Ctrl-C ends it at once.
    Raises ValueError for a vocab_size below 257, and where that process is ended by somebody else.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer

    trained = _trained((piece for text in documents for piece in pieces(text)), vocab_size)
    tokenizer = Tokenizer.from_str(trained)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        warnings.warn(f"the text is too small for {vocab_size} tokens; this tokenizer has {size}", stacklevel=2)
    return _text_only(tokenizer)


def _trained(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json that TRAINER makes of the texts. What is raised here ends it, too."""
    command = [sys.executable, "-P", str(TRAINER), str(vocab_size), END_OF_TEXT]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(BrokenPipeError):  # it has ended, and its code says how
            for text in texts:
                content = text.encode()
                process.stdin.write(len(content).to_bytes(8, "little", signed=True) + content)
            process.stdin.write((-1).to_bytes(8, "little", signed=True))
            process.stdin.close()
        trained = process.stdout.read()
    except BaseException:
        process.kill()
        raise
    finally:  # not by communicate(), which fails with another error after it was interrupted
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()
    if process.returncode:
        code = process.returncode
        raise ValueError(f"training the tokenizer was stopped: its process ended with code {code}")
    return trained.decode()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json, a folder that holds one, a run (its newest checkpoint's), or a folder with GPT-2's
    encoder.json and vocab.bpe (or vocab.json and merges.txt).

    Special tokens spelled in a text are encoded as text, and nothing is truncated or padded, whatever the file says.
    Raises ValueError in one line where there is no tokenizer or it is damaged.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    path = tokenizer_folder(path)
    if not path.is_dir() or (path / "tokenizer.json").exists():
        file = path / "tokenizer.json" if path.is_dir() else path
        text = _json_text(file)
        try:
            return _text_only(Tokenizer.from_str(text))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file}: not a tokenizer.json: {error}") from None
    for vocab, merges in GPT2_FILES:
        if (path / vocab).exists() and (path / merges).exists():
            return _text_only(_load_gpt2(path / vocab, path / merges))
    pairs = " or ".join(" with ".join(pair) for pair in GPT2_FILES)
    raise ValueError(f"{path}: no tokenizer in this folder; wanted is tokenizer.json, or {pairs}")


def tokenizer_folder(path: Path) -> Path:
    """The folder that holds the tokenizer of `path` and its chat template.

    That is the newest checkpoint of a run whose tokenizer.json is undamaged, and `path` itself otherwise. All checkpoints
    of a run hold the same tokenizer. Raises ValueError where a run has no such checkpoint.
    """
    from ..run_folder import CHECKPOINTS, damage, step_folders

    if not (path / CHECKPOINTS).is_dir():
        return path
    for folder in step_folders(path / CHECKPOINTS):
        if damage(folder, ["tokenizer.json"]) is None:
            return folder
    raise ValueError(f"{path}: this run has no checkpoint with a tokenizer yet; train it first")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text of any length, nothing added to it."""
    parts = pieces(text) if len(text) > PIECE_CHARS and encodes_in_pieces(tokenizer) else [text]
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False).ids]


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """The id of END_OF_TEXT, or of "</s>" in a tokenizer that has only that; None where it has neither.

    Only special tokens count, because any text can spell the others.
    """
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    return next((special[name] for name in ENDS if name in special), None)


def require_end_of_text(tokenizer: Tokenizer, name: str = "the tokenizer") -> int:
    """`end_of_text_id`, where there must be one.

    Raises ValueError that says what is missing, and calls the tokenizer by `name`.
    """
    end = end_of_text_id(tokenizer)
    if end is not None:
        return end
    plain = next((token for token in ENDS if tokenizer.token_to_id(token) is not None), None)
    if plain is None:
        raise ValueError(f"{name} has no token for the end of a text, {' or '.join(ENDS)}")
    raise ValueError(
        f"{name} has {plain}, but not as a special token, so a text could spell its end: "
        'list it under added_tokens in tokenizer.json with "special": true'
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError for a vocabulary that cannot hold END_OF_TEXT and the 256 bytes."""
    if vocab_size > LARGEST:
        raise ValueError(f"vocab_size must be at most {LARGEST:,}; got {vocab_size}")
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size must be at least {SMALLEST}, {END_OF_TEXT} and the 256 bytes; got {vocab_size}")


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a long text into pieces of about `size` characters, for the library keeps some 100 bytes a character.

    Cuts fall before the blank or line end that stands before a letter: there GPT-2's splitting begins anew whatever
    comes before, so the pieces' tokens are the text's. Text without such a place is not cut.
    """
    start = 0
    while len(text) - start > size:
        gaps = (gap.start() for gap in _GAP.finditer(text, start + size) if text[gap.end()].isalpha())
        stop = next(gaps, len(text))
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def encodes_in_pieces(tokenizer: Tokenizer) -> bool:
    """Whether `pieces` leaves this tokenizer's ids as they are: not where it marks the start of a text."""
    text = "One two, three\nfour  five\n\nsix \n 7 eight -- nine\n"
    parts = [token for piece in pieces(text, 1) for token in tokenizer.encode(piece, add_special_tokens=False).ids]
    return parts == tokenizer.encode(text, add_special_tokens=False).ids


def _load_gpt2(vocab: Path, merges: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    _json_text(vocab)
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{merges}: does not fit {vocab.name}, or is damaged: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _text_only(tokenizer: Tokenizer) -> Tokenizer:
    # none of the three is for a corpus
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _special_tokens_are_text(tokenizer)


def _special_tokens_are_text(tokenizer: Tokenizer) -> Tokenizer:
    """Make special tokens that a text spells text, in this tokenizer and in all copies of it.

    tokenizer.json has no field for this setting, and the library copies tokenizers through it
    (deepcopy, pickle, torch.save), which loses the setting silently. The library's class cannot be
    derived from. So `copyreg`, which all these ways of copying ask, is told how tokenizers that have
    the setting are copied; others are copied as before.
    """
    copyreg.pickle(type(tokenizer), _reduced)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _reduced(tokenizer: Tokenizer) -> Any:
    if tokenizer.encode_special_tokens:
        return _copied, (tokenizer.to_str(),)
    return tokenizer.__reduce_ex__(2)


def _copied(content: str) -> Tokenizer:
    from tokenizers import Tokenizer

    return _special_tokens_are_text(Tokenizer.from_str(content))


def _json_text(path: Path) -> str:
    """The file's text, known to be JSON: the library's own messages do not name the file."""
    try:
        text = path.read_bytes().decode()
        json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return text
