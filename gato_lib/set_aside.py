"""Goals that a training may leave out, to be played once at the end: nobody tuned on them (06).

Of each Meta-World task the fifth of the starts with the largest first coordinate that varies: where
the goal is, or if that is always the same, the object. The rule looks at the simulator alone, so it
is settled before there is a demonstration or an agent.
"""

from __future__ import annotations

import functools

import numpy as np

from gato_lib import domains
from gato_lib.episodes import Episode

SHARE = 0.2
STARTS = 100  # drawn to find the boundary
SEED = 2_000_000  # of the first of them: no demonstration's, no evaluation's
COORDINATES = (36, 37, 38, 4, 5, 6)  # of an observation: goal x, y, z, then the object's


def is_aside(task: str, start: np.ndarray) -> bool:
    """Whether an episode with this first observation (39,) is one of those set aside.

    False in every domain but Meta-World. Raises ValueError for an observation of another shape.
    """
    if not task.startswith("metaworld/"):
        return False
    if np.shape(start) != (39,):
        raise ValueError(f"{task}: the observation has shape {np.shape(start)}, expected (39,)")
    coordinate, boundary = _boundary(task)
    return bool(start[coordinate] > boundary)


def without(task: str, episodes: list[Episode]) -> list[Episode]:
    """The episodes that are not set aside."""
    if not task.startswith("metaworld/"):
        return episodes
    return [e for e in episodes if not is_aside(task, np.asarray(e.observations)[0])]


@functools.cache
def _boundary(task: str) -> tuple[int, float]:
    """Which coordinate is looked at, and above which value a start is set aside."""
    env = domains.make_env(task)
    starts = np.stack([env.reset(seed=SEED + i)[0] for i in range(STARTS)])
    env.close()
    for coordinate in COORDINATES:
        if np.ptp(starts[:, coordinate]) > 1e-3:
            return coordinate, float(np.quantile(starts[:, coordinate], 1 - SHARE))
    raise ValueError(f"{task}: every start is the same")
