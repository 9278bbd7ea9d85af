"""Demonstrations recorded elsewhere: Minari, LeRobot and RLDS data sets (paper 3.1, App. F).

A set is checked episode by episode as it is read, then kept as one of this workbook's own Minari
sets in the run's data folder. From there on it is a domain like the collected ones: it has a weight
in the mixture and is trained on. It has no simulator here, so no agent is scored on it.

    minari   a data set's id, or a folder: arrow, parquet or HDF5
    lerobot  a folder of LeRobot's format 2 or 3: parquet, images within or as video
    rlds     a version's folder of a TensorFlow data set of episodes with "steps" (RLDS)

Every episode is kept: the return filter needs a scale that a foreign reward may not have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.config import source_digest
from gato_lib.episodes import DataError, Episode, flatten, read_minari, write_minari
from gato_lib.files import write_text
from gato_lib.importing import lerobot, minari, rlds
from gato_lib.importing.base import KINDS, Source, map_leaves

__all__ = ["KINDS", "Recording", "Source", "convert", "load"]

_READERS = {"minari": minari.read, "lerobot": lerobot.read, "rlds": rlds.read}
_CODE = ("episodes.py", *(f"importing/{m}.py" for m in ("__init__", "base", *_READERS)))


@dataclasses.dataclass(frozen=True)
class Recording:
    """Episodes of one source, and the spaces of what they hold."""

    observation_space: gym.Space
    action_space: gym.Space
    episodes: tuple[Episode, ...]


def convert(source: Source, root: str, report: Callable[[str], None] = lambda line: None) -> None:
    """Read and check a source and keep a copy of it in the folder `root`, unless there is one.

    Files that have changed since are read anew. `root`/import-NAME.json names the copy. Raises
    DataError naming the source, the episode and the key; then nothing is kept.
    """
    pointer = _pointer(source, root)
    folder = pathlib.Path(root) / f"import-{source.name}-{_digest(source)}"
    if not (folder / "data" / "metadata.json").is_file():
        episodes: list[Episode] = []
        try:
            items = _READERS[source.kind](source)
            observation_space, action_space = next(items)
            for episode in items:
                episodes.append(episode)
                report(f"{source.name}: {len(episodes)} episodes read")
        except DataError:
            raise
        except Exception as error:  # foreign files fail in many ways
            why = f"{type(error).__name__}: {error}"
            raise DataError(f"{source.at(len(episodes))}: {why}") from error
        action_space, clipped = bounded(action_space, episodes)
        if clipped:
            report(f"{source.name}: {clipped} action values lie outside their bounds: clipped")
        card = {
            "task": f"{source.name}/all",
            "source": source.text,
            "collected": len(episodes),
            "kept": len(episodes),
            "clipped_actions": clipped,
            "scores": [e.episode_return for e in episodes],
        }
        write_minari(folder, episodes, observation_space, action_space, card)
        report(f"{source.name}: {len(episodes)} episodes imported")
    write_text(pointer, json.dumps({"folder": folder.name, "source": source.text}))


def load(source: Source, root: str) -> tuple[Recording, dict[str, Any]]:
    """What `convert` has kept, and its data card; the original is not needed for it.

    Raises DataError where there is nothing, or a copy of something else.
    """
    from minari import MinariDataset

    pointer = _pointer(source, root)
    try:
        known = json.loads(pointer.read_text())
        folder = pathlib.Path(root) / known["folder"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source}: not imported yet ({error!r})") from error
    if known["source"] != source.text:
        raise DataError(f"{source}: {pointer.name} is of {known['source']}")
    episodes, card = read_minari(folder)
    spaces = MinariDataset(folder / "data")
    return Recording(spaces.observation_space, spaces.action_space, tuple(episodes)), card


def bounded(space: gym.Space, episodes: list[Episode]) -> tuple[gym.Space, int]:
    """The action space with the data's own range where it has no finite one: tokens need bounds.

    And how many action values lie outside known bounds.
    """
    clipped = 0

    def bound(key: str, leaf: gym.Space) -> gym.Space:
        nonlocal clipped
        if not isinstance(leaf, gym.spaces.Box):
            return leaf
        values = np.concatenate([flatten(e.actions)[key] for e in episodes])
        low, high = (f(values, axis=0).astype(leaf.dtype) for f in (np.min, np.max))
        if leaf.dtype.kind == "f":
            least, most = -1e30, 1e30
        elif leaf.dtype.itemsize > 1:
            least, most = np.iinfo(leaf.dtype).min, np.iinfo(leaf.dtype).max
        else:  # all of a byte's values are bounds
            least, most = -np.inf, np.inf
        low = np.where(leaf.low > least, leaf.low, low)
        high = np.where(leaf.high < most, leaf.high, high)
        clipped += int(((values < low) | (values > high)).sum())
        return gym.spaces.Box(low, high, dtype=leaf.dtype)

    return map_leaves(bound, space), clipped


def _pointer(source: Source, root: str) -> pathlib.Path:
    return pathlib.Path(root) / f"import-{source.name}.json"


def _digest(source: Source) -> str:
    """Eight hex digits that change with the source's files, and with the code that reads them."""
    folder = minari.locate(source) if source.kind == "minari" else pathlib.Path(source.where)
    if not folder.is_dir():
        raise DataError(f"{source}: there is no such folder")
    parts = [source.text, source_digest(*_CODE)]
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        parts.append(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
