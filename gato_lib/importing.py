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
import importlib.util
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import PIL.Image

from gato_lib.config import ConfigError, source_digest
from gato_lib.episodes import (
    DataError,
    Episode,
    Nested,
    children,
    flatten,
    read_minari,
    stack_observations,
    validate,
    write_minari,
)
from gato_lib.sequence import PATCH, image_layout

KINDS = ("minari", "lerobot", "rlds")
MOST_PATCHES = 64  # of an image that is kept as it is
UNKNOWN_SEED = -1


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set to import.

    Attributes:
      name: what it is called here: a domain of the mixture.
      kind: one of `KINDS`.
      where: folder or id.
      keys: observation keys to keep; empty keeps all. Instructions always stay.
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
        text = f"import {dict(fields)!r}" if isinstance(fields, Mapping) else f"import {fields!r}"
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{text}: expected name and one of {', '.join(KINDS)}")
        kinds = [k for k in KINDS if k in fields]
        unknown = sorted(set(fields) - {"name", "keys", "image", *KINDS})
        if len(kinds) != 1 or unknown or "name" not in fields:
            raise ConfigError(
                f"{text}: expected name, one of {', '.join(KINDS)}, and perhaps keys and image"
            )
        keys = fields.get("keys", ())
        source = cls(
            fields["name"], kinds[0], fields[kinds[0]], tuple(keys), fields.get("image", 0)
        )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(source.name)):
            raise ConfigError(f"{text}: a name is of lower-case letters, digits and '_'")
        if isinstance(keys, str) or not all(isinstance(k, str) for k in keys):
            raise ConfigError(f"{text}: keys is a list of observation keys")
        if type(source.image) is not int or source.image < 0 or source.image % PATCH:
            raise ConfigError(f"{text}: image is a multiple of {PATCH}")
        if not source.where or not isinstance(source.where, str):
            raise ConfigError(f"{text}: {source.kind} is no folder and no id")
        return source

    @classmethod
    def load(cls, text: str) -> Source:
        """From `text`."""
        fields = json.loads(text)
        return cls(**fields | {"keys": tuple(fields["keys"])})

    @property
    def text(self) -> str:
        """One line that says it all."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return f"{self.name} ({self.kind} {self.where})"


@dataclasses.dataclass(frozen=True)
class Recording:
    """Episodes of one source, and the spaces of what they hold."""

    observation_space: gym.Space
    action_space: gym.Space
    episodes: tuple[Episode, ...]


def folder_of(source: Source, root: str) -> pathlib.Path:
    """Where its copy lies. Another one where the source's files have changed since."""
    parts = [source.text, source_digest("importing.py", "episodes.py")]
    files = _files(source)
    parts += [f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in ((p, p.stat()) for p in files)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
    return pathlib.Path(root) / f"import-{source.name}-{digest}"


def convert(source: Source, root: str, report: Callable[[str], None] = lambda line: None) -> None:
    """Read and check a source and keep a copy of it, unless there is one.

    Raises DataError naming the source, the episode and the key; then nothing is kept.
    """
    if source.kind == "minari":
        _fetch_minari(source)
    folder = folder_of(source, root)
    if (folder / "data" / "metadata.json").is_file():
        return
    episodes = []
    observation_space, action_space, raw = _READERS[source.kind](source)
    for i, episode in enumerate(raw):
        episodes.append(episode)
        report(f"{source.name}: {i + 1} episodes read")
    if not episodes:
        raise DataError(f"{source}: no episodes")
    action_space = _bounded(action_space, [e.actions for e in episodes])
    write_minari(
        folder,
        episodes,
        observation_space,
        action_space,
        {
            "task": f"{source.name}/all",
            "source": source.text,
            "collected": len(episodes),
            "kept": len(episodes),
            "scores": [e.episode_return for e in episodes],
        },
    )
    report(f"{source.name}: {len(episodes)} episodes imported")


def load(source: Source, root: str) -> tuple[Recording, dict[str, Any]]:
    """What `convert` has kept, and its data card."""
    from minari import MinariDataset

    folder = folder_of(source, root)
    episodes, card = read_minari(folder)
    spaces = MinariDataset(folder / "data")
    return Recording(spaces.observation_space, spaces.action_space, tuple(episodes)), card


def _files(source: Source) -> list[pathlib.Path]:
    folder = pathlib.Path(source.where)
    if source.kind == "minari" and not folder.is_dir():
        folder = _minari_folder(source)
    if not folder.is_dir():
        raise DataError(f"{source}: there is no such folder")
    return sorted(p for p in folder.rglob("*") if p.is_file())


# --- what the kinds have in common ----------------------------------------------------------------


def _where(source: Source, episode: int) -> str:
    return f"{source}, episode {episode}"


def _checked(
    source: Source,
    index: int,
    observation_space: gym.Space,
    action_space: gym.Space,
    **fields: Any,
) -> Episode:
    episode = Episode(
        task=f"{source.name}/all", **{"seed": UNKNOWN_SEED, "success": False} | fields
    )
    where = _where(source, index)
    try:
        steps = episode.steps
    except (TypeError, StopIteration) as error:
        raise DataError(f"{where}: actions cannot be counted ({error!r})") from error
    if steps == 0:
        raise DataError(f"{where}: the episode has no steps")
    validate(episode, observation_space, action_space, where)
    return episode


def _chosen(source: Source, names: Sequence[str]) -> list[str]:
    """Those observation keys that are to be kept; raises DataError where one is not there."""
    missing = sorted(set(source.keys) - set(names))
    if missing:
        raise DataError(f"{source}: no observation {missing[0]!r}; there are {sorted(names)}")
    return [n for n in names if n in source.keys or not source.keys]


def _space(source: Source, key: str, values: Any) -> gym.Space:
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


def _nested(function: Callable[[str, Any], Any], tree: Any, key: str = "") -> Any:
    """`function(key, leaf)` of every leaf; Dict and Tuple spaces where it makes spaces."""
    parts = children(tree)
    if parts is None:
        return function(key, tree)
    out = {k: _nested(function, v, f"{key}/{k}" if key else k) for k, v in parts}
    spaces = any(isinstance(v, gym.Space) for v in out.values())
    if isinstance(tree, tuple | gym.spaces.Tuple):
        return gym.spaces.Tuple(out.values()) if spaces else tuple(out.values())
    return gym.spaces.Dict(out) if spaces else out


def _bounded(space: gym.Space, actions: Sequence[Nested]) -> gym.Space:
    """The space with the data's own range where it has no finite one: tokens need bounds."""
    values = {
        key: np.concatenate([flatten(a)[key] for a in actions])
        for key, leaf in flatten(space).items()
        if isinstance(leaf, gym.spaces.Box)
    }

    def bound(key: str, leaf: gym.Space) -> gym.Space:
        if not isinstance(leaf, gym.spaces.Box):
            return leaf
        low, high = (f(values[key], axis=0).astype(leaf.dtype) for f in (np.min, np.max))
        if leaf.dtype.kind == "f":
            least, most = -1e30, 1e30
        else:
            least, most = np.iinfo(leaf.dtype).min, np.iinfo(leaf.dtype).max
        return gym.spaces.Box(
            np.where(leaf.low > least, leaf.low, low),
            np.where(leaf.high < most, leaf.high, high),
            dtype=leaf.dtype,
        )

    return _nested(bound, space)


def _as_image(source: Source, key: str, image: PIL.Image.Image | np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) or (H, W, 1), resized where the source says so."""
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if image.mode != "L":
        image = image.convert("RGB")
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


def _resized(source: Source, key: str, values: Any) -> Any:
    """An observation leaf with its images as the source wants them; scalars become vectors."""
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
        values = np.stack([_as_image(source, key, v) for v in values])
    return values


def _needs(source: Source, module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise DataError(f"{source}: {module} is not installed: pip install -e '.[{extra}]'")


# --- Minari ---------------------------------------------------------------------------------------


def _minari_folder(source: Source) -> pathlib.Path:
    from minari.dataset.minari_dataset import DATASET_ID_RE
    from minari.storage.datasets_root_dir import get_dataset_path

    if not DATASET_ID_RE.fullmatch(source.where):
        raise DataError(f"{source}: neither a folder nor a Minari id")
    return pathlib.Path(get_dataset_path(source.where))


def _fetch_minari(source: Source) -> None:
    """Download a data set that is named by its id and not there yet."""
    if pathlib.Path(source.where).is_dir() or _minari_folder(source).is_dir():
        return
    import minari

    try:
        minari.download_dataset(source.where)
    except Exception as error:  # no network, no such set, no room
        raise DataError(f"{source}: cannot be downloaded ({error})") from error


def _read_minari(source: Source) -> tuple[gym.Space, gym.Space, Iterator[Episode]]:
    from minari import MinariDataset

    folder = pathlib.Path(source.where)
    folder = folder if folder.is_dir() else _minari_folder(source)
    if (folder / "data").is_dir():
        folder = folder / "data"
    try:
        dataset = MinariDataset(folder)
        total = int(dataset.total_episodes)
        full, action_space = dataset.observation_space, dataset.action_space
    except Exception as error:  # whatever a damaged set makes Minari raise
        raise DataError(f"{source}: not a readable Minari data set ({error!r})") from error
    wanted = full
    if isinstance(full, gym.spaces.Dict):
        wanted = gym.spaces.Dict({k: full[k] for k in _chosen(source, list(full))})
    try:
        spaces = flatten(wanted)
    except ValueError as error:  # a key that no path can hold
        raise DataError(f"{source}: observations: {error}") from error

    def resized(key: str, values: Any) -> Any:
        return _resized(source, key, values) if image_layout(spaces[key]) else values

    def resized_space(key: str, space: gym.Space) -> gym.Space:
        if not image_layout(space):
            return space
        blank = resized(key, np.zeros((1, *space.shape), np.uint8))
        return gym.spaces.Box(0, 255, blank.shape[1:], np.uint8)

    def episodes() -> Iterator[Episode]:
        for i in range(total):
            where = _where(source, i)
            try:
                (raw,) = dataset.iterate_episodes([i])
            except Exception as error:
                raise DataError(f"{where}: cannot be read ({error!r})") from error
            # Checked as recorded: what is wrong there must be named before anything is changed.
            episode = _checked(
                source,
                i,
                full,
                action_space,
                observations=raw.observations,
                actions=raw.actions,
                executed=raw.actions,
                rewards=np.asarray(raw.rewards, np.float64),
                success=bool(np.any((raw.infos or {}).get("success", False))),
            )
            for key in ("terminations", "truncations"):
                shape = np.shape(getattr(raw, key))
                if shape != (episode.steps,):
                    raise DataError(
                        f"{where}: {key} has shape {shape}, expected {(episode.steps,)}"
                    )
            kept = raw.observations
            if isinstance(kept, dict):
                kept = {k: kept[k] for k in wanted.spaces}
            yield dataclasses.replace(episode, observations=_nested(resized, kept))

    return _nested(resized_space, wanted), action_space, episodes()


# --- LeRobot --------------------------------------------------------------------------------------


def _read_lerobot(source: Source) -> tuple[gym.Space, gym.Space, Iterator[Episode]]:
    """Frames, one row each, to episodes.

    The format has no observation after the last action: the last one stands there again. No token
    is made of it.
    """
    root = pathlib.Path(source.where)
    info = _read_json(source, root / "meta" / "info.json")
    version = str(info.get("codebase_version"))
    if version[:2] not in ("v2", "v3"):
        raise DataError(f"{source}: format {version}, expected v2 or v3")
    features = info.get("features") or {}
    prefix = "observation."
    names = _chosen(source, [k[len(prefix) :] for k in features if k.startswith(prefix)])
    columns = {n: prefix + n for n in names}
    for column in (*columns.values(), "action"):
        if column not in features:
            raise DataError(f"{source}: meta/info.json has no feature {column!r}")
    videos = [n for n, c in columns.items() if features[c]["dtype"] == "video"]
    if videos:
        _needs(source, "av", "lerobot")
    tasks = _lerobot_tasks(source, root, version)
    video = _lerobot_videos(source, root, info, version)

    def episodes() -> Iterator[Episode]:
        observation_space = action_space = None
        count = frames = 0
        for index, rows in _lerobot_rows(source, root):
            where = _where(source, index)
            if index != count:
                raise DataError(f"{where}: expected episode {count}")
            n = len(rows["frame_index"])
            if rows["frame_index"] != list(range(n)):
                raise DataError(f"{where}: frame_index does not count from 0 to {n - 1}")
            observations: dict[str, Any] = {}
            for name, column in columns.items():
                if name in videos:
                    values = video(index, column, n, lambda x, k=name: _as_image(source, k, x))
                elif features[column]["dtype"] == "image":
                    cells = _column(rows, column, where)
                    values = _lerobot_images(source, root, where, name, cells)
                else:
                    values = _numbers(_column(rows, column, where), where, column)
                values = values if isinstance(values, list) else _resized(source, name, values)
                observations[name] = values
            if tasks:
                known = _column(rows, "task_index", where)
                lost = [t for t in known if t not in tasks]
                if lost:
                    raise DataError(f"{where}: task_index {lost[0]} is not among meta/tasks")
                observations["instruction"] = [tasks[t] for t in known]
            actions = _numbers(_column(rows, "action", where), where, "action")
            rewards = rows.get("next.reward")
            if rewards is None:
                rewards = np.zeros(n)
            rewards = _numbers(rewards, where, "next.reward").reshape(n).astype(np.float64)
            last = {k: v + v[-1:] for k, v in observations.items() if isinstance(v, list)}
            last |= {
                k: np.concatenate([v, v[-1:]])
                for k, v in observations.items()
                if not isinstance(v, list)
            }
            if observation_space is None:
                observation_space = _nested(lambda k, v: _space(source, k, v), last)
                action_space = _space(source, "action", actions)
                yield observation_space, action_space
            yield _checked(
                source,
                index,
                observation_space,
                action_space,
                observations=last,
                actions=actions,
                executed=actions,
                rewards=rewards,
                success=bool(np.any(rows.get("next.success") or False)),
            )
            count, frames = count + 1, frames + n
        for name, got in (("total_episodes", count), ("total_frames", frames)):
            if info.get(name) != got:
                listed = info.get(name)
                raise DataError(f"{source}: {name} is {listed} in meta/info.json, found {got}")

    return _with_spaces(source, episodes())


def _with_spaces(source: Source, items: Iterator) -> tuple[gym.Space, gym.Space, Iterator[Episode]]:
    """Of a generator of the two spaces, then episodes."""
    try:
        observation_space, action_space = next(items)
    except StopIteration:
        raise DataError(f"{source}: no episodes") from None
    return observation_space, action_space, items


def _read_json(source: Source, path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: {path.name} cannot be read ({error})") from error


def _read_parquet(source: Source, path: pathlib.Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        shown = path.relative_to(source.where)
        raise DataError(f"{source}: {shown} cannot be read ({error})") from error


def _lerobot_tasks(source: Source, root: pathlib.Path, version: str) -> dict[int, str]:
    """Instructions by task_index; empty where the set has none."""
    if version.startswith("v3"):
        path = root / "meta" / "tasks.parquet"
        if not path.is_file():
            return {}
        frame = _read_parquet(source, path).to_pandas().reset_index()
        texts = [c for c in frame.columns if c != "task_index"]
        rows = frame.rename(columns={texts[0]: "task"}).to_dict("records")
    else:
        path = root / "meta" / "tasks.jsonl"
        if not path.is_file():
            return {}
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{source}: meta/tasks.jsonl cannot be read ({error})") from error
    try:
        found = {int(row["task_index"]): str(row["task"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source}: meta/tasks has no task_index and task ({error!r})") from error
    return found if any(found.values()) else {}


def _lerobot_rows(source: Source, root: pathlib.Path) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(episode, its rows by column) in the files' order."""
    paths = sorted((root / "data").glob("*/*.parquet"))
    if not paths:
        raise DataError(f"{source}: no data/*/*.parquet")
    for path in paths:
        table = _read_parquet(source, path)
        shown = path.relative_to(root)
        for key in ("episode_index", "frame_index"):
            if key not in table.column_names:
                raise DataError(f"{source}: {shown} has no column {key!r}")
        index = table["episode_index"].to_numpy()
        starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1))
        for start, end in zip(starts, [*starts[1:], len(index)], strict=True):
            part = table.slice(int(start), int(end - start))
            yield int(index[start]), {c: part[c].to_pylist() for c in part.column_names}


def _column(rows: Mapping[str, list[Any]], column: str, where: str) -> list[Any]:
    if column not in rows:
        raise DataError(f"{where}: no column {column!r}, there are {sorted(rows)}")
    return rows[column]


def _numbers(values: Sequence[Any], where: str, key: str) -> Any:
    """Rows of one column, stacked: float32, or int64 for whole numbers; text as it is."""
    if all(isinstance(v, str) for v in values):
        return list(values)
    try:
        array = np.array(values)
    except ValueError as error:
        raise DataError(f"{where}: {key} has rows of different lengths") from error
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where}: {key} holds {array.dtype}, expected numbers")
    array = array.astype({"f": np.float32, "b": np.uint8}.get(array.dtype.kind, np.int64))
    return array if array.ndim > 1 else array[:, None]


def _lerobot_images(
    source: Source, root: pathlib.Path, where: str, key: str, values: Sequence[Any]
) -> np.ndarray:
    """Encoded images, within the rows or as files beside them."""
    images = []
    for step, value in enumerate(values):
        try:
            data = value["bytes"] or (root / value["path"]).read_bytes()
            with PIL.Image.open(io.BytesIO(data)) as image:
                images.append(_as_image(source, key, image))
        except DataError:
            raise
        except (
            OSError,
            TypeError,
            KeyError,
            ValueError,
            PIL.Image.DecompressionBombError,
        ) as error:
            raise DataError(f"{where}: {key} at step {step} is no image ({error})") from error
    return np.stack(images)


def _lerobot_videos(
    source: Source, root: pathlib.Path, info: Mapping[str, Any], version: str
) -> Callable[..., np.ndarray]:
    """A function (episode, column, frames, convert) -> uint8 (frames, H, W, C).

    In format 2 each episode is a file; in format 3 a file holds several, and meta/episodes says
    where each begins.
    """
    fps, pattern = float(info.get("fps") or 0), info.get("video_path")
    begins: dict[int, dict[str, Any]] = {}
    if version.startswith("v3"):
        for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
            table = _read_parquet(source, path)
            wanted = [c for c in table.column_names if c.startswith("videos/")]
            for row in table.select(["episode_index", *wanted]).to_pylist():
                begins[row["episode_index"]] = row

    def frames(episode: int, column: str, count: int, convert: Callable) -> np.ndarray:
        import av

        where, start = f"{_where(source, episode)}: {column}", 0.0
        try:
            if version.startswith("v3"):
                at, begin = f"videos/{column}", begins[episode]
                start = begin[f"{at}/from_timestamp"]
                name = pattern.format(
                    video_key=column,
                    chunk_index=begin[f"{at}/chunk_index"],
                    file_index=begin[f"{at}/file_index"],
                )
            else:
                chunk = episode // int(info["chunks_size"])
                name = pattern.format(episode_chunk=chunk, video_key=column, episode_index=episode)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the metadata names no video ({error!r})") from error
        images = []
        try:
            with av.open(str(root / name)) as container:
                stream = container.streams.video[0]
                container.seek(int(start / stream.time_base), stream=stream)
                for frame in container.decode(stream):
                    if frame.time > start - 0.5 / fps and len(images) < count:
                        images.append(convert(frame.to_ndarray(format="rgb24")))
                    if len(images) == count:
                        break
        except DataError:
            raise
        except (OSError, ValueError, IndexError, ZeroDivisionError) as error:  # PyAV's derive so
            raise DataError(f"{where}: {name} cannot be read ({error})") from error
        if len(images) < count:
            raise DataError(f"{where}: {name} has {len(images)} frames for {count} rows")
        return np.stack(images)

    return frames


# --- RLDS -----------------------------------------------------------------------------------------


def _read_rlds(source: Source) -> tuple[gym.Space, gym.Space, Iterator[Episode]]:
    """Steps to episodes. By RLDS, the last step's action means nothing: it is left out."""
    _needs(source, "tensorflow_datasets", "rlds")
    _needs(source, "tensorflow", "rlds")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # JAX wants its memory
    try:
        builder = tfds.builder_from_directory(source.where)
        splits = sorted(builder.info.splits)
        episodes_in = {s: builder.as_dataset(split=s, shuffle_files=False) for s in splits}
    except Exception as error:
        raise DataError(f"{source}: not a readable TFDS folder ({error})") from error

    def raw() -> Iterator[tuple[int, dict[str, Any]]]:
        i = 0
        for split in splits:
            found = iter(tfds.as_numpy(episodes_in[split]))
            while True:
                try:
                    episode = next(found, None)
                    if episode is None:
                        break
                    if "steps" not in episode:
                        raise DataError(f"{_where(source, i)}: no 'steps', it is not RLDS")
                    steps = list(episode["steps"])
                except DataError:
                    raise
                except Exception as error:  # a truncated file, a corrupt image
                    raise DataError(f"{_where(source, i)}: cannot be read ({error})") from error
                yield i, steps
                i += 1

    def episodes() -> Iterator[Any]:
        spaces = None
        for i, steps in raw():
            where = _where(source, i)
            if len(steps) < 2:
                raise DataError(f"{where}: {len(steps)} steps, expected 2 or more")
            for key in ("observation", "action"):
                if key not in steps[0]:
                    raise DataError(f"{where}: steps have no {key!r}, there are {sorted(steps[0])}")
            ends = [t for t, step in enumerate(steps[:-1]) if step.get("is_last")]
            if ends:
                raise DataError(f"{where}: is_last at step {ends[0]} of {len(steps)}")
            seen = [s["observation"] for s in steps]
            seen = seen if isinstance(seen[0], dict) else [{"observation": o} for o in seen]
            keep = _chosen(source, list(seen[0]))
            if "language_instruction" in steps[0]:
                keep = [*keep, "instruction"]
                text = [s["language_instruction"] for s in steps]
                seen = [o | {"instruction": t} for o, t in zip(seen, text, strict=True)]
            observations = {k: _rlds_leaves(source, where, k, [o[k] for o in seen]) for k in keep}
            actions = _rlds_leaves(source, where, "action", [s["action"] for s in steps[:-1]])
            if spaces is None:
                spaces = (
                    _nested(lambda k, v: _space(source, k, v), observations),
                    _nested(lambda k, v: _space(source, f"action/{k}", v), actions),
                )
                yield spaces
            rewards = np.array([s.get("reward", 0.0) for s in steps[:-1]], np.float64)
            yield _checked(
                source,
                i,
                *spaces,
                observations=observations,
                actions=actions,
                executed=actions,
                rewards=rewards,
            )

    return _with_spaces(source, episodes())


def _rlds_leaves(source: Source, where: str, key: str, values: Sequence[Any]) -> Nested:
    """Steps' values of one key, stacked; nested ones too."""
    try:
        stacked = stack_observations([_decoded(v) for v in values])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: {key} differs between steps ({error})") from error
    return _nested(lambda k, v: _resized(source, f"{key}/{k}" if k else key, v), stacked)


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _decoded(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    return np.asarray(value)


_READERS = {"minari": _read_minari, "lerobot": _read_lerobot, "rlds": _read_rlds}
