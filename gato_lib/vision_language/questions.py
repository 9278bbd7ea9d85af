"""Questions about images: easy-vqa's (MIT), and our own about scenes (paper 3.2)."""

from __future__ import annotations

import importlib.resources
import json

import numpy as np

from gato_lib.vision_language.base import Question, TextSet, limited
from gato_lib.vision_language.images import load_image
from gato_lib.vision_language.pictures import NUMBERS, SIDE, Scene, known, nouns, scene_splits

VALIDATION = 20  # of easy-vqa's training images, every twentieth


def easy_vqa(count: int | None, seed: int = 0) -> TextSet:
    """easy-vqa: one shape, three kinds of eight colours; its own training and test split.

    38,575 questions about 4,000 images and 9,673 about 1,000 others, 13 answers. `count` limits the
    questions trained on.
    """
    root = importlib.resources.files("easy_vqa") / "data"
    splits: dict[str, list[Question]] = {"train": [], "validation": [], "test": []}
    for part in ("train", "test"):
        folder, images = root / part, {}
        for question, answer, number in json.loads((folder / "questions.json").read_text()):
            if number not in images:
                path = folder / "images" / f"{number}.png"
                images[number] = load_image(path.read_bytes(), str(path), SIDE)
            held_out = part == "train" and number % VALIDATION == 0
            split = "validation" if held_out else part
            splits[split].append(Question(images[number], question, (answer,)))
    splits["train"] = limited(splits["train"], count, seed)
    return TextSet("vqa/easy", {k: tuple(v) for k, v in splits.items()}, "MIT")


def scenes(count: int | None, seed: int = 0, small: bool = False) -> TextSet:
    """Questions about scenes, whose captions hold the answers; `count` scenes to train on."""
    labels = nouns(small)

    def ask(scene: Scene, image: np.ndarray, rng: np.random.Generator) -> Question:
        return Question(image, *_question(scene, labels, rng))

    name = "vqa/scenes_small" if small else "vqa/scenes"
    return TextSet(name, scene_splits(count or 2_000, seed, small, ask), "MIT, Apache-2.0")


def _question(
    scene: Scene, labels: tuple[str, ...], rng: np.random.Generator
) -> tuple[str, tuple[str, ...]]:
    """A question about the ground, a number, a place or whether something is there; its answer."""
    subject = known()[scene.labels[rng.integers(len(scene.labels))]]
    kinds = ["ground", "number", "yes", "no"] + ["place"] * (len(scene.labels) == 2)
    kind = kinds[rng.integers(len(kinds))]
    if kind == "ground":
        return "what color is the background?", (scene.ground,)
    if kind == "number":
        return f"how many {subject.plural} are there?", (NUMBERS[scene.number - 1],)
    if kind == "place":
        first, second = (known()[label] for label in scene.labels)
        return f"what is {scene.relation} the {second.label}?", (first.singular,)
    if kind == "no":
        others = [label for label in labels if label not in scene.labels]
        subject = known()[others[rng.integers(len(others))]]
    return f"is there {subject.singular}?", (kind,)
