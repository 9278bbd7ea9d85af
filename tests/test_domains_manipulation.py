"""Manipulation: dm_control's tasks unchanged, seeds, keys, and the scripted experts."""

from __future__ import annotations

import logging

import gymnasium as gym
import numpy as np
import pytest
from dm_control import composer, manipulation

from gato_lib.domains import manipulation as jaco
from gato_lib.domains.base import gaussian
from gato_lib.episodes import flatten

(DOMAIN,) = jaco.DOMAINS
NAMES = [spec.name for spec in DOMAIN.tasks.values()]


def play(env: gym.Env, seed: int | None, steps: int = 10):
    """Observations and rewards of random actions, the same ones each time."""
    rng = np.random.default_rng(0)
    observations, scores = [env.reset(seed=seed)[0]], []
    for _ in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        scores.append(reward)
    return {k: np.stack([o[k] for o in observations]) for k in observations[0]}, np.array(scores)


def expert_episode(name: str, seed: int, steps: int = jaco.STEPS, noise: float = 0.0):
    """Rewards, the expert's actions and the last observation."""
    env, expert = DOMAIN.make_env(name), DOMAIN.make_expert(name)
    observation, _ = env.reset(seed=seed)
    expert.reset(env)
    rewards, actions, last = [], [], None
    for _ in range(steps):
        actions.append(expert.act(observation, last))
        last = gaussian(actions[-1], noise, env, np.random.default_rng([seed, len(actions)]))
        observation, reward, *_ = env.step(last)
        rewards.append(reward)
    env.close()
    return np.array(rewards), np.array(actions), observation


def assert_same(a, b):
    for key in a[0]:
        np.testing.assert_array_equal(a[0][key], b[0][key])
    np.testing.assert_array_equal(a[1], b[1])


def test_tasks():
    assert DOMAIN.name == "manipulation"
    assert NAMES == [
        "reach_site",
        "reach_duplo",
        "lift_brick",
        "place_brick",
        "place_cradle",
        "stack_2_bricks",
    ]
    assert all(f"{name}_features" in manipulation.ALL for name in NAMES)
    assert all(spec.metric == "return" and not spec.sees for spec in DOMAIN.tasks.values())


@pytest.mark.parametrize("name", NAMES)
def test_is_the_suites_own_task(name):
    """Observations and rewards of dm_control itself, in a form that can be stored."""
    env = DOMAIN.make_env(name)
    observations, scores = play(env, seed=3)
    for i in range(len(scores) + 1):
        assert env.observation_space.contains({k: v[i] for k, v in observations.items()})
    assert flatten(env.observation_space).keys() == observations.keys()
    reference = manipulation.load(f"{name}_features", seed=np.random.default_rng(3).integers(2**32))
    timesteps, rng = [reference.reset()], np.random.default_rng(0)
    for _ in scores:
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        timesteps.append(reference.step(action.astype(np.float64)))
    np.testing.assert_array_equal(scores, [t.reward for t in timesteps[1:]])
    assert len(timesteps[0].observation) == len(observations)
    for key, value in timesteps[0].observation.items():
        assert value.shape[0] == 1
        expected = np.concatenate([t.observation[key] for t in timesteps])
        np.testing.assert_array_equal(observations[key.replace("/", ".")], expected)
    env.close()


@pytest.mark.parametrize("name", ["reach_site", "place_brick", "stack_2_bricks"])
def test_seed_fixes_the_episode(name):
    env = DOMAIN.make_env(name)
    first = play(env, seed=5)
    play(env, seed=None, steps=30)
    other = play(env, seed=6)
    assert any((first[0][k] != other[0][k]).any() for k in first[0])
    assert_same(first, play(env, seed=5))
    assert_same(first, play(DOMAIN.make_env(name), seed=5))


def test_unseeded_resets_follow_from_the_seed():
    env = DOMAIN.make_env("reach_site")
    starts = []
    for _ in range(2):
        env.reset(seed=1)
        starts.append([env.reset()[0]["target_position"] for _ in range(3)])
    np.testing.assert_array_equal(*starts)
    assert len({tuple(place) for place in starts[0]}) == 3


def test_observations_are_not_overwritten():
    env = DOMAIN.make_env("reach_site")
    first, _ = env.reset(seed=0)
    before = {k: v.copy() for k, v in first.items()}
    env.step(env.action_space.high)
    for key in first:
        np.testing.assert_array_equal(first[key], before[key])


def test_draws_on_where_the_suite_finds_no_start(monkeypatch):
    env = DOMAIN.make_env("reach_site")
    reset, fails = env._env.reset, [True, True]

    def failing():
        if fails:
            fails.pop()
            raise composer.EpisodeInitializationError("no pose found")
        return reset()

    monkeypatch.setattr(env._env, "reset", failing)
    observation, _ = env.reset(seed=0)
    assert not fails and env.observation_space.contains(observation)


def test_resets_log_no_warnings(caplog):
    env = DOMAIN.make_env("reach_site")
    with caplog.at_level(logging.WARNING):
        env.reset(seed=0)  # where ten poses cannot be reached
    assert not caplog.records


def test_episodes_end_at_the_step_limit():
    env = DOMAIN.make_env("reach_duplo")
    env.reset(seed=0)
    still = np.zeros(9, np.float32)
    for step in range(jaco.STEPS):
        *_, terminated, truncated, info = env.step(still)
        assert (terminated, truncated, info) == (False, step == jaco.STEPS - 1, {})
    assert env._env.step(still).first()  # the suite's own limit is the same


@pytest.mark.parametrize("name", NAMES)
def test_expert_solves_an_episode(name):
    """It ends with nearly all of the reward, through noise."""
    rewards, actions, _ = expert_episode(name, seed=0, noise=0.05)
    assert rewards.sum() > 125 and rewards[-1] > 0.9
    assert actions.dtype == np.float32


def test_expert_beats_random_and_repeats_itself():
    rewards, actions, _ = expert_episode("reach_duplo", 0, 100, noise=0.05)
    env = DOMAIN.make_env("reach_duplo")
    assert rewards.sum() > play(env, 0, 100)[1].sum() + 50
    assert all(env.action_space.contains(action) for action in actions)
    np.testing.assert_array_equal(actions, expert_episode("reach_duplo", 0, 100, noise=0.05)[1])


@pytest.mark.parametrize(
    "name, key", [("place_cradle", "duplo2x4"), ("stack_2_bricks", "duplo2x4_2")]
)
def test_the_brick_is_let_go(name, key):
    rewards, _, last = expert_episode(name, seed=0)
    hand, brick = last["jaco_arm.jaco_hand.pinch_site_pos"], last[f"{key}.position"]
    assert rewards[-1] > 0.99
    assert (
        np.linalg.norm(hand - brick) > 0.08 and np.abs(last[f"{key}.linear_velocity"]).max() < 1e-2
    )


def test_expert_lifts_again_what_it_lost():
    env, expert = DOMAIN.make_env("lift_brick"), DOMAIN.make_expert("lift_brick")
    observation, _ = env.reset(seed=0)
    expert.reset(env)
    opened, heights = 0, []
    for _ in range(jaco.STEPS):
        action = expert.act(observation, None)
        heights.append(observation["duplo2x4.position"][2])
        if max(heights) > 0.1 and opened < 20:
            action[6:] = env.action_space.low[6:]
            opened += 1
        observation, reward, *_ = env.step(action)
    highest = int(np.argmax(np.array(heights) > 0.1))
    assert min(heights[highest:]) < 0.03 and reward == 1
