"""experiments/fetch.py: what it fetches is what was pinned, whole, and what the importers read."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import io
import os
import pathlib
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import PIL.Image
import pytest
import yaml

from gato_lib.vision_language import importers

PROGRAM = pathlib.Path(__file__).parent.parent / "experiments" / "fetch.py"
_spec = importlib.util.spec_from_file_location("fetch", PROGRAM)
fetch = sys.modules["fetch"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fetch)

PAGE = """<!DOCTYPE html><html><head><title>Not this</title></head><body>
<div id="banner"><div>Nor</div> this</div><h1 class="title">Of &amp; on<br>switches</h1>
<p>A <em>paragraph</em>,
  wrapped.</p><ul class="nav toc"><li>nor that</li></ul>
<pre>x = 1
    y = 2
</pre><table><tr><td>a</td><td>b</td></tr></table><p>An unclosed one<p>The end.</body></html>"""
PAGE_TEXT = """Of & on
switches
A paragraph, wrapped.
x = 1
    y = 2
a b
An unclosed one
The end.
"""


# --- archives made up here ------------------------------------------------------------------------


def tar(files: dict[str, bytes], compression: str = "gz", links: dict[str, str] | None = None):
    """The bytes of a tar archive; links are symbolic, or hard where the name begins with "="."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name.removeprefix("="))
            member.type = tarfile.LNKTYPE if name.startswith("=") else tarfile.SYMTYPE
            member.linkname = target
            archive.addfile(member)
    return out.getvalue()


def deb(files: dict[str, bytes], data_name: str = "data.tar.xz", **extra) -> bytes:
    """A Debian package: an `ar` archive of a version, the control files and the files."""
    control = tar({"./control": b"Package: x\n"})
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": control + b"\0" * (1 - len(control) % 2),  # odd, so that a byte follows
        data_name: tar({f"./{name}": data for name, data in files.items()}, "xz", **extra),
    }
    out = b"!<arch>\n"
    for name, data in parts.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def png(seed: int, mode: str = "RGBA") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 4), np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels, "RGBA").convert(mode).save(out, "PNG")
    return out.getvalue()


STAMPS = {
    "usr/share/stamps/animals/cat.png": png(1),
    "usr/share/stamps/animals/cat.txt": "A “tabby” cat.\nde.utf8=Eine Katze.\n".encode(),
    "usr/share/stamps/animals/cat_mirror.png": png(2),
    "usr/share/stamps/animals/cat.ogg": b"sound",
    "usr/share/stamps/town/bin.txt": b"A bin. Give me your trash!\n",
    "usr/share/stamps/town/bin.png": png(3, "P"),
    "usr/share/stamps/town/drawn.txt": b"Only as a drawing.\n",
    "usr/share/stamps/symbols/a.png": png(4),
    "usr/share/stamps/symbols/a.txt": b"A letter.\n",
    "usr/share/doc/copyright": b"GPL",
}


def entry(data: bytes, **fields) -> dict:
    """Fields of a source whose archive has these bytes."""
    return {
        "holds": "something made up",
        "licence": "CC0",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "kind": "text",
        "convert": "copy",
        **fields,
    }


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """Run the program on a made-up source; returns status, standard output and error."""
    archives = tmp_path / "archives"
    archives.mkdir()
    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "cache"))
    # No client is asked unless a test puts one there.
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def call(data: bytes, *arguments: str, stored: bytes | None = None, **fields):
        if not any(k in fields for k in ("npm", "pypi", "url")):
            fields = {"debian": "made-up", "version": "1.0"} | fields
        sources = tmp_path / "mine.yaml"
        sources.write_text(yaml.safe_dump({"mine": entry(data, **fields)}))
        (archives / "archive").write_bytes(data if stored is None else stored)
        status = fetch.main(
            [*(arguments or ["mine"]), "--sources", str(sources), "--archives", str(archives)]
        )
        return status, *capsys.readouterr()

    call.cache = tmp_path / "cache"
    call.bin = tmp_path / "bin"
    return call


def read_back(output: str) -> importers.TextSet:
    """What the importer makes of the printed lines."""
    lines = output[output.index("imports:") :]
    (fields,) = yaml.safe_load(lines)["imports"]
    return importers.read(importers.Source.parse(fields))


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != fetch.RECORD)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def is_empty(cache: pathlib.Path) -> bool:
    return not cache.exists() or {p.name for p in cache.iterdir()} <= {".lock"}


# --- what is listed -------------------------------------------------------------------------------


def test_the_listed_sources():
    sources = fetch.load_sources()
    assert {"stamps", "handbook", "foldoc"} <= set(sources)
    for source in sources.values():
        assert source.version and not source.url  # through the packages' own clients
        importers.Source.parse(yaml.safe_load(source.imports(pathlib.Path("/c")))[0])


def test_listing(call):
    data = tar({"a.txt": b"text\n"})
    status, output, _ = call(data, "--sources", "ignored")
    assert status == 0 and is_empty(call.cache)
    (line,) = (s for s in output.splitlines() if s.startswith("mine"))
    assert line.split(maxsplit=6) == ["mine", "no", "0.0", "MB", "text", "CC0", "something made up"]
    assert str(call.cache) in output and "stamps" in output
    call(data)
    _, output, _ = call(data, "--sources", "ignored")
    assert "mine      yes" in output
    _, output, _ = call(data, "--sources", "ignored", leave_out=["b*"])
    assert "mine      outdated" in output


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sha256": "12"}, "64 hexadecimal digits"),
        ({"bytes": 0}, "bytes: expected a whole number above 0, got 0"),
        ({"bytes": "1 MB"}, "bytes: expected a whole number"),
        ({"version": 1.5}, "version: expected text (in quotes?), got 1.5"),
        ({"version": ">=1"}, "version: expected an exact one"),
        ({"debian": "--option"}, "is no name of a package"),
        ({"files": "*.txt"}, "files: expected a list of text"),
        ({"kind": "captions", "convert": "html"}, "does not make 'captions'"),
        ({"convert": "zip"}, "'zip' does not make 'text'"),
        ({"npm": "too"}, "got debian and npm"),
        ({"debian": None}, "debian: expected text"),
        ({"licenze": "MIT"}, "unknown field 'licenze'; did you mean licence?"),
        ({"url": "file:///etc/passwd", "debian": ""}, "debian: expected text"),
    ],
)
def test_wrong_entries_are_told(call, fields, message):
    fields = {"debian": "made-up", "version": "1.0"} | fields
    status, _, error = call(b"x", **fields)
    assert status == 2 and message in error and error.count("\n") == 1, error


def test_wrong_commands_are_told(call, tmp_path, capsys):
    status, _, error = call(b"x", "mien")
    assert status == 2 and "unknown source 'mien'; did you mean mine?" in error
    status, _, error = call(b"x", "mine", url="ftp://127.0.0.1/x")
    assert status == 2 and "expected http or https" in error
    status, _, error = call(b"x", "mine", "--cache", str(PROGRAM.parent / "cache"))
    assert status == 2 and "in the repository" in error
    assert not (PROGRAM.parent / "cache").exists()
    for text, message in {
        "- a": "expected 'name: fields' entries",
        "a: [": "expected the node content",
        "A: {}": "a name is of lower-case letters",
        "a: text": "expected 'key: value' lines",
        "a: {}": "holds is missing",
        "stamps: {}": "stamps is listed in sources.yaml already",
    }.items():
        (tmp_path / "bad.yaml").write_text(text)
        assert fetch.main(["--sources", str(tmp_path / "bad.yaml")]) == 2
        assert message in capsys.readouterr().err


# --- conversion -----------------------------------------------------------------------------------


def test_stamps_of_a_deb(call):
    status, output, _ = call(
        deb(STAMPS),
        kind="captions",
        convert="stamps",
        root="usr/share/stamps",
        files=["*.png", "*.txt"],
        leave_out=["symbols/*"],
    )
    assert status == 0 and "mine: 2 made" in output
    made = files_of(call.cache / "mine")
    assert set(made) == {"animals/cat.png", "town/bin.png", "metadata.jsonl"}
    assert made["animals/cat.png"] == STAMPS["usr/share/stamps/animals/cat.png"]  # as it is
    examples = [e for split in read_back(output).splits.values() for e in split]
    assert sorted(t for e in examples for t in e.texts) == [
        "A bin. Give me your trash!",
        "A “tabby” cat.",
    ]


def test_html_to_text(call):
    pages = {"a/one.html": PAGE.encode(), "two.html": b"<p>Two</p>", "index.html": b""}
    data = tar({f"package/html/{k}": v for k, v in pages.items()})
    skip = ["#banner", ".toc", "#title"]
    status, output, _ = call(data, convert="html", root="package/html", skip=skip)
    assert status == 0
    made = files_of(call.cache / "mine")
    assert made == {"a/one.txt": PAGE_TEXT.encode(), "two.txt": b"Two\n"}
    assert sum(map(len, read_back(output).splits.values())) == 2


def test_a_dictionary(call):
    entries = {
        "00-database-info": "about it\n",
        "a\nalpha": "a\nalpha\n\n   <letters> The {first\n   one}.\n\n     x  y\n\n   (2001)\n\n",
        "bé": "bé\n\n   Second.\n\n",
    }
    index, text = "", b""
    for headwords, body in entries.items():
        numbers = len(text), len(body.encode())
        digits = [fetch._BASE64[n // 64] + fetch._BASE64[n % 64] for n in numbers]
        for headword in headwords.split("\n"):
            index += "\t".join([headword, *digits]) + "\n"
        text += body.encode()
    data = deb({"d/x.index": index.encode(), "d/x.dict.dz": gzip.compress(text)})
    status, output, _ = call(data, convert="dictd", root="d")
    assert status == 0 and "mine: 2 made" in output
    expected = "a, alpha\n<letters> The first one.\n  x  y\n(2001)\n\nbé\nSecond.\n"
    assert files_of(call.cache / "mine") == {"0000.txt": expected.encode()}
    assert sum(map(len, read_back(output).splits.values())) == 1


def test_a_wheel(call):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("books/one.txt", "One.")
        archive.writestr("books/two.txt", "Two.")
        archive.writestr("books/code.py", "1 / 0")
    status, output, _ = call(out.getvalue(), pypi="books", version="1", files=["*.txt"])
    assert status == 0
    assert set(files_of(call.cache / "mine")) == {"books/one.txt", "books/two.txt"}
    assert {k: len(v) for k, v in read_back(output).splits.items()} == {"train": 1, "validation": 1}


# --- what is refused, and leaves nothing ----------------------------------------------------------


def zip_of(name: str, text: str = "text", mode: int = stat.S_IFREG) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr = (mode | 0o644) << 16
        archive.writestr(member, text, zipfile.ZIP_DEFLATED)
    return out.getvalue()


REFUSED = {
    "up": (tar({"a.txt": b"x", "../b.txt": b"x"}), "'../b.txt' is no name within"),
    "up, unselected": (tar({"a.txt": b"x", "b/../../c.bin": b"x"}), "is no name within"),
    "absolute": (tar({"/tmp/b.txt": b"x"}), "is no name within"),
    "drive": (zip_of("C:/b.txt"), "is no name within"),
    "backslashes": (zip_of("a\\..\\..\\b.txt"), "is no name within"),
    "up, in a deb": (deb({"../b.txt": b"x"}), "is no name within"),
    "link": (tar({"a.txt": b"x"}, links={"b.txt": "/etc/passwd"}), "is a link or a device"),
    "hard link": (tar({"a.txt": b"x"}, links={"=b.txt": "a.txt"}), "is a link or a device"),
    "link, in a zip": (zip_of("a.txt", "/etc/passwd", stat.S_IFLNK), "is a link"),
    "twice": (tar({"a.txt": b"x", "./a.txt": b"y"}), "stands twice"),
    "too large": (tar({"a.txt": b"x" * 600, "b.bin": b"x" * 600}), "more than 1000 bytes"),
    "too large, in a zip": (zip_of("a.txt", "x" * 5_000), "more than 1000 bytes"),
    "too large, compressed": (tar({"a.bin": bytes(10**6)}, "xz"), "more than 1000 bytes"),
    "no archive": (b"just text", "is no archive"),
    "cut": (tar({"a.txt": os.urandom(900)})[:-400], "damaged"),
    "cut deb": (deb({"a.txt": b"x"})[:100], "without data.tar"),
    "zstd deb": (deb({"a.txt": b"x"}, "data.tar.zst"), "zstd"),
    "nothing selected": (tar({"a.bin": b"x"}), "nothing in the archive is selected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_archives_leave_nothing(call, tmp_path, case):
    data, message = REFUSED[case]
    before = files_of(tmp_path)
    status, output, error = call(data, files=["*.txt"], unpacked=1_000)
    assert status == 1 and message in error and "imports" not in output, error
    assert error.startswith("fetch.py: mine: ") and error.count("\n") == 1
    assert is_empty(call.cache)
    added = set(files_of(tmp_path)) - set(before)
    assert added == {"cache/.lock", "mine.yaml", "archives/archive"}


def test_links_outside_the_selection_do_not_matter(call):
    data = tar({"docs/a.txt": b"text"}, links={"lib/b.so": "b.so.1"})
    status, *_ = call(data, root="docs")
    assert status == 0 and files_of(call.cache / "mine") == {"a.txt": b"text"}


def test_wrong_utf8_is_refused(call):
    status, _, error = call(tar({"a.html": b"<p>\xff</p>"}), convert="html")
    assert status == 1 and "'a.html': expected UTF-8" in error and is_empty(call.cache)


# --- clients --------------------------------------------------------------------------------------


def put_client(folder: pathlib.Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{script}")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("client", "fields", "arguments"),
    [
        ("apt-get", {"debian": "made-up", "version": "2:1.0~1"}, ["download", "made-up=2:1.0~1"]),
        ("npm", {"npm": "@me/made-up", "version": "1.0"}, ["pack", "@me/made-up@1.0"]),
    ],
)
def test_clients(call, client, fields, arguments):
    good, other = tar({"a.txt": b"text"}), tar({"a.txt": b"texts"})
    status, _, error = call(good, stored=b"", **fields)
    assert status == 1 and f"{client} is not installed" in error and "--archives takes" in error

    put_client(call.bin, client, "import sys; sys.exit('no such version')")
    status, _, error = call(good, stored=b"", **fields)
    assert status == 1 and "no such version" in error and is_empty(call.cache)

    def giving(data: bytes) -> str:
        check = f"import sys; assert set({arguments}) <= set(sys.argv), sys.argv\n"
        return check + f"open('made.archive', 'wb').write({data!r})"

    put_client(call.bin, client, giving(other))
    status, _, error = call(good, stored=b"", **fields)
    assert status == 1 and is_empty(call.cache)
    for data in (good, other):  # both digests are told
        assert hashlib.sha256(data).hexdigest() in error

    put_client(call.bin, client, giving(good))
    assert call(good, stored=b"", **fields)[0] == 0
    put_client(call.bin, client, "import sys; sys.exit('called again')")
    status, output, _ = call(good, stored=b"", **fields)
    assert status == 0 and "in the cache already" in output and "imports:" in output


def test_pip_is_asked_for_wheels_alone(call, monkeypatch):
    data = tar({"a.txt": b"text"})
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    status, _, error = call(data, stored=b"", pypi="made-up", version="1.0")
    assert status == 1 and "pip is not installed: install it with" in error
    source = fetch.Source.parse("mine", entry(data, pypi="made-up", version="1.0"), "here")
    command = fetch.CLIENTS["pypi"][0](source)
    assert command[0] == sys.executable and command[-1] == "made-up==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)  # no setup.py is run


def test_a_folder_of_another_pin_is_replaced_and_a_users_own_is_not(call):
    assert call(tar({"a.txt": b"old", "b.txt": b"old"}))[0] == 0
    # A new pin whose archive is not what it says: the old folder stays.
    new = tar({"a.txt": b"new"})
    assert call(new, stored=b"")[0] == 1
    assert set(files_of(call.cache / "mine")) == {"a.txt", "b.txt"}
    assert call(new)[0] == 0
    assert files_of(call.cache / "mine") == {"a.txt": b"new"}
    (call.cache / "mine" / fetch.RECORD).unlink()
    status, _, error = call(new)
    assert status == 1 and "was not made by fetch.py" in error
    assert files_of(call.cache / "mine") == {"a.txt": b"new"}


# --- URLs -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(contents: dict[str, bytes], stall: threading.Event | None = None):
    """A server's address; with `stall` it sends the first half and waits."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = contents.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if stall and data:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                stall.wait(20)
            else:
                self.wfile.write(data or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        if stall:
            stall.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_urls(call):
    text, archive = b"A long story.\n" * 1_000, tar({"a.txt": b"text"})
    with serving({"/long%20story.txt": text, "/a.tgz": archive}) as address:
        status, output, _ = call(text, stored=b"", url=f"{address}/long%20story.txt")
        assert status == 0 and "100 %" in output
        assert files_of(call.cache / "mine") == {"long_story.txt": text}
        assert sum(map(len, read_back(output).splits.values())) == 1

        assert call(archive, stored=b"", url=f"{address}/a.tgz", files=["*.txt"])[0] == 0
        assert files_of(call.cache / "mine") == {"a.txt": b"text"}

        cache = ["--cache", str(call.cache.parent / "other")]
        status, _, error = call(text + b"more", "mine", *cache, stored=b"", url=f"{address}/a.tgz")
        assert status == 1 and hashlib.sha256(archive).hexdigest() in error
        status, _, error = call(b"short", "mine", *cache, stored=b"", url=f"{address}/a.tgz")
        assert status == 1 and "more than 5 bytes" in error
        status, _, error = call(b"x", "mine", *cache, stored=b"", url=f"{address}/none.txt")
        assert status == 1 and "404" in error
        assert is_empty(call.cache.parent / "other")
    status, _, error = call(b"x", "mine", *cache, stored=b"", url=f"{address}/none.txt")
    assert status == 1 and "refused" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way(tmp_path, number):
    text = b"A story.\n" * 100_000
    sources, cache = tmp_path / "mine.yaml", tmp_path / "cache"

    def start(address: str) -> subprocess.Popen:
        fields = entry(text, url=f"{address}/story.txt")
        sources.write_text(yaml.safe_dump({"mine": fields}))
        command = [sys.executable, PROGRAM, "mine", "--cache", cache, "--sources", sources]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    with serving({"/story.txt": text}, threading.Event()) as address:
        process = start(address)
        deadline = time.monotonic() + 15
        while not list(cache.glob(".mine.*.partial/archive/*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        second = start(address)  # while the first is at work
        _, error = second.communicate(timeout=15)
        assert second.returncode == 2 and b"another fetch.py is at work" in error
        process.send_signal(number)
        process.communicate(timeout=15)
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    assert not (cache / "mine").exists()
    assert is_empty(cache) == (number == signal.SIGTERM)
    with serving({"/story.txt": text}) as address:
        process = start(address)
        _, error = process.communicate(timeout=15)
        assert process.returncode == 0, error
    assert {p.name for p in cache.iterdir()} == {".lock", "mine"}  # and no leftovers
    assert files_of(cache / "mine") == {"story.txt": text}
