"""Goals that a training leaves out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gato_lib import domains, set_aside, workbook
from gato_lib.config import DataConfig

TASK = "metaworld/drawer-close"


@pytest.fixture(scope="module")
def starts():
    env = domains.make_env(TASK)
    found = np.stack([env.reset(seed=i)[0] for i in range(60)])
    env.close()
    return found


def test_a_fifth_of_the_starts_and_those_at_one_end(starts):
    aside = np.array([set_aside.is_aside(TASK, s) for s in starts])
    assert 5 <= aside.sum() <= 20  # 12 are expected
    coordinate, boundary = set_aside._boundary(TASK)
    assert coordinate == 36  # the goal's x
    assert starts[aside, coordinate].min() > boundary >= starts[~aside, coordinate].max()


def test_other_domains_have_none():
    assert not set_aside.is_aside("babyai/GoToObj", np.full(39, 9.0))
    assert set_aside.without("babyai/GoToObj", ["anything"]) == ["anything"]
    with pytest.raises(ValueError, match=r"drawer-close.*shape \(4,\), expected \(39,\)"):
        set_aside.is_aside(TASK, np.zeros(4))


def test_training_does_not_get_them(tmp_path):
    run = workbook.Run(tmp_path, "smoke")
    data = DataConfig(
        tasks=(TASK,),
        episodes=(("metaworld", 12),),
        context_length=44,
        batch_tokens=88,
        validation_fraction=0.25,
        vocabulary_size=1024,
    )
    every = workbook.demonstrations(run, data)
    whole = workbook.prepare(run, data)
    (less,) = workbook.prepare(run, dataclasses.replace(data, goals_aside=True)).cards
    aside = [set_aside.is_aside(TASK, e.observations[0]) for e in every(TASK)]
    assert 0 < sum(aside) < len(aside)
    kept = [e.steps for e, out in zip(every(TASK), aside, strict=True) if not out]
    assert less["steps"] == sum(kept) < whole.cards[0]["steps"]
    assert less["aside"] == sum(aside) and "aside" not in whole.cards[0]
    shown = workbook.demonstrations(run, dataclasses.replace(data, goals_aside=True))
    assert [e.steps for e in shown(TASK)] == kept, "prompts show none of them either"
    with_rule = workbook.prepare(run, dataclasses.replace(data, goals_aside=True)).content
    assert with_rule.keys() - whole.content.keys() == {"goals aside"}
