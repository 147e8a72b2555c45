"""Documents in: text, markdown and JSON lines (each plain, gzip or zstandard) and parquet, as files or folders."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

TEXT = (".txt", ".md", ".markdown")  # one document a file
LINES = (".jsonl",)  # one JSON object a line, its text in one field
COMPRESSED = (".gz", ".zst")  # after any of the above
PARQUET = (".parquet",)  # one document a row, its text in one column
KNOWN_RECORDS = f"{', '.join(LINES)} (also {' or '.join(COMPRESSED)}), {', '.join(PARQUET)}"
KNOWN = f"{', '.join((*TEXT, *LINES))} (each also {' or '.join(COMPRESSED)}), {', '.join(PARQUET)}"

CHUNK_BYTES = 2**18  # read from a file at a time
PARQUET_ROWS = 256  # held at a time: rows may be books


def documents(inputs: Sequence[str | Path], *, text_field: str = "text") -> Iterator[str]:
    """The documents of files and folders, in order, one at a time; those of white space alone are skipped.

    inputs: paths. A folder is walked in sorted order with its sub-folders; hidden files and suffixes not in `KNOWN`
        are passed over. text_field: the field of JSON lines, or column of parquet, that holds the text.

    Line ends become "\\n" and a byte order mark at a document's start is dropped. JSON lines and parquet are
    streamed; a text file is one string. Inputs are looked up when this is called, read when the result is iterated.
    Raises ValueError in one line that names the file (and line or row) where there is nothing to read, it cannot be
    read as what its suffix says, or the library that reads it is not installed.
    """
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"inputs is a list of paths; got the single {inputs!r}")
    if not inputs:
        raise ValueError("no input given: name files or folders")
    files = [file for given in inputs for file in _files(Path(given))]
    return _documents(files, inputs, text_field)


def records(
    inputs: Sequence[str | Path], required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of JSON lines and parquet files, in order: where names the file and its line or row.

    inputs: as in `documents`, but text files named directly are errors and inside folders are passed over.
    required, optional: the fields, or columns, to read. A record has every required one, and null counts as absent.
    Raises ValueError in one line as `documents` does.
    """
    files = [file for given in inputs for file in _files(Path(given), (*LINES, *PARQUET))]
    return _records(files, inputs, required, optional)


def read_texts(path: str | Path, *, text_field: str = "text") -> Iterator[str]:
    """The documents of one file: of JSON lines and parquet as `documents` gives them, of any other as `read_text` does.

    Raises ValueError as these do, and for a text of white space alone. A file that is not there is told at once.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name the files in it")
    if _kind(path) in (*LINES, *PARQUET):
        return documents([path], text_field=text_field)
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return iter([text])


def read_text(path: str | Path) -> str:
    """One text file whole, plain or compressed, whatever its suffix; normalised as `documents` does.

    Raises ValueError in one line for what is no text file.
    """
    path = Path(path)
    if path.is_dir() or _kind(path) in (*LINES, *PARQUET):
        raise ValueError(f"{path}: not a single text; wanted is one text file")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    return normalised(_decode(b"".join(_chunks(path)), str(path)))


def _documents(files: list[Path], inputs: Sequence[str | Path], text_field: str) -> Iterator[str]:
    some = False
    for path in files:
        kind = _kind(path)
        if kind in TEXT:
            texts: Iterable[str] = [_decode(b"".join(_chunks(path)), str(path))]
        elif kind in LINES:
            texts = _texts(_json_lines(path, [text_field]), "field", text_field)
        else:
            texts = _texts(_parquet(path, [text_field], strings=True), "column", text_field)
        for text in texts:
            text = normalised(text)
            if text and not text.isspace():
                some = True
                yield text
    if not some:
        raise ValueError(f"no document in {', '.join(map(str, inputs))}: every one is empty")


def _records(
    files: list[Path], inputs: Sequence[str | Path], required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    some = False
    for path in files:
        read = _json_lines if _kind(path) in LINES else _parquet
        for where, record in read(path, required, optional):
            some = True
            for name in required:
                if record[name] is None:
                    raise ValueError(f"{where}: {name!r} holds null")
            yield where, {name: record[name] for name in (*required, *optional) if record.get(name) is not None}
    if not some:
        raise ValueError(f"no record in {', '.join(map(str, inputs))}")


def _texts(found: Iterable[tuple[str, dict[str, Any]]], word: str, text_field: str) -> Iterator[str]:
    return (unicode(record[text_field], f"{where}: {word} {text_field!r}") for where, record in found)


def unicode(value: object, what: str) -> str:
    """The value, known to be text that UTF-8 can hold. ValueError begins with `what`, which says what and where it is."""
    if not isinstance(value, str):
        raise ValueError(f"{what} holds {'null' if value is None else type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{what} is not Unicode text: {error.reason}") from None
    return value


def normalised(text: str) -> str:
    """Line ends become "\\n"; a byte order mark at the start is dropped."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix("\ufeff")


def _kind(path: Path) -> str | None:
    """The suffix that says how to read a file, without its compression; None where we cannot."""
    name = path.name.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst") if name.endswith(COMPRESSED) else name
    kinds = (*TEXT, *LINES) if plain != name else (*TEXT, *LINES, *PARQUET)
    return next((kind for kind in kinds if plain.endswith(kind)), None)


def _files(path: Path, kinds: Sequence[str] = (*TEXT, *LINES, *PARQUET)) -> Iterator[Path]:
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
        raise ValueError(f"{path}: {'not records' if _kind(path) else 'unknown kind of file'}; known are {known}")
    else:
        yield path


def _walk(folder: Path, above: tuple[Path, ...], kinds: Sequence[str]) -> Iterator[Path]:
    here = folder.resolve()
    if here in above:  # links are followed, so that no data is lost in silence; a circle would never end
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


def _json_lines(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(_chunks(path)), start=1):
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
                raise ValueError(f"{where}: no field {name!r}; it has {_listed(record)}")
        yield where, record


def _parquet(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), *, strings: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """strings: refuse columns of anything else before reading."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'transnormer[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            for name in (*required, *optional):
                if (count := schema.names.count(name)) > 1:
                    raise ValueError(f"{path}: {count} columns are named {name!r}; which is meant cannot be known")
            for name in required:
                if name not in schema.names:
                    raise ValueError(f"{path}: no column {name!r}; it has {_listed(schema.names)}")
                kind = schema.field(name).type
                if pyarrow.types.is_dictionary(kind):  # a way to store a column of few different values
                    kind = kind.value_type
                if strings and kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                    raise ValueError(f"{path}: column {name!r} holds {kind}, not strings")
            columns = [name for name in (*required, *optional) if name in schema.names]
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    row += 1
                    try:
                        record = {name: value.as_py() for name, value in zip(columns, values, strict=True)}
                    except UnicodeDecodeError as error:
                        raise ValueError(f"{path} row {row}: not UTF-8 at byte {error.start}") from None
                    yield f"{path} row {row}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {_first_line(error)}") from None


def _chunks(path: Path) -> Iterator[bytes]:
    """A file's content, decompressed."""
    if path.name.lower().endswith(".zst"):
        yield from _zstandard(path)
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


def _zstandard(path: Path) -> Iterator[bytes]:
    # frame by frame, because zstandard's own file reader takes a truncated file for a whole one
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path}: reading .zst needs zstandard: pip install 'transnormer[data]'") from None
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
        raise ValueError(f"{path}: damaged: it ends in the middle of a zstandard frame")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Split at b"\\n" alone: JSON strings may hold the other characters that Python takes for line ends."""
    begun: list[bytes] = []
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


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
