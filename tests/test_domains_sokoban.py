"""Sokoban: rules, rooms, pictures and the solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gato_lib.domains import sokoban
from gato_lib.domains.base import ExpertError

DOMAIN = sokoban.DOMAINS[0]
UP, DOWN, LEFT, RIGHT = range(4)


def board(*rows: str) -> sokoban.Board:
    """`#` wall, `.` target, `$` box, `*` box on target, `@` player, `+` player on target."""
    text = "".join(rows)
    assert len(text) == len(rows) ** 2

    def cells(symbols: str) -> frozenset[int]:
        return frozenset(i for i, c in enumerate(text) if c in symbols)

    (player,) = cells("@+")
    walls = tuple(c == "#" for c in text)
    return sokoban.Board(len(rows), walls, cells(".*+"), cells("$*"), player)


def play(env, expert, seed, noise=0.0):
    """(score, executed actions, last image) of an episode."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    expert.reset(env)
    score, executed, over = 0.0, [], False
    while not over:
        action = expert.act(observation, executed[-1] if executed else None)
        executed.append(DOMAIN.perturb(action, noise, env, rng))
        observation, reward, terminated, truncated, _ = env.step(executed[-1])
        score, over = score + reward, terminated or truncated
    return score, executed, observation["image"]


def test_walls_and_stuck_boxes_stop_the_player():
    b = board("######", "#@$$.#", "# $  #", "#    #", "#    #", "######")
    before = (b.player, b.boxes)
    assert not b.pushes(UP) and not b.pushes(RIGHT)
    for action in (UP, LEFT, RIGHT):  # two boxes in a row do not move
        b.move(action)
        assert (b.player, b.boxes) == before
    b.move(DOWN)
    assert b.player == 13 and b.pushes(RIGHT)
    b.move(RIGHT)
    assert b.player == 14 and 15 in b.boxes and 14 not in b.boxes


def test_rewards_on_and_off_a_target_and_when_solved():
    env = sokoban.Sokoban(6, 1)
    env.reset(seed=0)
    env.board = board("######", "#@$. #", "#  $.#", "#    #", "#    #", "######")
    rewards = [env.step(RIGHT)[1] for _ in range(2)]  # onto the target, and past it
    np.testing.assert_allclose(rewards, [0.9, -1.1])
    env.board = board("######", "#@$. #", "#    #", "#    #", "#    #", "######")
    _, reward, terminated, truncated, _ = env.step(RIGHT)
    assert reward == pytest.approx(10.9) and terminated and not truncated


def test_episodes_are_cut_at_the_step_limit():
    env = DOMAIN.make_env("8x8-2")
    env.reset(seed=0)
    wall = next(a for a in range(4) if not env.board.pushes(a))
    for step in range(1, sokoban.MAX_STEPS + 1):
        *_, terminated, truncated, _ = env.step(wall)
        assert not terminated and truncated == (step == sokoban.MAX_STEPS)
    env.reset()
    assert not env.step(wall)[3]


@pytest.mark.parametrize("name", ["8x8-2", "10x10-4"])
def test_rooms_differ_and_have_solutions(name):
    env, (size, boxes) = DOMAIN.make_env(name), sokoban._ROOMS[name]
    rooms = set()
    for seed in range(10):
        env.reset(seed=seed)
        b = env.board
        rooms.add((b.walls, b.targets, b.boxes))
        wall = np.array(b.walls).reshape(size, size)
        assert wall[[0, -1]].all() and wall[:, [0, -1]].all()
        assert len(b.boxes) == len(b.targets) == boxes and not b.boxes & b.targets
        actions = sokoban.solution_actions(b, sokoban.solve(b, sokoban.ROOM_NODES))
        assert len(actions) <= sokoban.EASY_STEPS
        for action in actions:
            assert not env.board.solved
            env.step(action)
        assert env.board.solved
    assert len(rooms) == 10


@pytest.mark.parametrize("name", ["8x8-2", "10x10-4"])
def test_a_seed_fixes_the_episode(name):
    env, expert = DOMAIN.make_env(name), DOMAIN.make_expert(name)
    first, other, again = (play(env, expert, seed, noise=0.3) for seed in (3, 4, 3))
    assert first[:2] == again[:2] and first[1] != other[1]
    np.testing.assert_array_equal(first[2], again[2])


def test_the_expert_solves_rooms_with_and_without_noise():
    env, expert = DOMAIN.make_env("10x10-4"), DOMAIN.make_expert("10x10-4")
    floor = DOMAIN.tasks["sokoban/10x10-4"].floor
    clean = [play(env, expert, seed)[0] for seed in range(10)]
    noisy = [play(env, expert, seed, noise=0.2)[0] for seed in range(10)]
    assert np.mean(clean) > 0.9 * floor and floor / 2 < np.mean(noisy) < np.mean(clean)
    assert max(clean) < 14.0


def test_the_expert_replans_when_boxes_are_not_where_it_put_them():
    env, expert = DOMAIN.make_env("10x10-4"), DOMAIN.make_expert("10x10-4")
    solved = 0
    for seed in range(10):  # any random push now and then: some rooms become unsolvable
        observation, _ = env.reset(seed=seed)
        expert.reset(env)
        rng, executed, over = np.random.default_rng(seed), None, False
        try:
            while not over:
                action = expert.act(observation, executed)
                executed = int(rng.integers(4)) if rng.random() < 0.1 else action
                *_, terminated, truncated, _ = env.step(executed)
                over = terminated or truncated
        except ExpertError:
            continue
        solved += terminated
    assert solved >= 4


def test_an_unsolvable_room_is_given_up():
    env, expert = DOMAIN.make_env("8x8-2"), DOMAIN.make_expert("8x8-2")
    env.reset(seed=0)
    env.board = board("######", "#$  .#", "#  @ #", "#    #", "#    #", "######")
    expert.reset(env)
    with pytest.raises(ExpertError, match="no solution"):
        expert.act(None, None)


def test_noise_never_pushes_a_box():
    env = DOMAIN.make_env("8x8-2")
    env.reset(seed=0)
    env.board = board("######", "#    #", "# $@$#", "#  . #", "#   .#", "######")
    rng = np.random.default_rng(0)
    assert {DOMAIN.perturb(UP, 1.0, env, rng) for _ in range(50)} == {UP, DOWN, RIGHT}
    assert all(DOMAIN.perturb(LEFT, 0.0, env, rng) == LEFT for _ in range(50))


def test_the_assignment_is_the_least_sum():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = [tuple(row) for row in rng.integers(0, 20, (4, 4)).tolist()]
        sums = [sum(rows[i][j] for i, j in enumerate(p)) for p in itertools.permutations(range(4))]
        assert sokoban.assignment(rows) == min(sums)


def test_walks_are_shortest_and_push_distances_know_dead_ends():
    b = board("######", "#@#  #", "# # .#", "#    #", "# $  #", "######")
    assert sokoban.walk(b, b.boxes, b.player, 9) == [DOWN, DOWN, RIGHT, RIGHT, UP, UP]
    distances = sokoban.push_distances(b)
    assert distances[16] == (0,) and distances[22] == (1,)
    assert 7 not in distances and 25 not in distances and 26 not in distances  # corner; bottom row


def test_pictures_show_whole_cells():
    b = board("######", "#@$. #", "#  * #", "#    #", "#    #", "######")
    image = sokoban.draw(b)
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8
    tiles = image.reshape(6, 8, 6, 8, 3).swapaxes(1, 2)
    kinds = {(0, 0): 1, (1, 1): 5, (1, 2): 3, (1, 3): 2, (2, 3): 4, (3, 3): 0}
    for cell, kind in kinds.items():
        np.testing.assert_array_equal(tiles[cell], sokoban._tiles()[kind])
    assert len({tile.tobytes() for tile in sokoban._tiles()}) == 7


@pytest.mark.parametrize(("name", "side"), [("8x8-2", 64), ("10x10-4", 80)])
def test_spaces_contain_observations(name, side):
    env = DOMAIN.make_env(name)
    observation, _ = env.reset()
    assert observation["image"].shape == (side, side, 3)
    assert env.observation_space.contains(observation)
    assert env.observation_space.contains(env.step(env.action_space.sample())[0])
