"""Data sets of others: what the formats' own libraries wrote, and damaged copies of it.

tests/data holds two episodes each, of 5 and 7 frames: images whose brightness counts the frames,
a state of three numbers, two-dimensional actions. They were written by lerobot 0.3.3 and 0.4.4, and
by tensorflow-datasets 4.9.10.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import pathlib
import shutil

import gymnasium as gym
import h5py
import minari
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
from minari.data_collector import EpisodeBuffer

from gato_lib import collection, importing, workbook
from gato_lib.config import ConfigError, TrainConfig, model_config
from gato_lib.episodes import DataError, flatten
from gato_lib.importing import Source

DATA = pathlib.Path(__file__).parent / "data"
TASKS = ["push the red block", "lift it"]


def read(tmp_path, **fields):
    source = Source.parse(
        {"name": "x"} | {k: str(v) if k in importing.KINDS else v for k, v in fields.items()}
    )
    importing.convert(source, str(tmp_path / "out"))
    return importing.load(source, str(tmp_path / "out"))[0]


def refused(tmp_path, match, **fields):
    with pytest.raises(DataError, match=match):
        read(tmp_path, **fields)
    assert not list((tmp_path / "out").glob("*")), "nothing is kept of a refused set"


# --- LeRobot --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lerobot_v2", "lerobot_v2_image", "lerobot_v3"])
def test_lerobot_sets(tmp_path, name):
    recording = read(tmp_path, lerobot=DATA / name)
    first, second = recording.episodes
    assert (first.steps, second.steps) == (5, 7)
    for e, episode in enumerate((first, second)):
        n = episode.steps
        seen = episode.observations
        assert list(seen) == ["images.top", "instruction", "state"]
        assert seen["instruction"] == [TASKS[e]] * (n + 1)
        t = np.minimum(np.arange(n + 1), n - 1)  # the last observation stands twice
        np.testing.assert_array_equal(seen["state"], np.stack([t * 0 + e, t, t * 0 + 0.5], 1))
        brightness = seen["images.top"][:, -1, -1, 0].astype(int)
        assert np.abs(brightness - (30 * e + 20 * t)).max() <= (0 if "image" in name else 2)
        t = np.arange(n)
        np.testing.assert_allclose(episode.actions, np.stack([t / 10, t * 0 - e], 1), atol=1e-6)
        np.testing.assert_array_equal(episode.rewards, t)
        assert episode.success and episode.task == "x/all"
    assert recording.observation_space["images.top"].shape == (48, 64, 3)
    bounds = recording.action_space
    np.testing.assert_allclose([bounds.low, bounds.high], [[0, -1], [0.6, 0]], atol=1e-6)


def test_keys_are_chosen_and_images_resized(tmp_path):
    source = {"lerobot": DATA / "lerobot_v2_image"}
    one = read(tmp_path, keys=["state"], **source)
    assert sorted(one.observation_space) == ["instruction", "state"]
    small = read(tmp_path, image=16, **source)
    assert small.episodes[0].observations["images.top"].shape == (6, 16, 16, 3)
    with pytest.raises(
        DataError, match=r"no observation 'stat'; there are \['images.top', 'state'"
    ):
        read(tmp_path, keys=["stat"], **source)


def test_an_image_of_too_many_tokens_names_the_remedy(tmp_path):
    dataset = minari_set(tmp_path, image=(144, 160, 3))
    refused(tmp_path, "image is 160 x 144 pixels, 90 tokens a step; image: 64", minari=dataset)
    seen = read(tmp_path, minari=dataset, image=64).episodes[0].observations["image"]
    assert seen.shape == (5, 64, 64, 3)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_rows(path, column, values):
    table = pyarrow.parquet.read_table(path)
    position = table.column_names.index(column)
    table = table.remove_column(position)
    if values is not None:
        table = table.append_column(column, [values])
    pyarrow.parquet.write_table(table, path)


ROWS = "data/chunk-000/episode_000001.parquet"
DAMAGES = {
    "truncated": (lambda f: _truncate(f / ROWS), "episode_000001.parquet cannot be read"),
    "no actions": (lambda f: edit_rows(f / ROWS, "action", None), "episode 1: no column 'action'"),
    "unequal": (
        lambda f: edit_rows(f / ROWS, "action", [[0.0, 1.0]] * 6 + [[0.0]]),
        "episode 1: action has rows of different lengths",
    ),
    "another shape": (
        lambda f: edit_rows(f / ROWS, "action", [[0.0]] * 7),
        r"episode 1: actions has shape \(7, 1\), expected \(7, 2\)",
    ),
    "NaN": (
        lambda f: edit_rows(f / ROWS, "observation.state", [[0.0, float("nan"), 1.0]] * 7),
        "episode 1: observations/state holds NaN at step 0",
    ),
    "text": (
        lambda f: edit_rows(f / ROWS, "action", ["left"] * 7),
        "episode 1: actions is list, expected an array",
    ),
    "no image": (
        lambda f: edit_rows(
            f / ROWS, "observation.images.top", [{"bytes": b"GIF", "path": ""}] * 7
        ),
        "episode 1: images.top at step 0 is no image",
    ),
    "no task": (lambda f: edit_rows(f / ROWS, "task_index", [9] * 7), "task_index 9 is not among"),
    "a gap": (
        lambda f: edit_rows(f / ROWS, "frame_index", [0, 1, 2, 4, 5, 6, 7]),
        "episode 1: frame_index does not count from 0 to 6",
    ),
    "a lost file": (
        lambda f: (f / ROWS).unlink(),
        "total_episodes is 2 in meta/info.json, found 1",
    ),
    "no info": (lambda f: (f / "meta/info.json").unlink(), "info.json cannot be read"),
    "an old format": (
        lambda f: edit_json(f / "meta/info.json", codebase_version="v1.6"),
        "format v1.6, expected v2 or v3",
    ),
    "no features": (
        lambda f: edit_json(f / "meta/info.json", features={}),
        "has no feature 'action'",
    ),
    "no rows": (lambda f: shutil.rmtree(f / "data"), r"no data/\*/\*.parquet"),
}


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_lerobot_sets_are_refused(tmp_path, damage):
    folder = tmp_path / "set"
    shutil.copytree(DATA / "lerobot_v2_image", folder)
    apply, match = DAMAGES[damage]
    apply(folder)
    refused(tmp_path, match, lerobot=folder)


def test_damaged_videos_are_refused(tmp_path):
    for name, damage, match in (
        ("cut", _truncate, r"episode 1: observation.images.top: videos/.*000001.mp4"),
        ("gone", lambda p: p.unlink(), "episode_000001.mp4 cannot be read"),
        (
            "short",
            lambda p: shutil.copy(p.with_name("episode_000000.mp4"), p),
            "5 frames at 10 a second for 7",
        ),
    ):
        shutil.copytree(DATA / "lerobot_v2", tmp_path / name)
        (path,) = (tmp_path / name).rglob("episode_000001.mp4")
        damage(path)
        refused(tmp_path, match, lerobot=tmp_path / name)


def test_frames_are_matched_by_time(tmp_path):
    """A video of another rate would give every step the picture of another moment."""
    shutil.copytree(DATA / "lerobot_v2", tmp_path / "fast")
    edit_json(tmp_path / "fast/meta/info.json", fps=5)
    refused(tmp_path, "has 3 frames at 5 a second for 5 rows", lerobot=tmp_path / "fast")
    shutil.copytree(DATA / "lerobot_v3", tmp_path / "late")
    (path,) = (tmp_path / "late/meta/episodes").rglob("*.parquet")
    edit_rows(path, "videos/observation.images.top/from_timestamp", [0.0, 0.7])
    refused(tmp_path, "episode 1: .* has 5 frames at 10 a second for 7", lerobot=tmp_path / "late")


# --- Minari ---------------------------------------------------------------------------------------


def minari_set(tmp_path, data_format="hdf5", image=None, action_space=None, name="test/set-v0"):
    """Two episodes of 4 and 6 steps as Minari writes them; returns the folder."""
    spaces = {"state": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)}
    if image:
        spaces["image"] = gym.spaces.Box(0, 255, image, np.uint8)
    action_space = action_space or gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    rng, buffers = np.random.default_rng(0), []
    for steps in (4, 6):
        seen = {"state": rng.normal(size=(steps + 1, 3))}
        if image:
            seen["image"] = rng.integers(0, 256, (steps + 1, *image), np.uint8)
        buffers.append(
            EpisodeBuffer(
                observations=seen,
                actions=np.stack([action_space.sample() for _ in range(steps)]),
                rewards=list(np.arange(steps, dtype=float)),
                terminations=[False] * (steps - 1) + [True],
                truncations=[False] * steps,
            )
        )
    folder = tmp_path / "minari" / name
    (folder / "data").mkdir(parents=True)
    storage = minari.dataset.minari_storage.MinariStorage.new(
        folder / "data",
        observation_space=gym.spaces.Dict(spaces),
        action_space=action_space,
        env_spec=None,
        data_format=data_format,
        jpeg_encoding=False,
    )
    storage.update_episodes(buffers)
    storage.update_metadata({"dataset_id": name, "minari_version": minari.__version__})
    return folder


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_minari_sets_by_folder_and_by_id(tmp_path, monkeypatch, data_format):
    folder = minari_set(tmp_path, data_format, image=(32, 48, 3))
    recording = read(tmp_path, minari=folder)
    assert [e.steps for e in recording.episodes] == [4, 6]
    dataset = minari.MinariDataset(folder / "data")
    for episode, raw in zip(recording.episodes, dataset, strict=True):
        for key, values in flatten(raw.observations).items():
            np.testing.assert_array_equal(episode.observations[key], values)
        np.testing.assert_array_equal(episode.actions, raw.actions)
        np.testing.assert_array_equal(episode.rewards, raw.rewards)
    actions = np.concatenate([e.actions for e in recording.episodes])
    np.testing.assert_array_equal(recording.action_space.low, actions.min(0))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    same = read(tmp_path, minari="test/set-v0")
    np.testing.assert_array_equal(same.episodes[1].actions, recording.episodes[1].actions)


def test_text_stays_and_keys_are_not_ignored(tmp_path):
    from gato_lib import domains
    from gato_lib.episodes import write_minari

    rng = np.random.default_rng(0)
    expert, env = domains.make_expert("babyai/GoToObj"), domains.make_env("babyai/GoToObj")
    episode = collection.rollout(env, expert, "babyai/GoToObj", 1, 0.0, rng)
    both = env.observation_space, env.action_space
    write_minari(tmp_path / "own", [episode], *both, {"task": "babyai/GoToObj"})
    recording = read(tmp_path, minari=tmp_path / "own", keys=["image"])
    assert sorted(recording.observation_space) == ["image", "mission"]
    bare = dataclasses.replace(episode, observations=episode.observations["image"])
    image = env.observation_space["image"]
    write_minari(tmp_path / "bare", [bare], image, env.action_space, {"task": "babyai/GoToObj"})
    with pytest.raises(DataError, match="observations have no keys to choose from"):
        read(tmp_path, minari=tmp_path / "bare", keys=["image"])
    assert read(tmp_path, minari=tmp_path / "bare").observation_space.shape == image.shape


def test_deep_images_are_refused(tmp_path):
    shutil.copytree(DATA / "lerobot_v2_image", tmp_path / "deep")
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(buffer, "png")
    cells = [{"bytes": buffer.getvalue(), "path": ""}] * 7
    edit_rows(tmp_path / "deep" / ROWS, "observation.images.top", cells)
    refused(tmp_path, "images.top is an image of mode I;16, expected", lerobot=tmp_path / "deep")


def test_known_action_bounds_stay(tmp_path):
    space = gym.spaces.Box(-2, np.array([2, np.inf], np.float32), (2,), np.float32)
    bounds = read(tmp_path, minari=minari_set(tmp_path, action_space=space)).action_space
    assert bounds.low.tolist() == [-2, -2] and bounds.high[0] == 2 and np.isfinite(bounds.high[1])
    other = tmp_path / "other"
    discrete = read(other, minari=minari_set(other, action_space=gym.spaces.Discrete(3)))
    assert discrete.action_space == gym.spaces.Discrete(3)


def test_actions_outside_their_bounds_are_counted(tmp_path):
    folder = minari_set(tmp_path)
    path = folder / "data/metadata.json"
    space = json.loads(json.loads(path.read_text())["action_space"])
    space |= {"low": [-1.0, -1.0], "high": [1.0, 1.0]}
    edit_json(path, action_space=json.dumps(space))
    actions = np.concatenate([e.actions for e in minari.MinariDataset(folder / "data")])
    lines, source = [], Source.parse({"name": "x", "minari": str(folder)})
    importing.convert(source, str(tmp_path / "out"), lines.append)
    recording, card = importing.load(source, str(tmp_path / "out"))
    assert recording.action_space.high.tolist() == [1, 1]
    assert card["clipped_actions"] == (np.abs(actions) > 1).sum() > 0
    assert f"x: {card['clipped_actions']} action values lie outside" in lines[2]


def test_a_set_of_this_workbook_can_be_imported(tmp_path, demonstrations):
    from gato_lib import domains
    from gato_lib.episodes import write_minari

    task = "babyai/GoToObj"
    env = domains.make_env(task)
    both = env.observation_space, env.action_space
    write_minari(tmp_path / "own", demonstrations[task], *both, {"task": task})
    recording = read(tmp_path, minari=tmp_path / "own")
    for mine, theirs in zip(recording.episodes, demonstrations[task], strict=True):
        assert mine.observations["mission"] == theirs.observations["mission"]
        np.testing.assert_array_equal(mine.observations["image"], theirs.observations["image"])
        np.testing.assert_array_equal(mine.actions, theirs.actions)


def edit_hdf5(folder, key, change):
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        group = file["episode_1"]
        values = group[key][()] if key in group else None
        if key in group:
            del group[key]
        new = change(values)
        if new is not None:
            group[key] = new


def _with_nan(values):
    values[2] = np.nan
    return values


def edit_hdf5_steps(folder, steps):
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        file["episode_1"].attrs["total_steps"] = steps


def test_the_readmes_robot_log_is_trained_on(tmp_path, monkeypatch):
    """The README's lines, on arrays of the shapes that it names, into a relative folder."""
    readme = pathlib.Path(__file__).resolve().parent.parent / "README.md"
    section = readme.read_text().split("## Your own robot's log")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    rng = np.random.default_rng(0)
    for i, steps in enumerate((8, 5)):
        np.savez(
            f"logs/{i}.npz",
            camera=rng.integers(0, 256, (steps + 1, 64, 64, 3), np.uint8),
            joints=rng.normal(size=(steps + 1, 7)).astype(np.float32),
            command=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
            reward=np.ones(steps),
        )
    exec(section.split("```python\n")[1].split("```")[0], {})
    imports = [{"name": "arm", "minari": str(tmp_path / "arm")}]
    room = {"context_length": 64, "batch_tokens": 128, "vocabulary_size": 1024}
    data = workbook.data_config("", "others 1", "0", "equal", imports, "", **room)
    prepared = workbook.prepare(workbook.Run(tmp_path / "run", "smoke"), data)
    assert prepared.cards[0]["steps"] == 13
    assert prepared.mixture.describe()[0]["tokens"] == 13 * (16 + 7 + 1 + 7)


def test_an_episode_of_another_length_than_listed_is_refused(tmp_path):
    folder = minari_set(tmp_path)
    edit_hdf5_steps(folder, 9)
    refused(tmp_path, "episode 1: 6 steps, its metadata say 9", minari=folder)


MINARI_DAMAGES = {
    "no rewards": ("rewards", lambda v: None, "episode 1: cannot be read .*rewards"),
    "no state": ("observations/state", lambda v: None, r"observations has keys \[\], expected"),
    "no actions": ("actions", lambda v: None, "episode 1: cannot be read .*actions"),
    "short rewards": ("rewards", lambda v: v[:-1], r"rewards has shape \(5,\), expected \(6,\)"),
    "short states": (
        "observations/state",
        lambda v: v[:-1],
        r"observations/state has shape \(6, 3\), expected \(7, 3\)",
    ),
    "short truncations": ("truncations", lambda v: v[:-1], r"truncations has shape \(5,\)"),
    "NaN": ("observations/state", _with_nan, "observations/state holds NaN at step 2"),
    "NaN actions": ("actions", _with_nan, "actions holds NaN at step 2"),
    "infinite actions": (
        "actions",
        lambda v: np.full_like(v, np.inf),
        "episode 1: actions are not finite",
    ),
    "NaN rewards": ("rewards", _with_nan, "rewards holds NaN at step 2"),
    "a wrong dtype": (
        "actions",
        lambda v: v.astype(int),
        "actions has dtype int64, expected float",
    ),
    "a wrong shape": ("actions", lambda v: v[:, :1], r"actions has shape \(6, 1\), expected"),
    "no steps": ("actions", lambda v: v[:0], "episode 1: the episode has no steps"),
}


@pytest.mark.parametrize("damage", MINARI_DAMAGES)
def test_damaged_minari_sets_are_refused(tmp_path, damage):
    folder = minari_set(tmp_path)
    key, change, match = MINARI_DAMAGES[damage]
    edit_hdf5(folder, key, change)
    refused(tmp_path, match, minari=folder)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_truncated_minari_files_are_refused(tmp_path, data_format):
    folder = minari_set(tmp_path, data_format)
    paths = [p for p in sorted((folder / "data").rglob("*")) if p.suffix == f".{data_format}"]
    _truncate(paths[-1])
    refused(tmp_path, "not a readable|episode [01]: cannot be read", minari=folder)
    shutil.rmtree(folder / "data")
    refused(tmp_path, "not a readable Minari data set", minari=folder)


def test_an_unknown_id_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "download_dataset", offline)
    refused(
        tmp_path,
        r"x \(minari no/such-v0\): cannot be downloaded \(no network\)",
        minari="no/such-v0",
    )
    refused(tmp_path, "neither a folder nor a Minari id", minari="no such folder")
    refused(tmp_path, "there is no such folder", lerobot="nowhere")


# --- RLDS -----------------------------------------------------------------------------------------

needs_tfds = pytest.mark.skipif(
    not importlib.util.find_spec("tensorflow_datasets"),
    reason="the extra rlds is not installed",
)


@needs_tfds
def test_rlds_sets(tmp_path):
    recording = read(tmp_path, rlds=DATA / "rlds")
    assert sorted(e.steps for e in recording.episodes) == [4, 6]  # the last step has no action
    for episode in recording.episodes:
        e, n = int(episode.steps == 6), episode.steps
        seen = episode.observations
        assert seen["instruction"] == [TASKS[e]] * (n + 1)
        np.testing.assert_array_equal(seen["state"][:, 1], np.arange(n + 1))
        np.testing.assert_array_equal(seen["image"][:, -1, -1, 0], 30 * e + 20 * np.arange(n + 1))
        np.testing.assert_array_equal(episode.actions["close"][:, 0], np.arange(n) % 2)
        np.testing.assert_allclose(episode.actions["arm"][:, 0], np.arange(n) / 10)
        np.testing.assert_array_equal(episode.rewards, np.arange(n))
    close = recording.action_space["close"]
    assert (close.low.tolist(), close.high.tolist()) == ([0], [1])


@needs_tfds
def test_damaged_rlds_sets_are_refused(tmp_path):
    shutil.copytree(DATA / "rlds", tmp_path / "set")
    (path,) = (tmp_path / "set").glob("*.tfrecord*")
    _truncate(path)
    refused(tmp_path, r"x \(rlds .*episode [01]: DataLossError", rlds=tmp_path / "set")
    path.unlink()
    refused(
        tmp_path, "not a readable TFDS folder|episode 0: NotFoundError: ", rlds=tmp_path / "set"
    )
    refused(tmp_path, "not a readable TFDS folder", rlds=DATA / "lerobot_v2")


def test_a_missing_extra_names_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(tmp_path, r"pip install -e '.\[rlds\]'", rlds=DATA / "rlds")
    refused(tmp_path, r"pip install -e '.\[lerobot\]'", lerobot=DATA / "lerobot_v2")


# --- as part of a run -----------------------------------------------------------------------------


def settings(imports, **others):
    return workbook.data_config(
        "metaworld/drawer-close",
        "others 2",
        "0",
        "equal",
        imports,
        context_length=96,
        batch_tokens=192,
        vocabulary_size=1024,
        prompt_fraction=0.0,
        **others,
    )


@pytest.mark.slow
def test_imports_are_trained_on_beside_collected_tasks(tmp_path, monkeypatch):
    run = workbook.Run(tmp_path / "run", "smoke")
    config = settings([{"name": "arm", "lerobot": str(DATA / "lerobot_v2_image")}])
    assert dict(config.weights) == {"arm": 0.5, "metaworld": 0.5}
    prepared = workbook.prepare(run, config)
    card = prepared.cards[-1]
    assert (card["task"], card["steps"], card["kept"]) == ("arm/all", 12, 2)
    assert {g.name for g in prepared.mixture.groups} == {"arm", "metaworld"}
    network = model_config("w64d2", text_rows=1024)
    folder, metrics = workbook.train_agent(
        run, "a", network, TrainConfig(steps=6, warmup_steps=1), prepared, report_every=6
    )
    assert set(metrics.domain) <= {"arm", "metaworld"} and metrics.loss.notna().any()
    assert workbook.trained_on(folder).data == config
    alone = workbook.TrainedOn(dataclasses.replace(config, tasks=()), 6)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="nothing to play"):
        patch.setattr(workbook, "trained_on", lambda folder: alone)
        workbook.play(run, folder, 1, 0, lanes=1, prompt="none")
    prepared.content["arm"] = "0" * 8  # had the files changed, this were another agent
    other, _ = workbook.train_agent(
        run, "a", network, TrainConfig(steps=2, warmup_steps=1), prepared, report_every=2
    )
    assert other.name.endswith("0000") and not folder.name.endswith("0000")


def test_a_refused_import_does_not_stop_the_others(tmp_path, capsys):
    shutil.copytree(DATA / "lerobot_v2_image", tmp_path / "bad")
    _truncate(tmp_path / "bad" / ROWS)
    good = minari_set(tmp_path)
    run = workbook.Run(tmp_path / "run", "smoke")
    config = settings(
        [
            {"name": "bad", "lerobot": str(tmp_path / "bad")},
            {"name": "good", "minari": str(good)},
        ]
    )
    with pytest.raises(DataError, match=r"^not imported: bad \(lerobot .*episode_000001.parquet"):
        workbook.prepare(run, config)
    assert "skipping bad" in capsys.readouterr().out
    kept = sorted(p.name.rsplit("-", 1)[0] for p in run.data.iterdir())
    assert kept == ["import", "import-good", "metaworld-drawer-close"]  # and import-good.json


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"minari": "a-v0"}, "expected name, one of minari, lerobot, rlds"),
        ({"name": "a", "minari": "a-v0", "rlds": "b"}, "expected name, one of"),
        ({"name": "a", "mlnari": "a-v0"}, "expected name, one of"),
        ({"name": "A b", "minari": "a-v0"}, "lower-case letters"),
        ({"name": "a", "minari": "a-v0", "keys": "state"}, "keys is a list"),
        ({"name": "a", "minari": "a-v0", "keys": None}, "keys is a list"),
        ({"name": "a", "minari": "a-v0", "keys": 5}, "keys is a list"),
        ({"name": None, "minari": "a-v0"}, "lower-case letters"),
        ({"name": "a", "minari": "a-v0", "image": 50}, "image is a multiple of 16"),
        ({"name": "a", "minari": ""}, "minari is no folder and no id"),
        ("minari", "expected name and one of"),
    ],
)
def test_mistakes_in_the_parameter(fields, match):
    with pytest.raises(ConfigError, match=match):
        Source.parse(fields)


def test_folders_may_be_given_from_the_repository_on():
    (text,) = settings([{"name": "arm", "lerobot": "tests/data/lerobot_v2"}]).imports
    assert Source.load(text).where == str(DATA / "lerobot_v2")


def test_names_of_imports_are_their_own():
    for name, count in (("babyai", 1), ("a", 2)):
        with pytest.raises(ConfigError, match=f"the name '{name}' is taken"):
            settings([{"name": name, "minari": "a-v0"}] * count)
