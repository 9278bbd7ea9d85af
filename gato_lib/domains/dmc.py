"""DM Control Suite from state, from pixels, and with randomised physics (paper 3.1, App. F.4).

The environments are dm_control's own, unmodified; the agent sees the suite's observation, or only a
64 x 64 image. Every episode is 1,000 steps of a reward between 0 and 1. In `dmc_random_small` and
`dmc_random_large` each episode draws its own physics: actuator gear; range, stiffness and damping
of joints; size and density of geoms are each multiplied by a factor near 1, as in the paper.

The paper's experts are trained agents (D4PG). Ours plan in the simulator (`planning.py`), for
rewards that add to the task's own what guides a short look-ahead to it; where feedback from the
state is known to do, they are that, or a linear map of the observation found by random search,
which can be followed without knowing what is to come.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains import gaits
from gato_lib.domains.base import Domain, Expert, TaskSpec, gaussian
from gato_lib.domains.planning import Planning, PlanningExpert, Trajectories

STEPS = 1000
IMAGE = 64

# Factors on the physics: from one of two intervals, below and above 1.
SPREADS = {
    "dmc_random_small": ((0.9, 0.95), (1.05, 1.1)),
    "dmc_random_large": ((0.6, 0.8), (1.2, 1.4)),
}
Spread = tuple[tuple[float, float], tuple[float, float]]


# --- Rewards to plan for: the task's own, with something to go by where that is flat. ---


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).sum(-1))


def _tolerance(x: np.ndarray, low: float, high: float, margin: float, at_margin: float = 0.1):
    """dm_control's `rewards.tolerance`: 1 within the bounds, a Gaussian flank of `margin`."""
    outside = np.maximum(np.maximum(low - x, x - high), 0) / margin
    return at_margin ** (outside**2)


def _cartpole(t: Trajectories) -> np.ndarray:
    (x, angle), (speed, spin) = np.moveaxis(t.qpos, -1, 0), np.moveaxis(t.qvel, -1, 0)
    upright = (1 + np.cos(angle)) / 2
    centered = (1 + _tolerance(x, 0, 0, 2)) / 2
    slow = (1 + _tolerance(spin, 0, 0, 5)) / 2
    reward = upright * centered * slow * (5 - (t.control**2).mean(-1)) / 5
    return reward - 0.1 * (x**2 + 0.1 * speed**2)


def _finger_turn(t: Trajectories) -> np.ndarray:
    tip, target = t.sensor("tip"), t.sensor("target")
    distance = _norm((target - tip)[..., [0, 2]])
    there = distance <= t.model.site("target").size[0]
    return there - 5 * distance - 0.01 * np.abs(t.qvel[..., 2])


def _walker_walk(t: Trajectories, rising: float = 0.0) -> np.ndarray:
    height = t.qpos[..., 0] + t.model.body("torso").pos[2]
    upright = (1 + np.cos(t.qpos[..., 2])) / 2
    standing = (3 * _tolerance(height, 1.2, np.inf, 0.6) + upright) / 4
    velocity = t.sensor("torso_subtreelinvel")[..., 0]
    return standing * (5 * velocity.clip(0, 1) + 1) / 6 + rising * np.minimum(height, 1.2)


def _fish_upright(t: Trajectories) -> np.ndarray:
    _, x, y, _ = np.moveaxis(t.qpos[..., 3:7], -1, 0)
    return _tolerance(1 - 2 * (x**2 + y**2), 1, 1, 1)


# --- Feedback: controls from the state at the moment. ---

Control = Callable[[Any, Any], np.ndarray]  # of MuJoCo's model and data


def _reach(model: Any, data: Any) -> np.ndarray:
    """Turn both joints to where the finger meets the target, whichever way is the shorter."""
    upper, lower = model.body("hand").pos[0], model.body("finger").pos[0]
    x, y = model.geom("target").pos[:2]
    bend = np.clip((x**2 + y**2 - upper**2 - lower**2) / (2 * upper * lower), -1, 1)
    bend = min(np.arccos(bend), model.joint("wrist").range[1])
    ways = []
    for wrist in (bend, -bend):
        reach = np.arctan2(lower * np.sin(wrist), upper + lower * np.cos(wrist))
        turn = np.arctan2(y, x) - reach - data.qpos[0]
        turn = (turn + np.pi) % (2 * np.pi) - np.pi
        ways.append(np.array([turn, wrist - data.qpos[1]]))
    return 3.0 * min(ways, key=lambda way: np.abs(way).sum()) - 0.3 * data.qvel


def _swing_up(model: Any, data: Any) -> np.ndarray:
    """Push with the swing, or brake it, to the energy of standing; hold the pole near the top."""
    (angle,), (spin,) = data.qpos, data.qvel
    angle = (angle + np.pi) % (2 * np.pi) - np.pi
    hold = -10 * angle - 2 * spin
    if abs(angle) < 0.2 or (abs(angle) < 0.5 and abs(hold) < 1):
        return np.array([hold])
    arm = model.geom("mass").pos[2]
    energy = (arm * spin) ** 2 / 2 - model.opt.gravity[2] * arm * (np.cos(angle) - 1)
    return np.array([np.copysign(1.0, spin) * np.clip(5 * (0.2 - energy), -1, 1)])


# Of _catch, by row: cup left or right, down or up. By column: where the cup is; where the ball is
# from it; how fast the cup, and the ball from it, are moving, each sideways and upwards; and a
# constant. Found by the cross-entropy method: 25 rounds of 60 draws, three episodes of 300 steps
# each, from standard normal numbers on.
_CATCH = np.array(
    [
        [-0.26, -0.7, -0.96, 2.78, -0.65, 0.35, -1.0, 0.87, 0.74],
        [-1.22, 2.85, -0.57, -0.46, 0.52, 1.28, -0.65, -1.18, 2.35],
    ]
)


def _catch(model: Any, data: Any) -> np.ndarray:
    """A linear map of positions and velocities; the ball's side of the cup counts as the right."""
    cup = model.body("cup").pos[[0, 2]] + model.site("target").pos[[0, 2]] + data.qpos[:2]
    ball = model.body("ball").pos[[0, 2]] + data.qpos[2:]
    side = np.array([1.0 if ball[0] >= cup[0] else -1.0, 1.0])
    pairs = [5 * data.qpos[:2], 5 * (ball - cup), data.qvel[:2], data.qvel[2:] - data.qvel[:2]]
    state = np.concatenate([*(side * pair for pair in pairs), [1.0]])
    return side * (_CATCH @ state).clip(-1, 1)


def _to_target(model: Any, data: Any) -> np.ndarray:
    """Push the mass to its target as a damped spring would, whichever way each motor pushes."""
    pushes = model.wrap_prm.reshape(-1, 2)  # each motor's, along x and y
    distance = data.qpos - model.geom("target").pos[:2]
    return np.linalg.solve(pushes.T, -20 * distance - 6 * data.qvel)


def _balance(model: Any, data: Any) -> np.ndarray:
    """Drive the cart under the pole, and further the further that leans or the cart is off."""
    angle = (data.qpos[1] + np.pi) % (2 * np.pi) - np.pi
    return np.array([3 * angle + 0.8 * data.qvel[1] + 0.2 * data.qpos[0] + 0.3 * data.qvel[0]])


def _walker_observed(data: Any) -> np.ndarray:
    axes = data.xmat[1:, [0, 2]].ravel()
    return np.concatenate([axes, data.xpos[1:2, 2], data.qvel.clip(-10, 10)])


def _cheetah_observed(data: Any) -> np.ndarray:
    return np.concatenate([data.qpos[1:], data.qvel.clip(-20, 20)])


# Of MuJoCo's data, the numbers observed, in the order of the suite's keys, speeds clipped; by body.
OBSERVED = {"walker": _walker_observed, "cheetah": _cheetah_observed}
# Tasks that a linear map of these plays, found by experiments/gaits.py.
MAPPED = ("walker-stand", "cheetah-run")


def _mapped(task: str, model: Any, data: Any) -> np.ndarray:
    gait = gaits.MAPS[task]
    return OBSERVED[task.split("-")[0]](data) @ gait[:-1] + gait[-1]


class FeedbackExpert(Expert):
    """Plays a function of the simulation's model and state, clipped to what controls can be."""

    def __init__(self, control: Control):
        self._control = control

    def reset(self, env: gym.Env) -> None:
        self._sim = env.unwrapped

    def act(self, observation: Any, executed: Any | None) -> np.ndarray:
        space = self._sim.action_space
        controls = self._control(self._sim.model, self._sim.data)
        return controls.clip(space.low, space.high).astype(np.float32)


# --- Tasks ---

_EXPERTS: dict[str, Planning | Control] = {
    "reacher-easy": _reach,
    "reacher-hard": _reach,
    "point_mass-easy": _to_target,
    "point_mass-hard": _to_target,
    "pendulum-swingup": _swing_up,
    "cartpole-balance": _balance,
    "cartpole-balance_sparse": _balance,
    "cartpole-swingup": Planning(_cartpole, horizon=100, samples=24),
    "ball_in_cup-catch": _catch,
    "finger-turn_easy": Planning(_finger_turn, horizon=40, samples=48),
    "finger-turn_hard": Planning(_finger_turn, horizon=40, samples=48),
    **{task: functools.partial(_mapped, task) for task in MAPPED},
    "walker-walk": Planning(
        functools.partial(_walker_walk, rising=0.3), horizon=32, samples=24, timestep=0.00625
    ),
    "fish-upright": Planning(
        _fish_upright, horizon=40, samples=20, timestep=0.01, spacing=10, fresh=0.5
    ),
}

_PIXELS = (
    "reacher-easy",
    "point_mass-easy",
    "pendulum-swingup",
    "cartpole-balance",
    "cartpole-balance_sparse",
    "cartpole-swingup",
    "ball_in_cup-catch",
    "finger-turn_easy",
    "walker-stand",
)
_RANDOM = {
    "dmc_random_small": (
        "reacher-easy",
        "point_mass-easy",
        "point_mass-hard",
        "cartpole-balance",
        "cartpole-balance_sparse",
        "cartpole-swingup",
        "ball_in_cup-catch",
        "finger-turn_easy",
        "walker-stand",
        "fish-upright",
    ),
    # Only where no draw makes the task impossible, as a short joint range does for a target near
    # the arm's base, and weak motors for a pendulum or for a walker that has to get up.
    "dmc_random_large": (
        "reacher-easy",
        "point_mass-easy",
        "point_mass-hard",
        "cartpole-balance",
        "cartpole-balance_sparse",
        "cartpole-swingup",
        "fish-upright",
    ),
}


# --- Environments ---


def randomize(spec: Any, spread: Spread, rng: np.random.Generator) -> dict[str, float]:
    """Multiply a MuJoCo model description's physics by random factors, in place.

    Each gear, each joint's range, stiffness and damping, and each geom's size and density has a
    factor of its own; a geom with a given mass has that scaled instead of the density, and the
    ground and other planes stay. Bodies' masses and inertias follow when the model is compiled.
    Returns the factors by what they were applied to.
    """
    factors: dict[str, float] = {}

    def scaled(what: str, value: Any) -> Any:
        factors[what] = float(rng.uniform(*spread[rng.integers(2)]))
        return factors[what] * value

    for actuator in spec.actuators:
        actuator.gear = scaled(f"{actuator.name} gear", actuator.gear)
    for joint in spec.joints:
        for kind in ("range", "stiffness", "damping"):
            setattr(joint, kind, scaled(f"{joint.name} {kind}", getattr(joint, kind)))
    for geom in spec.geoms:
        if geom.type == geom.type.mjGEOM_PLANE:
            continue
        geom.size = scaled(f"{geom.name} size", geom.size)
        kind = "density" if np.isnan(geom.mass) else "mass"
        setattr(geom, kind, scaled(f"{geom.name} {kind}", getattr(geom, kind)))
    return factors


class Suite(gym.Env):
    """A task of the suite, with gymnasium's interface.

    Attributes:
      model, data, frame_skip: the simulation, as gymnasium's MujocoEnv names it.
    """

    def __init__(self, name: str, pixels: bool = False, spread: Spread | None = None):
        from dm_control import suite

        self._domain, task = name.split("-")
        self._env = suite.load(self._domain, task)
        self._spread = spread
        self._renderer = None
        self.frame_skip = round(self._env.control_timestep() / self._env.physics.timestep())
        if spread:
            self._xml, self._assets = importlib.import_module(
                f"dm_control.suite.{self._domain}"
            ).get_model_and_assets()
        action = self._env.action_spec()
        self.action_space = gym.spaces.Box(
            action.minimum.astype(np.float32), action.maximum.astype(np.float32)
        )
        if pixels:
            from gato_lib.domains.rendering import Renderer

            self._renderer = Renderer(self.model, IMAGE)
            spaces = {"image": gym.spaces.Box(0, 255, (IMAGE, IMAGE, 3), np.uint8)}
        else:
            spaces = {
                key: gym.spaces.Box(-np.inf, np.inf, np.atleast_1d(value).shape, np.float64)
                for key, value in self._env.reset().observation.items()
            }
        self.observation_space = gym.spaces.Dict(spaces)

    @property
    def model(self) -> Any:
        return self._env.physics.model.ptr

    @property
    def data(self) -> Any:
        return self._env.physics.data.ptr

    def _observation(self, timestep: Any) -> dict[str, np.ndarray]:
        if self._renderer:
            return {"image": self._renderer(self.data)}
        return {k: np.array(v, np.float64, ndmin=1) for k, v in timestep.observation.items()}

    def _new_physics(self) -> None:
        """Compile the task's model anew, with this episode's factors."""
        import mujoco
        from dm_control.mujoco import wrapper
        from dm_control.rl import control

        spec = mujoco.MjSpec.from_string(self._xml, include=self._assets)
        self.factors = randomize(spec, self._spread, self.np_random)
        model = wrapper.MjModel(spec.compile())
        self._env = control.Environment(
            type(self._env.physics).from_model(model),
            self._env.task,
            n_sub_steps=self.frame_skip,
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        # Tasks draw from `random`, which dm_control sets only when a task is made.
        self._env.task._random = np.random.RandomState(self.np_random.integers(2**32))
        if self._spread:
            self._new_physics()
        self._steps = 0
        return self._observation(self._env.reset()), {}

    def step(self, action: np.ndarray):
        timestep = self._env.step(np.asarray(action, np.float64))
        self._steps += 1
        return (
            self._observation(timestep),
            float(timestep.reward),
            False,
            self._steps >= STEPS,
            {},
        )

    def close(self) -> None:
        if self._renderer:
            self._renderer.close()


def _who_plays(domain: str, task: str) -> dict[str, str]:
    """Fields of the task's `TaskSpec`."""
    if isinstance(_EXPERTS[task], Planning):
        return {
            "expert": "sampling model-predictive control in the simulator's own model",
            "sees": "the simulator's full state and physics, and its future",
        }
    how = "a linear map of the observation, found by random search" if task in MAPPED else ""
    sees = ""
    if domain == "dmc_pixels":
        sees = "the simulator's state"
    elif task == "point_mass-hard":
        sees = "which way each motor pushes, drawn for the episode"
    elif domain in SPREADS and _EXPERTS[task] in (_reach, _catch):
        sees = "how long the bodies are that were drawn"
    return {"expert": how or "feedback from the simulator's state", "sees": sees}


def _make_expert(task: str) -> Expert:
    how = _EXPERTS[task]
    return PlanningExpert(how) if isinstance(how, Planning) else FeedbackExpert(how)


def _domain(
    name: str, tasks: tuple[str, ...], make_env: Callable[[str], gym.Env], *sources: str
) -> Domain:
    return Domain(
        name=name,
        tasks={
            f"{name}/{task}": TaskSpec(
                id=f"{name}/{task}",
                metric="return",
                floor=1000.0,
                floor_source="upper bound of the reward: 1 a step for 1,000 steps",
                noise="standard deviation of Gaussian noise on each control, in half its range",
                **_who_plays(name, task),
            )
            for task in tasks
        },
        make_env=make_env,
        make_expert=_make_expert,
        sources=("dmc.py", "gaits.py", "planning.py", *sources),
        perturb=gaussian,
    )


DOMAINS = (
    _domain("dmc", tuple(_EXPERTS), Suite),
    _domain("dmc_pixels", _PIXELS, functools.partial(Suite, pixels=True), "rendering.py"),
    *(
        _domain(name, _RANDOM[name], functools.partial(Suite, spread=spread))
        for name, spread in SPREADS.items()
    ),
)
