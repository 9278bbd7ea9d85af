"""Meta-World: one simulated arm, many manipulation tasks, from state (paper 3.1, App. F.10).

39 observations (hand, gripper, objects, the previous frame of the same, and the goal) and 4 actions
in [-1, 1]. Scored by success, reached once within 500 steps: the scripted experts stop there,
so returns of expert and agent would not compare.
"""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Domain, Expert, TaskSpec, gaussian

MAX_STEPS = 500

_TASKS = tuple(
    """
    assembly basketball bin-picking box-close button-press button-press-topdown
    button-press-topdown-wall button-press-wall coffee-button coffee-pull coffee-push dial-turn
    disassemble door-close door-lock door-open door-unlock drawer-close drawer-open faucet-close
    faucet-open hammer hand-insert handle-press handle-press-side handle-pull handle-pull-side
    lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall
    plate-slide plate-slide-back plate-slide-back-side plate-slide-side push push-back push-wall
    reach reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close
    window-open
    """.split()  # noqa: SIM905
)


class _Seeded(gym.Wrapper):
    """Goal visible, a fresh start and goal for each seed, ends at success or 500 steps.

    Meta-World's own `reset(seed=...)` ignores the seed; the goal is drawn from the generator that
    `seed()` sets. `mujoco.mj_resetData` alone leaves the mocap-driven hand where it was, so the
    same seed is only the same episode because Meta-World's reset drives the hand home each time.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        env._partially_observable = False
        # Observations are clipped to a cached space whose goal part is [0, 0] while hidden.
        env.__dict__.pop("sawyer_observation_space", None)
        env._freeze_rand_vec = False
        env._set_task_called = True
        env.seeded_rand_vec = True
        env.seed(0)
        # Meta-World rebuilds this space on each access; it is constant once the goal is visible.
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.env.seed(seed)
        self._steps = 0
        observation, info = self.env.reset()
        return observation, info

    def step(self, action: np.ndarray):
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        observation, reward, _, _, info = self.env.step(action)
        self._steps += 1
        solved = bool(info["success"])
        return observation, float(reward), solved, self._steps >= MAX_STEPS, {"success": solved}


def make_env(name: str) -> gym.Env:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    return _Seeded(ALL_V3_ENVIRONMENTS[f"{name}-v3"]())


class Scripted(Expert):
    """Meta-World's scripted policy. It reads the same 39 numbers as the agent."""

    def __init__(self, name: str):
        from metaworld.policies import ENV_POLICY_MAP

        self._make = ENV_POLICY_MAP[f"{name}-v3"]

    def reset(self, env: gym.Env) -> None:
        self._policy = self._make()

    def act(self, observation: np.ndarray, executed: Any | None) -> np.ndarray:
        with warnings.catch_warnings():
            # The scripts ask for more than full speed and say so; the arm clips, and so do we.
            warnings.filterwarnings("ignore", "Constant.s. may be too high")
            action = self._policy.get_action(observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)


DOMAINS = (
    Domain(
        name="metaworld",
        tasks={
            f"metaworld/{name}": TaskSpec(
                id=f"metaworld/{name}",
                metric="success",
                floor=1.0,
                floor_source="every episode solved",
                noise="standard deviation of Gaussian noise on each of the four actions",
                expert="Meta-World's scripted policy, from the agent's own observation",
            )
            for name in _TASKS
        },
        make_env=make_env,
        make_expert=Scripted,
        perturb=gaussian,
        sources=("metaworld.py",),
    ),
)
