"""The simulators and experts themselves."""

from __future__ import annotations

import numpy as np
import pytest

from gato_lib import collection, domains
from gato_lib.domains import babyai


def test_every_task_is_named_once_and_experts_are_described():
    assert len(domains.TASKS) == 18
    for task, spec in domains.TASKS.items():
        assert task == spec.id == f"{spec.domain}/{spec.name}"
        assert spec.metric in ("return", "success") and spec.floor > 0
        assert spec.floor_source and spec.noise and spec.expert
    assert not domains.HELD_OUT & set(domains.TASKS)


def test_an_unknown_task_names_its_neighbours():
    with pytest.raises(KeyError, match="unknown task 'babyai/GoTo'; known: .*babyai/GoToObj"):
        domains.make_env("babyai/GoTo")
    with pytest.raises(KeyError, match="unknown task 'x'"):
        domains.make_expert("x")


@pytest.mark.parametrize("task", ["babyai/PutNextLocal", "metaworld/push"])
def test_a_seed_fixes_the_episode(task):
    env, expert = domains.make_env(task), domains.make_expert(task)

    def play(seed):
        return collection.rollout(env, expert, task, seed, 0.2, np.random.default_rng(seed))

    first, other, again = play(3), play(4), play(3)
    np.testing.assert_array_equal(first.executed, again.executed)
    np.testing.assert_array_equal(first.rewards, again.rewards)
    assert first.steps != other.steps or not np.array_equal(first.executed, other.executed)


@pytest.mark.parametrize("task", sorted(domains.TASKS))
def test_experts_solve_their_tasks(task):
    env, expert = domains.make_env(task), domains.make_expert(task)
    rng = np.random.default_rng(0)
    solved = [collection.rollout(env, expert, task, s, 0.0, rng).success for s in (11, 12, 13)]
    assert sum(solved) >= 2
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)


def test_babyai_view_is_padded_not_resized():
    env = domains.make_env("babyai/GoToObj")
    image = env.reset(seed=0)[0]["image"]
    assert image.shape == (64, 64, 3) and image[:56, :56].any()
    assert not image[56:].any() and not image[:, 56:].any()
    inner = env
    while not isinstance(inner, babyai.RGBImgPartialObsWrapper):
        inner = inner.env
    view = inner.unwrapped.get_frame(tile_size=8, agent_pov=True)
    np.testing.assert_array_equal(image[:56, :56], view)


def test_metaworld_shows_the_goal_and_stops_at_success():
    env = domains.make_env("metaworld/reach")
    goals = [env.reset(seed=s)[0][-3:] for s in range(3)]
    assert len({tuple(g) for g in goals}) == 3 and np.abs(goals).max() > 0.1
    expert, observation = domains.make_expert("metaworld/reach"), env.reset(seed=1)[0]
    expert.reset(env)
    over = False
    while not over:
        observation, _, terminated, truncated, info = env.step(expert.act(observation, None))
        over = terminated or truncated
    assert terminated and info["success"]


def test_noise_is_executed_but_the_label_is_the_experts(demonstrations):
    for episode in demonstrations.values():
        assert any(not np.array_equal(e.actions, e.executed) for e in episode)


def test_the_bot_is_stopped_when_it_hangs(monkeypatch):
    env = domains.make_env("babyai/GoToObj")
    env.reset(seed=0)
    bot = domains.make_expert("babyai/GoToObj")
    bot.reset(env)

    def hang(last):
        while True:
            pass

    monkeypatch.setattr(bot._bot, "replan", hang)
    monkeypatch.setattr(babyai, "BOT_SECONDS", 0.1)
    with pytest.raises(domains.ExpertError, match="TimeoutError"):
        bot.act(None, None)
