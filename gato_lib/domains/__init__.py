"""The control domains (paper 3.1, Table 1).

A domain is one module with `DOMAINS`, mostly of one entry; adding one is that file and one line in
`_MODULES`.
"""

from __future__ import annotations

import importlib
import os
import sys

import gymnasium as gym

from gato_lib.domains.base import Domain, Expert, ExpertError, TaskSpec

_MODULES = (
    "babyai",
    "metaworld",
    "dmc",
    "atari",
    "dmlab",
    "sokoban",
    "modular_rl",
    "manipulation",
    "rgb_stacking",
    "procgen",
)

if sys.platform == "linux":
    # MuJoCo reads this when it is first imported, which is later than here. EGL draws without a
    # display, with and without a GPU.
    os.environ.setdefault("MUJOCO_GL", "egl")

DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for module in _MODULES
    for domain in importlib.import_module(f"gato_lib.domains.{module}").DOMAINS
}
TASKS: dict[str, TaskSpec] = {k: v for d in DOMAINS.values() for k, v in d.tasks.items()}

# Never in pretraining, a trained tokenizer or a released agent: the out-of-distribution study
# (paper 5.2) fine-tunes on these, in all their variants. Of Meta-World the paper holds out assembly
# and lists 45 tasks in Table 1; the four others are from ML45's test set. Of DM Lab it holds out a
# foraging level. Of RGB Stacking pretraining has red on blue with training shapes (3.3, 5.3).
HELD_OUT: frozenset[str] = frozenset(
    {
        "atari/Boxing",
        "dmc/cartpole-swingup",
        "dmc_pixels/cartpole-swingup",
        "dmc_random_small/cartpole-swingup",
        "dmc_random_large/cartpole-swingup",
        "dmlab/PickupObjects",
        "metaworld/assembly",
        "metaworld/bin-picking",
        "metaworld/box-close",
        "metaworld/door-unlock",
        "metaworld/hand-insert",
    }
    | {t for t in TASKS if t.startswith("rgb_stacking") and not t.endswith("/red-on-blue")}
)

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
    """A gymnasium environment. `reset(seed=s)` fixes the whole episode's randomness.

    Raises ModuleNotFoundError with the line that installs what is missing.
    """
    domain = domain_of(task)
    if not domain.installed:
        raise ModuleNotFoundError(f"{task} needs {', '.join(domain.requires)}: {domain.install}")
    return domain.make_env(task.split("/")[1])


def make_expert(task: str) -> Expert:
    """The task's expert; it may read simulator state that the agent does not see."""
    return domain_of(task).make_expert(task.split("/")[1])
