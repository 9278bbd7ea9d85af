"""Mixture, training, resuming, acting and scoring on a tiny network and real demonstrations."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import gymnasium as gym
import jax
import numpy as np
import pandas as pd
import pytest

from gato_lib import domains, evaluation, workbook
from gato_lib import sequence as sq
from gato_lib import tokenizers as tk
from gato_lib.agent import Agent, History
from gato_lib.checkpoint import Checkpointer
from gato_lib.config import ConfigError, DataConfig, TrainConfig, model_config
from gato_lib.embedding import table_row
from gato_lib.episodes import DataError, Episode, select, stack_observations, validate
from gato_lib.mixture import Mixture, build_group
from gato_lib.training import graph_of, initial_state, merge, train

NETWORK = model_config(
    "w64d2", width=32, head_dim=8, mlp_dim=64, text_rows=1024, value_rows="ordinal"
)
DATA = DataConfig(
    tasks=workbook.SMALL_TASKS,
    episodes=(("babyai", 2), ("metaworld", 2)),
    context_length=90,
    batch_tokens=180,
    prompt_fraction=0.25,
    vocabulary_size=1024,
)
FIT = TrainConfig(steps=8, peak_lr=1e-3, warmup_steps=2, clip_norm=1.0, soft_sigma=2.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory, demonstrations):
    missions = {m for e in demonstrations["babyai/GoToObj"] for m in e.observations["mission"]}
    return tk.train_text_tokenizer(missions, tmp_path_factory.mktemp("text") / "t.model", 1024)


@pytest.fixture(scope="module")
def groups(demonstrations, text):
    out = {}
    for task, episodes in demonstrations.items():
        env = domains.make_env(task)
        tokenizer = sq.Tokenizer(env.observation_space, env.action_space, text)
        out[task.split("/")[0]] = {task: [tokenizer.episode(e) for e in episodes]}
    return [build_group(name, tasks, DATA) for name, tasks in out.items()]


@pytest.fixture(scope="module")
def mixture(groups):
    return Mixture(groups, DATA)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- mixture --------------------------------------------------------------------------------------


def test_batches_have_fixed_shapes_and_both_domains(mixture):
    shapes = {}
    for i in range(20):
        domain, batch = mixture[i]
        shapes.setdefault(domain, set()).add(tuple(x.shape for x in batch))
    assert set(shapes) == {"babyai", "metaworld"}
    assert len(shapes["metaworld"]) == 1 and len(shapes["babyai"]) <= 2


def test_batch_number_is_all_it_takes(mixture, groups):
    again = Mixture(groups, DATA)
    for i in (0, 1, 7):
        assert mixture[i][0] == again[i][0]
        assert_equal(mixture[i][1], again[i][1])
    straight = list(itertools.islice(mixture.iterate(0), 6))
    for (name, a), (other, b) in zip(straight[3:], again.iterate(3), strict=False):
        assert name == other
        assert_equal(a, b)
    different = Mixture(groups, dataclasses.replace(DATA, seed=1))
    assert any(
        not np.array_equal(a.ids, b.ids)
        for (_, a), (_, b) in ((mixture[i], different[i]) for i in range(4))
    )
    # The training run's own seed: other batches of the same data.
    reseeded = itertools.islice(mixture.iterate(0, seed=1), 6)
    assert any(
        not np.array_equal(a.ids, b.ids) for (_, a), (_, b) in zip(straight, reseeded, strict=True)
    )


def test_weights_are_kept(groups):
    weighted = dataclasses.replace(DATA, weights=(("babyai", 1.0), ("metaworld", 3.0)))
    names = [Mixture(groups, weighted)[i][0] for i in range(40)]
    assert names.count("metaworld") == 30
    with pytest.raises(ValueError, match=r"weights name \['atari'\]"):
        Mixture(groups, dataclasses.replace(DATA, weights=(("atari", 1.0),)))


def test_prompts_come_from_another_episode_and_fit(groups):
    from gato_lib.mixture import sample_windows

    always = dataclasses.replace(DATA, prompt_fraction=1.0)
    for group in groups:
        (task,) = group.tasks.values()
        for draw in range(20):
            for spans in sample_windows(group, always, np.random.default_rng(draw)):
                assert sum(b - a for a, b in spans) <= group.length
                if len(spans) == 1:
                    continue
                (a, b), (c, _) = spans
                at = group.seq.offsets
                assert {a, b, c} <= set(at.tolist()) and b - a <= group.length // 2
                ends = at[task.episodes[:, 1]]
                assert np.searchsorted(ends, a, side="right") != np.searchsorted(
                    ends, c, side="right"
                )


@pytest.mark.parametrize("prompted", [0.0, 1.0])
def test_every_step_is_seen_live(groups, prompted):
    """With a prompt in front or not; the last step, which earns the reward, nearly as often."""
    from gato_lib.mixture import sample_windows

    config = dataclasses.replace(DATA, prompt_fraction=prompted)
    for group in groups:
        (task,) = group.tasks.values()
        at, live = group.seq.offsets, collections.Counter()
        for draw in range(3000):
            for spans in sample_windows(group, config, np.random.default_rng(draw)):
                assert len(spans) == 1 + prompted
                first, last = np.searchsorted(at, spans[-1])
                live.update(range(first, last))
        for begin, end in task.episodes:
            steps = [live[s] for s in range(begin, end)]
            assert min(steps[0], steps[-1]) > 0.4 * np.median(steps)
            assert min(steps) > 0


def test_a_timestep_that_does_not_fit_is_refused(groups, demonstrations, text):
    env = domains.make_env("metaworld/drawer-close")
    tokenizer = sq.Tokenizer(env.observation_space, env.action_space, text)
    tokens = [tokenizer.episode(demonstrations["metaworld/drawer-close"][0])]
    with pytest.raises(ValueError, match="a timestep has 44 tokens, context_length is 40"):
        build_group("metaworld", {"t": tokens}, dataclasses.replace(DATA, context_length=40))


# --- training -------------------------------------------------------------------------------------


def last(iterator):
    (item,) = collections.deque(iterator, maxlen=1)
    return item


def test_resuming_equals_running_straight(tmp_path, mixture):
    kwargs = {"report_every": 3, "save_every": 2}
    reports = [(m, p) for m, p in train(NETWORK, FIT, mixture, None, **kwargs)]
    straight = reports[-1][1]
    cut = Checkpointer(tmp_path, {"a": 1})
    steps = train(NETWORK, FIT, mixture, cut, **kwargs)
    next(steps)  # three steps done, the checkpoint of step 2 on disk
    steps.close()
    cut.close()
    again = Checkpointer(tmp_path, {"a": 1})
    assert again.latest() == 2
    repeated = [(m, p) for m, p in train(NETWORK, FIT, mixture, again, **kwargs)]
    again.close()
    resumed = repeated[-1][1]
    for (a, _), (b, _) in zip(reports, repeated, strict=True):  # reports at 3, 6 and 8 as well
        assert (a.step, a.loss, a.tokens, a.padding) == (b.step, b.loss, b.tokens, b.padding)
    assert_equal(straight, resumed)


def test_other_settings_do_not_overwrite_a_run(tmp_path):
    Checkpointer(tmp_path, {"a": 1}).close()
    with pytest.raises(ValueError, match="other settings"):
        Checkpointer(tmp_path, {"a": 2})


def test_a_checkpoint_cut_short_is_ignored(tmp_path):
    state = initial_state(NETWORK, FIT)
    one = Checkpointer(tmp_path, {})
    one.save(1, state, {"tokens": 5})
    one.close()
    left = tmp_path / "steps" / "2.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("x")
    again = Checkpointer(tmp_path, {})
    step, restored, counters = again.restore(state)
    assert (step, counters) == (1, {"tokens": 5}) and not left.exists()
    assert_equal(state, restored)
    again.close()


def test_training_overfits_one_batch(mixture):
    class OneBatch:
        def iterate(self, start, seed):
            while True:
                yield mixture[0]

    fit = dataclasses.replace(FIT, steps=250, peak_lr=3e-3, soft_sigma=0.0, weight_decay=0.0)
    still = dataclasses.replace(NETWORK, stochastic_depth=0.0)
    metrics, _ = last(train(still, fit, OneBatch(), report_every=10))
    (loss,) = metrics.loss.values()
    assert loss < 0.05


def test_a_loss_that_is_not_finite_stops_with_its_source(mixture):
    class Poisoned:
        def iterate(self, start, seed):
            for i in itertools.count(start):
                name, batch = mixture[i]
                weights = batch.target_weights * (np.nan if i == 3 else 1.0)
                yield name, batch._replace(target_weights=weights.astype(np.float32))

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3, domain (babyai|meta)"):
        last(train(NETWORK, FIT, Poisoned(), report_every=4))


# --- acting and scoring ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent(text):
    params = initial_state(NETWORK, FIT)["params"]
    return Agent(NETWORK, params, text, DATA.context_length, continuous="mean")


def test_actions_are_legal_and_do_not_depend_on_the_batch(agent):
    for task in workbook.SMALL_TASKS:
        env = domains.make_env(task)
        tokenizer = agent.tokenizer(env)
        together = [History(s) for s in range(3)]
        for s, h in enumerate(together):
            h.observations.append(env.reset(seed=s)[0])
        actions = agent.act(tokenizer, together)
        assert all(env.action_space.contains(a) for a in actions)
        low, high = tokenizer.action_spec.legal_ids.T
        assert all(((h.action_ids[0] >= low) & (h.action_ids[0] < high)).all() for h in together)
        alone = History(1)
        alone.observations.append(env.reset(seed=1)[0])
        agent.act(tokenizer, [alone])
        np.testing.assert_array_equal(alone.action_ids[0], together[1].action_ids[0])


class AnySpaces:
    """Stands for an environment nobody wrote code for: every kind of space, nested."""

    observation_space = gym.spaces.Dict(
        {
            "camera": gym.spaces.Box(0, 255, (20, 16, 3), np.uint8),
            "arm": gym.spaces.Tuple(
                [gym.spaces.Box(-9, 9, (3,), np.float32), gym.spaces.MultiBinary(2)]
            ),
            "words": gym.spaces.Text(8, charset="abc"),
            "where": gym.spaces.MultiDiscrete([4, 5], start=[-2, 0]),
        }
    )
    action_space = gym.spaces.Dict(
        {
            "move": gym.spaces.Box(-2, 3, (2,), np.float32),
            "button": gym.spaces.MultiDiscrete([3, 2]),
            "hold": gym.spaces.Discrete(2, start=1),
        }
    )


@pytest.mark.parametrize("discrete_range", ["shared", "own"])
def test_any_gymnasium_spaces_train_and_act(text, discrete_range):
    """Random episodes of every kind of space: tokens, updates, and legal actions."""
    observations, actions = AnySpaces.observation_space, AnySpaces.action_space
    observations.seed(0), actions.seed(0)
    recorded = [stack_observations([s.sample() for _ in range(5)]) for s in (observations, actions)]
    four = stack_observations([actions.sample() for _ in range(4)])
    episode = Episode("t/x", recorded[0], four, four, np.zeros(4), True, 0)
    validate(episode, observations, actions, "here")
    network = dataclasses.replace(NETWORK, discrete_range=discrete_range)
    tokenizer = sq.Tokenizer(observations, actions, text, discrete_range)
    tokens = tokenizer.episode(episode)
    for step, ids in enumerate(tokenizer.action_spec.encode(four)):
        assert tokens.ids[tokens.offsets[step + 1] - 5 : tokens.offsets[step + 1]].tolist() == [
            *ids
        ]
    own = (tokens.ids >= 33025).sum()
    assert own == (4 * (2 + 2 + 3) if discrete_range == "own" else 0)
    group = build_group("t", {"t/x": [tokens]}, dataclasses.replace(DATA, context_length=60))
    mixture = Mixture([group], dataclasses.replace(DATA, discrete_range=discrete_range))
    metrics, params = last(train(network, FIT, mixture))
    assert metrics.loss["t"] < 12
    agent = Agent(network, jax.tree.map(np.asarray, params), text, 60, continuous="mean")
    history = History(0)
    for step in range(4):
        history.observations.append(select(recorded[0], step))
        (action,) = agent.act(tokenizer, [history])
        assert actions.contains(action), action
        low, high = tokenizer.action_spec.legal_ids.T
        assert ((history.action_ids[-1] >= low) & (history.action_ids[-1] < high)).all()


def test_acting_equals_the_training_forward_pass(text, demonstrations):
    """Greedy ids are the argmax over legal ids of logits from a batch made as in training."""
    params = initial_state(NETWORK, FIT)["params"]
    agent = Agent(NETWORK, params, text, 90, continuous="greedy", discrete="greedy")
    model = merge(graph_of(NETWORK), params)
    for task, episodes in demonstrations.items():
        env = domains.make_env(task)
        tokenizer = agent.tokenizer(env)
        history = History(0)
        episode = episodes[0]
        for step in range(min(5, episode.steps)):
            history.observations.append(select(episode.observations, step))
            agent.act(tokenizer, [history])
        seq = tokenizer.steps(history.observations, np.stack(history.action_ids))
        at = seq.offsets
        first = int(np.searchsorted(at, at[-1] - 90))
        span = (int(at[first]), int(at[-1]))
        batch = sq.make_batch(seq, [[span]], 90, 90, 64)
        hidden = model.hidden(batch)[0]
        n, (low, high) = tokenizer.action_spec.num_tokens, tokenizer.action_spec.legal_ids[0]
        for i in range(n):
            logits = model.embedding.logits(hidden[span[1] - span[0] - n - 1 + i][None])[0]
            start = low if low < 32000 else 1024
            chosen = int(np.argmax(logits[start : start + high - low])) + low
            assert chosen == history.action_ids[-1][i]


@pytest.mark.parametrize("discrete_range", ["shared", "own"])
def test_mixed_actions_are_chosen_token_by_token(text, discrete_range):
    """Each token among its own legal ids, given those before it: the mean, the mode, or a draw."""
    observations, actions = AnySpaces.observation_space, AnySpaces.action_space
    observations.seed(1)
    network = dataclasses.replace(NETWORK, discrete_range=discrete_range)
    params = initial_state(network, FIT)["params"]
    # Sharper than a new network's: otherwise every mean is the middle.
    params["embedding"]["table"] = params["embedding"]["table"] * 40
    model = merge(graph_of(network), params)
    tokenizer = sq.Tokenizer(observations, actions, text, discrete_range)
    observation = observations.sample()
    for continuous, discrete in (("mean", "greedy"), ("greedy", "greedy"), ("mean", "sample")):
        agent = Agent(network, params, text, 60, continuous=continuous, discrete=discrete)
        history = History(0)
        history.observations.append(observation)
        agent.act(tokenizer, [history])
        chosen = history.action_ids[0]
        seq = tokenizer.steps([observation], chosen[None])
        batch = sq.make_batch(seq, [[(0, len(seq))]], len(seq), len(seq), 8)
        hidden = model.hidden(batch)[0]
        noise = np.random.default_rng([0, 2]).gumbel(size=(5, 1024))
        for i, (low, high) in enumerate(tokenizer.action_spec.legal_ids):
            logits = np.asarray(model.embedding.logits(hidden[len(seq) - 6 + i][None])[0])
            row = int(table_row(np.int32(low), network))
            legal = logits[row : row + high - low].astype(np.float64)
            if i < 3:  # button, button, hold: keys in lexicographic order
                assert high - low in (2, 3)
                pick = np.argmax(legal + (noise[i, : high - low] if discrete == "sample" else 0))
            elif continuous == "mean":
                p = np.exp(legal - legal.max())
                pick = round(float(p @ np.arange(1024) / p.sum()))
            else:
                pick = np.argmax(legal)
            assert abs(chosen[i] - (low + pick)) <= (continuous == "mean" and i >= 3), (i, discrete)


def test_prompts_stay_at_the_front(agent, demonstrations):
    task = "babyai/GoToObj"
    env = domains.make_env(task)
    tokenizer = agent.tokenizer(env)
    demonstration = demonstrations[task][0]
    end = agent.prompt(tokenizer, demonstration, "end")
    start = agent.prompt(tokenizer, demonstration, "start")
    assert len(end[0]) >= 1 and len(end[0]) == len(end[1])
    np.testing.assert_array_equal(
        end[0][-1]["image"], demonstration.observations["image"][demonstration.steps - 1]
    )
    np.testing.assert_array_equal(start[0][0]["image"], demonstration.observations["image"][0])
    prompted, plain = History(0, end), History(0)
    for h in (prompted, plain):
        for seed in range(6):
            h.observations.append(env.reset(seed=seed)[0])
            agent.act(tokenizer, [h])
    assert len(prompted.action_ids) == 6
    with pytest.raises(ValueError, match="prompt is 'middle'"):
        agent.prompt(tokenizer, demonstration, "middle")


def test_bad_observations_are_refused_while_acting(agent):
    for task, broken, message in (
        ("metaworld/drawer-close", np.zeros(38), r"observation has shape \(1, 38\), expected"),
        ("metaworld/drawer-close", np.full(39, np.nan), "observation holds NaN"),
        ("metaworld/drawer-close", np.zeros(39, np.int64), "observation has dtype int64"),
        ("babyai/GoToObj", {"mission": "go"}, r"observation has keys \['mission'\], expected"),
    ):
        history = History(0)
        history.observations.append(broken)
        with pytest.raises(DataError, match=message):
            agent.act(agent.tokenizer(domains.make_env(task)), [history])


def test_a_timestep_that_does_not_fit_beside_the_prompt_is_refused(agent, demonstrations):
    task = "babyai/GoToObj"
    env = domains.make_env(task)
    tokenizer = agent.tokenizer(env)
    short = Agent(NETWORK, agent.params, agent.text, 40)
    prompt = agent.prompt(tokenizer, demonstrations[task][0], "end")
    history = History(0, prompt)
    history.observations.append(env.reset(seed=0)[0])
    with pytest.raises(ValueError, match="the newest timestep has"):
        short.act(tokenizer, [history])


def test_text_ids_never_reach_the_value_rows(agent):
    with pytest.raises(ConfigError, match="32000 text pieces, but text_rows is 1024"):
        Agent(NETWORK, agent.params, tk.TextTokenizer(), 90)


def test_unknown_choices_are_refused(agent):
    with pytest.raises(ValueError, match="continuous is 'best'"):
        Agent(NETWORK, agent.params, agent.text, 90, continuous="best")
    with pytest.raises(ValueError, match="discrete is 'mean'"):
        Agent(NETWORK, agent.params, agent.text, 90, discrete="mean")


def test_rollouts_are_reproducible_and_resume(tmp_path, agent, demonstrations):
    tasks = ("babyai/GoToObj",)
    kwargs = {"lanes": 2, "demonstrations": lambda t: demonstrations[t], "prompt": "end"}
    straight = last(evaluation.rollouts(agent, tasks, 3, 0, **kwargs))
    path = tmp_path / "episodes.csv"
    cut = evaluation.rollouts(agent, tasks, 3, 0, path, **kwargs)
    next(cut)
    cut.close()
    assert 1 <= len(pd.read_csv(path)) < 3
    resumed = last(evaluation.rollouts(agent, tasks, 3, 0, path, **kwargs))
    pd.testing.assert_frame_equal(straight, resumed, check_dtype=False)
    assert straight["index"].tolist() == [0, 1, 2]
    last(evaluation.rollouts(agent, tasks, 1, 1, path, **kwargs))  # another seed
    kept = pd.read_csv(path)
    assert sorted(zip(kept.seed, kept["index"], strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    with pytest.raises(KeyError, match="unknown task"):
        next(evaluation.rollouts(agent, ("babyai/Nowhere",), 1, 0))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"episodes.csv: not a table of played episodes"):
        next(evaluation.rollouts(agent, tasks, 1, 0, path, **kwargs))


def test_normalized_score():
    assert evaluation.normalized_score(5.0, 0.0, 10.0) == 0.5
    assert evaluation.normalized_score(-5.0, 0.0, 10.0) == -0.5
    for random, expert in ((1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="no scale"):
            evaluation.normalized_score(3.0, random, expert)


def test_score_table_and_domain_means():
    played = pd.DataFrame(
        {
            "task": ["babyai/Open"] * 4,
            "score": [0.0, 0.5, 0.5, 1.0],
            "success": [False, True, True, True],
        }
    )
    references = pd.DataFrame(
        {"random": [0.1], "expert": [0.9], "sound": [True], "weak": [False]}, index=["babyai/Open"]
    )
    (row,) = evaluation.score_table(played, references).to_dict("records")
    assert row["normalized"] == pytest.approx(0.5) and row["n"] == 4
    assert row["low"] < 0.5 < row["high"]
    unsound = references.assign(sound=False, random=0.9)
    (row,) = evaluation.score_table(played, unsound).to_dict("records")
    assert np.isnan(row["normalized"]) and evaluation.domain_means(played, unsound).empty
    (mean,) = evaluation.domain_means(played, references).to_dict("records")
    assert mean["domain"] == "babyai" and mean["mean"] == pytest.approx(0.5) and mean["n"] == 1
    low, high = evaluation.bootstrap([np.ones(5), np.zeros(5)])
    assert low == high == 0.5


def test_references_measured_now_agree_with_the_committed_ones():
    from gato_lib import results

    path = results.COMMITTED / "references.csv"
    committed = evaluation.read_references(path)
    assert set(committed.index) == set(domains.TASKS) and (committed.n >= 20).all()
    task = "babyai/GoToObj"
    for policy in ("random", "expert"):
        now = evaluation._reference(task, policy, 20, 1)
        was, se = committed.loc[task, [policy, f"{policy}_se"]]
        assert abs(now["mean"] - was) < 4 * np.hypot(se, now["standard_error"]) + 1e-9
