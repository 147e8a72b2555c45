"""Tokens to text as they come: nothing is lost or added, for any ids and wherever they stop."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers

from transnormer import ModelConfig
from transnormer.data.tokenizer import BYTE_LETTERS, encode, train_tokenizer
from transnormer.formats.tokenizers import read_tokenizer
from transnormer.inference.text import Decoder, check_stop, until_stop

from ..formats.test_tokenizers import train_sentencepiece, write_ranks

KOREAN = "안녕하세요, 세계! 오늘 날씨가 아주 좋습니다. 산책하러 갈까요? 그래요, 좋아요."
TEXTS = [
    KOREAN,
    "a\ufffd",
    "\ufffd",
    "a\ufffdb \ufffd\ufffd",
    "To be, or  not",
    " x",
    "  ",
    "한",
    "😀é\n",
    "\x00天",
]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(
        tmp_path_factory.mktemp("sentencepiece"), user_defined_symbols="<mask>"
    )


@pytest.fixture(scope="module")
def library(sentencepiece_file: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(sentencepiece_file))


@pytest.fixture(scope="module")
def tokenizers(
    sentencepiece_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tokenizer]:
    """Byte-level BPE whose tokens end inside Korean characters, the same as tiktoken has it,
    SentencePiece with byte tokens, and whole words with blanks between."""
    config = ModelConfig.named("10m").replace(vocab_size=1_000)
    gpt2 = train_tokenizer([KOREAN * 9, "To be, or not to be. " * 9], 330)
    # a special token, one that is added but not special, and one that byte-level letters cannot
    # spell
    gpt2.add_special_tokens(["<|im_end|>"])
    gpt2.add_tokens(["<mask>", "날씨 é"])
    letters = {letter: byte for byte, letter in BYTE_LETTERS.items()}
    words = sorted(
        (number, word) for word, number in gpt2.get_vocab(with_added_tokens=False).items() if number
    )
    folder = tmp_path_factory.mktemp("tiktoken")
    write_ranks(
        folder / "x.tiktoken", {bytes(map(letters.get, word)): number - 1 for number, word in words}
    )
    tiktoken, _ = read_tokenizer(folder, config.replace(eos_token_id=340))
    with pytest.warns(UserWarning, match="user-defined pieces"):
        sentencepiece, _ = read_tokenizer(sentencepiece_file.parent, config)
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "a": 1, "한글": 2, "\ufffd": 3, "b": 4}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return {"gpt2": gpt2, "tiktoken": tiktoken, "sentencepiece": sentencepiece, "words": words}


@pytest.fixture(scope="module")
def parts(tokenizers: dict[str, Tokenizer]) -> dict[str, list[list[int]]]:
    """What ids are made of: every id alone, some that the tokenizer does not have, texts and ends
    of texts."""
    found = {}
    for kind, tokenizer in tokenizers.items():
        texts = [encode(tokenizer, text) for text in TEXTS]
        ends = [text[start:] for text in texts for start in range(1, min(len(text), 12))]
        found[kind] = [
            *texts,
            *ends,
            *([number] for number in range(tokenizer.get_vocab_size() + 3)),
        ]
    return found


def streamed(tokenizer: Tokenizer, ids: list[int], cut: int) -> str:
    """The text of the ids when another decoder goes on after the first `cut` of them."""
    first, second = Decoder(tokenizer), Decoder(tokenizer, ids[:cut])
    return "".join([*map(first.step, ids[:cut]), *second.stream(ids[cut:])])


@pytest.mark.parametrize("kind", ["gpt2", "tiktoken", "sentencepiece", "words"])
def test_what_is_streamed_is_the_decoding_of_the_whole(tokenizers, parts, kind: str) -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    tokenizer = tokenizers[kind]

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        ids = [*chain(*data.draw(st.lists(st.sampled_from(parts[kind]), max_size=12)))]
        whole = "".join(Decoder(tokenizer).stream(ids))
        assert streamed(tokenizer, ids, data.draw(st.integers(0, len(ids)))) == whole
        if kind != "sentencepiece" or "\ufffd" not in whole:
            assert whole == tokenizer.decode(ids)

    check()


def test_byte_tokens_are_decoded_as_sentencepiece_does(tokenizers, library, parts) -> None:
    """`tokenizers` gives up a whole run of byte tokens where one is wrong; the library does not."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.sampled_from(parts["sentencepiece"]), max_size=12))
    def check(texts: list[list[int]]) -> None:
        # a piece first, because the library keeps the blank of a byte token that begins a text
        known = (id for id in chain(*texts) if id < library.get_piece_size())
        ids = [library.piece_to_id("a"), *known]
        assert "".join(Decoder(tokenizers["sentencepiece"]).stream(ids)) == library.decode(ids)

    check()


@pytest.mark.parametrize("kind", ["gpt2", "tiktoken", "sentencepiece"])
def test_a_text_cut_inside_a_character_keeps_the_characters_before(tokenizers, kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = encode(tokenizer, KOREAN)
    texts = ["".join(Decoder(tokenizer).stream(ids[:count])) for count in range(len(ids) + 1)]
    assert texts[-1] == KOREAN
    assert any(text.endswith("\ufffd") for text in texts)
    known = [text.rstrip("\ufffd") for text in texts]
    assert all(after.startswith(before) for before, after in pairwise(known))


def test_a_replacement_character_is_a_character(tokenizers) -> None:
    tokenizer = tokenizers["gpt2"]
    decoder = Decoder(tokenizer)
    assert [decoder.step(token) for token in encode(tokenizer, "a\ufffdb")] == [
        "a",
        "",
        "",
        "\ufffd",
        "b",
    ]
    text = "\ufffd" * 9 + "날"
    assert "".join(Decoder(tokenizer).stream(encode(tokenizer, text))) == text


def test_text_ends_before_the_stop_string_that_is_complete_first() -> None:
    def cut(pieces: list[str], *stop: str) -> list[str]:
        return list(until_stop(pieces, stop))

    assert cut(["ab", "cd", "ef"], "xyz") == ["ab", "cd", "ef"]
    assert cut(["ab", "cd", "ef"], "cde") == ["ab"]
    assert cut(["ab", "cd", "cde"], "cde") == ["ab", "cd"]
    assert cut(["ab", "cd"], "cde") == ["ab", "cd"]  # held back, and given at the end
    assert cut(["stop"], "stop") == []
    for pieces in (["abcd"], ["a", "b", "c", "d"], ["ab", "cd"]):
        assert "".join(cut(pieces, "bcd", "c")) == "ab"
    assert check_stop("one") == ("one",)
    with pytest.raises(ValueError, match="stop: an empty string"):
        check_stop(["x", ""])
