"""The published checkpoints' tokenizers: what is converted gives the ids and texts of the library
that it was made for."""

from __future__ import annotations

import base64
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest

import transnormer
from transnormer.data.tokenizer import BYTE_LETTERS, encode, load_tokenizer, train_tokenizer
from transnormer.formats.convert import convert
from transnormer.formats.tokenizers import TIKTOKEN_WORDS
from transnormer.inference.text import Decoder

from ..conftest import TEXT
from ..test_cli import call, refused
from .published_folders import VALUES, publish, tensors_of

EDGES = [
    "", " ", "  ", "a", " a", "a  ", "  a  b   c ", "\t\ttab", "a\nb\n\n\nc", "\r\n x",
    "天气 很好！去公园吧。", "👨‍👩‍👧 😀😀 é",
    "<s> hi </s> <unk> <pad>", "a▁ b", "x" * 50, "." * 23, " " * 17 + "y", "-" * 9 + " " + "=" * 7,
    "123456 7.5", "<0x41>",
    "\u0000a\u007f", "　全角　ＡＢ", "\ufffd", "hahahahaha", "a\u00a0b", "Привет, мир! שלום",
    "don't I'LL we'Re ſ 'ſ", "end\n",
]  # fmt: skip


def train_sentencepiece(folder: Path, **options) -> Path:
    import sentencepiece

    lines = [
        *TEXT.read_text()[:80_000].splitlines(),
        *["天气很好，我们去公园吧！", "  return  x   ...", "hahaha ------"] * 30,
    ]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            minloglevel=2,
            **{
                "model_type": "bpe",
                "vocab_size": 700,
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                **options,
            },
        )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model with room for 1,000 words."""
    values = {**VALUES, "vocab_size": 1_000}
    return publish(tmp_path_factory.mktemp("wide") / "source", tensors_of(values), values)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"split_digits": True, "remove_extra_whitespaces": True},
        {
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": True,
            "allow_whitespace_only_pieces": True,
        },
        {"byte_fallback": False, "character_coverage": 0.99},
        {"byte_fallback": False, "add_dummy_prefix": False, "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "user_defined_symbols": "<mask>,<reserved_1>", "pad_id": 3},
        {"user_defined_symbols": "<mask>,<reserved_1>", "control_symbols": "<sep>"},
        {"split_by_whitespace": False, "split_by_number": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"normalization_rule_name": "nfkc", "add_dummy_prefix": False},
    ],
    ids=str,
)
def test_sentencepiece_ids_and_texts_are_the_library_s(
    options: dict, wide: Path, tmp_path: Path
) -> None:
    import sentencepiece

    source = shutil.copytree(wide, tmp_path / "source")
    file = train_sentencepiece(source, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        written = convert(source, tmp_path / "ours")
    assert written.tokenizer == "SentencePiece, tokenizer.model"
    loud = "nfkc" in str(options) or (
        "user_defined_symbols" in options and "add_dummy_prefix" not in options
    )
    assert [str(warning.message)[:16] for warning in told] == ["tokenizer.model:"] * loud

    library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = transnormer.load(tmp_path / "ours").tokenizer
    assert tokenizer.get_vocab_size() == library.get_piece_size()
    spelled = (
        ["say <mask> and<reserved_1> x", "x <mask>"] if "user_defined_symbols" in options else []
    )
    texts = [
        *EDGES,
        *spelled,
        *TEXT.read_text().splitlines()[3_000:4_000],
        TEXT.read_text()[200_000:203_000],
    ]
    for text in texts:
        ids = library.encode(text)
        assert encode(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == library.decode(ids), text
    control = [n for n in range(library.get_piece_size()) if library.is_control(n)]
    assert tokenizer.decode([*control, *library.encode("To be")]) == library.decode(
        [*control, *library.encode("To be")]
    )


def test_a_converted_tokenizer_writes_on(wide: Path, tmp_path: Path) -> None:
    train_sentencepiece(source := shutil.copytree(wide, tmp_path / "source"))
    convert(source, tmp_path / "ours")
    out, _ = call(
        "generate",
        "--model",
        tmp_path / "ours",
        "--prompt",
        "To be",
        "--max-tokens",
        5,
        "--device",
        "cpu",
    )
    assert out.startswith("To be")
    tokenizer = load_tokenizer(tmp_path / "ours")
    before = encode(tokenizer, "To be")
    for text in ("To be, or  not 天气 😀😀 é\n x", "To be  hahaha👨‍👩‍👧."):
        ids = encode(tokenizer, text)
        decoder = Decoder(tokenizer, before)
        assert ids[: len(before)] == before
        assert "To be" + "".join(decoder.stream(ids[len(before) :])) == text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "unigram"}, "model_type UNIGRAM, not BPE, cannot be converted exactly"),
        ({"model_type": "char", "vocab_size": 400}, "model_type CHAR, not BPE,"),
        (
            {"treat_whitespace_as_suffix": True},
            "treat_whitespace_as_suffix cannot be converted exactly",
        ),
        (
            {"normalization_rule_name": "nmt_nfkc_cf"},
            "normalizer 'nmt_nfkc_cf' cannot be converted exactly",
        ),
        ({"vocab_size": 1_100}, "has 1,100 words, the embedding 1,000"),
    ],
    ids=str,
)
def test_sentencepiece_models_that_cannot_be_converted(
    options: dict, named: str, wide: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    train_sentencepiece(source, **options)
    line = refused("convert", source, tmp_path / "ours")
    assert named in line
    assert "tokenizer.model" in line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    out, _ = call("convert", source, tmp_path / "ours", "--no-tokenizer")
    assert "tokenizer       none" in out
    assert transnormer.load(tmp_path / "ours").tokenizer is None


def test_damaged_tokenizers_and_missing_libraries_are_named(
    wide: Path, tmp_path: Path, monkeypatch
) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"\x00garbage" * 20)
    assert "tokenizer.model: not a SentencePiece model" in refused(
        "convert", source, tmp_path / "ours"
    )
    (source / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nnot base64! 2\n")
    assert "tokenizer.model: line 3 is no base64 token" in refused(
        "convert", source, tmp_path / "ours"
    )
    (source / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert "tokenizer.model has no rank for byte 0x00" in refused(
        "convert", source, tmp_path / "ours"
    )
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "pip install tiktoken; --no-tokenizer" in refused("convert", source, tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    train = b"\x00garbage"
    (source / "tokenizer.model").write_bytes(train)
    assert "pip install sentencepiece protobuf; --no-tokenizer" in refused(
        "convert", source, tmp_path / "ours"
    )
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a tokenizer.json" in refused("convert", source, tmp_path / "ours")


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Byte strings with ranks, as tiktoken's files hold them: 256 bytes and 600 merges of them."""
    trained = train_tokenizer(
        [TEXT.read_text()[:200_000], "天气很好，我们去公园吧！ ...... ------ \n\n\n" * 50], 857
    )
    letters = {letter: byte for byte, letter in BYTE_LETTERS.items()}
    words = sorted((number, word) for word, number in trained.get_vocab().items() if number)
    return {bytes(letters[letter] for letter in word): number - 1 for number, word in words}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    )


@pytest.mark.parametrize(
    "name", ["transnormer_100k.tiktoken", "transnormer_100k", "qwen.tiktoken", "tokenizer.model"]
)
def test_tiktoken_ids_and_texts_are_the_library_s(
    name: str, ranks: dict, wide: Path, tmp_path: Path
) -> None:
    import tiktoken

    source = shutil.copytree(wide, tmp_path / "source")
    write_ranks(source / name, ranks)
    values = {**VALUES, "vocab_size": 1_000, "eos_token_id": 860, "bos_token_id": 861}
    (source / "config.json").write_text(json.dumps(values))
    added = {"861": {"content": "<|start|>", "special": True}, "863": {"content": "<|pad|>"}}
    (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert convert(source, tmp_path / "ours").tokenizer == f"tiktoken, {name}"
    tokenizer = transnormer.load(tmp_path / "ours").tokenizer
    # As cl100k_base is spelled in tiktoken itself, with possessive quantifiers.
    words = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| "
             r"?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
             r"\s+(?!\S)|\s")  # fmt: skip
    library = tiktoken.Encoding("test", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    for text in [
        *EDGES,
        *TEXT.read_text().splitlines()[3_000:4_000],
        TEXT.read_text()[300_000:340_000],
    ]:
        ids = library.encode_ordinary(text)
        assert encode(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 864
    assert [tokenizer.id_to_token(n) for n in range(len(ranks), 864)] == [
        "<|unused 856|>", "<|unused 857|>", "<|unused 858|>", "<|unused 859|>", "<|endoftext|>",
        "<|start|>",
        "<|unused 862|>", "<|pad|>",
    ]  # fmt: skip
    assert encode(tokenizer, "<|start|>") == library.encode_ordinary("<|start|>")


def test_the_words_of_tiktoken_are_cut_alike_at_every_character(
    ranks: dict, wide: Path, tmp_path: Path
) -> None:
    import tiktoken

    write_ranks((source := shutil.copytree(wide, tmp_path / "source")) / "x.tiktoken", ranks)
    convert(source, tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours")
    library = tiktoken.Encoding(
        "test", pat_str=TIKTOKEN_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    letters = [chr(code) for code in (*range(1, 0xD800), *range(0xE000, 0x20000))]
    for start in range(0, len(letters), 64):
        text = "".join(
            f"a{letter}'{letter}s 1{letter}  {letter}\n" for letter in letters[start : start + 64]
        )
        assert encode(tokenizer, text) == library.encode_ordinary(text)


def test_tiktoken_files_larger_than_the_embedding_are_refused(
    ranks: dict, wide: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    token, rank = next(reversed(ranks.items()))
    write_ranks(source / "x.tiktoken", {**ranks, token + b"!": 1_000})
    assert "x.tiktoken: 857 words with ranks up to 1,000" in refused(
        "convert", source, tmp_path / "ours"
    )
    write_ranks(source / "x.tiktoken", {**ranks, token + b"!": rank})
    assert "some of them equal" in refused("convert", source, tmp_path / "ours")
    write_ranks(source / "x.tiktoken", ranks)
    (source / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"1000": {"content": "<|far|>"}}}'
    )
    assert "'<|far|>' has the id 1,000, the embedding 1,000 rows" in refused(
        "convert", source, tmp_path / "ours"
    )
    (source / "tokenizer_config.json").write_text('{"added_tokens_decoder": 3}')
    assert "tokenizer_config.json: damaged" in refused("convert", source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_gpt2_files_and_tokenizer_json_come_along(ranks: dict, wide: Path, tmp_path: Path) -> None:
    trained = train_tokenizer([TEXT.read_text()[:20_000]], 400)
    for name in ("json", "gpt2"):
        source = shutil.copytree(wide, tmp_path / name)
        if name == "json":
            (source / "tokenizer.json").write_text(trained.to_str())
        else:
            trained.model.save(str(source))
        convert(source, tmp_path / f"{name} ours")
        tokenizer = transnormer.load(tmp_path / f"{name} ours").tokenizer
        assert encode(tokenizer, "To be, or not") == encode(load_tokenizer(source), "To be, or not")
    small = publish(tmp_path / "small", tensors_of(VALUES))
    (small / "tokenizer.json").write_text(trained.to_str())
    assert "has 400 words, the embedding 41" in refused("convert", small, tmp_path / "ours")
