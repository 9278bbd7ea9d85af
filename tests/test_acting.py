"""Acting with a cache against full forward passes over the same window; prompts; evaluation."""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from any_spaces import AnySpaces

from gato_lib import domains, evaluation, films, plotting, workbook
from gato_lib import sequence as sq
from gato_lib import tokenizers as tk
from gato_lib.agent import Agent
from gato_lib.config import ConfigError, TrainConfig, model_config
from gato_lib.embedding import table_row
from gato_lib.episodes import DataError, select, stack_observations
from gato_lib.evaluation import Evaluation, batches, rollouts
from gato_lib.latency import full_pass
from gato_lib.training import graph_of, initial_state, merge

NETWORK = model_config(
    *("w64d2",), width=32, head_dim=8, mlp_dim=64, text_rows=1024, patch_embedder="linear"
)
FIT = TrainConfig(steps=8, warmup_steps=2)
CONTEXT = 100


@functools.cache
def trained_like(config):
    """Random parameters, all large enough to matter: biases start at zero otherwise."""
    leaves, tree = jax.tree.flatten(initial_state(config, FIT)["params"])
    rng = np.random.default_rng(0)
    noisy = [x + jnp.asarray(rng.normal(0, 0.15, x.shape), x.dtype) for x in leaves]
    return tree.unflatten(noisy)


@pytest.fixture(scope="module")
def text(tmp_path_factory, demonstrations):
    missions = {m for e in demonstrations["babyai/GoToObj"] for m in e.observations["mission"]}
    return tk.train_text_tokenizer(missions, tmp_path_factory.mktemp("text") / "t.model", 1024)


@pytest.fixture
def make_agent(text):
    """An agent with parameters as after training; settings as of `Agent`."""

    def make(config=NETWORK, context=CONTEXT, **settings):
        return Agent(config, trained_like(config), text, context, **settings)

    return make


def spaces_and_observations(name, steps, demonstrations):
    """What an episode of the task shows, again and again; or any of `AnySpaces`."""
    if name == "everything":
        AnySpaces.observation_space.seed(3)
        return AnySpaces, [AnySpaces.observation_space.sample() for _ in range(steps)]
    env = domains.make_env(name)
    shown = demonstrations[name][0].observations
    several = len(jax.tree.leaves(shown)[0])
    return env, [select(shown, i % several) for i in range(steps)]


@functools.partial(jax.jit, static_argnums=0)
def whole(graph, params, batch):
    model = merge(graph, params)
    hidden = model.hidden(batch)
    return model.embedding.logits(hidden.reshape(-1, hidden.shape[-1]))


# --- cached equals uncached -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "parallel"),
    [
        (0.5, False),
        (0.5, True),
        pytest.param(1.0, False, marks=pytest.mark.slow),
        pytest.param(1.0, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["metaworld/drawer-close", "babyai/GoToObj", "everything"])
def test_cached_equals_uncached_over_episodes_longer_than_the_context(
    make_agent, demonstrations, name, keep, parallel
):
    """Three episodes in a batch, one prompted, one an episode behind the others."""
    env, observations = spaces_and_observations(name, 14, demonstrations)
    agent = make_agent(context=150, keep=keep, parallel={"here"}).for_domain(
        "here" if parallel else "elsewhere"
    )
    tokenizer = agent.tokenizer(env)
    prompt = None
    if name in demonstrations:
        prompt = agent.prompt(tokenizer, demonstrations[name][1], "end", observations[0])
    player = agent.player(tokenizer, [0, 1, 2], [None, prompt, None])
    lengths = []
    for step in range(len(observations) - 1):
        seen = [observations[step], observations[step], observations[step + 1]]
        actions = player.act(seen)
        assert all(tokenizer.action_space.contains(a) for a in actions)
        lengths.append([len(player.window(row)) for row in range(3)])
        for row in range(3):
            np.testing.assert_allclose(player.log_p[row], full_pass(player, row), atol=2e-4)
    assert np.max(lengths) <= 150 and len(np.unique(lengths)) > 2
    assert lengths[0][0] * len(lengths) > 1.5 * 150, "no longer than the context"


@pytest.mark.parametrize("name", ["metaworld/drawer-close", "everything"])
def test_an_action_executed_instead_is_what_is_remembered(make_agent, demonstrations, name):
    """Every other action is another's: the next choice is that of a pass over what was executed."""
    env, observations = spaces_and_observations(name, 9, demonstrations)
    agent = make_agent(context=150, keep=0.5)
    tokenizer = agent.tokenizer(env)
    player = agent.player(tokenizer, [0, 1])
    env.action_space.seed(0)
    for step, observation in enumerate(observations):
        player.act([observation, observation])
        for row in range(2):
            np.testing.assert_allclose(player.log_p[row], full_pass(player, row), atol=2e-4)
        if step % 2 == 0:
            action = env.action_space.sample()
            player.executed(1, action)
            leaves = stack_observations([action], env.action_space)
            ids = tokenizer.action_spec.encode(leaves)[0]
            assert player.window(1).ids[-len(ids) :].tolist() == ids.tolist()


def test_which_steps_are_in_sight(make_agent):
    """Steps of 44 tokens; a prompt of one step takes its room from the others."""
    env = domains.make_env("metaworld/drawer-close")
    observations = [env.reset(seed=s)[0] for s in range(9)]
    expected = {
        # keep, memory, prompted: steps in sight as the episode goes on, without the prompt
        (0.5, 0, 0): [1, 2, 3, 4, 2, 3, 4, 2, 3],
        (0.5, 0, 1): [1, 2, 3, 1, 2, 3, 1, 2, 3],
        (1.0, 0, 0): [1, 2, 3, 4, 4, 4, 4, 4, 4],
        (1.0, 0, 1): [1, 2, 3, 3, 3, 3, 3, 3, 3],
        (0.1, 0, 0): [1, 2, 3, 4, 1, 2, 3, 4, 1],
        (0.5, 270, 0): [1, 2, 3, 4, 5, 6, 6, 6, 6],
        (0.5, 270, 1): [1, 2, 3, 4, 5, 5, 5, 5, 5],
    }
    for (keep, memory, prompted), steps in expected.items():
        agent = make_agent(context=190, keep=keep, memory=memory)
        tokenizer = agent.tokenizer(env)
        ids = tokenizer.action_spec.legal_ids[:, 0].astype(np.int32)
        prompt = ([observations[8]] * prompted, [ids] * prompted)
        player = agent.player(tokenizer, [0], [prompt])
        for t, observation in enumerate(observations):
            player.act([observation])
            seen = player.window(0)
            assert seen.steps == steps[t] + prompted, (keep, memory, prompted, t)
            latest = [*[observations[8]] * prompted, *observations[t + 1 - steps[t] : t + 1]]
            again = tokenizer.steps(latest, np.stack([ids] * len(latest)))
            observed = seen.kinds == sq.CONTINUOUS
            np.testing.assert_array_equal(seen.ids[observed], again.ids[observed])


@pytest.mark.parametrize("prompted", [0, 1])
def test_memory_is_exact_for_one_layer_only(make_agent, prompted):
    env = domains.make_env("metaworld/drawer-close")
    observations = [env.reset(seed=s)[0] for s in range(8)]
    for depth in (1, 2):
        config = dataclasses.replace(NETWORK, depth=depth)
        agent = make_agent(config, memory=150)
        tokenizer = agent.tokenizer(env)
        ids = tokenizer.action_spec.legal_ids[:, 0].astype(np.int32)
        player = agent.player(
            tokenizer, [0, 1], [([observations[0]] * prompted, [ids] * prompted), None]
        )
        errors = []
        for observation in observations:
            player.act([observation] * 2)
            errors.append([np.abs(player.log_p[r] - full_pass(player, r)).max() for r in (0, 1)])
        errors = np.array(errors)
        assert errors[:2].max() < 2e-4, "before anything leaves"
        # The prompt saw nothing that has left, but what is behind it did.
        assert (errors[4:].max() < 2e-4) == (depth == 1), (depth, errors)


def test_cached_equals_uncached_in_bfloat16(make_agent):
    """Tolerance: 8 bits of mantissa."""
    env = domains.make_env("metaworld/drawer-close")
    agent = make_agent(dataclasses.replace(NETWORK, compute_dtype="bfloat16"))
    player = agent.player(agent.tokenizer(env), [0])
    for seed in range(5):
        player.act([env.reset(seed=seed)[0]])
        np.testing.assert_allclose(player.log_p[0], full_pass(player, 0), atol=0.3)


def test_memory_that_holds_an_episode_equals_a_context_that_does(make_agent):
    env = domains.make_env("metaworld/drawer-close")
    players = [
        agent.player(agent.tokenizer(env), [5])
        for agent in (make_agent(memory=400), make_agent(context=400))
    ]
    for seed in range(8):
        observation = env.reset(seed=seed)[0]
        first, second = [player.act([observation])[0] for player in players]
        np.testing.assert_array_equal(first, second)


def test_what_has_left_leaves_no_trace(make_agent):
    """Two pasts, one present: the same choice, as soon as the past is out of the window."""
    env = domains.make_env("metaworld/drawer-close")
    past = [[env.reset(seed=s)[0] for s in group] for group in ((1, 2, 3), (4, 5, 6))]
    present = [env.reset(seed=s)[0] for s in (7, 8, 9)]
    for memory in (0, 100):
        agent = make_agent(continuous="greedy", keep=0.5, memory=memory)  # two steps
        player = agent.player(agent.tokenizer(env), [0, 0])
        for first, second in zip(*past, strict=True):
            player.act([first, second])
        for observation in present:
            player.act([observation, observation])
        same = np.abs(player.log_p[0] - player.log_p[1]).max() < 1e-5
        seen = player.window(0).ids.tolist() == player.window(1).ids.tolist()
        assert seen and same == (memory == 0)


# --- choosing -------------------------------------------------------------------------------------


def test_actions_are_legal_and_do_not_depend_on_the_batch(make_agent):
    for task in workbook.SMALL_TASKS:
        env = domains.make_env(task)
        agent = make_agent(continuous="sample")
        tokenizer = agent.tokenizer(env)
        low, high = tokenizer.action_spec.legal_ids.T
        together = agent.player(tokenizer, [0, 1, 2])
        alone = agent.player(tokenizer, [1])
        for step in range(6):
            observations = [env.reset(seed=10 * step + s)[0] for s in range(3)]
            if step == 3:
                together.only([2, 1])
            some = observations if step < 3 else [observations[2], observations[1]]
            actions = together.act(some)
            assert all(env.action_space.contains(a) for a in actions)
            assert ((together.action_ids >= low) & (together.action_ids < high)).all()
            (action,) = alone.act([observations[1]])
            np.testing.assert_array_equal(action, actions[1])
            np.testing.assert_allclose(together.log_p[1], alone.log_p[0], atol=1e-4)


@pytest.mark.parametrize("discrete_range", ["shared", pytest.param("own", marks=pytest.mark.slow)])
def test_mixed_actions_are_chosen_token_by_token(make_agent, discrete_range):
    """Each token among its own legal ids, given those before it: the mean, the mode, or a draw."""
    observations = AnySpaces.observation_space
    observations.seed(1)
    network = dataclasses.replace(NETWORK, discrete_range=discrete_range)
    for continuous, discrete, heat in (
        ("mean", "greedy", 1.0),
        ("greedy", "greedy", 1.0),
        ("mean", "sample", 1.0),
        ("sample", "sample", 0.3),
    ):
        agent = make_agent(network, continuous=continuous, discrete=discrete, temperature=heat)
        tokenizer = agent.tokenizer(AnySpaces)
        player = agent.player(tokenizer, [0])
        player.act([observations.sample()])
        (chosen,) = player.action_ids
        seq = player.window(0)
        batch = sq.make_batch(seq, [[(0, len(seq))]], len(seq), len(seq), 16)
        logits = np.asarray(whole(graph_of(network), agent.params, batch))
        noise = heat * np.random.default_rng([0, 2]).gumbel(size=(5, 1024))
        for i, (low, high) in enumerate(tokenizer.action_spec.legal_ids):
            row = int(table_row(np.int32(low), network))
            legal = logits[len(seq) - 6 + i, row : row + high - low].astype(np.float64)
            way = discrete if i < 3 else continuous  # button, button, hold: lexicographic order
            assert (high - low in (2, 3)) == (i < 3)
            if way == "mean":
                p = np.exp(legal - legal.max())
                pick = round(float(p @ np.arange(1024) / p.sum()))
            else:
                pick = np.argmax(legal + (noise[i, : high - low] if way == "sample" else 0))
            assert abs(chosen[i] - (low + pick)) <= (way == "mean"), (i, way)


def test_samples_have_the_distribution_and_temperature_sharpens_it(make_agent):
    env = domains.make_env("babyai/GoToObj")
    observation = env.reset(seed=0)[0]
    shares = {}
    for heat in (1.0, 0.25):
        agent = make_agent(temperature=heat)
        player = agent.player(agent.tokenizer(env), range(400))
        player.act([observation] * 400)
        ids = player.action_ids[:, 0]
        log_p = np.full(7, -np.inf)
        log_p[ids] = player.log_p[:, 0]
        assert np.exp(log_p).sum() <= 1 + 1e-4
        expected = np.exp(log_p / heat) / np.exp(log_p / heat).sum()
        counts = np.bincount(ids, minlength=7)
        spread = np.sqrt(expected * (1 - expected) / 400)
        assert (np.abs(counts / 400 - expected) <= 4 * spread + 0.01).all()
        shares[heat] = counts.max()
    assert shares[0.25] > shares[1.0]


def test_domains_may_choose_in_their_own_way(make_agent):
    agent = make_agent(continuous="mean, rgb_stacking sample")
    chosen = {d: agent.for_domain(d).continuous for d in ("metaworld", "rgb_stacking")}
    assert chosen == {"metaworld": "mean", "rgb_stacking": "sample"}
    assert agent.for_domain("rgb_stacking").for_domain("dmc").continuous == "mean"


def test_bad_settings_are_refused(make_agent):
    for settings, message in (
        ({"continuous": "best"}, "continuous is 'best'"),
        ({"continuous": "mean, atari"}, "continuous is 'mean, atari'"),
        ({"continuous": "mean, atari best"}, "continuous is 'mean, atari best'"),
        ({"continuous": ""}, "continuous is ''"),
        ({"discrete": "mean"}, "discrete is 'mean'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"memory": -1}, "memory is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_agent(**settings)
    sinusoidal = dataclasses.replace(NETWORK, sequence_positions="sinusoidal")
    with pytest.raises(ValueError, match="memory needs positions that are relative"):
        make_agent(sinusoidal, memory=100)
    with pytest.raises(ConfigError, match="32000 text pieces, but text_rows is 1024"):
        Agent(NETWORK, trained_like(NETWORK), tk.TextTokenizer(), 90)


def test_bad_observations_are_refused_while_acting(make_agent):
    agent = make_agent()
    for task, broken, message in (
        ("metaworld/drawer-close", np.zeros(38), r"observation has shape \(1, 38\), expected"),
        ("metaworld/drawer-close", np.full(39, np.nan), "observation holds NaN"),
        ("metaworld/drawer-close", np.zeros(39, np.int64), "observation has dtype int64"),
        ("babyai/GoToObj", {"mission": "go"}, r"observation has keys \['mission'\], expected"),
    ):
        player = agent.player(agent.tokenizer(domains.make_env(task)), [0])
        with pytest.raises(DataError, match=message):
            player.act([broken])


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_stay_at_the_front(make_agent, demonstrations):
    task = "babyai/GoToObj"
    env, agent = domains.make_env(task), make_agent(context=90)
    tokenizer = agent.tokenizer(env)
    demonstration = demonstrations[task][0]
    first = env.reset(seed=0)[0]
    end = agent.prompt(tokenizer, demonstration, "end", first)
    start = agent.prompt(tokenizer, demonstration, "start", first)
    assert len(end[0]) >= 1 and len(end[0]) == len(end[1])
    np.testing.assert_array_equal(
        end[0][-1]["image"], demonstration.observations["image"][demonstration.steps - 1]
    )
    np.testing.assert_array_equal(start[0][0]["image"], demonstration.observations["image"][0])
    player = agent.player(tokenizer, [0], [end])
    shown = tokenizer.steps(*end[:1], np.stack(end[1]))
    for seed in range(6):
        player.act([env.reset(seed=seed)[0]])
        np.testing.assert_array_equal(player.window(0).ids[: len(shown)], shown.ids)
    with pytest.raises(ValueError, match="prompt is 'middle'"):
        agent.prompt(tokenizer, demonstration, "middle", first)


@pytest.mark.parametrize("where", ["start", "end"])
def test_prompts_leave_room_for_a_longer_instruction(make_agent, demonstrations, where):
    task = "babyai/GoToObj"
    env = domains.make_env(task)
    tokenizer = make_agent().tokenizer(env)
    demonstration = demonstrations[task][0]
    each = len(tokenizer.episode(demonstration)) // demonstration.steps
    observation = env.reset(seed=0)[0]
    observation["mission"] += " and then go to the box"
    longer = int(tokenizer.steps([observation], np.zeros((1, 1), np.int32)).offsets[-1])
    assert each < longer < 2 * each
    for context, prompted in ((2 * each, 0), (longer + each - 1, 0), (longer + each, 1)):
        tight = make_agent(context=context)
        prompt = tight.prompt(tokenizer, demonstration, where, observation)
        assert len(prompt[0]) == prompted
        player = tight.player(tokenizer, [0], [prompt])
        player.act([observation])
        assert player.action_ids.shape == (1, 1)


def test_a_timestep_that_does_not_fit_beside_the_prompt_is_refused(make_agent, demonstrations):
    task = "babyai/GoToObj"
    env, short = domains.make_env(task), make_agent(context=40)
    tokenizer = short.tokenizer(env)
    observation = env.reset(seed=0)[0]
    demonstration = demonstrations[task][0]
    step = (
        [select(demonstration.observations, 0)],
        tokenizer.action_spec.encode(demonstration.actions)[:1],
    )
    player = short.player(tokenizer, [0], [step])
    with pytest.raises(ValueError, match="the newest timestep has"):
        player.act([observation])


# --- evaluation -----------------------------------------------------------------------------------


def last(iterator):
    (item,) = collections.deque(iterator, maxlen=1)
    return item


def test_evaluations_are_reproducible_and_resume(tmp_path, make_agent, demonstrations):
    agent, tasks = make_agent(context=90), ("babyai/GoToObj",)
    how = Evaluation(lambda: agent, 0, lambda t: demonstrations[t], "end")
    path, again = tmp_path / "episodes.csv", tmp_path / "again.csv"
    straight = last(rollouts(how, tasks, 3, again, lanes=2))
    cut = rollouts(how, tasks, 3, path, lanes=2)
    next(cut)
    cut.close()
    assert pd.read_csv(path)["index"].tolist() == [0, 1]
    resumed = last(rollouts(how, tasks, 3, path, lanes=2))
    pd.testing.assert_frame_equal(straight, resumed, check_dtype=False, check_exact=True)
    assert path.read_text() == again.read_text()
    assert straight["index"].tolist() == [0, 1, 2]
    assert len(next(rollouts(how, tasks, 2, path))) == 2, "nothing is left to play"
    other = dataclasses.replace(how, seed=1)
    last(rollouts(other, tasks, 1, path, lanes=2))
    kept = pd.read_csv(path)
    assert sorted(zip(kept.seed, kept["index"], strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    with pytest.raises(KeyError, match="unknown task"):
        next(rollouts(how, ("babyai/Nowhere",), 1))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"episodes.csv: not a table of played episodes"):
        next(rollouts(how, tasks, 1, path))
    with pytest.raises(ValueError, match="prompt 'end' needs demonstrations"):
        Evaluation(lambda: agent, 0, prompt="end")


def test_a_batch_has_one_domain_and_the_same_spaces():
    assert batches(("sokoban/8x8-2",), 5, 2) == [
        (("sokoban/8x8-2", 0), ("sokoban/8x8-2", 1)),
        (("sokoban/8x8-2", 2), ("sokoban/8x8-2", 3)),
        (("sokoban/8x8-2", 4),),
    ]
    tasks = ("sokoban/8x8-2", "dmlab/Sign", "dmlab/OneRoom", "sokoban/10x10-4", "dmlab/Hallway")
    assert [[task for task, _ in batch] for batch in batches(tasks, 1, 2)] == [
        ["sokoban/8x8-2"],
        ["dmlab/Sign"],
        ["dmlab/OneRoom", "dmlab/Hallway"],
        ["sokoban/10x10-4"],
    ]


def test_tasks_of_a_domain_are_played_together(make_agent):
    agent = make_agent(context=120)
    tasks = ("dmlab/Sign", "dmlab/OneRoom", "dmlab/Hallway")
    played = last(rollouts(Evaluation(lambda: agent, 0), tasks, 1, lanes=2))
    assert played.task.tolist() == sorted(tasks) and (played.steps > 0).all()
    assert not evaluation._idle, "environments are closed"


def test_a_film_is_the_episode_that_is_scored(tmp_path, make_agent):
    agent, task = make_agent(context=90), "babyai/GoToObj"
    (row,) = Evaluation(lambda: agent, 0).play(((task, 1),))
    film = films.film(agent, task, 0, 1, most=5)
    assert (film.score, film.success, film.steps) == (row["score"], row["success"], row["steps"])
    assert film.frames.shape == (min(5, film.steps + 1), 64, 64, 3)
    env = domains.make_env(task)
    first = env.reset(seed=evaluation.episode_seed(task, 0, 1))[0]["image"]
    np.testing.assert_array_equal(film.frames[0], first)
    shown = plotting.save_video(film.frames, "film", tmp_path, "a_notebook", fps=5)
    with PIL.Image.open(tmp_path / "film.gif") as gif:
        assert 1 < gif.n_frames <= len(film.frames) and gif.size == (
            64,
            64,
        )  # equal ones are joined
        first = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(first - film.frames[0]).mean() < 8
    assert shown.data == (tmp_path / "film.gif").read_bytes()
    assert json.loads((tmp_path / "film.json").read_text())["notebook"] == "a_notebook"


def test_a_film_has_the_tokens_and_actions_of_its_steps(make_agent):
    agent, task = make_agent(context=90), "babyai/GoToObj"
    film = films.film(agent, task, 0, 1, most=4)
    assert film.tokens.steps == len(film.actions) == film.steps
    assert film.moments[0] == 0 and film.moments[-1] == film.steps
    env = domains.make_env(task)
    observation, _ = env.reset(seed=evaluation.episode_seed(task, 0, 1))
    tokenizer = agent.tokenizer(env)
    for step, action in enumerate(film.actions):  # played again, action by action
        ids = tokenizer.action_spec.encode(np.array([action]))
        own = slice(*film.tokens.offsets[step : step + 2])
        np.testing.assert_array_equal(
            film.tokens.ids[own], tokenizer.steps([observation], ids).ids, strict=True
        )
        told = films.told(film, step)
        assert f"<b>action</b>: {ids[0, 0]}, which is {action}" in told
        assert f"step {step + 1} of {film.steps}" in told and "16 patches" in told
        assert observation["mission"] in told
        observation, *_ = env.step(action)
    np.testing.assert_array_equal(film.frames[-1], observation["image"])
    assert films.told(film, film.steps) == f"after the last of {film.steps} steps"


def test_what_a_film_tells_is_escaped_and_cut(make_agent):
    film = films.film(make_agent(context=90), "babyai/GoToObj", 0, 1, most=2)
    kinds = film.tokens.kinds.copy()
    text = np.flatnonzero(kinds == sq.TEXT)
    assert len(text) and text[0] < film.tokens.offsets[1]
    bare = films.told(dataclasses.replace(film, text=None), 0, most=1)
    assert f"<b>text</b>: {film.tokens.ids[text[0]]} ...<br>" in bare

    class Evil:
        def decode(self, ids):
            return "<script>"

    assert "<script>" not in films.told(dataclasses.replace(film, text=Evil()), 0)


def test_the_player_shows_what_its_slider_says(make_agent):
    film = films.film(make_agent(context=90), "babyai/GoToObj", 0, 1, most=4)
    box = films.player(film)
    (_, slider), (picture, words) = box.children[0].children, box.children[1].children
    for number, moment in enumerate(film.moments):
        slider.value = number
        assert words.value == films.told(film, int(moment))
        with PIL.Image.open(io.BytesIO(picture.value)) as shown:
            np.testing.assert_array_equal(np.asarray(shown), film.frames[number])


@pytest.mark.slow
def test_worker_processes_play_as_this_process_does(tmp_path):
    run = workbook.Run.at(str(tmp_path), "smoke")
    folder = workbook.tiny_agent(run, "generalist", 0)
    how = Evaluation(workbook.Loader(str(folder)), 0)
    tables = [last(rollouts(how, workbook.SMALL_TASKS, 3, lanes=2, workers=n)) for n in (1, 2)]
    pd.testing.assert_frame_equal(*tables)
