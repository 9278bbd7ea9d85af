"""A causal pre-norm transformer with GEGLU and relative attention (paper 2.3, App. C.1).

Axes: B batch, T query tokens, S key tokens, D width, N heads, H head_dim, F half of mlp_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gato_lib.config import ModelConfig


def relative_features(length: int, width: int) -> np.ndarray:
    """Sinusoids of the distance between query and key, float32 (length, width).

    Row m is distance `length - 1 - m`, the order in which `relative_shift` wants them.
    """
    distance = np.arange(length - 1, -1, -1.0)
    frequency = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angle = distance[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def relative_shift(x: Float[Array, "B N T S"]) -> Float[Array, "B N T S"]:
    """Turn scores by distance into scores by key.

    Column m of row i scores distance T - 1 - m; the result's column j scores distance i - j, for
    j <= i. What lies above the diagonal is meaningless and masked by the caller.
    """
    b, n, t, s = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return x.reshape(b, n, s + 1, t)[:, :, 1:].reshape(b, n, t, s)


class Attention(nnx.Module):
    """Multi-head causal attention; position enters only as the distance between query and key.

    Transformer-XL's form: a query meets a key's content (plus a bias u) and its distance (plus a
    bias v), the distance through one learned D x D projection.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        n, h, d = config.num_heads, config.head_dim, config.width
        init = nnx.initializers.truncated_normal(0.02)
        linear = lambda i, o, bias=True: nnx.Linear(  # noqa: E731
            i, o, use_bias=bias, kernel_init=init, dtype=jnp.dtype(config.compute_dtype), rngs=rngs
        )
        self.qkv = linear(d, 3 * n * h)
        self.relative = linear(d, n * h, bias=False)
        self.out = linear(n * h, d)
        self.content_bias = nnx.Param(jnp.zeros((n, h)))
        self.distance_bias = nnx.Param(jnp.zeros((n, h)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        b, t, _ = x.shape
        # (B*T, D) -> (B, T, N, H), three times
        qkv = self.qkv(x.reshape(b * t, -1)).reshape(b, t, 3, c.num_heads, c.head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        r = self.relative(jnp.asarray(relative_features(t, c.width), x.dtype))
        r = r.reshape(t, c.num_heads, c.head_dim)
        f32 = jnp.float32
        u, w = (p[...].astype(x.dtype)[None, None] for p in (self.content_bias, self.distance_bias))
        content = jnp.einsum("BTNH,BSNH->BNTS", q + u, k, preferred_element_type=f32)
        distance = jnp.einsum("BTNH,SNH->BNTS", q + w, r, preferred_element_type=f32)
        scores = (content + relative_shift(distance)) * c.head_dim**-0.5
        causal = np.tril(np.ones((1, 1, t, t), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1).astype(x.dtype)
        y = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
        return self.out(y.reshape(b * t, -1)).reshape(b, t, -1)


class FeedForward(nnx.Module):
    """GEGLU: a projection to mlp_dim, half of it gates; then back to the width."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(0.02)
        linear = lambda i, o: nnx.Linear(  # noqa: E731
            i, o, kernel_init=init, dtype=jnp.dtype(config.compute_dtype), rngs=rngs
        )
        self.up = linear(config.width, config.mlp_dim)
        self.down = linear(config.mlp_dim // 2, config.width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        b, t, d = x.shape
        gate, value = jnp.split(self.up(x.reshape(b * t, d)), 2, axis=-1)  # (B*T, F) each
        return self.down(jax.nn.gelu(gate) * value).reshape(b, t, d)


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
    """`depth` blocks and a final norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, dtype=jnp.dtype(config.compute_dtype), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        """`key` turns stochastic depth on (training); None is evaluation."""
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, k in zip(self.blocks, keys, strict=True):
            x = block(x, k)
        return self.norm(x)
