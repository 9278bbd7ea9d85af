"""Episodes, their shards and their Minari data sets, expert return and the return filter.

An episode of T steps holds T + 1 observations, the last one after the last action. `actions` are
the expert's own, which is what a clone should imitate; `executed` are the ones the simulator saw,
which differ where noise was injected during collection.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.files import atomic_path, write_bytes

# A leaf is an array with a leading time axis, or a list of strings; dicts and tuples nest leaves.
Nested = dict[str, "Nested"] | tuple["Nested", ...] | np.ndarray | list[str]


class DataError(ValueError):
    """Data is missing, truncated, foreign or inconsistent. Names the file, episode and key."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of T steps.

    Attributes:
      task: id in `domains.TASKS`.
      observations: nested leaves with leading axis T + 1.
      actions: the expert's actions, nested leaves with leading axis T.
      executed: the executed actions, likewise.
      rewards: float64 (T,).
      success: whether the task was solved at any step.
      seed: what the environment was reset with.
    """

    task: str
    observations: Nested
    actions: Nested
    executed: Nested
    rewards: np.ndarray
    success: bool
    seed: int

    @property
    def steps(self) -> int:
        return len(next(iter(flatten(self.actions).values())))

    @property
    def episode_return(self) -> float:
        return float(self.rewards.sum())


@dataclasses.dataclass(frozen=True)
class Document:
    """Text and images in reading order: a page, a captioned image, a question and its answer.

    Attributes:
      items: strings, and uint8 images (H, W, 3), (H, W, 1) or (H, W) of any size.
      given: places of those items, strings, that are asked and not answered: a question's text.
        They count in the loss like any text, unless a run scores answers alone.
    """

    items: tuple[str | np.ndarray, ...]
    given: tuple[int, ...] = ()


def children(tree: Any) -> list[tuple[str, Any]] | None:
    """Names and parts of a nested value or space; None for a leaf.

    Dict keys come in lexicographic order (2.1), a tuple's parts in theirs, named "[0]", "[1]", ...
    Raises ValueError for a key that is empty or has a '/', which joins the keys of a path, and for
    an empty Dict or Tuple.
    """
    if isinstance(tree, gym.spaces.Dict | gym.spaces.Tuple):
        tree = tree.spaces
    if isinstance(tree, dict | tuple) and not tree:
        raise ValueError("an empty Dict or Tuple has no values to store or tokenize")
    if isinstance(tree, tuple):
        return [(f"[{i}]", part) for i, part in enumerate(tree)]
    if not isinstance(tree, dict):
        return None
    for key in tree:
        if not isinstance(key, str) or not key or "/" in key or key.startswith("["):
            raise ValueError(f"key {key!r}: keys are strings without '/' and a leading '['")
    return sorted(tree.items())


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested value or space by '/'-joined key, in the paper's order (2.1)."""
    parts = children(tree)
    if parts is None:
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, part in parts:
        out |= flatten(part, f"{prefix}/{key}" if prefix else key)
    return out


def stack_observations(observations: Sequence[Any], space: gym.Space | None = None) -> Nested:
    """A list of single observations to nested leaves with a leading time axis.

    With `space` (of observations or actions) leaves get its dtypes.
    """
    first = observations[0]
    inner = (lambda k: space[k]) if space is not None else (lambda k: None)
    if isinstance(first, dict):
        return {k: stack_observations([o[k] for o in observations], inner(k)) for k in first}
    if isinstance(first, tuple):
        parts = enumerate(zip(*observations, strict=True))
        return tuple(stack_observations(part, inner(i)) for i, part in parts)
    if isinstance(first, str):
        return list(observations)
    return np.stack([np.asarray(o, None if space is None else space.dtype) for o in observations])


def select(tree: Nested, step: int | slice) -> Any:
    """The observation of one step, the inverse of `stack_observations`; or a slice of the steps."""
    if isinstance(tree, dict):
        return {k: select(v, step) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(select(v, step) for v in tree)
    return tree[step]


def is_text(space: gym.Space) -> bool:
    """Whether a space's samples are strings, as those of gymnasium's Text and of BabyAI's missions.

    A space that cannot say without drawing a sample is asked for one, from a copy: drawing must not
    change what the space draws next.
    """
    if isinstance(space, gym.spaces.Text):
        return True
    if type(space).__module__.startswith("gymnasium.spaces"):
        return False
    return isinstance(copy.deepcopy(space).sample(), str)


def check_observation(observation: Any, space: gym.Space, where: str) -> None:
    """Raise DataError where one observation does not fit its space, naming the key."""
    for kind, expected in ((gym.spaces.Dict, dict), (gym.spaces.Tuple, tuple)):
        if isinstance(space, kind) and not isinstance(observation, expected):
            got = type(observation).__name__
            raise DataError(f"{where}: observation is {got}, expected a {expected.__name__}")
    _check_leaves(stack_observations([observation]), space, 1, where, "observation")


def validate(
    episode: Episode, observation_space: gym.Space, action_space: gym.Space, where: str
) -> None:
    """Raise DataError naming `where`, the key, what was expected and what came."""
    _check_leaves(episode.observations, observation_space, episode.steps + 1, where, "observations")
    for name in ("actions", "executed"):
        _check_leaves(getattr(episode, name), action_space, episode.steps, where, name)
    _check_array(episode.rewards, (episode.steps,), None, where, "rewards")
    if episode.steps == 0:
        raise DataError(f"{where}: the episode has no steps")


def _check_leaves(tree: Nested, space: gym.Space, length: int, where: str, key: str) -> None:
    if isinstance(space, gym.spaces.Dict):
        if not isinstance(tree, dict):
            raise DataError(f"{where}: {key} is {type(tree).__name__}, expected a dict")
        if set(tree) != set(space.spaces):
            raise DataError(f"{where}: {key} has keys {sorted(tree)}, expected {sorted(space)}")
        for name, sub in space.spaces.items():
            _check_leaves(tree[name], sub, length, where, f"{key}/{name}")
    elif isinstance(space, gym.spaces.Tuple):
        if not isinstance(tree, tuple) or len(tree) != len(space.spaces):
            got = f"{len(tree)} parts" if isinstance(tree, tuple) else type(tree).__name__
            raise DataError(f"{where}: {key} is {got}, expected a tuple of {len(space.spaces)}")
        for i, (part, sub) in enumerate(zip(tree, space.spaces, strict=True)):
            _check_leaves(part, sub, length, where, f"{key}/[{i}]")
    elif is_text(space):
        if not isinstance(tree, list) or not all(isinstance(t, str) for t in tree):
            raise DataError(f"{where}: {key} is {type(tree).__name__}, expected a list of strings")
        if len(tree) != length:
            raise DataError(f"{where}: {key} has length {len(tree)}, expected {length}")
    else:
        if space.shape is None:
            raise DataError(f"{where}: {key}: no rule for the space {space}")
        _check_array(tree, (length, *space.shape), space.dtype, where, key)
        bounds = discrete_bounds(space)
        if bounds is not None and length:
            values = np.asarray(tree).reshape(length, -1).astype(np.float64)
            wrong = (values < bounds[0]) | (values > bounds[1])
            if wrong.any():
                step, i = np.argwhere(wrong)[0]
                text = f"is {values[step, i]:.0f} at step {step}, expected "
                text += f"[{bounds[0][i]:.0f}, {bounds[1][i]:.0f}]"
                raise DataError(f"{where}: {key} {text}")


def discrete_bounds(space: gym.Space) -> tuple[np.ndarray, np.ndarray] | None:
    """Lowest and highest value of each element of a space of whole numbers, float64 (n,) each.

    None for other spaces.
    """
    spaces = gym.spaces
    if isinstance(space, spaces.Discrete):
        low, count = np.array([space.start]), np.array([space.n])
    elif isinstance(space, spaces.MultiDiscrete):
        low, count = space.start.ravel(), space.nvec.ravel()
    elif isinstance(space, spaces.MultiBinary):
        low, count = np.zeros(int(np.prod(space.shape, dtype=int))), 2
    elif isinstance(space, spaces.Box) and space.dtype.kind in "iub":
        return space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
    else:
        return None
    low = low.astype(np.float64)
    return low, low + count - 1


def _check_array(
    x: Any, shape: tuple[int, ...], dtype: np.dtype | None, where: str, key: str
) -> None:
    if not isinstance(x, np.ndarray):
        raise DataError(f"{where}: {key} is {type(x).__name__}, expected an array")
    if x.shape != shape:
        raise DataError(f"{where}: {key} has shape {x.shape}, expected {shape}")
    if dtype is not None and np.dtype(dtype).kind != x.dtype.kind:
        raise DataError(f"{where}: {key} has dtype {x.dtype}, expected {np.dtype(dtype)}")
    if x.dtype.kind == "f" and np.isnan(x).any():
        raise DataError(f"{where}: {key} holds NaN at step {int(np.argwhere(np.isnan(x))[0][0])}")


# --- expert return and the filter (paper 3.1, App. F) -------------------------------------------


def expert_return(scores: Sequence[float]) -> float:
    """Largest mean score over any window of W = min(1000, N / 10) consecutive episodes.

    The paper's formula; W is at least one episode. Raises ValueError for no episodes.
    """
    n = len(scores)
    if n == 0:
        raise ValueError("expert return of no episodes")
    window = max(1, min(1000, n // 10))
    sums = np.convolve(np.asarray(scores, np.float64), np.ones(window), mode="valid")
    return float(sums.max() / window)


def keep_mask(scores: Sequence[float]) -> np.ndarray:
    """Which episodes reach 80 % of the expert return: bool (N,).

    Raises ValueError where the expert return is not positive: the paper's rule has no meaning
    there, and such a task is filtered on success instead.
    """
    best = expert_return(scores)
    if best <= 0:
        raise ValueError(f"the return filter needs a positive expert return, got {best}")
    return np.asarray(scores, np.float64) >= 0.8 * best


# --- shards: one file an episode, whole or absent ------------------------------------------------


def write_shard(path: str | os.PathLike, episode: Episode) -> None:
    """Write one episode as .npz without pickle."""
    write_bytes(path, to_bytes(episode))


def read_shard(path: str | os.PathLike) -> Episode:
    """Read a shard; raises DataError where it is truncated or foreign."""
    try:
        return from_bytes(pathlib.Path(path).read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: not an episode shard ({error})") from error


def to_bytes(episode: Episode) -> bytes:
    """One episode as the content of an .npz file, without pickle."""
    leaves = {
        f"{name}/{k}": np.asarray(v)
        for name in ("observations", "actions", "executed")
        for k, v in flatten(getattr(episode, name)).items()
    }
    meta = json.dumps({k: getattr(episode, k) for k in ("task", "success", "seed")})
    np.savez(content := io.BytesIO(), meta=np.array(meta), rewards=episode.rewards, **leaves)
    return content.getvalue()


def from_bytes(content: bytes, where: str) -> Episode:
    """The inverse of `to_bytes`; raises DataError, naming `where`, if truncated or foreign."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as z:
            arrays = {k: z[k] for k in z.files}
        meta = json.loads(str(arrays.pop("meta")))
        rewards = arrays.pop("rewards")
        trees: dict[str, dict[str, np.ndarray]] = {
            "observations": {},
            "actions": {},
            "executed": {},
        }
        for key, value in arrays.items():
            name, _, path_within = key.partition("/")
            trees[name][path_within] = value
        nested = {name: _unflatten(leaves) for name, leaves in trees.items()}
        return Episode(rewards=rewards, **nested, **meta)
    except (
        *(OSError, ValueError, KeyError, TypeError, EOFError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise DataError(f"{where}: not an episode shard ({error})") from error


def _unflatten(leaves: dict[str, np.ndarray]) -> Nested:
    as_leaf = lambda v: v.tolist() if v.dtype.kind == "U" else v  # noqa: E731
    if set(leaves) == {""}:
        return as_leaf(leaves[""])
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *parents, last = key.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = as_leaf(value)
    return _with_tuples(tree)


def _with_tuples(tree: Any) -> Nested:
    """Turn dicts whose keys are "[0]", "[1]", ... back into tuples."""
    if not isinstance(tree, dict):
        return tree
    parts = {k: _with_tuples(v) for k, v in tree.items()}
    if not any(k.startswith("[") for k in parts):
        return parts
    return tuple(parts[f"[{i}]"] for i in range(len(parts)))


# --- Minari ---------------------------------------------------------------------------------------


def write_minari(
    folder: str | os.PathLike,
    episodes: Sequence[Episode],
    observation_space: gym.Space,
    action_space: gym.Space,
    metadata: dict[str, Any],
) -> None:
    """Write episodes as a Minari arrow data set at `folder`, whole or not at all.

    Images are stored losslessly (`jpeg_encoding=False`: Minari's default is JPEG). `metadata` is
    kept under the key "gato" of the data set's own metadata.
    """
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    folder = pathlib.Path(folder).absolute()  # Minari's reading takes a relative one twice
    for space in (observation_space, action_space):
        for key, leaf in flatten(space).items():
            if 0 in (leaf.shape or ()):
                raise DataError(
                    f"{folder}: {key!r} has shape {leaf.shape}, Minari cannot store that"
                )
    buffers = [
        EpisodeBuffer(
            id=i,
            seed=e.seed,
            observations=e.observations,
            actions=e.actions,
            rewards=list(e.rewards),
            terminations=[False] * (e.steps - 1) + [True],
            truncations=[False] * e.steps,
            infos={
                # One row an observation: the initial one carries zeros. As lists, because Minari
                # cannot read back an info that was a one-dimensional array.
                **{
                    _executed_key(key): list(np.concatenate([np.zeros_like(leaf[:1]), leaf]))
                    for key, leaf in flatten(e.executed).items()
                },
                "success": [False] * e.steps + [e.success],
            },
        )
        for i, e in enumerate(episodes)
    ]
    with atomic_path(folder) as temporary:
        (temporary / "data").mkdir(parents=True)
        storage = MinariStorage.new(
            temporary / "data",
            observation_space=observation_space,
            action_space=action_space,
            env_spec=None,
            data_format="arrow",
            jpeg_encoding=False,
        )
        # Minari would walk the whole folder for its size after every episode.
        measure, storage.get_size = storage.get_size, lambda: 0.0
        storage.update_episodes(buffers)
        storage.get_size = measure
        storage.update_metadata(
            {
                "dataset_size": storage.get_size(),
                "dataset_id": f"gato/{folder.name}-v0",
                "minari_version": minari.__version__,
                "gato": json.dumps(metadata, sort_keys=True),
            }
        )


def _executed_key(key: str) -> str:
    """Minari's info for a leaf of the executed action: "executed", or "executed:" and its path."""
    return f"executed:{key}" if key else "executed"


def read_minari(folder: str | os.PathLike) -> tuple[list[Episode], dict[str, Any]]:
    """Episodes and metadata of a data set written by `write_minari`.

    Raises DataError naming the data set, the episode and the key.
    """
    from minari import MinariDataset

    folder = pathlib.Path(folder)
    if not (folder / "data" / "metadata.json").is_file():
        raise DataError(f"{folder}: no Minari data set there")
    try:
        dataset = MinariDataset(folder / "data")
        metadata = json.loads(dataset.storage.metadata["gato"])
        spaces = dataset.observation_space, dataset.action_space
    except Exception as error:
        raise DataError(f"{folder}: not a data set of this workbook ({error!r})") from error
    episodes = []
    for i in range(dataset.total_episodes):
        where = f"{folder}, episode {i}"
        try:
            (raw,) = dataset.iterate_episodes([i])
            episode = Episode(
                task=metadata["task"],
                observations=raw.observations,
                actions=raw.actions,
                executed=_unflatten(
                    {
                        key: np.asarray(raw.infos[_executed_key(key)])[1:]
                        for key in flatten(raw.actions)
                    }
                ),
                rewards=np.asarray(raw.rewards, np.float64),
                success=bool(np.asarray(raw.infos["success"])[-1]),
                seed=int(next(iter(dataset.storage.get_episode_metadata([i])))["seed"]),
            )
        except Exception as error:
            raise DataError(f"{where}: cannot be read ({error!r})") from error
        validate(episode, *spaces, where)
        episodes.append(episode)
    return episodes, metadata
