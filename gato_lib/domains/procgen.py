"""Procgen: arcade games whose levels are drawn anew each episode (paper 3.1, App. F).

Optional: the `procgen` package has wheels for few Pythons and demands an old numpy that it does not
need; `experiments/procgen-requirements.txt` installs a build that works. The games are played in
their "easy" distribution with unlimited levels; of the sixteen, caveflyer has no expert here. The
agent sees their 64 x 64 image.

The paper's demonstrations are of R2D2 agents. Here the expert plans in copies of the game at hand.
Copies know what the random numbers to come are, so these experts are clairvoyant: an agent that
imitates them can at best match what is predictable in their play.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Domain, Expert, TaskSpec, random_share

IMAGE = 64
MAX_STEPS = 1000  # the games' own limit; leaper's is 500
LEFT, LEFT_UP, DOWN, STAY, UP, RIGHT, RIGHT_UP, FIRE = 1, 2, 3, 4, 5, 7, 8, 9


@functools.cache
def _package() -> Any:
    """`procgen`, without its registration in the old `gym`, which nothing here needs."""
    name = "procgen.gym_registration"
    if name not in sys.modules:
        stub = types.ModuleType(name)
        stub.register_environments = lambda: None
        sys.modules[name] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its version file open
        import procgen
    return procgen


def _games(name: str, number: int, seed: int) -> Any:
    """`number` games side by side, stepped in one thread. Making them takes a millisecond."""
    return _package().ProcgenGym3Env(
        num=number, env_name=name, distribution_mode="easy", rand_seed=seed, num_threads=0
    )


class Procgen(gym.Env):
    """One game. An episode ends with it; what the game shows then is already the next level, so
    the last observation repeats the one before.
    """

    observation_space = gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (IMAGE, IMAGE, 3), np.uint8)}
    )
    action_space = gym.spaces.Discrete(15)

    def __init__(self, name: str):
        self._name, self._game = name, None

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.close()
        self.episode_seed = int(self.np_random.integers(2**31 - 1))
        self._game = _games(self._name, 1, self.episode_seed)
        self._steps = 0
        self._image = self._game.observe()[1]["rgb"][0].copy()
        return {"image": self._image}, {}

    def step(self, action: int):
        self._game.act(np.array([action], np.int32))
        reward, observation, first = self._game.observe()
        self._steps += 1
        over = bool(first[0])
        timeout = self._steps >= MAX_STEPS
        if not over:
            self._image = observation["rgb"][0].copy()
        return {"image": self._image}, float(reward[0]), over and not timeout, timeout, {}

    def state(self) -> bytes:
        """All there is to the game, its random numbers to come included."""
        return self._game.get_state()[0]

    def close(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = None


def entities(state: bytes) -> np.ndarray:
    """(n, 3) of what moves or can be met in a serialised game: x and y in cells, and its type."""
    word = functools.partial(np.frombuffer, state)
    at = 4  # the format's version

    def skip_text() -> None:
        nonlocal at
        at += 4 + int(word("<i4", 1, at)[0])

    skip_text()  # the game's name
    at += 17 * 4  # options
    for _ in range(2):  # random generators
        at += 4
        skip_text()
    at += 16 * 4  # this step, the episode's level and time
    number = int(word("<i4", 1, at)[0])
    fields = word("<f4", number * 31, at + 4).reshape(number, 31)
    return np.column_stack([fields[:, :2], fields[:, 6].view("<i4")])


PLAYER = 0  # type of the agent, in all games


def _rightwards(things: np.ndarray) -> float:
    """A tenth of a point for each cell that the agent is further to the right."""
    return 0.1 * things[things[:, 2] == PLAYER][-1, 0]


def _upwards(things: np.ndarray) -> float:
    return 0.1 * things[things[:, 2] == PLAYER][-1, 1]


def _near(things: np.ndarray) -> float:
    """A twentieth of a point for each cell nearer to the nearest thing of type 1, the goal."""
    agent, goals = things[things[:, 2] == PLAYER][-1], things[things[:, 2] == 1]
    return -0.05 * np.abs(goals - agent)[:, :2].sum(1).min() if len(goals) else 0.0


def _climbing(things: np.ndarray) -> float:
    """Like `_near` the lowest thing of type 1, height first."""
    agent, coins = things[things[:, 2] == PLAYER][-1], things[things[:, 2] == 1]
    if not len(coins):
        return 0.0
    dx, dy, _ = np.abs(coins[coins[:, 1].argmin()] - agent)
    return -0.05 * dy - 0.005 * dx


def _fewer(things: np.ndarray) -> float:
    """A point for each thing taken or opened."""
    return -float(len(things))


def _nowhere(things: np.ndarray) -> float:
    return 0.0


@dataclasses.dataclass(frozen=True)
class Shooting:
    """Plan by trying many action sequences, for games that reward often.

    Attributes:
      plans: sequences tried at a time.
      horizon: their length.
      hold: actions are constant over so many steps; the next plan is made after as many.
      death: what the end of the game without a reward costs.
    """

    plans: int = 32
    horizon: int = 24
    hold: int = 3
    death: float = 10.0
    actions: tuple[int, ...] = tuple(range(10))


@dataclasses.dataclass(frozen=True)
class Searching:
    """Plan by beam search, for games with one goal.

    States that look the same are one: the search goes on from that of the better parent.

    Attributes:
      actions: tried in each state, each for `hold` steps.
      width: states kept at each depth, those of the highest return plus potential.
      depth: most actions looked ahead; a plan that does not reach the goal is played half.
      potential: what a position (see `entities`) is worth, in points.
      static: nothing but the agent moves, so that no place is worth being in twice.
    """

    actions: tuple[int, ...]
    hold: int
    width: int = 8
    depth: int = 24
    potential: Callable[[np.ndarray], float] = _nowhere
    static: bool = False


_WALK = (LEFT, RIGHT, UP, DOWN)
_JUMP = (RIGHT, RIGHT_UP, UP, LEFT, LEFT_UP, STAY)

# Name -> how its expert plans, and the scores 0 and 1 of Cobbe et al. 2020 (appendix C, easy).
GAMES: dict[str, tuple[Shooting | Searching, float, float]] = {
    "starpilot": (Shooting(plans=64, horizon=28, death=30.0), 2.5, 64),
    "fruitbot": (Shooting(plans=24, horizon=30), -1.5, 32.4),
    "bigfish": (Shooting(plans=48, horizon=40, hold=5, death=30.0), 1, 40),
    "dodgeball": (Shooting(), 1.5, 19),
    "plunder": (Shooting(plans=24), 4.5, 30),
    "bossfight": (Shooting(plans=24, horizon=20, hold=4), 0.5, 13),
    "chaser": (Shooting(), 0.5, 13),
    "miner": (Shooting(), 1.5, 13),
    "coinrun": (Searching(_JUMP, 4, potential=_rightwards), 5, 10),
    "climber": (Searching(_JUMP, 4, potential=_climbing), 2, 12.6),
    "ninja": (Searching(_JUMP, 4, 16, potential=_rightwards), 3.5, 10),
    "leaper": (Searching((*_WALK, STAY), 4, 20, potential=_upwards), 3, 10),
    "maze": (Searching(_WALK, 1, 16, 200, static=True), 5, 10),
    "heist": (Searching(_WALK, 2, 12, 60, _fewer, static=True), 3.5, 10),
    "jumper": (Searching(_JUMP, 4, potential=_near), 3, 10),
}


class _Copies:
    """Copies of a game, each to be set to any state."""

    def __init__(self, name: str, number: int):
        self._game, self._number = _games(name, number, 0), number

    def run(
        self, states: list[bytes], actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Play `actions` (n, steps) from each state.

        Returns the rewards (n, steps), 0 after the end, the step of the end (n,) or -1, and the
        images at last (n, 64, 64, 3).
        """
        number, steps = actions.shape
        for i, state in enumerate(states):
            self._game.call_c_func("set_state", i, state, len(state))
        self._game.observe()
        rewards, end = np.zeros((number, steps)), np.full(number, -1)
        padded = np.full(self._number, STAY, np.int32)
        for step in range(steps):
            padded[:number] = actions[:, step]
            self._game.act(padded)
            reward, observation, first = self._game.observe()
            rewards[:, step] = np.where(end < 0, reward[:number], 0.0)
            end[(end < 0) & first[:number]] = step
            if (end >= 0).all():
                break
        return rewards, end, observation["rgb"][:number]

    def state(self, index: int) -> bytes:
        size = 2**17
        buffer = self._game._ffi.new(f"char[{size}]")
        length = self._game.call_c_func("get_state", index, buffer, size)
        return bytes(self._game._ffi.buffer(buffer, length))


class Planner(Expert):
    """Plays a plan made in copies of the game, and makes a new one where it ends or is left."""

    def __init__(self, name: str):
        self._name = name
        self._how = GAMES[name][0]
        self._copies: _Copies | None = None

    def reset(self, env: gym.Env) -> None:
        self._env: Procgen = env.unwrapped
        self._rng = np.random.default_rng(self._env.episode_seed)
        self._plan: list[int] = []
        self._last: int | None = None
        self._lost = 0  # searches of this episode that did not find the goal
        self._tail: np.ndarray | None = None
        if self._copies is None:
            how = self._how
            number = how.plans if isinstance(how, Shooting) else how.width * len(how.actions)
            self._copies = _Copies(self._name, number)

    def act(self, observation: Any, executed: int | None) -> int:
        if executed is not None and executed != self._last:
            self._plan = []
        if not self._plan:
            shooting = isinstance(self._how, Shooting)
            self._plan = self._shoot(self._how) if shooting else self._search(self._how)
        self._last = self._plan.pop(0)
        return self._last

    def _shoot(self, how: Shooting) -> list[int]:
        """The first actions of the best of many sequences, some like the best one of last time."""
        rng, n = self._rng, how.plans
        blocks = -(-how.horizon // how.hold)
        plans = rng.choice(how.actions, (n, blocks))
        constant = rng.random(n) < 0.3
        plans[constant] = plans[constant, :1]
        if self._tail is not None:
            copies = np.tile(self._tail, (n // 3, 1))
            changed = rng.random(copies.shape) < 0.2
            changed[0] = False
            plans[: n // 3] = np.where(changed, plans[: n // 3], copies)
        actions = np.repeat(plans, how.hold, axis=1)[:, : how.horizon]
        rewards, end, _ = self._copies.run([self._env.state()] * n, actions)
        value = rewards @ 0.995 ** np.arange(how.horizon)
        died = (end >= 0) & (rewards[np.arange(n), end] <= 0)
        value -= np.where(died, how.death * 0.98**end, 0.0)
        best = int((value + 1e-3 * rng.random(n)).argmax())
        self._tail = np.append(plans[best, 1:], rng.choice(how.actions))
        return [int(a) for a in actions[best, : how.hold]]

    def _search(self, how: Searching) -> list[int]:
        """The way to the goal, or half of the most promising one where none leads there."""
        # Another rhythm after a search that failed: it may be what kept the goal out of reach.
        hold = max(1, how.hold + (0, -1, 2, -2)[self._lost % 4])
        beam: list[tuple[float, float, bytes, list[int]]] = [(0.0, 0.0, self._env.state(), [])]
        seen: set[Any] = set()
        for _ in range(how.depth):
            pairs = [(node, action) for node in beam for action in how.actions]
            rewards, end, images = self._copies.run(
                [state for (_, _, state, _), _ in pairs],
                np.array([[action] * hold for _, action in pairs]),
            )
            if not how.static:
                seen = set()
            goals, children = [], []
            for i, ((_, gained, _, path), action) in enumerate(pairs):
                gained += float(rewards[i].sum())
                if end[i] >= 0:
                    if rewards[i, end[i]] > 0:
                        goals.append((gained, path + [action] * (int(end[i]) + 1)))
                    continue
                look = images[i].tobytes()
                if look in seen:
                    continue
                seen.add(look)
                state = self._copies.state(i)
                things = entities(state)
                if how.static:
                    x, y, _ = 8 * things[things[:, 2] == PLAYER][-1]
                    place = round(x), round(y), len(things)
                    if place in seen:
                        continue
                    seen.add(place)
                score = gained + how.potential(things)
                children.append((score, gained, state, path + [action] * hold))
            if goals:
                return max(goals, key=lambda goal: goal[0])[1]
            if not children:
                break
            beam = sorted(children, key=lambda child: -child[0])[: how.width]
        self._lost += 1
        path = beam[0][3]
        return path[: max(1, len(path) // 2)] or [STAY]


DOMAINS = (
    Domain(
        name="procgen",
        tasks={
            f"procgen/{name}": TaskSpec(
                id=f"procgen/{name}",
                metric="return",
                floor=high,
                floor_source="highest score of the game, Cobbe et al. 2020, appendix C, easy",
                noise="share of actions replaced by random ones",
                expert="a planner that tries sequences of actions in copies of the game",
                sees="the game's whole state, its random numbers to come included",
            )
            for name, (_, _, high) in GAMES.items()
        },
        make_env=Procgen,
        make_expert=Planner,
        sources=("procgen.py",),
        perturb=random_share,
        requires=("procgen", "gym3"),
        install="make procgen",
    ),
)
