"""A causal pre-norm transformer with GEGLU and relative attention (paper 2.3, App. C.1).

Axes: B batch, T tokens, D width, N heads, H head_dim, F hidden units of the feed-forward layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gato_lib.attention import attend, relative_features, sinusoids
from gato_lib.config import ModelConfig
from gato_lib.embedding import INIT


def _linear(config: ModelConfig, i: int, o: int, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    init = nnx.initializers.truncated_normal(INIT)
    dtype = jnp.dtype(config.compute_dtype)
    return nnx.Linear(i, o, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head causal attention; order enters as the distance between query and key.

    Transformer-XL's form: a query meets a key's content (plus a bias u) and its distance (plus a
    bias v), the distance through one learned D x D projection. With other `sequence_positions` it
    is plain causal attention.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        n, h, d = config.num_heads, config.head_dim, config.width
        self.qkv = _linear(config, d, 3 * n * h, rngs)
        self.out = _linear(config, n * h, d, rngs)
        if config.sequence_positions == "relative":
            self.relative = _linear(config, d, n * h, rngs, bias=False)
            self.content_bias = nnx.Param(jnp.zeros((n, h)))
            self.distance_bias = nnx.Param(jnp.zeros((n, h)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        b, t, _ = x.shape
        # (B*T, D) -> (B, T, N, H), three times
        qkv = self.qkv(x.reshape(b * t, -1)).reshape(b, t, 3, c.num_heads, c.head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q_distance, r = q, None
        if c.sequence_positions == "relative":
            r = self.relative(jnp.asarray(relative_features(t, c.width), x.dtype))
            r = r.reshape(t, c.num_heads, c.head_dim)
            q_distance = q + self.distance_bias[...].astype(x.dtype)[None, None]
            q = q + self.content_bias[...].astype(x.dtype)[None, None]
        y = attend(q, q_distance, k, v, r, c.attention)
        return self.out(y.reshape(b * t, -1)).reshape(b, t, -1)


class FeedForward(nnx.Module):
    """GEGLU: a projection to mlp_dim, half of it gates; then back to the width.

    `config.feed_forward` also knows the two other readings of Table 5, to count and compare.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, m = config.width, config.mlp_dim
        self.gated = config.feed_forward != "gelu"
        up = 2 * m if config.feed_forward == "geglu_full" else m
        self.up = _linear(config, d, up, rngs)
        self.down = _linear(config, up // 2 if self.gated else up, d, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        b, t, d = x.shape
        h = self.up(x.reshape(b * t, d))  # (B*T, F), or gates and values of (B*T, F) each
        if self.gated:
            gate, value = jnp.split(h, 2, axis=-1)
            h = jax.nn.gelu(gate) * value
        else:
            h = jax.nn.gelu(h)
        return self.down(h).reshape(b, t, d)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        norm = lambda: nnx.LayerNorm(  # noqa: E731
            config.width, dtype=jnp.dtype(config.compute_dtype), rngs=rngs
        )
        self.rate = config.stochastic_depth
        self.norm1, self.attention = norm(), Attention(config, rngs=rngs)
        self.norm2, self.feed_forward = norm(), FeedForward(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        keys = (None, None) if key is None else jax.random.split(key)
        x = x + self._drop(self.attention(self.norm1(x)), keys[0])
        return x + self._drop(self.feed_forward(self.norm2(x)), keys[1])

    def _drop(self, y: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        """Stochastic depth: a sequence skips this sub-layer; kept ones are scaled up (App. C)."""
        if key is None or self.rate == 0.0:
            return y
        keep = jax.random.bernoulli(key, 1.0 - self.rate, (y.shape[0], 1, 1))
        return jnp.where(keep, y / (1.0 - self.rate), 0.0).astype(y.dtype)


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
        self, x: Float[Array, "B T D"], key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        """`key` turns stochastic depth on (training); None is evaluation."""
        c = self.config
        if c.sequence_positions == "sinusoidal":
            # As large as the learned rows: a sinusoid's root mean square is sqrt(1/2).
            waves = sinusoids(np.arange(x.shape[1]), c.width) * (INIT * np.sqrt(2.0))
            x = x + jnp.asarray(waves, x.dtype)[None]
        keys = None if key is None else jax.random.split(key, c.depth)
        if c.scan_layers:
            graph, stacked = nnx.split(self.blocks)
            body = lambda x, layer: (nnx.merge(graph, layer[0])(x, layer[1]), None)  # noqa: E731
            if c.remat:
                body = jax.checkpoint(body, prevent_cse=False)
            x, _ = jax.lax.scan(body, x, (stacked, keys))
        else:
            call = lambda block, x, key: block(x, key)  # noqa: E731
            if c.remat:
                call = nnx.remat(call)
            for i, block in enumerate(self.layers()):
                x = call(block, x, None if keys is None else keys[i])
        return self.norm(x)
