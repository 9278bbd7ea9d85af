"""Shards, Minari data sets, validation, the return filter."""

from __future__ import annotations

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest

from gato_lib import domains, episodes, files
from gato_lib.episodes import DataError, Episode


def spaces(task):
    env = domains.make_env(task)
    return env.observation_space, env.action_space


def assert_same(a, b):
    for name in ("observations", "actions", "executed", "rewards"):
        one, other = (episodes.flatten(getattr(x, name)) for x in (a, b))
        assert list(one) == list(other)
        for key, value in one.items():
            if isinstance(value, list):
                assert value == other[key]
            else:
                np.testing.assert_array_equal(value, other[key])
    assert (a.task, a.success, a.seed) == (b.task, b.success, b.seed)


@pytest.mark.parametrize("task", ["babyai/GoToObj", "metaworld/drawer-close"])
def test_shard_and_minari_are_lossless(tmp_path, demonstrations, task):
    written = demonstrations[task]
    episodes.write_shard(tmp_path / "0.npz", written[0])
    assert_same(episodes.read_shard(tmp_path / "0.npz"), written[0])
    episodes.write_minari(tmp_path / "set", written, *spaces(task), {"task": task, "x": 1})
    back, metadata = episodes.read_minari(tmp_path / "set")
    assert metadata == {"task": task, "x": 1} and len(back) == 2
    stored = json.loads((tmp_path / "set/data/metadata.json").read_text())
    size = sum(p.stat().st_size for p in (tmp_path / "set").rglob("*") if p.is_file()) / 1e6
    assert stored["dataset_size"] == pytest.approx(size, abs=0.1)
    for a, b in zip(written, back, strict=True):
        assert_same(a, b)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.npz", "set"]  # nothing left over


@pytest.fixture
def nested():
    """Three steps with a tuple in the observation and in the action, and their spaces."""
    spaces = gym.spaces
    observation_space = spaces.Dict(
        {
            "words": spaces.Text(9),
            "pair": spaces.Tuple(
                [spaces.Discrete(4, start=2), spaces.Box(-1, 1, (2,), np.float64)]
            ),
        }
    )
    action_space = spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (1,), np.float32)])
    actions = (np.array([0, 1, 1]), np.zeros((3, 1), np.float32))
    observations = {
        "words": ["go", "on", "", "stop"],
        "pair": (np.array([2, 3, 4, 5]), np.linspace(-1, 1, 8).reshape(4, 2)),
    }
    episode = Episode("t/x", observations, actions, actions, np.arange(3.0), True, 7)
    return episode, observation_space, action_space


def test_nested_episodes_are_stored_and_checked(tmp_path, nested):
    episode, *both = nested
    assert episode.steps == 3
    episodes.validate(episode, *both, "here")
    episodes.write_shard(tmp_path / "0.npz", episode)
    back = episodes.read_shard(tmp_path / "0.npz")
    assert_same(back, episode)
    assert isinstance(back.observations["pair"], tuple) and isinstance(back.actions, tuple)
    one = episodes.select(episode.observations, 1)
    assert one["words"] == "on" and one["pair"][0] == 3
    assert both[0].contains({**one, "pair": (np.int64(3), one["pair"][1])})
    with pytest.raises(
        DataError, match="observations/pair/\\[0\\] is 1 at step 1, expected \\[2, 5\\]"
    ):
        bad = episode.observations | {"pair": (np.array([2, 1, 4, 5]), np.zeros((4, 2)))}
        episodes.validate(dataclasses.replace(episode, observations=bad), *both, "here")
    with pytest.raises(DataError, match="observations/pair is 1 parts, expected a tuple of 2"):
        bad = episode.observations | {"pair": (np.array([2, 3, 4, 5]),)}
        episodes.validate(dataclasses.replace(episode, observations=bad), *both, "here")
    with pytest.raises(DataError, match="act: observation is dict, expected a tuple"):
        episodes.check_observation({}, both[0]["pair"], "act")


@pytest.mark.parametrize(
    ("space", "values", "message"),
    [
        (
            gym.spaces.MultiDiscrete([3, 3]),
            [[0, 2], [0, 3]],
            r"x is 3 at step 1, expected \[0, 2\]",
        ),
        (gym.spaces.MultiBinary(2), [[0, 1], [2, 0]], r"x is 2 at step 1, expected \[0, 1\]"),
        (
            gym.spaces.Box(-5, 5, (2,), np.int64),
            [[6, 0], [0, 0]],
            r"x is 6 at step 0, expected \[-5",
        ),
    ],
)
def test_whole_numbers_outside_their_space_are_refused(space, values, message):
    both = np.array(values, space.dtype)
    episode = Episode("t/x", {"x": both}, both[:1, 0], both[:1, 0], np.zeros(1), True, 0)
    spaces = gym.spaces.Dict({"x": space}), gym.spaces.Box(-9, 9, (), space.dtype)
    with pytest.raises(DataError, match=message):
        episodes.validate(episode, *spaces, "here")


def test_an_array_of_no_size_is_not_stored(tmp_path, nested):
    episode, *_ = nested
    spaces = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (0,))}), gym.spaces.Discrete(2)
    with pytest.raises(DataError, match=r"'x' has shape \(0,\), Minari cannot store that"):
        episodes.write_minari(tmp_path / "set", [episode], *spaces, {})
    bare = gym.spaces.Box(-1, 1, (0,)), gym.spaces.Box(-1, 1, (2,))  # both without a key
    with pytest.raises(DataError, match=r"'' has shape \(0,\), Minari cannot store that"):
        episodes.write_minari(tmp_path / "set", [episode], *bare, {})


def test_minari_keeps_nested_episodes(tmp_path, nested):
    episode, *both = nested
    executed = (1 - episode.actions[0], episode.actions[1] + np.float32(0.5))
    episode = dataclasses.replace(episode, executed=executed)
    episodes.write_minari(tmp_path / "set", [episode], *both, {"task": "t/x"})
    (back,), _ = episodes.read_minari(tmp_path / "set")
    assert_same(back, episode)


def test_minari_itself_reads_the_set(tmp_path, demonstrations):
    import minari

    task = "babyai/GoToObj"
    episodes.write_minari(tmp_path / "set", demonstrations[task], *spaces(task), {"task": task})
    dataset = minari.MinariDataset(tmp_path / "set" / "data")
    assert dataset.total_episodes == 2
    first = dataset[0]
    np.testing.assert_array_equal(
        first.observations["image"], demonstrations[task][0].observations["image"]
    )


@pytest.mark.parametrize("damage", ["truncate", "foreign", "missing"])
def test_a_damaged_shard_is_refused(tmp_path, demonstrations, damage):
    path = tmp_path / "7.npz"
    episodes.write_shard(path, demonstrations["babyai/GoToObj"][0])
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "foreign":
        np.savez(path, a=np.zeros(3))
    else:
        path.unlink()
    with pytest.raises(DataError, match="7.npz: not an episode shard"):
        episodes.read_shard(path)


def test_no_pickle_is_loaded(tmp_path):
    np.savez(tmp_path / "p.npz", meta=np.array({"task": "x"}, dtype=object))
    with pytest.raises(DataError, match="not an episode shard"):
        episodes.read_shard(tmp_path / "p.npz")


def test_a_damaged_data_set_names_the_episode(tmp_path, demonstrations):
    task = "metaworld/drawer-close"
    episodes.write_minari(tmp_path / "set", demonstrations[task], *spaces(task), {"task": task})
    (part,) = (tmp_path / "set" / "data" / "1").glob("*.arrow")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DataError, match="set, episode 1: cannot be read"):
        episodes.read_minari(tmp_path / "set")
    with pytest.raises(DataError, match="no Minari data set"):
        episodes.read_minari(tmp_path / "nothing")
    metadata = tmp_path / "set" / "data" / "metadata.json"
    metadata.write_text(json.dumps({"total_episodes": 1}))
    with pytest.raises(DataError, match="not a data set of this workbook"):
        episodes.read_minari(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.zeros(3)}, r"rewards has shape \(3,\), expected"),
        ({"actions": np.zeros((2, 5), np.float32)}, r"actions has shape \(2, 5\), expected"),
        ({"observations": np.full((3, 39), np.nan)}, "observations holds NaN at step 0"),
        ({"observations": np.zeros((3, 39), np.int64)}, "observations has dtype int64"),
        ({"observations": {"x": np.zeros((3, 39))}}, "observations is dict"),
    ],
)
def test_validation_names_the_key(demonstrations, change, message):
    task = "metaworld/drawer-close"
    two = demonstrations[task][0]
    two = dataclasses.replace(
        two,
        observations=two.observations[:3],
        actions=two.actions[:2],
        executed=two.executed[:2],
        rewards=two.rewards[:2],
    )
    episodes.validate(two, *spaces(task), "here")
    with pytest.raises((DataError, AttributeError), match=message):
        episodes.validate(dataclasses.replace(two, **change), *spaces(task), "here, episode 5")


def test_validation_of_nested_observations(demonstrations):
    episode = demonstrations["babyai/GoToObj"][0]
    space, actions = spaces("babyai/GoToObj")
    for key, value, message in (
        ("mission", ["go"], "observations/mission has length 1"),
        ("image", episode.observations["image"][:, :32], "observations/image has shape"),
        ("direction", episode.observations["direction"] + 9, r"expected \[0, 3\]"),
    ):
        bad = dataclasses.replace(episode, observations=episode.observations | {key: value})
        with pytest.raises(DataError, match=message):
            episodes.validate(bad, space, actions, "here")
    assert isinstance(space, gym.spaces.Dict)


def test_expert_return_by_hand():
    # N = 30: windows of 3; the best is (5 + 6 + 7) / 3.
    scores = [0.0] * 10 + [5.0, 6.0, 7.0] + [0.0] * 17
    assert episodes.expert_return(scores) == pytest.approx(6.0)
    assert episodes.expert_return([1.0, 3.0]) == 3.0  # fewer than ten: windows of one
    keep = episodes.keep_mask(scores)
    assert keep.sum() == 3 and keep[10]  # 80 % of 6 is 4.8
    with pytest.raises(ValueError, match="no episodes"):
        episodes.expert_return([])
    with pytest.raises(ValueError, match="positive expert return"):
        episodes.keep_mask([-1.0, -2.0])


def test_atomic_path_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "a") as path:
        path.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
