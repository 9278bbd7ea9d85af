"""Tokens and patches to vectors (paper 2.2, App. C.2, C.3).

One lookup table serves text, discrete and continuous ids, observations and actions alike, and is
also the output projection. Patches go through one residual block. Positions are added: row and
column of a patch within its image, and the place of a token within its timestep.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from gato_lib import tokenizers
from gato_lib.config import ConfigError, ModelConfig
from gato_lib.distributed import constrain, on_each_device, part_of
from gato_lib.sequence import NO_ID

LOCAL_ROWS = 512 + 1  # observation tokens, and one row for all actions (sequence.ACTION_POSITION)
PATCH_ROWS = 128
PATCH_CHANNELS = 64
INIT = 0.02  # standard deviation of table rows and positions


def num_rows(config: ModelConfig) -> int:
    """Rows of the lookup table."""
    own = tokenizers.NUM_BINS if config.discrete_range == "own" else 0
    return config.text_rows + tokenizers.NUM_BINS + 1 + own


def table_row(ids: Int[Array, "..."], config: ModelConfig) -> Int[Array, "..."]:
    """The table row of each id: text keeps its place, all later ranges close up behind it.

    With 32,000 text rows this is the identity. The ids themselves are always the paper's.
    """
    return ids - (ids >= tokenizers.TEXT_IDS) * (tokenizers.TEXT_IDS - config.text_rows)


def check_text(config: ModelConfig, text: tokenizers.TextTokenizer | None) -> None:
    """Raise ConfigError where a text tokenizer has more pieces than the table has rows for."""
    if text is not None and text.size > config.text_rows:
        raise ConfigError(f"{text.size} text pieces, but text_rows is {config.text_rows}")


def value_features(width: int) -> np.ndarray:
    """Rows for the 1,024 bins that know their order, float32 (1024, width).

    Random cosines of the bin centre, frequencies log-uniform in [0.3, 40] half-turns per unit,
    scaled to the other rows' standard deviation. Neighbouring bins start alike, so what is learned
    of one value holds for those around it.
    """
    rng = np.random.default_rng(0)
    frequency = np.exp(rng.uniform(np.log(0.3), np.log(40.0), width))
    phase = rng.uniform(0.0, 2.0 * np.pi, width)
    rows = np.cos(np.pi * frequency * tokenizers.bin_centres()[:, None] + phase)
    return (rows / np.sqrt(np.mean(rows**2)) * INIT).astype(np.float32)


def initial_table(config: ModelConfig, key: jax.Array) -> Float[Array, "V D"]:
    """The lookup table at step 0."""
    table = INIT * jax.random.normal(key, (num_rows(config), config.width))
    if config.value_rows == "ordinal":
        features = jnp.asarray(value_features(config.width))
        starts = [config.text_rows]
        if config.discrete_range == "own":
            starts.append(config.text_rows + tokenizers.NUM_BINS + 1)
        for start in starts:
            table = table.at[start : start + tokenizers.NUM_BINS].set(features)
    return table


def scale_pixels(patches: UInt8[Array, "Q 16 16 3"]) -> Float[Array, "Q 16 16 3"]:
    """2.1: pixels to [-1, 1], then divided by the square root of the patch side."""
    return (patches.astype(jnp.float32) / 127.5 - 1.0) / 4.0


class PatchEmbedder(nnx.Module):
    """One pre-activation ("v2") residual block with GroupNorm and GELU, per 16 x 16 patch.

    The paper draws the block (App. C.2) and leaves its sizes open. Ours follow from the patch:
    with 32 groups, 64 channels are the fewest that leave a group more than one; a 3 x 3 root
    convolution halves the patch to 8 x 8 and the block halves it to 4 x 4, as every patch of
    every frame pays for the resolution; a 2 x 2 average keeps 2 x 2 x 64 values, so that where in
    the patch something is reaches the final projection. That is 0.1M parameters and 256 a unit of
    width, the same at every model size but for that projection. The published totals, which it
    was not fitted to, have room for it.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = PATCH_CHANNELS
        conv = lambda i, o, k, s: nnx.Conv(  # noqa: E731
            i, o, (k, k), strides=(s, s), dtype=dtype, rngs=rngs
        )
        norm = lambda: nnx.GroupNorm(c, num_groups=32, dtype=dtype, rngs=rngs)  # noqa: E731
        self.root = conv(3, c, 3, 2)
        self.norm1, self.conv1 = norm(), conv(c, c, 3, 2)
        self.norm2, self.conv2 = norm(), conv(c, c, 3, 1)
        self.skip = conv(c, c, 1, 2)
        self.project = nnx.Linear(4 * c, width, dtype=dtype, rngs=rngs)

    def __call__(self, patches: UInt8[Array, "Q 16 16 3"]) -> Float[Array, "Q D"]:
        x = self.root(scale_pixels(patches))  # Q 8 8 C
        h = jax.nn.gelu(self.norm1(x))
        shortcut = self.skip(h)  # Q 4 4 C
        h = self.conv1(h)
        h = self.conv2(jax.nn.gelu(self.norm2(h)))
        x = nnx.avg_pool(shortcut + h, (2, 2), (2, 2))  # Q 2 2 C
        return self.project(x.reshape(x.shape[0], -1))


class LinearPatchEmbedder(nnx.Module):
    """One matrix on the flattened patch, as ViT has it; for comparison."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.project = nnx.Linear(16 * 16 * 3, width, dtype=dtype, rngs=rngs)

    def __call__(self, patches: UInt8[Array, "Q 16 16 3"]) -> Float[Array, "Q D"]:
        return self.project(scale_pixels(patches).reshape(patches.shape[0], -1))


def _whole(table: nnx.Param) -> Float[Array, "V D"]:
    """The table on every device while it is read: each looks up rows for its own sequences.

    Left to itself XLA looks up split columns for the whole batch.
    """
    return constrain(table[...], None, None)


def _look_up(
    vectors: Float[Array, "Q D"], patch: Int[Array, "B T"], count: int
) -> Float[Array, "B T D"]:
    """Vectors of the tokens' patches; whatever where a token has none.

    A device's sequences use patches of its own part only (`mixture.group_batch`), so nothing is
    exchanged: the vectors of a whole batch would be gigabytes.
    """
    own = patch - part_of(count) * vectors.shape[0]
    return vectors[jnp.clip(own, 0, vectors.shape[0] - 1)]


class Embedding(nnx.Module):
    """Everything that turns a batch into (B, T, D), and the output table."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        rows = lambda n: nnx.Param(  # noqa: E731
            INIT * jax.random.normal(rngs.params(), (n, config.width))
        )
        self.table = nnx.Param(initial_table(config, rngs.params()))
        if not config.tied:
            self.output = nnx.Param(initial_table(config, rngs.params()))
        if config.local_positions:
            self.local = rows(LOCAL_ROWS)
        self.patch_row, self.patch_col = rows(PATCH_ROWS), rows(PATCH_ROWS)
        embedder = {"residual": PatchEmbedder, "linear": LinearPatchEmbedder}
        self.patch = embedder[config.patch_embedder](config.width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        local: Int[Array, "B T"],
        patch: Int[Array, "B T"],
        rows: Int[Array, "B T"],
        cols: Int[Array, "B T"],
        patches: UInt8[Array, "Q 16 16 3"],
    ) -> Float[Array, "B T D"]:
        x = _whole(self.table)[table_row(jnp.maximum(ids, 0), self.config)]
        x = jnp.where((ids == NO_ID)[..., None], 0.0, x)
        if patches.shape[0]:  # a batch shape without images costs nothing
            image = (patch < patches.shape[0])[..., None]
            vectors = self.patch(patches).astype(x.dtype)
            vectors = constrain(vectors, "batch", None)
            seen = on_each_device(
                functools.partial(_look_up, count=patches.shape[0]),
                (vectors, patch),
                (("batch", None), ("batch", None)),
                ("batch", None, None),
                x.shape,
            )
            seen += _whole(self.patch_row)[rows] + _whole(self.patch_col)[cols]
            x = jnp.where(image, seen, x)
        if self.config.local_positions:
            x += jnp.where((local >= 0)[..., None], _whole(self.local)[jnp.maximum(local, 0)], 0.0)
        return constrain(x.astype(self.config.compute_dtype), "batch", None, None)

    def logits(self, hidden: Float[Array, "R D"], rows: slice = slice(None)) -> Float[Array, "R V"]:
        """Logits over table rows, float32. Two-dimensional on purpose: it is 3 times faster."""
        table = self.table if self.config.tied else self.output
        table = constrain(table[...].astype(hidden.dtype), None, None)[rows]
        return jnp.einsum("RD,VD->RV", hidden, table, preferred_element_type=jnp.float32)
