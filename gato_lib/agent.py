"""Acting: observations in, legal action tokens out, one at a time (paper 2.4).

The window holds a prompt, if any, and the latest whole timesteps that fit the context. Every
action token is chosen from a full forward pass over that window, which is the function that was
trained; nothing is cached yet.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gato_lib import tokenizers
from gato_lib.config import ModelConfig
from gato_lib.embedding import check_text, table_row
from gato_lib.episodes import Episode, check_observation, select
from gato_lib.sequence import Batch, Tokenizer, make_batch
from gato_lib.training import graph_of, merge

CHOICES = ("sample", "greedy", "mean")


class History:
    """What one environment's agent has seen and done in this episode.

    `prompt`, if any, is a demonstration (observations, action ids) whose steps stay at the front of
    the window for the whole episode.
    """

    def __init__(self, seed: int, prompt: tuple[list[Any], list[np.ndarray]] | None = None):
        self.observations: list[Any] = []
        self.action_ids: list[np.ndarray] = []
        self.prompt = prompt or ([], [])
        self.rng = np.random.default_rng([seed, 2])  # not the stream of the layout


class Agent:
    """A trained network and how it chooses.

    Args:
      context_length: most tokens it sees at a time.
      lengths: fewer for the domains named, as in their training rows (`for_domain`).
      continuous, discrete: "sample" (temperature 1), "greedy", or, for continuous actions,
        "mean": the mean of the bin distribution, rounded to a bin.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        text: tokenizers.TextTokenizer | None,
        context_length: int,
        lengths: Mapping[str, int] | None = None,
        *,
        continuous: str = "sample",
        discrete: str = "sample",
    ):
        if continuous not in CHOICES:
            raise ValueError(f"continuous is {continuous!r}, expected one of {CHOICES}")
        if discrete not in CHOICES[:2]:
            raise ValueError(f"discrete is {discrete!r}, expected one of {CHOICES[:2]}")
        check_text(config, text)
        self.config, self.params, self.text = config, params, text
        self.context_length, self.lengths = context_length, dict(lengths or {})
        self.continuous, self.discrete = continuous, discrete
        self._graph = graph_of(config)

    def for_domain(self, domain: str) -> Agent:
        """The same agent with the context it was trained with in a domain."""
        agent = copy.copy(self)
        agent.context_length = self.lengths.get(domain, self.context_length)
        return agent

    def tokenizer(self, env) -> Tokenizer:
        return Tokenizer(
            env.observation_space, env.action_space, self.text, self.config.discrete_range
        )

    def prompt(
        self, tokenizer: Tokenizer, demonstration: Episode, where: str, observation: Any
    ) -> tuple[list[Any], list[np.ndarray]]:
        """The first ("start") or last ("end") whole steps of a demonstration.

        As many as fit half of the context, as in training, and leave room for a step as long as
        that of `observation`, the episode's first; possibly none.
        """
        if where not in ("start", "end"):
            raise ValueError(f"prompt is {where!r}, expected 'start' or 'end'")
        seq = tokenizer.episode(demonstration)
        step = int(tokenizer.steps([observation], _blank(tokenizer)[None]).offsets[-1])
        room = min(self.context_length // 2, max(self.context_length - step, 0))
        if where == "start":
            chosen = range(int(np.searchsorted(seq.offsets, room, side="right")) - 1)
        else:
            first = int(np.searchsorted(seq.offsets, seq.offsets[-1] - room))
            chosen = range(first, seq.steps)
        ids = tokenizer.action_spec.encode(demonstration.actions)
        observations = [select(demonstration.observations, i) for i in chosen]
        return observations, [ids[i] for i in chosen]

    def act(self, tokenizer: Tokenizer, histories: Sequence[History]) -> list[Any]:
        """An action for each history, whose last observation has no action yet.

        All histories share `tokenizer`'s spaces. Chosen ids are appended to the histories. What is
        chosen for one does not depend on the others, but for float rounding. Raises DataError for
        an observation that does not fit its space.
        """
        spec = tokenizer.action_spec
        low, high = spec.legal_ids.astype(np.int32).T
        blank = _blank(tokenizer)
        for h in histories:
            check_observation(h.observations[-1], tokenizer.observation_space, "act")
        newest = tokenizer.steps(
            [h.observations[-1] for h in histories], np.tile(blank, (len(histories), 1))
        )
        observations, actions, counts = [], [], []
        for h, tokens in zip(histories, np.diff(newest.offsets), strict=True):
            # More live steps than a window is likely to hold; what does not fit leaves it below.
            live = min(len(h.observations), self.context_length // int(tokens) + 2)
            observations += h.prompt[0] + h.observations[-live:]
            actions += h.prompt[1] + [*h.action_ids, blank][-live:]
            counts.append((len(h.prompt[0]), live))
        seq = tokenizer.steps(observations, np.stack(actions))
        windows, separators, last = [], [], 0
        for prompted, live in counts:
            begin, first = last, last + prompted
            last = first + live
            at = seq.offsets
            budget = self.context_length - (at[first] - at[begin])
            while at[last] - at[first] > budget:  # the oldest live steps leave the window
                first += 1
            if first == last:
                raise ValueError(
                    f"the newest timestep has {at[last] - at[last - 1]} tokens, context_length "
                    f"{self.context_length} leaves {budget} beside the prompt"
                )
            spans = [(int(at[begin]), int(at[begin + prompted])), (int(at[first]), int(at[last]))]
            windows.append(spans)
            separators.append(sum(b - a for a, b in spans) - spec.num_tokens - 1)
        rows_padded = _bucket(len(windows))
        windows += [[(0, 0)]] * (rows_padded - len(windows))
        length = max(sum(b - a for a, b in spans) for spans in windows)
        length = min(-(-length // 8) * 8, self.context_length)
        batch = make_batch(seq, windows, length, length, _patch_bucket(len(seq.patches)))
        sampled = np.where(spec.continuous, self.continuous == "sample", self.discrete == "sample")
        noise = np.zeros((rows_padded, spec.num_tokens, (high - low).max()), np.float32)
        for i, h in enumerate(histories if sampled.any() else ()):
            noise[i] = h.rng.gumbel(size=noise.shape[1:]) * sampled[:, None]
        starts = np.zeros(rows_padded, np.int32)
        starts[: len(separators)] = separators
        mean = spec.continuous & (self.continuous == "mean")
        ids = _choose(self._graph, self.config, self.params, batch, starts, noise, low, high, mean)
        chosen = np.asarray(ids)[: len(histories)]
        for h, row in zip(histories, chosen, strict=True):
            h.action_ids.append(row)
        return [spec.decode(row) for row in chosen]


def _blank(tokenizer: Tokenizer) -> np.ndarray:
    """Legal ids (A,) that stand for an action that is not chosen yet."""
    return tokenizer.action_spec.legal_ids[:, 0].astype(np.int32)


def _bucket(n: int) -> int:
    """Round up to 1, 2, 4 or a multiple of 8, so that few shapes are compiled."""
    return 1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8


def _patch_bucket(n: int) -> int:
    """As `_bucket`, but coarser, since the number of distinct patches changes at every step."""
    return -(-n // 64) * 64


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choose(graph, config, params, batch: Batch, separators, noise, low, high, mean):
    """Choose A ids for each row, each given those before it: int32 (B, A).

    Args:
      separators: (B,), where each row's last separator is.
      noise: (B, A, W), Gumbel noise or zeros; W is the largest number of legal ids.
      low, high: (A,), legal ids of each token, half-open.
      mean: bool (A,), whether the mean of the distribution is taken instead of its mode.
    """
    model = merge(graph, params)
    count, width = noise.shape[1:]
    number = jnp.arange(width)

    def body(i, ids):
        h = model.hidden(batch._replace(ids=ids))
        h = jnp.take_along_axis(h, (separators + i)[:, None, None], axis=1)[:, 0]
        logits = model.embedding.logits(h)
        rows = jnp.minimum(table_row(low[i], config) + number, logits.shape[1] - 1)
        legal = number < high[i] - low[i]
        logits = jnp.where(legal[None], logits[:, rows], -jnp.inf)
        average = jnp.round(jax.nn.softmax(logits, axis=-1) @ number.astype(jnp.float32))
        mode = jnp.argmax(logits + noise[:, i], axis=-1)
        pick = jnp.where(mean[i], average.astype(jnp.int32), mode.astype(jnp.int32))
        return ids.at[jnp.arange(ids.shape[0]), separators + i + 1].set(pick + low[i])

    ids = jax.lax.fori_loop(0, count, body, jnp.asarray(batch.ids))
    return jnp.take_along_axis(ids, separators[:, None] + 1 + jnp.arange(count)[None], axis=1)
