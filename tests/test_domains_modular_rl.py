"""Modular RL: limbs removed and nothing else changed, seeds, gaits and the search for them."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from gato_lib.domains import dmc, gaits, modular_rl

PROGRAM = pathlib.Path(__file__).parents[1] / "experiments" / "gaits.py"
_spec = importlib.util.spec_from_file_location("search", PROGRAM)
search = sys.modules["search"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(search)

(DOMAIN,) = modular_rl.DOMAINS
NAMES = list(modular_rl.BODIES)


def play(env: gym.Env, seed: int | None, steps: int = 15):
    """Observations and rewards of random actions, the same ones each time."""
    rng = np.random.default_rng(0)
    observations, rewards = [env.reset(seed=seed)[0]], []
    for _ in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        observation, reward, terminated, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
        if terminated:
            break
    return np.stack(observations), np.array(rewards)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def lowest(env: gym.Env) -> float:
    """Height of the body's lowest point, of capsules and spheres."""
    model, data = env.unwrapped.model, env.unwrapped.data
    mujoco.mj_resetData(model, data)
    mujoco.mj_forward(model, data)
    ends = []
    for i in range(model.ngeom):
        if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_PLANE:
            continue
        half = model.geom_size[i, 1] if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_CAPSULE else 0
        along = abs(data.geom_xmat[i].reshape(3, 3)[2, 2])
        ends.append(data.geom_xpos[i, 2] - half * along - model.geom_size[i, 0])
    return min(ends)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_bodies_of_the_table(name):
    """They are connected, and every joint but the root's three has its motor."""
    model = DOMAIN.make_env(name).unwrapped.model
    bodies = [model.body(i).name for i in range(1, model.nbody)]
    assert bodies[0] == "torso" and sorted(bodies[1:]) == sorted(modular_rl.BODIES[name])
    assert str(len(bodies)) in name.split("_")
    for i in range(2, model.nbody):
        assert model.body(model.body_parentid[i]).name in bodies
    joints = [model.joint(i).name for i in range(model.njnt)]
    assert joints[:3] == ["rootx", "rootz", "rooty"]
    motors = [model.joint(model.actuator_trnid[i, 0]).name for i in range(model.nu)]
    assert sorted(motors) == sorted(joints[3:])


@pytest.mark.parametrize("name", NAMES)
def test_spaces_match_the_model(name):
    env = DOMAIN.make_env(name)
    model = env.unwrapped.model
    assert env.action_space.shape == (model.nu,) and env.action_space.dtype == np.float32
    assert env.observation_space.shape == (model.nq + model.nv - 1,)
    observations, _ = play(env, seed=3)
    assert all(env.observation_space.contains(observation) for observation in observations)


def test_morphologies_differ_in_size():
    shapes = {DOMAIN.make_env(name).action_space.shape for name in NAMES}
    assert len(NAMES) >= 8 and len(shapes) >= 6


@pytest.mark.parametrize(
    "name, env_id", [("walker_7_full", "Walker2d-v5"), ("hopper_4_full", "Hopper-v5")]
)
def test_full_body_is_gymnasiums_own(name, env_id):
    env = DOMAIN.make_env(name)
    assert env.spec.max_episode_steps == gym.spec(env_id).max_episode_steps == modular_rl.STEPS
    for seed in range(3):
        assert_same(play(env, seed, 100), play(gym.make(env_id), seed, 100))


@pytest.mark.parametrize("name", NAMES)
def test_starts_on_the_ground_and_healthy(name):
    """At the height at which the full body starts, however short the legs."""
    full = next(n for n in NAMES if n.split("_")[0] == name.split("_")[0])
    env = DOMAIN.make_env(name)
    assert lowest(env) == pytest.approx(lowest(DOMAIN.make_env(full)), abs=1e-3)
    observation, _ = env.reset(seed=0)
    assert env.unwrapped.is_healthy
    assert observation[0] == pytest.approx(modular_rl.height(name), abs=0.01)
    assert 0 < modular_rl.least(name) < 0.75 * modular_rl.height(name)


def test_ends_when_the_body_falls():
    env = DOMAIN.make_env("walker_3_no_shins")
    env.reset(seed=0)
    for _ in range(modular_rl.STEPS):
        *_, terminated, truncated, _ = env.step(env.action_space.high)
        if terminated:
            break
    assert terminated and not truncated


@pytest.mark.parametrize(
    "name", ["walker_6_no_left_foot", "hopper_4_full", "humanoid_2d_9_no_arms"]
)
def test_seed_fixes_the_episode(name):
    env = DOMAIN.make_env(name)
    first = play(env, seed=5)
    play(env, seed=None)
    other = play(env, seed=6)
    assert (first[0][0] != other[0][0]).any()
    assert_same(first, play(env, seed=5))
    assert_same(first, play(DOMAIN.make_env(name), seed=5))


def test_humanoid_moves_in_a_plane():
    env = DOMAIN.make_env("humanoid_2d_13_full")
    play(env, seed=0)
    model, data = env.unwrapped.model, env.unwrapped.data
    sideways = data.xpos[:, 1].copy()
    mujoco.mj_resetData(model, data)
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(sideways, data.xpos[:, 1], atol=1e-9)


def rollout(env: gym.Env, expert, seed: int, steps: int):
    observation, _ = env.reset(seed=seed)
    expert.reset(env)
    action, actions, total = None, [], 0.0
    for _ in range(steps):
        action = expert.act(observation, action)
        assert env.action_space.contains(action)
        actions.append(action)
        observation, reward, terminated, *_ = env.step(action)
        total += reward
        if terminated:
            break
    return total, np.stack(actions)


@pytest.mark.parametrize("name", NAMES)
def test_expert_walks_where_random_falls(name):
    """And plays an episode the same way again: it depends on what is observed and nothing else."""
    env, expert = DOMAIN.make_env(name), DOMAIN.make_expert(name)
    first = rollout(env, expert, seed=1, steps=150)
    assert len(first[1]) == 150
    assert first[0] > 2 * play(env, seed=1, steps=150)[1].sum()
    rollout(env, expert, seed=2, steps=10)
    again = rollout(env, expert, seed=1, steps=150)
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_search_simulates_what_is_played(name):
    """The first fifty steps, from a start without noise: what follows is chaotic."""
    env, body = DOMAIN.make_env(name), search.Body(name, coarse=False)
    for sim in (env.unwrapped, body._env):
        sim._reset_noise_scale = 0.0
    total, actions = rollout(env, DOMAIN.make_expert(name), seed=0, steps=50)
    assert len(actions) == 50
    assert body.play(gaits.MAPS[name], seed=0, steps=50) == pytest.approx(total, rel=1e-4)


def test_a_gait_is_found():
    """In seconds, a hopper's that stays up for longer than one that does nothing."""
    body = search.Body("hopper_4_full", coarse=True)
    one = search.Search.begin(body, noise=0.1)
    before = body.play(one.gait_of(one.weights), seed=0)
    rng = np.random.default_rng(0)
    one.run(body, 60_000, rng, upright=0.3, fastest=1.5, rate=0.03, width=0.05)
    assert np.mean([body.play(one.gait, seed) for seed in range(5)]) > 3 * before


@pytest.mark.parametrize("name", dmc.MAPPED)
def test_the_search_simulates_dm_control(name):
    """The first second of it: what follows is not the same to the last digit, and chaotic."""
    env, task = dmc.Suite(name), search.SuiteTask(name, coarse=False)
    expert = dmc.DOMAINS[0].make_expert(name)
    observation, _ = env.reset(seed=3)
    expert.reset(env)
    total = 0.0
    for _ in range(40):
        observation, reward, *_ = env.step(expert.act(observation, None))
        total += reward
    assert task.play(gaits.MAPS[name], seed=3, steps=40) == pytest.approx(total, rel=1e-3)


def test_what_is_written_is_read_back():
    text = search.written(gaits.MAPS)
    assert text == pathlib.Path(gaits.__file__).read_text()
    read = {}
    exec(text, read)
    assert list(read["MAPS"]) == [*NAMES, *dmc.MAPPED]
    for name, gait in gaits.MAPS.items():
        np.testing.assert_array_equal(read["MAPS"][name], gait)
    for name in NAMES:
        env = DOMAIN.make_env(name)
        shape = env.observation_space.shape[0] + 1, env.action_space.shape[0]
        assert gaits.MAPS[name].shape == shape


def test_declares_what_decides_the_data():
    assert DOMAIN.name == "modular_rl" and {"modular_rl.py", "gaits.py"} == set(DOMAIN.sources)
    assert list(DOMAIN.tasks) == [f"modular_rl/{name}" for name in NAMES]
