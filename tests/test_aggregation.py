"""Aggregates by hand, and against numbers that rliable 1.2.0 gave in an environment of its own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from gato_lib import aggregation, domains, evaluation

TASKS = [t for t in domains.TASKS if t.startswith("metaworld/")][:9]
UNIT = pd.DataFrame({"random": 0.0, "expert": 1.0, "sound": True, "weak": False}, index=TASKS)


def episodes(matrix, tasks=TASKS):
    """A table of played episodes from scores (episodes, tasks)."""
    rows = [
        {"task": task, "seed": 0, "index": i, "score": x}
        for j, task in enumerate(tasks[: matrix.shape[1]])
        for i, x in enumerate(matrix[:, j])
    ]
    return pd.DataFrame(rows)


def test_against_rliable():
    matrix = np.round(np.random.default_rng(7).uniform(-0.2, 1.3, (12, 9)), 2)
    played = episodes(matrix)
    table = aggregation.aggregates(played, UNIT, resamples=20_000).set_index("statistic")
    # Its interquartile mean and optimality gap of the tasks' means, as one run.
    names = ["mean", "median", "interquartile mean", "optimality gap"]
    theirs = [0.54259259, 0.57166667, 0.55133333, 0.45740741]
    np.testing.assert_allclose(table.value[names], theirs, atol=1e-8)
    # Bootstrap intervals with other draws; it also resamples episodes within a task.
    low = [0.46333333, 0.43333333, 0.45316667, 0.38027778]
    high = [0.62, 0.65583333, 0.63233333, 0.53666667]
    np.testing.assert_allclose(table.low[names], low, atol=0.006)
    np.testing.assert_allclose(table.high[names], high, atol=0.006)
    thresholds = np.array([0.0, 0.3, 0.5, 0.6, 0.8])
    profile = aggregation.performance_profile(played, UNIT, thresholds)
    np.testing.assert_allclose(profile.share, [1, 1, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(profile.low, [1, 7 / 9, 1 / 3, 1 / 9, 0], atol=0.12)
    np.testing.assert_allclose(profile.high, [1, 1, 7 / 9, 2 / 3, 2 / 9], atol=0.12)


def test_by_hand():
    played = episodes(np.array([[0.0, 0.5, 1.0, 2.0], [1.0, 0.5, 1.0, 2.0]]))
    table = aggregation.aggregates(played, UNIT).set_index("statistic")
    assert table.value.to_dict() == pytest.approx(
        {
            "mean": 1.0,
            "median": 0.75,
            "interquartile mean": 0.75,  # of 0.5, 0.5, 1, 2 the middle two
            "optimality gap": 0.25,  # 0.5 + 0.5 + 0 + 0
            "tasks at half or above": 1.0,
        }
    )
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert table.low["mean"] == 0.875 and table.high["mean"] == 1.125  # the first task: 0 to 1
    profile = aggregation.performance_profile(played, UNIT, np.array([0.5, 0.51, 1.0]))
    assert profile.share.tolist() == [1.0, 0.5, 0.5], "at a threshold counts, as in Figure 5"


def test_scales_and_tasks_without_one():
    references = UNIT.assign(random=0.5)
    references.loc[TASKS[1], "sound"] = False
    played = episodes(np.array([[0.75, 9.0], [1.0, 9.0], [1.0, 9.0]]))  # other numbers of episodes
    played = pd.concat([played, episodes(np.array([[0.5]]), TASKS[2:])])
    units = evaluation.normalized_episodes(played, references)
    assert {t: u.tolist() for t, u in units.items()} == {
        TASKS[0]: [0.5, 1.0, 1.0],
        TASKS[2]: [0.0],
    }
    with pytest.raises(ValueError, match="no task with an expert to measure by"):
        aggregation.aggregates(played, references.assign(sound=False))


def test_the_same_seed_gives_the_same_interval_and_it_covers():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        played = episodes((rng.random((30, 4)) < 0.6).astype(float))
        (mean, *_), (again, *_) = (
            aggregation.aggregates(played, UNIT, seed=trial, resamples=300).to_dict("records")
            for _ in range(2)
        )
        assert mean == again
        covered += mean["low"] <= 0.6 <= mean["high"]
        own = evaluation.domain_means(played, UNIT, trial)
        assert own["mean"][0] == pytest.approx(mean["value"])
    assert covered >= 87


def test_by_domain():
    tasks = [TASKS[0], "babyai/Open", TASKS[1]]
    references = UNIT.iloc[:3].set_axis(tasks)
    table = aggregation.by_domain(episodes(np.array([[0.0, 1.0, 1.0]]), tasks), references)
    means = table[table.statistic == "mean"].set_index("domain")
    assert means.value.to_dict() == {"metaworld": 0.5, "babyai": 1.0}
    assert means.tasks.to_dict() == {"metaworld": 2, "babyai": 1}
    assert set(aggregation.PAPER_TABLE8) <= set(domains.DOMAINS)
    assert np.mean(list(aggregation.PAPER_TABLE8.values())) == pytest.approx(0.653, abs=0.001)
