"""The convolutional baseline: training, files, and acting in place of an agent."""

from __future__ import annotations

import dataclasses
import json

import gymnasium as gym
import jax
import numpy as np
import pytest

from gato_lib import cloning, domains
from gato_lib.cloning import CloneLoader, CloningConfig, Layout, load_cloner, train_cloner
from gato_lib.collection import rollout
from gato_lib.config import ConfigError
from gato_lib.episodes import DataError, Episode
from gato_lib.evaluation import Evaluation, close_environments

SIDE = 32
TINY = CloningConfig(
    channels=(4, 8, 8), width=32, steps=30, batch_size=16, warmup_steps=5, validation_fraction=0.25
)
ACTIONS = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 5], np.float32))


def toy_space(**more: gym.Space) -> gym.spaces.Dict:
    image = gym.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
    state = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    return gym.spaces.Dict({"camera": image, "robot": gym.spaces.Dict({"state": state}), **more})


def toy_episodes(count: int, steps: int = 12) -> list[Episode]:
    """A bright square; the first action says where it is, the second what the state is."""
    rng = np.random.default_rng(0)
    episodes = []
    for seed in range(count):
        places = rng.integers(0, SIDE - 8, (steps + 1, 2))
        camera = np.zeros((steps + 1, SIDE, SIDE, 3), np.uint8)
        for image, (down, right) in zip(camera, places, strict=True):
            image[down : down + 8, right : right + 8] = 250
        # Numbers of very different size, one of which never changes.
        state = np.stack([1000 + 50 * rng.normal(size=steps + 1), places[:, 0] * 0.001], axis=1)
        state = np.concatenate([state, np.full((steps + 1, 1), 7.0)], axis=1)
        first = places[:-1, 1] / (SIDE - 8) * 4 - 2
        second = np.clip(2.5 + (state[:-1, 0] - 1000) / 50, 0, 5)
        actions = np.stack([first, second], axis=1).astype(np.float32)
        observations = {"camera": camera, "robot": {"state": state}}
        rewards = np.zeros(steps)
        # What was executed is not what should be imitated.
        episodes.append(Episode("toy", observations, actions, -actions, rewards, True, seed))
    return episodes


class Toy:
    observation_space, action_space = toy_space(), ACTIONS


def observed(episode: Episode, step: int) -> dict:
    seen = episode.observations
    return {"camera": seen["camera"][step], "robot": {"state": seen["robot"]["state"][step]}}


def act(cloner, observations: list, first_seed: int = 0) -> np.ndarray:
    seeds = range(first_seed, first_seed + len(observations))
    return np.stack(cloner.player(cloner.tokenizer(Toy), seeds).act(observations))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Root, folder and metrics of a policy that was trained on toy episodes."""
    root = tmp_path_factory.mktemp("clones")
    config = dataclasses.replace(TINY, steps=500, peak_lr=1e-2, warmup_steps=20, batch_size=32)
    return root, config, *train_cloner(root, "toy", toy_episodes(16), toy_space(), ACTIONS, config)


def test_it_learns_from_image_and_state_and_is_better_than_the_mean_action(trained):
    _, _, folder, metrics = trained
    assert list(metrics.step) == [200, 400, 500]
    assert metrics.loss.iloc[-1] < metrics.loss.iloc[0] - 1.0
    unseen = toy_episodes(20)[-4:]
    found = act(load_cloner(folder), [observed(e, t) for e in unseen for t in range(e.steps)])
    errors = np.abs(found - np.concatenate([e.actions for e in unseen])).mean(axis=0)
    spread = np.abs(np.concatenate([e.actions - e.actions.mean(axis=0) for e in unseen])).mean(0)
    assert (errors < 0.4 * spread).all(), (errors, spread)
    # A single Gaussian of the right mean and spread has 0.5 log(2 pi e variance).
    scaled = load_cloner(folder).layout.scale(np.concatenate([e.actions for e in unseen]))
    assert metrics.validation_loss.iloc[-1] < np.mean(1.42 + np.log(scaled.std(axis=0)))


def test_images_and_numbers_each_change_the_action(trained):
    cloner, episode = load_cloner(trained[2]), toy_episodes(1)[0]
    seen = observed(episode, 0)
    seen["camera"], camera = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    seen["camera"][12:20, :8] = camera[12:20, -8:] = 250  # from the left edge to the right
    moved = seen | {"camera": camera}
    other = seen | {"robot": {"state": seen["robot"]["state"] + [80.0, 0.0, 0.0]}}
    here, there, then = act(cloner, [seen, moved, other])
    assert abs(here[0] - there[0]) > 0.3
    assert abs(here[1] - then[1]) > 0.3


def test_rows_of_a_batch_do_not_depend_on_each_other_and_actions_keep_their_bounds(trained):
    cloner, episode = load_cloner(trained[2]), toy_episodes(1)[0]
    seen = [observed(episode, t) for t in range(5)]
    together = act(cloner, seen)
    assert together.dtype == np.float32 and together.shape == (5, 2)
    alone = np.concatenate([act(cloner, [o], seed) for seed, o in enumerate(seen)])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert (together != act(cloner, seen, first_seed=5)).any(axis=1).all()
    wild = seen[0] | {"robot": {"state": np.array([1e9, -1e9, 1e9])}}
    assert ACTIONS.contains(act(cloner, [wild])[0])


def test_the_density_is_that_of_the_mixture_and_what_is_drawn_follows_it():
    rng = np.random.default_rng(0)
    logits, means = rng.normal(size=(2, 3)), rng.normal(size=(2, 3, 2))
    deviations = rng.uniform(0.1, 1.0, (2, 3, 2))
    weights = np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    mixture, actions = (weights, means, deviations), rng.normal(size=(2, 2))
    each = np.exp(-0.5 * ((actions[:, None] - means) / deviations) ** 2)
    each = (each / (deviations * np.sqrt(2 * np.pi))).prod(axis=2)
    expected = np.log((np.exp(weights) * each).sum(axis=1))
    np.testing.assert_allclose(cloning.log_density(mixture, actions), expected, rtol=1e-4)

    row = [part[:1].repeat(20_000, axis=0) for part in mixture]
    drawn = cloning.draw(row, [rng] * 20_000)
    share = np.exp(weights[0])[:, None]
    mean = (share * means[0]).sum(axis=0)
    variance = (share * (deviations[0] ** 2 + means[0] ** 2)).sum(axis=0) - mean**2
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.04)
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.05)


def test_two_ways_to_act_are_both_taken_and_never_their_mean():
    episodes = toy_episodes(16)
    for episode in episodes:  # left or right, and nothing that is seen says which
        side = np.random.default_rng(episode.seed).choice([-1.0, 1.0], episode.steps)
        episode.actions[:, 0] = side
    config = dataclasses.replace(TINY, steps=400, peak_lr=1e-2, batch_size=32)
    *_, (_, params, norm) = cloning.fit(episodes, [], toy_space(), ACTIONS, config)
    layout = Layout.of(toy_space(), ACTIONS)
    cloner = cloning.Cloner(layout, cloning._shell(layout, config)[0], params, norm)
    found = act(cloner, [observed(episodes[0], 0)] * 64)[:, 0]
    assert ((np.abs(found) > 0.7) & (np.abs(found) < 1.3)).mean() > 0.9
    assert 0.2 < (found > 0).mean() < 0.8


def test_rows_may_leave_and_what_does_not_fit_is_refused(trained):
    cloner, episode = load_cloner(trained[2]), toy_episodes(1)[0]
    seen = [observed(episode, t) for t in range(3)]
    player = cloner.for_domain("toy").player(cloner.tokenizer(Toy), [0, 1, 2], [None] * 3)
    player.act(seen)
    player.only([2, 0])
    left = player.act([seen[2], seen[0]])
    for row, seed in zip(left, (2, 0), strict=True):  # as if it had been alone from the start
        alone = cloner.player(cloner.tokenizer(Toy), [seed])
        alone.act([seen[seed]])
        np.testing.assert_allclose(row, alone.act([seen[seed]])[0], atol=1e-4)
    with pytest.raises(ValueError, match="3 observations for 2"):
        player.act(seen)
    with pytest.raises(DataError, match="camera has shape"):
        player.act([seen[0], seen[1] | {"camera": np.zeros((16, 16, 3), np.uint8)}])
    with pytest.raises(ValueError, match="no prompt"):
        cloner.player(cloner.tokenizer(Toy), [0], [([], [])])

    class Other:
        observation_space = toy_space(more=gym.spaces.Box(0, 1, (2,), np.float32))
        action_space = ACTIONS

    with pytest.raises(DataError, match="was trained for"):
        cloner.tokenizer(Other)


def parameters(config: CloningConfig, episodes: list[Episode]) -> list[np.ndarray]:
    *_, (_, params, _) = cloning.fit(episodes, [], toy_space(), ACTIONS, config)
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def test_the_seed_decides_everything():
    episodes = toy_episodes(4)
    config = dataclasses.replace(TINY, shift=2)
    first, again = parameters(config, episodes), parameters(config, episodes)
    other = parameters(dataclasses.replace(config, seed=1), episodes)
    unmoved = parameters(dataclasses.replace(config, shift=0), episodes)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    assert any((a != b).any() for a, b in zip(first, unmoved, strict=True))


@pytest.mark.parametrize("pool", cloning.POOLS)
def test_what_is_saved_acts_as_what_was_trained(pool, tmp_path):
    config, episodes = dataclasses.replace(TINY, pool=pool), toy_episodes(4)
    layout = Layout.of(toy_space(), ACTIONS)
    *_, (_, params, norm) = cloning.fit(episodes, [], toy_space(), ACTIONS, config)
    cloning.save_cloner(tmp_path, layout, config, params, norm)
    graph, _ = cloning._shell(layout, config)
    live, seen = cloning.Cloner(layout, graph, params, norm), [observed(episodes[0], 3)]
    assert (act(live, seen) == act(CloneLoader(str(tmp_path))(), seen)).all()


def test_a_finished_policy_is_not_trained_again(trained, monkeypatch):
    root, config, folder, metrics = trained
    monkeypatch.setattr(cloning, "fit", lambda *a: pytest.fail("trained again"))
    again = train_cloner(root, "toy", toy_episodes(16), toy_space(), ACTIONS, config)
    assert again[0] == folder and again[1].equals(metrics)


def test_the_folder_is_named_by_settings_and_data(tmp_path):
    made = {
        train_cloner(tmp_path, "a", episodes, toy_space(), ACTIONS, config)[0].name
        for config in (TINY, dataclasses.replace(TINY, seed=1))
        for episodes in (toy_episodes(4), toy_episodes(5))
    }
    assert len(made) == 4
    assert {p.name for p in tmp_path.iterdir()} == made  # nothing half-written is left


def test_one_pixel_of_the_data_changes_its_digest():
    episodes = toy_episodes(2)
    before = cloning.content(episodes)
    assert cloning.content(toy_episodes(2)) == before
    episodes[1].observations["camera"][3, 4, 5] ^= 1
    assert cloning.content(episodes) != before


@pytest.mark.parametrize("file", ["meta.json", "params.npz"])
def test_a_damaged_file_is_named(file, trained, tmp_path):
    for name in ("meta.json", "params.npz"):
        (tmp_path / name).write_bytes((trained[2] / name).read_bytes())
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=file):
        load_cloner(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_cloner(tmp_path)


def test_parameters_of_another_network_are_refused(trained, tmp_path):
    meta = json.loads((trained[2] / "meta.json").read_text())
    meta["config"]["width"] = 48
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "params.npz").write_bytes((trained[2] / "params.npz").read_bytes())
    with pytest.raises(DataError, match="params.npz: its arrays"):
        load_cloner(tmp_path)


def test_a_shift_moves_the_image_and_repeats_its_border():
    image = np.arange(1, 13, dtype=np.uint8).reshape(1, 3, 4, 1).repeat(3, axis=-1)
    (moved,) = cloning.shifted(image, np.array([[1, -1]]))[..., 0]
    assert moved.tolist() == [[2, 3, 4, 4], [2, 3, 4, 4], [6, 7, 8, 8]]
    two = cloning.shifted(image.repeat(2, axis=0), np.array([[0, 0], [1, -1]]))
    assert (two[0] == image[0]).all() and (two[1, ..., 0] == moved).all()


def test_held_out_episodes_are_whole_and_never_trained_on():
    episodes = toy_episodes(9)
    train, held_out = cloning.split(episodes, TINY)
    assert len(held_out) == 2 and sorted(e.seed for e in train + held_out) == list(range(9))
    with pytest.raises(DataError, match="no episodes"):
        next(cloning.fit([], [], toy_space(), ACTIONS, TINY))


def test_settings_and_spaces_out_of_range_are_refused():
    for change in ({"channels": (4, 8)}, {"pool": "max"}, {"steps": 5}, {"shift": -1}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            dataclasses.replace(TINY, **change)
    assert CloningConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(DataError, match="'words' is text"):
        Layout.of(toy_space(words=gym.spaces.Text(4)), ACTIONS)
    for space in (gym.spaces.Discrete(3), gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)):
        with pytest.raises(DataError, match="expected a Box"):
            Layout.of(toy_space(), space)


# --- RGB Stacking ---------------------------------------------------------------------------------


def demonstrations(task: str, count: int) -> tuple[list[Episode], gym.Env]:
    env, expert = domains.make_env(task), domains.make_expert(task)
    env.close()
    rng = np.random.default_rng(0)
    return [rollout(env, expert, task, seed, 0.1, rng) for seed in range(count)], env


@pytest.mark.parametrize("domain", ["rgb_stacking", "rgb_stacking_state"])
def test_it_is_evaluated_as_an_agent_is(domain, tmp_path, monkeypatch):
    task = f"{domain}/red-on-blue"
    episodes, env = demonstrations(task, 2)
    spaces = env.observation_space, env.action_space
    env.close()
    config = dataclasses.replace(TINY, steps=60, peak_lr=3e-3)
    folder, metrics = train_cloner(tmp_path, "tiny", episodes, *spaces, config, report_every=10)
    assert metrics.loss.iloc[-1] < 0.7 * metrics.loss.iloc[0]
    monkeypatch.setattr(domains.rgb_stacking, "MAX_STEPS", 12)
    rows = Evaluation(CloneLoader(str(folder)), 0).play(((task, 0), (task, 1)))
    close_environments()
    assert [row["index"] for row in rows] == [0, 1]
    assert all(row["steps"] == 12 and row["score"] == 0.0 for row in rows)
