"""What a step of acting must compute and move, counted by hand, and how it is timed."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gato_lib import latency
from gato_lib.agent import Agent
from gato_lib.config import ModelConfig
from gato_lib.model import Gato
from gato_lib.sequence import Tokenizer
from gato_lib.training import abstract_batch, graph_of, merge

TINY = ModelConfig(2, 2, 8, 16, 4, text_rows=1024, patch_embedder="linear")
STEP = {"context": 20, "observations": 3, "actions": 2}  # 6 tokens, 3 steps: 18 in the window


# --- counted --------------------------------------------------------------------------------------


def test_cost_by_hand():
    """A layer has 448 weights in matrices, 8 x 24 and four of 8 x 8, without that of distances."""
    attention = 12 + 13 + 14 + 15 + 16 + 17  # tokens that each of the six tokens meets
    one = {
        "weights": 2 * 6 * 2 * 448,
        "attention": 2 * 2 * 8 * 3 * attention,
        "head": 2 * 2 * 8 * 1024,
    }
    # Biases: 24 and four of 8; two norms and two biases of attention, 16 each; and the last norm.
    parameters = 2 * (448 + 24 + 4 * 8 + 2 * 16 + 16) + 16
    for rows in (1, 3):
        cost = latency.step_cost(TINY, **STEP, rows=rows)
        assert cost["operations"] == rows * sum(one.values())
        # Two passes, over the keys of 16 and of 17 tokens.
        cache = 2 * 8 * (2 * rows + 1) * (16 + 17)
        assert cost["bytes"] == 4 * (2 * parameters + cache + 2 * 8 * 1024)
        together = latency.step_cost(TINY, **STEP, rows=rows, parallel=True)
        assert together["operations"] == cost["operations"], "as many tokens, in fewer passes"
        cache = 2 * 8 * (2 * rows + 1) * 17
        assert together["bytes"] == 4 * (parameters + cache + 2 * 8 * 1024)


def test_cost_of_other_settings():
    base = latency.step_cost(TINY, **STEP)
    half = latency.step_cost(dataclasses.replace(TINY, compute_dtype="bfloat16"), **STEP)
    assert half == {"operations": base["operations"], "bytes": base["bytes"] / 2}
    plain = latency.step_cost(dataclasses.replace(TINY, sequence_positions="none"), **STEP)
    assert base["operations"] - plain["operations"] == 2 * 2 * 8 * 87
    distances = 2 * 8 * (16 + 17) + 2 * 2 * 16  # and the biases u and v, in both passes
    assert base["bytes"] - plain["bytes"] == 4 * distances
    seen = latency.step_cost(TINY, **STEP, patches=2)
    assert seen["operations"] - base["operations"] == 2 * 2 * 768 * 8
    assert latency.step_cost(TINY, **STEP | {"context": 23}) == base, "whole steps only"
    with pytest.raises(ValueError, match="a timestep has 6 tokens, the context 5"):
        latency.step_cost(TINY, **STEP | {"context": 5})


def test_operations_agree_with_the_compiler():
    """One pass of 64 tokens over a cache of 512; XLA also counts what is no product."""
    config = ModelConfig(2, 2, 128, 512, 64, text_rows=1024, patch_embedder="linear")
    graph = graph_of(config)

    def one_pass(params, batch, cache):
        model = merge(graph, params)
        hidden, cache = model.extend(batch, cache, jnp.full(1, 64, jnp.int32))
        return model.embedding.logits(hidden[:, -1], slice(1024, 2048)), cache

    params = jax.eval_shape(
        lambda: nnx.to_pure_dict(nnx.split(Gato(config, rngs=nnx.Rngs(0)), nnx.Param)[1])
    )
    cache = jax.eval_shape(lambda p: merge(graph, p).transformer.empty_cache(1, 512), params)
    program = jax.jit(one_pass).lower(params, abstract_batch(1, 64, 1), cache).compile()
    cost = latency.step_cost(config, context=512, observations=62, actions=1)
    assert 1 < program.cost_analysis()["flops"] / cost["operations"] < 1.1


def test_bound():
    rates = latency.Rates(operations=100.0, bytes=10.0)
    assert rates.bound({"operations": 300.0, "bytes": 10.0}) == 3.0
    assert rates.bound({"operations": 300.0, "bytes": 50.0}) == 5.0
    measured = latency.machine_rates(megabytes=1)
    assert measured.operations > 1e8 and measured.bytes > 1e7


# --- measured -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "windows", "again"),
    [
        ({}, [6, 12, 18, 24, 12, 18, 24, 12], [4, 7]),
        ({"keep": 1.0, "rows": 2}, [6, 12, 18, 24, 24, 24, 24, 24], [4, 5, 6, 7]),
        ({"keep": 0.2}, [6, 12, 18, 24, 6, 12, 18, 24], []),
        ({"memory": 38, "parallel": True}, [6, 12, 18, 24, 30, 36, 36, 36], []),
    ],
)
def test_what_is_timed(settings, windows, again):
    timing = latency.measure(TINY, **STEP | {"context": 26}, steps=8, **settings)
    assert timing.tokens.tolist() == windows
    assert np.flatnonzero(timing.again).tolist() == again
    assert (timing.seconds > 0).all() and timing.mean == timing.seconds.mean()


def test_a_full_window_is_the_median_of_nearly_full_ones():
    timing = latency.Timing(
        seconds=np.array([1.0, 2.0, 4.0, 8.0, 100.0, 16.0]),
        tokens=np.array([6, 12, 18, 24, 18, 24]),
        again=np.array([0, 0, 0, 0, 1, 0], bool),
        step=6,
        span=26,
    )
    assert timing.full == 8.0  # of 4, 8 and 16
    with pytest.raises(ValueError, match="2 steps, none in a window of 26 tokens"):
        _ = timing._replace(
            seconds=timing.seconds[:2], tokens=timing.tokens[:2], again=timing.again[:2]
        ).full


def test_what_cannot_be_timed_is_refused():
    for wrong in ({"context": 5}, {"memory": 5}, {"rows": 0}, {"actions": 0}):
        with pytest.raises(ValueError, match="expected at least one of each"):
            latency.measure(TINY, **STEP | {"steps": 3} | wrong)


def test_without_a_cache_every_token_is_a_pass(monkeypatch):
    calls = []
    monkeypatch.setattr(latency, "_best", lambda call, repeats: calls.append(call()) or 0.5)
    assert latency.measure_uncached(TINY, context=20, actions=3, rows=2) == 1.5
    assert latency.measure_uncached(TINY, context=20, actions=3, parallel=True) == 0.5
    assert [x.shape for x in calls] == [(2, 2049), (1, 2049)]  # one position of each row


@pytest.mark.parametrize("parallel", [False, True])
def test_one_pass_over_the_window_gives_what_the_player_said(parallel):
    box = gym.spaces.Box
    params = jax.tree.map(lambda x: x + 0.1, latency._parameters(TINY))
    agent = Agent(TINY, params, None, 26, None, {"here"} if parallel else ()).for_domain("here")
    player = agent.player(
        Tokenizer(box(-1, 1, (3,), np.float32), box(-1, 1, (2,), np.float32)), [0, 1]
    )
    for t in range(6):
        player.act(np.full((2, 3), t / 10, np.float32))
        for row in (0, 1):
            np.testing.assert_allclose(player.log_p[row], latency.full_pass(player, row), atol=1e-4)
