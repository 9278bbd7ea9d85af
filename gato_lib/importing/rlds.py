"""RLDS: TensorFlow data sets whose episodes are data sets of "steps".

By RLDS, an episode's last step has an observation, and an action and reward that mean nothing:
these two are left out. (Some sets put their only reward there. It is lost; nothing is trained on
it.) All splits are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gato_lib.episodes import DataError, Nested, stack_observations
from gato_lib.importing.base import INSTRUCTION, Source, as_leaf, checked, map_leaves, space_of


def read(source: Source) -> Iterator[Any]:
    """Observation and action space, then the episodes. Raises DataError."""
    spaces = None
    for i, steps in enumerate(_episodes(source)):
        where = source.at(i)
        if len(steps) < 2:
            raise DataError(f"{where}: {len(steps)} steps, expected 2 or more")
        for key in ("observation", "action"):
            if key not in steps[0]:
                raise DataError(f"{where}: steps have no {key!r}, there are {sorted(steps[0])}")
        ends = [t for t, step in enumerate(steps[:-1]) if step.get("is_last")]
        if ends:
            raise DataError(f"{where}: is_last at step {ends[0]} of {len(steps)}")
        observations = _observations(source, where, steps)
        actions = _stack(source, where, "action", [s["action"] for s in steps[:-1]])
        if spaces is None:
            spaces = (
                map_leaves(lambda k, v: space_of(source, k, v), observations),
                map_leaves(lambda k, v: space_of(source, f"action/{k}", v), actions),
            )
            yield spaces
        rewards = np.array([s.get("reward", 0.0) for s in steps[:-1]], np.float64)
        yield checked(
            source, i, *spaces, observations=observations, actions=actions, rewards=rewards
        )


def _episodes(source: Source) -> Iterator[list[dict[str, Any]]]:
    source.needs("tensorflow", "tensorflow_datasets")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # JAX wants its memory
    try:
        builder = tfds.builder_from_directory(source.where)
        splits = [
            builder.as_dataset(split=s, shuffle_files=False) for s in sorted(builder.info.splits)
        ]
    except Exception as error:
        raise DataError(f"{source}: not a readable TFDS folder ({error})") from error
    for split in splits:
        for episode in tfds.as_numpy(split):
            if "steps" not in episode:
                raise DataError(f"{source}: no 'steps', it is not RLDS")
            yield list(episode["steps"])


def _observations(source: Source, where: str, steps: Sequence[Mapping[str, Any]]) -> Nested:
    seen = [s["observation"] for s in steps]
    seen = seen if isinstance(seen[0], dict) else [{"observation": o} for o in seen]
    chosen = source.choose(list(seen[0]))
    keep = [k for k, v in seen[0].items() if k in chosen or isinstance(v, bytes)]
    out = {k: _stack(source, where, k, [o[k] for o in seen]) for k in keep}
    if "language_instruction" in steps[0]:
        if INSTRUCTION in out:
            text = f"an observation and the language are both called {INSTRUCTION!r}"
            raise DataError(f"{source}: {text}")
        texts = [s["language_instruction"] for s in steps]
        out[INSTRUCTION] = _stack(source, where, INSTRUCTION, texts)
    return out


def _stack(source: Source, where: str, key: str, values: Sequence[Any]) -> Nested:
    """Steps' values of one key, stacked; nested ones too."""
    try:
        stacked = stack_observations([_decoded(v) for v in values])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: {key} differs between steps ({error})") from error
    return map_leaves(lambda k, v: as_leaf(source, f"{key}/{k}" if k else key, v), stacked)


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _decoded(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    return np.asarray(value)
