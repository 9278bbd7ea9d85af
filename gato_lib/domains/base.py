"""What every control domain provides: tasks, an environment, an expert."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import gymnasium as gym


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
      expert: what the expert is, and what it may see that the agent does not.
    """

    id: str
    metric: str
    floor: float
    floor_source: str
    noise: str
    expert: str

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

    @abc.abstractmethod
    def act(self, observation: Any, executed: Any | None) -> Any:
        """The expert's action, given what was last executed (None at the first step).

        Raises ExpertError where it has none.
        """


@dataclasses.dataclass(frozen=True)
class Domain:
    """A domain's tasks and how to make them. `perturb(action, noise, env, rng)` injects noise."""

    name: str
    tasks: dict[str, TaskSpec]
    make_env: Any
    make_expert: Any
    perturb: Any
