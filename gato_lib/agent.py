"""Acting: observations in, legal action tokens out, one at a time (paper 2.4, App. G).

A `Player` acts in a batch of environments with a cache of keys and values. A step's observation is
one forward pass, and so is each action token but the last, which goes in with the next observation.
The window of tokens that a row sees is a prompt, if any, and the latest whole timesteps:

    context_length = 100   | prompt 30 | step 20 | step 20 | step 20 |    10 free: the next step
                           | prompt 30 | step 20 |                        does not fit, so the
                                                                          oldest leave the window

What stays is then computed anew without what has left, so that each choice is what one forward pass
over the window, as in training, would make of it: cached acting is exact. (Keys and values of
layers after the first were computed with the oldest steps in sight.) `keep` says how much stays, as
a share of the room beside the prompt: with a half, a step is computed twice at most, whatever the
length of the episode; with all of it, a step that leaves makes the others come again each time.
`memory` is the alternative that the paper names, Transformer-XL's: nothing is ever computed anew,
and what is cached keeps traces of what has left.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gato_lib import tokenizers
from gato_lib.config import ModelConfig
from gato_lib.embedding import check_text, table_row
from gato_lib.episodes import Episode, check_observation, select, stack_observations
from gato_lib.model import Gato
from gato_lib.sequence import (
    ACTION,
    ACTION_POSITION,
    NO_ID,
    PATCH,
    TEXT,
    Batch,
    Tokenizer,
    TokenSequence,
    make_batch,
)
from gato_lib.training import graph_of, merge
from gato_lib.transformer import Cache

CHOICES = ("sample", "greedy", "mean")
PIECE = 128  # tokens of a row that are computed anew in one pass, at most

Windows = list[list[tuple[int, int]]]  # for each row, spans of tokens of a sequence
Prompt = tuple[Sequence[Any], Sequence[np.ndarray]]  # a demonstration's observations, action ids


class Agent:
    """A trained network and how it chooses.

    Args:
      context_length: most tokens it sees at a time.
      lengths: fewer for the domains named, as in their training rows (`for_domain`).
      parallel: domains that it was trained in with actions zeroed as inputs: there all tokens of an
        action come from one pass (App. G).
      tell_return: domains in which it was told what an episode reached: it is asked for the best.
      executed: domains in which the actions of the sequences that it was trained on were those
        executed, not the expert's (`Tokenizer.inputs`): so are those of its prompts there.
      continuous, discrete: "sample", "greedy", or, for continuous actions, "mean": the mean of the
        bin distribution, rounded to a bin. `continuous` may name another for some domains, as in
        "mean, rgb_stacking sample".
      temperature: divides the logits that are sampled from.
      keep: share of the room beside the prompt that stays in the window when it is full.
      memory: so many tokens are cached in place of `context_length`, and never computed anew; 0 is
        off. The prompt stays among them.

    Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        text: tokenizers.TextTokenizer | None,
        context_length: int,
        lengths: Mapping[str, int] | None = None,
        parallel: Collection[str] = (),
        tell_return: Collection[str] = (),
        executed: Collection[str] = (),
        *,
        continuous: str = "sample",
        discrete: str = "sample",
        temperature: float = 1.0,
        keep: float = 0.5,
        memory: int = 0,
    ):
        first, *others = (item.split() for item in continuous.split(","))
        sound = len(first) == 1 and all(len(other) == 2 for other in others)
        if not sound or {c[-1] for c in (first, *others)} - set(CHOICES):
            raise ValueError(
                f"continuous is {continuous!r}, expected one of {CHOICES}, and behind it others "
                "for some domains, as in 'mean, rgb_stacking sample'"
            )
        if discrete not in CHOICES[:2]:
            raise ValueError(f"discrete is {discrete!r}, expected one of {CHOICES[:2]}")
        if not 0.0 < temperature < np.inf:
            raise ValueError(f"temperature is {temperature}, expected a number > 0")
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep is {keep}, expected a number in (0, 1]")
        if memory < 0:
            raise ValueError(f"memory is {memory}, expected 0 or more tokens")
        if memory and config.sequence_positions == "sinusoidal":
            raise ValueError("memory needs positions that are relative: cached keys keep theirs")
        check_text(config, text)
        self.config, self.text = config, text
        self.params = jax.tree.map(jnp.asarray, params)
        self.context_length, self.lengths = context_length, dict(lengths or {})
        self.parallel_domains, self.parallel = frozenset(parallel), False
        self.telling_domains, self.tell_return = frozenset(tell_return), False
        self.executed_domains, self.inputs = frozenset(executed), "expert"
        self.continuous = self._continuous = first[0]
        self._continuous_in = dict(others)
        self.discrete, self.temperature = discrete, temperature
        self.keep, self.memory = keep, memory

    def for_domain(self, domain: str) -> Agent:
        """The same agent with the context that it was trained with in a domain."""
        agent = copy.copy(self)
        agent.context_length = self.lengths.get(domain, self.context_length)
        agent.parallel = domain in self.parallel_domains
        agent.tell_return = domain in self.telling_domains
        agent.inputs = "executed" if domain in self.executed_domains else "expert"
        agent.continuous = self._continuous_in.get(domain, self._continuous)
        return agent

    @property
    def span(self) -> int:
        """Most tokens in the cache."""
        return self.memory or self.context_length

    def tokenizer(self, env) -> Tokenizer:
        return Tokenizer(
            env.observation_space,
            env.action_space,
            self.text,
            self.config.discrete_range,
            self.tell_return,
            self.inputs,
        )

    def prompt(
        self, tokenizer: Tokenizer, demonstration: Episode, where: str, observation: Any
    ) -> Prompt:
        """The first ("start") or last ("end") whole steps of a demonstration.

        As many as fit half of the context, as in training, and leave room for a step as long as
        that of `observation`, the episode's first; possibly none.
        """
        if where not in ("start", "end"):
            raise ValueError(f"prompt is {where!r}, expected 'start' or 'end'")
        seq = tokenizer.episode(demonstration)
        step = int(tokenizer.steps([observation], _blank(tokenizer)[None]).offsets[-1])
        most = min(self.context_length, self.span)
        room = min(self.context_length // 2, max(most - step, 0))
        if where == "start":
            chosen = range(int(np.searchsorted(seq.offsets, room, side="right")) - 1)
        else:
            first = int(np.searchsorted(seq.offsets, seq.offsets[-1] - room))
            chosen = range(first, seq.steps)
        expert = self.inputs == "expert"
        ids = tokenizer.action_spec.encode(
            demonstration.actions if expert else demonstration.executed
        )
        observations = [select(demonstration.observations, i) for i in chosen]
        return observations, [ids[i] for i in chosen]

    def player(
        self,
        tokenizer: Tokenizer,
        seeds: Sequence[int],
        prompts: Sequence[Prompt | None] | None = None,
    ) -> Player:
        """Begin an episode for each seed, in environments with the tokenizer's spaces."""
        return Player(self, tokenizer, seeds, prompts or [None] * len(seeds))


@dataclasses.dataclass
class _Row:
    """One episode: its random numbers, and the timesteps in its window."""

    rng: np.random.Generator
    prompt: Prompt
    prompt_tokens: int = 0
    cached: int = 0  # tokens in the cache
    observations: list[Any] = dataclasses.field(default_factory=list)
    action_ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)  # tokens of each timestep

    @property
    def pending(self) -> int:
        """How many of the last action's tokens are not in the cache yet."""
        return self.prompt_tokens + sum(self.sizes) - self.cached


class Player:
    """Acts in a batch of episodes that begin together and may end apart (`only`).

    What is chosen in one episode depends on its seed, its prompt and what was observed in it, and
    not on the others, but for float rounding.
    """

    def __init__(
        self, agent: Agent, tokenizer: Tokenizer, seeds: Sequence[int], prompts: Sequence[Any]
    ):
        self.agent, self.tokenizer = agent, tokenizer
        self._rows = [
            # Not the stream of the layout.
            _Row(np.random.default_rng([seed, 2]), prompt or ([], []))
            for seed, prompt in zip(seeds, prompts, strict=True)
        ]
        self._spec = _Spec.of(agent, tokenizer)
        self._log_p = np.zeros((len(self._rows), self._spec.count), np.float32)
        self._cache = _empty(agent.config, agent.params, len(self._rows), agent.span)
        prompted = {i: row.prompt for i, row in enumerate(self._rows) if len(row.prompt[0])}
        self._feed(prompted)
        for row in self._rows:
            row.prompt_tokens = row.cached

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def action_ids(self) -> np.ndarray:
        """The latest actions' ids, int32 (B, A)."""
        return np.stack([row.action_ids[-1] for row in self._rows])

    @property
    def log_p(self) -> np.ndarray:
        """Their log-probabilities among the legal ids, at temperature 1, float32 (B, A)."""
        return self._log_p

    def window(self, row: int) -> TokenSequence:
        """What a row saw when it last acted, and what it chose: prompt and timesteps."""
        r = self._rows[row]
        observations = [*r.prompt[0], *r.observations]
        return self.tokenizer.steps(observations, np.stack([*r.prompt[1], *r.action_ids]))

    def only(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; the other episodes are over."""
        self._rows = [self._rows[i] for i in rows]
        self._log_p = self._log_p[list(rows)]
        size = min(_bucket(len(rows)), self._cache.lengths.shape[0])
        index = np.zeros(size, np.int32)
        index[: len(rows)] = rows
        self._cache = _take(self._cache, index)

    def act(self, observations: Sequence[Any]) -> list[Any]:
        """An action for each row, given what it observes now.

        Raises DataError for an observation that does not fit its space, and ValueError for one that
        leaves no room beside the prompt.
        """
        tokenizer, agent, spec = self.tokenizer, self.agent, self._spec
        for observation in observations:
            check_observation(observation, tokenizer.observation_space, "act")
        blank = np.tile(_blank(tokenizer), (len(observations), 1))
        newest = tokenizer.steps(observations, blank)
        self._make_room(np.diff(newest.offsets))
        seq, windows, length = self._newest(newest)
        batch, counts = self._batch(seq, windows, self._cache.lengths.shape[0], length)
        sampled = np.where(
            spec.continuous, agent.continuous == "sample", agent.discrete == "sample"
        )
        noise = np.zeros((len(counts), spec.count, spec.width), np.float32)
        for i, row in enumerate(self._rows if sampled.any() else ()):
            draws = row.rng.gumbel(size=noise.shape[1:]) * agent.temperature
            noise[i] = draws * sampled[:, None]
        mean = spec.continuous & (agent.continuous == "mean")
        ids, log_p, self._cache = _act(
            agent.config,
            agent.parallel,
            spec.ranges,
            agent.params,
            batch,
            self._cache._replace(lengths=self._lengths()),
            counts,
            noise,
            mean,
        )
        ids, self._log_p = np.asarray(ids)[: len(self)], np.asarray(log_p)[: len(self)]
        for row, observation, size, chosen in zip(
            self._rows, observations, np.diff(newest.offsets), ids, strict=True
        ):
            row.observations.append(observation)
            row.action_ids.append(chosen)
            row.sizes.append(int(size))
            row.cached = row.prompt_tokens + sum(row.sizes) - 1
        return [tokenizer.action_spec.decode(chosen) for chosen in ids]

    def executed(self, row: int, action: Any) -> None:
        """Another action than the one just chosen was executed in a row: it remembers that one."""
        r = self._rows[row]
        leaves = stack_observations([action], self.tokenizer.action_space)
        r.action_ids[-1] = self.tokenizer.action_spec.encode(leaves)[0]
        r.cached = r.prompt_tokens + sum(r.sizes) - self._spec.count  # what it chose is forgotten

    def _make_room(self, sizes: np.ndarray) -> None:
        """Let the oldest timesteps leave where those to come, of so many tokens, do not fit."""
        agent, again = self.agent, {}
        forgotten = np.zeros(self._cache.lengths.shape[0], np.int32)
        for i, (row, new) in enumerate(zip(self._rows, sizes, strict=True)):
            room = agent.span - row.prompt_tokens
            if new > room:
                raise ValueError(
                    f"the newest timestep has {new} tokens, "
                    f"{'memory' if agent.memory else 'context_length'} {agent.span} leaves {room} "
                    "beside the prompt"
                )
            if sum(row.sizes) + new <= room:
                continue
            most = room if agent.memory else agent.keep * room
            gone = 0
            while gone < len(row.sizes) and sum(row.sizes[gone:]) + new > most:
                gone += 1
            for steps in (row.observations, row.action_ids):
                del steps[:gone]
            kept = row.sizes[gone:]
            if agent.memory:
                # Of the last step that leaves, the last token may not be in the cache yet.
                forgotten[i] = min(sum(row.sizes[:gone]), row.cached - row.prompt_tokens)
                row.cached -= int(forgotten[i])
            else:
                row.cached = row.prompt_tokens
                if kept:
                    again[i] = (row.observations, row.action_ids)
            row.sizes = kept
        if forgotten.any():
            starts = np.zeros_like(forgotten)
            starts[: len(self)] = [row.prompt_tokens for row in self._rows]
            self._cache = _forget(self._cache, starts, forgotten)
        self._feed(again)

    def _feed(self, steps: Mapping[int, Prompt]) -> None:
        """Append whole timesteps to rows of the cache."""
        if not steps:
            return
        observations = [o for seen, _ in steps.values() for o in seen]
        ids = np.stack([a for _, chosen in steps.values() for a in chosen])
        seq = self.tokenizer.steps(observations, ids)
        ends = seq.offsets[np.cumsum([len(seen) for seen, _ in steps.values()])].tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        total = self._cache.lengths.shape[0]
        rows = np.full(min(_bucket(len(steps)), total), total, np.int32)  # past the end: none
        rows[: len(steps)] = list(steps)
        for start in range(0, max(last - first for first, last in spans), PIECE):
            piece = [
                (min(first + start, last), min(first + start + PIECE, last))
                for first, last in spans
            ]
            length = max(last - first for first, last in piece)
            length = -(-length // 8) * 8  # few shapes are compiled
            batch, counts = self._batch(seq, [[span] for span in piece], len(rows), length)
            cache = self._cache._replace(lengths=self._lengths())
            # Later slots are empty: most of them are left out.
            most = max(self._rows[i].cached for i in steps) + length
            most = min(-(-most // PIECE) * PIECE, self.agent.span)
            self._cache = _extend(
                self.agent.config, most, self.agent.params, batch, cache, rows, counts
            )
            for i, count in zip(steps, counts, strict=False):
                self._rows[i].cached += int(count)

    def _newest(self, newest: TokenSequence) -> tuple[TokenSequence, Windows, int]:
        """A sequence, the spans of it that rows have to read before they can choose, and T.

        They are the last token of the action before (all of them, where another was executed), an
        observation, and a separator; and, where all tokens of an action come from one pass, as many
        of it but one, which tell nothing.
        """
        n = len(newest)
        unread = self._spec.count - (self._spec.count - 1) * self.agent.parallel
        ends = newest.offsets[1:] - unread
        # Of one shape at every step, the first included; instructions differ in length.
        length = int(np.max(ends - newest.offsets[:-1]))
        length += max([1, *(row.pending for row in self._rows)])
        if (newest.kinds == TEXT).any():
            length = -(-length // 8) * 8
        windows = [[(int(a), int(b))] for a, b in zip(newest.offsets, ends, strict=False)]
        last = []
        for row, window in zip(self._rows, windows, strict=True):
            if row.pending:
                window.insert(0, (n + len(last), n + len(last) + row.pending))
                last.extend(row.action_ids[-1][-row.pending :])
        more = lambda x, values: np.concatenate([x, np.asarray(values, x.dtype)])  # noqa: E731
        none = np.zeros(len(last))
        joined = dataclasses.replace(
            newest,
            ids=more(newest.ids, last),
            kinds=more(newest.kinds, none + ACTION),
            local=more(newest.local, none + ACTION_POSITION),
            patch=more(newest.patch, none - 1),
            intervals=more(newest.intervals, np.zeros((len(last), 4))),
        )
        return joined, windows, length

    def _batch(
        self, seq: TokenSequence, windows: Windows, rows: int, length: int
    ) -> tuple[Batch, np.ndarray]:
        """A batch of so many rows of so many columns, and how many tokens each row has."""
        counts = np.zeros(rows, np.int32)
        counts[: len(windows)] = [sum(b - a for a, b in spans) for spans in windows]
        pictured = [sum(int((seq.patch[a:b] >= 0).sum()) for a, b in spans) for spans in windows]
        windows = [*windows, *[[(0, 0)]] * (rows - len(windows))]
        patches = -(-max(pictured) * rows // 16) * 16
        batch = make_batch(seq, windows, length, length, patches, parallel=self.agent.parallel)
        none = dict.fromkeys(("target_positions", "target_ids", "target_weights", "target_kinds"))
        return batch._replace(**none), counts

    def _lengths(self) -> np.ndarray:
        lengths = np.zeros(self._cache.lengths.shape[0], np.int32)
        lengths[: len(self)] = [row.cached for row in self._rows]
        return lengths


def _blank(tokenizer: Tokenizer) -> np.ndarray:
    """Legal ids (A,) that stand for an action that is not chosen yet."""
    return tokenizer.action_spec.legal_ids[:, 0].astype(np.int32)


def _bucket(n: int) -> int:
    """Round up to 1, 2, 4 or a multiple of 8, so that few shapes are compiled."""
    return 1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8


class _Spec(NamedTuple):
    """What an action's A tokens may be.

    Attributes:
      ranges: of each token its first id, its table row, and how many ids it may be.
      continuous: bool (A,), which are continuous values.
    """

    ranges: tuple[tuple[int, int, int], ...]
    continuous: np.ndarray

    @classmethod
    def of(cls, agent: Agent, tokenizer: Tokenizer) -> _Spec:
        spec = tokenizer.action_spec
        low, high = spec.legal_ids.T
        rows = [int(table_row(np.int32(first), agent.config)) for first in low]
        ranges = zip(low.tolist(), rows, (high - low).tolist(), strict=True)
        return cls(tuple(ranges), spec.continuous)

    @property
    def count(self) -> int:
        """A."""
        return len(self.ranges)

    @property
    def width(self) -> int:
        """Most ids that a token may be."""
        return max(n for *_, n in self.ranges)


# --- compiled -------------------------------------------------------------------------------------


# A configuration is hashed at every call, and quickly; the graph it stands for is not.


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty(config, params, rows: int, slots: int) -> Cache:
    return _model(config, params).transformer.empty_cache(rows, slots)


def _model(config: ModelConfig, params: Any) -> Gato:
    return merge(graph_of(config), params)


@functools.partial(jax.jit, donate_argnums=0)
def _forget(cache: Cache, first, counts) -> Cache:
    return cache.forget(first, counts)


@jax.jit
def _take(cache: Cache, rows) -> Cache:
    return cache.rows(rows)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _extend(config, most: int, params, batch: Batch, cache: Cache, rows, counts) -> Cache:
    """The cache with more tokens in some of its rows, none past slot `most`.

    A row past the last is none.
    """
    index = jnp.minimum(rows, cache.lengths.shape[0] - 1)
    cut = lambda leaves: tuple(x[index, :, :most] for x in leaves)  # noqa: E731
    distances = tuple(x[:, :most] for x in cache.distances)
    some = Cache(cut(cache.keys), cut(cache.values), distances, cache.lengths[index])
    _, some = _model(config, params).extend(batch, some, counts)

    def put(old, new):
        pairs = zip(old, new, strict=True)
        return tuple(x.at[rows, :, :most].set(y, mode="drop") for x, y in pairs)

    return cache._replace(keys=put(cache.keys, some.keys), values=put(cache.values, some.values))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _act(config, parallel, ranges, params, batch: Batch, cache: Cache, counts, noise, mean):
    """Read a batch and choose A ids a row, each given those before it, or all in one pass.

    Args:
      ranges: `_Spec.ranges`. counts: (B,), tokens of each row of the batch.
      noise: (B, A, W), Gumbel noise or zeros; W is the largest number of legal ids.
      mean: bool (A,), whether the mean of the distribution is taken instead of its mode.

    Returns ids (B, A), their log-probabilities (B, A), and the cache.
    """
    model = _model(config, params)
    layers = model.transformer.layers()
    rows, actions, width = noise.shape
    # Table rows that are legal for some token, and where among these each token's begin.
    parts = sorted({(row, n) for _, row, n in ranges})
    begins = dict(zip(parts, np.cumsum([0] + [n for _, n in parts]).tolist(), strict=False))
    begin = jnp.asarray([begins[row, n] for _, row, n in ranges])
    low = jnp.asarray([first for first, *_ in ranges])
    legal_count = jnp.asarray([n for *_, n in ranges])
    number = jnp.arange(width)

    def choose(i, hidden, ids, log_p):
        logits = [model.embedding.logits(hidden, slice(row, row + n)) for row, n in parts]
        logits = jnp.concatenate([*logits, jnp.zeros((rows, width))], axis=1)
        logits = jax.lax.dynamic_slice_in_dim(logits, begin[i], width, axis=1)
        logits = jnp.where(number[None] < legal_count[i], logits, -jnp.inf)
        p = jax.nn.softmax(logits, axis=-1)
        # Not a product of matrices, which some devices round to bfloat16.
        average = jnp.round((p * number[None]).sum(axis=-1)).astype(jnp.int32)
        mode = jnp.argmax(logits + noise[:, i], axis=-1).astype(jnp.int32)
        pick = jnp.where(mean[i], average, mode)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), pick[:, None], axis=1)[:, 0]
        return ids.at[:, i].set(pick + low[i]), log_p.at[:, i].set(chosen)

    hidden, cache = model.extend(batch, cache, counts, layers)
    at = lambda i: jnp.take_along_axis(  # noqa: E731
        hidden, jnp.maximum(counts - i, 0)[:, None, None], axis=1
    )[:, 0]
    chosen = jnp.full((rows, actions), NO_ID, jnp.int32), jnp.zeros((rows, actions))
    if parallel:
        chosen = jax.lax.fori_loop(
            0, actions, lambda i, chosen: choose(i, at(actions - i), *chosen), chosen
        )
        return *chosen, cache

    def body(i, state):
        hidden, cache, *chosen = state
        ids, log_p = choose(i, hidden, *chosen)
        column = _action(ids[:, i])
        hidden, cache = model.extend(column, cache, (counts > 0).astype(jnp.int32), layers)
        return hidden[:, 0], cache, ids, log_p

    state = jax.lax.fori_loop(0, actions - 1, body, (at(1), cache, *chosen))
    hidden, cache, *chosen = state
    return *choose(actions - 1, hidden, *chosen), cache


def _action(ids) -> Batch:
    """One more action token for each row."""
    zeros = jnp.zeros_like(ids)[:, None]
    patches = jnp.zeros((0, PATCH, PATCH, 3), jnp.uint8)
    return Batch(ids[:, None], zeros + ACTION_POSITION, zeros, zeros, zeros, patches, *[None] * 4)
