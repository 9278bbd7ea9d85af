"""Every implementation of attention is the same function, and that function is the formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gato_lib import attention, distributed
from gato_lib.attention import attend, relative_features, relative_shift, sinusoids
from gato_lib.config import ConfigError


def inputs(t: int, h: int = 16, relative: bool = True):
    """q, q_distance, k, v of (2, t, 3, h), and r of (t, 3, h)."""
    keys = jax.random.split(jax.random.key(t), 5)
    four = [jax.random.normal(k, (2, t, 3, h)) for k in keys[:4]]
    return *four, jax.random.normal(keys[4], (t, 3, h)) if relative else None


def test_relative_shift_by_hand():
    # Column m of the input scores distance S - 1 - m; entry [i, j] must score distance i - j.
    t = 4
    by_distance = jnp.broadcast_to(jnp.arange(t - 1, -1, -1.0), (1, 1, t, t))
    shifted = np.asarray(relative_shift(by_distance))[0, 0]
    expected = [[0, None, None, None], [1, 0, None, None], [2, 1, 0, None], [3, 2, 1, 0]]
    for i in range(t):
        for j in range(i + 1):
            assert shifted[i, j] == expected[i][j]
    # The last two rows alone, as a block of queries sees them.
    last = np.asarray(relative_shift(by_distance[:, :, 2:]))[0, 0]
    assert last[0, :3].tolist() == [2, 1, 0] and last[1].tolist() == [3, 2, 1, 0]


def test_sinusoids_by_hand():
    assert relative_features(4, 8)[3].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # distance 0
    np.testing.assert_allclose(
        sinusoids(np.array([3]), 4)[0], [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)], 1e-6
    )
    np.testing.assert_array_equal(relative_features(7, 6)[::-1], sinusoids(np.arange(7), 6))


@pytest.mark.parametrize("relative", [True, False])
def test_plain_attention_is_the_formula(relative):
    """score(i, j) = (q_i k_j + q'_i r_{i-j}) / sqrt(H), one pair at a time, j <= i."""
    q, q_distance, k, v, r = inputs(6, relative=relative)
    y = attend(q, q_distance, k, v, r, "plain")
    for i in range(6):
        for head in range(3):
            scores = []
            for j in range(i + 1):
                score = q[1, i, head] @ k[1, j, head]
                if relative:  # row m of r is distance T - 1 - m
                    score += q_distance[1, i, head] @ r[5 - (i - j), head]
                scores.append(float(score) / 4.0)
            p = np.exp(scores) / np.exp(scores).sum()
            expected = sum(p[j] * np.asarray(v[1, j, head]) for j in range(i + 1))
            np.testing.assert_allclose(y[1, i, head], expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["blocked", "dot_product", "auto"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    "t", [1, 127, 128, 300]
)  # one block, its edges, and a last one that is short
def test_implementations_are_one_function(implementation, relative, t):
    arguments = inputs(t, relative=relative)
    loss = lambda how: lambda *a: jnp.sin(attend(*a, how)).sum()  # noqa: E731
    np.testing.assert_allclose(
        attend(*arguments, implementation), attend(*arguments, "plain"), atol=2e-6
    )
    which = range(5 if relative else 4)
    wanted = jax.jit(jax.grad(loss("plain"), which))(*arguments)
    got = jax.jit(jax.grad(loss(implementation), which))(*arguments)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_blocks_leave_the_future_out():
    """Keys after a block of queries are not even computed with: NaN there changes nothing."""
    q, q_distance, k, v, r = inputs(300)
    y = attend(q, q_distance, k, v, r, "blocked")
    broken = attend(
        q, q_distance, k.at[:, 256:].set(np.nan), v.at[:, 256:].set(np.nan), r, "blocked"
    )
    np.testing.assert_array_equal(y[:, :256], broken[:, :256])
    assert np.isnan(broken[:, 256:]).all()


@pytest.mark.parametrize(("t", "h"), [(200, 32), (128, 128)])  # 79M's head_dim and the others'
def test_the_tpu_kernel_in_interpret_mode(t, h):
    from jax.experimental.pallas import tpu as pltpu

    arguments = inputs(t, h)
    with pltpu.force_tpu_interpret_mode():
        flash = attention._flash(*arguments, "tpu")
    np.testing.assert_allclose(flash, attend(*arguments, "plain"), atol=5e-6)
    segments = jnp.asarray(np.arange(t)[None].repeat(2, 0) // 70, jnp.int32)
    with pltpu.force_tpu_interpret_mode():
        flash = attention._flash(*arguments, "tpu", segments)
    expected = attend(*arguments, "plain", segments)
    np.testing.assert_allclose(flash, expected, atol=5e-6)
    assert not np.allclose(expected, attend(*arguments, "plain"))


def test_the_tpu_kernel_on_each_of_several_devices():
    """XLA cannot split it: every device is given its own sequences and heads."""
    from jax.experimental.pallas import tpu as pltpu

    keys = jax.random.split(jax.random.key(0), 5)
    arguments = [jax.random.normal(k, (4, 128, 2, 32)) for k in keys[:4]]
    arguments.append(jax.random.normal(keys[4], (128, 2, 32)))
    segments = jnp.asarray(np.arange(128)[None].repeat(4, 0) // 50, jnp.int32)
    for packed in (None, segments):
        with jax.set_mesh(distributed.make_mesh(2, 2, 2)), pltpu.force_tpu_interpret_mode():
            flash = jax.jit(lambda *a, s=packed: attention._flash(*a, "tpu", s))(*arguments)
        assert len(flash.sharding.device_set) == 8
        np.testing.assert_allclose(flash, attend(*arguments, "plain", packed), atol=5e-6)


@pytest.mark.slow
def test_gradients_of_the_tpu_kernel_in_interpret_mode():
    from jax.experimental.pallas import tpu as pltpu

    arguments = inputs(200, 32)
    which = range(5)
    wanted = jax.grad(lambda *a: jnp.sin(attend(*a, "plain")).sum(), which)(*arguments)
    with pltpu.force_tpu_interpret_mode():
        kernel = lambda *a: jnp.sin(attention._flash(*a, "tpu")).sum()  # noqa: E731
        got = jax.grad(kernel, which)(*arguments)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_what_an_implementation_cannot_run_on_is_said():
    arguments = inputs(4)
    with pytest.raises(ConfigError, match="'flash' needs a GPU or TPU, this is a cpu"):
        attend(*arguments, "flash")
    with pytest.raises(ConfigError, match="'flash' on a GPU needs compute_dtype 'bfloat16'"):
        attention._flash(*arguments, "gpu")
    with pytest.raises(ConfigError, match="unknown attention 'fast'"):
        attend(*arguments, "fast")
