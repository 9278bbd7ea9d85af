"""The simulators and experts themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from minigrid.wrappers import RGBImgPartialObsWrapper

from gato_lib import collection, domains, workbook
from gato_lib.config import ConfigError, DataConfig
from gato_lib.domains import babyai, base
from gato_lib.mixture import PAPER_WEIGHTS, STANDS_FOR


def test_every_task_is_named_once_and_experts_are_described():
    for task, spec in domains.TASKS.items():
        assert task == spec.id == f"{spec.domain}/{spec.name}"
        assert spec.metric in ("return", "success") and spec.floor > 0
        assert spec.floor_source and spec.noise and spec.expert
    for name, domain in domains.DOMAINS.items():
        assert name == domain.name
        assert domain.extra != (name in PAPER_WEIGHTS or name in STANDS_FOR)
        assert domain.tasks and {s.domain for s in domain.tasks.values()} == {name}
        assert len(domain.code) == 8 and bool(domain.requires) == bool(domain.install)
    counts = {name: len(domain.tasks) for name, domain in domains.DOMAINS.items()}
    assert counts["babyai"] == 46 and counts["metaworld"] == 50


def test_held_out_tasks_never_enter_pretraining():
    held = domains.HELD_OUT
    assert held <= set(domains.TASKS)
    same = [t for t in domains.TASKS if t.split("/")[1].lower() in ("cartpole-swingup", "boxing")]
    assert set(same) <= held  # every variant of them
    metaworld = {t for t in held if t.startswith("metaworld/")}
    assert len(metaworld) == 5 and "metaworld/assembly" in metaworld
    assert len(set(domains.DOMAINS["metaworld"].tasks) - held) == 45
    stacking = {t for t in domains.TASKS if t.startswith("rgb_stacking")}
    assert {t.split("/")[1] for t in stacking - held} == {"red-on-blue"}
    assert not set(workbook.select_tasks("all")) & held
    for name, domain in domains.DOMAINS.items():
        assert not set(workbook.select_tasks(name)) & held and set(domain.tasks) - held
    for task in held:
        with pytest.raises(ConfigError, match="held out"):
            workbook.select_tasks(task)
        data = DataConfig(tasks=(task,), episodes=((task.split("/")[0], 1),))
        with pytest.raises(ConfigError, match="held-out tasks never enter pretraining"):
            workbook.collections(workbook.Run.at("", "smoke"), data)


OWN = """
from gato_lib import collection, domains, films, workbook
from gato_lib.config import DataConfig
from gato_lib.evaluation import measure_references

if __name__ == "__main__":
    tasks = workbook.select_tasks("cartpole")
    wanted = [(tasks[0], policy, 3) for policy in ("random", "expert")]
    rows = {r["policy"]: r for r in measure_references(wanted, 0)}
    assert rows["expert"]["mean"] > 400 > 100 > rows["random"]["mean"], rows
    assert tasks[0] not in workbook.select_tasks("all")
    assert (films.picture(tasks[0], size=16) == 128).all(), "nothing to see"
    data = DataConfig(tasks=tasks, episodes=workbook.episodes_by_domain("others 2", tasks),
                      context_length=64, batch_tokens=128, vocabulary_size=1024)
    prepared = workbook.prepare(workbook.Run.at("run", "smoke"), data)
    assert prepared.mixture[0].batch.ids.shape[1] <= 64
"""


def test_the_readmes_own_environment_is_collected_and_measured(tmp_path):
    """With the file and the line that the README asks for, in a copy of the library."""
    root = pathlib.Path(__file__).resolve().parent.parent
    readme = (root / "README.md").read_text()
    section = readme.split("## Your own environment")[1].split("```python\n")[1]
    shutil.copytree(root / "gato_lib", tmp_path / "gato_lib")
    folder = tmp_path / "gato_lib" / "domains"
    (folder / "cartpole.py").write_text(section.split("```")[0])
    init = (folder / "__init__.py").read_text()
    (folder / "__init__.py").write_text(init.replace("_MODULES = (", '_MODULES = ("cartpole",'))
    results = tmp_path / "experiments" / "results"
    results.mkdir(parents=True)
    shutil.copy(root / "experiments" / "results" / "references.csv", results)
    (tmp_path / "own.py").write_text(OWN)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "own.py"], cwd=tmp_path, env=env, check=True, timeout=100)
    assert next((tmp_path / "run" / "data").glob("cartpole-balance-*")).is_dir()


def test_one_task_has_a_domain_and_a_name():
    with pytest.raises(ValueError, match="task is 'balance', expected 'domain/name'"):
        base.one_task("balance", lambda: None, lambda seen: 0, floor=1, sources=())


def test_a_missing_simulator_names_its_remedy(monkeypatch):
    missing = dataclasses.replace(
        domains.DOMAINS["babyai"], requires=("no_such_module",), install="make it"
    )
    monkeypatch.setitem(domains.DOMAINS, "babyai", missing)
    assert not any(t.startswith("babyai/") for t in workbook.select_tasks("all"))
    with pytest.raises(ModuleNotFoundError, match="babyai/GoToObj needs no_such_module: make it"):
        domains.make_env("babyai/GoToObj")
    with pytest.raises(ConfigError, match="mixture names babyai, which is not installed: make it"):
        workbook.data_config("metaworld", "others 1", "0", "metaworld 1, babyai 2")


def test_an_unknown_task_names_its_neighbours():
    with pytest.raises(KeyError, match="unknown task 'babyai/Go'; known: .*babyai/GoToObj"):
        domains.make_env("babyai/Go")
    with pytest.raises(KeyError, match="unknown task 'x'"):
        domains.make_expert("x")


@pytest.mark.parametrize("task", ["babyai/PutNextLocal", "metaworld/push"])
def test_a_seed_fixes_the_episode(task):
    env, expert = domains.make_env(task), domains.make_expert(task)

    def play(seed):
        return collection.rollout(env, expert, task, seed, 0.2, np.random.default_rng(seed))

    first, other, again = play(3), play(4), play(3)
    np.testing.assert_array_equal(first.executed, again.executed)
    np.testing.assert_array_equal(first.rewards, again.rewards)
    assert first.steps != other.steps or not np.array_equal(first.executed, other.executed)


QUICK = ("babyai/PutNextLocal", "babyai/UnlockLocal", "metaworld/peg-insert-side")
SCRIPTED = [t for t in sorted(domains.TASKS) if t.split("/")[0] in ("babyai", "metaworld")]


@pytest.mark.parametrize(
    "task", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in SCRIPTED]
)
def test_experts_solve_their_tasks(task):
    env, expert = domains.make_env(task), domains.make_expert(task)
    rng = np.random.default_rng(0)
    solved = 0
    for seed in (11, 12, 13):
        with contextlib.suppress(domains.ExpertError):
            solved += collection.rollout(env, expert, task, seed, 0.0, rng).success
    assert solved >= 2
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)


def test_babyai_view_is_padded_not_resized():
    env = domains.make_env("babyai/GoToObj")
    image = env.reset(seed=0)[0]["image"]
    assert image.shape == (64, 64, 3) and image[:56, :56].any()
    assert not image[56:].any() and not image[:, 56:].any()
    inner = env
    while not isinstance(inner, RGBImgPartialObsWrapper):
        inner = inner.env
    view = inner.unwrapped.get_frame(tile_size=8, agent_pov=True)
    np.testing.assert_array_equal(image[:56, :56], view)


def test_metaworld_shows_the_goal_and_stops_at_success():
    env = domains.make_env("metaworld/reach")
    goals = [env.reset(seed=s)[0][-3:] for s in range(3)]
    assert len({tuple(g) for g in goals}) == 3 and np.abs(goals).max() > 0.1
    expert, observation = domains.make_expert("metaworld/reach"), env.reset(seed=1)[0]
    expert.reset(env)
    over = False
    while not over:
        observation, _, terminated, truncated, info = env.step(expert.act(observation, None))
        over = terminated or truncated
    assert terminated and info["success"]


def test_noise_is_executed_but_the_label_is_the_experts(demonstrations):
    for episode in demonstrations.values():
        assert any(not np.array_equal(e.actions, e.executed) for e in episode)


def test_a_deadline_that_was_swallowed_comes_again():
    def search():
        while True:
            pass

    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"), babyai._deadline(0.05):
        with contextlib.suppress(TimeoutError):  # as in a callback of the garbage collector
            search()
        search()
    begin = time.process_time()
    while time.process_time() < begin + 0.2:
        pass  # outside of the block nothing comes


def test_the_bot_is_stopped_when_it_hangs(monkeypatch):
    env = domains.make_env("babyai/GoToObj")
    env.reset(seed=0)
    bot = domains.make_expert("babyai/GoToObj")
    bot.reset(env)

    def hang(last):
        while True:
            pass

    monkeypatch.setattr(bot._bot, "replan", hang)
    monkeypatch.setattr(babyai, "BOT_SECONDS", 0.1)
    with pytest.raises(domains.ExpertError, match="TimeoutError"):
        bot.act(None, None)
