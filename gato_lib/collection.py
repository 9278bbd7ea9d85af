"""Collecting demonstrations (paper 3.1, App. F): expert -> shards -> filtered Minari data set.

Each episode is its own file, written whole or not at all, so a kill loses at most the episodes in
flight; a second call goes on from there. When a task's episodes are complete they are filtered by
the paper's return rule and merged into one Minari data set, and the shards are removed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np

from gato_lib import domains
from gato_lib.episodes import (
    DataError,
    Episode,
    expert_return,
    keep_mask,
    read_minari,
    read_shard,
    stack_observations,
    write_minari,
    write_shard,
)

CHUNK = 20  # episodes a worker collects before it reports
FORMAT = 1  # raise when what is stored changes


def episode_score(task: str, rewards: Sequence[float], success: bool) -> float:
    """An episode's score by the task's metric."""
    return float(success) if domains.TASKS[task].metric == "success" else float(np.sum(rewards))


@dataclasses.dataclass(frozen=True)
class Collection:
    """What is collected for one task; `folder` holds it."""

    root: str
    task: str
    episodes: int
    noise: tuple[float, ...]
    seed: int

    @property
    def folder(self) -> pathlib.Path:
        settings = [FORMAT, self.task, self.episodes, list(self.noise), self.seed]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        return pathlib.Path(self.root) / f"{self.task.replace('/', '-')}-{digest}"

    @property
    def done(self) -> bool:
        return (self.folder / "data" / "metadata.json").is_file()

    def shard(self, index: int) -> pathlib.Path:
        return self.folder.with_suffix(".shards") / f"{index:06d}.npz"

    def episode_seed(self, index: int, attempt: int) -> int:
        """Seeds of collection never meet those of evaluation, which start at 2**30."""
        text = f"{self.task} {self.seed} {index} {attempt}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "little") % 2**30


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
    dtype = env.action_space.dtype
    return Episode(
        task=task,
        observations=stack_observations(observations),
        actions=np.asarray(actions, dtype),
        executed=np.asarray(executed, dtype),
        rewards=np.asarray(rewards, np.float64),
        success=success,
        seed=seed,
    )


def _collect_chunk(collection: Collection, indices: Sequence[int]) -> int:
    """Write the shards of `indices`; runs in a worker process."""
    env, expert = domains.make_env(collection.task), domains.make_expert(collection.task)
    for index in indices:
        noise = collection.noise[index % len(collection.noise)]
        for attempt in range(20):
            seed = collection.episode_seed(index, attempt)
            try:
                episode = rollout(
                    env, expert, collection.task, seed, noise, np.random.default_rng(seed)
                )
            except domains.ExpertError:
                continue
            write_shard(collection.shard(index), episode)
            break
        else:
            raise DataError(f"{collection.task}: the expert failed on 20 seeds, episode {index}")
    env.close()
    return len(indices)


def _merge(collection: Collection) -> None:
    """Filter and write the Minari data set, then drop the shards; runs in a worker process."""
    episodes = [read_shard(collection.shard(i)) for i in range(collection.episodes)]
    scores = [episode_score(collection.task, e.rewards, e.success) for e in episodes]
    keep = keep_mask(scores)
    if domains.TASKS[collection.task].metric == "success":
        keep = np.array([e.success for e in episodes])
    env = domains.make_env(collection.task)
    write_minari(
        collection.folder,
        [e for e, k in zip(episodes, keep, strict=True) if k],
        env.observation_space,
        env.action_space,
        {
            "task": collection.task,
            "collected": collection.episodes,
            "kept": int(keep.sum()),
            "expert_return": expert_return(scores),
            "scores": scores,
            "noise": list(collection.noise),
            "seed": collection.seed,
        },
    )
    env.close()
    shutil.rmtree(collection.shard(0).parent)


def collect(collections: Sequence[Collection], workers: int | None = None) -> Iterator[str]:
    """Collect what is missing, yielding one line of progress at a time.

    Work is spread over spawned processes (never forked: JAX may be running here). A killed
    collection goes on where it stopped; a finished one returns at once.
    """
    todo = [c for c in collections if not c.done]
    if not todo:
        return
    missing = {c: [i for i in range(c.episodes) if not c.shard(i).is_file()] for c in todo}
    total, left = sum(c.episodes for c in todo), sum(map(len, missing.values()))
    yield f"collecting {left} of {total} episodes of {len(todo)} tasks"
    context = multiprocessing.get_context("spawn")
    workers = workers or min(os.cpu_count() or 1, len(todo))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending: dict[concurrent.futures.Future, Collection] = {}
        chunks_left = {}
        for c in todo:
            chunks = [missing[c][i : i + CHUNK] for i in range(0, len(missing[c]), CHUNK)]
            chunks_left[c] = len(chunks)
            for chunk in chunks:
                pending[pool.submit(_collect_chunk, c, chunk)] = c
            if not chunks:
                pending[pool.submit(_merge, c)] = c
        while pending:
            done, _ = concurrent.futures.wait(
                pending, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                c = pending.pop(future)
                count = future.result()
                if count is None:  # a merge
                    yield f"{c.task}: {c.episodes} episodes collected"
                    continue
                left -= count
                chunks_left[c] -= 1
                if chunks_left[c] == 0:
                    pending[pool.submit(_merge, c)] = c
        yield f"{total} episodes of {len(todo)} tasks collected"


def load(collection: Collection) -> tuple[list[Episode], dict]:
    """The kept episodes and the data card of a finished collection."""
    return read_minari(collection.folder)
