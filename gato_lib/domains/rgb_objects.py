"""The objects of RGB Stacking: a family of shapes to train on and five triplets that are held out.

The paper takes both from Lee et al. 2021 (its 3.3), whose shapes are not published as a package.
Ours are tapered and slanted prisms. Every object of a test triplet has at least one dimension that
lies outside all of `TRAINING`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

COLOURS = ("red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A prism with a horizontal top, in mm, about the middle of its height.

    Attributes:
      length, width, height: of the box around its foot, and up.
      sides: of its foot; 4 is a box, 16 nearly round.
      taper: by how much of its size at the foot it is smaller at the top, along length and width.
      slant: how far the top is shifted along the length, as a share of the height.
    """

    length: float
    width: float
    height: float
    sides: int = 4
    taper: tuple[float, float] = (0.0, 0.0)
    slant: float = 0.0

    @property
    def is_box(self) -> bool:
        return self.sides == 4 and not any(self.taper) and not self.slant

    @functools.cached_property
    def corners(self) -> np.ndarray:
        """(2 * sides, 3) in m."""
        # A side, not a corner, faces along the length; the foot just fits into its box.
        angles = (np.arange(self.sides) + 0.5) * 2 * math.pi / self.sides
        foot = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        foot *= np.array([self.length, self.width]) / np.ptp(foot, axis=0)
        top = foot * (1 - np.array(self.taper)) + [self.slant * self.height, 0]
        half = np.full((self.sides, 1), self.height / 2)
        corners = np.concatenate([np.hstack([foot, -half]), np.hstack([top, half])])
        corners[:, 0] -= self.slant * self.height / 2
        return corners / 1000


# What each dimension of a training object is drawn from.
TRAINING: dict[str, tuple[float, ...]] = {
    "length": (34.0, 52.0),
    "width": (34.0, 52.0),
    "height": (34.0, 52.0),
    "sides": (4, 6, 8),
    "taper": (0.0, 0.2),
    "slant": (0.0, 0.15),
}


def training_shape(rng: np.random.Generator) -> Shape:
    """Half of them are boxes, the others tapered, slanted and of more sides."""
    size = [float(rng.uniform(*TRAINING[k])) for k in ("length", "width", "height")]
    if rng.random() < 0.5:
        return Shape(*size)
    taper = tuple(float(t) for t in rng.uniform(*TRAINING["taper"], 2))
    slant = float(rng.uniform(*TRAINING["slant"]))
    return Shape(*size, int(rng.choice(TRAINING["sides"])), taper, slant)


def held_out(shape: Shape) -> list[str]:
    """The dimensions in which a shape lies outside of `TRAINING`."""
    outside = []
    for name, known in TRAINING.items():
        values = np.atleast_1d(getattr(shape, name))
        if name == "sides":
            inside = shape.sides in known
        else:
            inside = bool(((known[0] <= values) & (values <= known[1])).all())
        if not inside:
            outside.append(name)
    return outside


# The paper numbers its triplets; the first is the hardest, as here: a top object that leans and a
# bottom object that narrows leave little to rest on.
TRIPLETS: dict[int, dict[str, Shape]] = {
    1: {
        "red": Shape(44, 40, 44, slant=0.4),
        "green": Shape(38, 38, 30, taper=(0.3, 0.0)),
        "blue": Shape(46, 46, 40, taper=(0.4, 0.4)),
    },
    2: {
        "red": Shape(66, 40, 38),
        "green": Shape(44, 44, 44, slant=0.3),
        "blue": Shape(46, 46, 20),
    },
    3: {
        "red": Shape(42, 42, 42, sides=16),
        "green": Shape(64, 44, 36),
        "blue": Shape(32, 32, 32),
    },
    4: {
        "red": Shape(44, 44, 30),
        "green": Shape(30, 30, 44),
        "blue": Shape(62, 62, 40),
    },
    5: {
        "red": Shape(48, 44, 20),
        "green": Shape(50, 50, 40, taper=(0.4, 0.0)),
        "blue": Shape(48, 48, 40, sides=16),
    },
}
