"""Gato: embedding, transformer, tied head and the masked loss (paper 2.2, 2.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gato_lib import tokenizers
from gato_lib.config import ModelConfig
from gato_lib.distributed import constrain
from gato_lib.embedding import PATCH_CHANNELS, Embedding, num_rows, table_row
from gato_lib.sequence import MODALITIES, Batch
from gato_lib.transformer import Block, Cache, Transformer


class Gato(nnx.Module):
    """One network for every modality and task.

    `hidden` maps a batch to (B, T, D), `target_logits` its targets to (R, V), V table rows. Where
    tokens come bit by bit, `prefill` and `extend` compute the same with a cache.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Float[Array, "B T D"]:
        """Final hidden states. `key` is for training (stochastic depth, dropout)."""
        x = self.embedding(*batch[:6])
        return self.transformer(x, key, batch.segments)

    def target_logits(self, batch: Batch, key: jax.Array | None = None) -> Float[Array, "R V"]:
        """Logits at the K target positions of each row only, R = B * K."""
        h = self.hidden(batch, key)
        h = jnp.take_along_axis(h, batch.target_positions[..., None], axis=1)
        h = constrain(h.reshape(-1, h.shape[-1]), "rows", None)
        return constrain(self.embedding.logits(h), "rows", None)

    def prefill(
        self, batch: Batch, lengths: Int[Array, " B"], slots: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """`hidden` of rows of so many tokens, one segment each, and their cache with `slots`."""
        return self.transformer.prefill(self.embedding(*batch[:6]), lengths, slots)

    def extend(
        self,
        batch: Batch,
        cache: Cache,
        counts: Int[Array, " B"],
        layers: list[Block] | None = None,
    ) -> tuple[Float[Array, "B C D"], Cache]:
        """`hidden` of C more columns, the first `counts` of a row being tokens, and the cache."""
        return self.transformer.extend(self.embedding(*batch[:6]), cache, counts, layers)


def cross_entropy(
    logits: Float[Array, "R V"], ids: Int[Array, " R"], config: ModelConfig, soft_sigma: float
) -> Float[Array, " R"]:
    """-log p(target), for each row; V counts table rows, `ids` are the paper's.

    With `soft_sigma` > 0 the target of a continuous value is a Gaussian of that many bins around
    its own bin, cut off at the ends of the range, instead of the one bin.
    """
    # Not log_softmax: of R x V numbers only the logits themselves are kept for the backward pass.
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # R 1
    rows = table_row(ids, config)
    hard = (normaliser - jnp.take_along_axis(logits, rows[:, None], axis=-1))[:, 0]
    if soft_sigma == 0.0:
        return hard
    start = config.text_rows
    bins = logits[:, start : start + tokenizers.NUM_BINS] - normaliser  # R 1024
    offset = jnp.arange(tokenizers.NUM_BINS)[None] - (ids - tokenizers.CONTINUOUS_START)[:, None]
    weight = jnp.exp(-0.5 * (offset / soft_sigma) ** 2)
    weight = weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-9)
    continuous = (ids >= tokenizers.CONTINUOUS_START) & (ids < tokenizers.SEPARATOR)
    return jnp.where(continuous, -(weight * bins).sum(axis=-1), hard)


def modality_losses(
    model: Gato, batch: Batch, key: jax.Array | None = None, soft_sigma: float = 0.0
) -> tuple[Float[Array, " 3"], Float[Array, " 3"]]:
    """Sum of -log p over targets, and their number, for each of `MODALITIES`."""
    logits = model.target_logits(batch, key)
    losses = cross_entropy(logits, batch.target_ids.reshape(-1), model.config, soft_sigma)
    weights = batch.target_weights.reshape(-1)
    kinds = jax.nn.one_hot(batch.target_kinds.reshape(-1), len(MODALITIES)) * weights[:, None]
    return (losses[:, None] * kinds).sum(axis=0), kinds.sum(axis=0)


def masked_loss(model: Gato, batch: Batch, key: jax.Array | None = None) -> Float[Array, ""]:
    """Mean of -log p over the batch's targets, text and actions (2.3).

    The paper writes a sum and leaves normalisation open; a mean over targets keeps the learning
    rate's meaning across batch shapes.
    """
    sums, counts = modality_losses(model, batch, key)
    return sums.sum() / jnp.maximum(counts.sum(), 1.0)


def forward_flops(
    config: ModelConfig, sequences: int, length: int, targets: int, patches: int
) -> dict[str, float]:
    """Floating-point operations of the matrix products of one forward pass, by part.

    `targets` and `patches` are of the whole batch. A product of m x k and k x n is 2mkn. The
    T x T products are counted whole, though half of each is masked. Training is three times as
    much: the backward pass makes two products of each.
    """
    c, inner, channels = config, config.num_heads * config.head_dim, PATCH_CHANNELS
    tokens = sequences * length
    relative = c.sequence_positions == "relative"
    gated = c.feed_forward != "gelu"
    hidden = c.mlp_dim // 2 if c.feed_forward == "geglu" else c.mlp_dim
    # Squared: taps along one axis that meet the image, summed over the outputs.
    convolutions = 23**2 * 3 * channels + (11**2 + 10**2 + 4**2) * channels**2
    patch = convolutions + 4 * channels * c.width
    if c.patch_embedder == "linear":
        patch = 16 * 16 * 3 * c.width
    return {
        "attention, projections": c.depth * 2 * tokens * c.width * 4 * inner,
        "attention, distances": c.depth * 2 * length * c.width * inner * relative,
        "attention, T x T": c.depth * 2 * tokens * length * (2 + relative) * inner,
        "feed-forward up": c.depth * 2 * tokens * c.width * hidden * (1 + gated),
        "feed-forward down": c.depth * 2 * tokens * c.width * hidden,
        "head": 2 * targets * c.width * num_rows(c),
        "patches": 2 * patches * patch,
    }


def count_parameters(config: ModelConfig) -> int:
    """All parameters of a network of this size, without allocating any."""
    return sum(parameters_by_part(config).values())


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of the transformer and of each part of the embedding (`jax.eval_shape`)."""
    state = nnx.state(nnx.eval_shape(lambda: Gato(config, rngs=nnx.Rngs(0))), nnx.Param)
    counts: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        names = [str(getattr(p, "key", p)) for p in path]
        part = "transformer" if names[0] == "transformer" else f"{names[0]}/{names[1]}"
        counts[part] = counts.get(part, 0) + int(leaf.size)
    return counts
