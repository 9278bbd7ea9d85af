"""RGB Stacking: the scene, the rule of success and the expert."""

from __future__ import annotations

import numpy as np
import pytest

from gato_lib.domains import rgb_stacking
from gato_lib.domains.base import gaussian
from gato_lib.domains.rgb_stacking import OPEN, RGBStacking, Scene, Solid, StateMachine

TASK = "rgb_stacking/red-on-blue"
STAY = np.array([0, 0, 0, 0, -1], np.float32)


def play(env, seed, noise=0.0, steps=400):
    """Every observation, the label actions, and the last step's info."""
    expert, rng = StateMachine(), np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    expert.reset(env)
    observations, actions = [observation], []
    for _ in range(steps):
        actions.append(expert.act(observation, None))
        observation, reward, terminated, truncated, info = env.step(
            gaussian(actions[-1], noise, env, rng)
        )
        observations.append(observation)
        assert reward == float(info["success"]) and terminated == info["success"]
        if terminated or truncated:
            break
    return observations, np.array(actions), info


def put(env, upper, lower, gap=0.0005):
    """Set `upper` down on the middle of `lower`."""
    place, _ = env.pose(lower)
    low, high = env.span(upper)[0] - env.pose(upper)[0][2], env.span(lower)[1]
    env.data.joint(upper).qpos[:3] = [place[0], place[1], high - low + gap]
    env.data.joint(upper).qvel[:] = 0


@pytest.fixture(scope="module")
def env():
    env = RGBStacking()
    yield env
    env.close()


def test_a_seed_fixes_the_episode_images_included(env):
    first, labels, _ = play(env, 5, 0.3, 60)
    other, _, _ = play(env, 6, 0.3, 10)
    again, same, _ = play(env, 5, 0.3, 60)
    np.testing.assert_array_equal(labels, same)
    for a, b in zip(first, again, strict=True):
        for key in env.observation_space:
            np.testing.assert_array_equal(a[key], b[key])
    assert (first[0]["front"] != other[0]["front"]).any()
    assert env.observation_space.contains(env.reset()[0])


def test_both_cameras_see_the_three_objects_and_nothing_tells_where_they_are(env):
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert observation["proprioception"].shape == (19,)
    for camera in ("front", "side"):
        image = observation[camera].astype(int)
        for channel in range(3):
            rest = np.delete(image, channel, axis=2).max(axis=2)
            assert 10 < (image[..., channel] > 2 * rest).sum() < 300
    before = observation["proprioception"]
    env.data.joint("red").qpos[:2] += 0.01
    env._mj.mj_forward(env.model, env.data)
    np.testing.assert_array_equal(env._observe()["proprioception"], before)


def test_starts_are_random_and_in_reach(env):
    starts = []
    for seed in range(20):
        env.reset(seed=seed)
        places = np.array([env.pose(c)[0][:2] for c in env.scene.solids])
        apart = np.linalg.norm(places[:, None] - places[None], axis=2)[np.triu_indices(3, 1)]
        assert np.abs(places).max() < 0.18 and apart.min() > 0.09
        half = np.array([s.half for s in env.scene.solids.values()])
        assert half.min() >= 0.017 and half.max() <= 0.026
        assert not env.stacked()
        starts.append(np.concatenate([places.ravel(), half.ravel(), env.hand()[0]]))
    assert np.std(starts, axis=0).min() > 0.001


def test_success_is_red_on_blue_let_go_for_some_steps(env):
    env.reset(seed=3)
    put(env, "red", "blue")
    ends = [env.step(STAY)[2] for _ in range(12)]
    assert ends.index(True) >= rgb_stacking.HOLD - 1
    for upper, lower in (("red", "green"), ("blue", "red"), ("green", "blue")):
        env.reset(seed=3)
        put(env, upper, lower)
        assert not any(env.step(STAY)[2] for _ in range(12))


def test_a_held_or_moving_object_is_not_stacked(env):
    env.reset(seed=3)
    put(env, "red", "blue")
    for _ in range(3):
        env.step(STAY)
    assert env.stacked()
    env.data.joint("red").qvel[0] = 0.1
    assert not env.stacked()
    env.data.joint("red").qvel[0] = 0.0
    place, _ = env.pose("red")
    env.data.qpos[:3] = env._target[:3] = [place[0], place[1], place[2]]
    for _ in range(8):
        env.step(-STAY)
    assert env.data.qpos[4] > 0.01  # the fingers have closed on it
    assert not env.stacked()


def test_the_expert_stacks_also_under_noise_and_random_does_not(env):
    assert all(play(env, seed)[2]["success"] for seed in (11, 12, 13))
    assert all(play(env, seed, 0.3)[2]["success"] for seed in (14, 15))
    env.reset(seed=0)
    env.action_space.seed(0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(rgb_stacking.MAX_STEPS)]
    assert not any(success for success, _ in ends)
    assert [truncated for _, truncated in ends].index(True) == rgb_stacking.MAX_STEPS - 1


def test_the_gripper_is_open_or_closed(env):
    env.reset(seed=0)
    for command, opening in ((-0.1, OPEN), (0.1, 0.0), (-1.0, OPEN), (1.0, 0.0)):
        for _ in range(15):
            state = env.step(np.array([0, 0, 0, 0, command]))[0]["proprioception"]
        np.testing.assert_allclose(state[4:6], opening, atol=0.002)


def test_a_scene_sets_cameras_delay_and_friction():
    scene = Scene(
        {c: Solid.box(0.02, 0.02, 0.02) for c in rgb_stacking.COLOURS},
        friction=0.4,
        cameras={"above": ("0 0 .8", "0 1 0 -1 0 0")},
        delay=3,
    )
    env = RGBStacking(lambda rng: scene, goal=("blue", "green"), image=32)
    observation, _ = env.reset(seed=0)
    assert set(env.observation_space) == {"above", "proprioception"}
    assert observation["above"].shape == (32, 32, 3)
    red = env.model.body("red").geomadr[0]
    assert env.model.geom_friction[red, 0] == pytest.approx(0.4)
    start = observation["proprioception"][2]
    up = np.array([0, 0, 1, 0, -1], np.float32)
    heights = [env.step(up)[0]["proprioception"][2] - start for _ in range(5)]
    assert max(heights[:3]) < 1e-4 and heights[3] > 1e-3
    env.close()


def test_other_shapes_can_be_stacked():
    angles = np.arange(6) * np.pi / 3
    prism = np.array(
        [[0.024 * np.cos(a), 0.024 * np.sin(a), z] for a in angles for z in (-0.02, 0.02)]
    )
    taper = np.array([*Solid.box(0.024, 0.024, 0.02).corners])
    taper[taper[:, 2] > 0, :2] *= 0.7
    solids = {"red": Solid(prism), "green": Solid.box(0.02, 0.02, 0.02), "blue": Solid(taper)}
    env = RGBStacking(lambda rng: Scene(solids))
    assert all(play(env, seed)[2]["success"] for seed in (1, 2))
    env.close()


def test_the_domain_says_what_the_expert_sees():
    (domain,) = rgb_stacking.DOMAINS
    assert set(domain.tasks) == {TASK} and "poses" in domain.tasks[TASK].sees
    assert isinstance(domain.make_env("red-on-blue"), RGBStacking)
    assert isinstance(domain.make_expert("red-on-blue"), StateMachine)
