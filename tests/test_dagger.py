"""Demonstrations in which an agent leads and the expert says what it would have done."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gato_lib import collection, dagger, domains, set_aside, workbook
from gato_lib.config import ConfigError, DataConfig, TrainConfig, model_config
from gato_lib.episodes import read_shard, select

TASKS = ("babyai/GoToObj", "metaworld/drawer-close")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run with a tiny agent."""
    run = workbook.Run(tmp_path_factory.mktemp("home"), "smoke")
    workbook.tiny_agent(run, "generalist", 0)
    return run


@pytest.fixture(scope="module")
def data(home):
    return DataConfig(
        tasks=TASKS,
        episodes=(("babyai", 4), ("metaworld", 4)),
        practice=((str(home.root), (("babyai", 3), ("metaworld", 3))),),
        context_length=56,
        batch_tokens=112,
        vocabulary_size=1024,
        inputs="executed",
        goals_aside=True,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, data):
    run = workbook.Run(tmp_path_factory.mktemp("led"), "smoke")
    return run, workbook.prepare(run, data)


def test_the_agent_leads_and_the_expert_says_what_it_would_do(prepared, data):
    run, _ = prepared
    for item in workbook.practices(run, data):
        episodes, card = collection.load(item)
        assert item.done and card["learner"] == item.learner and 0 < len(episodes) <= 3
        env, expert = domains.make_env(item.task), domains.make_expert(item.task)
        differs = 0
        for episode in episodes:
            assert episode.steps <= dagger.STEPS
            start = select(episode.observations, 0)
            assert not set_aside.is_aside(item.task, start)
            # The same seed and what was executed give the same episode and the same advice.
            observation, _ = env.reset(seed=episode.seed)
            expert.reset(env)
            last = None
            for t in range(episode.steps):
                advice = expert.act(observation, last)
                np.testing.assert_allclose(advice, episode.actions[t], atol=1e-6)
                last = episode.executed[t]
                differs += not np.allclose(advice, last)
                observation, reward, *_ = env.step(last)
                assert reward == pytest.approx(episode.rewards[t])
        assert differs > 0, "the agent leads at the beginning, and knows next to nothing"
        env.close()


def test_they_are_trained_on_beside_the_experts_own(prepared, data, home):
    run, both = prepared
    alone = workbook.prepare(run, dataclasses.replace(data, practice=()))
    led = {i.task: collection.load(i)[0] for i in workbook.practices(run, data)}
    for more, less in zip(both.cards, alone.cards, strict=True):
        assert more["steps"] == less["steps"] + sum(e.steps for e in led[more["task"]])
    for group in both.mixture.groups:
        assert group.seq.targets is not None
        assert (group.seq.targets != group.seq.ids).any()
    assert set(both.content) - set(alone.content) == {"practice"}
    network = model_config("w64d2", text_rows=1024, value_rows="ordinal", stochastic_depth=0.0)
    fit = TrainConfig(steps=4, warmup_steps=1)
    start = workbook.generalist_in(str(home.root), run)
    with pytest.raises(ConfigError, match="other text pieces"):
        workbook.train_agent(run, "generalist", network, fit, both, start=start)
    both = workbook.prepare(run, data, workbook.pieces_of(start))
    folder, _ = workbook.train_agent(run, "generalist", network, fit, both, start=start)
    agent = workbook.load_agent(folder)
    led = agent.for_domain(TASKS[0].split("/")[0])
    assert led.inputs == "executed"
    assert led.for_domain("sokoban").inputs == "expert"
    # It plays, prompted by what no agent led.
    played = workbook.play(run, folder, 1, 0, lanes=1, prompt="end", tasks=TASKS[1:])
    assert len(played) == 1


@pytest.mark.parametrize("task", ["dmc/point_mass-easy", "metaworld/reach"])
def test_where_every_step_counts_an_episode_ends_with_what_is_led(task):
    env = domains.make_env(task)
    begun, _ = env.reset(seed=3)
    lane = dagger._Led(task, 3, env, begun)
    executed, still = [], np.zeros(env.action_space.shape, np.float32)
    while not lane.over:
        executed.append(lane.step(still))
    led = sum(not np.any(e) for e in executed)  # an expert never does quite nothing
    episode = lane.episode()
    assert episode.steps == len(executed) <= dagger.STEPS
    if task.startswith("dmc"):
        assert led == dagger.LED and not np.any(executed[-1])
    else:
        assert episode.success or episode.steps == dagger.STEPS
    env.close()


def test_interrupted_episodes_are_gone_on_with(prepared, data):
    run, _ = prepared
    (item, _) = workbook.practices(run, data)
    other = dataclasses.replace(item, seed=5)
    assert other.folder != item.folder
    assert other.gather([1]) == 1
    lines = list(collection.collect([other], workers=1))
    assert lines[0] == "collecting 2 of 3 episodes of 1 tasks" and other.done
    seeds = {item.episode_seed(i, a) for i in range(50) for a in range(3)}
    plain = collection.Collection(item.root, item.task, 3, (0.0,), item.seed)
    assert not seeds & {plain.episode_seed(i, a) for i in range(50) for a in range(3)}
    assert max(seeds) < 2**30, "evaluation's begin there"


def test_planners_plan_anew_after_anothers_action():
    env, expert = (
        domains.make_env("dmc/cartpole-swingup"),
        domains.make_expert("dmc/cartpole-swingup"),
    )
    observation, _ = env.reset(seed=0)
    expert.reset(env)
    expert.act(observation, None)
    assert expert._queue
    expert.interrupted()
    assert not expert._queue
    assert env.action_space.contains(expert.act(observation, None))
    env.close()


def test_what_is_not_there_is_named(tmp_path, data):
    run = workbook.Run(tmp_path, "smoke")
    missing = dataclasses.replace(data, practice=((str(tmp_path / "none"), (("babyai", 3),)),))
    with pytest.raises(ConfigError, match=r"none: no agent 'generalist' there"):
        workbook.practices(run, missing)
    for wrong in ([{"learner": "x"}], ["x"], [{"learner": "x", "episodes": "babyai 3", "n": 1}]):
        with pytest.raises(ConfigError, match="expected learner"):
            workbook.data_config(TASKS[0], "babyai 2", "0", "equal", practice=wrong)
    with pytest.raises(ConfigError, match="must be positive"):
        dataclasses.replace(data, practice=(("x", (("babyai", 0),)),))


def test_an_expert_that_fails_ends_the_episode_and_keeps_what_it_said(monkeypatch, prepared, data):
    """Labels until then are kept; one that fails at once is played with another seed."""
    run, _ = prepared
    (item, _) = workbook.practices(run, data)
    env = domains.make_env(item.task)

    def steps_at_least(seed):
        env.reset(seed=seed)
        (goal,) = env.unwrapped.instrs.desc.obj_poss
        return int(np.abs(np.subtract(goal, env.unwrapped.agent_pos)).sum()) - 1

    # Whatever the agent does, the second episode is not over before its expert fails.
    seeds = (dataclasses.replace(item, seed=seed) for seed in range(9, 1000))
    item = next(i for i in seeds if steps_at_least(i.episode_seed(1, 0)) > 2)
    env.close()
    fails = {item.episode_seed(0, 0): 0, item.episode_seed(1, 0): 2}
    make = domains.make_expert

    def make_expert(task):
        expert = make(task)
        reset, act = expert.reset, expert.act

        def begin(env):
            expert.seed, expert.acts = env.unwrapped._np_random_seed, 0
            reset(env)

        def fail(observation, last):
            if expert.acts == fails.get(expert.seed):
                raise domains.ExpertError("gave up")
            expert.acts += 1
            return act(observation, last)

        expert.reset, expert.act = begin, fail
        return expert

    monkeypatch.setattr(domains, "make_expert", make_expert)
    assert item.gather([0, 1]) == 2
    first, second = (read_shard(item.shard(i)) for i in (0, 1))
    assert first.seed == item.episode_seed(0, 1) and first.steps > 0
    assert second.seed == item.episode_seed(1, 0) and second.steps == 2
