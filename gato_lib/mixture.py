"""The training mixture: weighted, seeded, resumable batches (paper 2.3, Table 1, App. D).

Batches are of one domain each, chosen by the domains' weights: sequences of one shape need no
padding to another's. (The paper mixes domains within a batch; README, Deviations.) Where episodes
are much shorter than the context, several windows are packed into a row and do not see each other.
Of documents a row is a window of one, and of pairs of image and text it is five pairs (3.2).

Row r of batch i is a function of i, r and the seeds alone. So the position in the data is one
number, and every process of a run can build the rows that its own devices need.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from gato_lib.config import ConfigError, DataConfig
from gato_lib.distributed import ALONE, Placement
from gato_lib.sequence import Batch, TokenSequence, concatenate, make_batch

# Table 1's weights in per cent. The rows as printed sum to 99.93, and are renormalised over what a
# run has. Keys are our domains, or stand for one (`STANDS_FOR`); others the workbook lacks.
PAPER_WEIGHTS: dict[str, tuple[str, float]] = {
    "dmlab": ("DM Lab", 9.35),
    "atari": ("ALE Atari", 9.5),
    "atari_extended": ("ALE Atari Extended", 10.0),
    "sokoban": ("Sokoban", 1.33),
    "babyai": ("BabyAI", 9.06),
    "dmc": ("DM Control Suite", 4.62),
    "dmc_pixels": ("DM Control Suite Pixels", 7.07),
    "dmc_random_small": ("DM Control Suite Random Small", 3.04),
    "dmc_random_large": ("DM Control Suite Random Large", 3.04),
    "metaworld": ("Meta-World", 8.96),
    "procgen": ("Procgen", 5.34),
    "rgb_stacking": ("RGB Stacking simulator", 1.33),
    "rgb_stacking_real": ("RGB Stacking real robot", 1.33),
    "modular_rl": ("Modular RL", 8.23),
    "manipulation": ("DM Manipulation Playground", 1.68),
    "playroom": ("Playroom", 1.33),
    "massive_text": ("MassiveText", 6.7),
    "m3w": ("M3W", 4.0),
    "align": ("ALIGN", 0.67),
    "coco": ("MS-COCO Captions", 0.67),
    "conceptual_captions": ("Conceptual Captions", 0.67),
    "ltip": ("LTIP", 0.67),
    "okvqa": ("OKVQA", 0.67),
    "vqav2": ("VQAv2", 0.67),
}

# Our domains that are not the paper's own, and the sets of its Table 1 that each stands for.
STANDS_FOR: dict[str, tuple[str, ...]] = {
    "text": ("massive_text",),
    "captions": ("align", "coco", "conceptual_captions", "ltip"),
    "vqa": ("okvqa", "vqav2"),
    "rgb_stacking_shifted": ("rgb_stacking_real",),
}

# Share of padding from which rows take further windows: the limit is a tenth, less what a sample of
# 256 rows may be off.
PACK_ABOVE = 0.08
VALIDATION_BATCHES = 4  # of each domain


def mixture_weights(
    text: str, domains: Sequence[str], tasks: Sequence[str] = ()
) -> tuple[tuple[str, float], ...]:
    """Weights of the domains a run has, from a notebook's parameter; they sum to one.

    "equal"; "paper", Table 1's column renormalised over what there is; or a list such as
    "babyai 2, metaworld 1" that names each of them, and any of `tasks` that shall have a weight of
    its own beside its domain's. Raises ConfigError.
    """
    if text == "equal":
        weights = dict.fromkeys(domains, 1.0)
    elif text == "paper":
        unknown = sorted(set(domains) - set(PAPER_WEIGHTS) - set(STANDS_FOR))
        if unknown:
            raise ConfigError(f"mixture 'paper': Table 1 has no weight for {unknown}")
        weights = {d: sum(PAPER_WEIGHTS[k][1] for k in STANDS_FOR.get(d, (d,))) for d in domains}
    else:
        try:
            items = [(d, float(w)) for d, w in (item.split() for item in text.split(","))]
        except ValueError:
            raise ConfigError(
                f"mixture is {text!r}, expected 'equal', 'paper' or a list as in "
                "'babyai 2, metaworld 1'"
            ) from None
        weights = dict(items)
        sound = all(math.isfinite(w) and w > 0 for w in weights.values())
        of_domains = sorted(d for d, _ in items if d not in tasks)
        if of_domains != sorted(domains) or len(items) > len(weights) or not sound:
            raise ConfigError(
                f"mixture {text!r}: expected one positive weight for each of {sorted(domains)}, "
                "and at most one for a task of theirs"
            )
    total = sum(weights.values())
    return tuple((d, weights[d] / total) for d in sorted(weights))


def paper_shares(weights: Mapping[str, float]) -> dict[str, float]:
    """A mixture's weights by the keys of `PAPER_WEIGHTS`, shared by what a domain stands for.

    Domains that Table 1 does not know are left out.
    """
    shares: dict[str, float] = {}
    for domain, weight in weights.items():
        keys = [k for k in STANDS_FOR.get(domain, (domain,)) if k in PAPER_WEIGHTS]
        total = sum(PAPER_WEIGHTS[k][1] for k in keys)
        for k in keys:
            shares[k] = shares.get(k, 0.0) + weight * PAPER_WEIGHTS[k][1] / total
    return shares


@dataclasses.dataclass
class TaskData:
    """Where one task's episodes lie in its group's sequence, one after another.

    Attributes:
      episodes: int64 (E, 2), first and last step (half-open) of each episode.
      held_out: number of episodes, at the end, that are for validation only.

    A document is an episode whose every token is a step.
    """

    episodes: np.ndarray
    held_out: int = 0

    @property
    def seen(self) -> np.ndarray:
        """Episodes of the training set."""
        return self.episodes[: len(self.episodes) - self.held_out]

    @property
    def unseen(self) -> np.ndarray:
        """Episodes held out."""
        return self.episodes[len(self.episodes) - self.held_out :]


class Window(NamedTuple):
    """A piece of an episode in a row, with a prompt in front of it or not.

    Attributes:
      task: task id.
      spans: first and last token (half-open) of the prompt, if any, and of the window.
    """

    task: str
    spans: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        return sum(last - first for first, last in self.spans)


Row = list[Window]


@dataclasses.dataclass
class Group:
    """The tasks of one domain, and the fixed shape of its batches.

    Attributes:
      length: T, tokens of a row. batch_size: B, rows of the global batch.
      num_targets: K, of a row.
      num_patches: Q, distinct patches as a rule, by the number of rows that share them.
      packed: whether a row goes on with further windows where one ends early.
      text_loss: whether text counts in the loss. prompt_fraction: share of windows with a prompt;
        prompt_ends: share of these that have an episode's end.
      parallel: whether actions are zeroed as inputs.
      pairs: documents that make a row, joined and then padded or cropped; 0 is one window.
      sizes: how often each task is drawn, in proportion; None is all alike.
    """

    name: str
    seq: TokenSequence
    tasks: dict[str, TaskData]
    length: int = 0
    batch_size: int = 0
    num_targets: int = 0
    num_patches: dict[int, int] = dataclasses.field(default_factory=dict)
    packed: bool = False
    text_loss: bool = True
    prompt_fraction: float = 0.0
    prompt_ends: float = 0.5
    parallel: bool = False
    pairs: int = 0
    sizes: Mapping[str, float] | None = None

    def max_patches(self, rows: int) -> int:
        """Distinct patches that so many rows can hold at most."""
        most = int(np.add.reduceat(self.seq.patch >= 0, self.seq.offsets[:-1], dtype=int).max())
        steps = self.length // int(np.diff(self.seq.offsets).min())
        return min(rows * most * max(steps, 1), len(self.seq.patches))


class Sample(NamedTuple):
    """A batch, or this process's part of one, its domain, and the tasks in that part."""

    domain: str
    batch: Batch
    tasks: tuple[str, ...]


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
        held_out = min(int(len(episodes) * config.validation_fraction), len(episodes) - 1)
        tasks[task] = TaskData(np.stack([begins, ends], axis=1), held_out)
        for begin, end in tasks[task].episodes:
            first = offsets[begin:end]
            last = np.searchsorted(offsets, first + config.context_length, side="right") - 1
            longest = max(longest, int((offsets[np.minimum(last, end)] - first).max()))
        step = int(ends[-1])
    group = Group(name, seq, tasks)
    group.text_loss, group.prompt_fraction = config.text_loss, config.prompt_fraction
    group.prompt_ends = config.prompt_ends
    group.parallel = name in config.parallel_actions
    group.sizes = config.task_weights(list(sequences))
    group.length, padding = _best_length(group, config, longest)
    if padding > PACK_ABOVE:
        group.packed = True
        group.length, _ = _best_length(group, config, config.context_length)
    group.batch_size = _batch_size(group.length, config)
    mask = np.concatenate([[0], np.cumsum(seq.loss_mask(group.text_loss))])
    per_step = mask[offsets[1:]] - mask[offsets[:-1]]
    # No row holds more targets than its densest steps repeated until the row is full.
    group.num_targets = int(np.ceil((per_step / steps).max() * group.length))
    return group


def build_documents(
    name: str,
    documents: dict[str, tuple[Sequence[TokenSequence], Sequence[TokenSequence]]],
    config: DataConfig,
    pairs: int = 0,
) -> Group:
    """Join a domain's documents, for each of its sets those seen and those held out.

    With `pairs` a row is so many documents of a set, joined (3.2). Half of such sums fit a row; the
    longer half is cropped anywhere, as in the paper. Without, a row is a window of one document,
    anywhere in it. Sets are drawn in proportion to their tokens.
    """
    parts = [d for seen, held_out in documents.values() for d in (*seen, *held_out)]
    ends = np.cumsum([len(d) for d in parts])
    bounds = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    tasks, first = {}, 0
    for task, (seen, held_out) in documents.items():
        last = first + len(seen) + len(held_out)
        tasks[task] = TaskData(bounds[first:last], len(held_out))
        first = last
    sizes = {n: sum(map(len, seen)) for n, (seen, _) in documents.items()}
    group = Group(name, concatenate(parts), tasks, pairs=pairs, sizes=sizes)
    most = config.document_length or config.context_length
    if not pairs:
        group.length = most = min(most, int(np.diff(bounds).max()))
        group.packed = padding_share(dataclasses.replace(group, batch_size=1), config) > PACK_ABOVE
        group.batch_size, group.num_targets = _batch_size(most, config), most
        return group
    rng, sums = np.random.default_rng(3), []
    share = np.array(list(sizes.values())) / sum(sizes.values())
    for task, rows in zip(tasks.values(), rng.multinomial(4096, share), strict=True):
        lengths = np.diff(task.seen)[:, 0]
        sums.extend(lengths[rng.integers(len(lengths), size=(rows, pairs))].sum(axis=1))
    group.length = min(most, int(np.median(sums)))
    group.batch_size = _batch_size(group.length, config)
    mask = np.concatenate([[0], np.cumsum(group.seq.loss_mask())])
    dense = int((mask[bounds[:, 1]] - mask[bounds[:, 0]]).max())
    group.num_targets = min(group.length, pairs * dense)
    return group


def patch_slots(group: Group, config: DataConfig, rows: int) -> int:
    """Distinct patches that so many rows share, as a rule; measured once. 0 without images."""
    if not len(group.seq.patches):
        return 0
    if rows not in group.num_patches:
        batches = _samples(group, config, 1, 64)
        drawn = [row for batch in batches for row in batch]
        shares = [drawn[i : i + rows] for i in range(0, len(drawn) - rows + 1, rows)]
        most = max(_distinct_patches(group.seq, share) for share in shares)
        slots = int(np.ceil(most * 1.1 / 32)) * 32  # with room, so that overflow is rare
        group.num_patches[rows] = min(slots, group.max_patches(rows))
    return group.num_patches[rows]


def _batch_size(length: int, config: DataConfig) -> int:
    multiple = config.rows_multiple
    return max(1, config.batch_tokens // length // multiple) * multiple


def _best_length(group: Group, config: DataConfig, most: int) -> tuple[int, float]:
    """(T, share of padding): where least is padding, from `most` tokens down by less than a step.

    A row holds whole steps: a length that does not fit them is partly padding in every row.
    """
    step = int(np.diff(group.seq.offsets).max())
    shares = {}
    for length in range(most, max(most - step, step - 1), -1):
        shape = {"length": length, "batch_size": _batch_size(length, config)}
        shares[length] = padding_share(dataclasses.replace(group, **shape), config)
    return min(shares.items(), key=lambda item: item[1])


def _samples(group: Group, config: DataConfig, stream: int, count: int) -> list[list[Row]]:
    """The rows of some batches, drawn apart from training's own, to measure shapes with."""
    batches = (range(i * group.batch_size, (i + 1) * group.batch_size) for i in range(count))
    return [
        [draw_row(group, np.random.default_rng([stream, r])) for r in numbers]
        for numbers in batches
    ]


def padding_share(group: Group, config: DataConfig) -> float:
    """Share of a batch's tokens that are padding, from a sample of 256 rows or more."""
    count = -(-256 // group.batch_size)
    rows = [row for batch in _samples(group, config, 2, count) for row in batch]
    return 1.0 - float(np.mean([sum(w.tokens for w in row) for row in rows])) / group.length


def _distinct_patches(seq: TokenSequence, rows: Sequence[Row]) -> int:
    patch = np.concatenate([seq.patch[a:b] for row in rows for w in row for a, b in w.spans])
    return len(np.unique(patch[patch >= 0]))


def draw_row(group: Group, rng: np.random.Generator, held_out: bool = False) -> Row:
    """The windows of one row: tasks alike, or by size, and timesteps alike within a task.

    With `held_out`, windows come from the held-out episodes and prompts from training's.
    """
    names = [n for n, t in group.tasks.items() if not held_out or t.held_out]
    row, budget = [], group.length
    while not row or group.packed:
        if group.sizes is None:
            name = names[rng.integers(len(names))]
        else:
            sizes = np.array([group.sizes[n] for n in names], np.float64)
            name = names[rng.choice(len(names), p=sizes / sizes.sum())]
        task = group.tasks[name]
        episodes = task.unseen if held_out else task.seen
        if group.pairs:
            chosen = episodes[rng.integers(len(episodes), size=group.pairs)]
            return [Window(name, _crop(group.seq.offsets[chosen], group.length, rng))]
        anchor = int(rng.integers(episodes[0, 0], episodes[-1, 1]))
        spans = _spans(group, task, anchor, budget, group.prompt_fraction, rng)
        if not spans:
            break
        row.append(Window(name, spans))
        budget -= row[-1].tokens
    return row


def _spans(
    group: Group,
    task: TaskData,
    anchor: int,
    budget: int,
    prompt_fraction: float,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """A window around a step, with a prompt in front of it in `prompt_fraction` of cases (2.3).

    A prompt is whole steps of another episode of the task, at most half of the room: `prompt_ends`
    of them from the episode's end, the others from anywhere. The window is as many whole steps as
    fit, with the anchor anywhere in it, moved back inside the episode at its end: an episode's last
    steps, which earn the reward, are seen nearly as often as others. Empty where the step does not
    fit.
    """
    offsets = group.seq.offsets
    index = int(np.searchsorted(task.episodes[:, 1], anchor, side="right"))
    begin, end = task.episodes[index]
    step = int(offsets[anchor + 1] - offsets[anchor])
    if step > budget:
        return []
    spans = []
    others = len(task.seen) - (index < len(task.seen))
    if others > 0 and rng.random() < prompt_fraction:
        other = int(rng.integers(others))
        start, last = task.seen[other + (other >= index)]
        if rng.random() >= group.prompt_ends:
            last = int(rng.integers(start, last)) + 1  # anywhere; otherwise the episode's end
        room = min(budget // 2, budget - step)
        first = max(start, int(np.searchsorted(offsets, offsets[last] - room)))
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


def _crop(spans: np.ndarray, length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`length` of the tokens of some spans (S, 2), from anywhere; all where they are fewer."""
    ends = np.cumsum(spans[:, 1] - spans[:, 0])
    begin = int(rng.integers(max(ends[-1] - length, 0) + 1))
    cropped = []
    for (first, last), end in zip(spans.tolist(), ends.tolist(), strict=True):
        start = end - (last - first)  # where this span begins in all of them
        a, b = max(first, first + begin - start), min(last, first + begin + length - start)
        if a < b:
            cropped.append((a, b))
    return cropped


def group_batch(
    group: Group,
    config: DataConfig,
    seed: int,
    placement: Placement = ALONE,
    held_out: bool = False,
) -> Sample:
    """This process's rows of the batch that `seed` names, part by part.

    Each part has slots for the distinct patches of its own rows: no device needs a patch that
    another one embeds. Held-out batches take the means of patch intervals, as evaluation does.
    """
    mine = placement.rows(placement.process, group.batch_size)
    each = group.batch_size // placement.parts
    images = len(group.seq.patches) > 0
    # How many slots it takes is the same on every process, so each draws what the others have.
    needed = range(group.batch_size) if images else mine
    rngs = {int(r): np.random.default_rng([seed, r]) for r in needed}
    rows = {r: draw_row(group, rng, held_out) for r, rng in rngs.items()}
    slots = patch_slots(group, config, each)
    shares = range(0, group.batch_size, each) if images else ()
    if any(
        _distinct_patches(group.seq, [rows[r + i] for i in range(each)]) > slots for r in shares
    ):
        slots = group.max_patches(each)  # a rare second shape; nothing is dropped
    parts = []
    for part in placement.mine:
        own = range(part * each, (part + 1) * each)
        windows = [rows[r] for r in own]
        batch = make_batch(
            group.seq,
            [[span for w in row for span in w.spans] for row in windows],
            group.length,
            group.num_targets,
            slots,
            group.text_loss,
            None if held_out else [rngs[r] for r in own],
            [[n for n, w in enumerate(row) for _ in w.spans] for row in windows]
            if group.packed
            else None,
            group.parallel,
        )
        none = slots * placement.parts
        patch = np.where(batch.patch < slots, batch.patch + part * slots, none).astype(np.int32)
        parts.append(batch._replace(patch=patch))
    batch = parts[0]
    if len(parts) > 1:
        batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    tasks = tuple(dict.fromkeys(w.task for r in mine for w in rows[int(r)]))
    return Sample(group.name, batch, tasks)


class Batches:
    """An endless iterator of samples whose position can be saved and restored.

    `state` is what grain says of its iterator: plain JSON, the number of samples taken.
    """

    def __init__(self, dataset: grain.MapDataset):
        # Prepared ahead of time by one thread.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Sample:
        return next(self._iterator)

    @property
    def state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._iterator.set_state(dict(state))


class Mixture:
    """Batches by number, of domains by weight; and validation batches of held-out episodes."""

    def __init__(self, groups: Sequence[Group], config: DataConfig):
        self.groups = list(groups)
        self.config = config
        weights = config.domain_weights
        for what, names in (("weights", weights), ("parallel_actions", config.parallel_actions)):
            unknown = sorted(set(names) - {g.name for g in groups})
            if unknown:
                has = [g.name for g in groups]
                raise ConfigError(f"{what}: {unknown}, but the mixture has {has}")
        weights = {g.name: weights.get(g.name, 1.0) for g in self.groups}
        self.weights = {n: w / sum(weights.values()) for n, w in weights.items()}

    def dataset(self, seed: int = 0, placement: Placement = ALONE) -> grain.MapDataset:
        """Samples by number. `seed` is the training run's: other batches of one data set."""

        def source(group: Group) -> grain.MapDataset:
            def draw(_: Any, rng: np.random.Generator) -> Sample:
                return group_batch(group, self.config, int(rng.integers(2**63)), placement)

            # An endless source of batch numbers; each batch draws from its own generator.
            own = f"{self.config.seed} {seed} {group.name}"
            number = int.from_bytes(hashlib.sha256(own.encode()).digest()[:4])
            return grain.MapDataset.range(1).repeat().seed(number).random_map(draw)

        sources = [source(group) for group in self.groups]
        return grain.MapDataset.mix(sources, weights=[self.weights[g.name] for g in self.groups])

    def __getitem__(self, index: int) -> Sample:
        return self.dataset()[index]

    def iterate(self, seed: int = 0, placement: Placement = ALONE) -> Batches:
        """Samples from the first on."""
        return Batches(self.dataset(seed, placement))

    def validation(self, placement: Placement = ALONE) -> list[Sample]:
        """The same batches of held-out episodes at every call, some of each domain that has any."""
        return [
            group_batch(group, self.config, number, placement, held_out=True)
            for group in self.groups
            if any(task.held_out for task in group.tasks.values())
            for number in range(VALIDATION_BATCHES)
        ]

    def describe(self) -> list[dict[str, Any]]:
        """One row a group: shapes, windows, weight and padding, for tables."""
        return [
            {
                "domain": group.name,
                "tasks": len(group.tasks),
                "episodes": sum(len(t.episodes) for t in group.tasks.values()),
                "held out": sum(t.held_out for t in group.tasks.values()),
                "timesteps": group.seq.steps,
                "tokens": len(group.seq),
                "weight": self.weights[group.name],
                "batch": group.batch_size,
                "length": group.length,
                "targets": group.num_targets,
                "patches": patch_slots(group, self.config, group.batch_size),
                "packed": group.packed,
                "padding": padding_share(group, self.config),
            }
            for group in self.groups
        ]
