"""DM Control: the suite unchanged, seeds, images, randomised physics, and the experts."""

from __future__ import annotations

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from dm_control import suite
from dm_control.utils import rewards

from gato_lib.domains import dmc, planning

DOMAINS = {domain.name: domain for domain in dmc.DOMAINS}
STATE = DOMAINS["dmc"]


def names(domain: str) -> list[str]:
    return [spec.name for spec in DOMAINS[domain].tasks.values()]


def play(env: gym.Env, seed: int | None, steps: int = 15):
    """Observations and rewards of random actions, the same ones each time."""
    rng = np.random.default_rng(0)
    observations, scores = [env.reset(seed=seed)[0]], []
    for _ in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        scores.append(reward)
    keys = env.observation_space.keys()
    return {k: np.stack([o[k] for o in observations]) for k in keys}, np.array(scores)


def assert_same(a, b):
    for key in a[0]:
        np.testing.assert_array_equal(a[0][key], b[0][key])
    np.testing.assert_array_equal(a[1], b[1])


def test_domains_hold_the_tasks_they_promise():
    assert list(DOMAINS) == ["dmc", "dmc_pixels", "dmc_random_small", "dmc_random_large"]
    assert len(names("dmc")) >= 12 and len(names("dmc_pixels")) >= 8
    assert len(names("dmc_random_small")) >= 6 and len(names("dmc_random_large")) >= 6
    for domain in DOMAINS:
        assert "cartpole-swingup" in names(domain)
        assert set(names(domain)) <= set(names("dmc"))


@pytest.mark.parametrize("name", names("dmc"))
def test_is_the_suites_own_task(name):
    """Observations and rewards of dm_control itself, and within the declared spaces."""
    env = STATE.make_env(name)
    observations, scores = play(env, seed=3)
    for i in range(len(scores)):
        assert env.observation_space.contains({k: v[i] for k, v in observations.items()})
    random = np.random.RandomState(np.random.default_rng(3).integers(2**32))
    env.reset(seed=3)
    reference = suite.load(*name.split("-"), task_kwargs={"random": random})
    timesteps, rng = [reference.reset()], np.random.default_rng(0)
    for _ in scores:
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        timesteps.append(reference.step(action.astype(np.float64)))
    np.testing.assert_array_equal(scores, [t.reward for t in timesteps[1:]])
    for key, value in observations.items():
        expected = np.stack([np.atleast_1d(t.observation[key]) for t in timesteps])
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_seed_fixes_the_episode(domain):
    name = "cartpole-swingup"
    env = DOMAINS[domain].make_env(name)
    first = play(env, seed=5)
    play(env, seed=None)
    other = play(env, seed=6)
    assert any((first[0][k] != other[0][k]).any() for k in first[0])
    assert_same(first, play(env, seed=5))
    assert_same(first, play(DOMAINS[domain].make_env(name), seed=5))
    env.close()


def test_episodes_end_at_the_step_limit():
    env = STATE.make_env("pendulum-swingup")
    env.reset(seed=0)
    for step in range(dmc.STEPS):
        *_, terminated, truncated, info = env.step(np.zeros(1, np.float32))
        assert (terminated, truncated, info) == (False, step == dmc.STEPS - 1, {})
    env.reset()
    assert not env.step(np.zeros(1, np.float32))[3]


# --- pixels ---


def test_images_show_the_state_and_nothing_else_does():
    env = DOMAINS["dmc_pixels"].make_env("reacher-easy")
    observation, _ = env.reset(seed=0)
    assert list(observation) == ["image"] and env.observation_space.contains(observation)
    again = play(env, seed=0, steps=30)[0]["image"]
    np.testing.assert_array_equal(observation["image"], again[0])
    assert (again[0] != again[-1]).any() and again[0].std() > 5
    env.close()


def test_drawing_leaves_the_physics_alone():
    seen, blind = DOMAINS["dmc_pixels"], STATE
    a = play(seen.make_env("walker-stand"), seed=2)
    b = play(blind.make_env("walker-stand"), seed=2)
    np.testing.assert_array_equal(a[1], b[1])


# --- randomised physics ---


@pytest.mark.parametrize("domain", list(dmc.SPREADS))
def test_every_factor_is_from_one_of_the_two_intervals(domain):
    (a, b), (c, d) = dmc.SPREADS[domain]
    env = DOMAINS[domain].make_env("reacher-easy")
    env.reset(seed=0)
    factors = np.array(list(env.unwrapped.factors.values()))
    low, high = (a <= factors) & (factors <= b), (c <= factors) & (factors <= d)
    assert (low | high).all() and 0.2 < low.mean() < 0.8
    assert len(set(factors)) == len(factors)


def test_the_model_has_the_factors_and_its_masses_follow():
    env = DOMAINS["dmc_random_large"].make_env("reacher-easy")
    nominal = STATE.make_env("reacher-easy").unwrapped.model
    for seed in (0, 1):  # factors multiply the original, not the episode before
        env.reset(seed=seed)
        model, factors = env.unwrapped.model, env.unwrapped.factors
        for i in range(nominal.nu):
            name = nominal.actuator(i).name
            ratio = model.actuator_gear[i, 0] / nominal.actuator_gear[i, 0]
            assert ratio == pytest.approx(factors[f"{name} gear"])
        for kind in ("range", "damping"):
            ratio = getattr(model.joint("wrist"), kind) / getattr(nominal.joint("wrist"), kind)
            np.testing.assert_allclose(ratio, factors[f"wrist {kind}"])
        size = factors["finger size"]  # a ball: its mass grows with the third power
        assert model.geom("finger").size[0] == pytest.approx(nominal.geom("finger").size[0] * size)
        mass = model.body("finger").mass[0] / nominal.body("finger").mass[0]
        assert mass == pytest.approx(size**3 * factors["finger density"])
        inertia = model.body("finger").inertia / nominal.body("finger").inertia
        np.testing.assert_allclose(inertia, size**5 * factors["finger density"])
        np.testing.assert_array_equal(model.geom("ground").size, nominal.geom("ground").size)


def test_the_planner_plans_in_the_randomised_model():
    env = DOMAINS["dmc_random_large"].make_env("cartpole-swingup")
    expert = DOMAINS["dmc_random_large"].make_expert("cartpole-swingup")
    observation, _ = env.reset(seed=1)
    expert.reset(env)
    assert expert._planner._model is env.unwrapped.model
    assert env.action_space.contains(expert.act(observation, None))


# --- the planner ---


def test_spline_goes_through_its_knots_and_holds_the_last():
    weights = planning.spline_weights(np.array([0.0, 1, 2, 3, 9]), np.array([0.0, 2, 4]))
    np.testing.assert_allclose(
        weights, [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    )


def test_tolerances_are_dm_controls():
    x = np.linspace(-3, 3, 61)
    np.testing.assert_allclose(
        dmc._tolerance(x, -0.5, 1, 0.7), rewards.tolerance(x, (-0.5, 1), 0.7), atol=1e-12
    )


# One mass on a rail, pushed by one motor.
TOY = """<mujoco>
  <worldbody><body>
    <joint name="x" type="slide" axis="1 0 0" damping="1"/><geom size="0.1"/>
  </body></worldbody>
  <actuator><motor joint="x" ctrlrange="-1 1"/></actuator>
</mujoco>"""


def toy_planner(gear: float, **settings) -> planning.Planner:
    model = mujoco.MjModel.from_xml_string(TOY)
    model.actuator_gear[0, 0] = gear
    defaults = {"reward": lambda t: t.qpos[..., 0], "horizon": 12, "samples": 16}
    settings = planning.Planning(**defaults | settings)
    return planning.Planner(model, 2, settings, np.random.default_rng(0))


def test_planner_finds_the_best_control():
    planner = toy_planner(1.0)
    data = mujoco.MjData(planner._model)
    for _ in range(20):
        controls = planner.plan(data)
    assert controls.shape == (4, 1) and controls.mean() > 0.9


def test_broken_physics_score_least_and_say_nothing(caplog, capfd):
    planner = toy_planner(1e13)
    data = mujoco.MjData(planner._model)
    mujoco.mj_getState(planner._model, data, planner._state, planner._spec)
    knots = np.zeros((2, *planner._knots.shape))
    knots[1] = 1.0
    np.testing.assert_array_equal(planner._score(knots), [0.0, -np.inf])
    assert not caplog.records and capfd.readouterr() == ("", "")


def trajectory(env: gym.Env, steps: int = 200) -> tuple[planning.Trajectories, np.ndarray]:
    """One random episode as the planner sees it, with the true rewards."""
    sim, rng = env.unwrapped, np.random.default_rng(0)
    env.reset(seed=0)
    parts, scores = [], []
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        scores.append(env.step(action)[1])
        data = sim.data
        parts.append([data.qpos.copy(), data.qvel.copy(), data.sensordata.copy(), data.ctrl.copy()])
    arrays = [np.stack(part)[None] for part in zip(*parts, strict=True)]
    return planning.Trajectories(sim.model, *arrays), np.array(scores)


@pytest.mark.parametrize(
    "name, reward", [("walker-walk", dmc._walker_walk), ("fish-upright", dmc._fish_upright)]
)
def test_planned_rewards_are_the_tasks_own(name, reward):
    t, scores = trajectory(STATE.make_env(name))
    np.testing.assert_allclose(reward(t)[0], scores, atol=1e-9)


@pytest.mark.parametrize("name", ["cartpole-swingup", "reacher-easy"])
def test_experts_beat_random_and_repeat_themselves(name):
    env, expert = STATE.make_env(name), STATE.make_expert(name)

    def episode(act) -> tuple[float, np.ndarray]:
        observation, _ = env.reset(seed=4)
        expert.reset(env)
        total, actions, last = 0.0, [], None
        for _ in range(250):
            last = act(observation, last)
            observation, reward, *_ = env.step(last)
            total += reward
            actions.append(last)
        return total, np.array(actions)

    rng = np.random.default_rng(0)
    score, actions = episode(expert.act)
    random, _ = episode(lambda *_: rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
    assert score > random + 50
    np.testing.assert_array_equal(actions, episode(expert.act)[1])


def test_planner_reads_the_state_and_does_not_change_it():
    """It starts from where noise has led, and leaves no trace in the simulation."""
    env, expert = STATE.make_env("cartpole-swingup"), STATE.make_expert("cartpole-swingup")
    observation, _ = env.reset(seed=0)
    expert.reset(env)
    expert.act(observation, None)
    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    before = np.empty(mujoco.mj_stateSize(env.unwrapped.model, spec))
    after = before.copy()
    mujoco.mj_getState(env.unwrapped.model, env.unwrapped.data, before, spec)
    expert._planner.plan(env.unwrapped.data)
    mujoco.mj_getState(env.unwrapped.model, env.unwrapped.data, after, spec)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(
        expert._planner._state[1 : 1 + env.unwrapped.model.nq], env.unwrapped.data.qpos
    )


# --- feedback ---

FED_BACK = [
    f"{domain}/{name}"
    for domain in DOMAINS
    for name in names(domain)
    if isinstance(DOMAINS[domain].make_expert(name), dmc.FeedbackExpert)
]


@pytest.mark.parametrize("task", FED_BACK)
def test_feedback_solves_whole_episodes(task):
    """Also with noise in what is executed, and in other physics than it was made for."""
    domain, name = task.split("/")
    env, expert = DOMAINS[domain].make_env(name), DOMAINS[domain].make_expert(name)
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=1)
    expert.reset(env)
    total = 0.0
    for _ in range(dmc.STEPS):
        action = expert.act(observation, None)
        assert env.action_space.contains(action)
        action = DOMAINS[domain].perturb(action, 0.1, env, rng)
        observation, reward, *_ = env.step(action)
        total += reward
    assert total > (400 if name in dmc.MAPPED else 700)
    env.close()


@pytest.mark.parametrize("name", dmc.MAPPED)
def test_what_is_mapped_is_what_the_agent_sees(name):
    env = STATE.make_env(name)
    observation, _ = env.reset(seed=0)
    for _ in range(30):
        observation, *_ = env.step(np.ones(env.action_space.shape, np.float32))
    seen = np.concatenate([value.ravel() for value in observation.values()])
    body = name.split("-")[0]
    fastest = {"walker": 10, "cheetah": 20}[body]
    np.testing.assert_array_equal(
        dmc.OBSERVED[body](env.unwrapped.data), seen.clip(-fastest, fastest)
    )
    assert dmc.gaits.MAPS[name].shape == (len(seen) + 1, env.action_space.shape[0])


def test_feedback_is_told_by_the_state_alone():
    """The same in an episode that came to a state and in one that starts there."""
    env, expert = STATE.make_env("ball_in_cup-catch"), STATE.make_expert("ball_in_cup-catch")
    observation, _ = env.reset(seed=0)
    expert.reset(env)
    for _ in range(20):
        observation, *_ = env.step(expert.act(observation, None))
    other, again = STATE.make_env("ball_in_cup-catch"), STATE.make_expert("ball_in_cup-catch")
    other.reset(seed=5)
    again.reset(other)
    other.unwrapped.data.qpos[:] = env.unwrapped.data.qpos
    other.unwrapped.data.qvel[:] = env.unwrapped.data.qvel
    action = expert.act(observation, None)
    np.testing.assert_array_equal(action, again.act(None, None))
    assert np.abs(action).max() > 0
    # Mirrored, sideways controls turn around and the others stay.
    other.unwrapped.data.qpos[[0, 2]] *= -1
    other.unwrapped.data.qvel[[0, 2]] *= -1
    np.testing.assert_allclose(again.act(None, None), action * [-1, 1], atol=1e-6)


def test_the_mass_is_pushed_to_its_target_whichever_way_the_motors_push():
    env, expert = STATE.make_env("point_mass-hard"), STATE.make_expert("point_mass-hard")
    ways = []
    for seed in range(3):
        env.reset(seed=seed)
        expert.reset(env)
        model, data = env.unwrapped.model, env.unwrapped.data
        data.qpos[:], data.qvel[:] = (0.003, -0.002), 0.0
        env.step(expert.act(None, None))
        cosine = data.qvel @ data.qpos / np.linalg.norm(data.qvel) / np.linalg.norm(data.qpos)
        assert cosine == pytest.approx(-1, abs=1e-3)
        ways.append(model.wrap_prm.copy())
    assert (ways[0] != ways[1]).any() and (ways[1] != ways[2]).any()


@pytest.mark.parametrize("spin", [-1.0, 1.0])
def test_the_swing_is_pushed_where_it_is_slow_and_braked_where_it_is_fast(spin):
    env, expert = STATE.make_env("pendulum-swingup"), STATE.make_expert("pendulum-swingup")
    env.reset(seed=0)
    expert.reset(env)
    data = env.unwrapped.data
    data.qpos[:], data.qvel[:] = np.pi, spin  # hanging
    assert expert.act(None, None)[0] == spin
    data.qvel[:] = 15 * spin  # more than it takes to stand
    assert expert.act(None, None)[0] == -spin
