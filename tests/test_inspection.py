"""Hidden states and attention: what is shown is what the network computes."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from gato_lib import domains, inspection
from gato_lib.config import MODEL_SIZES
from gato_lib.episodes import Document
from gato_lib.model import Gato
from gato_lib.sequence import Tokenizer, document_tokens, make_batch
from gato_lib.tokenizers import TextTokenizer

SMALL = dataclasses.replace(
    MODEL_SIZES["w64d2"], text_rows=32_000, stochastic_depth=0.1, dropout=0.1
)


@pytest.fixture(scope="module")
def tokens(demonstrations):
    """An episode of BabyAI and one of Meta-World."""
    sequences = []
    for task, (episode, _) in demonstrations.items():
        env = domains.make_env(task)
        tokenizer = Tokenizer(env.observation_space, env.action_space, TextTokenizer())
        sequences.append(tokenizer.episode(episode))
        env.close()
    return sequences


@pytest.fixture(scope="module")
def window(tokens):
    """Two whole steps of BabyAI, with images, words and actions, in two rows of unequal length."""
    seq = tokens[0]
    one, two = int(seq.offsets[1]), int(seq.offsets[2])
    return make_batch(seq, [[(0, two)], [(0, one)]], two, two, len(seq.patches)), one, two


def changed(config, seed: int):
    """Parameters far from those at the start, where biases are 0 and attention is nearly flat."""
    params = inspection.random_params(config, seed)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)


@pytest.mark.parametrize("positions", ["relative", "sinusoidal", "none"])
def test_the_scores_are_those_that_the_network_attends_by(positions, window):
    config = dataclasses.replace(SMALL, sequence_positions=positions)
    params, (batch, _, _) = changed(config, 1), window
    inside = inspection.look_inside(config, params, batch)
    model = nnx.merge(nnx.split(Gato(config, rngs=nnx.Rngs(0)), nnx.Param)[0], nnx.State(params))
    layers = model.transformer.layers()
    for layer, block in enumerate(layers):
        x = block.norm1(inside.hidden[layer])
        values = block.attention._project(x)[3]
        found = np.einsum("BNTS,BSNH->BTNH", inside.weights[layer], values)
        found = block.attention._merge(found)
        np.testing.assert_allclose(found, block.attention(x), atol=2e-4)
    last = model.transformer.norm(inside.hidden[-1])
    np.testing.assert_allclose(last, model.hidden(batch), atol=2e-4)
    assert inside.hidden.shape[0] == len(layers) + 1 == len(inside.scores) + 1


def test_nobody_attends_to_what_comes_later_and_shares_add_up(window):
    batch, _, two = window
    inside = inspection.look_inside(SMALL, changed(SMALL, 2), batch)
    weights = inside.weights
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)
    assert (np.triu(np.ones((two, two)), 1) * weights == 0).all()
    assert np.isneginf(inside.scores[..., 0, 1:]).all()


def test_what_follows_a_window_changes_nothing_inside(window):
    batch, one, _ = window
    inside = inspection.look_inside(SMALL, changed(SMALL, 3), batch)
    long, short = inside.hidden[:, 0, :one], inside.hidden[:, 1, :one]
    np.testing.assert_allclose(long, short, atol=1e-4)


def test_attention_within_a_step_by_hand():
    inf = np.inf
    scores = np.array(  # token 0 is of another step
        [
            [9.0, -inf, -inf, -inf],
            [9.0, 5.0, -inf, -inf],
            [9.0, np.log(3.0), 7.0, -inf],
            [9.0, np.log(3.0), 0.0, 8.0],
        ]
    )
    # Token 2 sees token 1 alone; token 3 sees 1 and 2, three to one.
    assert inspection.step_attention(scores, 1, 4) == pytest.approx([(1 + 0.75) / 2, 0.25, 0.0])
    many = np.broadcast_to(scores, (2, 3, 4, 4))
    assert inspection.step_attention(many, 0, 4).shape == (2, 3, 4)
    for first, last in ((3, 4), (-1, 2), (2, 5), (3, 1)):
        with pytest.raises(ValueError, match="expected two or more"):
            inspection.step_attention(scores, first, last)


def test_a_network_that_nobody_trained_depends_on_its_seed_alone():
    one, again, other = (inspection.random_params(SMALL, seed) for seed in (0, 0, 1))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), one, again)
    assert all(jax.tree.leaves(same))
    assert (one["embedding"]["table"] != other["embedding"]["table"]).any()


def test_packed_windows_are_refused(window):
    batch, _, two = window
    packed = batch._replace(segments=np.zeros((2, two), np.int32))
    with pytest.raises(ValueError, match="several windows a row"):
        inspection.look_inside(SMALL, inspection.random_params(SMALL), packed)


@pytest.mark.parametrize("parallel", [False, True])
def test_means_are_those_of_the_hidden_states_of_whole_steps(parallel, tokens):
    babyai, metaworld = tokens
    params, step = changed(SMALL, 4), 44  # tokens of a timestep of Meta-World
    one, two, three = babyai.offsets[1:4].tolist()
    windows = [(babyai, one, three), (metaworld, 0, 100), (babyai, 0, 1), (metaworld, 88, 130)]
    cuts = [[one, two, three], [0, 44, 88, 100], [0, 1], [88, 130]]
    found = inspection.mean_hidden(SMALL, params, windows, step + 1, parallel, rows=4)
    assert found.shape == (3, 4, 64) and max(two - one, three - two) <= step + 1 < three - one
    for number, ((seq, *_), ends) in enumerate(zip(windows, cuts, strict=True)):
        states = []
        for first, last in itertools.pairwise(ends):
            batch = make_batch(
                seq, [[(first, last)]], last - first, 50, len(seq.patches), parallel=parallel
            )
            states.append(inspection.look_inside(SMALL, params, batch).hidden[:, 0])
        expected = np.concatenate(states, axis=1).mean(axis=1)
        np.testing.assert_allclose(found[:, number], expected, atol=1e-4)


def test_a_document_is_read_in_pieces_of_any_tokens():
    text, params = TextTokenizer(), changed(SMALL, 5)
    seq = document_tokens(Document(("one two three four five six seven eight nine ten",)), text)
    half = len(seq) // 2
    whole = inspection.mean_hidden(SMALL, params, [(seq, 0, 2 * half)], half)
    parts = inspection.mean_hidden(SMALL, params, [(seq, 0, half), (seq, half, 2 * half)], half)
    np.testing.assert_allclose(whole[:, 0], parts.mean(axis=1), atol=1e-5)


def test_windows_that_are_none_are_refused(tokens):
    babyai, params = tokens[0], inspection.random_params(SMALL)
    for first, last in ((4, 4), (-1, 3), (0, len(babyai) + 1), (5, 40)):
        with pytest.raises(ValueError, match="window 1 is"):
            windows = [(babyai, 0, 20), (babyai, first, last)]
            inspection.mean_hidden(SMALL, params, windows, 45)
    with pytest.raises(ValueError, match="window 0: a timestep is longer than 10 tokens"):
        inspection.mean_hidden(SMALL, params, [(babyai, 0, 60)], 10)
