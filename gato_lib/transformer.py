"""A causal pre-norm transformer with GEGLU and relative attention (paper 2.3, App. C.1).

Axes: B batch, T tokens, C new tokens, S slots of a cache, D width, N heads, H head_dim, F hidden
units of the feed-forward layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gato_lib.attention import attend, attend_cached, relative_features, sinusoids
from gato_lib.config import ModelConfig
from gato_lib.distributed import constrain
from gato_lib.embedding import INIT


def _linear(
    config: ModelConfig,
    i: int | tuple[int, ...],
    o: int | tuple[int, ...],
    rngs: nnx.Rngs,
    bias: bool = True,
) -> nnx.LinearGeneral:
    """A linear layer over the last axes `i`, to axes `o`. Axes of their own can be sharded."""
    axis = tuple(range(-len(i), 0)) if isinstance(i, tuple) else -1
    init = nnx.initializers.truncated_normal(INIT)
    dtype = jnp.dtype(config.compute_dtype)
    return nnx.LinearGeneral(
        i, o, axis=axis, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs
    )


def _places(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Places within segments: 0, 1, ... anew from every token whose segment is another's."""
    place = jnp.arange(segments.shape[1])[None]
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return place - jax.lax.cummax(jnp.where(first, place, 0), axis=1)


class Cache(NamedTuple):
    """Keys and values of the tokens so far: a row's token i is in slot i.

    Attributes:
      keys, values: of each layer, (B, N, S, H).
      distances: of each layer, projected features of the distances 0 ... S - 1, (N, S, H); empty
        where positions are not relative. They depend on parameters only.
      lengths: int32 (B,), tokens so far. A smaller number forgets a row's last tokens, 0 all.
    """

    keys: tuple[Float[Array, "B N S H"], ...]
    values: tuple[Float[Array, "B N S H"], ...]
    distances: tuple[Float[Array, "N S H"], ...]
    lengths: Int[Array, " B"]

    def rows(self, index: Int[Array, " R"]) -> Cache:
        """A cache of these rows, in this order; a row may come several times."""
        take = lambda leaves: tuple(x[index] for x in leaves)  # noqa: E731
        return Cache(take(self.keys), take(self.values), self.distances, self.lengths[index])

    def forget(self, first: Int[Array, " B"], counts: Int[Array, " B"]) -> Cache:
        """A cache without `counts` tokens of each row from token `first` on; later ones close up.

        The later ones' keys and values stay as they are, though they were computed with what is
        gone in sight: Transformer-XL's memory, not what the row would have without those tokens.
        """
        slot = jnp.arange(self.keys[0].shape[2])[None]
        source = slot + jnp.where(slot >= first[:, None], counts[:, None], 0)
        source = jnp.minimum(source, slot.shape[1] - 1)[:, None, :, None]
        take = lambda leaves: tuple(  # noqa: E731
            jnp.take_along_axis(x, source, axis=2) for x in leaves
        )
        lengths = self.lengths - counts
        return Cache(take(self.keys), take(self.values), self.distances, lengths)


class Attention(nnx.Module):
    """Multi-head causal attention; order enters as the distance between query and key.

    Transformer-XL's form: a query meets a key's content (plus a bias u) and its distance (plus a
    bias v), the distance through one learned D x D projection. With other `sequence_positions` it
    is plain causal attention.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        n, h, d = config.num_heads, config.head_dim, config.width
        self.qkv = _linear(config, d, (3, n, h), rngs)
        self.out = _linear(config, (n, h), d, rngs)
        if config.sequence_positions == "relative":
            self.relative = _linear(config, d, (n, h), rngs, bias=False)
            self.content_bias = nnx.Param(jnp.zeros((n, h)))
            self.distance_bias = nnx.Param(jnp.zeros((n, h)))

    def __call__(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        return self.full(x, segments)[0]

    def full(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T N H"], Float[Array, "B T N H"]]:
        """Attention over the whole row, and its keys and values."""
        q, q_distance, k, v = self._project(x)
        r = None
        if self.config.sequence_positions == "relative":  # T N H
            features = relative_features(x.shape[1], self.config.width)
            r = self.relative(jnp.asarray(features, x.dtype))
        y = attend(q, q_distance, k, v, r, self.config.attention, segments)
        return self._merge(y), k, v

    def extend(
        self,
        x: Float[Array, "B C D"],
        k: Float[Array, "B N S H"],
        v: Float[Array, "B N S H"],
        r: Float[Array, "N S H"] | None,
        at: Int[Array, "B C"],
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B N S H"], Float[Array, "B N S H"]]:
        """Attention of tokens `at` their positions, over the cache with them in it; that cache.

        What lies past the last slot is dropped: it can only be padding.
        """
        q, q_distance, new_k, new_v = self._project(x)
        b, _, n, _ = q.shape
        rows, heads = jnp.arange(b)[:, None, None], jnp.arange(n)[None, None]
        put = lambda old, new: old.at[rows, heads, at[..., None]].set(  # noqa: E731
            new, mode="drop"
        )
        k, v = put(k, new_k), put(v, new_v)
        return self._merge(attend_cached(q, q_distance, k, v, r, at)), k, v

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], ...]:
        """Queries as they meet content and as they meet distance, keys and values."""
        c = self.config
        b, t, _ = x.shape
        # (B*T, D) -> (B, T, N, H), three times
        qkv = self.qkv(x.reshape(b * t, -1)).reshape(b, t, 3, c.num_heads, c.head_dim)
        qkv = constrain(qkv, "batch", None, None, "heads", None)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if c.sequence_positions != "relative":
            return q, q, k, v
        q_distance = q + self.distance_bias[...].astype(x.dtype)[None, None]
        return q + self.content_bias[...].astype(x.dtype)[None, None], q_distance, k, v

    def _merge(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Heads back to the width."""
        b, t, n, h = y.shape
        return self.out(y.reshape(b * t, n, h)).reshape(b, t, -1)


class FeedForward(nnx.Module):
    """GEGLU: gates and values, mlp_dim together; their product goes back to the width.

    `config.feed_forward` also knows the two other readings of Table 5, to count and compare.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, m = config.width, config.mlp_dim
        hidden = m // 2 if config.feed_forward == "geglu" else m
        if config.feed_forward != "gelu":
            self.gate = _linear(config, d, hidden, rngs)
        self.up = _linear(config, d, hidden, rngs)
        self.down = _linear(config, hidden, d, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        b, t, d = x.shape
        # Said here too, or with a tensor axis XLA moves tokens to weights: 20 times the bytes.
        x = constrain(x.reshape(b * t, d), "batch", None)
        h = constrain(self.up(x), "batch", "hidden")  # (B*T, F)
        if hasattr(self, "gate"):
            h = jax.nn.gelu(constrain(self.gate(x), "batch", "hidden")) * h
        else:
            h = jax.nn.gelu(h)
        return constrain(self.down(h), "batch", None).reshape(b, t, d)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        norm = lambda: nnx.LayerNorm(  # noqa: E731
            config.width, dtype=jnp.dtype(config.compute_dtype), rngs=rngs
        )
        self.skip, self.dropout = config.stochastic_depth, config.dropout
        self.norm1, self.attention = norm(), Attention(config, rngs=rngs)
        self.norm2, self.feed_forward = norm(), FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: jax.Array | None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        keys = (None, None) if key is None else jax.random.split(key)
        x = constrain(x, "batch", None, None)
        x = x + self._drop(self.attention(self.norm1(x), segments), keys[0])
        x = constrain(x, "batch", None, None)
        return x + self._drop(self.feed_forward(self.norm2(x)), keys[1])

    def keep(
        self, x: Float[Array, "B T D"], attention: Callable[[jax.Array], tuple[jax.Array, ...]]
    ) -> tuple[Float[Array, "B T D"], jax.Array, jax.Array]:
        """The block in evaluation, with `attention` returning keys and values, which are kept."""
        y, k, v = attention(self.norm1(x))
        x = x + y
        return x + self.feed_forward(self.norm2(x)), k, v

    def _drop(self, y: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        """Regularisation of a sub-layer's output, in training only.

        Stochastic depth: a sequence skips this sub-layer; kept ones are scaled up (App. C).
        Dropout: single values (App. E, fine-tuning).
        """
        if key is None:
            return y
        if self.skip > 0.0:
            keep = jax.random.bernoulli(key, 1.0 - self.skip, (y.shape[0], 1, 1))
            y = jnp.where(keep, y / (1.0 - self.skip), 0.0).astype(y.dtype)
        if self.dropout > 0.0:
            keep = jax.random.bernoulli(jax.random.fold_in(key, 1), 1.0 - self.dropout, y.shape)
            y = jnp.where(keep, y / (1.0 - self.dropout), 0.0).astype(y.dtype)
        return y


class Transformer(nnx.Module):
    """`depth` blocks and a final norm.

    The blocks' parameters are one tree with a leading axis of `depth`, whether they are then
    scanned or unrolled: a checkpoint does not depend on how it was computed.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = nnx.LayerNorm(config.width, dtype=jnp.dtype(config.compute_dtype), rngs=rngs)

    def layers(self) -> list[Block]:
        """The blocks one by one."""
        graph, stacked = nnx.split(self.blocks)
        leaves, tree = jax.tree.flatten(stacked)
        each = zip(*[jnp.unstack(leaf) for leaf in leaves], strict=True)
        return [nnx.merge(graph, tree.unflatten(layer)) for layer in each]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: jax.Array | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """`key` turns stochastic depth and dropout on (training); None is evaluation.

        Tokens of a row meet only those of their own segment; without `segments` all of the row.
        """
        c = self.config
        if c.sequence_positions == "sinusoidal":
            waves = self._waves(x.shape[1], x.dtype)
            x = x + (waves[None] if segments is None else waves[_places(segments)])
        keys = None if key is None else jax.random.split(key, c.depth)
        if c.scan_layers:
            graph, stacked = nnx.split(self.blocks)
            body = lambda x, layer: (  # noqa: E731
                nnx.merge(graph, layer[0])(x, layer[1], segments),
                None,
            )
            if c.remat:
                body = jax.checkpoint(body, prevent_cse=False)
            x, _ = jax.lax.scan(body, x, (stacked, keys))
        else:
            call = lambda block, x, key: block(x, key, segments)  # noqa: E731
            if c.remat:
                call = nnx.remat(call)
            for i, block in enumerate(self.layers()):
                x = call(block, x, None if keys is None else keys[i])
        return self.norm(x)

    def _waves(self, length: int, dtype: jnp.dtype) -> Float[Array, "T D"]:
        """Absolute positions, as large as the learned rows: a sinusoid's RMS is sqrt(1/2)."""
        waves = sinusoids(np.arange(length), self.config.width) * (INIT * np.sqrt(2.0))
        return jnp.asarray(waves, dtype)

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A cache with room for so many tokens a row, and none in it."""
        c = self.config
        shape, dtype = (rows, c.num_heads, slots, c.head_dim), jnp.dtype(c.compute_dtype)
        keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(c.depth)) for _ in "kv")
        return Cache(keys, values, self._distances(slots), jnp.zeros(rows, jnp.int32))

    def _distances(self, slots: int) -> tuple[Float[Array, "N S H"], ...]:
        """`Cache.distances`."""
        c = self.config
        if c.sequence_positions != "relative":
            return ()
        features = jnp.asarray(sinusoids(np.arange(slots), c.width), c.compute_dtype)
        return tuple(b.attention.relative(features).swapaxes(0, 1) for b in self.layers())

    def prefill(
        self, x: Float[Array, "B T D"], lengths: Int[Array, " B"], slots: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """`extend` of an empty cache of `slots` >= T, by `__call__`'s faster attention."""
        if self.config.sequence_positions == "sinusoidal":
            x = x + self._waves(x.shape[1], x.dtype)[None]
        keys, values = [], []
        room = ((0, 0), (0, 0), (0, slots - x.shape[1]), (0, 0))
        for block in self.layers():
            x, k, v = block.keep(x, block.attention.full)
            keys.append(jnp.pad(k.swapaxes(1, 2), room))
            values.append(jnp.pad(v.swapaxes(1, 2), room))
        return self.norm(x), Cache(tuple(keys), tuple(values), self._distances(slots), lengths)

    def extend(
        self,
        x: Float[Array, "B C D"],
        cache: Cache,
        counts: Int[Array, " B"],
        layers: list[Block] | None = None,
    ) -> tuple[Float[Array, "B C D"], Cache]:
        """Hidden states of up to C more tokens a row, and the cache with them in it.

        The first `counts` <= C of a row are tokens; the others are padding, whose hidden states
        mean nothing. Equals `__call__` on all tokens of a row so far, but for rounding, as long as
        they are no more than the cache has slots; nothing checks that here. A loop takes `layers()`
        out of it and hands them in, or every round slices the parameters anew.
        """
        positions = cache.lengths[:, None] + jnp.arange(x.shape[1])[None]
        slots = cache.keys[0].shape[2]
        if self.config.sequence_positions == "sinusoidal":
            x = x + self._waves(slots, x.dtype)[positions]
        keys, values = [], []
        for i, block in enumerate(layers or self.layers()):
            k, v = cache.keys[i], cache.values[i]
            r = cache.distances[i] if cache.distances else None
            attention = functools.partial(block.attention.extend, k=k, v=v, r=r, at=positions)
            x, k, v = block.keep(x, attention)
            keys.append(k)
            values.append(v)
        lengths = cache.lengths + counts
        return self.norm(x), Cache(tuple(keys), tuple(values), cache.distances, lengths)
