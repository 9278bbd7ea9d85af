"""What every control domain provides: tasks, an environment, an expert."""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.config import source_digest


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One control task.

    Attributes:
      id: "domain/name".
      metric: what an episode scores: "return" (sum of rewards) or "success" (1.0 where the task
        was solved at any step, which also ends the episode).
      floor: a score that a sound expert reaches at least half of, from the literature or the
        reward's bound; `floor_source` says which.
      noise: what a unit of injected action noise is, for the data card.
      expert: who plays.
      sees: what the expert uses that the agent does not see; "" where there is nothing.
    """

    id: str
    metric: str
    floor: float
    floor_source: str
    noise: str
    expert: str
    sees: str = ""

    @property
    def domain(self) -> str:
        return self.id.split("/")[0]

    @property
    def name(self) -> str:
        return self.id.split("/")[1]


class ExpertError(RuntimeError):
    """The expert gave up or hung in this episode; collection goes on with the next seed."""


class Expert(abc.ABC):
    """Acts in one environment, episode after episode."""

    @abc.abstractmethod
    def reset(self, env: gym.Env) -> None:
        """Start an episode; `env` has just been reset."""

    def interrupted(self) -> None:  # noqa: B027 (most have nothing to forget)
        """Another's action was executed: what was planned to follow it does not hold."""

    @abc.abstractmethod
    def act(self, observation: Any, executed: Any | None) -> Any:
        """The expert's action, given what was last executed (None at the first step).

        Raises ExpertError where it has none.
        """


Perturb = Callable[[Any, float, gym.Env, np.random.Generator], Any]


def random_share(action: int, noise: float, env: gym.Env, rng: np.random.Generator) -> int:
    """Replace a share `noise` of discrete actions by uniformly random ones."""
    space = env.action_space
    return int(space.start + rng.integers(space.n)) if rng.random() < noise else action


def gaussian(
    action: np.ndarray, noise: float, env: gym.Env, rng: np.random.Generator
) -> np.ndarray:
    """Add Gaussian noise to a Box action, in units of half its range, and clip it."""
    low, high = env.action_space.low, env.action_space.high
    noisy = action + noise * (high - low) / 2 * rng.normal(size=action.shape)
    return np.clip(noisy, low, high).astype(env.action_space.dtype)


@dataclasses.dataclass(frozen=True)
class Domain:
    """A data set of the paper's Table 1: its tasks, and how to make and to play them.

    Attributes:
      name: key of `mixture.PAPER_WEIGHTS` or of `STANDS_FOR` (a user's own domain may have any
        other).
      tasks: by id.
      make_env: task name (without the domain) -> environment. `reset(seed=s)` must fix the whole
        episode. Simulators are imported here, not with the module: all tasks are known even where
        an optional simulator is missing, and no process loads one that it does not use.
      make_expert: task name -> Expert.
      sources: files of `domains/` whose code decides the data; when it changes, data made with it
        is collected anew.
      perturb: (action, noise, env, rng) -> the action executed in the expert's stead.
      extra: whether it is beside the paper's data sets: "all" tasks are without it.
      requires: modules that must be installed; `install` is the line that installs them.
    """

    name: str
    tasks: dict[str, TaskSpec]
    make_env: Callable[[str], gym.Env]
    make_expert: Callable[[str], Expert]
    sources: tuple[str, ...]
    perturb: Perturb
    extra: bool = False
    requires: tuple[str, ...] = ()
    install: str = ""

    @property
    def code(self) -> str:
        """Eight hex digits that change with the code that decides the data."""
        return source_digest(*(f"domains/{name}" for name in self.sources))

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(module) for module in self.requires)


class _Rule(Expert):
    """A function of the observation."""

    def __init__(self, act: Callable[[Any], Any]):
        self._rule = act

    def reset(self, env: gym.Env) -> None:
        pass

    def act(self, observation: Any, executed: Any | None) -> Any:
        return self._rule(observation)


def one_task(
    task: str,
    make_env: Callable[[], gym.Env],
    act: Callable[[Any], Any],
    *,
    floor: float,
    sources: tuple[str, ...],
    metric: str = "return",
) -> tuple[Domain, ...]:
    """A module's `DOMAINS`: one task "domain/name" whose expert is a function of what is observed.

    Discrete actions are perturbed by random ones, those of a Box by Gaussian noise. It is beside
    the paper's data sets: "all" does not name it. The other arguments are those of `TaskSpec` and
    `Domain`. Raises ValueError for an id without a slash.
    """
    domain, slash, name = task.partition("/")
    if not (domain and slash and name):
        raise ValueError(f"task is {task!r}, expected 'domain/name'")

    def perturb(action: Any, noise: float, env: gym.Env, rng: np.random.Generator) -> Any:
        discrete = isinstance(env.action_space, gym.spaces.Discrete)
        return (random_share if discrete else gaussian)(action, noise, env, rng)

    spec = TaskSpec(
        id=task,
        metric=metric,
        floor=floor,
        floor_source="stated with the task",
        noise="share of random actions, or standard deviation in units of half the range",
        expert="a rule, from the agent's own observation",
    )
    make = {"make_env": lambda _: make_env(), "make_expert": lambda _: _Rule(act)}
    return (
        Domain(
            name=domain, tasks={task: spec}, sources=sources, perturb=perturb, extra=True, **make
        ),
    )
