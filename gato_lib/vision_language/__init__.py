"""Text, captioned images, visual questions and dialogue (paper 3.2, 4.3).

`SETS` are the ones that come with the workbook or with its packages; `importers` reads a user's
own. Each is a `TextSet`: examples, split once and for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from gato_lib.config import ConfigError
from gato_lib.vision_language import pictures, prose, questions
from gato_lib.vision_language.base import PAIRS, Caption, Example, Question, TextSet, blind
from gato_lib.vision_language.prose import SPEAKERS, conversation

__all__ = [
    "DOMAINS",
    "PAIRS",
    "SETS",
    "SPEAKERS",
    "Caption",
    "Example",
    "Question",
    "TextSet",
    "blind",
    "conversation",
    "load",
]

# Each makes its set from the number of examples to train on (None: as many as there are, or 2,000
# where they are made) and a seed for which ones those are.
SETS: dict[str, Callable[[int | None, int], TextSet]] = {
    "captions/emoji": pictures.emoji,
    "captions/scenes": pictures.scenes,
    "captions/scenes_small": functools.partial(pictures.scenes, small=True),
    "vqa/easy": questions.easy_vqa,
    "vqa/scenes": questions.scenes,
    "vqa/scenes_small": functools.partial(questions.scenes, small=True),
    "text/brown": prose.brown,
    "text/chitchat": prose.chitchat,
}
DOMAINS = tuple(dict.fromkeys(name.split("/")[0] for name in SETS))


@functools.lru_cache(maxsize=16)
def load(name: str, count: int | None = None, seed: int = 0) -> TextSet:
    """A set by name; raises ConfigError for an unknown one."""
    if name not in SETS:
        raise ConfigError(f"unknown set {name!r}; known: {', '.join(SETS)}")
    return SETS[name](count, seed)
