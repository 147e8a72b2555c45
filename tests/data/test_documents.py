"""Documents in: every kind of file, what is normalised, and every error line."""

import gzip
import io
import json
import random
import sys
from pathlib import Path

import pytest
import zstandard

from tests.lazy import Lazy
from transnormer.data import documents
from transnormer.data.documents import (
    Document,
    read_documents,
    read_records,
    read_text,
    read_texts,
)

pyarrow, parquet = Lazy("pyarrow"), Lazy("pyarrow.parquet")

TEXTS = ["one\ntwo\n", "  naïve  \U0001f600", "tab\tand \u2028 a line separator in one document"]


def read(*inputs, **options):
    found = read_documents([Path(given) for given in inputs], **options)
    return [document.content for document in found]


def json_lines(texts, field="text"):
    return "".join(
        json.dumps({"id": n, field: text}, ensure_ascii=n % 2 == 0) + "\n"
        for n, text in enumerate(texts)
    )


def write(path, content):
    """Write text or bytes as the path's suffix asks."""
    content = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(path, column, name="text", **options):
    parquet.write_table(
        pyarrow.table({"id": list(range(len(column))), name: column}), path, **options
    )
    return path


@pytest.mark.parametrize(
    "suffix", [".txt", ".md", ".markdown", ".TXT", ".txt.gz", ".txt.zst", ".md.gz"]
)
def test_a_text_file_is_one_document(tmp_path, suffix):
    assert read(write(tmp_path / f"a{suffix}", "one\n\ntwo\n")) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines(tmp_path, suffix, field):
    path = write(
        tmp_path / f"a{suffix}",
        "\ufeff" + json_lines(TEXTS, field) + "\n  \n" + json_lines(["last"], field)[:-1],
    )
    assert read(path, text_field=field) == [*TEXTS, "last"]


def test_lines_across_chunks(tmp_path, monkeypatch):
    texts = [random.Random(n).choice("aé€\U0001f600") * n for n in range(60)][1:]
    monkeypatch.setattr(documents, "CHUNK_BYTES", 7)
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        assert read(write(tmp_path / f"a{suffix}", json_lines(texts))) == texts


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_parquet(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(documents, "PARQUET_ROWS", 4)
    texts = [f"row {n}" for n in range(11)]
    column = pyarrow.array(texts, getattr(pyarrow, kind)())
    path = write_parquet(tmp_path / "a.parquet", column, "content", row_group_size=3)
    assert read(path, text_field="content") == texts


def test_parquet_columns_that_are_stored_as_a_dictionary_are_text(tmp_path):
    column = pyarrow.array(["a", "b", "a", "a"]).dictionary_encode()
    path = write_parquet(tmp_path / "a.parquet", column)
    # and not plain strings
    assert parquet.read_schema(path).field("text").type == column.type
    assert read(path) == ["a", "b", "a", "a"]
    assert [each.content for each in read_records([path], ["text"])] == [
        {"text": text} for text in "abaa"
    ]


def test_parquet_columns_of_one_name(tmp_path):
    def table(*names):
        columns = [pyarrow.array([f"{number}"]) for number in range(len(names))]
        parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    with pytest.raises(ValueError, match=r"a.parquet: 2 columns are named 'text'; rename"):
        read(table("text", "text"))
    with pytest.raises(ValueError, match=r"a.parquet: 3 columns are named 'input'"):
        list(read_records([table("output", "input", "input", "input")], ["output"], ["input"]))
    assert read(table("other", "text", "other")) == ["1"]  # what is not read may be there twice


def test_a_folder_is_walked_in_sorted_order_without_hidden_and_unknown_files(tmp_path):
    for name in (
        "b/2.txt",
        "b/10.txt",
        "a.txt",
        "c.md",
        "b/deep/x.jsonl",
        ".hidden.txt",
        ".git/y.txt",
        "z.py",
        "no",
    ):
        write(tmp_path / name, json_lines([name]) if name.endswith("jsonl") else name)
    assert read(tmp_path) == ["a.txt", "b/10.txt", "b/2.txt", "b/deep/x.jsonl", "c.md"]
    assert read(tmp_path / "c.md", tmp_path / "b") == [
        "c.md",
        "b/10.txt",
        "b/2.txt",
        "b/deep/x.jsonl",
    ]


def test_linked_folders_are_followed_and_circles_refused(tmp_path):
    write(tmp_path / "elsewhere" / "a.txt", "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert read(tmp_path / "data") == ["a"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="back: links back to a folder that holds it"):
        read(tmp_path / "data")


def test_line_ends_and_byte_order_marks(tmp_path):
    given, wanted = "\ufeffa\r\nb\rc\n\r\nd", "a\nb\nc\n\nd"
    assert read(write(tmp_path / "a.txt", given)) == [wanted]
    assert read(write(tmp_path / "a.jsonl", json_lines([given]))) == [wanted]
    assert read(write_parquet(tmp_path / "a.parquet", [given])) == [wanted]


def test_empty_documents_are_skipped(tmp_path):
    write(tmp_path / "a.txt", " \n\t\u3000")
    write(tmp_path / "b.jsonl", json_lines(["", "x", "\r\n", "\ufeff"]))
    assert read(tmp_path) == ["x"]


def test_documents_are_read_one_at_a_time(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(["first"]) + "broken\n")
    found = read_documents([path])
    assert next(found).content == "first"
    with pytest.raises(ValueError, match="line 2"):
        next(found)


def test_documents_say_where_they_come_from(tmp_path):
    lines = [
        {"text": "a", "url": "http://a", "license": "CC0", "source": "crawl", "more": [1]},
        {"text": "b", "source": None},
    ]
    write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)))
    write(tmp_path / "b.md", "c")
    columns = {
        "text": ["d", "e"],
        "id": [7, 8],
        "title": pyarrow.array(["x", None]).dictionary_encode(),
        "date": pyarrow.array([0, 1], pyarrow.timestamp("ns")),
        "embedding": [[0.5], [0.25]],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "c.parquet")
    name = str(tmp_path)
    assert list(read_documents([tmp_path])) == [
        Document(f"{name}/a.jsonl line 1", "a", {key: lines[0][key] for key in [*lines[0]][1:]}),
        Document(f"{name}/a.jsonl line 3", "b", {"source": f"{name}/a.jsonl"}),
        Document(f"{name}/b.md", "c", {"source": f"{name}/b.md"}),
        Document(
            f"{name}/c.parquet row 1", "d", {"id": 7, "title": "x", "source": f"{name}/c.parquet"}
        ),
        Document(
            f"{name}/c.parquet row 2", "e", {"id": 8, "title": None, "source": f"{name}/c.parquet"}
        ),
    ]
    by_title = read_documents(
        [write(tmp_path / "d.jsonl", '{"title": "f", "id": 1}')], text_field="title"
    )
    assert list(by_title) == [
        Document(f"{name}/d.jsonl line 1", "f", {"id": 1, "source": f"{name}/d.jsonl"})
    ]


def test_a_document_is_frozen_and_encoded_for_hashes():
    document = Document("a.jsonl line 1", [{"role": "user", "content": "\xe9"}], {})
    assert document.encoded() == '[{"role": "user", "content": "é"}]'.encode()
    assert Document("a.txt", "é\n", {}).encoded() == "é\n".encode()
    with pytest.raises(AttributeError):
        document.id = "b"


def test_an_input_that_is_not_there_is_told_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_documents([write(tmp_path / "a.txt", "a"), tmp_path / "b.txt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", "x", "a.py: unknown kind of file; known are .txt, .md"),
        ("a.gz", "x", "a.gz: unknown kind"),
        ("a.parquet.gz", "x", "a.parquet.gz: unknown kind"),
        ("a.txt", b"abc\xff", "a.txt: not UTF-8 at byte 3"),
        ("a.txt.gz", b"abcd\xe2\x82", "a.txt.gz: not UTF-8 at byte 4"),
        ("a.txt", "a".encode("utf-16"), "a.txt: not UTF-8 at byte 0"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "a.jsonl line 2: not UTF-8 at byte 10"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": ', "a.jsonl line 3: not JSON: Expecting value"),
        ("a.jsonl", "[" * 200_000, "a.jsonl line 1: not JSON"),
        ("a.jsonl", '["x"]', "a.jsonl line 1: not a JSON object but list"),
        ("a.jsonl", '"text"', "a.jsonl line 1: not a JSON object but str"),
        ("a.jsonl", '{"body": "x", "a": 1}', "a.jsonl line 1: no field 'text'; it has a, body"),
        ("a.jsonl", "{}", "a.jsonl line 1: no field 'text'; it has none"),
        ("a.jsonl", '{"text": null}', "a.jsonl line 1: field 'text' holds null, not a string"),
        ("a.jsonl", '{"text": ["x"]}', "a.jsonl line 1: field 'text' holds list, not a string"),
        (
            "a.jsonl",
            '{"text": "\\ud800"}',
            "a.jsonl line 1: field 'text' is not Unicode text: surrogates",
        ),
        ("a.jsonl.zst", '{"text": 1}', "a.jsonl.zst line 1: field 'text' holds int"),
        ("a.parquet", "not parquet", "a.parquet: cannot be read as parquet: "),
        ("a.txt", " \n", "no document in .*a.txt: every one is empty"),
        ("a.jsonl", "", "no document in .*a.jsonl"),
    ],
)
def test_errors_name_the_file_in_one_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_compression_is_an_error_not_a_shorter_text(tmp_path, suffix):
    # several blocks, of which a cut file would give the first
    noise = random.Random(0).randbytes(200_000).hex()
    path = write(tmp_path / f"a.txt.{suffix}", noise)
    content = path.read_bytes()
    assert read(path) == [noise]
    truncated = "a.txt.(gz: cannot be read as gzip|zst: damaged; it ends in the middle)"
    for damaged, message in (
        (content[:-1000], truncated),
        (content[: len(content) // 2], truncated),
        (b"plain text", "a.txt.(gz: cannot be read as gzip|zst: cannot be read as zstandard)"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_files_of_several_frames(tmp_path, suffix):
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    (tmp_path / f"a.txt.{suffix}").write_bytes(
        b"".join(compress(part) for part in (b"one ", b"two ", b"three"))
    )
    assert read(tmp_path) == ["one two three"]


def test_parquet_errors(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(ValueError, match=r"a.parquet: no column 'text'; it has body, id"):
        read(write_parquet(path, ["x"], "body"))
    with pytest.raises(ValueError, match=r"a.parquet: column 'text' holds int64, not strings"):
        read(write_parquet(path, [1]))
    with pytest.raises(ValueError, match=r"a.parquet: column 'text' holds int64, not strings"):
        read(write_parquet(path, pyarrow.array([1]).dictionary_encode()))
    for column in (pyarrow.array(["x", None]), pyarrow.array(["x", None]).dictionary_encode()):
        with pytest.raises(ValueError, match=r"a.parquet row 2: column 'text' holds null"):
            read(write_parquet(path, column))
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"xy\xff")],
    )
    found = read_documents([write_parquet(path, broken)])
    assert next(found).content == "x"
    with pytest.raises(ValueError, match=r"a.parquet row 2: not UTF-8 at byte 1"):
        next(found)
    whole = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["x" * 1000]}), whole)
    path.write_bytes(whole.getvalue()[:-20])
    with pytest.raises(ValueError, match=r"a.parquet: cannot be read as parquet"):
        read(path)


def test_folders_without_documents(tmp_path):
    with pytest.raises(ValueError, match="no file in this folder can be read; known are"):
        read(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"gone.txt: a link to a file that is not there"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no input given"):
        read_documents([])
    with pytest.raises(TypeError, match="a list of paths"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize(
    ("module", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")]
)
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, module, name):
    path = write(tmp_path / name, json_lines(["x"]))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"{name}: reading .* needs {module}: pip install 'transnormer\[data\]'"
    ):
        read(path)


def test_read_text(tmp_path):
    assert read_text(write(tmp_path / "notes", "\ufeffa\r\n b \n")) == "a\n b \n"
    assert read_text(str(write(tmp_path / "a.txt.zst", "é"))) == "é"
    assert read_text(write(tmp_path / "empty.txt", "")) == ""
    for path, message in (
        (tmp_path / "gone.txt", "gone.txt: no such file"),
        (tmp_path, "not a single text"),
        (write(tmp_path / "a.jsonl", "{}"), "a.jsonl: not a single text; name one text file"),
        (write(tmp_path / "bad", b"ab\xff"), "bad: not UTF-8 at byte 2"),
    ):
        with pytest.raises(ValueError, match=message):
            read_text(path)


def test_texts_are_the_documents_of_one_file_of_any_kind(tmp_path):
    assert list(read_texts(write(tmp_path / "notes", "a\r\nb"))) == ["a\nb"]  # whatever the suffix
    assert list(
        read_texts(
            write(tmp_path / "a.jsonl.gz", json_lines(["x", " ", "y"], "body")), text_field="body"
        )
    ) == [
        "x",
        "y",
    ]
    assert list(read_texts(write_parquet(tmp_path / "a.parquet", ["x", "y"]))) == ["x", "y"]
    with pytest.raises(ValueError, match="blank: the file is empty"):
        read_texts(write(tmp_path / "blank", " \n"))
    with pytest.raises(ValueError, match="a folder; name the files in it"):
        read_texts(tmp_path)
    for name in ("gone.txt", "gone.jsonl"):
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            read_texts(tmp_path / name)
