"""Rollouts and scores (paper 4.1, App. L).

A score is normalised per task: 0 is a random policy, 1 is the task's expert. Both references are
measured by `measure_references` and committed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gato_lib import domains
from gato_lib.agent import Agent, History
from gato_lib.collection import episode_score, rollout, worker_pool
from gato_lib.episodes import DataError, Episode
from gato_lib.files import write_text


def normalized_score(score: float | np.ndarray, random: float, expert: float) -> float | np.ndarray:
    """(score - random) / (expert - random): 0.0 is random, 1.0 is expert. Arrays elementwise.

    Raises ValueError where expert <= random: such a task has no scale and is left out of means,
    never scored 1.
    """
    if not expert > random:
        raise ValueError(f"expert {expert} does not beat random {random}: no scale to normalise by")
    return (score - random) / (expert - random)


def episode_seed(task: str, seed: int, index: int) -> int:
    """Evaluation seeds lie in [2**30, 2**31): never one that demonstrations were collected with."""
    digest = hashlib.sha256(f"evaluation {task} {seed} {index}".encode()).digest()
    return 2**30 + int.from_bytes(digest[:4], "little") % 2**30


@dataclasses.dataclass
class _Lane:
    """One environment that plays one task's episodes, one after another."""

    task: str
    env: Any
    queue: list[int]
    index: int = -1
    history: History | None = None
    rewards: list[float] = dataclasses.field(default_factory=list)
    success: bool = False

    @property
    def spaces(self) -> tuple[Any, Any]:
        return self.env.observation_space, self.env.action_space

    def start(self, seed: int, make_prompt: Callable) -> bool:
        """Begin the next episode; False where none is left."""
        if not self.queue:
            self.env.close()
            return False
        self.index = self.queue.pop(0)
        reset_seed = episode_seed(self.task, seed, self.index)
        observation, _ = self.env.reset(seed=reset_seed)
        self.history = History(reset_seed, make_prompt(self.task, reset_seed, observation))
        self.history.observations.append(observation)
        self.rewards, self.success = [], False
        return True

    def step(self, action: Any) -> bool:
        """Apply an action; True where the episode is over."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.history.observations.append(observation)
        self.rewards.append(float(reward))
        self.success |= bool(info.get("success", terminated and reward > 0))
        return terminated or truncated


EPISODE_COLUMNS = ("task", "seed", "index", "score", "success", "steps")


def rollouts(
    agent: Agent,
    tasks: Sequence[str],
    episodes: int,
    seed: int,
    path: str | os.PathLike | None = None,
    lanes: int = 4,
    demonstrations: Callable[[str], Sequence[Episode]] | None = None,
    prompt: str = "none",
) -> Iterator[pd.DataFrame]:
    """Play `episodes` of each task, yielding the table of finished episodes as it grows.

    Environments of a domain act in one batch where their spaces agree, `lanes` a task. With `path`,
    finished episodes are kept there and a second call goes on from them. Each episode depends on
    task, seed and index alone. `prompt` is "none", or the "start" or "end" of a demonstration of
    the task, drawn anew for each episode from `demonstrations(task)`.
    """
    if prompt != "none" and demonstrations is None:
        raise ValueError(f"prompt {prompt!r} needs demonstrations")
    known: dict[str, Sequence[Episode]] = {}

    def make_prompt(task: str, reset_seed: int, observation: Any):
        if prompt == "none":
            return None
        if task not in known:
            known[task] = demonstrations(task)
        chosen = known[task][reset_seed % len(known[task])]
        return player.prompt(tokenizer, chosen, prompt, observation)

    for task in tasks:
        domains.domain_of(task)  # an unknown task is named before anything is played
    old = _read_episodes(path)
    asked = old.task.isin(tasks) & (old.seed == seed) & (old["index"] < episodes)
    others, rows = old[~asked].to_dict("records"), old[asked].to_dict("records")
    finished = {(r["task"], r["index"]) for r in rows}
    for active in _batches(tasks, lanes, episodes, finished):
        player = agent.for_domain(domains.TASKS[active[0].task].domain)
        tokenizer = player.tokenizer(active[0].env)
        active = [lane for lane in active if lane.start(seed, make_prompt)]
        while active:
            actions = player.act(tokenizer, [lane.history for lane in active])
            over = [lane for lane, a in zip(active, actions, strict=True) if lane.step(a)]
            for lane in over:
                rows.append(
                    {
                        "task": lane.task,
                        "seed": seed,
                        "index": lane.index,
                        "score": episode_score(lane.task, lane.rewards, lane.success),
                        "success": lane.success,
                        "steps": len(lane.rewards),
                    }
                )
            stopped = [lane for lane in over if not lane.start(seed, make_prompt)]
            active = [lane for lane in active if lane not in stopped]
            if over:
                if path is not None:
                    write_text(path, _csv(others + rows))
                yield _table(rows)
    if len(rows) == len(finished):  # nothing was left to play
        yield _table(rows)


def _batches(
    tasks: Sequence[str], lanes: int, episodes: int, finished: Container[tuple[str, int]]
) -> Iterator[list[_Lane]]:
    """Lanes that can act in one batch, together: of one domain and with the same spaces."""
    for domain in dict.fromkeys(domains.TASKS[t].domain for t in tasks):
        batches: list[list[_Lane]] = []
        for task in (t for t in tasks if domains.TASKS[t].domain == domain):
            left = [i for i in range(episodes) if (task, i) not in finished]
            for first in range(min(lanes, len(left))):
                lane = _Lane(task, domains.make_env(task), left[first::lanes])
                alike = next((b for b in batches if b[0].spaces == lane.spaces), None)
                if alike is None:
                    batches.append([lane])
                else:
                    alike.append(lane)
        yield from batches


def _read_episodes(path: str | os.PathLike | None) -> pd.DataFrame:
    if path is None or not pathlib.Path(path).is_file():
        return pd.DataFrame(columns=list(EPISODE_COLUMNS))
    try:
        return pd.read_csv(path)[list(EPISODE_COLUMNS)]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not a table of played episodes ({error})") from error


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(EPISODE_COLUMNS))
    return frame.sort_values(["task", "index"], ignore_index=True)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    _table(rows).to_csv(text, index=False)
    return text.getvalue()


# --- references -----------------------------------------------------------------------------------


class _Random(domains.Expert):
    """Uniformly random actions."""

    def __init__(self, seed: int):
        self._seed = seed

    def reset(self, env: Any) -> None:
        self._space = env.action_space
        self._space.seed(self._seed)

    def act(self, observation: Any, executed: Any | None) -> Any:
        return self._space.sample()


def _reference(task: str, policy: str, episodes: int, seed: int) -> dict[str, Any]:
    """Mean score of the expert or of uniformly random actions; runs in a worker process."""
    env, expert = domains.make_env(task), domains.make_expert(task)
    scores, steps, failed = [], [], 0
    for index in range(episodes):
        reset_seed = episode_seed(f"{policy} {task}", seed, index)
        # Random actions come from another stream than the layout.
        player = expert if policy == "expert" else _Random(reset_seed + 1)
        try:
            unused = np.random.default_rng(0)  # no noise is injected
            episode = rollout(env, player, task, reset_seed, 0.0, unused)
            scores.append(episode_score(task, episode.rewards, episode.success))
            steps.append(episode.steps)
        except domains.ExpertError:
            failed += 1  # scored 0: the expert did not solve it
            scores.append(0.0)
    env.close()
    return {
        "task": task,
        "policy": policy,
        "n": episodes,
        "mean": float(np.mean(scores)),
        "standard_error": float(np.std(scores, ddof=1) / np.sqrt(episodes)),
        "steps": float(np.mean(steps)) if steps else float("nan"),
        "failed": failed,
        "seed": seed,
        "code": domains.domain_of(task).code,
    }


def measure_references(
    wanted: Sequence[tuple[str, str, int]], seed: int, workers: int | None = None
) -> Iterator[dict[str, Any]]:
    """Scores of (task, "random" or "expert", episodes), yielded as they are measured."""
    with worker_pool(workers) as pool:
        jobs = [pool.submit(_reference, *item, seed) for item in wanted]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()


def read_references(path: str | os.PathLike) -> pd.DataFrame:
    """One row a task: random, expert, their n and standard errors, `sound` and `weak` flags.

    An expert is weak under half of its floor, and not sound where its 95 % interval meets
    random's. `steps` is the mean length of its episodes. A task of which only one was measured yet
    is left out.
    """
    try:
        frame = pd.read_csv(path).set_index(["task", "policy"])
        frame[["mean", "standard_error", "n", "steps"]]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not a table of references ({error})") from error
    rows = []
    both = [t for t, policy in frame.index if policy == "random" and (t, "expert") in frame.index]
    for task in both:
        random, expert = frame.loc[(task, "random")], frame.loc[(task, "expert")]
        gap = expert["mean"] - random["mean"]
        spread = 1.96 * np.hypot(random["standard_error"], expert["standard_error"])
        rows.append(
            {
                "task": task,
                "random": random["mean"],
                "random_se": random["standard_error"],
                "expert": expert["mean"],
                "expert_se": expert["standard_error"],
                "n": int(min(random["n"], expert["n"])),
                "steps": expert["steps"],
                "floor": domains.TASKS[task].floor,
                "sound": bool(gap > spread),
                "weak": bool(expert["mean"] < domains.TASKS[task].floor / 2),
            }
        )
    return pd.DataFrame(rows).set_index("task")


# --- aggregation ----------------------------------------------------------------------------------


def score_table(episodes: pd.DataFrame, references: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One row a task: mean score, normalised score with a 95 % bootstrap interval, n.

    Where the expert is not sound the normalised columns are NaN: pandas leaves them out of means
    and counts. `weak` is carried along.
    """
    rows = []
    for task, group in episodes.groupby("task", sort=False):
        reference = references.loc[task]
        scores = group.score.to_numpy(float)
        columns = {"normalized": scores.mean()}
        columns["low"], columns["high"] = bootstrap([scores], seed)
        for key, value in columns.items():
            columns[key] = (
                normalized_score(value, reference["random"], reference["expert"])
                if reference["sound"]
                else float("nan")
            )
        rows.append(
            {
                "task": task,
                "domain": domains.TASKS[task].domain,
                "random": reference["random"],
                "score": scores.mean(),
                "expert": reference["expert"],
                **columns,
                "success": group.success.mean(),
                "weak": bool(reference["weak"]),
                "n": len(group),
            }
        )
    return pd.DataFrame(rows)


def domain_means(episodes: pd.DataFrame, references: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One row a domain: mean normalised score over its sound tasks, 95 % interval, tasks.

    The interval resamples episodes within each task.
    """
    strata: dict[str, list[np.ndarray]] = {}
    for task, group in episodes.groupby("task"):
        r = references.loc[task]
        if r["sound"]:
            unit = normalized_score(group.score.to_numpy(float), r["random"], r["expert"])
            strata.setdefault(domains.TASKS[task].domain, []).append(unit)
    rows = []
    for domain, units in strata.items():
        low, high = bootstrap(units, seed)
        mean = float(np.mean([u.mean() for u in units]))
        rows.append({"domain": domain, "mean": mean, "low": low, "high": high, "n": len(units)})
    return pd.DataFrame(rows)


def bootstrap(
    strata: Sequence[np.ndarray], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the mean over strata of each stratum's mean."""
    rng = np.random.default_rng(seed)
    means = np.mean(
        [x[rng.integers(len(x), size=(resamples, len(x)))].mean(axis=1) for x in strata], axis=0
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
