"""Aggregates over tasks with intervals (paper 4.1, Table 8; Agarwal et al. 2021).

"Deep Reinforcement Learning at the Edge of the Statistical Precipice" asks for interquartile means,
performance profiles and stratified bootstrap intervals. Its authors' library, rliable 1.2.0, does
not import beside pandas 3 (it wants arch below 8) and draws from NumPy's global generator, so the
estimators stand here; a test holds them to numbers that rliable gave.

There are no repeated runs: what is resampled is episodes, within each task. An interval says what
other episodes of the same agent would give, not what another training would. For the same reason
every aggregate is over tasks' means: single episodes of a task scored by success are 0 or 1.
Resampling adds noise to the tasks' means, and what is clipped or counted moves with it: with many
tasks and few episodes an optimality gap, a median or a share may lie at its interval's edge.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.stats

from gato_lib import domains
from gato_lib.evaluation import normalized_episodes, resampled_means

# App. L's Table 8: mean normalised score of a domain, 1.0 is the expert. DM Lab and Atari are
# stated in the paper's text; the others are recalled, most surely BabyAI and Meta-World.
PAPER_TABLE8 = {
    "babyai": 0.932,
    "metaworld": 0.870,
    "dmc": 0.636,
    "dmc_pixels": 0.263,
    "atari": 0.309,
    "atari_extended": 0.578,
    "dmlab": 0.914,
    "sokoban": 0.680,
    "procgen": 0.608,
    "modular_rl": 0.629,
    "manipulation": 0.838,
    "rgb_stacking": 0.580,
}
THRESHOLDS = np.linspace(0.0, 1.2, 49)
ROUNDING = 1e-9  # a mean of normalised scores and a normalised mean differ by less
RESAMPLES = 2000  # of the bootstrap

# Of tasks' mean scores, along the last axis.
AGGREGATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda x: x.mean(axis=-1),
    "median": lambda x: np.median(x, axis=-1),
    "interquartile mean": lambda x: scipy.stats.trim_mean(x, 0.25, axis=-1),
    "optimality gap": lambda x: 1.0 - np.minimum(x, 1.0).mean(axis=-1),
    "tasks at half or above": lambda x: (x >= 0.5 - ROUNDING).mean(axis=-1),
}


def _means(
    played: pd.DataFrame, references: pd.DataFrame, seed: int, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Tasks' means, (tasks,), and with episodes drawn anew within each task, (resamples, tasks).

    Raises ValueError where no task has a scale.
    """
    episodes = list(normalized_episodes(played, references).values())
    if not episodes:
        raise ValueError("no task with an expert to measure by was played")
    return np.array([x.mean() for x in episodes]), resampled_means(episodes, seed, resamples).T


def aggregates(
    played: pd.DataFrame, references: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """One row for each of `AGGREGATES`: statistic, value, low, high (95 %)."""
    means, drawn = _means(played, references, seed, resamples)
    rows = []
    for name, function in AGGREGATES.items():
        low, high = np.percentile(function(drawn), [2.5, 97.5])
        rows.append({"statistic": name, "value": function(means), "low": low, "high": high})
    return pd.DataFrame(rows)


def by_domain(played: pd.DataFrame, references: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`aggregates` of each domain's tasks, with columns domain and tasks."""
    names = played.task.map(lambda task: domains.TASKS[task].domain)
    tables = []
    for domain, group in played.groupby(names, sort=False):
        if tasks := len(normalized_episodes(group, references)):
            table = aggregates(group, references, seed)
            tables.append(table.assign(domain=domain, tasks=tasks))
    if not tables:
        raise ValueError("no task with an expert to measure by was played")
    return pd.concat(tables, ignore_index=True)


def performance_profile(
    played: pd.DataFrame,
    references: pd.DataFrame,
    thresholds: np.ndarray = THRESHOLDS,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of tasks whose mean is at or above each threshold: threshold, share, low, high (95 %).

    At or above, as Figure 5 counts.
    """
    means, drawn = _means(played, references, seed)
    at_least = lambda x, t: (x >= t - ROUNDING).mean(axis=-1)  # noqa: E731
    above = np.stack([at_least(drawn, t) for t in thresholds], axis=1)
    low, high = np.percentile(above, [2.5, 97.5], axis=0)
    share = [at_least(means, t) for t in thresholds]
    return pd.DataFrame({"threshold": thresholds, "share": share, "low": low, "high": high})
