"""Rollouts and scores (paper 4.1, App. L).

A score is normalised per task: 0 is a random policy, 1 is the task's expert. Both references are
measured by `measure_references` and committed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gato_lib import domains
from gato_lib.agent import Agent, Prompt
from gato_lib.collection import episode_score, rollout, worker_pool
from gato_lib.episodes import DataError, Episode
from gato_lib.files import write_text
from gato_lib.sequence import Tokenizer


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
class Lane:
    """One episode of a task, being played."""

    task: str
    index: int
    env: Any
    observation: Any
    rewards: list[float] = dataclasses.field(default_factory=list)
    success: bool = False
    over: bool = False

    def step(self, action: Any) -> Any:
        """Execute the player's action, or another, and return which."""
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.rewards.append(float(reward))
        self.success |= bool(info.get("success", terminated and reward > 0))
        self.over = terminated or truncated
        return action


def play_out(
    player: Any,
    lanes: Sequence[Lane],
    watch: Callable[[Sequence[Lane]], None] = lambda lanes: None,
) -> None:
    """Play lanes, the rows of `player`, to their ends.

    It is told of every action that was executed in place of its own. `watch` is called before each
    step and after the last, with those that are played.
    """
    playing = list(lanes)
    watch(playing)
    while playing:
        chosen = player.act([lane.observation for lane in playing])
        for row, (lane, action) in enumerate(zip(playing, chosen, strict=True)):
            executed = lane.step(action)
            if executed is not action and not lane.over:
                player.executed(row, executed)
        watch(playing)
        left = [i for i, lane in enumerate(playing) if not lane.over]
        if left and len(left) < len(playing):
            player.only(left)
        playing = [playing[i] for i in left]


EPISODE_COLUMNS = ("task", "seed", "index", "score", "success", "steps")
Lanes = tuple[tuple[str, int], ...]  # episodes that are played in one batch: task and index


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Episodes to play, and who plays them.

    Attributes:
      make_agent: returns the agent.
      demonstrations: returns those of a task, for prompts.
      prompt: "none", or the "start" or "end" of a demonstration of the task, drawn anew for each
        episode.

    Both functions are called in worker processes where there are several, and so must be hashable
    and importable there: functions of a module, or frozen dataclasses.
    """

    make_agent: Callable[[], Agent]
    seed: int
    demonstrations: Callable[[str], Sequence[Episode]] | None = None
    prompt: str = "none"

    def __post_init__(self) -> None:
        if self.prompt != "none" and self.demonstrations is None:
            raise ValueError(f"prompt {self.prompt!r} needs demonstrations")

    def play(
        self, lanes: Lanes, watch: Callable[[Sequence[Lane]], None] = lambda lanes: None
    ) -> list[dict[str, Any]]:
        """Play a batch of episodes to their ends: a row for each (`EPISODE_COLUMNS`).

        `watch` is `play_out`'s.
        """
        agent = made(self.make_agent).for_domain(domains.TASKS[lanes[0][0]].domain)
        with environments(tuple(task for task, _ in lanes)) as envs:
            seeds = [episode_seed(task, self.seed, index) for task, index in lanes]
            begun = [env.reset(seed=s)[0] for env, s in zip(envs, seeds, strict=True)]
            playing = [Lane(*lane, env, o) for lane, env, o in zip(lanes, envs, begun, strict=True)]
            tokenizer = agent.tokenizer(envs[0])
            prompts = [
                self._prompt(agent, tokenizer, lane, s)
                for lane, s in zip(playing, seeds, strict=True)
            ]
            play_out(agent.player(tokenizer, seeds, prompts), playing, watch)
        return [
            {
                "task": lane.task,
                "seed": self.seed,
                "index": lane.index,
                "score": episode_score(lane.task, lane.rewards, lane.success),
                "success": lane.success,
                "steps": len(lane.rewards),
            }
            for lane in playing
        ]

    def _prompt(self, agent: Agent, tokenizer: Tokenizer, lane: Lane, seed: int) -> Prompt | None:
        if self.prompt == "none":
            return None
        known = demonstrated(self.demonstrations, lane.task)
        return agent.prompt(tokenizer, known[seed % len(known)], self.prompt, lane.observation)


# Kept from one batch to the next, in each process.
made = functools.lru_cache(maxsize=1)(lambda make_agent: make_agent())
demonstrated = functools.lru_cache(maxsize=8)(lambda demonstrations, task: demonstrations(task))
_idle: dict[str, list[Any]] = {}


@contextlib.contextmanager
def environments(tasks: Sequence[str]) -> Iterator[list[Any]]:
    """An environment for each task, a task coming several times; idle ones are used again."""
    for task in set(_idle) - set(tasks):
        for env in _idle.pop(task):
            env.close()
    envs = []
    try:
        for task in tasks:
            spare = _idle.get(task)
            envs.append(spare.pop() if spare else domains.make_env(task))
        yield envs
    except BaseException:
        for env in envs:
            env.close()
        raise
    for task, env in zip(tasks, envs, strict=True):
        _idle.setdefault(task, []).append(env)


def close_environments() -> None:
    """Close the environments that are kept for the next batch."""
    for task in list(_idle):
        for env in _idle.pop(task):
            env.close()


def rollouts(
    evaluation: Evaluation,
    tasks: Sequence[str],
    episodes: int,
    path: str | os.PathLike | None = None,
    *,
    lanes: int = 4,
    workers: int = 1,
) -> Iterator[pd.DataFrame]:
    """Play `episodes` of each task, yielding the table of finished episodes as it grows.

    Up to `lanes` episodes are played in one batch, and `workers` batches at a time, on a core each;
    one worker is this process, on all cores. Which episodes share a batch is settled beforehand and
    depends on tasks, episodes and lanes alone, so that a second evaluation with these gives the
    same rows to the last digit. With `path`, finished episodes are kept there, a batch at a time,
    and a second call goes on from them: a batch that was cut short is played again from its
    beginning.

    Raises KeyError for an unknown task and DataError where `path` holds no such table.
    """
    for task in tasks:
        domains.domain_of(task)  # an unknown task is named before anything is played
    old = _read_episodes(path)
    asked = old.task.isin(tasks) & (old.seed == evaluation.seed) & (old["index"] < episodes)
    others, rows = old[~asked].to_dict("records"), old[asked].to_dict("records")
    finished = {(r["task"], r["index"]) for r in rows}
    left = [b for b in batches(tasks, episodes, lanes) if not finished.issuperset(b)]
    if not left:
        yield _table(rows)
        return
    with contextlib.ExitStack() as stack:
        stack.callback(close_environments)
        if workers == 1:
            played = map(evaluation.play, left)
        else:
            pool = stack.enter_context(worker_pool(min(workers, len(left)), pinned=True))
            jobs = [pool.submit(evaluation.play, batch) for batch in left]
            played = (job.result() for job in concurrent.futures.as_completed(jobs))
        for batch in played:
            rows += [r for r in batch if (r["task"], r["index"]) not in finished]
            if path is not None:
                write_text(path, _csv(others + rows))
            yield _table(rows)


def batches(tasks: Sequence[str], episodes: int, lanes: int) -> list[Lanes]:
    """All episodes in batches of at most `lanes`, each of one domain and with the same spaces.

    A task's episodes are cut into batches from the first on; what is less than a batch is put
    together with other tasks', while their spaces agree.
    """
    parts: list[tuple[Any, list[tuple[str, int]]]] = []
    for task in tasks:
        kind: Any = task
        if episodes % lanes:  # environments can be slow to make
            env = domains.make_env(task)
            kind = domains.TASKS[task].domain, env.observation_space, env.action_space
            env.close()
        for first in range(0, episodes, lanes):
            part = [(task, i) for i in range(first, min(first + lanes, episodes))]
            for other, together in parts:
                if len(together) + len(part) <= lanes and other == kind:
                    together += part
                    break
            else:
                parts.append((kind, part))
    return [tuple(part) for _, part in parts]


def _read_episodes(path: str | os.PathLike | None) -> pd.DataFrame:
    if path is None or not pathlib.Path(path).is_file():
        return pd.DataFrame(columns=list(EPISODE_COLUMNS))
    try:
        return pd.read_csv(path)[list(EPISODE_COLUMNS)]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not a table of played episodes ({error})") from error


def episodes_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The table of played episodes from result rows whose metrics are "score 0", "success 0", ...

    Raises DataError where an episode lacks a metric.
    """
    frame = rows[["task", "seed", "value"]].copy()
    frame[["metric", "index"]] = rows.metric.str.split(" ", n=1, expand=True).to_numpy()
    frame["index"] = frame["index"].astype(int)
    wide = frame.pivot(index=["task", "seed", "index"], columns="metric", values="value")
    wide = wide.reindex(columns=["score", "success", "steps"])
    if wide.isna().any(axis=None):
        task, seed, index = wide[wide.isna().any(axis=1)].index[0]
        raise DataError(f"episode {index} of {task}, seed {seed}: score, success or steps missing")
    wide = wide.astype({"success": bool, "steps": int})
    return wide.reset_index().rename_axis(columns=None)[list(EPISODE_COLUMNS)]


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


def with_scale(references: pd.DataFrame) -> pd.Series:
    """By task, whether its scores are normalised and counted: its expert is sound, and not weak."""
    return references.sound & ~references.weak


def score_table(episodes: pd.DataFrame, references: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One row a task: mean score, normalised score with a 95 % bootstrap interval, n.

    Where the task has no scale (`with_scale`) the normalised columns are NaN: pandas leaves them
    out of means and counts. `weak` is carried along, to name such tasks.
    """
    rows, scaled = [], with_scale(references)
    for task, group in episodes.groupby("task", sort=False):
        reference = references.loc[task]
        scores = group.score.to_numpy(float)
        columns = {"normalized": scores.mean()}
        columns["low"], columns["high"] = bootstrap([scores], seed)
        for key, value in columns.items():
            columns[key] = (
                normalized_score(value, reference["random"], reference["expert"])
                if scaled[task]
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
    """One row a domain: mean normalised score over its tasks with a scale, 95 % interval, tasks.

    The interval resamples episodes within each task.
    """
    strata: dict[str, list[np.ndarray]] = {}
    for task, unit in sorted(normalized_episodes(episodes, references).items()):
        strata.setdefault(domains.TASKS[task].domain, []).append(unit)
    return _means(strata, seed)


def normalized_episodes(played: pd.DataFrame, references: pd.DataFrame) -> dict[str, np.ndarray]:
    """Normalised score of every episode, by task, of tasks with a scale only."""
    out, scaled = {}, with_scale(references)
    for task, group in played.groupby("task", sort=False):
        r = references.loc[task]
        if scaled[task]:
            out[task] = normalized_score(group.score.to_numpy(float), r["random"], r["expert"])
    return out


def _means(strata: dict[str, list[np.ndarray]], seed: int) -> pd.DataFrame:
    """Mean and 95 % interval over each domain's tasks; n is their number."""
    rows = []
    for domain, units in strata.items():
        low, high = bootstrap(units, seed)
        mean = float(np.mean([u.mean() for u in units]))
        rows.append({"domain": domain, "mean": mean, "low": low, "high": high, "n": len(units)})
    return pd.DataFrame(rows, columns=["domain", "mean", "low", "high", "n"])


def bootstrap(
    strata: Sequence[np.ndarray], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the mean over strata of each stratum's mean."""
    low, high = np.percentile(resampled_means(strata, seed, resamples).mean(axis=0), [2.5, 97.5])
    return float(low), float(high)


def resampled_means(strata: Sequence[np.ndarray], seed: int, resamples: int) -> np.ndarray:
    """Each stratum's mean with its values drawn anew, float64 (strata, resamples)."""
    rng = np.random.default_rng(seed)
    draw = lambda x: x[rng.integers(len(x), size=(resamples, len(x)))]  # noqa: E731
    return np.stack([draw(x).mean(axis=1) for x in strata])


def difference(
    one: pd.DataFrame, other: pd.DataFrame, references: pd.DataFrame, seed: int = 0
) -> pd.DataFrame:
    """One row a domain, and one for "all" tasks: how much better `one` did than `other`.

    Episode by episode on the same layouts, normalised, means over tasks, with a 95 % interval that
    resamples episodes within each task. Raises ValueError where they played other episodes.
    """
    keys = ["task", "seed", "index"]
    one, other = (x.sort_values(keys, ignore_index=True) for x in (one, other))
    if not one[keys].equals(other[keys]):
        raise ValueError("the two played different episodes")
    scale = (references.expert - references.random).where(with_scale(references))
    gain = (one.score - other.score) / scale.reindex(one.task).to_numpy()
    by_task = {task: g.to_numpy() for task, g in gain.dropna().groupby(one.task)}
    groups = {"all": list(by_task.values())} if by_task else {}
    for task, gains in by_task.items():
        groups.setdefault(domains.TASKS[task].domain, []).append(gains)
    return _means(groups, seed)
