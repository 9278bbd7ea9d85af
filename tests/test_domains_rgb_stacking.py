"""RGB Stacking: objects, scene, actions, the rule of success, both worlds and the expert."""

from __future__ import annotations

import itertools
import math

import mujoco
import numpy as np
import pytest

from gato_lib import domains
from gato_lib.domains import rgb_stacking
from gato_lib.domains.base import gaussian
from gato_lib.domains.rgb_objects import (
    COLOURS,
    TRAINING,
    TRIPLETS,
    Shape,
    held_out,
    training_shape,
)
from gato_lib.domains.rgb_stacking import (
    CAMERAS,
    HEIGHT,
    HOLD,
    MAX_STEPS,
    OPEN,
    REACH,
    SHIFTED_CAMERAS,
    SPEED,
    STATE,
    STEP,
    TURN,
    YAW,
    RGBStacking,
    Scene,
    Shifted,
    StateMachine,
    Triplet,
    build,
    make_env,
    training,
)

STAY = np.array([0, 0, 0, 0, -1], np.float32)
PAIRS = list(itertools.permutations(COLOURS, 2))
PAIR_NAMES = [f"{upper}-on-{lower}" for upper, lower in PAIRS]


def play(env, seed, noise=0.0, steps=MAX_STEPS):
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
    """Set `upper` down on the middle of `lower`, with the hand out of the way."""
    place, _ = env.pose(lower)
    low, high = env.span(upper)[0] - env.pose(upper)[0][2], env.span(lower)[1]
    env.data.joint(upper).qpos[:3] = [place[0], place[1], high - low + gap]
    env.data.joint(upper).qvel[:] = 0
    move_hand(env, (0.0, 0.0, HEIGHT[1]))
    mujoco.mj_forward(env.model, env.data)


def move_hand(env, place, yaw=0.0):
    env.data.qpos[:4] = env._target[:4] = [*place, yaw]
    env.data.qvel[:4] = 0


def repeat(env, action, steps):
    """The hand's x, y, z and yaw, before and after every step: (steps + 1, 4)."""
    poses = [env.data.qpos[:4].copy()]
    for _ in range(steps):
        env.step(np.asarray(action, np.float32))
        poses.append(env.data.qpos[:4].copy())
    return np.array(poses)


def pixels(image):
    """Pixels that are clearly red, green and blue."""
    image = image.astype(int)
    rest = [np.delete(image, channel, axis=2).max(axis=2) for channel in range(3)]
    return [int((image[..., c] > np.maximum(2 * rest[c], 60)).sum()) for c in range(3)]


@pytest.fixture(scope="module")
def env():
    env = make_env("red-on-blue")
    yield env
    env.close()


@pytest.fixture(scope="module")
def told():
    """Without images, so much faster; otherwise the same."""
    return make_env("red-on-blue", image=0)


# --- Objects --------------------------------------------------------------------------------------


def test_training_shapes_stay_in_their_family_and_fill_it():
    rng = np.random.default_rng(0)
    shapes = [training_shape(rng) for _ in range(2000)]
    for shape in shapes:
        assert held_out(shape) == []
        for name, known in TRAINING.items():
            values = np.atleast_1d(getattr(shape, name))
            if name == "sides":
                assert shape.sides in known
            else:
                assert (known[0] <= values).all() and (values <= known[1]).all()
    assert 0.45 < np.mean([s.is_box for s in shapes]) < 0.55
    others = [s for s in shapes if not s.is_box]
    assert {s.sides for s in others} == {4, 6, 8}
    assert max(s.slant for s in others) > 0.14 and max(max(s.taper) for s in others) > 0.19
    assert np.ptp([s.length for s in shapes]) > 17


def test_every_object_of_a_triplet_is_outside_of_the_training_family():
    assert set(TRIPLETS) == {1, 2, 3, 4, 5}
    for shapes in TRIPLETS.values():
        assert tuple(shapes) == COLOURS
        assert all(held_out(shape) for shape in shapes.values())
    assert held_out(TRIPLETS[1]["red"]) == ["slant"]
    assert held_out(TRIPLETS[3]["red"]) == ["sides"]
    assert held_out(TRIPLETS[4]["green"]) == ["length", "width"]
    every = [s for shapes in TRIPLETS.values() for s in shapes.values()]
    assert sum(not s.is_box for s in every) >= 6 and not any(s.is_box for s in TRIPLETS[1].values())


@pytest.mark.parametrize(
    ("shape", "foot", "top"),
    [
        (
            Shape(40, 30, 20),
            [(20, 15), (-20, 15), (-20, -15), (20, -15)],
            [(20, 15), (-20, 15), (-20, -15), (20, -15)],
        ),
        (  # 0.4 x 44 = 17.6 mm of slant, half of it to each side
            TRIPLETS[1]["red"],
            [(13.2, 20), (-30.8, 20), (-30.8, -20), (13.2, -20)],
            [(30.8, 20), (-13.2, 20), (-13.2, -20), (30.8, -20)],
        ),
        (
            TRIPLETS[1]["blue"],
            [(23, 23), (-23, 23), (-23, -23), (23, -23)],
            [(13.8, 13.8), (-13.8, 13.8), (-13.8, -13.8), (13.8, -13.8)],
        ),
        (  # tapered along its width only
            Shape(40, 20, 30, sides=6, taper=(0.0, 0.5)),
            [(20, 5), (0, 10), (-20, 5), (-20, -5), (0, -10), (20, -5)],
            [(20, 2.5), (0, 5), (-20, 2.5), (-20, -2.5), (0, -5), (20, -2.5)],
        ),
    ],
)
def test_corners_match_the_dimensions(shape, foot, top):
    half = shape.height / 2
    expected = [(*xy, -half) for xy in foot] + [(*xy, half) for xy in top]
    np.testing.assert_allclose(1000 * shape.corners, expected, atol=1e-9)


# mm3: box; sheared box; foot, four times the middle and top by Simpson's rule; 16 triangles.
VOLUMES = [
    (2, "red", 66 * 40 * 38),
    (1, "red", 44 * 40 * 44),
    (1, "green", 38 * (38 + 26.6) / 2 * 30),
    (1, "blue", 40 / 6 * (46**2 + 4 * 36.8**2 + 27.6**2)),
    (3, "red", 16 * 21**2 * math.tan(math.pi / 16) * 42),
    (5, "green", 50 * (50 + 30) / 2 * 40),
]


@pytest.mark.parametrize(("triplet", "colour", "volume"), VOLUMES)
def test_the_compiled_bodies_have_these_shapes_and_masses(triplet, colour, volume):
    scene = Scene(TRIPLETS[triplet], density=700.0)
    model = build(scene)
    body = model.body(colour)
    assert body.mass[0] == pytest.approx(700.0 * volume * 1e-9, rel=1e-6)
    geom = model.geom(body.geomadr[0])
    if scene.objects[colour].is_box:
        sizes = [scene.objects[colour].__dict__[k] / 2000 for k in ("length", "width", "height")]
        np.testing.assert_allclose(geom.size, sizes)
        return
    # MuJoCo moves a mesh to its centre of mass and its axes of inertia; undone, it has our corners.
    mesh = model.mesh(colour)
    first = mesh.vertadr[0]
    vertices = model.mesh_vert[first : first + mesh.vertnum[0]]
    turn = np.zeros(9)
    mujoco.mju_quat2Mat(turn, geom.quat)
    placed = vertices @ turn.reshape(3, 3).T + geom.pos
    key = lambda points: points[np.lexsort(np.round(points, 5).T)]  # noqa: E731
    np.testing.assert_allclose(key(placed), key(scene.objects[colour].corners), atol=1e-6)


# --- Episodes and observations --------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
def test_a_seed_fixes_the_episode_images_and_noise_included(shifted):
    env, fresh = (make_env("red-on-blue", shifted) for _ in range(2))
    first, labels, _ = play(env, 5, 0.3, 40)
    other, _, _ = play(env, 6, 0.3, 5)
    for again, same, _ in (play(env, 5, 0.3, 40), play(fresh, 5, 0.3, 40)):
        np.testing.assert_array_equal(labels, same)
        for a, b in zip(first, again, strict=True):
            for key in env.observation_space:
                np.testing.assert_array_equal(a[key], b[key])
    assert (first[0]["front"] != other[0]["front"]).any()
    assert all(env.observation_space.contains(o) for o in first)
    env.close()
    fresh.close()


@pytest.mark.parametrize("task", ["red-on-blue", "red-on-blue-1"])
def test_a_seed_has_the_same_poses_in_both_worlds(task):
    usual, shifted = make_env(task, image=0), make_env(task, shifted=True, image=0)
    for seed in range(5):
        usual.reset(seed=seed)
        shifted.reset(seed=seed)
        assert usual.scene.objects == shifted.scene.objects
        np.testing.assert_array_equal(usual._target, shifted._target)
        for colour in COLOURS:
            place, corners = usual.pose(colour)
            there, turned = shifted.pose(colour)
            np.testing.assert_allclose(place, there, atol=1e-3)
            np.testing.assert_allclose(corners, turned, atol=1e-3)


def test_no_observation_but_the_images_depends_on_an_object(env):
    observation, _ = env.reset(seed=1)
    assert list(env.observation_space) == ["front", "hand", "proprioception"]
    assert env.observation_space["proprioception"].shape == (STATE,) == (6,)
    assert env.observation_space.contains(observation)
    env.data.joint("red").qpos[:2] += 0.02
    mujoco.mj_forward(env.model, env.data)
    moved = env._observe()
    np.testing.assert_array_equal(moved["proprioception"], observation["proprioception"])
    assert (moved["front"] != observation["front"]).any()
    place, yaw = env.hand()
    np.testing.assert_array_equal(moved["proprioception"][:4], [*place, yaw])
    assert moved["proprioception"][4] == pytest.approx(OPEN, abs=1e-3)
    repeat(env, [0, 0, 0, 0, 1], 1)
    assert env._observe()["proprioception"][5] == env.data.qvel[4] < -0.01  # closing


def test_the_state_variant_tells_poses_and_sizes():
    env = domains.make_env("rgb_stacking_state/red-on-blue-1")
    assert list(env.observation_space) == ["objects", "proprioception"]
    observations, _, info = play(env, 3)
    assert info["success"]
    assert all(env.observation_space.contains(o) for o in observations)
    objects = observations[-1]["objects"]
    assert objects.shape == (45,)
    sizes = [(44, 40, 44), (38, 38, 30), (46, 46, 40)]
    for colour, told, size in zip(COLOURS, objects.reshape(3, 15), sizes, strict=True):
        place, corners = env.pose(colour)
        turn = told[3:12].reshape(3, 3)
        np.testing.assert_array_equal(told[:3], place)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-9)
        np.testing.assert_allclose(TRIPLETS[1][colour].corners @ turn.T, corners, atol=1e-12)
        np.testing.assert_array_equal(told[12:], size)


@pytest.mark.parametrize("image", [64, 128])
def test_the_cameras_see_what_they_should(image):
    for shifted in (False, True):
        env = make_env("red-on-blue", shifted, image)
        for seed in range(4):
            observation, _ = env.reset(seed=seed)
            for camera in ("front", "hand"):
                assert observation[camera].shape == (image, image, 3)
                assert observation[camera].dtype == np.uint8
            seen = np.array(pixels(observation["front"])) * (64 / image) ** 2
            assert (seen > 10).all() and (seen < 200).all()
        env.close()


def test_the_hands_camera_moves_with_it(env):
    env.reset(seed=2)
    place, _ = env.pose("red")
    move_hand(env, [*place[:2], 0.15])
    mujoco.mj_forward(env.model, env.data)
    above = env._observe()["hand"]
    assert pixels(above)[0] > 40
    move_hand(env, [*place[:2], 0.13], yaw=0.3)
    mujoco.mj_forward(env.model, env.data)
    assert (np.abs(env._observe()["hand"].astype(int) - above) > 20).mean() > 0.02


@pytest.mark.parametrize("task", ["red-on-blue", *(f"red-on-blue-{n}" for n in TRIPLETS)])
def test_starts_are_random_in_reach_and_apart(task):
    env = make_env(task, image=0)
    owner, starts = None, []
    for seed in range(25):
        env.reset(seed=seed)
        owner = env.model.geom_bodyid
        bodies = {env.model.body(c).id for c in COLOURS}
        for pair in owner[env.data.contact.geom]:  # each on the table, none against another
            assert 0 in pair and len(bodies & set(pair.tolist())) == 1
        places = np.array([env.pose(c)[0] for c in COLOURS])
        apart = np.linalg.norm(places[:, None, :2] - places[None, :, :2], axis=2)
        assert np.abs(places[:, :2]).max() < 0.172 and apart[np.triu_indices(3, 1)].min() > 0.097
        for colour, place in zip(COLOURS, places, strict=True):
            assert env.span(colour)[0] == pytest.approx(0, abs=5e-4)
            assert place[2] == pytest.approx(env.scene.objects[colour].height / 2000, abs=1e-3)
        (x, y, z), yaw = env.hand()
        assert max(abs(x), abs(y)) < 0.152 and 0.118 < z < 0.252 and abs(yaw) < 1e-3
        assert not env.stacked()
        turn = [math.atan2(*env.data.body(c).xmat.reshape(3, 3)[[1, 0], 0]) for c in COLOURS]
        starts.append(np.concatenate([places[:, :2].ravel(), env.hand()[0], turn]))
    starts = np.array(starts)
    assert (np.ptp(starts[:, :8], axis=0) > 0.2).all() and np.ptp(starts[:, 8]) > 0.08
    assert (np.ptp(starts[:, 9:], axis=0) > 4).all()  # of 2 pi


# --- The rule of success --------------------------------------------------------------------------


@pytest.mark.parametrize("goal", PAIRS)
def test_only_its_own_pair_succeeds(goal):
    env = make_env(f"{goal[0]}-on-{goal[1]}-4", image=0)
    for upper, lower in PAIRS:
        env.reset(seed=3)
        put(env, upper, lower)
        ends = [env.step(STAY) for _ in range(15)]
        assert env.pose(upper)[0][2] > env.span(lower)[1]  # it does stand there
        assert any(end[2] for end in ends) == ((upper, lower) == goal)


def test_training_shapes_set_down_in_the_middle_stand(told):
    solved = 0
    for seed in range(60):
        told.reset(seed=seed)
        put(told, "red", "blue")
        solved += any(told.step(STAY)[2] for _ in range(40))
        assert told.pose("red")[0][2] > told.span("blue")[1]
    assert solved == 60


def test_what_is_between_the_two_counts_as_neither(told):
    told.reset(seed=3)
    put(told, "green", "blue")
    put(told, "red", "green", gap=0.001)
    assert not any(told.step(STAY)[2] for _ in range(15))
    assert told.pose("red")[0][2] > told.span("green")[1] > told.span("blue")[1]


def test_the_stack_must_stand_for_some_steps_on_end(told):
    told.reset(seed=3)
    put(told, "red", "blue")
    stood, ends = [], []
    while not (ends and ends[-1]):
        ends.append(told.step(STAY)[2])
        stood.append(told.stacked())
        assert len(ends) < 20
    assert stood[-HOLD:] == [True] * HOLD and sum(stood) == HOLD == 5
    told.reset(seed=3)
    put(told, "red", "blue")
    while told._stood < HOLD - 1:
        assert not told.step(STAY)[2]
    told.data.joint("red").qvel[2] = 0.3  # up by 5 mm, and the count begins anew
    assert [told.step(STAY)[2] for _ in range(HOLD)] == [False] * HOLD


def test_a_held_or_moving_object_is_not_stacked(told):
    told.reset(seed=3)
    put(told, "red", "blue")
    for _ in range(3):
        told.step(STAY)
    assert told.stacked()
    for part in range(6):
        told.data.joint("red").qvel[part] = 0.5
        assert not told.stacked()
        told.data.joint("red").qvel[part] = 0.0
    assert told.stacked()
    move_hand(told, told.pose("red")[0])
    for _ in range(HOLD + 5):
        assert not told.step(-STAY)[2]
    assert told.data.qpos[4] > 0.01  # the fingers have closed on it
    assert not told.stacked()
    ends = [told.step(STAY)[2] for _ in range(12)]
    assert ends.index(True) >= HOLD - 1


def test_an_episode_of_random_actions_has_400_steps_of_a_20th_of_a_second(told):
    told.reset(seed=0)
    told.action_space.seed(0)
    begin = told.data.time
    for step in range(1, MAX_STEPS + 1):
        _, reward, terminated, truncated, info = told.step(told.action_space.sample())
        assert reward == 0.0 and not terminated and not info["success"]
        assert truncated == (step == 400)
        assert told.data.time - begin == pytest.approx(step / 20)


# --- Actions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("action", [1.0, -1.0, 0.5])
def test_actions_are_velocities(told, axis, action):
    told.reset(seed=0)
    move_hand(told, (0.0, 0.0, 0.2))
    command = STAY.copy()
    command[axis] = action
    poses = repeat(told, command, 12)
    moved = (poses[12] - poses[6]) / (6 * STEP)  # once up to speed
    expected = np.zeros(4)
    expected[axis] = action * (TURN if axis == 3 else SPEED)
    np.testing.assert_allclose(moved, expected, atol=0.01 * abs(expected[axis]))


def test_the_gripper_is_open_or_closed(told):
    def fingers(command):
        told.reset(seed=0)
        out = []
        for level in (command, -command, command):
            for _ in range(15):
                out.append(told.step(np.array([0, 0, 0, 0, level]))[0]["proprioception"][4])
        return np.array(out)

    closed = fingers(1.0)
    np.testing.assert_allclose(closed[[14, 29, 44]], [0.0, OPEN, 0.0], atol=2e-3)
    np.testing.assert_array_equal(fingers(0.01), closed)
    told.reset(seed=0)
    for _ in range(15):
        told.step(-STAY)
    for _ in range(15):
        state = told.step(np.zeros(5))[0]["proprioception"]
    assert state[4] == pytest.approx(OPEN, abs=2e-3)  # exactly 0 opens


def test_the_hand_stays_in_its_workspace(told):
    limits = np.array([[-REACH, -REACH, HEIGHT[0], -YAW], [REACH, REACH, HEIGHT[1], YAW]])
    for axis, side in itertools.product(range(4), (0, 1)):
        told.reset(seed=0)
        for colour, place in zip(COLOURS, (-0.2, 0.0, 0.2), strict=True):  # out of the way
            told.data.joint(colour).qpos[:2] = [-0.2, place]
        move_hand(told, (0.0, 0.0, 0.15))
        command = STAY.copy()
        command[axis] = 2 * side - 1
        reached = repeat(told, command, 45)[:, axis]
        assert reached[-1] == pytest.approx(limits[side, axis], abs=1e-3)
        assert limits[0, axis] - 1e-3 < reached.min() and reached.max() < limits[1, axis] + 1e-3
        command[axis] *= -1  # it comes back at once: what was commanded beyond is forgotten
        back = repeat(told, command, 4)[:, axis]
        assert abs(back[-1] - back[0]) > 2 * STEP * (TURN if axis == 3 else SPEED)


def test_actions_beyond_the_range_are_clipped_and_others_refused(told):
    ends = []
    for action in ([5, -7, 1.5, -3, 9], [1, -1, 1, -1, 1]):
        told.reset(seed=0)
        repeat(told, action, 5)
        ends.append(told.data.qpos.copy())
    np.testing.assert_array_equal(*ends)
    time = told.data.time
    for wrong in ([0, 0, np.nan, 0, 0], np.zeros(4), np.zeros(6), np.zeros((1, 5)), 0.0):
        with pytest.raises(ValueError, match="expected five finite numbers"):
            told.step(np.asarray(wrong))
    assert told.data.time == time
    repeat(told, STAY, 1)
    assert np.isfinite(told.data.qpos).all()


@pytest.mark.parametrize("delay", [1, 3])
def test_an_action_takes_effect_after_the_delay(delay):
    def draw(delay):
        return lambda rng: Scene({c: Shape(40, 40, 40) for c in COLOURS}, delay=delay)

    actions = [*np.random.default_rng(0).uniform(-1, 1, (8, 5)), *[STAY] * delay]
    late, prompt = RGBStacking(draw(delay), image=0), RGBStacking(draw(0), image=0)
    late.reset(seed=0)
    prompt.reset(seed=0)
    start = late.hand()[0]
    seen = []
    for action, before in zip(actions, [*[STAY] * delay, *actions], strict=False):
        late.step(action)
        prompt.step(before)
        np.testing.assert_array_equal(late.data.qpos, prompt.data.qpos)
        seen.append(np.linalg.norm(late.hand()[0] - start))
    assert max(seen[:delay]) < 1e-4 and seen[delay] > 1e-3
    late.reset(seed=0)  # and forgets what was still waiting
    np.testing.assert_allclose(repeat(late, STAY, 2)[-1][:3], start, atol=1e-4)


# --- Scenes and the shifted world -----------------------------------------------------------------


def test_a_scene_sets_cameras_light_friction_and_density():
    above = rgb_stacking.Camera((0, 0, 0.8), (0, 1, 0, -1, 0, 0), fovy=50)
    scene = Scene(
        {c: Shape(40, 40, 40) for c in COLOURS},
        friction=0.4,
        density=1000.0,
        cameras={"above": above},
        light=(0.2, 0.3),
    )
    env = RGBStacking(lambda rng: scene, goal=("blue", "green"), image=32)
    observation, _ = env.reset(seed=0)
    assert set(env.observation_space) == {"above", "proprioception"}
    assert observation["above"].shape == (32, 32, 3)
    np.testing.assert_allclose(env.model.vis.headlight.ambient, 0.2, rtol=1e-6)
    np.testing.assert_allclose(env.model.vis.headlight.diffuse, 0.3, rtol=1e-6)
    assert env.model.camera("above").fovy[0] == 50
    for colour in COLOURS:
        assert env.model.body(colour).mass[0] == pytest.approx(0.064)
        geom = env.model.body(colour).geomadr[0]
        assert env.model.geom_friction[geom, 0] == pytest.approx(0.4)
    put(env, "blue", "green", gap=-0.0001)
    pair = {env.model.body(c).id for c in ("blue", "green")}
    owner = env.model.geom_bodyid
    between = [c for c in env.data.contact if set(owner[c.geom].tolist()) == pair]
    below = [c for c in env.data.contact if 0 in owner[c.geom]]  # on the table
    assert between and below
    assert all(c.friction[0] == pytest.approx(0.4) for c in between + below)
    env.close()


def test_the_shifted_world_is_another_in_all_that_it_says():
    draws = [(training(np.random.default_rng(s)), s) for s in range(50)]
    others = [Shifted(training)(np.random.default_rng(s)) for s in range(50)]
    for (scene, _), other in zip(draws, others, strict=True):
        assert scene.objects == other.objects
        assert 0.6 <= other.friction <= 0.9 < scene.friction
        assert 500 <= other.density <= 900 and scene.density < 500
        assert 0.25 <= other.light[0] <= 0.4 < scene.light[0] and 0.5 <= other.light[1] <= 0.8
        assert (scene.delay, other.delay) == (0, 1)
        assert scene.noise == (0, 0) and min(other.noise) > 0
        assert (scene.cameras, other.cameras) == (CAMERAS, SHIFTED_CAMERAS)
    for name in ("friction", "density", "light"):
        assert len({getattr(other, name) for other in others}) == 50  # drawn in every episode
    assert list(CAMERAS) == list(SHIFTED_CAMERAS)
    for name, camera in CAMERAS.items():
        other = SHIFTED_CAMERAS[name]
        assert camera.on_hand == other.on_hand
        assert 0.005 < math.dist(camera.position, other.position) < 0.08
        axes = [np.reshape(c.axes, (2, 3)) for c in (camera, other)]
        right, up = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in axes)
        angles = np.degrees(np.arccos(np.clip((right * up).sum(axis=1), -1, 1)))
        assert 1 < angles.max() < 15


def test_the_shifted_world_looks_and_weighs_otherwise_and_is_noisy(env):
    shifted = domains.make_env("rgb_stacking_shifted/red-on-blue")
    usual, _ = env.reset(seed=4)
    other, _ = shifted.reset(seed=4)
    for camera in ("front", "hand"):
        assert (np.abs(usual[camera].astype(int) - other[camera]) > 20).mean() > 0.1
    for colour in COLOURS:
        ratio = shifted.model.body(colour).mass[0] / env.model.body(colour).mass[0]
        assert ratio == pytest.approx(shifted.scene.density / 400)
    again = [shifted._observe() for _ in range(30)]
    state = np.std([o["proprioception"] for o in again], axis=0)
    assert (state > 0.0005).all() and (state < 0.0016).all()
    front = np.stack([o["front"] for o in again]).astype(float)
    unsaturated = (front.mean(axis=0) > 30) & (front.mean(axis=0) < 225)
    assert np.median(front.std(axis=0)[unsaturated]) == pytest.approx(6.0, rel=0.1)
    still = [env._observe() for _ in range(2)]
    for key in env.observation_space:
        np.testing.assert_array_equal(still[0][key], still[1][key])
    shifted.close()


# --- Tasks and the expert -------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_every_ordered_pair_is_a_task_with_and_without_a_triplet(pair):
    name = f"{pair[0]}-on-{pair[1]}"
    env = make_env(name, image=0)
    assert env.goal == pair
    assert play(env, 11)[2]["success"]
    for number, shapes in TRIPLETS.items():
        env = make_env(f"{name}-{number}", image=0)
        env.reset(seed=0)
        assert env.goal == pair and env.scene.objects == shapes
    assert play(make_env(f"{name}-5", shifted=True, image=0), 11)[2]["success"]


OTHERS = [
    "",
    "on",
    "red",
    "red-on",
    "redonblue",
    "red-blue",
    "red-on-red",
    "red-on-pink",
    "pink-on-red",
] + ["red-on-blue-0", "red-on-blue-6", "red-on-blue-12", "red-on-blue-x", "red-on-blue-1-1"]


@pytest.mark.parametrize("name", OTHERS)
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}': expected a task as in red-on-blue"):
        make_env(name)


def test_the_expert_stacks_under_noise_that_its_labels_do_not_have(told):
    for seed in (14, 15):
        _, actions, info = play(told, seed, 0.3)
        assert info["success"]
        assert actions.dtype == np.float32 and actions.shape[1] == 5
        assert np.abs(actions).max() <= 1 and set(np.unique(actions[:, 4])) == {-1.0, 1.0}
    clean = play(told, 14)[1]
    np.testing.assert_array_equal(play(told, 14, 0.3, 1)[1][0], clean[0])


def test_the_expert_tries_again_when_the_object_is_lost(told):
    expert = StateMachine()
    observation, info = told.reset(seed=12)
    expert.reset(told)
    dropped = False
    for _ in range(MAX_STEPS):
        observation, _, terminated, truncated, info = told.step(expert.act(observation, None))
        if not dropped and expert._phase == "carry" and told.span("red")[0] > 0.02:
            dropped = True
            told.data.joint("red").qpos[:3] = [0.15, -0.15, 0.03]
            told.data.joint("red").qvel[:] = 0
            assert expert._attempts == 0
        if terminated or truncated:
            break
    assert dropped and info["success"] and expert._attempts >= 1


def test_the_domains_say_what_they_hold():
    names = {"rgb_stacking", "rgb_stacking_shifted", "rgb_stacking_state"}
    assert {d.name for d in rgb_stacking.DOMAINS} == names
    tasks = {"red-on-blue", "blue-on-green-1", *(f"red-on-blue-{n}" for n in range(1, 6))}
    for domain in rgb_stacking.DOMAINS:
        assert domains.DOMAINS[domain.name] is domain
        assert domain.extra == (domain.name == "rgb_stacking_state")
        assert {spec.name for spec in domain.tasks.values()} == tasks
        assert set(domain.sources) == {"rgb_stacking.py", "rgb_objects.py"}
        assert domain.perturb is gaussian
        for task, spec in domain.tasks.items():
            assert spec.domain == domain.name and spec.metric == "success" and spec.floor == 1.0
            assert ("images" in spec.sees) == (
                not domain.extra
            ) and "corners" in spec.sees + "corners"
            assert (task in domains.HELD_OUT) == (spec.name != "red-on-blue")
            env = domains.make_env(task)
            upper, _, lower, *number = spec.name.split("-")
            assert isinstance(env, RGBStacking) and env.goal == (upper, lower)
            draw = env._draw
            assert isinstance(draw, Shifted) == (domain.name == "rgb_stacking_shifted")
            draw = draw.draw if isinstance(draw, Shifted) else draw
            assert draw == (Triplet(int(number[0])) if number else training)
            keys = {"objects"} if domain.extra else {"front", "hand"}
            assert set(env.observation_space) == keys | {"proprioception"}
            assert isinstance(domains.make_expert(task), StateMachine)


# --- At length ------------------------------------------------------------------------------------


def solved(name, episodes, noise=0.0, **settings):
    env = make_env(name, image=0, **settings)
    return [seed for seed in range(episodes) if play(env, seed, noise)[2]["success"]]


@pytest.mark.slow
@pytest.mark.parametrize("shifted", [False, True])
def test_the_expert_solves_nearly_all(shifted):
    assert len(solved("red-on-blue", 100, shifted=shifted)) >= 95
    for task in (*(f"red-on-blue-{n}" for n in TRIPLETS), "blue-on-green-1"):
        assert len(solved(task, 100, shifted=shifted)) >= 85, task


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PAIR_NAMES if n != "red-on-blue"])
def test_the_expert_knows_every_ordered_pair(name):
    assert len(solved(name, 20)) >= 18


def settled(env):
    """Checks that the numbers are sound and that what is let alone comes to rest in the box."""
    speeds = [np.inf]
    while len(speeds) < 30 or (speeds[-1] > 0.02 and len(speeds) < 100):  # what is round may roll
        env.data.qpos[2], env.data.qvel[:6] = HEIGHT[1], 0  # the hand is out of the way
        env._target[2] = HEIGHT[1]
        env._advance(STEP)
        speeds.append(max(np.abs(env.data.joint(c).qvel[:3]).max() for c in COLOURS))
    assert np.isfinite(env.data.qpos).all() and np.isfinite(env.data.qvel).all()
    assert not env.data.warning.number.any()
    for colour in COLOURS:
        place, _ = env.pose(colour)
        assert np.abs(place[:2]).max() < 0.26 and env.span(colour)[0] > -0.002, colour
    assert speeds[-1] <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 250))
def test_physics_is_stable_over_a_thousand_episodes(first):
    tasks = ("red-on-blue", *(f"red-on-blue-{n}" for n in TRIPLETS), "blue-on-green-1")
    worlds = [(make_env(t, s, 0), t, s) for t in tasks for s in (False, True)]
    failures = []
    for seed in range(first, first + 250):
        env, task, shifted = worlds[seed % len(worlds)]
        play(env, seed, 0.3)
        try:
            settled(env)
        except AssertionError as error:
            failures.append((seed, task, shifted, str(error).splitlines()[0]))
    assert not failures


@pytest.mark.slow
def test_physics_is_stable_when_the_hand_runs_into_everything():
    """Each action held for some steps: it presses objects onto the table and into the walls."""
    failures = []
    for seed in range(40):
        env = make_env(f"red-on-blue-{1 + seed % 5}", bool(seed % 2), 0)
        rng = np.random.default_rng(seed)
        env.reset(seed=seed)
        for step in range(MAX_STEPS // 2):
            if step % 12 == 0:
                action = rng.uniform(-1, 1, 5)
                action[2] -= 0.4  # mostly low, among the objects
            env.step(action)
        try:
            settled(env)
        except AssertionError as error:
            failures.append((seed, str(error).splitlines()[0]))
    assert not failures
