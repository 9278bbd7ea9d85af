"""Pictures of tasks, and films of episodes with the tokens that went through the network."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import ipywidgets
import numpy as np
import PIL.Image

from gato_lib import domains
from gato_lib.agent import Agent
from gato_lib.episodes import Episode, flatten
from gato_lib.evaluation import Evaluation, Lane, close_environments
from gato_lib.sequence import (
    ACTION,
    IMAGE,
    KIND_NAMES,
    SEPARATOR,
    TEXT,
    TokenSequence,
    as_images,
    image_layout,
    space_kind,
)
from gato_lib.tokenizers import TextTokenizer

# Whichever a scene has of these shows most of it.
CAMERAS = ("topview", "front_close", "side", "track", "tracking_x", "lookat", "back", "fixed")
SIDE = 128  # of a rendered scene, in pixels


def picture(task: str, seed: int = 0, size: int = SIDE) -> np.ndarray:
    """What an episode of the task begins with, uint8 (H, W, 3): as the agent sees it if it does."""
    env = domains.make_env(task)
    observation, _ = env.reset(seed=seed)
    with _camera(env, size) as look:
        image = look(observation)
    env.close()
    return image


@contextlib.contextmanager
def _camera(env: Any, size: int) -> Iterator[Callable[[Any], np.ndarray]]:
    """A function from an observation to an image: the one in it, or one of the scene as it is.

    Grey, where there is neither an image nor a scene of MuJoCo's to draw.
    """
    spaces = flatten(env.observation_space)
    seen = [key for key, space in spaces.items() if space_kind(space) == IMAGE]
    if seen:
        layout = image_layout(spaces[seen[0]])
        yield lambda observation: as_images(flatten(observation)[seen[0]][None], layout)[0]
        return
    model = getattr(env.unwrapped, "model", None)
    if not hasattr(model, "ncam"):
        grey = np.full((size, size, 3), 128, np.uint8)
        yield lambda observation: grey
        return
    from gato_lib.domains.rendering import Renderer

    names = [model.camera(i).name for i in range(model.ncam)]
    camera = next((name for name in CAMERAS if name in names), -1)
    renderer = Renderer(model, size, camera)
    try:
        yield lambda observation: renderer(env.unwrapped.data)
    finally:
        renderer.close()


@dataclasses.dataclass(frozen=True)
class Film:
    """An episode as it was played.

    Attributes:
      frames: uint8 (N, H, W, 3).
      moments: the timestep of each frame, (N,) int; the last is after the last action.
      tokens: of every timestep, observation and action, as the network had them.
      actions: the action of every timestep.
      text: pieces of the agent's text, if it has any.
      score, success, steps: how it ended.
    """

    frames: np.ndarray
    moments: np.ndarray
    tokens: TokenSequence
    actions: tuple[Any, ...]
    text: TextTokenizer | None
    score: float
    success: bool
    steps: int


class _Noted(gym.Wrapper):
    """Keeps the actions that are taken."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.actions: list[Any] = []

    def step(self, action: Any) -> tuple:
        self.actions.append(action)
        return super().step(action)


def film(
    agent: Agent,
    task: str,
    seed: int,
    index: int = 0,
    *,
    prompt: str = "none",
    demonstrations: Callable[[str], Sequence[Episode]] | None = None,
    most: int = 48,
) -> Film:
    """Play an evaluation episode live and film it: at most so many frames, evenly spread.

    A frame is what the agent sees, or where that is no image, the scene in 128 x 128 pixels.
    """
    frames: list[np.ndarray] = []
    observations: list[Any] = []
    with contextlib.ExitStack() as stack:

        def watch(lanes: Sequence[Lane]) -> None:
            nonlocal look, env
            (lane,) = lanes
            if look is None:  # not before the reset: it may make another scene
                look = stack.enter_context(_camera(lane.env, SIDE))
                lane.env = env = _Noted(lane.env)
            frames.append(look(lane.observation))
            observations.append(lane.observation)

        look: Callable[[Any], np.ndarray] | None = None
        env: _Noted | None = None
        evaluation = Evaluation(lambda: agent, seed, demonstrations, prompt)
        (row,) = evaluation.play(((task, index),), watch)
        tokenizer = agent.for_domain(task.split("/")[0]).tokenizer(env)
    close_environments()
    ids = tokenizer.action_spec.encode(np.stack(env.actions))
    moments = np.unique(np.linspace(0, len(frames) - 1, most).round().astype(int))
    return Film(
        np.stack([frames[i] for i in moments]),
        moments,
        tokenizer.steps(observations[:-1], ids),
        tuple(env.actions),
        agent.text,
        row["score"],
        row["success"],
        row["steps"],
    )


def told(film: Film, step: int, most: int = 24) -> str:
    """A timestep's tokens in the order in which the network had them, as HTML, a line a kind.

    At most so many ids of a kind are written out. The last line is the action.
    """
    if step == film.tokens.steps:
        return f"after the last of {step} steps"
    first, last = film.tokens.offsets[step : step + 2]
    ids, kinds = film.tokens.ids[first:last], film.tokens.kinds[first:last]
    lines = [f"step {step + 1} of {film.tokens.steps}, {last - first} tokens"]
    for kind, group in itertools.groupby(range(len(ids)), lambda i: kinds[i]):
        own = list(group)
        if kind == IMAGE:
            what = f"{len(own)} patches"
        elif kind == SEPARATOR:
            what = str(ids[own[0]])
        elif kind == TEXT and film.text is not None:
            what = html.escape(film.text.decode(ids[own]))
        else:
            what = " ".join(map(str, ids[own[:most]])) + (" ..." if len(own) > most else "")
        lines.append(f"<b>{KIND_NAMES[kind]}</b>: {what}")
        if kind == ACTION:
            action = np.array2string(
                np.asarray(film.actions[step]), precision=3, suppress_small=True
            )
            lines[-1] += f", which is {action}"
    return "<br>".join(lines)


def player(film: Film, width: int = 256) -> ipywidgets.Widget:
    """A film to play, stop and step through, with each frame's tokens beside it."""
    picture = ipywidgets.Image(format="png", width=width)
    words = ipywidgets.HTML()
    last = len(film.frames) - 1
    play = ipywidgets.Play(max=last, interval=150)
    slider = ipywidgets.IntSlider(max=last, description="frame")
    ipywidgets.jslink((play, "value"), (slider, "value"))

    def show(change: Any = None) -> None:
        PIL.Image.fromarray(film.frames[slider.value]).save(data := io.BytesIO(), "png")
        picture.value, words.value = data.getvalue(), told(film, int(film.moments[slider.value]))

    slider.observe(show, "value")
    show()
    controls = ipywidgets.HBox([play, slider])
    return ipywidgets.VBox([controls, ipywidgets.HBox([picture, words])])
