"""Fine-tuning: other tasks, given parameters, told what an episode reached (paper 5.2, 5.3)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from gato_lib import collection, domains, workbook
from gato_lib.checkpoint import read_meta
from gato_lib.config import FINE_TUNING, ConfigError, DataConfig, TrainConfig, model_config
from gato_lib.evaluation import Evaluation
from gato_lib.mixture import Mixture
from gato_lib.sequence import ACTION, RETURN, Tokenizer
from gato_lib.tokenizers import TextTokenizer, encode_continuous
from gato_lib.training import initial_state, train
from gato_lib.workbook import Run

SEEN, HELD = "rgb_stacking_state/red-on-blue", "rgb_stacking_state/blue-on-green-1"
DATA = DataConfig(
    tasks=(SEEN,),
    episodes=(("rgb_stacking_state", 3),),
    context_length=64,
    batch_tokens=128,
    prompt_fraction=0.0,
    validation_fraction=0.34,
    vocabulary_size=1024,
)
SMALL = model_config("w64d2", text_rows=1024, stochastic_depth=0.0)
FIT = TrainConfig(steps=3, peak_lr=1e-3, warmup_steps=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"), "smoke")


@pytest.fixture(scope="module")
def pretrained(run):
    return workbook.train_agent(run, "pretrained", SMALL, FIT, workbook.prepare(run, DATA))[0]


@pytest.fixture(scope="module")
def told(run, pretrained):
    """An episode that succeeds and one under so much noise that it does not."""
    data = dataclasses.replace(
        DATA,
        tasks=(HELD,),
        episodes=(("rgb_stacking_state", 2),),
        noise=(0.0, 2.0),
        tell_return=("rgb_stacking_state",),
        validation_fraction=0.0,
    )
    pieces = TextTokenizer(pretrained / "text.model")
    return data, workbook.prepare(run, data, pieces, held_out=True)


def test_held_out_tasks_are_for_fine_tuning_only(run):
    assert HELD in domains.HELD_OUT and SEEN not in domains.HELD_OUT
    data = dataclasses.replace(DATA, tasks=(HELD,))
    for refuse in (workbook.collections, workbook.collect, workbook.prepare):
        with pytest.raises(ConfigError, match="never enter pretraining"):
            refuse(run, data)
    assert workbook.collections(run, data, held_out=True)[0].task == HELD


def test_failures_are_kept_and_told_apart(run, told):
    data, prepared = told
    (item,) = workbook.collections(run, data, held_out=True)
    episodes, card = collection.load(item)
    assert [e.success for e in episodes] == [True, False] and card["kept"] == 2
    filtered = dataclasses.replace(data, tell_return=())
    (other,) = workbook.collections(run, filtered, held_out=True)
    assert other.folder != item.folder and not other.failures

    env = domains.make_env(HELD)
    plain = Tokenizer(env.observation_space, env.action_space)
    telling = dataclasses.replace(plain, tell_return=True)
    assert RETURN not in env.observation_space.spaces
    group = prepared.mixture.groups[0]
    begin = 0
    for episode, share in zip(episodes, (1.0, 0.0), strict=True):
        without, seq = plain.episode(episode), telling.episode(episode, share)
        end = begin + seq.offsets[-1]
        np.testing.assert_array_equal(group.seq.ids[begin:end], seq.ids)
        begin = end
        # One token more a step, behind all other observations, before the separator.
        assert (np.diff(seq.offsets) == np.diff(without.offsets) + 1).all()
        place = seq.offsets[1:] - 2 - env.action_space.shape[0]
        assert set(seq.ids[place]) == {int(encode_continuous(np.array([share]), companded=True)[0])}
        rest = np.delete(np.arange(len(seq)), place)
        np.testing.assert_array_equal(seq.ids[rest], without.ids)
        np.testing.assert_array_equal(seq.local[rest], without.local)
        assert (seq.kinds[rest] == ACTION).sum() == 5 * episode.steps
    observation = env.reset(seed=0)[0]
    asked = telling.steps([observation], np.zeros((1, 5), np.int32))
    best = int(encode_continuous(np.array([1.0]), companded=True)[0])
    assert asked.ids[asked.offsets[1] - 7] == best, "while acting it asks for the best"
    env.close()


def test_training_starts_from_the_parameters_it_is_given(run, told, pretrained):
    _, prepared = told
    start = workbook.load_agent(pretrained).params
    still = dataclasses.replace(FINE_TUNING, steps=1, peak_lr=1e-12)
    ((_, params),) = train(SMALL, still, prepared.mixture, params=start)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    fresh = initial_state(SMALL, still)["params"]
    assert any(
        not np.allclose(a, b)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(fresh), strict=True)
    )
    larger = model_config("w128d4", text_rows=1024)
    with pytest.raises(ValueError, match="another network's: .* differ"):
        next(train(larger, still, prepared.mixture, params=start))


@pytest.mark.slow
def test_a_fine_tuned_agent_is_named_after_its_start_and_plays_what_it_learned(
    run, told, pretrained, monkeypatch
):
    _, prepared = told
    tune = dataclasses.replace(FINE_TUNING, steps=2)
    tuned, metrics = workbook.train_agent(run, "tuned", SMALL, tune, prepared, start=pretrained)
    scratch, _ = workbook.train_agent(run, "tuned", SMALL, tune, prepared)
    assert tuned != scratch and read_meta(tuned)["start"] == pretrained.name
    assert "start" not in read_meta(scratch)
    again, same = workbook.train_agent(run, "tuned", SMALL, tune, prepared, start=pretrained)
    assert again == tuned and same.step.tolist() == metrics.step.tolist()

    monkeypatch.setattr(domains.rgb_stacking, "MAX_STEPS", 5)
    choices = {"lanes": 2, "prompt": "none", "continuous": "mean"}
    assert set(workbook.play(run, tuned, 2, 0, **choices).task) == {HELD}
    both = workbook.play(run, tuned, 1, 0, tasks=(SEEN, HELD), **choices)
    assert sorted(both.task) == [HELD, SEEN] and (both.steps == 5).all()
    agent = workbook.load_agent(tuned, continuous="mean")
    assert agent.for_domain("rgb_stacking_state").tell_return
    assert not agent.for_domain("babyai").tell_return

    evaluation = Evaluation(lambda: agent, 0)
    path = run.root / "one"
    played = workbook.play_all(evaluation, (HELD,), 2, path, lanes=2, workers=1, code=("agent.py",))
    assert played.task.tolist() == [HELD] * 2
    (kept,) = run.root.glob("one-lanes_2-*.csv")
    assert kept.read_text().count("\n") == 3


def test_simulated_demonstrations_are_a_share_of_the_mix(run, told, pretrained):
    """The fine-tuning mix of 5.3: domains by weight."""
    data, prepared = told
    mixed = dataclasses.replace(
        data,
        tasks=(HELD, "rgb_stacking_state/red-on-blue"),
        episodes=(("rgb_stacking_state", 2),),
        tell_return=(),
        noise=(0.0,),
    )
    pieces = TextTokenizer(pretrained / "text.model")
    (group,) = workbook.prepare(run, mixed, pieces, held_out=True).mixture.groups
    assert set(group.tasks) == set(mixed.tasks)
    other = dataclasses.replace(prepared.mixture.groups[0], name="other")
    weights = (("other", 0.1), ("rgb_stacking_state", 0.9))
    mixture = Mixture([group, other], dataclasses.replace(mixed, weights=weights))
    drawn = [mixture[i].domain for i in range(100)]
    assert drawn.count("other") == pytest.approx(10, abs=1)
