"""The published tokenizers, SentencePiece and tiktoken files, as the one kind that the rest of the
package reads.

Each is read with the library made for it, and what comes of it must encode and decode as that
library does."""

from __future__ import annotations

import base64
import binascii
import random
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..config import ModelConfig
from ..data.tokenizer import BYTE_LETTERS, END_OF_TEXT, GPT2_FILES, load_tokenizer
from ..files import parse_json

WAY_OUT = "; --no-tokenizer converts the weights alone"

# How a tiktoken file's text is cut into words: its ranks do not say. This is cl100k_base's rule,
# from which the published file's 100,256 ranks come, without possessive quantifiers, which mean
# something else to `tokenizers`.
TIKTOKEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")

# What a tokenizer can get wrong: blanks of all kinds, runs, scripts, joined characters, spelled
# special tokens.
_PROBES = (
    "",
    " ",
    "a",
    " a",
    "a ",
    "  a  b   c ",
    "\ttab\t\ttab",
    "one\ntwo\n\n\nthree\r\nfour",
    "\n leading",
    "trailing \n",
    "don't I'LL we're",
    "1234567890 3.14 1,000",
    "....... ------- ====== !!!!! aaaaaaa hahahaha",
    " " * 17 + "x",
    "if x == 1:\n        return x  # 注释",
    "天气很好，我们去公园吧。「日本語」한국어",
    "ｆｕｌｌ　ｗｉｄｔｈ ～ ﬁ ² ①",
    "Ça déjà naïve",
    "Привет, мир! مرحبا שלום नमस्ते สวัสดี",
    "😀😀 👨‍👩‍👧 🇪🇺 👍🏽",
    "<s> </s> <unk> <pad> <0x41> <|endoftext|>",
    "x▁y ▁ z",
    "zero\u200bwidth no\u00a0break \u2028 \ufeff",
    "rare 𝔘𐍈𠀀 \U0010fffd \x00\x07\x7f",
)


def read_tokenizer(folder: Path, config: ModelConfig) -> tuple[Tokenizer, str] | tuple[None, None]:
    """A published folder's tokenizer, and what it was read from; None where the folder has none.

    tokenizer.json or GPT-2's two files; else tokenizer.model (SentencePiece BPE, or a tiktoken file
    of that name), or a tiktoken file: *.tiktoken, transnormer_100k*. Raises ValueError in one line
    that names the file: damaged, not to be converted exactly, a library missing, or more words than
    the embedding has rows."""
    foreign = [
        folder / "tokenizer.model",
        *sorted(folder.glob("*.tiktoken")),
        *sorted(folder.glob("transnormer_100k*")),
    ]
    file = next((path for path in foreign if path.is_file()), None)
    if any(
        all((folder / name).is_file() for name in names)
        for names in (("tokenizer.json",), *GPT2_FILES)
    ):
        tokenizer = load_tokenizer(folder)
        kind = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "GPT-2's two files"
    elif file is None:
        return None, None
    elif _RANKS.match(file.read_bytes()[:1_000]):
        tokenizer, kind = _from_tiktoken(file, config), f"tiktoken, {file.name}"
    else:
        tokenizer, kind = _from_sentencepiece(file), f"SentencePiece, {file.name}"
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if size > config.vocab_size:
        raise ValueError(
            f"the tokenizer ({kind}) has {size:,} words, the embedding "
            f"{config.vocab_size:,}{WAY_OUT}"
        )
    return tokenizer, kind


# SentencePiece has pieces with scores. The neighbouring pair whose union has the best score is
# joined first.


def _from_sentencepiece(path: Path) -> Tokenizer:
    model, library = _read_sentencepiece(path)
    _refuse_unknown_settings(path, model)
    rules = model.normalizer_spec
    plain = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    control = [piece.piece for piece in model.pieces if piece.type == piece.CONTROL]
    spelled = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
    unknown = model.pieces[library.unk_id()].piece
    tokenizer = Tokenizer(
        models.BPE(
            {piece.piece: number for number, piece in enumerate(model.pieces)},
            _merges(plain, {piece: -score for piece, score in plain.items()}),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    _add_normalizer(tokenizer, path, model, bool(spelled))
    tokenizer.decoder = _sentencepiece_decoder(model, unknown)
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in control]
    )
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in spelled])
    if spelled and (rules.add_dummy_prefix or rules.remove_extra_whitespaces):
        warnings.warn(
            f"{path.name}: beside its user-defined pieces ({spelled[0]!r} and {len(spelled) - 1} "
            "more), where a text "
            "spells them, blanks may be encoded otherwise than by SentencePiece",
            stacklevel=2,
        )
    words = [piece.replace("▁", " ") for piece in plain]
    _compare(
        path, tokenizer, library.encode, library.decode, [] if rules.precompiled_charsmap else words
    )
    return tokenizer


def _read_sentencepiece(path: Path) -> tuple[Any, Any]:
    """A SentencePiece file as the record that it holds, and as the library's own tokenizer."""
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError:
        raise ValueError(
            f"{path.name} needs libraries: pip install sentencepiece protobuf{WAY_OUT}"
        ) from None
    data = path.read_bytes()
    try:
        return ModelProto.FromString(data), SentencePieceProcessor(model_proto=data)
    except Exception as error:  # the libraries raise nothing narrower
        raise ValueError(f"{path.name}: not a SentencePiece model, or damaged{WAY_OUT}") from error


def _add_normalizer(tokenizer: Tokenizer, path: Path, model: Any, spelled: bool) -> None:
    """What a SentencePiece model does to a text before it looks for pieces. spelled: it has pieces
    that its user defined."""
    rules = model.normalizer_spec
    steps = _unicode_steps(path, model) if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    steps += [normalizers.Replace(" ", "▁")]
    if (
        rules.add_dummy_prefix
        and spelled
        and not rules.remove_extra_whitespaces
        and not rules.precompiled_charsmap
    ):
        # Normalizers see the text between two spelled pieces as a text of its own; only this knows
        # the first. It adds a blank, as no text begins with one any more, and the second makes it
        # what the others are.
        ahead = [
            pre_tokenizers.Metaspace(" ", "first", split=False),
            pre_tokenizers.Metaspace("▁", "never", split=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(ahead)
    elif rules.add_dummy_prefix:
        steps += [normalizers.Prepend("▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)


def _sentencepiece_decoder(model: Any, unknown: str) -> decoders.Decoder:
    """What makes text of a SentencePiece model's pieces."""
    rules = model.normalizer_spec
    # An unknown piece is spelled last: it does not lose its blank where the text begins.
    texts = [
        decoders.Replace("▁", " "),
        decoders.Replace(unknown, "\U0010ffff"),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        texts += [decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(
        [*texts, decoders.Replace("\U0010ffff", model.trainer_spec.unk_surface)]
    )


def _refuse_unknown_settings(path: Path, model: Any) -> None:
    spec, rules = model.trainer_spec, model.normalizer_spec
    unused = [piece.piece for piece in model.pieces if piece.type == piece.UNUSED]
    for wrong, what in (
        (
            spec.model_type != spec.BPE,
            f"model_type {spec.ModelType.Name(spec.model_type)}, not BPE,",
        ),
        (spec.treat_whitespace_as_suffix, "treat_whitespace_as_suffix"),
        (not rules.escape_whitespaces, "escape_whitespaces off"),
        (model.denormalizer_spec.precompiled_charsmap, "a denormalizer"),
        (unused, f"the unused piece {unused[0]!r}" if unused else ""),
        (
            rules.precompiled_charsmap and rules.name not in ("nfkc", "nmt_nfkc"),
            f"normalizer {rules.name!r}",
        ),
    ):
        if wrong:
            raise ValueError(f"{path.name}: {what} cannot be converted exactly{WAY_OUT}")


def _unicode_steps(path: Path, model: Any) -> list[normalizers.Normalizer]:
    """SentencePiece's table for nfkc or nmt_nfkc as Unicode's NFKC, with what the table does to a
    character otherwise.

    The two differ on marks that do not stand in canonical order, which the table leaves alone: this
    warns."""
    from sentencepiece import SentencePieceProcessor

    bare = type(model)()
    bare.CopyFrom(model)
    for setting in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        setattr(bare.normalizer_spec, setting, False)
    table, nfkc = (
        SentencePieceProcessor(model_proto=bare.SerializeToString()).normalize,
        normalizers.NFKC(),
    )
    blank, gone, kept = "", "", ""
    other: dict[str, str] = {}
    for code in (*range(1, 0xD800), *range(0xE000, 0x10000)):
        letter = chr(code)
        wanted, found = table(letter), nfkc.normalize_str(letter)
        if wanted == found:
            continue
        if wanted == " ":
            blank += letter
        elif not wanted:
            gone += letter
        elif wanted == letter:
            kept += letter
        else:
            other[letter] = wanted
    steps: list[normalizers.Normalizer] = []
    for letters, text in ((blank, " "), (gone, "")):
        if letters:
            group = "".join(f"\\x{{{ord(letter):x}}}" for letter in letters)
            steps.append(normalizers.Replace(Regex(f"[{group}]"), text))
    steps += [normalizers.Replace(letter, wanted) for letter, wanted in other.items()]
    # private: NFKC leaves them
    covers = [(letter, chr(0x100000 + number)) for number, letter in enumerate(kept)]
    steps += [normalizers.Replace(letter, cover) for letter, cover in covers]
    steps += [nfkc, *(normalizers.Replace(cover, letter) for letter, cover in covers)]
    warnings.warn(
        f"{path.name}: its normalizer {model.normalizer_spec.name} becomes Unicode's NFKC; marks "
        "that do not stand in "
        "canonical order, and letters newer than the library's Unicode, may be encoded otherwise",
        stacklevel=4,
    )
    return steps


# tiktoken has byte strings with ranks. The neighbouring pair whose union has the lowest rank is
# joined first.


def _from_tiktoken(path: Path, config: ModelConfig) -> Tokenizer:
    try:
        from tiktoken import Encoding
    except ImportError:
        raise ValueError(f"{path.name} needs a library: pip install tiktoken{WAY_OUT}") from None
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            f"{path.name}: line {len(ranks) + 1} is no base64 token with its rank{WAY_OUT}"
        ) from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path.name} has no rank for byte 0x{missing[0]:02X}{WAY_OUT}")
    if len(set(ranks.values())) < len(ranks) or max(ranks.values()) >= config.vocab_size:
        raise ValueError(
            f"{path.name}: {len(ranks):,} words with ranks up to {max(ranks.values()):,}, some of "
            "them equal or past "
            f"the embedding's {config.vocab_size:,} rows{WAY_OUT}"
        )
    spelled = {token: "".join(BYTE_LETTERS[byte] for byte in token) for token in ranks}
    special = _special_tokens(path.parent, ranks, config)
    tokenizer = Tokenizer(
        models.BPE(
            {**{spelled[token]: rank for token, rank in ranks.items()}, **special},
            [(spelled[left], spelled[right]) for left, right in _merges(ranks, ranks)],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TIKTOKEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in special]
    )
    library = Encoding(path.name, pat_str=TIKTOKEN_WORDS, mergeable_ranks=ranks, special_tokens={})
    words = [token.decode("utf-8", "replace") for token in ranks]
    _compare(path, tokenizer, library.encode_ordinary, library.decode, words)
    return tokenizer


def _special_tokens(folder: Path, ranks: dict[bytes, int], config: ModelConfig) -> dict[str, int]:
    """Names of the ids beside the ranks: tokenizer_config.json's, END_OF_TEXT for the config's,
    "<|unused N|>"."""
    named: dict[int, str] = {}
    file = folder / "tokenizer_config.json"
    if file.is_file():
        try:
            added = parse_json(file.read_bytes()).get("added_tokens_decoder", {})
            named = {int(number): str(token["content"]) for number, token in added.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file.name}: damaged added_tokens_decoder ({error}){WAY_OUT}"
            ) from error
    taken = set(ranks.values())
    if config.eos_token_id is not None and END_OF_TEXT not in named.values():
        named.setdefault(config.eos_token_id, END_OF_TEXT)
    named = {number: name for number, name in named.items() if number not in taken}
    last = max(taken | named.keys())
    if last >= config.vocab_size:
        raise ValueError(
            f"{named[last]!r} has the id {last:,}, the embedding {config.vocab_size:,} "
            f"rows{WAY_OUT}"
        )
    return {
        named.get(number, f"<|unused {number}|>"): number
        for number in range(last + 1)
        if number not in taken
    }


# Both.


def _merges(words: Iterable[Any], order: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Every pair of words whose union is a word, best union first; of one union, the pair with the
    longer left."""
    pairs = []
    for word in words:
        for cut in range(len(word) - 1, 0, -1):
            if word[:cut] in order and word[cut:] in order:
                pairs.append((order[word], word[:cut], word[cut:]))
    pairs.sort(key=lambda pair: pair[0])
    return [(left, right) for _, left, right in pairs]


def _compare(
    path: Path,
    tokenizer: Tokenizer,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    words: list[str],
) -> None:
    """Raise ValueError for the first text, of _PROBES and of all words in a drawn order, on which
    the two differ."""
    tokenizer.encode_special_tokens = True
    drawn = random.Random(0).sample(words, len(words))
    texts = [*_PROBES, *("".join(drawn[start : start + 16]) for start in range(0, len(drawn), 16))]
    for text in texts:
        ids = encode(text)
        if tokenizer.encode(text, add_special_tokens=False).ids != ids or tokenizer.decode(
            ids
        ) != decode(ids):
            raise ValueError(
                f"{path.name} cannot be converted exactly: {text!r} comes out otherwise{WAY_OUT}"
            )
