"""Reading documents from files of text, markdown, JSON lines and parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

TEXT = (".txt", ".md", ".markdown")  # a file is one document
JSON_LINES = (".jsonl",)  # a line is one JSON object, and one of its fields is the document
COMPRESSED = (".gz", ".zst")  # may follow any of the above
PARQUET = (".parquet",)  # a row is one record, and one of its columns is the document
ALL = (*TEXT, *JSON_LINES, *PARQUET)
KNOWN_RECORDS = f"{', '.join(JSON_LINES)} (also {' or '.join(COMPRESSED)}), {', '.join(PARQUET)}"
_SUFFIXES = ", ".join((*TEXT, *JSON_LINES))
KNOWN = f"{_SUFFIXES} (each also {' or '.join(COMPRESSED)}), {', '.join(PARQUET)}"

INSTALL = "pip install 'transnormer[data]'"
CHUNK_BYTES = 2**18  # read from a file at a time
PARQUET_ROWS = 256  # held at a time; few, because a row may be a whole book


def read_documents(inputs: Sequence[str | Path], *, text_field: str = "text") -> Iterator[str]:
    """The documents of files and folders, in order, one at a time.

    inputs: paths of files and folders. A folder is walked in sorted order with its sub-folders;
        hidden files in it and files with a suffix that is not in `KNOWN` are passed over.
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
    files = [file for given in inputs for file in _find_files(Path(given))]
    return _read_documents(files, inputs, text_field)


def read_records(
    inputs: Sequence[str | Path], required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of JSON lines and parquet files, in order.

    where: the file and the line or row of the record, for messages.
    inputs: as in `read_documents`, except that a text file is refused where it is named directly
        and passed over in a folder.
    required, optional: the fields, or columns, to read. A null counts as absent, and a record
        without a required field is refused.

    Raises ValueError with one line as `read_documents` does.
    """
    files = [file for given in inputs for file in _find_files(Path(given), (*JSON_LINES, *PARQUET))]
    return _read_records(files, inputs, required, optional)


def read_texts(path: str | Path, *, text_field: str = "text") -> Iterator[str]:
    """The documents of one file, whatever its suffix.

    JSON lines and parquet are read as `read_documents` does, and any other file as `read_text`
    does. Raises ValueError as these do, and for a text of white space alone. A missing file is
    refused when this is called.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name the files in it")
    if _kind(path) in (*JSON_LINES, *PARQUET):
        return read_documents([path], text_field=text_field)
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return iter([text])


def read_text(path: str | Path) -> str:
    """A whole text file, plain or compressed, whatever its suffix, and `normalised`.

    Raises ValueError with one line where the path is not a text file.
    """
    path = Path(path)
    if path.is_dir() or _kind(path) in (*JSON_LINES, *PARQUET):
        raise ValueError(f"{path}: not a single text; name one text file")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    return normalised(_read_text_file(path))


def _read_documents(
    files: list[Path],
    inputs: Sequence[str | Path],
    text_field: str,
) -> Iterator[str]:
    some = False
    for path in files:
        kind = _kind(path)
        if kind in TEXT:
            texts: Iterable[str] = [_read_text_file(path)]
        elif kind in JSON_LINES:
            lines = _read_json_lines(path, [text_field])
            texts = _take_texts(lines, "field", text_field)
        else:
            rows = _read_parquet(path, [text_field], strings=True)
            texts = _take_texts(rows, "column", text_field)
        for text in texts:
            text = normalised(text)
            if text and not text.isspace():
                some = True
                yield text
    if not some:
        raise ValueError(f"no document in {', '.join(map(str, inputs))}: every one is empty")


def _read_records(
    files: list[Path],
    inputs: Sequence[str | Path],
    required: Sequence[str],
    optional: Sequence[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    some = False
    for path in files:
        read = _read_json_lines if _kind(path) in JSON_LINES else _read_parquet
        for where, record in read(path, required, optional):
            some = True
            for name in required:
                if record[name] is None:
                    raise ValueError(f"{where}: {name!r} holds null")
            names = (*required, *optional)
            yield where, {name: record[name] for name in names if record.get(name) is not None}
    if not some:
        raise ValueError(f"no record in {', '.join(map(str, inputs))}")


def _take_texts(
    records: Iterable[tuple[str, dict[str, Any]]],
    field_or_column: str,
    name: str,
) -> Iterator[str]:
    for where, record in records:
        yield require_unicode(record[name], f"{where}: {field_or_column} {name!r}")


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


def _kind(path: Path) -> str | None:
    """The suffix that says how to read a file, without that of its compression; None if unknown."""
    name = path.name.lower()
    compressed = name.endswith(COMPRESSED)
    plain = name.removesuffix(".gz").removesuffix(".zst") if compressed else name
    kinds = (*TEXT, *JSON_LINES) if plain != name else ALL
    return next((kind for kind in kinds if plain.endswith(kind)), None)


def _find_files(path: Path, kinds: Sequence[str] = ALL) -> Iterator[Path]:
    """The file itself, or the files of these kinds below a folder in sorted order."""
    known = KNOWN if TEXT[0] in kinds else KNOWN_RECORDS
    if path.is_dir():
        files = list(_walk(path, (), kinds))
        if not files:
            raise ValueError(f"{path}: no file in this folder can be read; known are {known}")
        yield from files
    elif not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    elif _kind(path) not in kinds:
        refusal = "not records" if _kind(path) else "unknown kind of file"
        raise ValueError(f"{path}: {refusal}; known are {known}")
    else:
        yield path


def _walk(folder: Path, above: tuple[Path, ...], kinds: Sequence[str]) -> Iterator[Path]:
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


def _read_json_lines(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_split_lines(_read_chunks(path)), start=1):
        where = f"{path} line {number}"
        decoded = _decode(line, where).removeprefix("\ufeff")
        if not decoded.strip():
            continue
        try:
            record = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
        for name in required:
            if name not in record:
                raise ValueError(f"{where}: no field {name!r}; it has {_list_names(record)}")
        yield where, record


def _read_parquet(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), *, strings: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """strings: whether to refuse, before anything is read, a required column of another type."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: {INSTALL}") from None
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            _check_columns(path, schema, required, optional, strings)
            columns = [name for name in (*required, *optional) if name in schema.names]
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    row += 1
                    where = f"{path} row {row}"
                    try:
                        texts = [value.as_py() for value in values]
                    except UnicodeDecodeError as error:
                        raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from None
                    yield where, dict(zip(columns, texts, strict=True))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {_first_line(error)}") from None


def _check_columns(
    path: Path,
    schema: Any,
    required: Sequence[str],
    optional: Sequence[str],
    strings: bool,
) -> None:
    import pyarrow

    text_types = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    for name in (*required, *optional):
        if (count := schema.names.count(name)) > 1:
            raise ValueError(f"{path}: {count} columns are named {name!r}; rename all but one")
    for name in required:
        if name not in schema.names:
            raise ValueError(f"{path}: no column {name!r}; it has {_list_names(schema.names)}")
        kind = schema.field(name).type
        if pyarrow.types.is_dictionary(kind):  # a way to store a column of few different values
            kind = kind.value_type
        if strings and kind not in text_types:
            raise ValueError(f"{path}: column {name!r} holds {kind}, not strings")


def _read_text_file(path: Path) -> str:
    return _decode(b"".join(_read_chunks(path)), str(path))


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
