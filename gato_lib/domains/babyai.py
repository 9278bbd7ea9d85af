"""BabyAI: instructions in a grid world, seen as pixels (paper 3.1, App. F.5).

The agent sees its partial 7 x 7 cell view as an RGB image, its direction and the instruction.
Cells are drawn 8 pixels wide, minigrid's own default, so the view is 56 x 56; it is padded (never
resized, which would blur it) to 64 x 64. A 16 x 16 patch then holds exactly 2 x 2 whole cells, and
a step costs 16 patches. At 16 pixels a cell, one cell a patch, a step would cost 49 and show the
same content.
"""

from __future__ import annotations

import contextlib
import io
import signal
import threading
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Domain, Expert, ExpertError, TaskSpec

TILE = 8
IMAGE = 64
BOT_SECONDS = 3.0  # the bot searches without bound on some rooms
MOVES = (0, 1, 2)  # left, right, forward: noise never opens boxes or drops things

# 46, as many as the paper lists. Left out: other sizes of a level, KeyInBox and
# PutNext...Carrying, in which the bot cannot plan.
_LEVELS = tuple(
    """
    ActionObjDoor BlockedUnlockPickup BossLevel BossLevelNoUnlock FindObjS7 GoTo GoToDoor
    GoToImpUnlock GoToLocal GoToObj GoToObjDoor GoToObjMaze GoToObjMazeOpen GoToOpen GoToRedBall
    GoToRedBallGrey GoToRedBallNoDists GoToRedBlueBall GoToSeq KeyCorridor MiniBossLevel
    MoveTwoAcrossS8N9 Open OpenDoor OpenDoorColor OpenDoorLoc OpenDoorsOrderN4 OpenRedBlueDoors
    OpenRedDoor OpenTwoDoors Pickup PickupAbove PickupDist PickupLoc PutNextLocal PutNextS7N4
    Synth SynthLoc SynthSeq UnblockPickup Unlock UnlockLocal UnlockLocalDist UnlockPickup
    UnlockPickupDist UnlockToUnlock
    """.split()  # noqa: SIM905
)


class _Observation(gym.ObservationWrapper):
    """Pads the view to 64 x 64 and gives the instruction a gymnasium space.

    minigrid's MissionSpace is not a `gymnasium.spaces.Text`: it samples strings but has no length
    or character set, and no library that stores or checks spaces knows it.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        letters = "abcdefghijklmnopqrstuvwxyz ,"
        self.observation_space = gym.spaces.Dict(
            {
                "direction": gym.spaces.Discrete(4),
                "image": gym.spaces.Box(0, 255, (IMAGE, IMAGE, 3), np.uint8),
                "mission": gym.spaces.Text(max_length=512, charset=letters),
            }
        )

    def observation(self, obs: dict[str, Any]) -> dict[str, Any]:
        image = np.zeros((IMAGE, IMAGE, 3), np.uint8)
        view = obs["image"]
        image[: view.shape[0], : view.shape[1]] = view
        return {"direction": int(obs["direction"]), "image": image, "mission": obs["mission"]}


class _Quiet(gym.Wrapper):
    """Silences minigrid's "Sampling rejected" prints while a level is drawn."""

    def reset(self, **kwargs: Any):
        with contextlib.redirect_stdout(io.StringIO()):
            return self.env.reset(**kwargs)


def make_env(name: str) -> gym.Env:
    import minigrid  # noqa: F401  (registers the levels with gymnasium)
    from minigrid.wrappers import RGBImgPartialObsWrapper

    env = gym.make(f"BabyAI-{name}-v0")
    return _Quiet(_Observation(RGBImgPartialObsWrapper(env, tile_size=TILE)))


@contextlib.contextmanager
def _deadline(seconds: float):
    """Raise TimeoutError inside the block after `seconds` of this process's own time.

    Not of the clock's: which episodes there are must not depend on what else the machine does. It
    is raised again and again until the block ends, for where it falls into a callback of the
    garbage collector it is lost. Only the main thread can be timed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum, frame):
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Bot(Expert):
    """minigrid's built-in bot. It plans on the full grid it has seen so far, cell by cell."""

    def reset(self, env: gym.Env) -> None:
        from minigrid.utils.baby_ai_bot import BabyAIBot

        self._bot = BabyAIBot(env)

    def act(self, observation: Any, executed: int | None) -> int:
        try:
            with _deadline(BOT_SECONDS):
                return int(self._bot.replan(executed))
        except Exception as error:  # the bot fails by assertions, index errors and more
            raise ExpertError(f"BabyAI bot: {error!r}") from error


def perturb(action: int, noise: float, env: gym.Env, rng: np.random.Generator) -> int:
    return int(rng.choice(MOVES)) if rng.random() < noise else action


DOMAINS = (
    Domain(
        name="babyai",
        tasks={
            f"babyai/{level}": TaskSpec(
                id=f"babyai/{level}",
                metric="return",
                floor=1.0,
                floor_source="upper bound of the reward, 1 - 0.9 steps / limit",
                noise="share of actions replaced by a random turn or step",
                expert="minigrid's built-in bot",
                sees="the symbols of cells in view, and remembers every cell seen",
            )
            for level in _LEVELS
        },
        make_env=make_env,
        make_expert=lambda name: Bot(),
        perturb=perturb,
        sources=("babyai.py",),
    ),
)
