"""The control domains (paper 3.1, Table 1).

A domain is one module with a `DOMAIN`; adding one is that file and one line in `_MODULES`.
"""

from __future__ import annotations

import gymnasium as gym

from gato_lib.domains import babyai, metaworld
from gato_lib.domains.base import Domain, Expert, ExpertError, TaskSpec

_MODULES = (babyai, metaworld)

DOMAINS: dict[str, Domain] = {m.DOMAIN.name: m.DOMAIN for m in _MODULES}
TASKS: dict[str, TaskSpec] = {k: v for d in DOMAINS.values() for k, v in d.tasks.items()}

# Never in pretraining, a trained tokenizer or a released agent: the out-of-distribution study
# (paper 5.2) fine-tunes on these.
HELD_OUT: frozenset[str] = frozenset({"metaworld/assembly"})

__all__ = [
    "DOMAINS",
    "HELD_OUT",
    "TASKS",
    "Domain",
    "Expert",
    "ExpertError",
    "TaskSpec",
    "domain_of",
    "make_env",
    "make_expert",
]


def domain_of(task: str) -> Domain:
    """The domain of a task id; raises KeyError naming what is known."""
    if task not in TASKS:
        near = [t for t in sorted(TASKS) if t.split("/")[0] == task.split("/")[0]]
        raise KeyError(f"unknown task {task!r}; known: {near or sorted(TASKS)}")
    return DOMAINS[TASKS[task].domain]


def make_env(task: str) -> gym.Env:
    """A gymnasium environment. `reset(seed=s)` fixes the whole episode's randomness."""
    return domain_of(task).make_env(task.split("/")[1])


def make_expert(task: str) -> Expert:
    """The task's expert; it may read simulator state that the agent does not see."""
    return domain_of(task).make_expert(task.split("/")[1])
