"""Writing text after a prompt, and how probable a text is (paper 4.3).

The keys and values of a prompt are computed once, whatever the number of its samples; every new
token is then one column (`Gato.extend`). Sampling draws from temperature, top-k and top-p, in that
order, over the ids that a text may be written with: never a value, an action or the separator.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gato_lib.config import ConfigError, ModelConfig
from gato_lib.embedding import check_text
from gato_lib.episodes import Document
from gato_lib.model import cross_entropy
from gato_lib.sequence import (
    NO_POSITION,
    PATCH,
    TEXT,
    Batch,
    TokenSequence,
    concatenate,
    document_tokens,
    make_batch,
)
from gato_lib.tokenizers import TextTokenizer
from gato_lib.training import graph_of, merge

ROWS = 64  # samples decoded together
SCORED_TOKENS = 4096  # tokens of a batch of `log_likelihood`


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Raises ConfigError for a setting out of range.

    Attributes:
      temperature: divides the logits; 0 is greedy, whatever the others say.
      top_k: only the so many most probable tokens; 0 is all.
      top_p: of these only the fewest that together have this probability, at least one; 1 is all.
    """

    temperature: float = 0.9
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not 1e-3 <= self.temperature < np.inf:
            raise ConfigError(f"temperature is {self.temperature}, expected 0, or 0.001 and more")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}, expected a whole number >= 0")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}, expected a number in (0, 1]")


def choose(
    logits: Float[Array, "B V"], noise: Float[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """An index a row, one uniform number in [0, 1) deciding it: the inverse of the distribution.

    A logit of -inf is never chosen. Of equal logits the lower index counts as the more probable.
    """
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    p = jax.nn.softmax(logits / sampling.temperature, axis=-1)
    order = None
    if sampling.top_k or sampling.top_p < 1.0:
        p, order = jax.lax.top_k(p, min(sampling.top_k or p.shape[-1], p.shape[-1]))
        p = p / p.sum(axis=-1, keepdims=True)
        p = jnp.where(jnp.cumsum(p, axis=-1) - p < sampling.top_p, p, 0.0)
    # What has no probability is stepped over: a sum's rounding must not make it a choice.
    below = jnp.where(p > 0.0, jnp.cumsum(p, axis=-1), -1.0)
    total = below.max(axis=-1, keepdims=True)
    index = jnp.argmax(below > noise[:, None] * total, axis=-1, keepdims=True)
    if order is not None:
        index = jnp.take_along_axis(order, index, axis=-1)
    return index[:, 0].astype(jnp.int32)


def sample_texts(
    config: ModelConfig,
    params: Any,
    text: TextTokenizer,
    prompts: Sequence[Document | Sequence[Document]],
    sampling: Sampling,
    *,
    samples: int = 1,
    max_tokens: int = 32,
    context_length: int,
    seed: int = 0,
    stop: str | None = None,
) -> list[list[str]]:
    """How the network goes on after each prompt: `samples` texts for each.

    A prompt is a document to go on with; others may stand before it, each ended, as pairs stand in
    a training sequence.

    A text ends at the end-of-text piece, before the first `stop`, or after `max_tokens`. It does
    not depend, but for float rounding, on what else is sampled: prompt i and sample j have random
    numbers of their own. A space between prompt and text is not part of the text.

    Raises ValueError naming the prompt that is empty or does not leave room for `max_tokens`.
    """
    check_text(config, text)
    if samples < 1 or max_tokens < 1 or stop == "":
        raise ValueError(f"samples {samples}, max_tokens {max_tokens}, stop {stop!r}")
    sequences = []
    for i, prompt in enumerate(prompts):
        try:
            sequences.append(_prompt(prompt, text, context_length - max_tokens))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from error
    graph, final = graph_of(config), _final(text, stop)
    texts: list[list[str]] = [[] for _ in prompts]
    # By shape, and otherwise as they came: questions on one picture share its patches.
    order = np.argsort([_bucket(len(s), 16) for s in sequences], kind="stable")
    together = _power_below(max(ROWS // samples, 1))
    for first in range(0, len(order), together):
        group = order[first : first + together]
        rows = min(_power_above(len(group)), together)
        batch, lengths = _batch([sequences[i] for i in group], rows)
        noise = np.zeros((rows, samples, max_tokens), np.float32)
        for row, i in enumerate(group):
            for j in range(samples):
                # 23 bits, so that the product with a float32 sum stays below the sum.
                draws = np.random.default_rng([seed, i, j]).integers(0, 1 << 23, max_tokens)
                noise[row, j] = draws / (1 << 23)
        ids = np.asarray(
            _decode(graph, sampling, params, batch, lengths, noise, text.end, text.legal, final)
        )
        for row, i in enumerate(group):
            texts[i] = [_text(text, sample, stop) for sample in ids[row]]
    return texts


def _prompt(prompt: Document | Sequence[Document], text: TextTokenizer, room: int) -> TokenSequence:
    """Tokens of a prompt, which has at least one and at most `room`, and is not ended."""
    *before, last = [prompt] if isinstance(prompt, Document) else prompt
    seq = document_tokens(last, text)
    if before:
        seq = concatenate([*(document_tokens(d, text, end=True) for d in before), seq])
    n = len(seq)
    if not 0 < n <= room:
        raise ValueError(f"{n} tokens, but between 1 and {room} fit the context with max_tokens")
    return seq


def _cut(seq: TokenSequence, first: int, last: int) -> TokenSequence:
    """Tokens [first, last) of a document."""
    parallel = ("ids", "kinds", "local", "patch", "intervals")
    parts = {name: getattr(seq, name)[first:last] for name in parallel}
    return dataclasses.replace(seq, **parts, offsets=np.arange(last - first + 1))


def _batch(sequences: Sequence[TokenSequence], rows: int) -> tuple[Batch, np.ndarray]:
    """A batch with a sequence a row, the other rows empty, and the sequences' lengths (rows,)."""
    lengths = np.zeros(rows, np.int32)
    lengths[: len(sequences)] = [len(s) for s in sequences]
    ends = np.cumsum(lengths).tolist()
    windows = [[(end - int(n), end)] for end, n in zip(ends, lengths, strict=True)]
    seq = concatenate(sequences)
    length, patches = _bucket(int(lengths.max()), 16), _bucket(len(seq.patches), 16)
    return make_batch(seq, windows, length, length, patches), lengths


def _bucket(n: int, least: int) -> int:
    """Round up to one of few numbers, by at most a quarter or to a multiple of `least`."""
    multiple = max(least, 1 << max((n - 1).bit_length() - 3, 0))
    return -(-n // multiple) * multiple


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _power_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _final(text: TextTokenizer, stop: str | None) -> np.ndarray:
    """Ids after which nothing needs be written, bool (size,).

    A `stop` that is spelled by several pieces is not among them: it is cut off later.
    """
    final = np.arange(text.size) == text.end
    for i in range(text.size if stop else 0):
        piece = text.piece(i)
        if text._processor.is_byte(i):
            spelled = chr(int(piece[3:5], 16)) if piece < "<0x80>" else ""
        else:
            spelled = piece.removeprefix("\u2581").replace("\u2581", " ")
        final[i] |= stop in spelled
    return final


def _text(text: TextTokenizer, ids: np.ndarray, stop: str | None) -> str:
    """What the ids before the first end say, up to `stop`."""
    ends = np.flatnonzero(ids == text.end)
    decoded = text.decode(ids[: ends[0]] if len(ends) else ids)
    return decoded.split(stop, 1)[0] if stop else decoded


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(graph, sampling, params, batch: Batch, lengths, noise, end, legal, final):
    """Ids (P, J, M) that follow P prompts, J samples of M tokens each; `end` after the last.

    Args:
      lengths: (P,), tokens of each row; a row of none is padding. noise: (P, J, M).
      legal, final: bool (V,), ids that may be chosen, and those after which a row is done.
    """
    model = merge(graph, params)
    prompts, samples, steps = noise.shape
    noise = noise.reshape(prompts * samples, steps)
    hidden, cache = model.prefill(batch, lengths, batch.ids.shape[1] + steps - 1)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    row = jnp.repeat(jnp.arange(prompts), samples)
    layers = model.transformer.layers()

    def choose_next(step, ids, done, hidden):
        logits = model.embedding.logits(hidden, slice(0, len(legal)))
        logits = jnp.where(legal[None], logits, -jnp.inf)
        new = jnp.where(done, end, choose(logits, noise[:, step], sampling))
        return step + 1, ids.at[:, step].set(new), done | final[new]

    def unfinished(state):
        step, _, done, _ = state
        return (step < steps) & ~done.all()

    def body(state):
        step, ids, done, cache = state
        column = _column(ids[:, step - 1])
        hidden, cache = model.extend(column, cache, jnp.ones_like(cache.lengths), layers)
        return *choose_next(step, ids, done, hidden[:, 0]), cache

    ids = jnp.full(noise.shape, end, jnp.int32)
    state = choose_next(0, ids, lengths[row] == 0, hidden[row])
    _, ids, _, _ = jax.lax.while_loop(unfinished, body, (*state, cache.rows(row)))
    return ids.reshape(prompts, samples, steps)


def _column(ids: Int[Array, " B"]) -> Batch:
    """One more text token for each row."""
    zeros = jnp.zeros_like(ids)[:, None]
    patches = jnp.zeros((0, PATCH, PATCH, 3), jnp.uint8)
    return Batch(ids[:, None], zeros + NO_POSITION, zeros, zeros, zeros, patches, *[None] * 4)


class Likelihood(NamedTuple):
    """Sum of log p, in nats, over a document's scored text tokens; their number and UTF-8 bytes."""

    log_p: float
    tokens: int
    bytes: int


def log_likelihood(
    config: ModelConfig,
    params: Any,
    text: TextTokenizer,
    documents: Sequence[Document],
    *,
    context_length: int,
    end: bool = False,
) -> list[Likelihood]:
    """How probable the documents' texts are, by the whole softmax that was trained.

    A document longer than `context_length` is read in windows that overlap by half. Each text token
    is scored once, in the first window that holds it, so given all that comes before it or at least
    half a context. The first token of a document, which follows nothing, is never scored, nor are
    its bytes counted. With `end` a text's end is a token to score too, of no bytes.

    Raises ValueError naming a document without tokens.
    """
    check_text(config, text)
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}, expected at least 2")
    stride = context_length // 2
    windows: list[tuple[int, TokenSequence, int]] = []  # document, tokens, first one to score
    sizes = []
    for i, document in enumerate(documents):
        try:
            seq = document_tokens(document, text, end=end)
        except ValueError as error:
            raise ValueError(f"document {i}: {error}") from error
        if not len(seq):
            raise ValueError(f"document {i} has no tokens")
        size = sum(len(item.encode()) for item in document.items if isinstance(item, str))
        sizes.append(size - (_piece_bytes(text, seq.ids[0]) if seq.kinds[0] == TEXT else 0))
        for first in range(0, max(len(seq) - context_length, 0) + stride, stride):
            window = _cut(seq, first, min(first + context_length, len(seq)))
            skip = context_length - stride if first else 1
            if (window.kinds[skip:] == TEXT).any():
                windows.append((i, window, skip))
    windows.sort(key=lambda w: -len(w[1]))
    graph = graph_of(config)
    sums, tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    while windows:
        rows = _power_below(max(SCORED_TOKENS // len(windows[0][1]), 1))
        group, windows = windows[:rows], windows[rows:]
        batch, _ = _batch([w for _, w, _ in group], min(_power_above(len(group)), rows))
        weights = batch.target_weights
        for row, (_, _, skip) in enumerate(group):
            weights[row, batch.target_positions[row] + 1 < skip] = 0.0
        log_p = np.asarray(_log_p(graph, params, batch), np.float64)
        for row, (i, _, _) in enumerate(group):
            sums[i] += log_p[row]
            tokens[i] += int(weights[row].sum())
    return [Likelihood(float(p), int(n), b) for p, n, b in zip(sums, tokens, sizes, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _log_p(graph, params, batch: Batch) -> Float[Array, " B"]:
    """Sum of log p over each row's targets."""
    model = merge(graph, params)
    logits = model.target_logits(batch)
    losses = cross_entropy(logits, batch.target_ids.reshape(-1), model.config, 0.0)
    return -(losses.reshape(batch.target_weights.shape) * batch.target_weights).sum(axis=1)


def _piece_bytes(text: TextTokenizer, token_id: int) -> int:
    """UTF-8 bytes that a text's first piece stands for, without the space put before a text."""
    if text._processor.is_byte(int(token_id)):
        return 1
    return len(text.piece(token_id).removeprefix("\u2581").replace("\u2581", " ").encode())
