"""Captions, questions and text that users bring (paper 3.2).

    coco      MS-COCO captions: an annotation file and a folder of images
    captions  a folder of images with metadata.jsonl or metadata.csv, as Hugging Face lays it out
    vqa       VQAv2 and OK-VQA: annotations, questions and a folder of images
    text      a text file or a folder of them: a document each
    parquet   a file or a folder of them: a column of text, perhaps one of images

Everything is checked, and every file looked for, before the first image is decoded: a wrong
annotation fails at once. What is wrong is refused, with the file and the record; what is left out
is reported. Text is kept byte for byte.

Parquet comes through Hugging Face's `datasets`, streamed, so that nothing is copied. Its readers of
text and of image folders are not used: they cut files to lines, and leave images out silently.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import glob
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re
import reprlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gato_lib.config import ConfigError
from gato_lib.episodes import DataError, Document
from gato_lib.sequence import PATCH
from gato_lib.vision_language.base import Caption, Example, Question, TextSet
from gato_lib.vision_language.images import SUFFIXES, load_image

KINDS = ("coco", "captions", "vqa", "text", "parquet")
VALIDATION = 0.05  # of the images, or of the documents
LARGEST = 128  # of an image: 64 patches, tokens that a sequence spends on it
MOST_WORDS = 1_000  # of a caption, a question or an answer
MOST_CHARACTERS = 10_000  # of the same: not every script has spaces

_IMAGES, _QUESTIONS = ("images",), ("images", "questions")
_NEEDED = {"coco": _IMAGES, "captions": (), "vqa": _QUESTIONS, "text": (), "parquet": ()}
_OPTIONAL = {k: ("image",) for k in KINDS}
_OPTIONAL |= {"text": (), "parquet": ("image", "text_column", "image_column")}

Report = Callable[[str], None]
Named = tuple[str, Example]  # what decides the split, and the example


@dataclasses.dataclass(frozen=True)
class Source:
    """A set of text or of images with text to import.

    Attributes:
      name: what it is called here.
      kind: one of `KINDS`.
      where: file or folder.
      images: folder of the images ("coco", "vqa").
      questions: file of the questions ("vqa").
      image: side in pixels that images are resized to.
      text_column, image_column: of "parquet"; without an image column its rows are documents.
    """

    name: str
    kind: str
    where: str
    images: str = ""
    questions: str = ""
    image: int = 64
    text_column: str = "text"
    image_column: str = ""

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Source:
        """From a notebook's parameter, such as {"name": "books", "text": "/data/books"}.

        Raises ConfigError.
        """
        text = f"import {fields!r}"
        kinds = [k for k in KINDS if k in fields] if isinstance(fields, Mapping) else []
        if len(kinds) != 1 or "name" not in fields:
            raise ConfigError(f"{text}: expected name and one of {', '.join(KINDS)}")
        (kind,) = kinds
        needed, optional = _NEEDED[kind], _OPTIONAL[kind]
        missing = sorted({*needed} - set(fields))
        unknown = sorted(set(fields) - {"name", kind, *needed, *optional}, key=str)
        if missing:
            raise ConfigError(f"{text}: {kind} needs {missing[0]!r} too")
        if unknown:
            known = ", ".join(("name", kind, *needed, *optional))
            raise ConfigError(f"{text}: unknown field {unknown[0]!r}, expected {known}")
        for key, value in fields.items():
            if key != "image" and (not isinstance(value, str) or not value or "\0" in value):
                raise ConfigError(f"{text}: {key} is {value!r}, expected text")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", fields["name"]):
            raise ConfigError(f"{text}: a name is of lower-case letters, digits and '_'")
        image = fields.get("image", cls.image)
        if type(image) is not int or not PATCH <= image <= LARGEST or image % PATCH:
            raise ConfigError(f"{text}: image is a multiple of {PATCH}, at most {LARGEST}")
        return cls(kind=kind, where=fields[kind], **{k: v for k, v in fields.items() if k != kind})

    @classmethod
    def load(cls, text: str) -> Source:
        """The inverse of `text`."""
        return cls(**json.loads(text))

    @property
    def text(self) -> str:
        """One line that says it all."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return f"{self.name} ({self.kind} {self.where})"

    def at(self, file: str | os.PathLike, record: str = "") -> str:
        """How errors call a file and a record in it; always printable."""
        where = f"{self.name}: {os.fspath(file)}{record and ', '}{record}"
        return where.encode(errors="backslashreplace").decode()


def read(source: Source, report: Report = lambda line: None) -> TextSet:
    """Read all of a source: the set "NAME/all" of splits "train" and, of two or more, "validation".

    Validation is 5 % of the images, or of the documents, by a hash of their names: all that is said
    of one image is on one side, and more images do not change the side of the others. Raises
    DataError naming the file and the record.
    """
    try:
        named = _READERS[source.kind](source, report)
    except DataError:
        raise
    except Exception as error:  # foreign files fail in many ways
        raise DataError(f"{source}: {type(error).__name__}: {error}") from error
    kept = held_out(name for name, _ in named)
    splits = {
        "train": tuple(example for name, example in named if name not in kept),
        "validation": tuple(example for name, example in named if name in kept),
    }
    report(f"{source.name}: " + ", ".join(f"{len(v)} for {k}" for k, v in splits.items()))
    return TextSet(f"{source.name}/all", {k: v for k, v in splits.items() if v})


def held_out(names: Iterable[str]) -> set[str]:
    """The names for validation: those with the lowest 5 % of hashes, one at least, never all.

    COCO's pictures are called in two ways, by the year; both count as one name.
    """

    def rank(name: str) -> float:
        plain = re.sub(r"(^|/)COCO_\w+?_(?=\d{12}\.)", r"\1", name)
        digest = hashlib.sha256(plain.encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:6], "big") / 256**6

    ranks = {name: rank(name) for name in names}
    ranked = sorted(ranks, key=lambda name: (ranks[name], name))
    below = sum(r < VALIDATION for r in ranks.values())
    return set(ranked[: min(max(below, 1), len(ranked) - 1)])


# --- the kinds ------------------------------------------------------------------------------------


def _read_coco(source: Source, report: Report) -> list[Named]:
    table, folder = _load_json(source, source.where), _folder(source, source.images)
    files: dict[int | str, str] = {}
    for where, record in _records(source, source.where, table, "images"):
        name = _field(record, "file_name", str, where)
        _unique(files, "id", key := _id(record, "id", where), where)
        files[key] = name
    _distinct(source, source.where, "images", "file_name", files.values())
    texts: dict[int | str, list[str]] = {}
    paths: dict[int | str, pathlib.Path] = {}
    seen: set[int | str] = set()
    for where, record in _records(source, source.where, table, "annotations"):
        if "id" in record:
            _unique(seen, "id", key := _id(record, "id", where), where)
            seen.add(key)
        image = _id(record, "image_id", where)
        if image not in files:
            raise DataError(f"{where}: image_id {_shown(image)} is none of the ids in 'images'")
        text = _short(_field(record, "caption", str, where), f"{where}, caption")
        if image not in paths:
            paths[image] = _inside(folder, files[image], where)
        texts.setdefault(image, []).append(text)
    alone = [files[i] for i in files if i not in texts]
    _left_out(source, "images without a caption", alone, report)
    images = _decode(source, paths, report)
    return [(files[i], Caption(images[i], tuple(t))) for i, t in texts.items()]


def _read_captions(source: Source, report: Report) -> list[Named]:
    folder = _folder(source, source.where)
    found = [n for n in ("metadata.jsonl", "metadata.csv") if os.path.lexists(folder / n)]
    if len(found) != 1:
        got = " and ".join(found) or "neither"
        raise DataError(
            f"{source.at(folder)}: expected one of metadata.jsonl and metadata.csv, got {got}"
        )
    metadata = folder / found[0]
    rows = _jsonl_rows if metadata.suffix == ".jsonl" else _csv_rows
    texts: dict[str, list[str]] = {}
    paths: dict[str, pathlib.Path] = {}
    for where, record in rows(source, metadata):
        name = _field(record, "file_name", str, where)
        keys = [k for k in ("text", "caption") if k in record]
        if len(keys) != 1:
            got = "both" if keys else f"the keys {_shown(list(record))}"
            raise DataError(f"{where}: expected 'text' or 'caption', got {got}")
        text = _short(_field(record, keys[0], str, where), f"{where}, {keys[0]}")
        path = _inside(folder, name, where)
        name = os.path.relpath(path, folder)  # "./a.png" is "a.png"
        paths[name] = path
        texts.setdefault(name, []).append(text)
    if not texts:
        raise DataError(f"{source.at(metadata)}: expected a line for each image, got none")
    there = (os.path.relpath(path, folder) for path in _files(source, folder, SUFFIXES))
    if alone := [name for name in there if name not in texts]:
        raise DataError(
            f"{source.at(metadata)}: {len(alone)} images in the folder have no line, "
            f"the first {_shown(alone[0])}"
        )
    images = _decode(source, paths, report)
    return [(name, Caption(images[name], tuple(t))) for name, t in texts.items()]


def _read_vqa(source: Source, report: Report) -> list[Named]:
    table, asked = (_load_json(source, path) for path in (source.where, source.questions))
    folder = _folder(source, source.images)
    subtype = table.get("data_subtype", "")
    if not isinstance(subtype, str):
        where = source.at(source.where)
        raise DataError(f"{where}: data_subtype is {_shown(subtype)}, expected text")
    questions: dict[int | str, tuple[int | str, str]] = {}
    for where, record in _records(source, source.questions, asked, "questions"):
        text = _short(_field(record, "question", str, where), f"{where}, question")
        _unique(questions, "question_id", key := _id(record, "question_id", where), where)
        questions[key] = _id(record, "image_id", where), text
    answers: dict[int | str, tuple[str, ...]] = {}
    paths: dict[int | str, pathlib.Path] = {}
    empty: list[int | str] = []
    for where, record in _records(source, source.where, table, "annotations"):
        key, image = _id(record, "question_id", where), _id(record, "image_id", where)
        _unique(answers, "question_id", key, where)
        if key not in questions:
            raise DataError(f"{where}: question_id {_shown(key)} is not in {source.questions}")
        if questions[key][0] != image:
            raise DataError(
                f"{where}: image_id is {_shown(image)}, but question {_shown(key)} is about "
                f"{_shown(questions[key][0])}"
            )
        given = []
        for i, part in enumerate(_field(record, "answers", list, where)):
            place = f"{where}, answers[{i}]"
            answer = _field(_record(part, place), "answer", str, place)
            if answer.strip():
                given.append(_short(answer, place))
            else:
                empty.append(key)  # there are a few; the question has others
        if not given:
            raise DataError(f"{where}: expected an answer that is not empty, got none")
        answers[key] = tuple(given)
        if image not in paths:
            paths[image] = _coco_file(folder, subtype, image, where)
    _left_out(source, "empty answers, by question,", empty, report)
    alone = [q for q in questions if q not in answers]
    _left_out(source, "questions without an answer", alone, report)
    images = _decode(source, paths, report)
    out = []
    for key, given in answers.items():
        image, text = questions[key]
        out.append((paths[image].name, Question(images[image], text, given)))
    return out


def _coco_file(folder: pathlib.Path, subtype: str, image: int | str, where: str) -> pathlib.Path:
    """A picture by its number: COCO_val2014_000000000042.jpg or 000000000042.jpg."""
    if not isinstance(image, int):
        raise DataError(f"{where}: image_id is {_shown(image)}, expected a whole number")
    plain = f"{image:012d}.jpg"
    if subtype:
        name = f"COCO_{subtype}_{plain}"
        if not os.path.isfile(folder / plain):
            return _inside(folder, name, where, f" and no {plain}")
    return _inside(folder, plain, where)


def _read_text(source: Source, report: Report) -> list[Named]:
    root = pathlib.Path(source.where)
    files = _files(source, root, (".txt",)) if root.is_dir() else [root]
    if not files:
        raise DataError(f"{source.at(root)}: expected .txt files in the folder, got none")
    texts = {path: _checked(_load_text(source, path), source.at(path)) for path in files}
    return [(os.path.relpath(path, root), Document((text,))) for path, text in texts.items()]


def _read_parquet(source: Source, report: Report) -> list[Named]:
    root = pathlib.Path(source.where)
    files = _files(source, root, (".parquet",)) if root.is_dir() else [root]
    if not files:
        raise DataError(f"{source.at(root)}: expected .parquet files in the folder, got none")
    counts = {path: _check_schema(source, path, report) for path in files}
    if not any(counts.values()):
        raise DataError(f"{source.at(root)}: expected rows, got none")
    checked = _short if source.image_column else _checked
    texts: dict[tuple[pathlib.Path, int], str] = {}
    for path in files:
        for i, row in _rows(source, path, [source.text_column], counts[path]):
            where = f"{source.at(path, f'row {i}')}, {source.text_column}"
            texts[path, i] = checked(_text(row[source.text_column], where), where)
    if not source.image_column:
        base = root if root.is_dir() else root.parent
        names = {path: os.path.relpath(path, base) for path in files}
        return [(f"{names[path]}:{i}", Document((t,))) for (path, i), t in texts.items()]
    out = []
    for path in files:
        for i, row in _rows(source, path, [source.image_column], counts[path]):
            where = f"{source.at(path, f'row {i}')}, {source.image_column}"
            data = row[source.image_column]
            data = data.get("bytes") if isinstance(data, Mapping) else data
            if not isinstance(data, bytes):
                raise DataError(f"{where}: expected an image's bytes, got {_shown(data)}")
            image = load_image(data, where, source.image)
            # By its bytes: rows about one picture, which may have no name, are on one side.
            out.append((hashlib.sha256(data).hexdigest(), Caption(image, (texts[path, i],))))
            _progress(source, len(out), report)
    return out


_READERS: dict[str, Callable[[Source, Report], list[Named]]] = {
    "coco": _read_coco,
    "captions": _read_captions,
    "vqa": _read_vqa,
    "text": _read_text,
    "parquet": _read_parquet,
}


# --- parquet --------------------------------------------------------------------------------------


def _check_schema(source: Source, path: pathlib.Path, report: Report) -> int:
    """The number of rows of a file that has the columns asked for."""
    import pyarrow as pa
    import pyarrow.parquet

    where = source.at(path)
    if not os.path.isfile(path):
        raise DataError(f"{where}: expected a parquet file there, got nothing")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except Exception as error:  # pyarrow's are of many kinds
        raise DataError(f"{where}: expected a parquet file, got a damaged one ({error})") from error

    def is_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_text(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    wanted = {source.text_column: (is_text, "text")}
    if source.image_column:
        wanted[source.image_column] = (is_bytes, "an image's bytes")
    for column, (fits, what) in wanted.items():
        if schema.names.count(column) != 1:
            raise DataError(f"{where}: expected a column {column!r}, got {_shown(schema.names)}")
        if not fits(schema.field(column).type):
            got = schema.field(column).type
            raise DataError(f"{where}: column {column!r} is of {got}, expected {what}")
    if not source.image_column and (images := [f.name for f in schema if is_bytes(f.type)]):
        report(f'{where}: {images[0]!r} may hold images; "image_column" would take them')
    return rows


def _rows(
    source: Source, path: pathlib.Path, columns: list[str], count: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by number, of these columns; raises DataError where they are not `count`."""
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{source}: datasets is not installed: pip install datasets")
    import datasets

    i = -1
    if not count:
        return
    with tempfile.TemporaryDirectory() as cache:  # for its lock file: no row is written
        try:
            # Not load_dataset, which tells Hugging Face's server of each call.
            data = datasets.IterableDataset.from_parquet(
                glob.escape(os.path.abspath(path)),  # it would take the name for a pattern
                split="train",
                columns=columns,
                batch_size=100,  # rows read at once
                cache_dir=cache,
            ).decode(False)  # images are `load_image`'s
            for i, row in enumerate(data):
                yield i, row
        except Exception as error:
            where = source.at(path, f"row {i + 1} or soon after")
            raise DataError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error
    if i + 1 != count:
        raise DataError(f"{source.at(path)}: expected {count} rows, got {i + 1}")


# --- files ----------------------------------------------------------------------------------------


def _folder(source: Source, path: str) -> pathlib.Path:
    if not os.path.isdir(path):
        got = "a file" if os.path.isfile(path) else "nothing"
        raise DataError(f"{source.at(path)}: expected a folder there, got {got}")
    return pathlib.Path(path)


def _files(source: Source, root: pathlib.Path, suffixes: Sequence[str]) -> list[pathlib.Path]:
    """Files with such names below a folder, in order; hidden ones are not, each folder once."""

    def fail(error: OSError) -> None:
        raise DataError(f"{source.at(root)}: cannot be read ({error})") from error

    out, seen = [], set()
    for folder, inner, names in os.walk(root, onerror=fail, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above or beside
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(n for n in inner if not n.startswith("."))
        shown = (n for n in names if not n.startswith("."))
        out += [pathlib.Path(folder, n) for n in shown if n.lower().endswith(tuple(suffixes))]
    return sorted(out)


def _inside(folder: pathlib.Path, name: str, where: str, others: str = "") -> pathlib.Path:
    """The file of this name in a folder; raises DataError where it is not there, or elsewhere."""
    # Windows' rules know both slashes and drives: stricter than needed here, and portable.
    pure = pathlib.PureWindowsPath(name)
    if not pure.parts or pure.anchor or ".." in pure.parts:
        raise DataError(f"{where}: {_shown(name)} is no file name within {folder}")
    path = folder / name
    if not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "not there"
        raise DataError(f"{where}: {_shown(name)} is {what}{others}, expected a file in {folder}")
    return path


def _decode(
    source: Source, paths: Mapping[int | str, pathlib.Path], report: Report
) -> dict[int | str, np.ndarray]:
    images = {}
    for key, path in paths.items():
        images[key] = load_image(path, source.at(path), source.image)
        _progress(source, len(images), report)
    return images


def _left_out(source: Source, what: str, which: Sequence[int | str], report: Report) -> None:
    if which:
        report(f"{source.name}: {len(which)} {what} left out, the first {_shown(which[0])}")


def _progress(source: Source, count: int, report: Report) -> None:
    if count % 1_000 == 0:
        report(f"{source.name}: {count} images read")


def _load_text(source: Source, path: str | os.PathLike, encoding: str = "utf-8") -> str:
    """A whole file as text: what is not UTF-8 is refused, line ends stay."""
    where = source.at(path)
    if not os.path.isfile(path):
        got = "a folder" if os.path.isdir(path) else "nothing"
        raise DataError(f"{where}: expected a file there, got {got}")
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error})") from error
    if not data:
        raise DataError(f"{where}: expected text, got an empty file")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"byte {data[error.start : error.start + 1]!r}"
        raise DataError(f"{source.at(path, f'line {line}')}: expected UTF-8, got {got}") from error


def _load_json(source: Source, path: str) -> dict[str, Any]:
    text = _load_text(source, path, "utf-8-sig")  # with or without the mark that Windows writes
    return _record(_parse_json(text, source.at(path)), source.at(path))


def _parse_json(text: str, where: str) -> Any:
    """JSON by the letter: a key that stands twice and NaN are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            keys = collections.Counter(key for key, _ in pairs)
            raise ValueError(f"the key {keys.most_common(1)[0][0]!r} stands twice in an object")
        return record

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON, got an error in it ({error})") from error


def _jsonl_rows(source: Source, path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): JSON may hold U+2028 and its like as they are.
    for i, line in enumerate(_load_text(source, path, "utf-8-sig").split("\n"), 1):
        where = source.at(path, f"line {i}")
        if line.strip():
            yield where, _record(_parse_json(line, where), where)


def _csv_rows(source: Source, path: pathlib.Path) -> Iterator[tuple[str, dict[str, str]]]:
    text = _load_text(source, path, "utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            where = source.at(path, f"line {reader.line_num}")
            if not row:
                continue
            if not header:
                header = row
                if len(set(row)) != len(row):
                    raise DataError(f"{where}: expected different columns, got {_shown(row)}")
                continue
            if len(row) != len(header):
                raise DataError(f"{where}: expected {len(header)} cells, got {len(row)}")
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        where = source.at(path, f"line {reader.line_num}")
        raise DataError(f"{where}: expected CSV, got an error in it ({error})") from error


# --- records and texts ----------------------------------------------------------------------------


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def _shown(value: Any) -> str:
    """A value in an error: short, and printable whatever it holds."""
    return _REPR.repr(value)


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {_shown(value)}")
    return value


def _records(
    source: Source, path: str, table: dict[str, Any], key: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a list in a JSON file, each with how errors call it."""
    records = _field(table, key, list, source.at(path))
    if not records:
        raise DataError(f"{source.at(path)}: expected records in {key!r}, got none")
    for i, record in enumerate(records):
        where = source.at(path, f"{key}[{i}]")
        yield where, _record(record, where)


_KINDS_OF_JSON = {str: "text", list: "a list"}


def _field(record: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in record:
        raise DataError(f"{where}: expected a key {key!r}, got {_shown(list(record))}")
    if not isinstance(record[key], kind):
        expected = _KINDS_OF_JSON[kind]
        raise DataError(f"{where}: {key} is {_shown(record[key])}, expected {expected}")
    return record[key]


def _id(record: Mapping[str, Any], key: str, where: str) -> int | str:
    """A whole number, as such or in digits, or a name: 42 and "42" are the same."""
    value = record.get(key)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    if type(value) is int or (isinstance(value, str) and value):
        return value
    got = _shown(value) if key in record else f"the keys {_shown(list(record))}"
    raise DataError(f"{where}: expected a whole number or a name as {key}, got {got}")


def _unique(seen: Iterable[int | str], what: str, key: int | str, where: str) -> None:
    if key in seen:
        raise DataError(f"{where}: {what} {_shown(key)} stands twice")


def _distinct(source: Source, path: str, key: str, what: str, values: Iterable[str]) -> None:
    value, count = collections.Counter(values).most_common(1)[0]
    if count > 1:
        raise DataError(f"{source.at(path, key)}: {what} {_shown(value)} stands twice")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {_shown(value)}")
    return value


def _checked(text: str, where: str) -> str:
    """The same text, if there is any and if it can be written as UTF-8."""
    if not text.lstrip("\ufeff").strip():  # a byte order mark alone is no text either
        raise DataError(f"{where}: expected text, got {_shown(text)}")
    bad = re.search("[\0\ud800-\udfff]", text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        what = "NUL" if bad[0] == "\0" else f"half a surrogate pair, {bad[0]!r}"
        raise DataError(f"{where}: expected text, got {what} in line {line}")
    return text


def _short(text: str, where: str) -> str:
    """A checked text of a caption's length."""
    if len(text) > MOST_CHARACTERS or len(text.split()) > MOST_WORDS:
        got = f"{len(text.split())} words, {len(text)} characters"
        most = f"{MOST_WORDS} words and {MOST_CHARACTERS} characters"
        raise DataError(f"{where}: expected at most {most}, got {got}")
    return _checked(text, where)
