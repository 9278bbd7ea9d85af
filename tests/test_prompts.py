"""The ends of demonstrations that come with a released agent."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from gato_lib import prompts, workbook
from gato_lib.config import ConfigError
from gato_lib.episodes import DataError, flatten
from gato_lib.evaluation import Evaluation, batches
from gato_lib.workbook import Run


def test_the_end_of_an_episode(demonstrations):
    for task, (episode, _) in demonstrations.items():
        end = prompts.tail(episode, 2)
        assert end.steps == 2 and end.task == task and end.seed == episode.seed
        for name in ("observations", "actions", "executed"):
            whole, part = flatten(getattr(episode, name)), flatten(getattr(end, name))
            for key, leaf in part.items():
                assert len(leaf) == 2 + (name == "observations")
                np.testing.assert_array_equal(leaf, whole[key][-len(leaf) :])
        assert prompts.tail(episode, 10_000).steps == episode.steps
        with pytest.raises(ValueError, match=f"{task}: the last 0 steps"):
            prompts.tail(episode, 0)


def test_a_file_of_them(tmp_path, demonstrations):
    path = tmp_path / "prompts.zip"
    every = [e for episodes in demonstrations.values() for e in episodes]
    prompts.write(path, every)
    for task, episodes in demonstrations.items():
        back = prompts.Prompts(str(path))(task)
        assert [e.seed for e in back] == [e.seed for e in episodes]
        for one, other in zip(back, episodes, strict=True):
            for key, leaf in flatten(one.observations).items():
                np.testing.assert_array_equal(leaf, flatten(other.observations)[key])
    before = path.read_bytes()
    prompts.write(path, every)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match=r"prompts\.zip: no demonstration of babyai/Open"):
        prompts.Prompts(str(path))("babyai/Open")
    for place in range(40, len(before), len(before) // 50):
        path.write_bytes(before[:place] + bytes([before[place] ^ 255]) + before[place + 1 :])
        try:
            back = [e for task in demonstrations for e in prompts.Prompts(str(path))(task)]
        except DataError:
            continue
        assert len(back) == len(every), "a byte that nothing reads"
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(DataError, match=r"prompts\.zip: not a file of prompts"):
        prompts.Prompts(str(path))("babyai/GoToObj")


@pytest.mark.slow
def test_a_released_agent_needs_no_demonstrations(tmp_path, monkeypatch):
    own, given = Run(tmp_path / "own", "smoke"), Run(tmp_path / "given", "smoke")
    folder = workbook.tiny_agent(own, "g", 0)
    released = workbook.release(own, folder, given, "small", prompts=50)
    how = {"lanes": 2, "prompt": "end", "continuous": "mean"}
    before = workbook.play(own, folder, 2, 0, **how)
    kept = workbook.prompts_for(given, released, "end")
    for task in workbook.SMALL_TASKS:
        whole = workbook.prompts_for(own, folder, "end")(task)
        assert len(kept(task)) == len(whole) and kept(task)[0].steps < whole[0].steps
    monkeypatch.setattr(workbook, "collect", None)
    again = workbook.play(given, released, 1, 0, **how)
    assert len(again) == 2
    (cache,) = released.glob("episodes-end-*.csv")
    digest = hashlib.sha256((released / "prompts.zip").read_bytes()).hexdigest()
    assert f"-prompts_{digest[:8]}" in cache.name
    agent = workbook.load_agent(folder, continuous="mean")  # its parameters are not rounded
    evaluation = Evaluation(lambda: agent, 0, kept, "end")
    after = [r for lot in batches(workbook.SMALL_TASKS, 2, 2) for r in evaluation.play(lot)]
    assert [r["score"] for r in after] == before.score.tolist()
    with pytest.raises(ConfigError, match="prompt is 'start': small-.* comes with the ends"):
        workbook.prompts_for(given, released, "start")
    assert workbook.prompts_for(given, released, "none") is None
    (released / "prompts.zip").write_bytes(b"other")
    with pytest.raises(DataError, match=r"prompts\.zip: sha256 is .* expected"):
        workbook.prompts_for(given, released, "end")
