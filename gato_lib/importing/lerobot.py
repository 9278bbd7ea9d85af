"""LeRobot data sets, formats 2 and 3: parquet files of frames, images within them or as videos.

The format has no observation after the last action: the last one stands there again. No token is
made of it.
"""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from gato_lib.episodes import DataError
from gato_lib.importing.base import (
    INSTRUCTION,
    Source,
    as_image,
    as_leaf,
    checked,
    map_leaves,
    space_of,
)

OBSERVATION = "observation."
Rows = dict[str, list[Any]]


def read(source: Source) -> Iterator[Any]:
    """Observation and action space, then the episodes. Raises DataError."""
    root = pathlib.Path(source.where)
    info = _read_json(source, root / "meta" / "info.json")
    version = str(info.get("codebase_version"))
    if version[:2] not in ("v2", "v3"):
        raise DataError(f"{source}: format {version}, expected v2 or v3")
    features = info.get("features") or {}
    tasks = _tasks(source, root, version)
    names = [k.removeprefix(OBSERVATION) for k in features if k.startswith(OBSERVATION)]
    columns = {n: OBSERVATION + n for n in source.choose(names)}
    if tasks and INSTRUCTION in columns:
        raise DataError(f"{source}: an observation and the tasks are both called {INSTRUCTION!r}")
    for column in (*columns.values(), "action"):
        if column not in features:
            raise DataError(f"{source}: meta/info.json has no feature {column!r}")
    kinds = {n: features[c].get("dtype") for n, c in columns.items()}
    if "video" in kinds.values():
        source.needs("av")
    videos = _Videos(source, root, info, version)
    others = ["frame_index", "episode_index", "task_index", "action", "next.reward", "next.success"]
    wanted = [*others, *(columns[n] for n, kind in kinds.items() if kind != "video")]

    def observe(name: str, index: int, rows: Rows) -> Any:
        column, where = columns[name], source.at(index)
        if kinds[name] == "video":
            return videos.frames(index, name, column, len(rows["frame_index"]))
        cells = _column(rows, column, where)
        if kinds[name] == "image":
            return _images(source, root, where, name, cells)
        values = _numbers(cells, where, column)
        return values if isinstance(values, list) else as_leaf(source, name, values)

    spaces, count, frames = None, 0, 0
    for index, rows in _episodes(source, root, wanted):
        where, n = source.at(index), len(rows["frame_index"])
        if index != count:
            raise DataError(f"{where}: expected episode {count}")
        if rows["frame_index"] != list(range(n)):
            raise DataError(f"{where}: frame_index does not count from 0 to {n - 1}")
        observations = {name: observe(name, index, rows) for name in columns}
        if tasks:
            observations[INSTRUCTION] = _instructions(
                _column(rows, "task_index", where), tasks, where
            )
        observations = {
            k: v + v[-1:] if isinstance(v, list) else np.concatenate([v, v[-1:]])
            for k, v in observations.items()
        }
        actions = _numbers(_column(rows, "action", where), where, "action")
        rewards = _numbers(rows.get("next.reward", [0.0] * n), where, "next.reward")
        if np.shape(rewards) != (n, 1):
            raise DataError(
                f"{where}: next.reward has shape {np.shape(rewards)}, expected {(n, 1)}"
            )
        if spaces is None:
            spaces = (
                map_leaves(lambda k, v: space_of(source, k, v), observations),
                space_of(source, "action", actions),
            )
            yield spaces
        yield checked(
            source,
            index,
            *spaces,
            observations=observations,
            actions=actions,
            rewards=rewards[:, 0].astype(np.float64),
            success=bool(np.any(rows.get("next.success", False))),
        )
        count, frames = count + 1, frames + n
    for name, got in (("total_episodes", count), ("total_frames", frames)):
        if info.get(name) != got:
            listed = info.get(name)
            raise DataError(f"{source}: {name} is {listed} in meta/info.json, found {got}")


def _read_json(source: Source, path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: {path.name} cannot be read ({error})") from error


def _read_parquet(source: Source, path: pathlib.Path, columns: Sequence[str] | None = None) -> Any:
    """A table of those of `columns` that there are."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            return file.read([n for n in names if columns is None or n in columns])
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        shown = path.relative_to(source.where)
        raise DataError(f"{source}: {shown} cannot be read ({error})") from error


def _tasks(source: Source, root: pathlib.Path, version: str) -> dict[int, str]:
    """Instructions by task_index; empty where the set has none."""
    path = root / "meta" / ("tasks.parquet" if version.startswith("v3") else "tasks.jsonl")
    if not path.is_file():
        return {}
    try:
        if version.startswith("v3"):
            frame = _read_parquet(source, path).to_pandas().reset_index()
            (text,) = (c for c in frame.columns if frame[c].map(type).eq(str).all())
            rows = frame.rename(columns={text: "task"}).to_dict("records")
        else:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found = {int(row["task_index"]): str(row["task"]) for row in rows}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source}: meta/{path.name} cannot be read ({error!r})") from error
    return found if any(found.values()) else {}


def _instructions(indices: Sequence[int], tasks: Mapping[int, str], where: str) -> list[str]:
    lost = [i for i in indices if i not in tasks]
    if lost:
        raise DataError(f"{where}: task_index {lost[0]} is not among meta/tasks")
    return [tasks[i] for i in indices]


def _episodes(
    source: Source, root: pathlib.Path, columns: Sequence[str]
) -> Iterator[tuple[int, Rows]]:
    """(episode, its rows by column) in the files' order."""
    paths = sorted((root / "data").glob("*/*.parquet"))
    if not paths:
        raise DataError(f"{source}: no data/*/*.parquet")
    for path in paths:
        table = _read_parquet(source, path, columns)
        for key in ("episode_index", "frame_index"):
            if key not in table.column_names:
                raise DataError(f"{source}: {path.relative_to(root)} has no column {key!r}")
        index = table["episode_index"].to_numpy()
        starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1))
        for start, end in zip(starts, [*starts[1:], len(index)], strict=True):
            part = table.slice(int(start), int(end - start))
            yield int(index[start]), {c: part[c].to_pylist() for c in part.column_names}


def _column(rows: Rows, column: str, where: str) -> list[Any]:
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


def _images(
    source: Source, root: pathlib.Path, where: str, key: str, values: Sequence[Any]
) -> np.ndarray:
    """Encoded images, within the rows or as files beside them."""
    images = []
    for step, value in enumerate(values):
        try:
            data = value["bytes"] or (root / value["path"]).read_bytes()
            with PIL.Image.open(io.BytesIO(data)) as image:
                image.load()
        except (
            OSError,
            TypeError,
            KeyError,
            ValueError,
            PIL.Image.DecompressionBombError,
        ) as error:
            raise DataError(f"{where}: {key} at step {step} is no image ({error})") from error
        images.append(as_image(source, key, image))
    return np.stack(images)


class _Videos:
    """The videos of a set.

    In format 2 each episode is a file; in format 3 a file holds several, and meta/episodes says
    where each begins.
    """

    def __init__(self, source: Source, root: pathlib.Path, info: Mapping[str, Any], version: str):
        self._source, self._root, self._info = source, root, info
        self._begins: dict[int, dict[str, Any]] | None = None
        if version.startswith("v3"):
            self._begins = {}
            for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
                table = _read_parquet(source, path)
                wanted = [c for c in table.column_names if c.startswith("videos/")]
                for row in table.select(["episode_index", *wanted]).to_pylist():
                    self._begins[row["episode_index"]] = row

    def _find(self, episode: int, column: str) -> tuple[str, float]:
        """File and time in seconds that an episode begins at."""
        pattern = self._info["video_path"]
        if self._begins is None:
            chunk = episode // int(self._info["chunks_size"])
            return pattern.format(episode_chunk=chunk, video_key=column, episode_index=episode), 0.0
        row, at = self._begins[episode], f"videos/{column}"
        chunk, file = row[f"{at}/chunk_index"], row[f"{at}/file_index"]
        name = pattern.format(video_key=column, chunk_index=chunk, file_index=file)
        return name, float(row[f"{at}/from_timestamp"])

    def frames(self, episode: int, key: str, column: str, count: int) -> np.ndarray:
        """uint8 (count, H, W, C), a frame for each row; raises DataError where they do not fit."""
        import av

        where = f"{self._source.at(episode)}: {column}"
        try:
            fps = float(self._info["fps"])
            name, start = self._find(episode, column)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the metadata names no video ({error!r})") from error
        images: list[np.ndarray] = []
        try:
            with av.open(str(self._root / name)) as container:
                stream = container.streams.video[0]
                container.seek(int(start / stream.time_base), stream=stream)
                for frame in container.decode(stream):
                    late = frame.time - start - len(images) / fps
                    if late < -0.5 / fps:  # before the episode, from where the decoder can begin
                        continue
                    if late > 0.5 / fps:
                        break
                    images.append(as_image(self._source, key, frame.to_ndarray(format="rgb24")))
                    if len(images) == count:
                        break
        except DataError:
            raise
        except (OSError, TypeError, ValueError, IndexError) as error:  # PyAV's derive from these
            raise DataError(f"{where}: {name} cannot be read ({error})") from error
        if len(images) < count:
            text = f"{name} has {len(images)} frames at {fps:g} a second for {count} rows"
            raise DataError(f"{where}: {text}")
        return np.stack(images)
