"""Procgen, where it is installed: the games, their serialised states and the planners."""

from __future__ import annotations

import numpy as np
import pytest

# Not "procgen" itself: it loads only with the module that gato_lib.domains.procgen puts in its way.
pytest.importorskip("gym3", reason="make procgen")
pytest.importorskip("filelock", reason="make procgen")

from gato_lib.domains import procgen
from gato_lib.domains.base import random_share
from gato_lib.domains.procgen import GAMES, PLAYER, RIGHT, STAY, UP, Planner, Procgen, entities

(DOMAIN,) = procgen.DOMAINS


def play(env, expert, seed, noise=0.0, steps=1000):
    """Images, executed actions and rewards of an episode."""
    observation, _ = env.reset(seed=seed)
    expert.reset(env)
    rng, executed = np.random.default_rng(seed), None
    images, actions, rewards = [observation["image"]], [], []
    for _ in range(steps):
        executed = random_share(expert.act(observation, executed), noise, env, rng)
        observation, reward, terminated, truncated, _ = env.step(executed)
        images.append(observation["image"])
        actions.append(executed)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.array(images), actions, rewards


def test_the_tasks_are_known_and_say_that_the_expert_sees_the_future():
    assert DOMAIN.installed and len(DOMAIN.tasks) == len(GAMES) >= 6
    for task, spec in DOMAIN.tasks.items():
        assert spec.id == task and spec.metric == "return" and spec.floor > 0
        assert "random numbers to come" in spec.sees


@pytest.mark.parametrize("name", sorted(GAMES))
def test_every_game_starts_and_every_expert_acts(name):
    env = Procgen(name)
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert env.action_space.contains(env.reset()[0]["image"].shape[0] % 15)
    things = entities(env.state())
    assert (things[:, 2] == PLAYER).sum() == 1
    x, y, _ = things[things[:, 2] == PLAYER][0]
    assert 0 < x < 100 and 0 < y < 100
    env.close()


@pytest.mark.parametrize("name", ["bigfish", "leaper"])
def test_a_seed_fixes_the_episode(name):
    env, expert = DOMAIN.make_env(name), DOMAIN.make_expert(name)
    first = play(env, expert, 3, 0.2, 8)
    other = play(env, expert, 4, 0.2, 2)
    again = play(env, expert, 3, 0.2, 8)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[0][0] != other[0][0]).any()
    elsewhere = play(DOMAIN.make_env(name), DOMAIN.make_expert(name), 3, 0.2, 8)
    np.testing.assert_array_equal(first[0], elsewhere[0])


def test_copies_go_on_as_the_game_does():
    env = Procgen("bigfish")
    env.reset(seed=5)
    copies = procgen._Copies("bigfish", 3)
    actions = np.random.default_rng(0).integers(15, size=10)
    rewards, end, images = copies.run([env.state()] * 2, np.stack([actions, actions]))
    played = [env.step(int(a)) for a in actions]
    np.testing.assert_array_equal(rewards[1], [step[1] for step in played])
    assert end[1] == -1 and not any(step[2] for step in played)
    np.testing.assert_array_equal(images[1], played[-1][0]["image"])


def test_entities_follow_the_agent():
    env = Procgen("coinrun")
    env.reset(seed=0)
    places = [entities(env.state())[0]]
    for action in (RIGHT,) * 4 + (STAY,) * 4 + (UP,) * 2:
        env.step(action)
        places.append(entities(env.state())[0])
    assert places[4][0] > places[0][0] and places[10][1] > places[8][1]


def test_the_last_image_is_of_the_episode_that_ended():
    env, expert = Procgen("maze"), Planner("maze")
    images, _, rewards = play(env, expert, 0)
    assert sum(rewards) == 10
    np.testing.assert_array_equal(images[-1], images[-2])


def test_a_plan_that_the_noise_left_is_made_anew():
    env, expert = Procgen("maze"), Planner("maze")
    observation, _ = env.reset(seed=0)
    expert.reset(env)
    first = expert.act(observation, None)
    rest = list(expert._plan)
    assert expert.act(env.step(first)[0], first) == rest[0]
    env.step(STAY)
    expert.act(observation, STAY)
    assert expert._plan == rest[1:]  # the same way from the same cell, found anew


@pytest.mark.parametrize("name", ["maze", "coinrun"])
def test_experts_reach_the_goal_also_under_noise(name):
    env, expert = Procgen(name), Planner(name)
    assert sum(sum(play(env, expert, seed)[2]) for seed in (1, 2, 3)) >= 20
    assert sum(sum(play(env, expert, seed, 0.1)[2]) for seed in (4, 5)) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GAMES))
def test_experts_beat_random(name):
    env, expert = Procgen(name), Planner(name)
    scores = [sum(play(env, expert, seed)[2]) for seed in range(4)]
    rng, chance = np.random.default_rng(0), []
    for seed in range(10):
        env.reset(seed=seed)
        over, score = False, 0.0
        while not over:
            _, reward, terminated, truncated, _ = env.step(int(rng.integers(15)))
            over, score = terminated or truncated, score + reward
        chance.append(score)
    assert np.mean(scores) > np.mean(chance)
