"""What happens inside the network: hidden states and attention scores (paper 5.6, 5.7, App. J).

Axes: L layers, B batch, T tokens, N heads, D width.

`look_inside` computes what `Gato.hidden` does and keeps what it goes through. It holds all T x T
scores of every layer and head, so it is for a few windows of hundreds of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from gato_lib.attention import relative_features, relative_shift
from gato_lib.config import ModelConfig
from gato_lib.model import Gato
from gato_lib.sequence import Batch, TokenSequence, concatenate, make_batch
from gato_lib.training import graph_of, merge
from gato_lib.transformer import Attention, Block


class Inside(NamedTuple):
    """What a forward pass went through, NumPy arrays.

    Attributes:
      hidden: float32 (L + 1, B, T, D), the residual stream: what goes into the first block, then
        what comes out of each. The last one is not yet normalised.
      scores: float32 (L, B, N, T, T), of query i and key j before the softmax; -inf where j > i.
    """

    hidden: np.ndarray
    scores: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """Attention, (L, B, N, T, T): each row is a distribution over the keys up to its own."""
        return np.asarray(jax.nn.softmax(self.scores, axis=-1))


def look_inside(config: ModelConfig, params: Any, batch: Batch) -> Inside:
    """Run a network in evaluation and keep its insides.

    Raises ValueError for a batch of packed windows, which do not see each other.
    """
    if batch.segments is not None:
        raise ValueError("the batch has several windows a row, expected one")
    return Inside(*jax.device_get(_look(graph_of(config), params, batch)))


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters of a network that nobody has trained, to hold a trained one against."""
    _, params = nnx.split(Gato(config, rngs=nnx.Rngs(seed)), nnx.Param)
    return nnx.to_pure_dict(params)


def _blocks(model: Gato, batch: Batch) -> Iterator[tuple[Block | None, Float[Array, "B T D"]]]:
    """Each block with what goes into it; after the last None, with what came out of it."""
    x = model.embedding(*batch[:6])
    if model.config.sequence_positions == "sinusoidal":
        x = x + model.transformer._waves(x.shape[1], x.dtype)[None]
    for block in model.transformer.layers():
        yield block, x
        x = block(x, None)
    yield None, x


@functools.partial(jax.jit, static_argnums=0)
def _look(graph, params, batch: Batch):
    hidden, scores = [], []
    for block, x in _blocks(merge(graph, params), batch):
        hidden.append(x.astype(jnp.float32))
        if block is not None:
            scores.append(_scores(block.attention, block.norm1(x)))
    return jnp.stack(hidden), jnp.stack(scores)


def _scores(attention: Attention, x: Float[Array, "B T D"]) -> Float[Array, "B N T T"]:
    """`attention.attend`'s formula, up to the softmax."""
    q, q_distance, k, _ = attention._project(x)
    f32, (t, h) = jnp.float32, (x.shape[1], q.shape[-1])
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=f32)
    if attention.config.sequence_positions == "relative":
        r = attention.relative(jnp.asarray(relative_features(t, attention.config.width), x.dtype))
        by_distance = jnp.einsum("BTNH,SNH->BNTS", q_distance, r, preferred_element_type=f32)
        scores += relative_shift(by_distance)
    seen = jnp.tril(jnp.ones((t, t), bool))[None, None]
    return jnp.where(seen, scores * h**-0.5, -jnp.inf)


def step_attention(scores: np.ndarray, first: int, last: int) -> np.ndarray:
    """How much each token of one timestep is attended to by those after it (App. J).

    Of `scores` (..., T, T) the tokens [first, last) alone are kept. No token attends to itself or
    to what comes later; each distributes its attention over the ones before it, and a token's value
    is the mean of what the ones after it give: (..., last - first). The last token, which nothing
    follows, has 0.

    Raises ValueError for a span of fewer than two tokens or outside the window.
    """
    length, n = scores.shape[-1], last - first
    if not 0 <= first < last <= length or n < 2:
        raise ValueError(f"tokens [{first}, {last}) of {length}, expected two or more of them")
    own = scores[..., first:last, first:last]
    before = np.tril(np.ones((n, n), bool), -1)
    own = np.where(before, own, -np.inf)[..., 1:, :]  # the first token has none before it
    own = np.exp(own - own.max(axis=-1, keepdims=True))
    own /= own.sum(axis=-1, keepdims=True)
    return own.sum(axis=-2) / np.maximum(np.arange(n)[::-1], 1)


def mean_hidden(
    config: ModelConfig,
    params: Any,
    windows: Sequence[tuple[TokenSequence, int, int]],
    length: int,
    parallel: bool = False,
    rows: int = 16,
) -> np.ndarray:
    """Hidden states averaged over the tokens of each window, float32 (L + 1, W, D) (5.7).

    A window is the tokens [first, last) of a sequence, and begins where a timestep does. What is
    longer than `length` tokens, the most that the network was trained to see, is read in pieces of
    whole timesteps (of a document, of any tokens) that do not see each other: the network meets
    nothing that training did not have. `parallel`: whether actions are not told as inputs (App. G).
    `rows` pieces are computed at a time.

    Raises ValueError for a window without tokens, outside its sequence or beginning within a
    timestep, and for a timestep longer than `length`.
    """
    pieces = []  # of a window: its number, its sequence, tokens
    for number, (seq, first, last) in enumerate(windows):
        if not 0 <= first < last <= len(seq) or first not in seq.offsets:
            raise ValueError(
                f"window {number} is [{first}, {last}) of {len(seq)} tokens, expected to begin "
                "with a timestep"
            )
        while first < last:
            ends = seq.offsets[(seq.offsets > first) & (seq.offsets <= first + length)]
            end = min(int(ends.max(initial=0)), last)
            if last - first <= length:  # what is left of the window, its last timestep cut or not
                end = last
            if end == 0:
                raise ValueError(f"window {number}: a timestep is longer than {length} tokens")
            pieces.append((number, seq, first, end))
            first = end
    sums = np.zeros((config.depth + 1, len(windows), config.width))
    graph = graph_of(config)
    for begin in range(0, len(pieces), rows):
        some = pieces[begin : begin + rows]
        some += some[:1] * (rows - len(some))  # of one shape; what is added is not counted
        batch, counted = _rows(some, length, parallel)
        totals = np.asarray(_sums(graph, params, batch, counted), np.float64)
        for row, (number, *_) in enumerate(pieces[begin : begin + rows]):
            sums[:, number] += totals[:, row]
    tokens = np.array([last - first for _, first, last in windows])
    return (sums / tokens[:, None]).astype(np.float32)


def _rows(pieces: Sequence[tuple[int, TokenSequence, int, int]], length: int, parallel: bool):
    """A batch with a piece in each row, and which of its tokens count, bool (B, T)."""
    distinct = {id(seq): seq for _, seq, _, _ in pieces}
    starts = dict(zip(distinct, np.cumsum([0, *map(len, distinct.values())]), strict=False))
    windows = [[(starts[id(s)] + a, starts[id(s)] + b)] for _, s, a, b in pieces]
    together = concatenate(list(distinct.values()))
    images = np.concatenate([together.patch[a:b] for ((a, b),) in windows])
    most = len(np.unique(images[images >= 0]))
    most = 1 << (most - 1).bit_length() if most else 0  # few shapes are compiled
    batch = make_batch(together, windows, length, length, most, parallel=parallel)
    sizes = np.array([b - a for ((a, b),) in windows])
    return batch, np.arange(length)[None] < sizes[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _sums(graph, params, batch: Batch, counted: Bool[Array, "B T"]) -> Float[Array, "L B D"]:
    """Sums of hidden states over the tokens that count."""
    streams = [x for _, x in _blocks(merge(graph, params), batch)]
    return jnp.stack([jnp.where(counted[..., None], x, 0.0).sum(axis=1) for x in streams])
