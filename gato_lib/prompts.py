"""The ends of demonstrations that a released agent is prompted with, so that it needs no others.

One zip file of episode shards, domain/name/number.npz, without pickle.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable

from gato_lib.episodes import DataError, Episode, from_bytes, select, to_bytes
from gato_lib.files import atomic_path

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
STAMP = (1980, 1, 1, 0, 0, 0)  # of every entry: the same demonstrations, the same file


def tail(episode: Episode, steps: int) -> Episode:
    """The last so many steps of an episode, or all of them. Raises ValueError for none."""
    if steps < 1:
        raise ValueError(f"{episode.task}: the last {steps} steps, expected one or more")
    first = max(episode.steps - steps, 0)
    return dataclasses.replace(
        episode,
        observations=select(episode.observations, slice(first, None)),
        actions=select(episode.actions, slice(first, None)),
        executed=select(episode.executed, slice(first, None)),
        rewards=episode.rewards[first:],
    )


def write(path: str | os.PathLike, episodes: Iterable[Episode]) -> None:
    """Write episodes of any tasks, in their order, whole or not at all."""
    numbers: dict[str, int] = {}
    with atomic_path(path) as partial, zipfile.ZipFile(partial, "w") as file:
        for episode in episodes:
            number = numbers[episode.task] = numbers.get(episode.task, -1) + 1
            entry = zipfile.ZipInfo(f"{episode.task}/{number}.npz", STAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, to_bytes(episode))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Returns a task's episodes in the file; raises DataError where it has none or is damaged."""

    path: str

    def __call__(self, task: str) -> list[Episode]:
        try:
            with zipfile.ZipFile(self.path) as file:
                names = [n for n in file.namelist() if n.rpartition("/")[0] == task]
                found = [from_bytes(file.read(n), f"{self.path}: {n}") for n in names]
        except (OSError, *DAMAGED) as error:
            raise DataError(f"{self.path}: not a file of prompts ({error})") from error
        if not found:
            raise DataError(f"{self.path}: no demonstration of {task}")
        return found


def ends(
    demonstrations: Callable[[str], list[Episode]],
    tasks: Iterable[str],
    steps: Callable[[Episode], int],
    count: int,
) -> Iterable[Episode]:
    """The last `steps(episode)` steps of each task's first `count` demonstrations."""
    for task in tasks:
        for episode in demonstrations(task)[:count]:
            yield tail(episode, max(steps(episode), 1))
