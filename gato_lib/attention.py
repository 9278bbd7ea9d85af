"""Causal attention with Transformer-XL's relative positions, in several implementations.

Axes: B batch, T query tokens, S key tokens, C new tokens, N heads, H head_dim.

All implementations compute the same function, score(i, j) = (q_i + u) k_j + (q_i + v) r_{i-j} for
keys j <= i, and differ in speed and in what they can run on (`ModelConfig.attention`):

    name         runs on   relative term                       other limits
    plain        any       added to the scores                 T x T scores in memory
    blocked      any       per block of queries                skips what lies above the diagonal
    dot_product  any       as `bias` of jax.nn's function      T x T bias in memory
    flash        GPU, TPU  as bias of cuDNN's (GPU) or         T x T bias in memory; GPU: bfloat16,
                           Pallas' kernel (TPU)                head_dim a multiple of 8
    auto         any       blocked on a CPU, else dot_product

The TPU kernel is tested in interpret mode only, and nothing has been run on a GPU yet; there,
"flash" rounds the relative term to bfloat16. Splash attention, the newer TPU kernel, takes no bias
and so cannot hold that term.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gato_lib.config import ConfigError
from gato_lib.distributed import on_each_device

BLOCK = 128  # query rows of "blocked"; half of it where sequences are short
MASKED = -1e9


def sinusoids(positions: np.ndarray, width: int) -> np.ndarray:
    """Sines, then cosines, of T positions at width / 2 frequencies, float32 (T, width)."""
    frequency = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angle = np.asarray(positions, np.float64)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def relative_features(length: int, width: int) -> np.ndarray:
    """Sinusoids of the distance between query and key, float32 (length, width).

    Row m is distance `length - 1 - m`, the order in which `relative_shift` wants them.
    """
    return sinusoids(np.arange(length - 1, -1, -1), width)


def relative_shift(x: Float[Array, "B N T S"]) -> Float[Array, "B N T S"]:
    """Turn scores by distance into scores by key, for the last T of S positions.

    Column m of the input scores distance S - 1 - m. Row i of the result is position S - T + i, and
    its column j scores key j. What lies above the diagonal is meaningless and masked by the caller.
    """
    b, n, t, s = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return x.reshape(b, n, s + 1, t)[:, :, 1:].reshape(b, n, t, s)


def attend(
    q: Float[Array, "B T N H"],
    q_distance: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    r: Float[Array, "T N H"] | None,
    implementation: str = "plain",
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention, scores scaled by 1 / sqrt(H) and computed in float32.

    Args:
      q: queries as they meet a key's content, q + u.
      q_distance: queries as they meet its distance, q + v.
      r: projected `relative_features`; None leaves the relative term out.
      segments: numbers of the windows packed into a row; a query sees keys of its own only. None
        is one window a row.

    Raises ConfigError where the implementation does not run on this machine.
    """
    if implementation == "auto":
        implementation = "blocked" if jax.default_backend() == "cpu" else "dot_product"
    if implementation in ("plain", "blocked"):
        t = q.shape[1]
        size = t if implementation == "plain" else BLOCK if t > 2 * BLOCK else BLOCK // 2
        blocks = [(first, min(first + size, t)) for first in range(0, t, size)]
        # Heads first, so that no product has to transpose: on a CPU that is a fifth of the time.
        q, q_distance, k, v = (x.transpose(2, 0, 1, 3) for x in (q, q_distance, k, v))
        r = None if r is None else r.transpose(1, 0, 2)
        rows = [
            _rows(q[:, :, a:b], q_distance[:, :, a:b], k[:, :, :b], v[:, :, :b], r, segments)
            for a, b in blocks
        ]
        y = jnp.concatenate(rows, axis=2) if len(rows) > 1 else rows[0]
        return y.transpose(1, 2, 0, 3)
    if implementation == "dot_product":
        bias = None if r is None else _bias(q_distance, r)
        together = None if segments is None else _together(segments, segments)
        return jax.nn.dot_product_attention(q, k, v, bias, together, is_causal=True)
    if implementation == "flash":
        return _flash(q, q_distance, k, v, r, jax.default_backend(), segments)
    raise ConfigError(f"unknown attention {implementation!r}")


def attend_cached(
    q: Float[Array, "B C N H"],
    q_distance: Float[Array, "B C N H"],
    k: Float[Array, "B N S H"],
    v: Float[Array, "B N S H"],
    r: Float[Array, "N S H"] | None,
    positions: Int[Array, "B C"],
) -> Float[Array, "B C N H"]:
    """`attend` for C new queries a row, at `positions`, over keys of which slot j holds position j.

    Rows may stand at different positions. r is projected features too, but row m is distance m.
    Slots after a query's position are never seen, so what they hold does not matter.
    """
    (b, c, n, h), s = q.shape, k.shape[2]
    f32 = jnp.float32
    # Heads first, for the result too: on a CPU the last product is then 5 times faster.
    q, q_distance = q.swapaxes(1, 2), q_distance.transpose(2, 0, 1, 3)
    scores = jnp.einsum("BNCH,BNSH->BNCS", q, k, preferred_element_type=f32)
    distance = positions[:, :, None] - jnp.arange(s)[None, None]  # B C S
    if r is not None:
        q_distance = q_distance.reshape(n, b * c, h)
        by_distance = jnp.einsum("NXH,NSH->NXS", q_distance, r, preferred_element_type=f32)
        by_distance = by_distance.reshape(n, b, c, s).swapaxes(0, 1)
        where = jnp.broadcast_to(jnp.clip(distance, 0, s - 1)[:, None], scores.shape)
        scores += jnp.take_along_axis(by_distance, where, axis=3)
    scores = jnp.where((distance >= 0)[:, None], scores * h**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("BNCS,BNSH->BNCH", weights, v).swapaxes(1, 2)


def _together(query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """Whether query and key are of one segment."""
    return (query[:, :, None] == key[:, None, :])[:, None]


def _rows(q, q_distance, k, v, r, segments):
    """The last T of S positions, (N, B, T, H) to (N, B, T, H): scores, softmax, values."""
    (n, b, t, h), s = q.shape, k.shape[2]
    f32 = jnp.float32
    scores = jnp.einsum("NBTH,NBSH->NBTS", q, k, preferred_element_type=f32)
    if r is not None:  # one product a head: distances are the same in every sequence
        q_distance, r = q_distance.reshape(n, b * t, h), r[:, r.shape[1] - s :]
        by_distance = jnp.einsum("NXH,NSH->NXS", q_distance, r, preferred_element_type=f32)
        scores += relative_shift(by_distance.reshape(n, b, t, s))
    seen = jnp.asarray(np.tril(np.ones((1, 1, t, s), bool), s - t))
    if segments is not None:
        together = _together(segments[:, s - t : s], segments[:, :s])  # B 1 T S
        seen = seen & together.swapaxes(0, 1)
    scores = jnp.where(seen, scores * q.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("NBTS,NBSH->NBTH", weights, v)


def _bias(q_distance, r) -> Float[Array, "B N T T"]:
    """The relative term as an additive bias, already scaled, float32."""
    by_distance = jnp.einsum("BTNH,SNH->BNTS", q_distance, r, preferred_element_type=jnp.float32)
    return relative_shift(by_distance) * q_distance.shape[-1] ** -0.5


def _flash(q, q_distance, k, v, r, backend, segments=None):
    """The vendor's fused kernel. Padding at the end is never seen: attention is causal."""
    if backend not in ("gpu", "tpu"):
        raise ConfigError(f"attention 'flash' needs a GPU or TPU, this is a {backend}")
    if backend == "gpu" and q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ConfigError("attention 'flash' on a GPU needs compute_dtype 'bfloat16'")
    if backend == "gpu" and q.shape[-1] % 8:
        raise ConfigError(f"attention 'flash' on a GPU: head_dim {q.shape[-1]} is no multiple of 8")
    if backend == "gpu":
        return _kernel(q, q_distance, k, v, r, segments, backend)
    # XLA cannot split a hand-written kernel: each device runs it on its own sequences and heads.
    axes = [("batch", None, "heads", None)] * 4 + [(None, "heads", None), ("batch", None)]
    kernel = functools.partial(_kernel, backend=backend)
    arguments = (q, q_distance, k, v, r, segments)
    return on_each_device(kernel, arguments, axes, axes[0], q.shape)


def _kernel(q, q_distance, k, v, r, segments, backend):
    t, h = q.shape[1], q.shape[-1]
    multiple = 128 if backend == "tpu" else 2
    padding = -t % multiple
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))  # noqa: E731
    bias = None
    if r is not None:
        bias = jnp.pad(_bias(q_distance, r), ((0, 0), (0, 0), (0, padding), (0, padding)))
    q, k, v = pad(q), pad(k), pad(v)
    if backend == "gpu":
        bias = None if bias is None else bias.astype(q.dtype)  # cuDNN wants one dtype
        mask = None
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1)
            mask = _together(segments, segments)
        y = jax.nn.dot_product_attention(
            q, k, v, bias, mask, is_causal=True, implementation="cudnn"
        )
    else:
        from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

        together = None
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1)
            together = SegmentIds(segments, segments)
        # The kernel wants heads before positions, and would scale the bias along with the scores.
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * h**-0.5, k, v))
        y = jnp.swapaxes(flash_attention(q, k, v, bias, together, causal=True), 1, 2)
    return y[:, :t]
