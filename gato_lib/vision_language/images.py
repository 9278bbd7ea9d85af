"""Pictures from anywhere to pixels: the one way an image file enters (paper 2.1, 3.2).

Whatever is not a whole picture of a common raster format and of sensible size is refused before its
pixels are decoded. All others become uint8 (H, W, 3):

    palette, 1 bit, grey         the colours they stand for
    transparent                  laid over white: that is how pages show drawings, whose outlines
                                 are dark and whose hidden colours are anything, often black
    16-bit and 12-bit grey       scaled to 8 bits
    CMYK, YCbCr                  RGB by the plain formula; colour profiles are not applied
    turned by EXIF               upright; where EXIF cannot be read, as stored
    animated                     the first picture, as of several pages
    floating point               refused: the file does not say what number is white
"""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
import PIL.Image

from gato_lib.episodes import DataError

# No format of Pillow's that starts another program (EPS) or that is not one picture (PSD, ICO).
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MOST_PIXELS = 40_000_000
MOST_SIDE = 65_535  # JPEG's; and a line of 1 x 40,000,000 would be widened before it is shortened
MOST_BYTES = 2 * 8 * MOST_PIXELS  # twice what so many pixels need in 16-bit RGBA
_LIMIT = f"{MOST_PIXELS // 1_000_000} megapixels and sides of {MOST_SIDE}"

_TURN = PIL.Image.Transpose
_UPRIGHT = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}
_ORIENTATION = 274  # EXIF and TIFF tags
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 322, 323


def load_image(file: str | os.PathLike | bytes, where: str, size: int | None) -> np.ndarray:
    """A picture as uint8 (H, W, 3), or (size, size, 3).

    `size` resizes all of the picture to a square, averaging over what falls into a pixel. The
    proportions are lost, as nothing of the picture should be: a caption speaks of all of it.

    Raises DataError, naming `where`, for whatever is no picture or not a whole one, and for more
    than `MOST_PIXELS`. No other error and no warning comes out.
    """
    data = file if isinstance(file, bytes) else _read(file, where)
    if not data:
        raise DataError(f"{where}: expected an image, got an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what is refused or harmless
            return _decode(data, where, size)
    except DataError:
        raise
    except PIL.UnidentifiedImageError as error:
        got = f"a file that begins with {data[:8]!r}"
        raise DataError(f"{where}: expected an image ({', '.join(FORMATS)}), got {got}") from error
    except PIL.Image.DecompressionBombError as error:
        raise DataError(f"{where}: expected at most {_LIMIT}, got more ({error})") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        why = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{where}: expected a whole image, got one that is damaged ({why})"
        ) from error


def _read(file: str | os.PathLike, where: str) -> bytes:
    if not os.path.isfile(file):  # nor a pipe or a device, which may never end
        got = "a folder" if os.path.isdir(file) else "nothing"
        raise DataError(f"{where}: expected an image file there, got {got}")
    try:
        with open(file, "rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{where}: the image cannot be read ({error})") from error
    if len(data) > MOST_BYTES:
        raise DataError(f"{where}: expected an image of at most {MOST_BYTES} bytes, got more")
    return data


def _decode(data: bytes, where: str, size: int | None) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.size, where)
        tags = getattr(image, "tag_v2", {})
        # A TIFF of few pixels may still be of tiles that are huge.
        _check_size((tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1)), where)
        image.verify()  # PNG's checksums, which decoding alone does not look at
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if "transparency" in image.info and image.tile:
            _scale_key(image)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        image = _sixteen_bits(image, where) if image.mode[:1] in "IF" else _rgb(image)
        if turn is not None:
            image = image.transpose(turn)
        if size is not None:
            image = image.resize((size, size), PIL.Image.Resampling.BICUBIC)
        return np.array(image)


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MOST_PIXELS or max(size) > MOST_SIDE:
        raise DataError(f"{where}: expected at most {_LIMIT}, got {width} x {height} pixels")


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the picture is good without it
        return 1


def _scale_key(image: PIL.Image.Image) -> None:
    """Bring a PNG's transparent colour from the file's depth to the 8 bits Pillow decodes to."""
    rawmode, key = image.tile[0].args, image.info["transparency"]
    if rawmode in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if rawmode == "L;2" else 17) & 255
    elif rawmode == "RGB;16B":
        image.info["transparency"] = tuple(v >> 8 for v in key)


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


def _sixteen_bits(image: PIL.Image.Image, where: str) -> PIL.Image.Image:
    """Grey of modes "I;16" and "I", which `convert` would clip at 255, to RGB."""
    tags = getattr(image, "tag_v2", {})
    top = 4_095 if tags.get(_BITS) == (12,) else 65_535
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > top:
        got = f"{image.mode} from {values.min()} to {values.max()}"
        raise DataError(f"{where}: expected 8 bits a channel or grey up to {top}, got {got}")
    grey = (values.astype(np.int32) * 255 + top // 2) // top
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for 8 bits alone
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return PIL.Image.fromarray(grey.astype(np.uint8)).convert("RGB")
