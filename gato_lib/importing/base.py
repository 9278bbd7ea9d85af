"""What the importers of all kinds share: what to import, and checks on the way."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import PIL.Image

from gato_lib.config import ConfigError
from gato_lib.episodes import DataError, Episode, children, flatten, validate
from gato_lib.sequence import PATCH, image_layout

KINDS = ("minari", "lerobot", "rlds")
MOST_PATCHES = 64  # of an image that is kept as it is
UNKNOWN_SEED = -1
INSTRUCTION = "instruction"  # the observation that holds what a recording's task was said to be


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set to import.

    Attributes:
      name: what it is called here: a domain of the mixture.
      kind: one of `KINDS`.
      where: folder or id.
      keys: observation keys to keep; empty keeps all. Text always stays.
      image: side in pixels that images are resized to; 0 leaves them.
    """

    name: str
    kind: str
    where: str
    keys: tuple[str, ...] = ()
    image: int = 0

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Source:
        """From a notebook's parameter, such as {"name": "pen", "minari": "D4RL/pen/human-v2"}.

        "keys" and "image" may be given too. Raises ConfigError.
        """
        text = f"import {fields!r}"
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{text}: expected name and one of {', '.join(KINDS)}")
        kinds = [k for k in KINDS if k in fields]
        unknown = sorted(set(fields) - {"name", "keys", "image", *KINDS})
        if len(kinds) != 1 or unknown or "name" not in fields:
            raise ConfigError(
                f"{text}: expected name, one of {', '.join(KINDS)}, and perhaps keys and image"
            )
        name, where = fields["name"], fields[kinds[0]]
        keys, image = fields.get("keys", []), fields.get("image", 0)
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigError(f"{text}: a name is of lower-case letters, digits and '_'")
        if not isinstance(keys, list | tuple) or not all(isinstance(k, str) for k in keys):
            raise ConfigError(f"{text}: keys is a list of observation keys")
        if type(image) is not int or image < 0 or image % PATCH:
            raise ConfigError(f"{text}: image is a multiple of {PATCH}")
        if not where or not isinstance(where, str):
            raise ConfigError(f"{text}: {kinds[0]} is no folder and no id")
        return cls(name, kinds[0], where, tuple(keys), image)

    @classmethod
    def load(cls, text: str) -> Source:
        """The inverse of `text`."""
        fields = json.loads(text)
        return cls(**fields | {"keys": tuple(fields["keys"])})

    @property
    def text(self) -> str:
        """One line that says it all."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return f"{self.name} ({self.kind} {self.where})"

    def at(self, episode: int) -> str:
        """How errors call an episode."""
        return f"{self}, episode {episode}"

    def needs(self, *modules: str) -> None:
        """Raise DataError with the remedy where a module is missing."""
        for module in modules:
            if importlib.util.find_spec(module) is None:
                remedy = f"pip install -e '.[{self.kind}]'"
                raise DataError(f"{self}: {module} is not installed: {remedy}")

    def choose(self, names: Sequence[str]) -> list[str]:
        """Those observation keys that are to be kept; raises DataError where one is not there."""
        missing = sorted(set(self.keys) - set(names))
        if missing:
            raise DataError(f"{self}: no observation {missing[0]!r}; there are {sorted(names)}")
        return [n for n in names if n in self.keys or not self.keys]


def checked(
    source: Source,
    index: int,
    observation_space: gym.Space,
    action_space: gym.Space,
    **fields: Any,
) -> Episode:
    """An episode of these fields; raises DataError where it does not fit the spaces."""
    known = {"seed": UNKNOWN_SEED, "success": False, "executed": fields["actions"]}
    episode, where = Episode(task=f"{source.name}/all", **known | fields), source.at(index)
    try:
        steps = episode.steps
    except (TypeError, StopIteration) as error:
        raise DataError(f"{where}: actions cannot be counted ({error!r})") from error
    if steps == 0:
        raise DataError(f"{where}: the episode has no steps")
    validate(episode, observation_space, action_space, where)
    for key, values in flatten(episode.actions).items():
        if isinstance(values, np.ndarray) and not np.isfinite(values).all():
            raise DataError(f"{where}: actions{'/' * bool(key)}{key} are not finite")
    return episode


def space_of(source: Source, key: str, values: Any) -> gym.Space:
    """A space for values with a leading time axis, by their dtype and shape alone."""
    if isinstance(values, list):
        return gym.spaces.Text(10_000)
    shape, dtype = values.shape[1:], values.dtype
    if dtype.kind == "f":
        return gym.spaces.Box(-np.inf, np.inf, shape, dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return gym.spaces.Box(limits.min, limits.max, shape, dtype)
    raise DataError(f"{source}: {key} has dtype {dtype}, expected numbers, images or text")


def map_leaves(function: Callable[[str, Any], Any], tree: Any, key: str = "") -> Any:
    """`function(key, leaf)` of every leaf; Dict and Tuple spaces where it makes spaces."""
    parts = children(tree)
    if parts is None:
        return function(key, tree)
    out = {k: map_leaves(function, v, f"{key}/{k}" if key else k) for k, v in parts}
    spaces = any(isinstance(v, gym.Space) for v in out.values())
    if isinstance(tree, tuple | gym.spaces.Tuple):
        return gym.spaces.Tuple(out.values()) if spaces else tuple(out.values())
    return gym.spaces.Dict(out) if spaces else out


def as_image(source: Source, key: str, image: PIL.Image.Image | np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) or (H, W, 1), resized where the source says so.

    Raises DataError for an image of other than 8 bits a channel, and for one of too many tokens.
    """
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise DataError(f"{source}: {key} is an image of mode {image.mode}, expected 8-bit RGB")
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if source.image:
        image = image.resize((source.image, source.image), PIL.Image.Resampling.BOX)
    width, height = image.size
    patches = -(-width // PATCH) * -(-height // PATCH)
    if patches > MOST_PATCHES:
        raise DataError(
            f"{source}: {key} is {width} x {height} pixels, {patches} tokens a step; "
            "image: 64 resizes it to 64 x 64"
        )
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def as_leaf(source: Source, key: str, values: Any) -> Any:
    """An observation leaf, its images as the source wants them, scalars as vectors of one."""
    if isinstance(values, list):
        return values
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.ndim == 1:
        values = values[:, None]
    layout = image_layout(gym.spaces.Box(0, 255, values.shape[1:], values.dtype))
    if layout == "CHW":
        values = np.moveaxis(values, 1, -1)
    elif layout == "HW":
        values = values[..., None]
    if layout:
        values = np.stack([as_image(source, key, v) for v in values])
    return values
