"""What users bring: pictures of every sort, annotation files, text; good ones and damaged ones."""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import random
import re
import resource
import socket
import struct
import tempfile
import time
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gato_lib.config import ConfigError
from gato_lib.episodes import DataError
from gato_lib.tokenizers import TextTokenizer
from gato_lib.vision_language import importers
from gato_lib.vision_language.base import Caption, Question
from gato_lib.vision_language.images import FORMATS, load_image
from gato_lib.vision_language.importers import Source, held_out, read

RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


def encoded(image: PIL.Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def plain(colour=RED, form="PNG", size=(8, 8), mode="RGB", **options) -> bytes:
    return encoded(PIL.Image.new(mode, size, colour), form, **options)


def noise(form: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    return encoded(PIL.Image.fromarray(pixels), form, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra) -> bytes:
    """A PNG by hand; `rows` with a filter byte before each."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts)


def tiff(width: int, height: int, bits: int, data: bytes, *, zero_is: int = 1, **tags) -> bytes:
    """A grey TIFF by hand of one strip, and `tags` such as t322=1000."""
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: zero_is, 273: 8, 277: 1}
    entries |= {278: height, 279: len(data)} | {int(k[1:]): v for k, v in tags.items()}
    data += bytes(len(data) % 2)
    out = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries))
    for tag in sorted(entries):
        short = tag in (258, 259, 262, 277, 339)
        out += struct.pack("<HHII", tag, 3 if short else 4, 1, entries[tag])
    return out + bytes(4)


# --- pictures -------------------------------------------------------------------------------------


def palette(form: str = "PNG", **options) -> bytes:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    return encoded(image, form, **options)


def animation(form: str) -> bytes:
    frames = [PIL.Image.new("RGB", (8, 8), c) for c in (RED, GREEN, BLACK)]
    options = {"lossless": True} if form == "WEBP" else {}
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)


def exif(orientation: int) -> PIL.Image.Exif:
    tags = PIL.Image.Exif()
    tags[274] = orientation
    return tags


KEY = lambda *values: (b"tRNS", struct.pack(f">{len(values)}H", *values))  # noqa: E731
HALF_RED = (255, 127, 127)
PIXELS = {  # a file, and the first pixels of its first row
    "PNG": (plain(), [RED]),
    "BMP": (plain(form="BMP"), [RED]),
    "PPM": (plain(form="PPM"), [RED]),
    "TIFF": (plain(form="TIFF"), [RED]),
    "TIFF, LZW": (plain(form="TIFF", compression="tiff_lzw"), [RED]),
    "WEBP": (plain(form="WEBP", lossless=True), [RED]),
    "JPEG": (plain((40, 80, 120), "JPEG", quality=100), [(40, 80, 120)]),
    "JPEG, grey": (plain(77, "JPEG", mode="L"), [(77,) * 3]),
    "JPEG, progressive": (plain((90, 90, 90), "JPEG", progressive=True), [(90,) * 3]),
    "JPEG, CMYK": (plain((255, 0, 0, 0), "JPEG", mode="CMYK"), [(0, 255, 255)]),
    "TIFF, CMYK": (plain((0, 255, 255, 0), "TIFF", mode="CMYK"), [RED]),
    "TIFF, YCbCr": (plain((255, 128, 128), "TIFF", mode="YCbCr"), [WHITE]),
    "palette": (palette(), [RED, GREEN]),
    "palette, one clear": (palette(transparency=1), [RED, WHITE]),
    "palette, half clear": (palette(transparency=bytes([128, 255])), [HALF_RED, GREEN]),
    "palette, GIF": (palette("GIF"), [RED, GREEN]),
    "palette, GIF, one clear": (palette("GIF", transparency=0), [WHITE, GREEN]),
    "1 bit": (png(4, 1, 1, 0, b"\0\x50"), [BLACK, WHITE, BLACK, WHITE]),
    "2 bits, clear": (png(4, 1, 2, 0, b"\0\x1b", KEY(1)), [BLACK, WHITE, (170,) * 3, WHITE]),
    "4 bits, clear": (png(2, 1, 4, 0, b"\0\x35", KEY(3)), [WHITE, (85,) * 3]),
    "grey": (plain(99, mode="L"), [(99,) * 3]),
    "grey, clear": (png(2, 1, 8, 0, b"\0\x05\x06", KEY(5)), [WHITE, (6,) * 3]),
    "LA, clear": (plain((0, 0), mode="LA"), [WHITE]),
    "LA, half": (plain((0, 128), mode="LA"), [(127,) * 3]),
    "RGBA, hidden black": (plain((0, 0, 0, 0), mode="RGBA"), [WHITE]),
    "RGBA, half": (plain((255, 0, 0, 128), mode="RGBA"), [HALF_RED]),
    "RGBA, WEBP": (plain((9, 9, 9, 0), "WEBP", mode="RGBA", lossless=True), [WHITE]),
    "RGB, clear": (png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 4, 5, 6]), KEY(1, 2, 3)), [WHITE]),
    "RGB of 16 bits, clear": (
        png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 4660, 9, 9, 8000, 9, 9), KEY(4660, 9, 9)),
        [WHITE, (31, 0, 0)],
    ),
    "16 bits": (
        png(4, 1, 16, 0, b"\0" + struct.pack(">4H", 0, 257, 32896, 65535)),
        [BLACK, (1,) * 3, (128,) * 3, WHITE],
    ),
    "16 bits, clear": (
        png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 300, 301), KEY(300)),
        [WHITE, (1,) * 3],
    ),
    "16 bits, PGM": (b"P5\n2 1\n65535\n" + struct.pack(">2H", 65535, 514), [WHITE, (2,) * 3]),
    "10 bits, PGM": (b"P5\n2 1\n1023\n" + struct.pack(">2H", 1023, 512), [WHITE, (128,) * 3]),
    "16 bits, TIFF": (tiff(2, 1, 16, struct.pack("<2H", 65535, 257)), [WHITE, (1,) * 3]),
    "16 bits, TIFF, white is zero": (
        tiff(2, 1, 16, struct.pack("<2H", 65535, 257), zero_is=0),
        [BLACK, (254,) * 3],
    ),
    "12 bits, TIFF": (tiff(2, 1, 12, b"\xff\xf1\x00"), [WHITE, (16,) * 3]),
    "32 bits of 16, TIFF": (plain(32896, "TIFF", mode="I"), [(128,) * 3]),
    "animated GIF": (animation("GIF"), [RED]),
    "animated WEBP": (animation("WEBP"), [RED]),
    "animated PNG": (animation("PNG"), [RED]),
    "two pages": (animation("TIFF"), [RED]),
    "1 pixel": (png(1, 1, 8, 2, b"\0" + bytes(RED)), [RED]),
    "unreadable EXIF": (plain((40, 80, 120), "JPEG", quality=100, exif=b"Exif\0\0II*\0zzzz"), None),
}


@pytest.mark.parametrize("name", PIXELS)
def test_pictures_of_all_sorts(name):
    data, expected = PIXELS[name]
    pixels = load_image(data, name, None)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.flags.writeable
    expected = expected or [(40, 80, 120)]
    assert np.abs(pixels[0, : len(expected)].astype(int) - expected).max() <= (
        3 if "JPEG" in name or "EXIF" in name else 0
    )
    assert load_image(data, name, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(form, orientation):
    """One red quarter, stored so that it is upper left once the picture is upright."""
    upright = np.full((16, 48, 3), 255, np.uint8)
    upright[:8, :24] = RED
    stored = {  # rows and columns of the stored picture, by what EXIF says of its first ones
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    options |= {"lossless": True} if form == "WEBP" else {}
    image = PIL.Image.fromarray(np.ascontiguousarray(stored))
    pixels = load_image(encoded(image, form, exif=exif(orientation), **options), "x", None)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= 3


def test_resizing_averages_and_keeps_all_of_the_picture():
    stripes = np.zeros((640, 1280, 3), np.uint8)
    stripes[:, ::2] = 255  # picking single pixels would make this all black or all white
    pixels = load_image(encoded(PIL.Image.fromarray(stripes), "PNG"), "x", 64)
    assert pixels.shape == (64, 64, 3) and np.abs(pixels.astype(int) - 127).max() <= 2
    halves = np.zeros((100, 300, 3), np.uint8)
    halves[:, 150:] = GREEN
    pixels = load_image(encoded(PIL.Image.fromarray(halves), "PNG"), "x", 32)
    assert (pixels[:, :14] == 0).all() and (pixels[:, 18:] == GREEN).all()
    thin = png(1, 65_535, 8, 0, b"\0\x55" * 65_535)
    assert (load_image(thin, "x", 64) == 0x55).all()


NOISE = noise("PNG")
TEXT_BOMB = zlib.compress(bytes(1 << 27))
BAD_IMAGES = {
    "empty": (b"", "empty file"),
    "text": (b"hello, this is no image", "begins with b'hello, t'"),
    "zeros": (bytes(1000), "begins with"),
    "html error page": (b"<html>404</html>", "expected an image (PNG, JPEG"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "begins with b'%!PS-Ado'"),
    "PDF": (b"%PDF-1.4\n", "begins with b'%PDF-1.4'"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "begins with"),
    "icon": (plain(form="ICO", size=(16, 16)), "begins with"),
    "magic alone": (b"\x89PNG\r\n\x1a\n", "begins with"),
    "JPEG magic alone": (b"\xff\xd8\xff\xe0", "begins with"),
    "JPEG without a picture": (b"\xff\xd8\xff\xd9", "begins with"),
    "GIF header alone": (b"GIF89a\x08\0\x08\0\0\0\0", "image"),
    "zero width": (png(0, 5, 8, 2, b""), "begins with"),
    "zero height": (png(5, 0, 8, 2, b""), "begins with"),
    "zero-sided PPM": (b"P6\n0 0\n255\n", "begins with"),
    "truncated PNG": (NOISE[: len(NOISE) // 2], "damaged"),
    "PNG without its end": (NOISE[:-12], "damaged"),
    "PNG with a wrong byte": (NOISE[:200] + bytes([NOISE[200] ^ 1]) + NOISE[201:], "damaged"),
    "PNG with a wrong header": (NOISE[:18] + b"\1" + NOISE[19:], "begins with"),
    "truncated JPEG": (noise("JPEG")[:-200], "truncated"),
    "truncated GIF": (noise("GIF")[:-200], "truncated"),
    "truncated BMP": (noise("BMP")[:-200], "truncated"),
    "truncated TIFF": (noise("TIFF", compression="tiff_lzw")[:300], "expected"),
    "truncated WEBP": (noise("WEBP")[:-200], "damaged"),
    "truncated PPM": (noise("PPM")[:-200], "truncated"),
    "200 megapixels": (png(20_000, 10_000, 8, 2, b"\0"), "at most 40 megapixels"),
    "100 megapixels": (png(10_000, 10_000, 8, 2, b"\0"), "got 10000 x 10000 pixels"),
    "41 megapixels": (png(8_200, 5_000, 8, 2, b"\0"), "got 8200 x 5000 pixels"),
    "sides of 2^31": (png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"), "at most 40 megapixels"),
    "a line": (png(1, 40_000_000, 8, 0, b"\0"), "got 1 x 40000000 pixels"),
    "200-megapixel GIF": (b"GIF89a" + struct.pack("<HHBBB", 20_000, 10_000, 0, 0, 0), "image"),
    "200-megapixel PPM": (b"P6\n20000 10000\n255\n", "at most 40 megapixels"),
    "200-megapixel BMP": (
        plain(form="BMP")[:18] + struct.pack("<ii", 20_000, 10_000) + plain(form="BMP")[26:],
        "at most 40 megapixels",
    ),
    "268-megapixel WEBP": (
        b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0\2\0\0\0\xfe\x3f\0\xfe\x3f\0ANIM\6\0\0\0" + bytes(66),
        "at most 40 megapixels",
    ),
    "TIFF of one huge tile": (
        tiff(10, 10, 8, bytes(100), t322=13_000, t323=13_000, t324=8, t325=100),
        "got 13000 x 13000 pixels",
    ),
    "text bomb": (png(1, 1, 8, 0, b"\0\0", (b"zTXt", b"a\0\0" + TEXT_BOMB)), "too large"),
    "profile bomb": (png(1, 1, 8, 0, b"\0\0", (b"iCCP", b"a\0\0" + TEXT_BOMB)), "too large"),
    "floating point": (plain(0.5, "TIFF", mode="F"), "got F from 0.5 to 0.5"),
    "not a number": (plain(math.nan, "TIFF", mode="F"), "got F from nan"),
    "floating point, PFM": (b"Pf\n1 1\n-1.0\n\0\0\x80\x3f", "got F from 1.0"),
    "32 bits": (plain(70_000, "TIFF", mode="I"), "grey up to 65535, got I from 70000"),
    "signed": (tiff(1, 1, 16, struct.pack("<h", -2), t339=2), "got I from -2 to -2"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_by_name(tmp_path, name):
    data, fragment = BAD_IMAGES[name]
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    for file in (path, data):
        with pytest.raises(DataError) as error:
            load_image(file, str(path), 16)
        assert str(path) in str(error.value) and fragment in str(error.value)
        assert "0x" not in str(error.value), "no addresses of Python objects"


@pytest.mark.parametrize("make", ["missing", "folder", "loop", "pipe", "too\0odd", "x" * 999])
def test_what_is_no_file_is_refused(tmp_path, make):
    path = tmp_path / make
    if make == "folder":
        path.mkdir()
    elif make == "loop":
        path.symlink_to(path)
    elif make == "pipe":
        os.mkfifo(path)
    with pytest.raises(DataError, match="expected an image file there"):
        load_image(path, "there", None)


def test_a_bomb_takes_no_memory():
    """200 megapixels of RGB are 600 MB; they are refused by their header."""
    rows = zlib.compressobj(1)
    packed = b"".join([rows.compress(bytes(60_001)) for _ in range(10_000)] + [rows.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="200000000 pixels"):
        load_image(bomb, "bomb", 64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "kilobytes"
    assert time.perf_counter() - start < 0.5
    assert not PIL.ImageFile.LOAD_TRUNCATED_IMAGES


def image_or_error(data: bytes) -> bool:
    """Whether it is an image; fails for other errors and for any warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            pixels = load_image(data, "here", 16)
        except DataError as error:
            assert str(error).startswith("here: ")
            pixels = None
    assert not caught
    assert pixels is None or (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    return pixels is not None


STARTS = [b"", *(noise(f)[:n] for f in FORMATS for n in (4, 16, 64))]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_random_bytes_are_no_image(start, rest):
    image_or_error(start + rest)


@pytest.mark.parametrize("form", [*FORMATS, "animated GIF", "animated PNG", "palette"])
def test_damaged_images_never_crash(form):
    whole = palette() if form == "palette" else None
    whole = whole or (animation(form[-3:]) if "animated" in form else noise(form))
    assert image_or_error(whole)
    rng = random.Random(form)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3, 20])):
            data[rng.randrange(min(len(data), rng.choice([60, len(data)])))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        image_or_error(bytes(data))


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "a", "coco": "x.json", "images": "x"},
        {"name": "a", "captions": "x", "image": 32},
        {"name": "a", "vqa": "x.json", "questions": "q.json", "images": "x"},
        {"name": "a_1", "text": "x"},
        {"name": "a", "parquet": "x", "text_column": "t", "image_column": "i", "image": 128},
    ],
)
def test_sources_round_trip(fields):
    source = Source.parse(fields)
    assert Source.load(source.text) == source
    (kind,) = set(importers.KINDS) & set(fields)
    assert (source.kind, source.where) == (kind, fields[kind])
    assert source.image == fields.get("image", 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "expected name and one of coco, captions, vqa, text, parquet"),
        ({}, "expected name and one of"),
        ({"name": "a"}, "expected name and one of"),
        ({"text": "x"}, "expected name and one of"),
        ({"name": "a", "text": "x", "parquet": "x"}, "expected name and one of"),
        ({"name": "a", "coco": "x"}, "coco needs 'images' too"),
        ({"name": "a", "vqa": "x", "images": "x"}, "vqa needs 'questions' too"),
        ({"name": "a", "text": "x", "image": 32}, "unknown field 'image'"),
        ({"name": "a", "coco": "x", "images": "x", "imges": "x"}, "unknown field 'imges'"),
        ({"name": "a", "text": "x", 1: "x"}, "unknown field 1"),
        ({"name": "A b", "text": "x"}, "lower-case letters"),
        ({"name": "a/../b", "text": "x"}, "lower-case letters"),
        ({"name": 1, "text": "x"}, "name is 1, expected text"),
        ({"name": "a", "text": ""}, "text is '', expected text"),
        ({"name": "a", "text": ["x"]}, "text is ['x'], expected text"),
        ({"name": "a", "text": "x\0"}, "expected text"),
        ({"name": "a", "coco": "x", "images": 5}, "images is 5"),
        ({"name": "a", "captions": "x", "image": 60}, "multiple of 16"),
        ({"name": "a", "captions": "x", "image": 0}, "multiple of 16"),
        ({"name": "a", "captions": "x", "image": 256}, "at most 128"),
        ({"name": "a", "captions": "x", "image": True}, "multiple of 16"),
        ({"name": "a", "captions": "x", "image": "64"}, "multiple of 16"),
    ],
)
def test_wrong_sources_are_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        Source.parse(fields)
    assert message in str(error.value)


def test_validation_is_by_name_and_stable():
    names = [f"{i:012d}.jpg" for i in range(4_000)]
    kept = held_out(names)
    assert 150 < len(kept) < 250  # 5 % of 4,000, five standard deviations to either side
    assert held_out(reversed(names)) == kept
    assert held_out(names[:3_000]) == kept & set(names[:3_000])
    assert {n[15:] for n in held_out("COCO_train2014_" + n for n in names)} == kept
    assert held_out([]) == held_out(["a"]) == held_out(["a", "a"]) == set()
    for count in (2, 3, 5):
        assert 1 <= len(held_out(names[:count])) < count
    high = next(iter(kept))  # all of a small set below the mark: one stays to train on
    assert len(held_out(sorted(kept)[:2])) == 1 and held_out([high]) == set()


# --- the kinds, as they should be -----------------------------------------------------------------

COLOURS = {7: RED, 42: GREEN, 99: BLACK, 123: WHITE}
TRICKY = "Cafe\u0301 \u2581 caf\xe9\u2028 \U0001f469\u200d\U0001f680\ttwo  spaces "  # not NFC


def write(path: pathlib.Path, value) -> None:
    """Bytes, text, or what JSON is to be made of."""
    if not isinstance(value, bytes):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        value = text.encode(errors="surrogatepass")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(value)


def coco_table() -> dict:
    captions = [(7, "a red square"), (42, TRICKY), (7, "red again"), (99, "night"), (123, "snow")]
    return {
        "info": {"year": 2017},
        "images": [{"id": i, "file_name": f"{i:012d}.png", "width": 8} for i in COLOURS],
        "annotations": [
            {"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)
        ],
    }


def make_coco(root: pathlib.Path) -> dict:
    write(root / "captions.json", coco_table())
    for i, colour in COLOURS.items():
        write(root / "images" / f"{i:012d}.png", plain(colour))
    return {"coco": root / "captions.json", "images": root / "images"}


def metadata_rows() -> list[dict]:
    texts = {7: "a red square", 42: TRICKY, 99: "night", 123: "snow"}
    return [{"file_name": f"{i}.png", "text": t, "licence": None} for i, t in texts.items()]


def lines(rows: list) -> str:
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n"


def make_captions(root: pathlib.Path) -> dict:
    for i, colour in COLOURS.items():
        write(root / "folder" / f"{i}.png", plain(colour))
    write(root / "folder" / "metadata.jsonl", lines(metadata_rows()))
    write(root / "folder" / "README.md", "not an image")
    return {"captions": root / "folder"}


def question_table() -> dict:
    asked = [(70, 7, "What colour?"), (71, 7, "Is it red?"), (420, 42, "Is it green?")]
    keys = ("question_id", "image_id", "question")
    return {
        "data_subtype": "val2014",
        "questions": [dict(zip(keys, q, strict=True)) for q in asked],
    }


def answer_table() -> dict:
    given = {70: ["red"] * 8 + ["pink", TRICKY], 71: ["yes"] * 10, 420: ["no"] * 4 + ["yes"] * 6}
    return {
        "data_subtype": "val2014",
        "annotations": [
            {
                "question_id": q,
                "image_id": q // 10,
                "answer_type": "other",
                "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers, 1)],
            }
            for q, answers in given.items()
        ],
    }


def make_vqa(root: pathlib.Path) -> dict:
    write(root / "questions.json", question_table())
    write(root / "answers.json", answer_table())
    write(root / "images" / "COCO_val2014_000000000007.jpg", plain(RED))
    write(root / "images" / "000000000042.jpg", plain(GREEN))
    return {
        "vqa": root / "answers.json",
        "questions": root / "questions.json",
        "images": root / "images",
    }


def make_text(root: pathlib.Path) -> dict:
    write(root / "books" / "one.txt", "\ufeffFirst\r\nline. " + TRICKY)
    write(root / "books" / "two.TXT", "word " * 5_000)
    write(root / "books" / "deep" / "er.txt", "deep")
    write(root / "books" / "notes.md", b"\xff not text")
    write(root / "books" / "._one.txt", b"\xff hidden")
    return {"text": root / "books"}


def make_parquet(root: pathlib.Path) -> dict:
    (root / "rows").mkdir()
    texts = ["a red square", TRICKY, "night", "snow"]
    cells = [{"bytes": plain(c), "path": "x.png"} for c in COLOURS.values()]
    for i in (0, 2):
        table = {"image": cells[i : i + 2], "text": texts[i : i + 2], "n": [1, 2]}
        pq.write_table(pa.table(table), root / "rows" / f"part-{i}.parquet")
    return {"parquet": root / "rows", "image_column": "image"}


MAKERS = {
    "coco": make_coco,
    "captions": make_captions,
    "vqa": make_vqa,
    "text": make_text,
    "parquet": make_parquet,
}


def source_of(fields: dict) -> Source:
    text = {k: v if type(v) is int else str(v) for k, v in fields.items()}
    return Source.parse({"name": "mine", **text})


def all_of(textset) -> list:
    return [example for split in textset.splits.values() for example in split]


@pytest.mark.parametrize("kind", ["coco", "captions", "parquet"])
def test_captions(tmp_path, kind):
    said = []
    textset = read(source_of(MAKERS[kind](tmp_path) | {"image": 16}), said.append)
    assert textset.name == "mine/all" and textset.paired
    assert {k: len(v) for k, v in textset.splits.items()} == {"train": 3, "validation": 1}
    assert said == ["mine: 3 for train, 1 for validation"]
    found = {tuple(e.image[0, 0].tolist()): e for e in all_of(textset)}
    assert all(type(e) is Caption and e.image.shape == (16, 16, 3) for e in found.values())
    assert all((e.image == e.image[0, 0]).all() for e in found.values())
    second = ("red again",) if kind == "coco" else ()
    texts = {RED: ("a red square", *second), GREEN: (TRICKY,), BLACK: ("night",), WHITE: ("snow",)}
    assert {colour: e.texts for colour, e in found.items()} == texts


def test_captions_of_a_csv_and_of_several_lines_an_image(tmp_path):
    fields = make_captions(tmp_path)
    folder = fields["captions"]
    (folder / "metadata.jsonl").unlink()
    table = '\ufeffcaption,file_name,n\r\n"red, ""quoted""\nline",7.png,1\r\nsnow,123.png,\r\n'
    table += "green,42.png,\r\n\r\nnight,99.png,\r\nagain,./7.png,\r\n"
    write(folder / "metadata.csv", table)
    texts = {e.texts for e in all_of(read(source_of(fields)))}
    assert texts == {('red, "quoted"\nline', "again"), ("snow",), ("green",), ("night",)}


def test_coco_reports_what_it_leaves_out_and_takes_numbers_in_digits(tmp_path):
    fields, table, said = make_coco(tmp_path), coco_table(), []
    table["images"].append({"id": 5, "file_name": "none.png"})
    table["images"][0]["id"] = "7"
    write(fields["coco"], b"\xef\xbb\xbf" + json.dumps(table).encode())
    textset = read(source_of(fields), said.append)
    assert len(all_of(textset)) == 4
    assert said[0] == "mine: 1 images without a caption left out, the first 'none.png'"


def test_questions(tmp_path):
    fields, said = make_vqa(tmp_path), []
    textset = read(source_of(fields))
    found = {e.question: e for e in all_of(textset)}
    assert all(type(e) is Question for e in found.values())
    assert found["What colour?"].answers == ("red",) * 8 + ("pink", TRICKY)
    assert found["What colour?"].answer == "red" and len(found) == 3
    assert found["Is it green?"].answer == "yes" and len(found["Is it green?"].answers) == 10
    assert (found["Is it red?"].image == RED).all() and (found["Is it green?"].image == GREEN).all()
    sides = [{(e.image[0, 0, 0]) for e in split} for split in textset.splits.values()]
    assert len(sides) == 2 and not sides[0] & sides[1], "an image is on one side"

    answers, asked = answer_table(), question_table()
    answers["annotations"][0]["answers"][8]["answer"] = " "
    asked["questions"].append({"question_id": 9, "image_id": 7, "question": "Why?"})
    write(tmp_path / "answers.json", answers)
    write(tmp_path / "questions.json", asked)
    textset = read(source_of(fields), said.append)
    found = {e.question: e for e in all_of(textset)}
    assert found["What colour?"].answers == ("red",) * 8 + (TRICKY,) and "Why?" not in found
    assert said[:2] == [
        "mine: 1 empty answers, by question, left out, the first 70",
        "mine: 1 questions without an answer left out, the first 9",
    ]


def test_text(tmp_path):
    fields = make_text(tmp_path)
    (fields["text"] / "deep" / "loop").symlink_to(fields["text"])
    textset = read(source_of(fields))
    texts = {document.items for document in all_of(textset)}
    assert texts == {("\ufeffFirst\r\nline. " + TRICKY,), ("word " * 5_000,), ("deep",)}
    assert {k: len(v) for k, v in textset.splits.items()} == {"train": 2, "validation": 1}
    alone = read(source_of({"text": fields["text"] / "one.txt"}))
    assert list(alone.splits) == ["train"] and not alone.paired
    assert alone.documents("validation") == []


def test_parquet_without_images_is_documents(tmp_path):
    fields, said = make_parquet(tmp_path), []
    del fields["image_column"]
    textset = read(source_of(fields), said.append)
    texts = {document.items[0] for document in all_of(textset)}
    assert texts == {"a red square", TRICKY, "night", "snow"}
    assert "'image' may hold images" in said[0]
    one = fields["parquet"] / "part-0.parquet"
    few = read(source_of({"parquet": one}))
    assert {d.items[0] for d in all_of(few)} == {"a red square", TRICKY}


def test_parquet_asks_nothing_of_the_network(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(socket.socket, "connect", lambda *a: calls.append(a))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    fields = make_parquet(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    read(source_of(fields))
    assert not calls and sorted(tmp_path.rglob("*")) == before, "and it leaves no file behind"


def test_parquet_as_datasets_writes_it(tmp_path):
    """With its Image feature, which must not decode; names that a glob would take for a pattern."""
    import datasets

    path = tmp_path / "odd [1-3] *.parquet"
    pixels = [PIL.Image.new("RGB", (20, 10), c) for c in COLOURS.values()]
    data = datasets.Dataset.from_dict({"image": pixels, "words": ["r", "g", "b", "w"]})
    data = data.cast_column("image", datasets.Image())
    data.to_parquet(path)
    plain_bytes = pa.table({"image": [plain(RED)] * 250, "words": ["same"] * 250})
    pq.write_table(plain_bytes, tmp_path / "plain.parquet", row_group_size=100)
    fields = {"parquet": path, "image_column": "image", "text_column": "words", "image": 16}
    found = {e.texts[0]: e.image[0, 0].tolist() for e in all_of(read(source_of(fields)))}
    assert found == {"r": [*RED], "g": [*GREEN], "b": [*BLACK], "w": [*WHITE]}
    many = read(source_of(fields | {"parquet": tmp_path / "plain.parquet"}))
    assert list(many.splits) == ["train"], "rows about one picture are on one side"
    assert len(many.splits["train"]) == 250


def test_texts_come_back_from_their_tokens(tmp_path):
    text = TextTokenizer()
    for kind in ("coco", "text"):
        textset = read(source_of(MAKERS[kind](tmp_path)))
        for split in textset.splits:
            for document in textset.documents(split):
                item = document.items[-1]
                assert text.decode(text.encode(item)) == item


# --- the kinds, damaged ---------------------------------------------------------------------------


def edit(name: str, change):
    """Damage that changes the JSON file `name` in place."""

    def damage(root: pathlib.Path) -> None:
        table = json.loads((root / name).read_text())
        change(table)
        write(root / name, table)

    return damage


def put(name: str, value):
    """Damage that replaces the file `name`."""
    return lambda root: write(root / name, value)


def row(number: int, **fields):
    """Damage that changes a line of metadata.jsonl."""

    def damage(root: pathlib.Path) -> None:
        rows = metadata_rows()
        rows[number] |= fields
        write(root / "folder/metadata.jsonl", lines(rows))

    return damage


def drop(name: str, folder: bool = False):
    """Damage that removes a file, and perhaps puts a folder there."""

    def damage(root: pathlib.Path) -> None:
        (root / name).unlink()
        if folder:
            (root / name).mkdir()

    return damage


def columns(**cells):
    """Damage that writes another part of the parquet set."""
    return lambda root: pq.write_table(pa.table(cells), root / "rows" / "part-0.parquet")


def cut(name: str, byte: int | None = None):
    """Damage to the end of a file, or to one of its bytes."""

    def damage(root: pathlib.Path) -> None:
        data = (root / name).read_bytes()
        place = byte or len(data) * 2 // 3
        rest = b"" if byte is None else bytes([data[byte] ^ 255]) + data[byte + 1 :]
        (root / name).write_bytes(data[:place] + rest)

    return damage


def csv_of(text: str):
    def damage(root: pathlib.Path) -> None:
        (root / "folder/metadata.jsonl").unlink()
        write(root / "folder/metadata.csv", text)

    return damage


def images(i, **fields):
    return edit("captions.json", lambda t: t["images"][i].update(fields))


def annotations(i, **fields):
    return edit("captions.json", lambda t: t["annotations"][i].update(fields))


def answers(i, **fields):
    return edit("answers.json", lambda t: t["annotations"][i].update(fields))


def questions(i, **fields):
    return edit("questions.json", lambda t: t["questions"][i].update(fields))


def half_pair(text: str) -> str:
    """COCO's table with an escape instead of a text: JSON may spell what is no character."""
    return json.dumps(coco_table()).replace(text, "\\ud800")


COCO, META, ANSWERS, ASKED = "captions.json", "metadata.jsonl", "answers.json", "questions.json"
DEEP = "[" * 100_000
LONG = "word " * 10_000
GOOD = plain(RED)
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 1)), pa.py_buffer(b"\xff")]
)
DAMAGED = [  # kind, damage, and what the error says: the file and the rest
    # JSON files as a whole
    ("coco", put(COCO, b""), COCO, "empty file"),
    ("coco", put(COCO, "{}"), COCO, "expected a key 'images'"),
    ("coco", put(COCO, "[]"), COCO, "expected an object, got []"),
    ("coco", put(COCO, "null"), COCO, "expected an object, got None"),
    ("coco", put(COCO, '{"images": [{"id": 1, '), COCO, "expected JSON"),
    ("coco", put(COCO, "{} {}"), COCO, "Extra data"),
    ("coco", put(COCO, '{"images": NaN}'), COCO, "NaN is no JSON"),
    ("coco", put(COCO, '{"images": [-Infinity]}'), COCO, "-Infinity is no JSON"),
    ("coco", put(COCO, '{"images": [], "images": []}'), COCO, "'images' stands twice"),
    ("coco", put(COCO, DEEP), COCO, "expected JSON"),
    ("coco", put(COCO, "9" * 5_000), COCO, "expected JSON"),
    ("coco", put(COCO, '{"a":\n"\xe9"}'.encode("latin-1")), COCO, "line 2: expected UTF-8"),
    ("coco", put(COCO, json.dumps(coco_table()).encode("utf-16")), COCO, "expected UTF-8"),
    ("coco", put(COCO, GOOD), COCO, "expected UTF-8, got byte b'\\x89'"),
    ("coco", cut(COCO), COCO, "expected JSON"),
    ("coco", drop(COCO), COCO, "expected a file there, got nothing"),
    ("coco", drop(COCO, folder=True), COCO, "expected a file there, got a folder"),
    # COCO's records
    ("coco", edit(COCO, lambda t: t.update(images={})), COCO, "images is {}, expected a list"),
    ("coco", edit(COCO, lambda t: t.update(images=[])), COCO, "records in 'images', got none"),
    ("coco", edit(COCO, lambda t: t.update(annotations=[])), COCO, "'annotations', got none"),
    ("coco", edit(COCO, lambda t: t.pop("annotations")), COCO, "a key 'annotations'"),
    ("coco", edit(COCO, lambda t: t["images"].append(3)), COCO, "images[4]: expected an object"),
    ("coco", images(1, id=7), COCO, "images[1]: id 7 stands twice"),
    ("coco", images(1, id="7"), COCO, "images[1]: id 7 stands twice"),
    ("coco", images(1, id=None), COCO, "images[1]: expected a whole number or a name as id"),
    ("coco", images(1, id=1.5), COCO, "images[1]: expected a whole number"),
    ("coco", images(1, id=True), COCO, "images[1]: expected a whole number"),
    ("coco", images(1, id=[]), COCO, "images[1]: expected a whole number"),
    ("coco", images(1, file_name="000000000007.png"), COCO, "'000000000007.png' stands twice"),
    ("coco", images(1, file_name=5), COCO, "images[1]: file_name is 5, expected text"),
    ("coco", images(1, file_name="gone.png"), COCO, "annotations[1]: 'gone.png' is not there"),
    ("coco", images(1, file_name="../../etc/passwd"), COCO, "no file name within"),
    ("coco", images(1, file_name="/etc/passwd"), COCO, "no file name within"),
    ("coco", images(1, file_name="C:\\secret.png"), COCO, "no file name within"),
    ("coco", images(1, file_name="a\\..\\..\\b.png"), COCO, "no file name within"),
    ("coco", images(1, file_name=""), COCO, "'' is no file name"),
    ("coco", images(1, file_name="."), COCO, "'.' is no file name"),
    ("coco", images(1, file_name="a\0b.png"), COCO, "is not there"),
    ("coco", images(1, file_name="x" * 999), COCO, "is not there"),
    ("coco", put(COCO, half_pair("000000000042.png")), COCO, "'\\ud800' is not there"),
    ("coco", annotations(2, image_id=8), COCO, "annotations[2]: image_id 8 is none of the ids"),
    ("coco", annotations(2, id=1), COCO, "annotations[2]: id 1 stands twice"),
    ("coco", edit(COCO, lambda t: t["annotations"][2].pop("image_id")), COCO, "as image_id, got"),
    ("coco", edit(COCO, lambda t: t["annotations"][2].pop("caption")), COCO, "a key 'caption'"),
    ("coco", annotations(2, caption=None), COCO, "caption is None, expected text"),
    ("coco", annotations(2, caption=["a"]), COCO, "caption is ['a'], expected text"),
    ("coco", annotations(2, caption=""), COCO, "annotations[2], caption: expected text, got ''"),
    ("coco", annotations(2, caption=" \n\u3000"), COCO, "annotations[2], caption: expected text"),
    ("coco", annotations(2, caption=LONG), COCO, "annotations[2], caption: expected at most 1000"),
    ("coco", annotations(2, caption="x" * 10_001), COCO, "10001 characters"),
    (
        "coco",
        annotations(2, caption="a\0b"),
        COCO,
        "annotations[2], caption: expected text, got NUL",
    ),
    (
        "coco",
        put(COCO, half_pair("night")),
        COCO,
        "annotations[3], caption: expected text, got half a surrogate pair",
    ),
    # images on the disk
    ("coco", drop("images/000000000042.png"), COCO, "'000000000042.png' is not there"),
    ("coco", drop("images/000000000042.png", folder=True), COCO, "is a folder, expected a file"),
    ("coco", put("images/000000000042.png", b""), "000000000042.png", "empty file"),
    ("coco", put("images/000000000042.png", GOOD[:-20]), "000000000042.png", "damaged"),
    ("coco", put("images/000000000042.png", b"GIF"), "000000000042.png", "begins with b'GIF'"),
    # image folders
    ("captions", put("folder/metadata.jsonl", b""), META, "empty file"),
    ("captions", put("folder/metadata.jsonl", "\n \n"), META, "a line for each image, got none"),
    ("captions", drop("folder/metadata.jsonl"), "folder", "one of metadata.jsonl and metadata.csv"),
    ("captions", put("folder/metadata.csv", "x"), "folder", "metadata.jsonl and metadata.csv"),
    ("captions", put("folder/metadata.jsonl", lines([*metadata_rows(), {}]) + "{"), META, "line 5"),
    (
        "captions",
        put("folder/metadata.jsonl", lines(metadata_rows()) + "{"),
        META,
        "line 5: expect",
    ),
    (
        "captions",
        put("folder/metadata.jsonl", b'{"a": 1}\n\n{"\xff"}'),
        META,
        "line 3: expected UT",
    ),
    ("captions", put("folder/metadata.jsonl", lines(metadata_rows()[:2])), META, "2 images in the"),
    ("captions", put("folder/new.png", GOOD), META, "1 images in the folder have no line"),
    ("captions", row(1, file_name="gone.png"), META, "line 2: 'gone.png' is not there"),
    ("captions", row(1, file_name="../7.png"), META, "line 2: '../7.png' is no file name"),
    ("captions", row(1, file_name=None), META, "line 2: file_name is None, expected text"),
    ("captions", row(1, text=3), META, "line 2: text is 3, expected text"),
    ("captions", row(1, text=""), META, "line 2, text: expected text, got ''"),
    ("captions", row(1, text=LONG), META, "line 2, text: expected at most 1000 words"),
    ("captions", row(1, caption="or so"), META, "line 2: expected 'text' or 'caption', got both"),
    ("captions", put("folder/7.png", GOOD[:40]), "7.png", "expected"),
    ("captions", csv_of("file_name,text\n7.png\n"), "metadata.csv", "line 2: expected 2 cells"),
    ("captions", csv_of("file_name,file_name\n"), "metadata.csv", "expected different columns"),
    ("captions", csv_of('file_name,text\n7.png,"a'), "metadata.csv", "expected CSV"),
    ("captions", csv_of("file_name,label\n7.png,a\n"), "metadata.csv", "'text' or 'caption', got"),
    ("captions", csv_of("name,text\n7.png,a\n"), "metadata.csv", "line 2: expected a key 'file_"),
    ("captions", csv_of("file_name,text\n7.png,\n"), "metadata.csv", "line 2, text: expected text"),
    ("captions", csv_of("file_name,text\n"), "metadata.csv", "got none"),
    # questions
    ("vqa", answers(1, question_id=5), ANSWERS, "annotations[1]: question_id 5 is not in"),
    ("vqa", answers(1, question_id=70), ANSWERS, "annotations[1]: question_id 70 stands twice"),
    ("vqa", answers(1, image_id=42), ANSWERS, "image_id is 42, but question 71 is about 7"),
    (
        "vqa",
        answers(1, answers=[]),
        ANSWERS,
        "annotations[1]: expected an answer that is not empty",
    ),
    ("vqa", answers(1, answers="yes"), ANSWERS, "answers is 'yes', expected a list"),
    ("vqa", answers(1, answers=["yes"]), ANSWERS, "annotations[1], answers[0]: expected an object"),
    ("vqa", answers(1, answers=[{"answer": 2}]), ANSWERS, "answers[0]: answer is 2, expected text"),
    ("vqa", answers(1, answers=[{"answer": LONG}]), ANSWERS, "answers[0]: expected at most 1000"),
    ("vqa", answers(1, answers=[{"answer": " "}]), ANSWERS, "expected an answer that is not empty"),
    ("vqa", questions(1, question=""), ASKED, "questions[1], question: expected text, got ''"),
    ("vqa", questions(1, question=LONG), ASKED, "questions[1], question: expected at most 1000"),
    ("vqa", questions(1, question_id=70), ASKED, "questions[1]: question_id 70 stands twice"),
    ("vqa", edit(ASKED, lambda t: t.pop("questions")), ASKED, "expected a key 'questions'"),
    ("vqa", put(ASKED, "{"), ASKED, "expected JSON"),
    ("vqa", edit(ANSWERS, lambda t: t.update(data_subtype=4)), ANSWERS, "data_subtype is 4"),
    (
        "vqa",
        edit(ANSWERS, lambda t: t.update(data_subtype="/../../x")),
        ANSWERS,
        "no file name within",
    ),
    ("vqa", drop("images/000000000042.jpg"), ANSWERS, "annotations[2]: 'COCO_val2014_00000"),
    ("vqa", put("images/000000000042.jpg", b"x"), "000000000042.jpg", "expected an image"),
    # text
    ("text", put("books/one.txt", b""), "one.txt", "expected text, got an empty file"),
    ("text", put("books/one.txt", b" \r\n"), "one.txt", "expected text, got"),
    ("text", put("books/one.txt", b"\xef\xbb\xbf"), "one.txt", "expected text, got"),
    ("text", put("books/one.txt", b"a\nb\n\xe9"), "one.txt", "line 3: expected UTF-8, got byte"),
    ("text", put("books/one.txt", "text".encode("utf-16")), "one.txt", "line 1: expected UTF-8"),
    ("text", put("books/one.txt", b"\xed\xa0\x80"), "one.txt", "line 1: expected UTF-8"),
    ("text", put("books/one.txt", b"a\nb\0"), "one.txt", "got NUL in line 2"),
    ("text", lambda root: (root / "books/a.txt").symlink_to("a.txt"), "a.txt", "got nothing"),
    # parquet
    ("parquet", cut("rows/part-0.parquet"), "part-0.parquet", "got a damaged one"),
    ("parquet", put("rows/part-0.parquet", b""), "part-0.parquet", "got a damaged one"),
    ("parquet", put("rows/part-0.parquet", "text"), "part-0.parquet", "got a damaged one"),
    ("parquet", cut("rows/part-0.parquet", byte=10), "part-0.parquet", "cannot be read"),
    ("parquet", columns(image=[GOOD]), "part-0.parquet", "expected a column 'text', got ['image']"),
    ("parquet", columns(text=["a"]), "part-0.parquet", "expected a column 'image'"),
    ("parquet", columns(text=[1], image=[GOOD]), "part-0.parquet", "'text' is of int64"),
    ("parquet", columns(text=["a"], image=["b"]), "part-0.parquet", "'image' is of string"),
    ("parquet", columns(text=["a", None], image=[GOOD] * 2), "part-0.parquet", "row 1, text: exp"),
    ("parquet", columns(text=["a", ""], image=[GOOD] * 2), "part-0.parquet", "row 1, text: exp"),
    ("parquet", columns(text=["a", LONG], image=[GOOD] * 2), "part-0.parquet", "at most 1000"),
    ("parquet", columns(text=["a", "b"], image=[GOOD, None]), "part-0.parquet", "row 1, image: e"),
    ("parquet", columns(text=["a"], image=[b""]), "part-0.parquet", "row 0, image: expected an im"),
    ("parquet", columns(text=["a"], image=[GOOD[:50]]), "part-0.parquet", "row 0, image: expecte"),
    (
        "parquet",
        columns(text=["a"], image=pa.array([{"bytes": None, "path": "7.png"}], HF_IMAGE)),
        "part-0.parquet",
        "row 0, image: expected an image's bytes, got None",
    ),
    (
        "parquet",
        columns(text=NOT_UTF8, image=[GOOD]),
        "part-0.parquet",
        "cannot be read",
    ),
]


@pytest.mark.parametrize(
    ("kind", "damage", "file", "message"),
    DAMAGED,
    ids=[f"{kind}-{i}" for i, (kind, *_) in enumerate(DAMAGED)],
)
def test_damaged_sets_are_refused(tmp_path, monkeypatch, kind, damage, file, message):
    fields = MAKERS[kind](tmp_path)
    damage(tmp_path)
    decoded = []
    real = importers.load_image
    monkeypatch.setattr(importers, "load_image", lambda *a: decoded.append(a) or real(*a))
    with pytest.raises(DataError) as error:
        read(source_of(fields))
    text = str(error.value)
    assert text.startswith("mine: ") and file in text and message in text
    assert text.encode().decode() == text, "printable, whatever the file holds"
    in_an_image = file.endswith((".png", ".jpg")) or "image: expected" in text
    assert in_an_image or not decoded, "all else is seen before an image is decoded"


JUNK = [None, True, -1, 0, 42, 1.5, 10**40, "", "x", "42", "..", [], {}, [[]], {"a": []}]


def places(value, path=()):
    """Every place in a JSON value, by the keys that lead to it."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield (*path, key)
            yield from places(part, (*path, key))


@pytest.mark.parametrize(("kind", "name"), [("coco", COCO), ("vqa", ANSWERS), ("vqa", ASKED)])
def test_any_value_in_any_place_is_taken_or_refused(tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr(importers, "load_image", lambda *_: np.zeros((16, 16, 3), np.uint8))
    source = source_of(MAKERS[kind](tmp_path))
    text, taken = (tmp_path / name).read_text(), 0
    rng = random.Random(name)
    for place in places(json.loads(text)):
        for junk in rng.sample(JUNK, 4):
            table = node = json.loads(text)
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = junk
            write(tmp_path / name, table)
            try:
                taken += len(all_of(read(source))) > 0
            except DataError as error:
                assert str(error).startswith("mine: ") and ".json" in str(error)
                assert not re.search(r"[a-z]Error\b", str(error)), "by a rule, not by accident"
    assert taken, "some keys do not matter"


def test_without_datasets_there_is_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(importers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install datasets"):
        read(source_of(make_parquet(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coco": "captions.json", "images": "gone"}, "gone: expected a folder there, got nothing"),
        ({"coco": "captions.json", "images": "captions.json"}, "a folder there, got a file"),
        ({"captions": "gone"}, "gone: expected a folder there, got nothing"),
        ({"captions": "images"}, "images: expected one of metadata.jsonl and metadata.csv"),
        ({"text": "gone"}, "gone: expected a file there, got nothing"),
        ({"text": "images"}, "images: expected .txt files in the folder, got none"),
        ({"parquet": "gone"}, "gone: expected a parquet file there, got nothing"),
        ({"parquet": "images"}, "images: expected .parquet files in the folder, got none"),
        ({"parquet": "empty.parquet"}, "empty.parquet: expected rows, got none"),
    ],
)
def test_wrong_places_are_refused(tmp_path, fields, message):
    make_coco(tmp_path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError) as error:
        read(source_of({k: tmp_path / v for k, v in fields.items()}))
    assert message in str(error.value)


def test_there_are_sixty_and_more():
    assert len(BAD_IMAGES) + len(DAMAGED) > 150
