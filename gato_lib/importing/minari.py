"""Minari data sets, by id or folder."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.episodes import DataError, flatten, is_text
from gato_lib.importing.base import Source, as_leaf, checked, map_leaves
from gato_lib.sequence import image_layout


def locate(source: Source) -> pathlib.Path:
    """The folder, downloaded if the source is an id that is not there yet. Raises DataError."""
    folder = pathlib.Path(source.where)
    if folder.is_dir():
        return folder
    import minari
    from minari.dataset.minari_dataset import DATASET_ID_RE
    from minari.storage.datasets_root_dir import get_dataset_path

    if not DATASET_ID_RE.fullmatch(source.where):
        raise DataError(f"{source}: neither a folder nor a Minari id")
    folder = pathlib.Path(get_dataset_path(source.where))
    if not folder.is_dir():
        try:
            minari.download_dataset(source.where)
        except Exception as error:  # no network, no such set, no room
            raise DataError(f"{source}: cannot be downloaded ({error})") from error
    return folder


def read(source: Source) -> Iterator[Any]:
    """Observation and action space, then the episodes. Raises DataError."""
    from minari import MinariDataset

    folder = locate(source)
    if (folder / "data").is_dir():
        folder = folder / "data"
    try:
        dataset = MinariDataset(folder)
        total = int(dataset.total_episodes)
        full, action_space = dataset.observation_space, dataset.action_space
        flatten(full), flatten(action_space)  # no keys that a path cannot hold
    except Exception as error:  # whatever a damaged set makes Minari raise
        raise DataError(f"{source}: not a readable Minari data set ({error!r})") from error
    wanted = full
    if isinstance(full, gym.spaces.Dict):
        chosen = source.choose(list(full))
        wanted = gym.spaces.Dict({k: v for k, v in full.items() if k in chosen or is_text(v)})
    elif source.keys:
        raise DataError(f"{source}: observations have no keys to choose from")
    spaces = flatten(wanted)

    def resized(key: str, values: Any) -> Any:
        return as_leaf(source, key, values) if image_layout(spaces[key]) else values

    def resized_space(key: str, space: gym.Space) -> gym.Space:
        if not image_layout(space):
            return space
        blank = resized(key, np.zeros((1, *space.shape), np.uint8))
        return gym.spaces.Box(0, 255, blank.shape[1:], np.uint8)

    yield map_leaves(resized_space, wanted), action_space
    for i in range(total):
        where = source.at(i)
        try:
            (raw,) = dataset.iterate_episodes([i])
            (metadata,) = dataset.storage.get_episode_metadata([i])
        except Exception as error:
            raise DataError(f"{where}: cannot be read ({error!r})") from error
        # Checked as recorded: what is wrong there must be named before anything is changed.
        episode = checked(
            source,
            i,
            full,
            action_space,
            observations=raw.observations,
            actions=raw.actions,
            rewards=np.asarray(raw.rewards, np.float64),
            success=bool(np.any((raw.infos or {}).get("success", False))),
        )
        for key in ("terminations", "truncations"):
            shape = np.shape(getattr(raw, key))
            if shape != (episode.steps,):
                raise DataError(f"{where}: {key} has shape {shape}, expected {(episode.steps,)}")
        listed = metadata.get("total_steps", episode.steps)
        if listed != episode.steps:
            raise DataError(f"{where}: {episode.steps} steps, its metadata say {listed}")
        kept = raw.observations
        if isinstance(kept, dict):
            kept = {k: kept[k] for k in wanted.spaces}
        yield dataclasses.replace(episode, observations=map_leaves(resized, kept))
