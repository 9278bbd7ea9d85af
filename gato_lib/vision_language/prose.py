"""Prose and conversations (paper 3.2, 4.3): the Brown corpus and chitchat-dataset (MIT)."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence

import pyarrow.parquet as pq

from gato_lib.episodes import DataError, Document
from gato_lib.vision_language.base import TextSet, limited, split_of
from gato_lib.vision_language.pictures import ASSETS

SPEAKERS = ("A", "B")


def brown(count: int | None, seed: int = 0) -> TextSet:
    """500 texts of 2,000 words in fifteen genres, printed in 1961; a paragraph a line."""
    rows = pq.read_table(ASSETS / "brown.parquet", columns=["split", "text"]).to_pylist()
    return _split("text/brown", [(r["split"], r["text"]) for r in rows], count, seed, "public")


def chitchat(count: int | None, seed: int = 0) -> TextSet:
    """Conversations of two students; a line a turn, "A: ..." or "B: ...".

    4,017 of the package's 7,168: in the others nobody answers.
    """
    data = importlib.resources.files("chitchat_dataset") / "dataset.json"
    texts = []
    for key, chat in sorted(json.loads(data.read_text(encoding="utf-8")).items()):
        speakers: list[str] = []
        turns = []
        for messages in chat["messages"]:
            said = " ".join(" ".join(m["text"].split()) for m in messages).strip()
            if not said:
                continue
            sender = messages[0]["sender"]
            speakers += [sender] if sender not in speakers else []
            turns.append((speakers.index(sender), said))
        if len(speakers) > len(SPEAKERS):
            raise DataError(f"{data}, conversation {key}: {len(speakers)} speakers, expected two")
        if len(turns) > 1:
            texts.append((split_of(key), conversation(turns)))
    return _split("text/chitchat", texts, count, seed, "MIT")


def conversation(turns: Sequence[tuple[int, str]]) -> str:
    """Turns of (speaker 0 or 1, what they say) as the text that is trained on."""
    return "".join(f"{SPEAKERS[who]}: {said}\n" for who, said in turns)


def _split(
    name: str, texts: Sequence[tuple[str, str]], count: int | None, seed: int, licence: str
) -> TextSet:
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for split, text in texts:
        splits[split].append(Document((text,)))
    splits["train"] = limited(splits["train"], count, seed)
    return TextSet(name, {k: tuple(v) for k, v in splits.items()}, licence)
