"""A specialist sees the batches that the generalist saw of its domain (paper 5.5)."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gato_lib import workbook
from gato_lib.config import ConfigError, DataConfig, TrainConfig, model_config
from gato_lib.sequence import count_tokens
from gato_lib.workbook import Run, TrainedOn

DATA = DataConfig(
    tasks=workbook.SMALL_TASKS,
    episodes=(("babyai", 4), ("metaworld", 2)),
    documents=("captions/scenes_small 40", "text/chitchat 20"),
    weights=(("babyai", 0.4), ("captions", 0.15), ("metaworld", 0.35), ("text", 0.1)),
    context_length=56,
    document_length=112,
    batch_tokens=280,
    prompt_fraction=0.5,
    validation_fraction=0.5,
    vocabulary_size=1024,
    parallel_actions=("metaworld",),
)
FIT = TrainConfig(steps=50, warmup_steps=20, seed=3)
TRAINED = TrainedOn(DATA, FIT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"), "smoke")


@pytest.fixture(scope="module")
def generalist(run):
    return workbook.prepare(run, DATA)


def test_settings_of_a_specialist():
    made = workbook.specialist(TRAINED, "babyai", 30)
    assert made.tasks == ("babyai/GoToObj",) and made.steps == 30
    assert made.data.documents == made.data.weights == made.data.parallel_actions == ()
    assert made.train == dataclasses.replace(FIT, steps=30, warmup_steps=15)
    assert workbook.specialist(TRAINED, "metaworld", 80).train.warmup_steps == 20
    assert workbook.specialist(TRAINED, "metaworld", 80).data.parallel_actions == ("metaworld",)
    with pytest.raises(ConfigError, match="'atari': the generalist was trained on"):
        workbook.specialist(TRAINED, "atari", 30)
    with pytest.raises(ConfigError, match="'captions'"):
        workbook.specialist(TRAINED, "captions", 30)  # there is nothing to play


def test_updates_are_counted_as_the_mixture_draws_them(generalist):
    groups = [g.name for g in generalist.mixture.groups]
    assert workbook.mixture_domains(DATA) == groups == ["babyai", "metaworld", "captions", "text"]
    batches = generalist.mixture.dataset(FIT.seed)
    drawn = [batches[i].domain for i in range(FIT.steps)]
    assert workbook.updates_by_domain(TRAINED) == {name: drawn.count(name) for name in groups}
    even = dataclasses.replace(DATA, weights=(), documents=())
    counts = workbook.updates_by_domain(TrainedOn(even, FIT))
    assert counts == {"babyai": 25, "metaworld": 25}


@pytest.mark.parametrize("domain", ["babyai", "metaworld"])
def test_a_specialist_sees_the_generalists_batches(run, generalist, domain):
    made = workbook.specialist(TRAINED, domain, 8)
    prepared = workbook.prepare(run, made.data, generalist.text)
    general = iter(generalist.mixture.iterate(FIT.seed))
    of_domain = (s for s in general if s.domain == domain)
    own = prepared.mixture.dataset(FIT.seed)
    total = 0
    for i, theirs in enumerate(itertools.islice(of_domain, 8)):
        ours = own[i]
        jax.tree.map(np.testing.assert_array_equal, ours.batch, theirs.batch)
        assert ours.tasks == theirs.tasks
        total += count_tokens(theirs.batch)
    assert workbook.tokens_seen(prepared.mixture, FIT.seed, 8) == total
    held_out = [s for s in generalist.mixture.validation() if s.domain == domain]
    assert len(held_out) > 0
    for ours, theirs in zip(prepared.mixture.validation(), held_out, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours.batch, theirs.batch)


def test_other_pieces_make_another_agent(run, generalist, monkeypatch):
    """The folder's name tells agents apart that differ in their text tokenizer alone."""
    monkeypatch.setattr(workbook, "train", lambda *a, **k: ())
    made = workbook.specialist(TRAINED, "babyai", 8)
    network = model_config("w64d2", text_rows=1024)
    folders = []
    for pieces in (None, generalist.text):
        prepared = workbook.prepare(run, made.data, pieces)
        assert prepared.text is pieces or pieces is None
        folders.append(workbook.train_agent(run, "s", network, made.train, prepared)[0])
    assert folders[0] != folders[1]
    assert (folders[1] / "text.model").read_bytes() == generalist.text.path.read_bytes()
