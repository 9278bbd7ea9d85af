"""Atari: seeds fix episodes, what the agent sees, drawn variants, and a look-ahead that is fair."""

from __future__ import annotations

import numpy as np
import pytest

from gato_lib.domains import atari

BASE, EXTENDED = atari.DOMAINS


def play(env, steps, seed=None, expert=None, actions=None):
    """Images, actions and rewards of at most `steps` steps of an episode."""
    observation, _ = env.reset(seed=seed)
    if expert:
        expert.reset(env)
    rng, images, played, rewards = np.random.default_rng(7), [observation["image"]], [], []
    last = None
    for t in range(steps):
        if expert:
            last = expert.act(observation, last)
        else:
            last = int(actions[t] if actions else rng.integers(env.action_space.n))
        observation, reward, terminated, truncated, _ = env.step(last)
        assert env.observation_space.contains(observation)
        images.append(observation["image"])
        played.append(last)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.stack(images), played, rewards


def test_tasks():
    assert len(BASE.tasks) >= 12 and len(EXTENDED.tasks) >= 8
    assert "atari/Boxing" in BASE.tasks and "atari_extended/Boxing" not in EXTENDED.tasks
    for domain in atari.DOMAINS:
        for task, spec in domain.tasks.items():
            assert spec.id == task and spec.domain == domain.name and spec.floor > 0
            assert spec.metric == "return" and "emulator" in spec.sees


@pytest.mark.parametrize("domain", atari.DOMAINS, ids=lambda d: d.name)
def test_seed_fixes_the_episode_also_after_others_and_under_the_expert(domain):
    env, expert = domain.make_env("SpaceInvaders"), domain.make_expert("SpaceInvaders")
    images, actions, rewards = play(env, 15, seed=5, expert=expert)
    again = play(env, 15, seed=5, expert=expert)
    assert np.array_equal(images, again[0]) and actions == again[1] and rewards == again[2]
    play(env, 5, seed=6)
    # Without the look-ahead beside it: that must leave the game's own random state alone.
    replay = play(env, 15, seed=5, actions=actions)
    assert np.array_equal(images, replay[0]) and rewards == replay[2]


def test_other_seed_and_no_seed_are_other_episodes():
    env = BASE.make_env("SpaceInvaders")
    first, *_ = play(env, 40, seed=1)
    second, *_ = play(env, 40, seed=2)
    third, *_ = play(env, 40)
    assert not np.array_equal(first, second)  # the same actions stick at other times
    assert not np.array_equal(second, third)


def test_image_is_the_area_average_of_the_last_two_frames():
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3)).astype(np.uint8)
    fine = np.kron(screen.astype(float), np.ones((8, 2, 1))).reshape(80, 21, 64, 5, 3)
    assert np.abs(atari.shrink(screen) - fine.mean(axis=(1, 3))).max() <= 0.5
    assert (atari.shrink(np.full((210, 160, 3), 255, np.uint8)) == 255).all()

    env = BASE.make_env("SpaceInvaders")
    env.ale.setFloat("repeat_action_probability", 0.0)
    observation, _ = env.reset(seed=0)
    assert np.array_equal(observation["image"], atari.shrink(env.ale.getScreenRGB()))
    for _ in range(40):
        start = env.ale.cloneState(include_rng=True)
        observation, *_ = env.step(1)
        end = env.ale.cloneState(include_rng=True)
        env.ale.restoreState(start)
        frames = []
        for _ in range(atari.FRAME_SKIP):
            env.ale.act(env.actions[1])
            frames.append(env.ale.getScreenRGB())
        assert np.array_equal(observation["image"], atari.shrink(np.maximum(*frames[-2:])))
        env.ale.restoreState(end)


def test_variants_are_drawn_by_the_seed():
    env = EXTENDED.make_env("SpaceInvaders")
    variants = set()
    for seed in range(4):
        env.reset(seed=seed)
        variants.add(env.variant)
        assert env.variant[0] in env.ale.getAvailableModes()
        assert env.variant[1] in env.ale.getAvailableDifficulties()
    assert len(variants) > 2
    chosen = env.variant
    env.reset(seed=0)
    env.reset(seed=3)
    assert env.variant == chosen


@pytest.mark.parametrize("name", ["Freeway", "Breakout", "MsPacman"])
def test_look_ahead_foresees_what_happens_where_no_action_sticks(name):
    """State, mode and difficulty pass from the game's emulator to the expert's."""
    env, expert = EXTENDED.make_env(name), EXTENDED.make_expert(name)
    for ale in (env.ale, expert._ale):
        ale.setFloat("repeat_action_probability", 0.0)
    for seed in range(3):
        env.reset(seed=seed)
        expert.reset(env)
        for action in np.random.default_rng(seed).integers(env.action_space.n, size=30):
            expert._ale.restoreState(env.ale.cloneState())
            env.step(action)
            expert._ale.act(env.actions[action])
            assert np.array_equal(env.ale.getRAM(), expert._ale.getRAM()), env.variant
            assert env.ale.lives() == expert._ale.lives()


def test_a_lost_life_goes_on_and_the_step_limit_truncates():
    env = BASE.make_env("Breakout")
    env.reset(seed=0)
    lives, steps, lost = env.ale.lives(), 0, False
    while True:
        _, _, terminated, truncated, _ = env.step(1)
        steps += 1
        lost |= env.ale.lives() < lives
        assert terminated == env.ale.game_over()
        if terminated or truncated:
            break
    assert lost and terminated and steps < atari.GAMES["Breakout"].steps

    env = BASE.make_env("Boxing")
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(atari.GAMES["Boxing"].steps)]
    assert ends[-1] == (False, True) and not any(map(any, ends[:-1]))


def test_expert_beats_random_also_where_its_actions_are_replaced():
    env, expert = BASE.make_env("Boxing"), BASE.make_expert("Boxing")
    chance = [sum(play(env, 70, seed=s)[2]) for s in range(3)]
    assert sum(play(env, 70, seed=1, expert=expert)[2]) > max(chance)

    rng, observation = np.random.default_rng(0), env.reset(seed=2)[0]
    expert.reset(env)
    last, total = None, 0.0
    for _ in range(70):
        last = BASE.perturb(expert.act(observation, last), 0.2, env, rng)
        observation, reward, *_ = env.step(last)
        total += reward
    assert total > max(chance)


def test_pong_expert_wins_a_point():
    env, expert = BASE.make_env("Pong"), BASE.make_expert("Pong")
    assert sum(play(env, 100, seed=1, expert=expert)[2]) == 1.0
