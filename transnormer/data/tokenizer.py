"""Training and loading byte-level BPE with Hugging Face `tokenizers`, imported when used."""

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
ENDS = (END_OF_TEXT, "</s>")  # a text ends with the first of them that the tokenizer has
SMALLEST = 257  # END_OF_TEXT and the 256 bytes
LARGEST = 2**24
TRAINER = Path(__file__).with_name("train_bpe.py")
PIECE_CHARS = 2**16  # long documents are encoded in pieces of about this size

# The file names of GPT-2, and then those that Hugging Face gave the same files.
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def _byte_letters() -> dict[int, str]:
    """Every byte with its letter: a printable byte is its own, the others have U+0100 and above."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()  # byte-level BPE writes these letters for the bytes of a text
_GAP = re.compile(r"[ \n](?=\w)")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE, which encodes any text without unknown tokens and decodes it to itself.

    Words are split as by GPT-2, and every digit stands alone. END_OF_TEXT is id 0, the 256 bytes
    follow, and then the merges, each of a pair that was seen at least twice. The same text gives
    the same tokenizer. As with `load_tokenizer`, an END_OF_TEXT that a text spells is text. Where
    the text is too small to fill the vocabulary, this warns and returns a smaller tokenizer. The
    training runs in another process, so that Ctrl-C ends it at once.

    Raises ValueError for a vocab_size below 257, and where that process is ended from outside.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer

    trained = _run_trainer((piece for text in documents for piece in pieces(text)), vocab_size)
    tokenizer = Tokenizer.from_str(trained)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        message = f"the text is too small for {vocab_size} tokens; this tokenizer has {size}"
        warnings.warn(message, stacklevel=2)
    return _set_up_for_text(tokenizer)


def _run_trainer(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json that the process TRAINER makes of the texts.

    An exception here, such as the one of Ctrl-C, ends that process too.
    """
    command = [sys.executable, "-P", str(TRAINER), str(vocab_size), END_OF_TEXT]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(BrokenPipeError):  # the process has ended; its exit code is looked at below
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
    """Load a tokenizer from its file or from a folder.

    path: a tokenizer.json; a folder that holds one; a run, whose newest checkpoint holds one; or a
        folder with encoder.json and vocab.bpe of GPT-2 (or vocab.json and merges.txt).

    Special tokens that a text spells are encoded as text, and nothing is truncated or padded,
    whatever the file says. Raises ValueError with one line where there is no tokenizer or it is
    damaged.
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
            return _set_up_for_text(Tokenizer.from_str(text))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file}: not a tokenizer.json: {error}") from None
    for vocab, merges in GPT2_FILES:
        if (path / vocab).exists() and (path / merges).exists():
            return _set_up_for_text(_load_gpt2(path / vocab, path / merges))
    pairs = " or ".join(" with ".join(pair) for pair in GPT2_FILES)
    raise ValueError(f"{path}: no tokenizer in this folder; it needs tokenizer.json, or {pairs}")


def tokenizer_folder(path: Path) -> Path:
    """The folder that holds the tokenizer of `path` and its chat template.

    In a run, it is the newest checkpoint whose tokenizer.json is undamaged, because all checkpoints
    of a run hold the same tokenizer. Any other `path` is itself this folder. Raises ValueError
    where a run has no such checkpoint.
    """
    from ..run_folder import CHECKPOINTS, damage, step_folders

    if not (path / CHECKPOINTS).is_dir():
        return path
    for folder in step_folders(path / CHECKPOINTS):
        if damage(folder, ["tokenizer.json"]) is None:
            return folder
    raise ValueError(f"{path}: this run has no checkpoint with a tokenizer yet; train it first")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text of any length, without any added token."""
    parts = pieces(text) if len(text) > PIECE_CHARS and encodes_in_pieces(tokenizer) else [text]
    encodings = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
    return [token for encoding in encodings for token in encoding.ids]


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """The id of END_OF_TEXT, else of "</s>", or None in a tokenizer that has neither.

    Only special tokens count, because any text can spell the others.
    """
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    return next((special[name] for name in ENDS if name in special), None)


def require_end_of_text(tokenizer: Tokenizer, name: str = "the tokenizer") -> int:
    """The same as `end_of_text_id`, except that a tokenizer without such an id is refused.

    name: what the ValueError calls the tokenizer.
    """
    end = end_of_text_id(tokenizer)
    if end is not None:
        return end
    plain = next((token for token in ENDS if tokenizer.token_to_id(token) is not None), None)
    if plain is None:
        raise ValueError(f"{name} has no token for the end of a text, {' or '.join(ENDS)}")
    raise ValueError(
        f"{name} has {plain}, but not as a special token, so a text could spell its end; "
        'list it under added_tokens in tokenizer.json with "special": true'
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError for too large a vocabulary, or one without room for the 256 bytes."""
    if vocab_size > LARGEST:
        raise ValueError(f"vocab_size must be at most {LARGEST:,}; got {vocab_size}")
    if vocab_size < SMALLEST:
        reason = f"because it holds {END_OF_TEXT} and the 256 bytes"
        raise ValueError(f"vocab_size must be at least {SMALLEST}, {reason}; got {vocab_size}")


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a long text into pieces of about `size` characters.

    The reason is memory, because the library keeps some 100 bytes for each character. A cut falls
    before a blank or line end that stands before a letter. There the word splitting of GPT-2 begins
    anew whatever comes before, so the tokens of the pieces are those of the text. Text without such
    a place is not cut.
    """
    start = 0
    while len(text) - start > size:
        gaps = _GAP.finditer(text, start + size)
        stop = next((gap.start() for gap in gaps if text[gap.end()].isalpha()), len(text))
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def encodes_in_pieces(tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer gives a text in `pieces` the ids of the whole text.

    One that marks the start of a text does not.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    probe = "One two, three\nfour  five\n\nsix \n 7 eight -- nine\n"
    return [token for piece in pieces(probe, 1) for token in ids(piece)] == ids(probe)


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


def _set_up_for_text(tokenizer: Tokenizer) -> Tokenizer:
    """Turn off what a tokenizer.json may ask for and no corpus needs."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _special_tokens_are_text(tokenizer)


def _special_tokens_are_text(tokenizer: Tokenizer) -> Tokenizer:
    """Encode special tokens that a text spells as text, with this tokenizer and all copies of it.

    tokenizer.json has no field for this setting. The library copies tokenizers through that format
    (deepcopy, pickle, torch.save), so copies lose the setting silently, and its class cannot be
    derived from. All these ways of copying ask `copyreg`, which is therefore told how to copy a
    tokenizer that has the setting. Other tokenizers are copied as before.
    """
    copyreg.pickle(type(tokenizer), _reduce)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _reduce(tokenizer: Tokenizer) -> Any:
    if tokenizer.encode_special_tokens:
        return _copied, (tokenizer.to_str(),)
    return tokenizer.__reduce_ex__(2)


def _copied(content: str) -> Tokenizer:
    from tokenizers import Tokenizer

    return _special_tokens_are_text(Tokenizer.from_str(content))


def _json_text(path: Path) -> str:
    """The text of a file, once it is known to be JSON.

    It is checked here because the messages of the library do not name the file.
    """
    try:
        text = path.read_bytes().decode()
        json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return text
