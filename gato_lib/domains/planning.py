"""Experts for MuJoCo tasks: plan in the simulator itself, again and again.

The paper's experts for these domains are trained agents (D4PG, MPO; App. F), which are not public.
Here a planner with the simulator's own model and state plays instead: sampling model-predictive
control as in Howell et al., "Predictive Sampling" (arXiv:2212.00541). It keeps one plan, a spline
of controls over the next moments. From the true current state it rolls out many noisy copies of the
plan at once (`mujoco.rollout`), scores them by a reward written for whole arrays, and keeps the
best. Its first few actions are played, and planning starts over from wherever that has led: noise
in the executed actions is met at the next plan.

An environment is planned for if its `unwrapped` has what gymnasium's MujocoEnv has: `model`, `data`
and `frame_skip` (physics steps to one action), with actions being the actuators' controls.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Expert


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """N rollouts of H actions, as seen after each action.

    Attributes:
      model: the MjModel rolled out.
      qpos: (N, H, nq), and so on for the others.
      sensordata: as computed at the start of the last physics step of each action.
    """

    model: Any
    qpos: np.ndarray
    qvel: np.ndarray
    sensordata: np.ndarray
    control: np.ndarray

    def sensor(self, name: str) -> np.ndarray:
        """(N, H, size of the sensor)."""
        sensor = self.model.sensor(name)
        begin = int(sensor.adr[0])
        return self.sensordata[..., begin : begin + int(sensor.dim[0])]


Reward = Callable[[Trajectories], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Planning:
    """How to plan.

    Attributes:
      reward: (N, H) rewards of trajectories; their sum over H is maximised.
      horizon: actions looked ahead.
      samples: plans tried at a time.
      hold: actions played before planning again.
      spacing: actions between two knots of the spline.
      noise: smallest and largest standard deviation of the noise on the knots, in half ranges of
        the control; each sample draws its own between them, evenly in the logarithm.
      fresh: share of the samples that are drawn anew, ignoring the current plan.
      timestep: of the planner's model in seconds; None for the environment's own. A coarser one
        makes a bad simulator and a fast planner, and planning anew forgives the first.
    """

    reward: Reward
    horizon: int
    samples: int
    hold: int = 4
    spacing: int = 6
    noise: tuple[float, float] = (0.1, 0.6)
    fresh: float = 0.3
    timestep: float | None = None


def spline_weights(times: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """(T, K) weights that interpolate values at `knots` linearly at `times`, held at the end."""
    return np.stack([np.interp(times, knots, row) for row in np.eye(len(knots))], axis=1)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Wild plans may break the physics: that is no news, and MuJoCo would log it to a file."""
    import mujoco

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


class Planner:
    """Plans in a model, from plan to plan of one episode."""

    def __init__(self, model: Any, frame_skip: int, planning: Planning, rng: np.random.Generator):
        import mujoco

        self._planning, self._rng = planning, rng
        self._model, self._substeps = model, frame_skip
        if planning.timestep:
            self._model = copy.copy(model)
            self._substeps = round(frame_skip * model.opt.timestep / planning.timestep)
            self._model.opt.timestep = frame_skip * model.opt.timestep / self._substeps
        self._timestep = self._model.opt.timestep
        self._scratch = mujoco.MjData(self._model)
        self._spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self._state = np.empty(mujoco.mj_stateSize(self._model, self._spec))
        self._low, self._high = model.actuator_ctrlrange.T
        # Of the K knots.
        times = np.arange(0, planning.horizon - 1 + planning.spacing, planning.spacing)
        self._spline = spline_weights(np.arange(planning.horizon), times)  # (H, K)
        self._shift = spline_weights(times + planning.hold, times)  # (K, K)
        self._knots = np.tile((self._low + self._high) / 2, (len(times), 1))  # (K, nu)

    def plan(self, data: Any) -> np.ndarray:
        """(hold, nu) controls to play from `data`'s state on; calls go on from the plan before."""
        import mujoco

        mujoco.mj_getState(self._model, data, self._state, self._spec)
        knots = self._sample()
        self._knots = knots[self._score(knots).argmax()]
        controls = self._spline[: self._planning.hold] @ self._knots
        self._knots = self._shift @ self._knots
        return controls

    def _sample(self) -> np.ndarray:
        """(N, K, nu) plans: the current one, noisy copies of it, and new ones."""
        p, rng = self._planning, self._rng
        half, shape = (self._high - self._low) / 2, self._knots.shape
        fresh = int(p.fresh * p.samples)
        noisy = p.samples - 1 - fresh
        scale = np.exp(rng.uniform(*np.log(p.noise), (noisy, 1, 1)))
        plans = [
            self._knots[None],
            self._knots + scale * half * rng.normal(size=(noisy, *shape)),
            rng.uniform(self._low, self._high, (fresh, *shape)),
        ]
        return np.concatenate(plans).clip(self._low, self._high)

    def _score(self, knots: np.ndarray) -> np.ndarray:
        """(N,) sums of rewards, minus infinity where the physics diverged."""
        from mujoco import rollout

        controls = self._spline @ knots  # (N, H, nu)
        with _no_warnings():
            states, sensordata = rollout.rollout(
                self._model,
                self._scratch,
                np.tile(self._state, (len(knots), 1)),
                np.repeat(controls, self._substeps, axis=1),
            )
        # Where the physics diverges MuJoCo starts over, from a pose that may look splendid.
        end = self._state[0] + (controls.shape[1] * self._substeps - 0.5) * self._timestep
        diverged = ~(states[:, -1, 0] > end)
        last = slice(self._substeps - 1, None, self._substeps)
        states, nq, nv = states[:, last], self._model.nq, self._model.nv
        returns = self._planning.reward(
            Trajectories(
                model=self._model,
                qpos=states[..., 1 : 1 + nq],
                qvel=states[..., 1 + nq : 1 + nq + nv],
                sensordata=sensordata[:, last],
                control=controls,
            )
        ).sum(1)
        return np.where(diverged | ~np.isfinite(returns), -np.inf, returns)


class PlanningExpert(Expert):
    """Plays what the planner says.

    Its random numbers come from the episode's first state, so the same episode is planned the same
    way wherever and whenever it is played.
    """

    def __init__(self, planning: Planning):
        self._planning = planning

    def reset(self, env: gym.Env) -> None:
        self._sim = env.unwrapped
        data = self._sim.data
        seed = np.concatenate([data.qpos, data.qvel]).astype(np.float64).view(np.uint32)
        self._planner = Planner(
            self._sim.model, self._sim.frame_skip, self._planning, np.random.default_rng(seed)
        )
        self._queue: list[np.ndarray] = []

    def interrupted(self) -> None:
        self._queue.clear()

    def act(self, observation: Any, executed: Any | None) -> np.ndarray:
        if not self._queue:
            self._queue = list(self._planner.plan(self._sim.data).astype(np.float32))
        return self._queue.pop(0)
