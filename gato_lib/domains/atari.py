"""Atari games, in their default mode and in modes drawn anew each episode (paper 3.1, App. F.1-2).

Two of the paper's data sets: `atari` is the default mode and difficulty of each ROM, and
`atari_extended` draws both per episode from those that the ROM offers one player. An action holds
for four frames, each of which repeats the frame before with probability 0.25 (sticky actions,
Machado et al. 2018, https://arxiv.org/abs/1709.06009); a lost life does not end the episode.

The agent sees one image a step: 210 x 160 reduced to 80 x 64 by area averaging, 20 patches of 16 x
16, of the pixel-wise maximum of the last two frames, since many games draw their sprites in every
other frame only.

The paper's demonstrations are of trained Muesli agents. Here the expert looks ahead in a second
emulator that starts from the state of the game at hand. It is given the state but not the random
state, so it knows the rules and what is off the screen but not which actions will stick.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Domain, Expert, TaskSpec, random_share

FRAME_SKIP = 4
STICKY = 0.25
SCREEN = (210, 160)
IMAGE = (80, 64)


# Positions in the RAM: Anand et al. 2019, https://arxiv.org/abs/1906.08226. Pong's bytes 56 and 58
# are the ball's velocity down and left, found by correlation with how it moves.


def _signed(byte: np.uint8) -> int:
    return (int(byte) ^ 128) - 128


def _pong(ram: np.ndarray, aim: int) -> int:
    """Wait where the ball will come, off the paddle's middle by 3 `aim` - 6 pixels: that steers it.

    Aim 0 is not to move.
    """
    x, y, paddle = int(ram[49]), int(ram[54]), int(ram[51])
    dx, dy = -_signed(ram[58]), _signed(ram[56])
    if aim == 0:
        return 0
    if x == 0:
        return 1  # FIRE serves
    if dx > 0:
        y += dy * max(0, 188 - x) // dx
        y = 44 + abs((y - 44 + 163) % 326 - 163)  # reflected at the walls, 44 and 207
    else:
        y = 125
    error = y + 6 - 3 * aim - paddle
    return 0 if abs(error) < 6 else 3 if error > 0 else 2


def _breakout(ram: np.ndarray, aim: int) -> int:
    """Keep the paddle under the ball, off its middle by 3 `aim` pixels; FIRE a new one."""
    ball_x, ball_y, paddle_x = int(ram[99]), int(ram[101]), int(ram[72])
    if ball_y == 0:
        return 1
    error = ball_x + 3 * aim - 15 - paddle_x
    return 0 if abs(error) < 3 else 2 if error > 0 else 3


def _pong_idle(ram: np.ndarray) -> bool:
    """The ball flies off, is far or past the paddle: nothing to decide."""
    return _signed(ram[58]) >= 0 or not 100 <= ram[49] <= 192


@dataclasses.dataclass(frozen=True)
class Game:
    """A game, and how its expert looks ahead.

    A plan is `horizon` numbers below `choices`, constant over blocks of `hold` steps. A number is
    an action or, with a `script`, what the script makes an action of, given the RAM: a plan of such
    numbers is a policy with feedback, which a stuck action does not throw off.

    Attributes:
      floor: a score over a whole game, from the literature (`floor_source`).
      steps: where an episode is truncated.
      plans: how many plans are tried at a time.
      replan: steps until the next look-ahead.
      life: what a lost life costs a plan, in points.
      enough: a plan of this value is taken, and kept while it holds, without trying others.
      to_point: a plan is judged by the first point alone.
      potential: what a plan's last RAM is worth, in points, where points are rarer than `horizon`.
      idle: RAM in which there is nothing to decide, and no look-ahead.
      settle: random plans are one choice for fewer steps than this, then choice 0 for good; a plan
        of choice 0 alone is tried first of all.
    """

    floor: float
    steps: int = 400  # about 27 s of play
    plans: int = 12
    horizon: int = 20
    hold: int = 4
    replan: int = 4
    life: float = 100.0
    choices: int | None = None
    script: Callable[[np.ndarray, int], int] | None = None
    enough: float = math.inf
    to_point: bool = False
    potential: Callable[[np.ndarray], float] | None = None
    idle: Callable[[np.ndarray], bool] | None = None
    settle: int = 0
    floor_source: str = "best linear learner"


# Floors: Mnih et al. 2015 (https://doi.org/10.1038/nature14236), Extended Data Table 2.
GAMES: dict[str, Game] = {
    "Alien": Game(939.2),
    "Amidar": Game(103.4),
    "Assault": Game(628),
    "Asterix": Game(987.3),
    "Asteroids": Game(907.3),
    "BeamRider": Game(929.4, steps=600),
    "Boxing": Game(44, steps=450, horizon=12),
    "Breakout": Game(
        5.2, steps=600, plans=8, horizon=48, hold=16, life=5, choices=11, script=_breakout, enough=1
    ),
    "Centipede": Game(8803),
    "ChopperCommand": Game(1582),
    # RAM 14: how far across the road, at most 177. All the way is worth less than the point.
    "Freeway": Game(19.1, steps=1024, plans=6, horizon=16, potential=lambda ram: ram[14] / 180),
    "Jamesbond": Game(202.8, steps=600),
    "MsPacman": Game(1692),
    "Pong": Game(
        9.3, steps=1500, horizon=68, replan=2, choices=9, script=_pong, enough=1e-9, to_point=True,
        idle=_pong_idle, settle=10, floor_source="human",
    ),
    "Qbert": Game(613.5),
    "RoadRunner": Game(67.7),
    "SpaceInvaders": Game(250.1, horizon=24),
    "StarGunner": Game(1070),
    "UpNDown": Game(3533),
}  # fmt: skip
EXTENDED = (
    "Alien",
    "Amidar",
    "Asteroids",
    "Breakout",
    "Centipede",
    "ChopperCommand",
    "Freeway",
    "MsPacman",
    "Pong",
    "SpaceInvaders",
    "StarGunner",
    "UpNDown",
)


def _rom(name: str) -> str:
    """The file of ale-py's own ROM, which is named ms_pacman for MsPacman."""
    import ale_py.roms

    return str(ale_py.roms.get_rom_path(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()))


def _emulator(frame_skip: int) -> Any:
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setInt("frame_skip", frame_skip)
    ale.setFloat("repeat_action_probability", STICKY)
    return ale


def _start(ale: Any, rom: str, seed: int) -> None:
    """Load the ROM anew: the only way to set the emulator's random state."""
    ale.setInt("random_seed", seed)
    ale.loadROM(rom)


def _overlap(size: int, out: int) -> np.ndarray:
    """How much of each of `size` pixels lies in each of `out` larger ones, in units of 1 / out."""
    fine, coarse = out * np.arange(size), size * np.arange(out)[:, None]
    shared = np.minimum(fine + out, coarse + size) - np.maximum(fine, coarse)
    return np.maximum(shared, 0).astype(np.float32)


_BLOCKS = 10, 32  # greatest common divisors of the sizes: the same weights again in each block
_ROWS = _overlap(SCREEN[0] // _BLOCKS[0], IMAGE[0] // _BLOCKS[0])
_COLUMNS = _overlap(SCREEN[1] // _BLOCKS[1], IMAGE[1] // _BLOCKS[1])


def shrink(screen: np.ndarray) -> np.ndarray:
    """Area averaging (210, 160, 3) -> (80, 64, 3), rounded; all sums are exact integers."""
    rows = _ROWS @ screen.reshape(_BLOCKS[0], -1, SCREEN[1] * 3).astype(np.float32)
    sums = _COLUMNS @ rows.reshape(IMAGE[0], _BLOCKS[1], -1, 3)
    weight = _ROWS.shape[1] * _COLUMNS.shape[1]
    return ((sums.astype(np.int32) + weight // 2) // weight).astype(np.uint8).reshape(*IMAGE, 3)


class Atari(gym.Env):
    """A game. `ale` is its emulator; `variant` the mode and difficulty drawn, if any.

    Experts look ahead in emulators of their own: what sticks here depends on the seed alone.
    """

    def __init__(self, name: str, extended: bool):
        self.rom, self._steps_at_most, self._extended = _rom(name), GAMES[name].steps, extended
        self.ale = _emulator(frame_skip=1)  # frame by frame, to see the last two
        self.ale.loadROM(self.rom)
        self.actions = self.ale.getMinimalActionSet()
        self.action_space = gym.spaces.Discrete(len(self.actions))
        self.observation_space = gym.spaces.Dict(
            {"image": gym.spaces.Box(0, 255, (*IMAGE, 3), np.uint8)}
        )
        self._frames = np.zeros((2, *SCREEN, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.episode_seed = int(self.np_random.integers(1, 2**31))
        _start(self.ale, self.rom, self.episode_seed)
        self.variant = None
        if self._extended:
            self.variant = tuple(
                int(self.np_random.choice(sorted(offered)))
                for offered in (self.ale.getAvailableModes(), self.ale.getAvailableDifficulties())
            )
            self.ale.setMode(self.variant[0])
            self.ale.setDifficulty(self.variant[1])
        self.ale.reset_game()
        self._steps = 0
        self.ale.getScreenRGB(self._frames[0])
        self._frames[1] = self._frames[0]
        return self._observation(), {}

    def step(self, action: int):
        reward = 0
        for frame in range(FRAME_SKIP):
            reward += self.ale.act(self.actions[int(action)])
            if frame >= FRAME_SKIP - 2:
                self.ale.getScreenRGB(self._frames[frame % 2])
        self._steps += 1
        over = self.ale.game_over()
        return self._observation(), float(reward), over, self._steps >= self._steps_at_most, {}

    def _observation(self) -> dict[str, np.ndarray]:
        return {"image": shrink(self._frames.max(axis=0))}


class LookAhead(Expert):
    """Tries plans in an emulator of its own and follows the best one for a few steps.

    Tried are what is left of the last plan, variations of it, choices held, and random blocks.
    Actions stick in its emulator too, so that a plan that needs luck is seldom found good twice.
    """

    discount = 0.98

    def __init__(self, name: str):
        self._game = GAMES[name]
        self._ale = _emulator(FRAME_SKIP)

    def reset(self, env: gym.Env) -> None:
        self._env = env.unwrapped
        self._rng = np.random.default_rng([self._env.episode_seed, 1])
        _start(self._ale, self._env.rom, int(self._rng.integers(1, 2**31)))
        self._choices = self._game.choices or len(self._env.actions)
        self._plan, self._age, self._last = None, 0, None

    def act(self, observation: Any, executed: int | None) -> int:
        ram = self._env.ale.getRAM()
        due = self._age >= self._game.replan or executed != self._last
        if self._plan is None or (due and not (self._game.idle and self._game.idle(ram))):
            self._search()
        self._last = self._action(ram, self._plan[min(self._age, len(self._plan) - 1)])
        self._age += 1
        return self._last

    def _action(self, ram: np.ndarray, choice: int) -> int:
        return self._game.script(ram, choice) if self._game.script else choice

    def _search(self) -> None:
        state, ram = self._env.ale.cloneState(), self._env.ale.getRAM()
        best = -math.inf
        for plan in self._candidates():
            value = self._value(state, ram, plan)
            if value > best:
                best, self._best = value, plan
            if best >= self._game.enough:
                break
        self._plan, self._age = self._best, 0

    def _candidates(self) -> Iterator[list[int]]:
        game, rng, n = self._game, self._rng, self._choices
        left = game.plans
        if game.settle:  # no stuck action can spoil a plan of staying still
            yield [0] * game.horizon
        if self._plan is not None:
            rest = self._plan[self._age :]
            rest = rest + [rest[-1] if rest else 0] * (game.horizon - len(rest))
            yield rest
            variations = max(1, game.plans // 6)
            for _ in range(variations):
                start = int(rng.integers(game.horizon))
                block = [int(rng.integers(n))] * game.hold
                yield (rest[:start] + block + rest[start + game.hold :])[: game.horizon]
            left -= 1 + variations
        held = range(n) if n <= game.plans // 2 else rng.choice(n, game.plans // 3, replace=False)
        for choice in held:
            yield [int(choice)] * game.horizon
        for _ in range(left - len(held)):
            if game.settle:
                steps = int(rng.integers(1, game.settle))
                yield [int(rng.integers(n))] * steps + [0] * (game.horizon - steps)
            else:
                blocks = rng.integers(n, size=-(-game.horizon // game.hold))
                yield np.repeat(blocks, game.hold)[: game.horizon].tolist()

    def _value(self, state: Any, ram: np.ndarray, plan: list[int]) -> float:
        """Discounted points of the plan, until the horizon or a lost life."""
        game, ale, actions = self._game, self._ale, self._env.actions
        ale.restoreState(state)
        lives, value, weight = ale.lives(), 0.0, 1.0
        for choice in plan:
            reward = ale.act(actions[self._action(ram, choice)])
            value += weight * reward
            if ale.lives() < lives or ale.game_over():
                value -= weight * game.life
                break
            if reward and game.to_point:
                break
            if game.script:
                ram = ale.getRAM()
            weight *= self.discount
        if game.potential:
            value += game.potential(ale.getRAM())
        return value


def _domain(name: str, games: Iterable[str], modes: str) -> Domain:
    extended = name == "atari_extended"

    def spec(game: str) -> TaskSpec:
        settings = GAMES[game]
        helped = "; reads the RAM" if settings.script or settings.potential else ""
        return TaskSpec(
            id=f"{name}/{game}",
            metric="return",
            floor=settings.floor,
            floor_source=f"{settings.floor_source} of Mnih et al. 2015, a whole game in "
            f"its default mode; here {settings.steps} steps in {modes}",
            noise="share of actions replaced by a random one",
            expert=f"look-ahead of {settings.horizon} steps, {settings.plans} plans at a time",
            sees="clones the emulator, without its random state, and plays on in the clone"
            + helped,
        )

    return Domain(
        name=name,
        tasks={f"{name}/{game}": spec(game) for game in games},
        make_env=lambda game: Atari(game, extended),
        make_expert=LookAhead,
        perturb=random_share,
        sources=("atari.py",),
    )


DOMAINS = (
    _domain("atari", GAMES, "the default mode"),
    _domain("atari_extended", EXTENDED, "a mode and difficulty drawn each episode"),
)
