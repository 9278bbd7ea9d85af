"""Collecting demonstrations (paper 3.1, App. F): expert -> shards -> filtered Minari data set.

Each episode is its own file, written whole or not at all, so a kill loses at most the episodes in
flight; a second call goes on from there. When a task's episodes are complete they are filtered by
the paper's return rule and merged into one Minari data set, and the shards are removed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from gato_lib import domains
from gato_lib.config import source_digest
from gato_lib.episodes import (
    DataError,
    Episode,
    expert_return,
    keep_mask,
    read_minari,
    read_shard,
    stack_observations,
    validate,
    write_minari,
    write_shard,
)

ATTEMPTS = 20  # seeds tried for an episode in which the expert fails


@contextlib.contextmanager
def worker_pool(
    workers: int | None = None, pinned: bool = False
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Spawned worker processes (never forked: JAX may be running here), one a core.

    On an error or an interrupt nothing more is started; if this process is killed, they end too.
    `pinned` workers keep to one core each, where the system can do that: without it, workers that
    compute with JAX each start a thread a core and get in one another's way.
    """
    workers = workers or os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    cores = None
    if pinned and hasattr(os, "sched_getaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        cores = spawn.Queue()
        for i in range(workers):
            cores.put(mine[i % len(mine)])
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_start_worker, initargs=(cores,)
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _start_worker(cores: Any) -> None:
    """In a worker: take a core of one's own, and end when the parent does, however it ended."""
    if cores is not None:
        os.sched_setaffinity(0, {cores.get()})

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def episode_score(task: str, rewards: Sequence[float], success: bool) -> float:
    """An episode's score by the task's metric."""
    return float(success) if domains.TASKS[task].metric == "success" else float(np.sum(rewards))


@dataclasses.dataclass(frozen=True)
class Collection:
    """What is collected for one task; `folder` holds it.

    `failures` keeps all episodes, whatever their score.
    """

    root: str
    task: str
    episodes: int
    noise: tuple[float, ...]
    seed: int
    failures: bool = False
    chunk: ClassVar[int] = 10  # episodes a worker collects before it reports

    @property
    def folder(self) -> pathlib.Path:
        code = source_digest("collection.py", "episodes.py") + domains.domain_of(self.task).code
        settings = [code, self.task, self.episodes, list(self.noise), self.seed, self.failures]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        return pathlib.Path(self.root) / f"{self.task.replace('/', '-')}-{digest}"

    @property
    def card(self) -> dict[str, Any]:
        """What identifies it, as kept in the data set."""
        return {
            "task": self.task,
            "collected": self.episodes,
            "noise": list(self.noise),
            "seed": self.seed,
            "failures": self.failures,
        }

    @property
    def done(self) -> bool:
        return (self.folder / "data" / "metadata.json").is_file()

    def shard(self, index: int) -> pathlib.Path:
        return self.folder.with_suffix(".shards") / f"{index:06d}.npz"

    def leftovers(self, first: int, step: int) -> list[pathlib.Path]:
        """What a kill left behind: of a merge, and of the shards that are this machine's."""
        shards = self.folder.with_suffix(".shards")
        if self.done:
            return [shards] if shards.is_dir() else []
        partial = [
            p for p in shards.glob(".*.npz.*.partial") if int(p.name.split(".")[1]) % step == first
        ]
        if step == 1:
            partial += self.folder.parent.glob(f".{self.folder.name}.*.partial")
        return partial

    def episode_seed(self, index: int, attempt: int) -> int:
        """Seeds of collection never meet those of evaluation, which start at 2**30."""
        text = f"{self.task} {self.seed} {index} {attempt}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "little") % 2**30

    def gather(self, indices: Sequence[int]) -> int:
        """Write the shards of `indices` and return how many; runs in a worker process.

        Raises DataError where the expert fails on every seed that is tried.
        """
        env, expert = domains.make_env(self.task), domains.make_expert(self.task)
        for index in indices:
            noise = self.noise[index % len(self.noise)]
            for attempt in range(ATTEMPTS):
                seed = self.episode_seed(index, attempt)
                rng = np.random.default_rng([seed, 1])
                try:
                    episode = rollout(env, expert, self.task, seed, noise, rng)
                except domains.ExpertError:
                    continue
                write_shard(self.shard(index), episode)
                break
            else:
                raise DataError(
                    f"{self.task}: the expert failed on {ATTEMPTS} seeds, episode {index}"
                )
        env.close()
        return len(indices)

    def keep(self, episodes: Sequence[Episode], scores: Sequence[float]) -> np.ndarray:
        """Which episodes are kept, bool (E,): by the paper's return rule, or the solved ones.

        Raises DataError where none are.
        """
        if self.failures:
            return np.ones(len(scores), bool)
        if domains.TASKS[self.task].metric == "success":
            keep = np.array([e.success for e in episodes])
        else:
            try:
                keep = keep_mask(scores)
            except ValueError as error:
                raise DataError(f"{self.task}: {error}") from error
        if not keep.any():
            raise DataError(f"{self.task}: the expert solved no episode of {len(episodes)}")
        return keep


def rollout(env, expert, task: str, seed: int, noise: float, rng: np.random.Generator) -> Episode:
    """One expert episode with injected noise; raises ExpertError where the expert fails."""
    domain = domains.domain_of(task)
    observation, _ = env.reset(seed=seed)
    expert.reset(env)
    observations, actions, executed, rewards = [observation], [], [], []
    success, last = False, None
    while True:
        action = expert.act(observation, last)
        last = domain.perturb(action, noise, env, rng)
        observation, reward, terminated, truncated, info = env.step(last)
        observations.append(observation)
        actions.append(action)
        executed.append(last)
        rewards.append(float(reward))
        success = success or bool(info.get("success", terminated and reward > 0))
        if terminated or truncated:
            break
    return Episode(
        task=task,
        observations=stack_observations(observations),
        actions=stack_observations(actions, env.action_space),
        executed=stack_observations(executed, env.action_space),
        rewards=np.asarray(rewards, np.float64),
        success=success,
        seed=seed,
    )


def _merge(collection: Collection, notes: Mapping[str, Any] | None = None) -> None:
    """Check, filter and write the Minari data set, then drop the shards; runs in a worker.

    Raises DataError naming the shard or the task; the shards stay.
    """
    env = domains.make_env(collection.task)
    episodes = []
    for index in range(collection.episodes):
        path = collection.shard(index)
        episode = read_shard(path)
        if episode.task != collection.task:
            raise DataError(f"{path}: task is {episode.task}, expected {collection.task}")
        validate(episode, env.observation_space, env.action_space, str(path))
        episodes.append(episode)
    scores = [episode_score(collection.task, e.rewards, e.success) for e in episodes]
    spec, keep = domains.TASKS[collection.task], collection.keep(episodes, scores)
    write_minari(
        collection.folder,
        [e for e, k in zip(episodes, keep, strict=True) if k],
        env.observation_space,
        env.action_space,
        collection.card
        | {"kept": int(keep.sum()), "expert_return": expert_return(scores), "scores": scores}
        | {"expert": spec.expert, "expert_sees": spec.sees}
        | dict(notes or {}),
    )
    env.close()
    shutil.rmtree(collection.shard(0).parent)


def collect(
    collections: Sequence[Collection],
    workers: int | None = None,
    *,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
    part: tuple[int, int] = (0, 1),
    pinned: bool = False,
) -> Iterator[str]:
    """Collect what is missing, yielding one line of progress at a time.

    A killed collection goes on where it stopped; a finished one returns at once. A task that fails
    does not stop the others: what could not be collected, and why, is in the DataError at the end.
    Only one process may collect into a folder at a time, but for different parts.

    Args:
      notes: by task, what else its data card shall hold.
      part: (i, n) collects every n-th episode from the i-th on, as one of n machines does. Nothing
        is merged then: that is left to a call without it, once all parts lie in the folder.
      pinned: as in `worker_pool`.
    """
    first, step = part
    if not 0 <= first < step:
        raise ValueError(f"part is {part}, expected (i, n) with 0 <= i < n")
    for path in [p for c in collections for p in c.leftovers(first, step)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    todo = [c for c in collections if not c.done]
    if not todo:
        return
    mine = {c: range(first, c.episodes, step) for c in todo}
    missing = {c: [i for i in mine[c] if not c.shard(i).is_file()] for c in todo}
    total, left = sum(map(len, mine.values())), sum(map(len, missing.values()))
    yield f"collecting {left} of {total} episodes of {len(todo)} tasks"
    begin, wanted, skipped = time.perf_counter(), left, {}
    with worker_pool(workers, pinned) as pool:
        pending: dict[concurrent.futures.Future, Collection] = {}
        chunks_left = {}

        def merge(c: Collection) -> None:
            if step == 1:
                pending[pool.submit(_merge, c, (notes or {}).get(c.task, {}))] = c

        for c in todo:
            chunks = [missing[c][i : i + c.chunk] for i in range(0, len(missing[c]), c.chunk)]
            chunks_left[c] = len(chunks)
            for chunk in chunks:
                pending[pool.submit(c.gather, chunk)] = c
            if not chunks:
                merge(c)
        while pending:
            done, _ = concurrent.futures.wait(
                pending, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                c = pending.pop(future)
                try:
                    count = future.result()
                except (OSError, concurrent.futures.BrokenExecutor):
                    raise  # a full disk or a killed worker stops them all
                except Exception as error:  # simulators fail in many ways
                    if c not in skipped:
                        skipped[c] = f"{type(error).__name__}: {error}"
                        yield f"skipping {c.task}: {skipped[c]}"
                    for other in [f for f, owner in pending.items() if owner is c and f.cancel()]:
                        del pending[other]
                    continue
                if count is None:  # a merge
                    continue
                left -= count
                chunks_left[c] -= 1
                if chunks_left[c] == 0 and c not in skipped:
                    merge(c)
                seconds = (time.perf_counter() - begin) * left / (wanted - left)
                yield f"{total - left} of {total} episodes collected, about {seconds:.0f} s left"
    finished = len(todo) - len(skipped)
    episodes = sum(len(mine[c]) for c in todo if c not in skipped)
    yield f"{episodes} episodes of {finished} tasks collected"
    if skipped:
        reasons = "".join(f"\n  {c.task}: {why}" for c, why in skipped.items())
        raise DataError(f"{len(skipped)} of {len(todo)} tasks could not be collected:{reasons}")


def load(collection: Collection) -> tuple[list[Episode], dict]:
    """The kept episodes and the data card of a finished collection.

    Raises DataError where the data set is damaged or is not this collection.
    """
    episodes, card = read_minari(collection.folder)
    for key, value in collection.card.items():
        if card.get(key) != value:
            raise DataError(f"{collection.folder}: {key} is {card.get(key)!r}, expected {value!r}")
    return episodes, card
