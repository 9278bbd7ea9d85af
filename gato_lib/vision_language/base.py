"""What all sets of text and images are made of (paper 3.2)."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from gato_lib.episodes import Document

PAIRS = 5  # 3.2: so many (image, text) pairs make one training sequence


@dataclasses.dataclass(frozen=True)
class Caption:
    """An image, uint8 (H, W, 3), and what it is said to show, in one or several ways."""

    image: np.ndarray
    texts: tuple[str, ...]

    @property
    def documents(self) -> list[Document]:
        """One pair for each text: the image, then its caption."""
        return [Document((self.image, text)) for text in self.texts]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about an image, uint8 (H, W, 3), and the answers people gave, one or several."""

    image: np.ndarray
    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> Document:
        """What the network is shown before it answers: the image, then "Q: ... A:"."""
        return Document((self.image, f"Q: {self.question} A:"), given=(1,))

    @property
    def answer(self) -> str:
        """The answer most people gave; of equals the first."""
        return collections.Counter(self.answers).most_common(1)[0][0]

    @property
    def documents(self) -> list[Document]:
        """One triplet, with the most common answer."""
        return [Document((*self.prompt.items, self.answer), given=self.prompt.given)]


Example = Caption | Question | Document
Some = TypeVar("Some")


def hashed(text: str) -> float:
    """A number in [0, 1) that a text decides."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def split_of(key: str) -> str:
    """ "train", "validation" or "test", 5 % each of the latter, as a key's hash decides."""
    share = hashed(key)
    return "test" if share < 0.05 else "validation" if share < 0.10 else "train"


def limited(examples: Sequence[Some], count: int | None, seed: int) -> list[Some]:
    """`count` of the examples, drawn by `seed`, in their order; all for None."""
    chosen = np.random.default_rng([seed, 1]).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


def blind(example: Caption | Question) -> Caption | Question:
    """The same with a plain grey image of that size."""
    return dataclasses.replace(example, image=np.full_like(example.image, 128))


@dataclasses.dataclass(frozen=True)
class TextSet:
    """A set of examples, split once and for all.

    Attributes:
      name: "domain/set", such as "captions/emoji".
      splits: examples by split. "train" is trained on and "validation" measured during training;
        all others are for evaluation. Examples of a split are all of one kind.
      licence: in a word or two.
    """

    name: str
    splits: dict[str, tuple[Example, ...]]
    licence: str = ""

    @property
    def paired(self) -> bool:
        """Whether examples are pairs of image and text, `PAIRS` to a sequence, or documents."""
        return not isinstance(self.splits["train"][0], Document)

    def documents(self, split: str) -> list[Document]:
        """The split's documents in order."""
        examples = self.splits.get(split, ())
        if not self.paired:
            return list(examples)
        return [document for example in examples for document in example.documents]

    def blind(self) -> TextSet:
        """The set with grey images; documents stay."""
        if not self.paired:
            return self
        splits = {k: tuple(map(blind, examples)) for k, examples in self.splits.items()}
        return dataclasses.replace(self, splits=splits)
