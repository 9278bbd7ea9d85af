"""MiniWorld levels: what is seen, that they share a process, and the experts."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from gato_lib.domains import dmlab

DOMAIN = dmlab.DOMAINS[0]
LEVELS = sorted(dmlab.LEVELS)
FORWARD, PICK_UP = 2, 4


@pytest.fixture
def make():
    with contextlib.ExitStack() as stack:

        def make(name):
            return stack.enter_context(contextlib.closing(DOMAIN.make_env(name)))

        yield make


def random_play(env, seed, steps=20):
    """All images and rewards of the first steps of a random walk; yields after each."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    yield observation["image"], 0.0
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(rng.integers(3))
        yield observation["image"], reward
        if terminated or truncated:
            return


def play(env, name, seed, noise=0.0):
    """(sum of rewards, success, steps) of an expert episode."""
    expert, rng = DOMAIN.make_expert(name), np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    expert.reset(env)
    total, steps, over, executed = 0.0, 0, False, None
    while not over:
        action = expert.act(observation, executed)
        executed = DOMAIN.perturb(action, noise, env, rng)
        observation, reward, terminated, truncated, info = env.step(executed)
        total, steps, over = total + reward, steps + 1, terminated or truncated
    return total, info.get("success"), steps


def assert_same(one, other):
    for (image, reward), (image_, reward_) in zip(one, other, strict=True):
        np.testing.assert_array_equal(image, image_)
        assert reward == reward_


@pytest.mark.parametrize("name", LEVELS)
def test_spaces_contain_observations_and_a_seed_fixes_the_episode(make, name):
    env, level = make(name), dmlab.LEVELS[name]
    first, other, again = (list(random_play(env, seed)) for seed in (3, 4, 3))
    assert_same(first, again)
    assert not np.array_equal(first[0][0], other[0][0])
    assert_same(first, list(random_play(make(name), 3)))  # a new one has no past, either
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    assert observation["image"].shape == (64, 80, 3)
    assert env.unwrapped.max_episode_steps == level.steps


@pytest.mark.parametrize("name", LEVELS)
def test_the_expert_does_what_the_level_asks(make, name):
    env, level = make(name), dmlab.LEVELS[name]
    total, success, steps = play(env, name, 12, noise=0.1)
    assert steps <= level.steps
    if level.metric == "success":
        assert success is True and total > 0
    else:
        assert success is None and total >= 0.8 * level.best


def test_levels_played_in_turns_look_as_they_do_alone(make):
    names = ("FourRooms", "WallGap", "CollectHealth", "FourRooms")
    alone = [list(random_play(make(name), seed)) for seed, name in enumerate(names)]
    games = [random_play(make(name), seed) for seed, name in enumerate(names)]
    together = list(zip(*games, strict=True))
    for i, game in enumerate(alone):
        assert_same(game, [turn[i] for turn in together])


def test_closing_one_leaves_the_others_alone(make):
    alone = list(random_play(make("MazeS3"), 1))
    env, other = make("MazeS3"), dmlab.Lab("Sidewalk")
    game = random_play(env, 1)
    played = [next(game) for _ in range(3)]
    other.reset(seed=0)
    other.close()
    other.close()  # a second time is harmless
    assert_same(alone, played + list(game))


def test_another_simulators_context_may_be_current(make):
    mujoco = pytest.importorskip("mujoco")
    ball = "<mujoco><worldbody><light/><geom size='.3' rgba='1 0 0 1'/></worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(ball)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    alone = list(random_play(make("PickupObjects"), 2, 10))
    with mujoco.Renderer(model, 32, 32) as renderer:

        def picture():
            renderer.update_scene(data)
            return renderer.render()

        before, together = picture(), []
        for turn in random_play(make("PickupObjects"), 2, 10):
            together.append(turn)
            np.testing.assert_array_equal(picture(), before)
    assert before.any()
    assert_same(alone, together)


def test_walls_are_drawn_as_miniworld_draws_them(make):
    env = make("WallGap")
    env.reset(seed=0)
    world = env.unwrapped
    ours = world.render_obs()
    base = dmlab._world_class("WallGap").__mro__[1]
    base._render_static(world)
    world._render_world = lambda *args, **kwargs: base._render_world(world, *args, **kwargs)
    np.testing.assert_array_equal(world.render_obs(), ours)


def test_every_episode_has_its_own_sign_and_mission(make):
    env = make("Sign")
    seen = {(env.reset(seed=s)[0]["mission"], env.unwrapped._color_index) for s in range(30)}
    assert len(seen) == 6 and len({mission for mission, _ in seen}) == 2


def test_the_sign_is_in_view_before_the_expert_goes_by_it(make):
    env, expert = make("Sign"), DOMAIN.make_expert("Sign")
    for seed in range(5):
        env.reset(seed=seed)
        expert.reset(env)
        world, over = env.unwrapped, False
        while not over and not expert._read:
            before = world.agent.pos.copy(), world.agent.dir
            action = expert.act(None, None)
            *_, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
        assert expert._read
        sign = expert._sign.pos - before[0]
        error = np.angle(np.exp(1j * (np.arctan2(-sign[2], sign[0]) - before[1])))
        assert abs(error) < np.radians(35) and sign[0] > 3


def test_touching_the_wrong_thing_is_no_success(make):
    env = make("Sign")
    env.reset(seed=0)
    world = env.unwrapped
    wrong = world._objects[1 - world._goal][world._color_index]
    world.agent.pos = wrong.pos + np.array([0.9, 0, 0])
    _, reward, terminated, _, info = env.step(0)
    assert terminated and reward == -1 and info["success"] is False


def test_the_street_is_no_way_out_of_sidewalk(make):
    env = make("Sidewalk")
    env.reset(seed=0)
    world = env.unwrapped
    world.agent.pos, world.agent.dir = np.array([-0.05, 0.0, 5.0]), 0.0
    _, reward, terminated, _, info = env.step(FORWARD)
    assert terminated and reward == 0 and info["success"] is False


def test_objects_by_the_wall_and_in_a_corner_are_picked_up(make):
    env, expert = make("PickupObjects"), DOMAIN.make_expert("PickupObjects")
    for corner in (False, True):
        env.reset(seed=1)
        world = env.unwrapped
        thing = min(world.entities[:-1], key=lambda e: e.radius)
        edge = thing.radius + 0.01
        thing.pos = np.array([edge, 0, edge if corner else 6.0])
        world.entities = [thing, world.agent]
        expert.reset(env)
        for _ in range(200):
            _, reward, *_ = env.step(expert.act(None, None))
            if reward:
                break
        assert reward == 1


def test_noise_only_turns_and_steps(make):
    env = make("CollectHealth")
    rng = np.random.default_rng(0)
    assert {DOMAIN.perturb(PICK_UP, 1.0, env, rng) for _ in range(50)} == {0, 1, 2}
    assert DOMAIN.perturb(PICK_UP, 0.0, env, rng) == PICK_UP


def test_ways_keep_clear_of_walls_and_hazards(make):
    env = make("MazeS3")
    env.reset(seed=0)
    world = env.unwrapped
    hazard = world.rooms[4].outline.mean(0), 0.5
    floor = dmlab.Floor(world, [hazard])
    free = floor.points[floor.free]
    assert dmlab._wall_distance(world, free).min() > world.agent.radius
    assert np.linalg.norm(free - dmlab._flat(hazard[0]), axis=-1).min() > 0.5
    floor.aim(np.linalg.norm(floor.points - dmlab._flat(world.box.pos), axis=-1) < 1)
    assert np.isfinite(floor.distance[floor.free]).mean() > 0.5
    assert np.isinf(floor.distance[~floor.free]).all()
