"""Documents: what one is, and reading them from files of text, markdown, JSON lines and parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

COMPRESSED = (".gz", ".zst")  # may follow the suffix of most kinds of files, see `FILE_KINDS`
# The columns of parquet that a document keeps beside its content. Reading every column could cost
# more than reading the text.
METADATA = ("id", "source", "url", "title", "author", "date", "language", "license", "licence")

INSTALL = "pip install 'transnormer[data]'"
CHUNK_BYTES = 2**18  # read from a file at a time
PARQUET_ROWS = 256  # held as columns at a time; few, because a row may be a whole book
PARQUET_RECORDS = 16  # of these, held as Python's strings at a time

Content = TypeVar("Content")
Record = dict[str, Any]


class Document(NamedTuple, Generic[Content]):
    """One document on its way from a file to the shards.

    id: where it was read: the file and, where a file holds several, the line or row. No two
        documents of a file have the same. Messages about the document begin with it.
    content: the text, `Document[str]`; or the messages of a conversation, as in `chat`; or the
        fields of a record, from which one of these is made.
    metadata: the other fields of the record that it was read from, as the file holds them. Of
        parquet, these are the columns METADATA that hold texts or numbers. "source" is always
        there: where the record has none, it is the path of the file.
    """

    id: str
    content: Content
    metadata: dict[str, Any]

    def encoded(self) -> bytes:
        """The content in UTF-8, by which documents are hashed and counted. A conversation gives the
        JSON of its messages."""
        content = self.content
        if not isinstance(content, str):
            return json.dumps(content, ensure_ascii=False).encode()
        return content.encode()


def read_documents(
    inputs: Sequence[str | Path], *, text_field: str = "text"
) -> Iterator[Document[str]]:
    """The documents of files and folders, in order, one at a time.

    inputs: paths of files and folders. A folder is walked in sorted order with its sub-folders;
        hidden files in it and files with a suffix that is not in `FILE_KINDS` are passed over.
    text_field: the field of JSON lines, or the column of parquet, that holds the text.

    Line ends become "\\n", a byte order mark at the start of a document is dropped, and documents
    of white space alone are skipped. JSON lines and parquet are streamed, a text file is not.
    The inputs are looked up when this is called, and read when the result is iterated.

    Raises ValueError with one line that names the file, and the line or row in it, where there is
    nothing to read, where the content is not what the suffix says, or where a library is missing.
    """
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"inputs must be a list of paths; got the single {inputs!r}")
    if not inputs:
        raise ValueError("no input given: name files or folders")
    files = [file for given in inputs for file in _find_files(Path(given), FILE_KINDS)]
    return _read_documents(files, inputs, text_field)


def read_records(
    inputs: Sequence[str | Path], required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Document[Record]]:
    """The records of JSON lines and parquet files in order, each as the content of a document.

    inputs: as in `read_documents`, except that a text file is refused where it is named directly
        and passed over in a folder.
    required, optional: the fields, or columns, that the content has. A null counts as absent, and
        a record without a required field is refused.

    Raises ValueError with one line as `read_documents` does.
    """
    files = [file for given in inputs for file in _find_files(Path(given), RECORDS)]
    return _read_records(files, inputs, Fields(required, optional))


def read_texts(path: str | Path, *, text_field: str = "text") -> Iterator[str]:
    """The texts of the documents of one file, whatever its suffix.

    JSON lines and parquet are read as `read_documents` does, and any other file as `read_text`
    does. Raises ValueError as these do, and for a text of white space alone. A missing file is
    refused when this is called.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name the files in it")
    if _kind(path) in RECORDS:
        return (document.content for document in read_documents([path], text_field=text_field))
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return iter([text])


def read_text(path: str | Path) -> str:
    """A whole text file, plain or compressed, whatever its suffix, and `normalised`.

    Raises ValueError with one line where the path is not a text file.
    """
    path = Path(path)
    if path.is_dir() or _kind(path) in RECORDS:
        raise ValueError(f"{path}: not a single text; name one text file")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    return normalised(_decode(b"".join(_read_chunks(path)), str(path)))


def _read_documents(
    files: list[Path], inputs: Sequence[str | Path], text_field: str
) -> Iterator[Document[str]]:
    some = False
    for path in files:
        source, kind = str(path), FILE_KINDS[_kind(path)]
        name = f"{kind.field} {text_field!r}"
        for where, record in kind.read(path, Fields([text_field], strings=True)):
            text = record.pop(text_field)
            if kind.records:  # any other text was decoded here, so it is Unicode
                require_unicode(text, f"{where}: {name}")
            text = normalised(text)
            if text and not text.isspace():
                some = True
                yield Document(where, text, _with_source(record, source))
    if not some:
        raise ValueError(f"no document in {', '.join(map(str, inputs))}: every one is empty")


def _read_records(
    files: list[Path], inputs: Sequence[str | Path], fields: Fields
) -> Iterator[Document[Record]]:
    some = False
    for path in files:
        for where, record in FILE_KINDS[_kind(path)].read(path, fields):
            some = True
            for name in fields.required:
                if record[name] is None:
                    raise ValueError(f"{where}: {name!r} holds null")
            names = (*fields.required, *fields.optional)
            found = {name: record.pop(name, None) for name in names}
            content = {name: value for name, value in found.items() if value is not None}
            yield Document(where, content, _with_source(record, str(path)))
    if not some:
        raise ValueError(f"no record in {', '.join(map(str, inputs))}")


def _with_source(record: Record, source: str) -> Record:
    """The record, as the metadata of its document. source: the path of its file."""
    if record.get("source") is None:
        record["source"] = source
    return record


def require_unicode(value: object, what: str) -> str:
    """The value, once it is known to be a string that UTF-8 can hold.

    what: what the value is and where it stands; the message of a ValueError begins with it.
    """
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise ValueError(f"{what} holds {found}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{what} is not Unicode text: {error.reason}") from None
    return value


def normalised(text: str) -> str:
    """The text with "\\n" as its only line end, and without a byte order mark at its start."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix("\ufeff")


# Finding files.


def _kind(path: Path) -> str:
    """The suffix in FILE_KINDS that says how to read a file; "" for an unknown one."""
    name = path.name.lower()
    compressed = name.endswith(COMPRESSED)
    plain = name.removesuffix(".gz").removesuffix(".zst") if compressed else name
    for suffix, kind in FILE_KINDS.items():
        if plain.endswith(suffix) and (kind.compressible or not compressed):
            return suffix
    return ""


def _find_files(path: Path, kinds: Collection[str]) -> Iterator[Path]:
    """The file itself, or the files of these kinds below a folder in sorted order."""
    if path.is_dir():
        files = list(_walk(path, (), kinds))
        if not files:
            known = _list_kinds(kinds)
            raise ValueError(f"{path}: no file in this folder can be read; known are {known}")
        yield from files
    elif not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    elif (kind := _kind(path)) not in kinds:
        refusal = "not records" if kind else "unknown kind of file"
        raise ValueError(f"{path}: {refusal}; known are {_list_kinds(kinds)}")
    else:
        yield path


def _list_kinds(kinds: Collection[str]) -> str:
    """Suffixes for a message: those that may be compressed, and then the others."""
    some = [kind for kind in kinds if FILE_KINDS[kind].compressible]
    each = f"{'each ' if len(some) > 1 else ''}also {' or '.join(COMPRESSED)}"
    return ", ".join([f"{', '.join(some)} ({each})", *(kind for kind in kinds if kind not in some)])


def _walk(folder: Path, above: tuple[Path, ...], kinds: Collection[str]) -> Iterator[Path]:
    """The files of these kinds below a folder; above: the resolved folders that lead to it."""
    here = folder.resolve()
    # Links are followed, because a link that is passed over would lose data in silence.
    if here in above:
        raise ValueError(f"{folder}: links back to a folder that holds it")
    for path in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, (*above, here), kinds)
        elif _kind(path) in kinds:
            if not path.exists():
                raise ValueError(f"{path}: a link to a file that is not there")
            yield path


# Reading one file.


class Fields(NamedTuple):
    """The fields, or columns, that a reader is to find.

    strings: whether a required column that does not hold strings is refused before anything is
        read; only kinds of files that declare types can do so.
    """

    required: Sequence[str]
    optional: Sequence[str] = ()
    strings: bool = False


class FileKind(NamedTuple):
    """One kind of file.

    read: (path, fields) -> pairs of a place and a record. The place, the file with its line or
        row, is the document's id. The record has every required field, the optional fields that
        the file has, and whatever else a document is to keep as its metadata.
    field: what messages call a field.
    records: whether it holds records; else a file is one text, its only required field.
    compressible: whether one of COMPRESSED may follow its suffix.
    """

    read: Callable[[Path, Fields], Iterable[tuple[str, Record]]]
    field: str
    records: bool = True
    compressible: bool = True


def _read_text_file(path: Path, fields: Fields) -> Iterable[tuple[str, Record]]:
    (name,) = fields.required
    return [(str(path), {name: _decode(b"".join(_read_chunks(path)), str(path))})]


def _read_json_lines(path: Path, fields: Fields) -> Iterator[tuple[str, Record]]:
    for where, record in json_objects(path, _split_lines(_read_chunks(path))):
        for field in fields.required:
            if field not in record:
                raise ValueError(f"{where}: no field {field!r}; it has {_list_names(record)}")
        yield where, record


def json_objects(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Record]]:
    """(the file and line, the object) of every line that is not blank. Raises ValueError naming the
    line that is no JSON object."""
    name = str(path)
    for number, line in enumerate(lines, start=1):
        where = f"{name} line {number}"
        try:
            decoded = line.decode().removeprefix("\ufeff")
            if not decoded or decoded.isspace():
                continue
            record = json.loads(decoded)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
        yield where, record


def _read_parquet(path: Path, fields: Fields) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: {INSTALL}") from None
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            columns = _choose_columns(path, file.schema_arrow, fields)
            name, row = str(path), 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for start in range(0, len(batch), PARQUET_RECORDS):
                    for record in _to_records(path, batch.slice(start, PARQUET_RECORDS), row):
                        row += 1
                        yield f"{name} row {row}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {_first_line(error)}") from None


def _to_records(path: Path, batch: Any, before: int) -> Iterator[Record]:
    """The rows of a record batch. before: how many rows of the file come before it.

    Raises ValueError, after the rows before it, for a row that is not UTF-8.
    """
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            where = f"{path} row {before + 1}"
            raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from None
        for n in range(len(batch)):
            yield from _to_records(path, batch.slice(n, 1), before + n)


def _choose_columns(path: Path, schema: Any, fields: Fields) -> list[str]:
    """The columns to read, once it is known that each is there once and of the right type."""
    import pyarrow

    text_types = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())

    def kind(name: str) -> Any:
        kind = schema.field(name).type
        # a dictionary is a way to store a column of few different values
        return kind.value_type if pyarrow.types.is_dictionary(kind) else kind

    names = schema.names
    wanted = (*fields.required, *fields.optional)
    for name in wanted:
        if (count := names.count(name)) > 1:
            raise ValueError(f"{path}: {count} columns are named {name!r}; rename all but one")
    for name in fields.required:
        if name not in names:
            raise ValueError(f"{path}: no column {name!r}; it has {_list_names(names)}")
        if fields.strings and kind(name) not in text_types:
            raise ValueError(f"{path}: column {name!r} holds {kind(name)}, not strings")

    def plain(name: str) -> bool:
        of = kind(name)
        numbers = pyarrow.types.is_integer(of) or pyarrow.types.is_floating(of)
        return numbers or of in text_types

    kept = (name for name in METADATA if names.count(name) == 1 and plain(name))
    return list(dict.fromkeys([*(name for name in wanted if name in names), *kept]))


def _read_chunks(path: Path) -> Iterator[bytes]:
    """The decompressed content of a file."""
    if path.name.lower().endswith(".zst"):
        yield from _read_zstandard(path)
    elif path.name.lower().endswith(".gz"):
        try:
            with gzip.open(path) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: cannot be read as gzip: {_first_line(error)}") from None
    else:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def _read_zstandard(path: Path) -> Iterator[bytes]:
    # A file is read frame by frame, because the file reader of zstandard takes a truncated file for
    # a whole one.
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path}: reading .zst needs zstandard: {INSTALL}") from None
    try:
        with open(path, "rb") as file:
            frame = None
            while chunk := file.read(CHUNK_BYTES):
                while chunk:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ValueError(f"{path}: cannot be read as zstandard: {_first_line(error)}") from None
    if frame is not None:
        raise ValueError(f"{path}: damaged; it ends in the middle of a zstandard frame")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that end at b"\\n" alone, because JSON strings may hold Python's other line ends."""
    begun: list[bytes] = []  # the parts of a line whose end has not been read yet
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        if ended:
            yield b"".join((*begun, ended[0]))
            yield from ended[1:]
            begun = []
        begun.append(rest)
    yield b"".join(begun)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from None


def _list_names(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more or "none"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


_TEXT = FileKind(_read_text_file, "text", records=False)
# The suffix of each kind of file that can be read, in the order in which messages list them.
FILE_KINDS = {
    ".txt": _TEXT,
    ".md": _TEXT,
    ".markdown": _TEXT,
    ".jsonl": FileKind(_read_json_lines, "field"),
    ".parquet": FileKind(_read_parquet, "column", compressible=False),
}
RECORDS = [suffix for suffix, kind in FILE_KINDS.items() if kind.records]
