"""The embedded pictures and their names, and scenes made of them with exact captions (paper 3.2).

1,852 pictures of 1,681 subjects, drawn by Microsoft (Fluent, MIT) and named by Unicode; 525 of them
also by Google (Noto, Apache-2.0), a style that is never trained on. A scene puts one to four
pictures on a coloured ground and says what it shows:

    a cat on a red background                      three keys on a white background
    a fox to the left of a drum on a blue ...      a bell above a rose on a green ...

Splits, of pictures: by subject, where skin tones and genders of one subject are one. Of scenes:
"test" has new drawings of what was trained on; "combinations" has, in each scene, two subjects,
several of a subject, or a subject and its ground that training never shows together; "style" has
Google's pictures in place of Microsoft's.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import pyarrow.parquet as pq

from gato_lib.vision_language.base import Caption, TextSet, hashed, limited

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
SIDE = 64
GROUNDS = {
    "white": (246, 246, 246),
    "black": (24, 24, 24),
    "red": (206, 52, 48),
    "green": (52, 158, 78),
    "blue": (52, 104, 214),
    "yellow": (246, 208, 60),
}
NUMBERS = ("one", "two", "three", "four")
HELD_OUT_SHARE = 0.1  # of combinations
EVALUATED = 500  # scenes of each split that is not trained on

# Subjects of the small sets: nouns that are short and look different at 30 pixels.
SMALL = (
    "dog", "fox", "zebra", "panda", "frog", "penguin", "butterfly", "turtle", "rose", "sunflower",
    "banana", "strawberry", "watermelon", "pizza", "hamburger", "doughnut", "airplane",
    "sailboat", "umbrella", "guitar", "key", "bell", "trophy", "bicycle",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A picture and its names; `singular` and `plural` ("a cat", "cats") only of plain nouns."""

    label: str
    split: str
    singular: str | None
    plural: str | None
    picture: PIL.Image.Image = dataclasses.field(repr=False, compare=False)


@functools.cache
def subjects(style: str = "fluent-3d") -> tuple[Subject, ...]:
    """All subjects drawn in a style, "fluent-3d" or "noto", in Unicode's order."""
    columns = ["label", "split", "singular", "plural", "picture"]
    table = pq.read_table(
        ASSETS / "emoji.parquet", columns=columns, filters=[("style", "=", style)]
    )
    if not table.num_rows:
        raise ValueError(f"style is {style!r}, expected 'fluent-3d' or 'noto'")
    rows = table.to_pylist()
    pictures = [PIL.Image.open(io.BytesIO(row.pop("picture"))).convert("RGBA") for row in rows]
    return tuple(Subject(**row, picture=p) for row, p in zip(rows, pictures, strict=True))


def on_ground(picture: PIL.Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """A picture with transparency over one colour, uint8 (64, 64, 3)."""
    ground = PIL.Image.new("RGBA", picture.size, (*colour, 255))
    return np.asarray(PIL.Image.alpha_composite(ground, picture).convert("RGB"))


def emoji(count: int | None, seed: int = 0) -> TextSet:
    """Single pictures on white with their names; `count` limits those trained on."""
    splits: dict[str, list[Caption]] = {"train": [], "validation": [], "test": []}
    for subject in subjects():
        image = on_ground(subject.picture, (255, 255, 255))
        splits[subject.split].append(Caption(image, (subject.label,)))
    splits["train"] = limited(splits["train"], count, seed)
    return TextSet("captions/emoji", {k: tuple(v) for k, v in splits.items()}, "MIT")


# --- scenes ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a scene shows: one subject `number` times, or two of which the first is left or above.

    Attributes:
      labels: one or two subjects. ground: a key of `GROUNDS`.
      number: how many of a single subject. vertical: whether the first of two is above.
    """

    labels: tuple[str, ...]
    ground: str
    number: int = 1
    vertical: bool = False

    @property
    def relation(self) -> str:
        return "above" if self.vertical else "to the left of"

    def caption(self) -> str:
        nouns = known()
        first = nouns[self.labels[0]]
        if len(self.labels) == 2:
            what = f"{first.singular} {self.relation} {nouns[self.labels[1]].singular}"
        elif self.number == 1:
            what = first.singular
        else:
            what = f"{NUMBERS[self.number - 1]} {first.plural}"
        return f"{what} on a {self.ground} background"

    def combinations(self) -> list[str]:
        """What splits keep apart: two subjects; several of one; a subject and its ground.

        Not one alone, and not white: the single pictures (`emoji`) show that of every subject.
        """
        found = [f"{label} + {self.ground}" for label in self.labels if self.ground != "white"]
        if len(self.labels) == 2:
            found.append(" + ".join(sorted(self.labels)))
        elif self.number > 1:
            found.append(f"{self.labels[0]} + {self.number}")
        return found

    @property
    def held_out(self) -> bool:
        """Whether training never shows one of its combinations."""
        return any(hashed(c) < HELD_OUT_SHARE for c in self.combinations())

    def draw(self, rng: np.random.Generator, style: str = "fluent-3d") -> np.ndarray:
        """The scene in pixels, uint8 (64, 64, 3): places, sizes and the ground's tint vary."""
        tint = np.clip(np.array(GROUNDS[self.ground]) + rng.integers(-10, 11, 3), 0, 255)
        canvas = PIL.Image.new("RGB", (SIDE, SIDE), tuple(int(x) for x in tint))
        for label, (size, x, y) in zip(*self._places(rng), strict=True):
            picture = known(style)[label].picture.resize((size, size), PIL.Image.Resampling.BOX)
            canvas.paste(picture, (x, y), picture)
        return np.asarray(canvas)

    def _places(self, rng: np.random.Generator) -> tuple[list[str], list[tuple[int, int, int]]]:
        """The label, and (size, left, top) in pixels, of each picture; none covers another."""
        half = SIDE // 2
        if len(self.labels) == 2:
            labels, places = list(self.labels), []
            for i in range(2):
                size = int(rng.integers(26, 32))
                along = i * half + int(rng.integers(0, half - size + 1))
                across = int(rng.integers(0, SIDE - size + 1))
                x, y = (across, along) if self.vertical else (along, across)
                places.append((size, x, y))
            return labels, places
        labels = [self.labels[0]] * self.number
        if self.number == 1:
            size = int(rng.integers(40, 57))
            x, y = rng.integers(0, SIDE - size + 1, 2)
            return labels, [(size, int(x), int(y))]
        cells = rng.permutation(4)[: self.number]
        places = []
        for cell in cells:
            size = int(rng.integers(24, 31))
            x, y = rng.integers(0, half - size + 1, 2) + np.array([cell % 2, cell // 2]) * half
            places.append((size, int(x), int(y)))
        return labels, places


@functools.cache
def known(style: str = "fluent-3d") -> dict[str, Subject]:
    """Subjects of a style by label."""
    return {s.label: s for s in subjects(style)}


def nouns(small: bool) -> tuple[str, ...]:
    """Labels that scenes are made of: trained on, a plain noun, and drawn in both styles."""
    if small:
        return SMALL
    both = known("noto")
    return tuple(s.label for s in subjects() if s.plural and s.split == "train" and s.label in both)


def random_scene(
    rng: np.random.Generator, labels: tuple[str, ...], held_out: bool = False
) -> Scene:
    """A scene of `labels` that is of the held-out combinations, or is not."""
    while True:
        kind = rng.integers(4)
        ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
        chosen = rng.choice(len(labels), 2, replace=False)
        pair = tuple(labels[i] for i in chosen)
        if kind == 0:
            scene = Scene(pair[:1], ground)
        elif kind == 1:
            scene = Scene(pair[:1], ground, number=int(rng.integers(2, 5)))
        else:
            scene = Scene(pair, ground, vertical=kind == 3)
        if scene.held_out == held_out:
            return scene


def scene_splits(
    count: int,
    seed: int,
    small: bool,
    example: Callable[[Scene, np.ndarray, np.random.Generator], object],
) -> dict[str, tuple]:
    """`count` scenes to train on, made into examples, and `EVALUATED` of each other split.

    Only what is trained on depends on `seed`: everybody is evaluated on the same scenes.
    """
    labels = nouns(small)
    splits = {}
    for number, (split, size) in enumerate(
        {
            "train": count,
            "validation": min(EVALUATED, max(2, count // 20)),
            "test": EVALUATED,
            "combinations": EVALUATED,
            "style": EVALUATED,
        }.items()
    ):
        rng = np.random.default_rng([seed if split == "train" else 0, 2 + number])
        examples = []
        for _ in range(size):
            scene = random_scene(rng, labels, split == "combinations")
            image = scene.draw(rng, "noto" if split == "style" else "fluent-3d")
            examples.append(example(scene, image, rng))
        splits[split] = tuple(examples)
    return splits


def scenes(count: int | None, seed: int = 0, small: bool = False) -> TextSet:
    """Scenes and their captions; `count` of them to train on (2,000 unless said)."""
    make = lambda scene, image, rng: Caption(image, (scene.caption(),))  # noqa: E731
    name = "captions/scenes_small" if small else "captions/scenes"
    return TextSet(name, scene_splits(count or 2_000, seed, small, make), "MIT, Apache-2.0")
