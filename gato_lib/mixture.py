"""The training mixture: weighted, seeded, resumable batches (paper 2.3, Table 1, App. D).

Batches are of one domain each, chosen by the domains' weights: sequences of one shape need no
padding to another's. (The paper mixes domains within a batch; README, Deviations.) Batch number i
is a function of i and the seeds alone, so a step number is all it takes to resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from gato_lib.config import DataConfig
from gato_lib.sequence import Batch, TokenSequence, concatenate, make_batch


@dataclasses.dataclass
class TaskData:
    """Where one task's episodes lie in its group's sequence, one after another.

    Attributes:
      episodes: int64 (E, 2), first and last step (half-open) of each episode.
    """

    episodes: np.ndarray


@dataclasses.dataclass
class Group:
    """The tasks of one domain, and the fixed shape of its batches."""

    name: str
    seq: TokenSequence
    tasks: dict[str, TaskData]
    length: int = 0
    batch_size: int = 0
    num_targets: int = 0
    num_patches: int = 0

    @property
    def max_patches(self) -> int:
        """Distinct patches a batch can hold at most."""
        most = int(np.add.reduceat(self.seq.patch >= 0, self.seq.offsets[:-1], dtype=int).max())
        steps = self.length // int(np.diff(self.seq.offsets).min())
        return self.batch_size * most * max(steps, 1)


def _window_end(offsets: np.ndarray, first: int, limit: int, tokens: int) -> int:
    """Largest step end such that steps [first, end) hold at most `tokens` tokens, at most limit."""
    end = int(np.searchsorted(offsets, offsets[first] + tokens, side="right")) - 1
    return min(end, limit)


def build_group(
    name: str, sequences: dict[str, Sequence[TokenSequence]], config: DataConfig
) -> Group:
    """Join a domain's episodes and choose its batch shape.

    Raises ValueError where one timestep does not fit the context.
    """
    seq = concatenate([s for episodes in sequences.values() for s in episodes])
    offsets = seq.offsets
    steps = np.diff(offsets)
    if steps.max() > config.context_length:
        raise ValueError(
            f"{name}: a timestep has {steps.max()} tokens, context_length is "
            f"{config.context_length}"
        )
    tasks, step, longest = {}, 0, 0
    for task, episodes in sequences.items():
        ends = step + np.cumsum([e.steps for e in episodes])
        begins = np.concatenate([[step], ends[:-1]])
        tasks[task] = TaskData(np.stack([begins, ends], axis=1))
        for begin, end in tasks[task].episodes:
            for first in range(begin, end):
                last = _window_end(offsets, first, end, config.context_length)
                longest = max(longest, int(offsets[last] - offsets[first]))
        step = int(ends[-1])
    group = Group(name, seq, tasks, length=longest)
    group.batch_size = max(1, config.batch_tokens // longest)
    mask = np.concatenate([[0], np.cumsum(seq.loss_mask(config.text_loss))])
    per_step = mask[offsets[1:]] - mask[offsets[:-1]]
    # No row holds more targets than its densest steps repeated until the row is full.
    group.num_targets = int(np.ceil((per_step / steps).max() * longest))
    group.num_patches = 0
    if len(seq.patches):
        samples = [sample_windows(group, config, np.random.default_rng([1, i])) for i in range(64)]
        most = max(_distinct_patches(seq, windows) for windows in samples)
        group.num_patches = min(int(np.ceil(most * 1.1 / 32)) * 32, group.max_patches)
    return group


def _distinct_patches(seq: TokenSequence, windows: list[list[tuple[int, int]]]) -> int:
    patch = np.concatenate([seq.patch[a:b] for spans in windows for a, b in spans])
    return len(np.unique(patch[patch >= 0]))


def sample_windows(
    group: Group, config: DataConfig, rng: np.random.Generator
) -> list[list[tuple[int, int]]]:
    """Token spans for each row of a batch: tasks alike, timesteps alike within a task."""
    names = list(group.tasks)
    rows = []
    for _ in range(group.batch_size):
        task = group.tasks[names[rng.integers(len(names))]]
        anchor = int(rng.integers(task.episodes[0, 0], task.episodes[-1, 1]))
        rows.append(_row(group, task, anchor, config, rng))
    return rows


def _row(
    group: Group,
    task: TaskData,
    anchor: int,
    config: DataConfig,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """A window around a step, with a prompt in front of it in `prompt_fraction` of cases (2.3).

    A prompt is whole steps of another episode of the task, at most half of the context: half of
    them from the episode's end, half from anywhere. The window is as many whole steps as fit, with
    the anchor anywhere in it, moved back inside the episode at its end: an episode's last steps,
    which earn the reward, are seen nearly as often as others.
    """
    offsets = group.seq.offsets
    index = int(np.searchsorted(task.episodes[:, 1], anchor, side="right"))
    begin, end = task.episodes[index]
    spans, budget = [], group.length
    if len(task.episodes) > 1 and rng.random() < config.prompt_fraction:
        other = int(rng.integers(len(task.episodes) - 1))
        start, last = task.episodes[other + (other >= index)]
        if rng.random() >= 0.5:
            last = int(rng.integers(start, last)) + 1  # anywhere; otherwise the episode's end
        first = max(start, int(np.searchsorted(offsets, offsets[last] - group.length // 2)))
        if first < last:
            spans.append((int(offsets[first]), int(offsets[last])))
            budget -= spans[0][1] - spans[0][0]
    earliest = lambda last: max(  # noqa: E731
        begin, int(np.searchsorted(offsets, offsets[last] - budget))
    )
    first = int(rng.integers(earliest(anchor + 1), anchor + 1))
    last = _window_end(offsets, first, end, budget)
    if last == end:
        first = min(first, earliest(end))
    spans.append((int(offsets[first]), int(offsets[last])))
    return spans


def group_batch(group: Group, config: DataConfig, rng: np.random.Generator) -> Batch:
    """One training batch of this group."""
    windows = sample_windows(group, config, rng)
    num_patches = group.num_patches
    if num_patches and _distinct_patches(group.seq, windows) > num_patches:
        num_patches = group.max_patches  # a rare second shape; nothing is dropped
    return make_batch(
        group.seq, windows, group.length, group.num_targets, num_patches, config.text_loss, rng
    )


class Mixture:
    """Batches by number; `iterate(start)` goes on from any of them."""

    def __init__(self, groups: Sequence[Group], config: DataConfig):
        self.groups = list(groups)
        self.config = config
        weights = dict(config.weights)
        unknown = sorted(set(weights) - {g.name for g in groups})
        if unknown:
            raise ValueError(f"weights name {unknown}, the mixture has {[g.name for g in groups]}")
        self._weights = [weights.get(g.name, 1.0) for g in self.groups]

    def _dataset(self, seed: int) -> grain.MapDataset:
        def source(number: int, group: Group) -> grain.MapDataset:
            # An endless source of batch numbers; each batch draws from its own generator.
            return (
                grain.MapDataset.range(1)
                .repeat()
                .seed((self.config.seed + 1000 * seed) * 1000 + number)
                .random_map(lambda _, rng, g=group: (number, group_batch(g, self.config, rng)))
            )

        return grain.MapDataset.mix(
            [source(i, g) for i, g in enumerate(self.groups)], weights=self._weights
        )

    def __getitem__(self, index: int) -> tuple[str, Batch]:
        number, batch = self._dataset(0)[index]
        return self.groups[number].name, batch

    def iterate(self, start: int = 0, seed: int = 0) -> Iterator[tuple[str, Batch]]:
        """Batches from number `start` on, prepared ahead of time by one thread.

        `seed` is the training run's: runs with different seeds see different batches of one data
        set.
        """
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        iterator = iter(self._dataset(seed).to_iter_dataset(options))
        state: dict[str, Any] = iterator.get_state()
        iterator.set_state(state | {"next_index": start})
        for number, batch in iterator:
            yield self.groups[number].name, batch

    def describe(self) -> list[dict[str, Any]]:
        """One row a group: shapes, windows, weight and padding, for tables."""
        total = sum(self._weights)
        rows = []
        for group, weight in zip(self.groups, self._weights, strict=True):
            sample = [
                sample_windows(group, self.config, np.random.default_rng([2, i])) for i in range(16)
            ]
            used = np.mean([sum(b - a for a, b in spans) for w in sample for spans in w])
            rows.append(
                {
                    "domain": group.name,
                    "tasks": len(group.tasks),
                    "episodes": sum(len(t.episodes) for t in group.tasks.values()),
                    "timesteps": group.seq.steps,
                    "tokens": len(group.seq),
                    "weight": weight / total,
                    "batch": group.batch_size,
                    "length": group.length,
                    "targets": group.num_targets,
                    "patches": group.num_patches,
                    "padding": 1.0 - used / group.length,
                }
            )
        return rows
