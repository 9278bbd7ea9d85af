"""The network: counts, causality, padding, batching, modes, loss."""

from __future__ import annotations

import dataclasses
import functools

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gato_lib import sequence as sq
from gato_lib import tokenizers as tk
from gato_lib.config import MODEL_SIZES, ConfigError, ModelConfig, model_config
from gato_lib.embedding import num_rows, scale_pixels, table_row, value_features
from gato_lib.episodes import Episode
from gato_lib.model import Gato, count_parameters, cross_entropy, forward_flops, masked_loss
from gato_lib.training import graph_of, initial_state, merge

PATCHES = 40  # slots: ten images of four
TINY = ModelConfig(2, 2, 32, 64, 16, text_rows=1024, stochastic_depth=0.0)


@pytest.fixture(scope="module")
def gato():
    return Gato(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    """Three steps of an image, two numbers, a discrete value and two actions; rows differ."""
    space = gym.spaces.Dict(
        {
            "image": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8),
            "number": gym.spaces.Box(-1, 1, (2,), np.float32),
            "switch": gym.spaces.Discrete(3),
        }
    )
    rng = np.random.default_rng(0)
    t = 10
    episode = Episode(
        "t/x",
        {
            "image": rng.integers(0, 255, (t + 1, 32, 32, 3), dtype=np.uint8),
            "number": rng.uniform(-1, 1, (t + 1, 2)).astype(np.float32),
            "switch": rng.integers(0, 3, t + 1),
        },
        rng.uniform(-1, 1, (t, 2)).astype(np.float32),
        np.zeros((t, 2), np.float32),
        np.zeros(t),
        True,
        0,
    )
    tokenizer = sq.Tokenizer(space, gym.spaces.Box(-1, 1, (2,), np.float32))
    tokens = tokenizer.episode(episode)  # 4 + 2 + 1 + 1 + 2 = 10 tokens a step
    windows = [[(10 * i, 10 * i + 30)] for i in range(8)]
    return sq.make_batch(tokens, windows, 30, 6, PATCHES)


def test_published_totals():
    published = {"1.18B": 1.18e9, "364M": 364e6, "79M": 79e6}
    for size, total in published.items():
        counted = count_parameters(MODEL_SIZES[size])
        assert abs(counted / total - 1) < 0.01, (size, counted)


def test_counted_is_allocated(gato):
    allocated = sum(x.size for x in jax.tree.leaves(nnx.state(gato, nnx.Param)))
    assert count_parameters(TINY) == allocated


@pytest.mark.parametrize("position", [0, 3, 6, 7, 8, 15, 29])
def test_causality(gato, batch, position):
    """Changing token t leaves everything before it bit-identical, and changes t itself."""
    hidden = jax.jit(lambda b: gato.hidden(b))
    head = jax.jit(lambda h: gato.embedding.logits(h))
    ids, patch = batch.ids.copy(), batch.patch.copy()
    if patch[0, position] < PATCHES:
        patch[0, position] = (patch[0, position] + 1) % PATCHES
    else:
        ids[0, position] = 32001 if ids[0, position] != 32001 else 32002
    before, after = hidden(batch), hidden(batch._replace(ids=ids, patch=patch))
    np.testing.assert_array_equal(before[0, :position], after[0, :position])
    assert np.abs(before[0, position:] - after[0, position:]).max(axis=-1).min() > 0
    np.testing.assert_array_equal(before[1:], after[1:])
    np.testing.assert_array_equal(head(before[0])[:position], head(after[0])[:position])


def test_a_target_is_predicted_without_being_seen(gato, batch):
    logits = jax.jit(lambda b: gato.target_logits(b))
    last = batch.target_positions[0, 5] + 1
    assert batch.ids[0, last] == batch.target_ids[0, 5] and last == 29
    ids = batch.ids.copy()
    ids[0, last] = 32000 + (ids[0, last] - 31000) % 1024
    np.testing.assert_array_equal(logits(batch)[:6], logits(batch._replace(ids=ids))[:6])


def one_row(batch, i):
    per_row = [k for k in batch._fields if k not in ("patches", "segments")]
    return batch._replace(**{k: getattr(batch, k)[i : i + 1] for k in per_row})


def test_batch_of_eight_equals_eight_batches_of_one(gato, batch):
    logits = jax.jit(lambda b: gato.target_logits(b))
    together = logits(batch)
    alone = np.concatenate([logits(one_row(batch, i)) for i in range(8)])
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_forward_flops_by_hand():
    """One product at a time, of a network small enough to write out; 03 compares with XLA."""
    config = dataclasses.replace(TINY, depth=3)  # width 32, two heads of 16, mlp_dim below
    parts = forward_flops(config, sequences=2, length=5, targets=7, patches=0)
    assert parts["attention, projections"] == 3 * (2 * 10 * 32 * 3 * 32 + 2 * 10 * 32 * 32)
    assert parts["attention, distances"] == 3 * 2 * 5 * 32 * 32
    assert parts["attention, T x T"] == 3 * 2 * 2 * 3 * (2 * 5 * 5 * 16)
    up, down = 2 * 10 * 32 * config.mlp_dim, 2 * 10 * (config.mlp_dim // 2) * 32
    assert (parts["feed-forward up"], parts["feed-forward down"]) == (3 * up, 3 * down)
    assert parts["head"] == 2 * 7 * 32 * num_rows(config) and parts["patches"] == 0


def test_padding_changes_nothing(gato, batch):
    pad = lambda x, fill: np.pad(x, ((0, 0), (0, 11)), constant_values=fill)  # noqa: E731
    padded = batch._replace(
        ids=pad(batch.ids, 0),
        local=pad(batch.local, sq.PADDING_POSITION),
        patch=pad(batch.patch, PATCHES),
        rows=pad(batch.rows, 0),
        cols=pad(batch.cols, 0),
    )
    np.testing.assert_allclose(gato.target_logits(padded), gato.target_logits(batch), atol=1e-5)
    np.testing.assert_allclose(masked_loss(gato, padded), masked_loss(gato, batch), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "plain"},
        {"attention": "blocked"},
        {"attention": "dot_product"},
        {"sequence_positions": "sinusoidal"},
    ],
)
def test_windows_packed_into_a_row_do_not_see_each_other(batch, changes):
    """Hidden states of a packed row are those of its windows alone, whatever stands beside them."""
    config = dataclasses.replace(TINY, **changes)
    gato = Gato(config, rngs=nnx.Rngs(0))
    halves = [one_row(batch, i) for i in (0, 5)]
    joined = {
        k: np.concatenate([getattr(h, k) for h in halves], axis=1)
        for k in ("ids", "local", "patch", "rows", "cols")
    }
    t = batch.ids.shape[1]
    segments = np.repeat([[0, 1]], t, axis=1).astype(np.int32)
    packed = halves[0]._replace(**joined, segments=segments)
    for scan in (False, True):
        model = nnx.clone(gato)
        model.transformer.config = dataclasses.replace(config, scan_layers=scan)
        hidden = jax.jit(lambda b, m=model: m.hidden(b))(packed)
        for i, half in enumerate(halves):
            np.testing.assert_allclose(
                hidden[0, i * t : (i + 1) * t], gato.hidden(half)[0], atol=1e-5
            )
    assert not np.allclose(gato.hidden(packed._replace(segments=None))[0, t:], hidden[0, t:])


def test_unused_target_slots_and_patch_slots_count_for_nothing(gato, batch):
    wide = batch._replace(
        target_positions=np.pad(batch.target_positions, ((0, 0), (0, 3))),
        target_ids=np.pad(batch.target_ids, ((0, 0), (0, 3))),
        target_weights=np.pad(batch.target_weights, ((0, 0), (0, 3))),
        target_kinds=np.pad(batch.target_kinds, ((0, 0), (0, 3))),
        patches=np.pad(batch.patches, ((0, 8), (0, 0), (0, 0), (0, 0)), constant_values=7),
        patch=np.where(batch.patch == PATCHES, PATCHES + 8, batch.patch),
    )
    np.testing.assert_allclose(masked_loss(gato, wide), masked_loss(gato, batch), rtol=1e-6)


SWITCHES = [
    {},
    {"sequence_positions": "sinusoidal"},
    {"sequence_positions": "none", "local_positions": False},
    {"patch_embedder": "linear"},
    {"feed_forward": "gelu"},
    {"feed_forward": "geglu_full"},
    {"tied": False},
    {"discrete_range": "own"},
    {"value_rows": "ordinal", "discrete_range": "own", "tied": False},
    {"compute_dtype": "bfloat16"},
    {"attention": "dot_product", "scan_layers": True, "remat": True},
]


ALONE = [pytest.param(s, marks=pytest.mark.slow) for s in SWITCHES[1:-3]]


@pytest.mark.parametrize("changes", [SWITCHES[0], *ALONE, *SWITCHES[-3:]], ids=str)
def test_training_and_evaluation_modes(batch, changes):
    config = dataclasses.replace(TINY, stochastic_depth=0.5, **changes)
    state = initial_state(config, _train_config())
    graph = graph_of(config)
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {np.dtype(np.float32)}
    loss = lambda p, key: masked_loss(merge(graph, p), batch, key)  # noqa: E731

    @jax.jit
    def run(params, key):
        return loss(params, None), *jax.value_and_grad(loss)(params, key)

    evaluation, value, grads = run(state["params"], jax.random.key(0))
    again, other, _ = run(state["params"], jax.random.key(1))
    assert evaluation == again, "evaluation draws nothing"
    assert len({float(evaluation), float(value), float(other)}) == 3, "training skips sub-layers"
    assert 0 < value < 12 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@functools.cache
def _loss_and_gradients(config, training):
    key = jax.random.key(0) if training else None
    params = initial_state(config, _train_config())["params"]
    loss = lambda p, b: masked_loss(merge(graph_of(config), p), b, key)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss)), params


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"scan_layers": True}, marks=pytest.mark.slow),
        pytest.param({"remat": True}, marks=pytest.mark.slow),
        {"scan_layers": True, "remat": True},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_nothing(batch, changes, training):
    """One tree of parameters runs every way, to the same loss and gradients."""
    config = dataclasses.replace(TINY, stochastic_depth=0.3 * training, attention="plain")
    plain, params = _loss_and_gradients(config, training)
    changed, _ = _loss_and_gradients(dataclasses.replace(config, **changes), training)
    value, grads = plain(params, batch)
    other, other_grads = changed(params, batch)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other_grads, grads)


def test_bfloat16_is_close_to_float32(gato, batch):
    params = nnx.to_pure_dict(nnx.split(gato, nnx.Param)[1])
    low = merge(graph_of(dataclasses.replace(TINY, compute_dtype="bfloat16")), params)
    exact, rounded = gato.target_logits(batch), low.target_logits(batch)
    assert rounded.dtype == np.float32 and low.hidden(batch).dtype == jnp.bfloat16
    scale = np.abs(exact).max()
    assert 0 < np.abs(exact - rounded).max() / scale < 0.03


def test_without_positions_order_is_not_seen(batch):
    """In one layer without positions, what came before the last token is a set."""
    config = dataclasses.replace(TINY, depth=1, sequence_positions="none", local_positions=False)
    order = np.concatenate([np.random.default_rng(0).permutation(29), [29]])
    shuffled = batch._replace(
        **{k: getattr(batch, k)[:, order] for k in ("ids", "local", "patch", "rows", "cols")}
    )
    last = lambda c: [  # noqa: E731
        np.asarray(Gato(c, rngs=nnx.Rngs(0)).hidden(b)[:, -1]) for b in (batch, shuffled)
    ]
    np.testing.assert_allclose(*last(config), atol=1e-6)
    for change in ({"sequence_positions": "sinusoidal"}, {"sequence_positions": "relative"}):
        a, b = last(dataclasses.replace(config, **change))
        assert np.abs(a - b).max() > 1e-4


def test_counts_of_other_readings_by_hand():
    """A layer: 4 D^2 attention, D^2 distances, and 3 D M / 2, 3 D M or 2 D M feed-forward."""
    d, m, n = 32, 64, 2
    layer = 4 * d * d + 3 * d + d + d * d + 2 * d  # with biases, and u and v
    norms = 4 * d
    rest = count_parameters(TINY) - n * (layer + norms + 3 * d * m // 2 + m + d)
    for kind, parameters in {
        "geglu": 3 * d * m // 2 + m + d,
        "geglu_full": 3 * d * m + 2 * m + d,
        "gelu": 2 * d * m + m + d,
    }.items():
        config = dataclasses.replace(TINY, feed_forward=kind)
        assert count_parameters(config) == rest + n * (layer + norms + parameters), kind
    base = count_parameters(TINY)
    count = lambda **c: count_parameters(dataclasses.replace(TINY, **c))  # noqa: E731
    assert count(tied=False) == base + 2049 * d
    assert count(sequence_positions="none") == base - n * (d * d + 2 * d)
    assert count(sequence_positions="sinusoidal") == count(sequence_positions="none")
    assert count(local_positions=False) == base - 513 * d
    assert count(discrete_range="own") == base + 1024 * d
    # Table 257, patch: root 3*9*64, two 64*9*64 and one 64*64 convolutions, biases, norms, Linear.
    residual = 27 * 64 + 2 * 576 * 64 + 64 * 64 + 4 * 64 + 4 * 64 + 256 * d + d
    assert count(patch_embedder="linear") == base - residual + 768 * d + d


def test_the_patch_embedder_is_the_same_at_every_size():
    """But for its output width, which is the network's."""
    shapes = []
    for size in ("79M", "364M", "1.18B"):
        config = MODEL_SIZES[size]
        shell = nnx.eval_shape(lambda c=config: Gato(c, rngs=nnx.Rngs(0)))
        patch = nnx.to_pure_dict(nnx.state(shell.embedding.patch, nnx.Param))
        project = patch.pop("project")
        assert project["kernel"].shape == (256, config.width)
        shapes.append(jax.tree.map(lambda x: x.shape, patch))
    assert shapes[0] == shapes[1] == shapes[2]


def test_patches_are_scaled_by_hand():
    """2.1: 0 and 255 become -1/4 and 1/4: [-1, 1] over the square root of 16."""
    patches = np.zeros((2, 16, 16, 3), np.uint8)
    patches[1] = 255
    scaled = scale_pixels(patches)
    assert scaled[0].min() == scaled[0].max() == -0.25
    assert scaled[1].min() == scaled[1].max() == 0.25


def test_attention_equals_the_formula_written_out(gato):
    """score(i, j) = (q_i + u) k_j + (q_i + w) W R(i - j), one pair at a time, j <= i."""
    attention = nnx.clone(gato.transformer.layers()[0].attention)
    for seed, name in enumerate(("content_bias", "distance_bias")):
        setattr(attention, name, nnx.Param(jax.random.normal(jax.random.key(seed), (2, 16))))
    t = 5
    x = jax.random.normal(jax.random.key(2), (1, t, 32))
    q, k, v = np.asarray(attention.qkv(x[0])).reshape(t, 3, 2, 16).transpose(1, 0, 2, 3)
    u, w = np.asarray(attention.content_bias[...]), np.asarray(attention.distance_bias[...])
    frequency = 10_000.0 ** (-np.arange(0, 32, 2) / 32)
    y = np.zeros((t, 2, 16))
    for head in range(2):
        for i in range(t):
            scores = []
            for j in range(i + 1):
                angle = (i - j) * frequency
                r = np.concatenate([np.sin(angle), np.cos(angle)])
                r = np.asarray(attention.relative(jnp.asarray(r, jnp.float32)[None]))
                r = r.reshape(2, 16)[head]
                content = (q[i, head] + u[head]) @ k[j, head]
                scores.append((content + (q[i, head] + w[head]) @ r) / 4.0)
            p = np.exp(scores) / np.exp(scores).sum()
            y[i, head] = sum(p[j] * v[j, head] for j in range(i + 1))
    expected = attention.out(jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(attention(x)[0], expected, atol=1e-5)


def test_table_rows():
    ids = np.array([0, 999, 32000, 33023, 33024])
    assert table_row(ids, TINY).tolist() == [0, 999, 1024, 2047, 2048]
    assert num_rows(TINY) == 2049
    paper = MODEL_SIZES["79M"]
    assert table_row(ids, paper).tolist() == ids.tolist() and num_rows(paper) == tk.VOCABULARY
    own = dataclasses.replace(TINY, discrete_range="own")
    assert table_row(np.array([33025, 34048]), own).tolist() == [2049, 3072]
    assert num_rows(own) == 3073


def test_ordinal_rows_start_like_their_neighbours():
    rows = value_features(64)
    near = np.sum(rows[500] * rows[501]) / np.sum(rows[500] ** 2)
    far = np.sum(rows[500] * rows[800]) / np.sum(rows[500] ** 2)
    assert near > 0.95 and abs(far) < 0.5
    model = Gato(dataclasses.replace(TINY, value_rows="ordinal"), rngs=nnx.Rngs(0))
    table = np.asarray(model.embedding.table[...])
    np.testing.assert_allclose(table[1024:2048], value_features(32), rtol=1e-6)
    assert abs(table[:1024].std() / table[1024:2048].std() - 1) < 0.05


def test_cross_entropy():
    logits = jnp.zeros((2, 2049))
    ids = np.array([5, 32100])
    for sigma in (0.0, 3.0):  # uniform logits cost log V whatever the target's shape
        np.testing.assert_allclose(cross_entropy(logits, ids, TINY, sigma), np.log(2049), rtol=1e-5)
    peaked = logits.at[1, 1024 + 100].set(20.0).at[0, 5].set(20.0)
    hard, soft = (np.asarray(cross_entropy(peaked, ids, TINY, s)) for s in (0.0, 3.0))
    assert hard.max() < 0.01
    assert soft[0] < 0.01 and soft[1] > 10  # a text target stays one-hot; a value's is spread


def test_soft_targets_by_hand():
    # sigma = 1 around bin 0: weights exp(0), exp(-1/2), exp(-2), ... cut off below bin 0.
    logits = jax.random.normal(jax.random.key(0), (1, 2049))
    log_p = np.asarray(jax.nn.log_softmax(logits))[0, 1024:]
    weights = np.exp(-0.5 * np.arange(20) ** 2)
    expected = -(weights * log_p[:20]).sum() / weights.sum()
    np.testing.assert_allclose(
        cross_entropy(logits, np.array([32000]), TINY, 1.0)[0], expected, rtol=1e-5
    )


def test_gradients_reach_every_parameter(batch):
    state = initial_state(TINY, _train_config())
    graph = graph_of(TINY)
    grads = jax.jit(jax.grad(lambda p: masked_loss(merge(graph, p), batch)))(state["params"])
    silent = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree.leaves_with_path(grads)
        if not np.any(np.asarray(g))
    ]
    assert silent == []


def _train_config():
    from gato_lib.config import TrainConfig

    return TrainConfig(steps=10, warmup_steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_rows": "sorted"}, "value_rows is 'sorted'"),
        ({"text_rows": 10}, "text_rows is 10"),
        ({"depht": 3}, r"unknown key \['depht'\]"),
        ({"stochastic_depth": 1.0}, "stochastic_depth"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        model_config("79M", **changes)
    with pytest.raises(ConfigError, match="unknown model size '80M'"):
        model_config("80M")
