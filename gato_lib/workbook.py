"""What the notebooks share: from settings to data, a trained agent, its play, and back.

`prepare` collects what is missing and builds the mixture; `train_agent` trains or resumes an agent
in the run's folder; `load_agent` brings one back. Each can be called alone, from any notebook, and
returns at once where its work is done.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import html
import inspect
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import grain
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh

from gato_lib import (
    collection,
    distributed,
    domains,
    importing,
    results,
    set_aside,
    vision_language,
)
from gato_lib.agent import Agent
from gato_lib.checkpoint import Checkpointer, parameters_to_bytes, read_meta, read_parameters
from gato_lib.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    TrainConfig,
    count_of,
    model_config,
    source_digest,
)
from gato_lib.dagger import Practice
from gato_lib.embedding import check_text
from gato_lib.episodes import DataError, Document, Episode, flatten, is_text, select
from gato_lib.evaluation import (
    Evaluation,
    batches,
    close_environments,
    read_references,
    rollouts,
)
from gato_lib.files import atomic_path, write_bytes, write_text
from gato_lib.mixture import (
    PAPER_WEIGHTS,
    Mixture,
    build_documents,
    build_group,
    mixture_weights,
)
from gato_lib.prompts import Prompts, ends
from gato_lib.prompts import write as write_prompts
from gato_lib.sampling import Sampling, sample_texts
from gato_lib.sequence import (
    MODALITIES,
    Tokenizer,
    TokenSequence,
    count_tokens,
    document_tokens,
)
from gato_lib.tokenizers import TextTokenizer, train_text_tokenizer
from gato_lib.training import Metrics, initial_state, train
from gato_lib.vision_language import importers

# A kernel closes its streams before its last tasks are collected: their complaint that they were
# pending would end as a traceback in what a person sees of a run that went well.
atexit.register(setattr, logging, "raiseExceptions", False)

# What decides a trained agent besides its settings.
TRAINING_CODE = tuple(
    f"{name}.py"
    for name in (
        "config",
        "distributed",
        "tokenizers",
        "episodes",
        "sequence",
        "mixture",
        "embedding",
        "attention",
        "transformer",
        "model",
        "training",
    )
)
RELEASED = "params.safetensors"  # of an agent that is given away
PROMPTS = "prompts.zip"  # and what it is prompted with
ASSETS = pathlib.Path(__file__).parent / "assets"
TOKENIZER_CHARACTERS = 4_000_000  # of a set, at most, that a small tokenizer is trained on
SMALL_TASKS = ("babyai/GoToObj", "metaworld/drawer-close")


@dataclasses.dataclass(frozen=True)
class Run:
    """The folders of one run, experiments/runs/<preset> where nothing else is said."""

    root: pathlib.Path
    preset: str

    @classmethod
    def at(cls, run_dir: str, preset: str) -> Run:
        """The run in `run_dir`, for a notebook; without one that of preset smoke.

        Raises ConfigError for another preset without `run_dir`: a notebook does not know its
        values, and would write its own small results where that preset's are.
        """
        if run_dir:
            return cls(pathlib.Path(run_dir).absolute(), preset)
        if preset != "smoke":
            command = f"make reproduce PRESET={preset} NOTEBOOK=..."
            raise ConfigError(
                f"preset {preset!r}: its values are not in this notebook. Run `{command}` and open "
                f"the copy in experiments/runs/{preset}/notebooks, or keep preset 'smoke' and "
                "change parameters, or name a folder of your own in run_dir"
            )
        return cls.named(preset)

    @classmethod
    def named(cls, preset: str) -> Run:
        """experiments/runs/<preset>, where experiments/run.py runs a preset."""
        return cls(results.REPOSITORY / "experiments/runs" / preset, preset)

    @classmethod
    def of(cls, folder: str, otherwise: Run) -> Run:
        """The run in `folder`, whole or from the repository on; `otherwise` where it is empty."""
        root = results.REPOSITORY / pathlib.Path(folder).expanduser()
        return cls(root, root.name) if folder else otherwise

    @property
    def data(self) -> pathlib.Path:
        return self.root / "data"

    @property
    def agents(self) -> pathlib.Path:
        return self.root / "agents"

    @property
    def figures(self) -> pathlib.Path:
        return self.root / "figures"

    @property
    def results(self) -> pathlib.Path:
        return self.root / "results"

    def __str__(self) -> str:
        with contextlib.suppress(ValueError):
            return str(self.root.relative_to(results.REPOSITORY))
        return self.root.name


def select_tasks(pattern: str) -> tuple[str, ...]:
    """Task ids from "all", "small", or a comma-separated list of ids and domains.

    "all" is every task of the paper's data sets that is installed and not held out; "small" is two;
    "" is none; "all, -babyai/Synth" leaves one out. Raises ConfigError for an unknown name, a
    held-out task, and one left out that is not there.
    """
    if pattern == "small":
        return SMALL_TASKS
    if not pattern.strip():
        return ()
    chosen: list[str] = []
    for name in pattern.split(","):
        name = name.strip()
        if name.startswith("-"):
            if name[1:] not in chosen:
                raise ConfigError(f"tasks: {name!r} leaves out what is not among those before it")
            chosen = [task for task in chosen if task != name[1:]]
        elif name == "all" or name in domains.DOMAINS:
            every = (d for d in domains.DOMAINS.values() if d.installed and not d.extra)
            whole = every if name == "all" else [domains.DOMAINS[name]]
            chosen += [t for d in whole for t in d.tasks if t not in domains.HELD_OUT]
        elif name in domains.HELD_OUT:
            raise ConfigError(f"{name} is held out: it never enters pretraining")
        elif name in domains.TASKS:
            chosen.append(name)
        else:
            raise ConfigError(
                f"unknown task {name!r}; known: all, small, {', '.join(domains.DOMAINS)} and "
                f"{', '.join(domains.TASKS)}"
            )
    return tuple(dict.fromkeys(chosen))


def episodes_by_domain(text: str, tasks: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Demonstrations a task for each domain of `tasks`, from a notebook's parameter.

    A list such as "babyai 8, dmc/reacher-easy 20, others 2", where a task's own number goes first;
    it may name domains and tasks that `tasks` does not have. Raises ConfigError.
    """
    counts: dict[str, int] = {}
    known = [*domains.DOMAINS, "others"]
    for item in text.split(","):
        name, _, count = item.strip().rpartition(" ")
        there = name in known or name in domains.TASKS
        if not there or not count.isdigit() or int(count) == 0 or name in counts:
            raise ConfigError(
                f"episodes: {item.strip()!r} in {text!r}; expected, once each, a number behind a "
                f"task or one of {', '.join(known)}"
            )
        counts[name] = int(count)
    present = sorted({t.split("/")[0] for t in tasks if t not in counts})
    missing = [d for d in present if d not in counts and "others" not in counts]
    if missing:
        raise ConfigError(f"episodes: {text!r} has no number for {', '.join(missing)} or others")
    by_domain = [(d, counts.get(d) or counts["others"]) for d in present]
    return (*by_domain, *((t, counts[t]) for t in tasks if t in counts))


def data_config(
    tasks: str,
    episodes: str,
    noise: str,
    mixture: str,
    imports: Sequence[dict[str, Any]] = (),
    documents: str = "",
    practice: Sequence[dict[str, Any]] = (),
    **settings: Any,
) -> DataConfig:
    """Data settings from a notebook's parameters, with the texts among them taken apart.

    Raises ConfigError for what is unknown or does not fit.
    """
    chosen, sets = select_tasks(tasks), select_documents(documents)
    led = []
    for fields in practice:
        if not isinstance(fields, dict) or set(fields) != {"learner", "episodes"}:
            raise ConfigError(f"practice: {fields!r}, expected learner (a run) and episodes")
        named = [item.strip().rpartition(" ")[0] for item in fields["episodes"].split(",")]
        own = [t for t in chosen if {t, t.split("/")[0], "others"} & set(named)]
        led.append((fields["learner"], episodes_by_domain(fields["episodes"], own)))
    recorded: list[importing.Source] = []
    written: list[importers.Source] = []
    for fields in imports:
        of_text = isinstance(fields, dict) and any(k in fields for k in importers.KINDS)
        (written if of_text else recorded).append(
            (importers if of_text else importing).Source.parse(fields)
        )
    # A path may be given from the repository or from ~ on.
    recorded = [_at_home(source, "where") for source in recorded]
    written = [_at_home(source, "where", "images", "questions") for source in written]
    names = [s.name for s in (*recorded, *written)]
    for name in names:
        taken = name in domains.DOMAINS or name in vision_language.DOMAINS
        if taken or names.count(name) > 1:
            raise ConfigError(f"imports: the name {name!r} is taken")
    present = {t.split("/")[0] for t in (*chosen, *sets)} | set(names)
    mixed = {item.strip().partition(" ")[0].split("/")[0] for item in mixture.split(",")}
    for name in mixed - present:
        if name in domains.DOMAINS and not domains.DOMAINS[name].installed:
            install = domains.DOMAINS[name].install
            raise ConfigError(f"mixture names {name}, which is not installed: {install}")
    return DataConfig(
        tasks=chosen,
        episodes=episodes_by_domain(episodes, chosen),
        noise=tuple(float(x) for x in noise.split(",")),
        weights=mixture_weights(mixture, sorted(present), chosen),
        imports=tuple(s.text for s in recorded),
        documents=sets + tuple(s.text for s in written),
        practice=tuple(led),
        **settings,
    )


def _at_home(source: Any, *fields: str) -> Any:
    """A source whose paths that lie in the repository, or in ~, are whole."""
    whole = {}
    for field in fields:
        path = results.REPOSITORY / pathlib.Path(getattr(source, field)).expanduser()
        if getattr(source, field) and path.exists():
            whole[field] = str(path)
    return dataclasses.replace(source, **whole)


def select_documents(text: str) -> tuple[str, ...]:
    """Sets of text and images from a notebook's parameter, each with a number of examples.

    A list such as "captions/scenes 2000, text/brown": without a number it is all there are. Raises
    ConfigError.
    """
    chosen = []
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, count = item.partition(" ")
        known = name in vision_language.SETS
        if not known or (count and not (count.isdigit() and int(count))):
            raise ConfigError(
                f"documents: {item!r} in {text!r}; expected one of "
                f"{', '.join(vision_language.SETS)}, with a number behind it or none"
            )
        chosen.append(f"{name} {int(count)}" if count else name)
    names = [c.split(" ")[0] for c in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"documents: {name!r} stands twice in {text!r}")
    return tuple(chosen)


def collections(
    run: Run, config: DataConfig, held_out: bool = False
) -> list[collection.Collection]:
    """What `config` asks to be collected, in the run's data folder.

    Raises ConfigError for held-out tasks, unless `held_out` says that this is no pretraining.
    """
    held = sorted(set(config.tasks) & domains.HELD_OUT)
    if held and not held_out:
        raise ConfigError(f"held-out tasks never enter pretraining: {held}")
    return [
        collection.Collection(
            str(run.data),
            task,
            count_of(config.episodes, task),
            config.noise,
            config.seed,
            failures=task.split("/")[0] in config.tell_return,
        )
        for task in config.tasks
    ]


# How an agent leads. Stacking is sampled: the mean of what may be done either way is neither.
LEADING = "mean, " + ", ".join(f"{d} sample" for d in domains.DOMAINS if "stacking" in d)


def practices(run: Run, config: DataConfig) -> list[Practice]:
    """What `config` asks to be collected with an agent in the lead.

    Raises ConfigError where that agent is not there.
    """
    wanted = []
    for learner, episodes in config.practice:
        folder = generalist_in(learner, run)
        home = Run.of(learner, run)
        step = checkpoint_step(folder)
        tasks = tuple(t for t in config.tasks if count_of(episodes, t))
        prompts = prompts_for(home, folder, "end", tasks)
        for task in tasks:
            choices = (("continuous", LEADING), ("keep", 1.0))
            wanted.append(
                Practice(
                    str(run.data),
                    task,
                    count_of(episodes, task),
                    (),
                    config.seed,
                    learner=folder.name,
                    make_agent=Loader(str(folder), choices=choices, step=step),
                    demonstrations=prompts,
                    goals_aside=config.goals_aside,
                )
            )
    return wanted


@dataclasses.dataclass
class Prepared:
    """Collected data, ready to train on."""

    mixture: Mixture
    text: TextTokenizer | None
    cards: list[dict[str, Any]]  # one data card a task
    content: dict[str, str] = dataclasses.field(default_factory=dict)  # what else decides
    documents: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # cards of the sets


def collect(
    run: Run, config: DataConfig, part: tuple[int, int] = (0, 1), held_out: bool = False
) -> None:
    """Collect and import what `config` asks for and what is missing. Prints progress.

    `part` (i, n) is one of n machines' share: it imports nothing. Data cards get the committed
    references of their tasks: random and expert, with n and 95 % intervals. What could not be
    collected or imported, and why, is in the DataError at the end; the rest is there.
    """
    wanted = [*collections(run, config, held_out), *practices(run, config)]
    todo = [c for c in wanted if not c.done]
    notes, size = {}, 0.0
    references = read_references(results.COMMITTED / "references.csv") if todo else pd.DataFrame()
    for item in (c for c in todo if c.task in references.index):
        known = references.loc[item.task]
        size += item.episodes * bytes_a_step(item.task) * known.steps
        notes[item.task] = {"versions": results.versions(), "n": int(known.n)}
        for policy in ("random", "expert"):
            notes[item.task][f"{policy}_score"] = float(known[policy])
            notes[item.task][f"{policy}_interval"] = float(1.96 * known[f"{policy}_se"])
    if todo:
        print(f"about {size / 1e9:.2g} GB of disk, twice that while a task is merged")
    progress, problems = Progress(), []
    try:
        pinned = bool(config.practice)
        for line in collection.collect(wanted, notes=notes, part=part, pinned=pinned):
            progress(line, done=line.startswith("skipping") or line.endswith("tasks collected"))
    except DataError as error:
        problems.append(str(error))
    for source in sources(config) if part == (0, 1) else ():
        try:
            importing.convert(source, str(run.data), progress)
        except DataError as error:
            progress(f"skipping {source.name}: {error}", done=True)
            problems.append(f"not imported: {error}")
    if problems:
        raise DataError("\n".join(problems))


def text_sets(
    config: DataConfig, report: Callable[[str], None] = lambda line: None
) -> list[vision_language.TextSet]:
    """The sets of text and images that `config` names.

    Raises DataError, naming file and record, where a user's own is damaged.
    """
    sets = []
    for entry in config.documents:
        if entry.startswith("{"):
            sets.append(importers.read(importers.Source.load(entry), report))
        else:
            name, _, count = entry.partition(" ")
            sets.append(vision_language.load(name, int(count) if count else None, config.seed))
    return [each.blind() for each in sets] if config.blind else sets


def sources(config: DataConfig) -> list[importing.Source]:
    """The data sets that `config` imports."""
    return [importing.Source.load(text) for text in config.imports]


def bytes_a_step(task: str) -> int:
    """Stored size of a task's timestep, uncompressed; a text counts 64 bytes."""
    env = domains.make_env(task)
    leaves = {**flatten(env.observation_space), "action": env.action_space}.values()
    env.close()
    sizes = [
        64 if is_text(leaf) else np.dtype(leaf.dtype).itemsize * math.prod(leaf.shape)
        for leaf in leaves
    ]
    return sum(sizes)


def paper_table1() -> pd.DataFrame:
    """The paper's Table 1 by domain: name, weight, tasks, episodes, tokens.

    Of text and images it gives only the weight; the others are NaN.
    """
    names = pd.DataFrame.from_dict(PAPER_WEIGHTS, orient="index", columns=["name", "weight"])
    return names.join(pd.read_csv(ASSETS / "paper_table1.csv", index_col="domain"))


def prepare(
    run: Run,
    config: DataConfig,
    pieces: TextTokenizer | None = None,
    held_out: bool = False,
    few: tuple[int, int] | None = None,
) -> Prepared:
    """Collect what is missing, tokenize it, and build the mixture. Prints progress.

    `pieces` are another agent's, for the same ids; without, they are the run's own. `held_out`
    tasks are for what has been trained already; no pretraining may name any. `few` are the number
    of each task's demonstrations to keep, and of the draw (`draw_few`).
    """
    wanted = collections(run, config, held_out)
    progress = Progress()
    sets = text_sets(config, progress)  # first: what is damaged is told before hours of collecting
    with distributed.writer_first("collect"):
        if distributed.is_writer():
            collect(run, config, held_out=held_out)
    episodes: dict[str, Sequence[Episode]] = {}
    spaces: dict[str, tuple[gym.Space, gym.Space]] = {}
    cards = []
    for number, item in enumerate(wanted):
        progress(f"reading {item.task} ({number + 1} of {len(wanted)})")
        episodes[item.task], card = collection.load(item)
        if config.goals_aside:
            known = set_aside.without(item.task, episodes[item.task])
            card["aside"] = len(episodes[item.task]) - len(known)
            episodes[item.task] = known
        if few is not None:
            episodes[item.task] = draw_few(episodes[item.task], *few)
        env = domains.make_env(item.task)
        spaces[item.task] = env.observation_space, env.action_space
        env.close()
        cards.append(card)
    content = {}
    for item in practices(run, config):
        progress(f"reading {item.task}, led by {item.learner}")
        led = collection.load(item)[0]
        # First, so that what is held out for validation is of the expert alone.
        episodes[item.task] = [*led, *episodes[item.task]]
        content["practice"] = hashlib.sha256(
            (content.get("practice", "") + item.folder.name).encode()
        ).hexdigest()[:8]
    for source in sources(config):
        recording, card = importing.load(source, str(run.data))
        episodes[card["task"]] = recording.episodes
        spaces[card["task"]] = recording.observation_space, recording.action_space
        cards.append(card)
    with distributed.writer_first("text"):
        text = pieces or _text_tokenizer(run, config, episodes, sets)
    groups: dict[str, dict[str, list[TokenSequence]]] = {}
    if config.goals_aside:
        content["goals aside"] = source_digest("set_aside.py")[:8]
    if pieces:  # they decide the ids as imported data does
        content["pieces"] = hashlib.sha256(pieces.path.read_bytes()).hexdigest()[:8]
    tasks = len(episodes)
    for task, card in zip(list(episodes), cards, strict=True):
        kept = episodes.pop(task)  # images take gigabytes: of each task, not of all, there are two
        name = task.split("/")[0]
        tell = name in config.tell_return
        # An expert that remembers more than the window shows is told by what it did before.
        inputs = "executed" if name in config.executed_domains else "expert"
        tokenizer = Tokenizer(*spaces[task], text, config.discrete_range, tell, inputs)
        shares = _shares(kept) if tell else [1.0] * len(kept)
        try:
            tokens = [tokenizer.episode(e, s) for e, s in zip(kept, shares, strict=True)]
        except (TypeError, ValueError) as error:
            raise DataError(f"{task}: {error}") from error
        groups.setdefault(name, {})[task] = tokens
        card["steps"] = sum(s.steps for s in tokens)
        card["tokens"] = sum(map(len, tokens))
        if "source" in card or few is not None:
            content[name] = _content(tokens, content.get(name, ""))
    built = [build_group(n, groups.pop(n), config) for n in list(groups)]
    documents, written = {}, []
    for i, each in enumerate(sets):
        progress(f"tokenizing {each.name} ({i + 1} of {len(sets)})")
        tokens = [
            [
                document_tokens(d, text, end=True, question_loss=config.question_loss)
                for d in each.documents(split)
            ]
            for split in ("train", "validation")
        ]
        name = each.name.split("/")[0]
        documents.setdefault(name, {})[each.name] = tokens
        content[name] = _content([*tokens[0], *tokens[1]], content.get(name, ""))
        written.append(
            {
                "task": each.name,
                "licence": each.licence,
                "examples": {split: len(examples) for split, examples in each.splits.items()},
                "documents": len(tokens[0]) + len(tokens[1]),
                "tokens": sum(len(s) for part in tokens for s in part),
            }
        )
    paired = {each.name.split("/")[0]: each.paired for each in sets}
    for name, parts in documents.items():
        pairs = vision_language.PAIRS if paired[name] else 0
        built.append(build_documents(name, parts, config, pairs))
    progress(f"{tasks} tasks and {len(sets)} sets of documents ready", done=True)
    return Prepared(Mixture(built, config), text, cards, content, written)


def draw_few(episodes: Sequence[Episode], count: int, draw: int) -> list[Episode]:
    """So many of a task's demonstrations, the first of a permutation that `draw` decides.

    A smaller number of the same draw is a part of a larger one (App. E). Raises DataError where
    there are fewer.
    """
    if count > len(episodes):
        raise DataError(f"{len(episodes)} demonstrations are there, {count} are wanted")
    order = np.random.default_rng([draw, 3]).permutation(len(episodes))
    return [episodes[i] for i in order[:count]]


def _shares(episodes: Sequence[Episode]) -> list[float]:
    """Scores as shares of the best, in [0, 1]; 0 for all where the best is not above 0."""
    scores = [collection.episode_score(e.task, e.rewards, e.success) for e in episodes]
    best = max(scores)
    return [max(score, 0.0) / best if best > 0 else 0.0 for score in scores]


def _content(tokens: Sequence[TokenSequence], before: str = "") -> str:
    """Eight hex digits that change with what a domain holds; `before` are those of its others."""
    digest = hashlib.sha256(before.encode())
    for s in tokens:
        digest.update(s.ids.tobytes() + s.patch.tobytes() + s.patches.tobytes())
    return digest.hexdigest()[:8]


def _text_tokenizer(
    run: Run,
    config: DataConfig,
    episodes: dict[str, Sequence[Episode]],
    sets: Sequence[vision_language.TextSet],
) -> TextTokenizer:
    """The vendored 32,000 pieces, or a small model trained on what the run itself trains on."""
    if config.vocabulary_size == 32_000:
        return TextTokenizer()
    texts = {
        text
        for kept in episodes.values()
        for e in kept
        for leaf in flatten(e.observations).values()
        if isinstance(leaf, list)
        for text in leaf
    }
    for each in sets:
        room = TOKENIZER_CHARACTERS
        for document in each.documents("train"):
            for item in (i for i in document.items if isinstance(i, str) and room > 0):
                texts.add(item[:room])
                room -= len(item)
    # Without any text (Meta-World alone) a word stands in: the byte pieces cover the rest.
    texts = texts or {"gato"}
    digest = hashlib.sha256(str(config.vocabulary_size).encode())
    for each in sorted(texts):
        digest.update(each.encode() + b"\0")
    path = run.data / f"text-{digest.hexdigest()[:8]}.model"
    if path.is_file():
        return TextTokenizer(path)
    return train_text_tokenizer(texts, path, config.vocabulary_size)


def train_agent(
    run: Run,
    name: str,
    model: ModelConfig,
    config: TrainConfig,
    prepared: Prepared,
    *,
    mesh: Mesh | None = None,
    watch: Callable[[pd.DataFrame], None] | None = None,
    tensorboard: bool = False,
    start: pathlib.Path | None = None,
    **cadence: int,
) -> tuple[pathlib.Path, pd.DataFrame]:
    """Train an agent, or finish training it, and return its folder and its metrics.

    The folder is `agents/<name>-<digest of every setting and of the code>`; `agents/<name>.json`
    points to the latest one finished. Metrics have a row for each report and domain: step, domain,
    loss, validation_loss, the losses by modality (`text_loss` ...) and the rest of `Metrics`.

    Args:
      mesh: devices to train on (`distributed.make_mesh`); None is one. Not part of the digest: a
        run can go on with another.
      watch: called with the metrics so far after each report, for live curves.
      start: folder of the agent whose parameters are started from, which must be of this size
        and have these text pieces (ConfigError); it is named in the folder's meta.json, with what
        it was trained for. None starts from random ones.
      tensorboard: also write the metrics to `<folder>/tensorboard`.
      cadence: `report_every` and `save_every`, as in `train`.
    """
    data = prepared.mixture.config
    if model.discrete_range != data.discrete_range:
        raise ConfigError("discrete_range differs between the model's and the data's settings")
    check_text(model, prepared.text)
    code = source_digest(*TRAINING_CODE)
    meta = {"model": model.to_dict(), "train": config.to_dict(), "data": data.to_dict()}
    meta["lengths"] = {group.name: group.length for group in prepared.mixture.groups}
    digest = "".join([c.digest()[:4] for c in (model, config, data)] + [code[:4]])
    if prepared.content:  # as what is imported, which may change under the same name
        meta["content"] = prepared.content
        digest += "".join(prepared.content[name][:4] for name in sorted(prepared.content))
    params = None
    if start is not None:
        agent = load_agent(start)
        known, given = (t and t.path.read_bytes() for t in (agent.text, prepared.text))
        if known != given:
            raise ConfigError(
                f"{start.name} has other text pieces: the same ids would mean other words; prepare "
                "the data with `pieces_of` it"
            )
        meta["start"], params = start.name, agent.params
        meta["before"] = trained_before(start)
        digest += hashlib.sha256(start.name.encode()).hexdigest()[:4]
    folder = run.agents / f"{name}-{digest}"
    checkpointer = Checkpointer(folder, meta | {"code": code})
    writer = distributed.is_writer()
    if writer and prepared.text is not None:
        write_bytes(folder / "text.model", prepared.text.path.read_bytes())
    path, begun = folder / "metrics.csv", checkpointer.latest() or 0
    rows = []
    if path.is_file():
        old = pd.read_csv(path)
        rows = old[old.step <= begun].to_dict("records")  # others come again
    progress = Progress()
    with contextlib.ExitStack() as stack:
        stack.callback(checkpointer.close)
        log = stack.enter_context(_tensorboard(folder)) if tensorboard and writer else None
        reports = ()
        if begun < config.steps:
            reports = train(
                model, config, prepared.mixture, checkpointer, mesh=mesh, params=params, **cadence
            )
        for metrics, _ in reports:
            rows += _metric_rows(metrics)
            if writer:
                write_text(path, pd.DataFrame(rows).to_csv(index=False))
            if log is not None:
                log(metrics)
            if watch is not None:
                watch(pd.DataFrame(rows))
            losses = "  ".join(f"{k} {v:.3f}" for k, v in metrics.loss.items())
            progress(
                f"{name} step {metrics.step} of {config.steps}: loss {losses}, "
                f"{metrics.tokens_per_second:,.0f} tokens/s, "
                f"{duration(metrics.seconds_left)} left",
                done=metrics.step == config.steps,
            )
    if writer:
        write_text(run.agents / f"{name}.json", json.dumps({"folder": folder.name}))
    distributed.wait("trained")
    return folder, pd.DataFrame(rows)


def _metric_rows(metrics: Metrics) -> list[dict[str, Any]]:
    shared = dataclasses.asdict(metrics)
    losses, validation = shared.pop("loss"), shared.pop("validation_loss")
    by_modality = shared.pop("modality_loss")
    shared |= {f"{m}_loss": by_modality.get(m, math.nan) for m in MODALITIES}
    return [
        shared
        | {
            "domain": domain,
            "loss": losses.get(domain, math.nan),
            "validation_loss": validation.get(domain, math.nan),
        }
        for domain in sorted(losses.keys() | validation.keys())
    ]


@contextlib.contextmanager
def _tensorboard(folder: pathlib.Path) -> Iterator[Callable[[Metrics], None]]:
    """A function that adds a report to the event file in `folder`/tensorboard.

    A resumed run begins another file there; TensorBoard joins them, and takes the later values
    where steps were made again.
    """
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def log(metrics: Metrics) -> None:
        for key, value in dataclasses.asdict(metrics).items():
            if isinstance(value, dict):
                for part, x in value.items():
                    writer.add_scalar(f"{key}/{part}", x, metrics.step)
            elif key != "step":
                writer.add_scalar(key, value, metrics.step)

    try:
        yield log
    finally:
        writer.close()


def load_agent(folder: str | os.PathLike, checkpoint: str = "latest", **choices: Any) -> Agent:
    """The agent in `folder` at its "latest" or "best" checkpoint; `choices` as in `Agent`.

    The best has the lowest validation loss; without one it is the latest. A released agent has one.
    Raises ConfigError, and ValueError for a released agent whose file is not the one meant.
    """
    if checkpoint not in ("latest", "best"):
        raise ConfigError(f"checkpoint is {checkpoint!r}, expected 'latest' or 'best'")
    folder = pathlib.Path(folder)
    meta = read_meta(folder)
    model, data = ModelConfig.from_dict(meta["model"]), DataConfig.from_dict(meta["data"])
    train_config = TrainConfig.from_dict(meta["train"])
    shapes = jax.eval_shape(lambda: initial_state(model, train_config))
    if released := meta.get("released"):
        params = read_parameters(folder / RELEASED, shapes["params"], released["sha256"])
    else:
        checkpointer = Checkpointer(folder, meta, read_only=True)
        step = checkpointer.best() if checkpoint == "best" else None
        params = checkpointer.restore(shapes, step)[1]["params"]
        checkpointer.close()
    text = TextTokenizer(folder / "text.model") if (folder / "text.model").is_file() else None
    return Agent(
        model,
        params,
        text,
        data.context_length,
        meta.get("lengths"),
        data.parallel_actions,
        data.tell_return,
        data.executed_domains,
        **choices,
    )


def checkpoint_step(folder: str | os.PathLike, checkpoint: str = "latest") -> int:
    """The update after which the parameters that `load_agent` returns were kept."""
    meta = read_meta(folder)
    if "released" in meta:
        return meta["released"]["step"]
    checkpointer = Checkpointer(folder, meta, read_only=True)
    best = checkpointer.best() if checkpoint == "best" else None
    step = best or checkpointer.latest() or 0
    checkpointer.close()
    return step


def release(
    home: Run,
    folder: pathlib.Path,
    run: Run,
    name: str,
    checkpoint: str = "latest",
    prompts: int = 0,
    tasks: Sequence[str] = (),
    most: float = math.inf,
) -> pathlib.Path:
    """Write an agent to be given away into `run`, and return its folder there.

    It is `agents/<name>-<eight digits of the parameters' sha256>`; `agents/<name>.json` points to
    it. It holds the parameters alone, in bfloat16; settings, text pieces and metrics; in meta.json
    the sha256 that `load_agent` checks; and of each task that it was trained on, and of `tasks`,
    the ends of so many demonstrations that lie in `home`. It plays, and can be fine-tuned, but its
    training cannot be gone on with. Raises DataError, and leaves what is there, where it would take
    more than `most` bytes.
    """
    meta = {k: v for k, v in read_meta(folder).items() if k != "released"}
    agent = load_agent(folder, checkpoint)
    content = parameters_to_bytes(agent.params)
    digest = hashlib.sha256(content).hexdigest()
    target = run.agents / f"{name}-{digest[:8]}"
    released = {
        "from": folder.name,
        "sha256": digest,
        "step": checkpoint_step(folder, checkpoint),
        "hardware": results.hardware(),
        "date": datetime.date.today().isoformat(),
    }

    def steps(episode: Episode) -> int:
        env = _spaces_of(episode.task)
        own = agent.for_domain(episode.task.split("/")[0])
        first = select(episode.observations, 0)
        return len(own.prompt(own.tokenizer(env), episode, "end", first)[0])

    with atomic_path(target) as partial:
        write_bytes(partial / RELEASED, content)
        for file in ("text.model", "metrics.csv"):
            if (folder / file).is_file():
                write_bytes(partial / file, (folder / file).read_bytes())
        if prompts:
            wanted = dict.fromkeys([*trained_on(folder).tasks, *tasks])
            known = prompts_for(home, folder, "end", list(wanted))
            write_prompts(partial / PROMPTS, ends(known, wanted, steps, prompts))
            found = hashlib.sha256((partial / PROMPTS).read_bytes()).hexdigest()
            released["prompts_sha256"] = found
        meta["released"] = released
        write_text(partial / "meta.json", json.dumps(meta, indent=1, sort_keys=True))
        size = sum(path.stat().st_size for path in partial.iterdir())
        if size > most:
            raise DataError(
                f"{target}: {size / 1e6:.1f} MB, at most {most / 1e6:.1f} MB are wanted"
            )
        shutil.rmtree(target, ignore_errors=True)  # the same parameters, given away before
    write_text(run.agents / f"{name}.json", json.dumps({"folder": target.name}))
    return target


@functools.lru_cache(maxsize=1)
def _spaces_of(task: str) -> gym.Env:
    """An environment of the task, for its spaces."""
    env = domains.make_env(task)
    env.close()
    return env


def find_agent(run: Run, name: str) -> pathlib.Path | None:
    """Folder of the latest finished agent of that name, or None."""
    pointer = run.agents / f"{name}.json"
    if not pointer.is_file():
        return None
    folder = run.agents / json.loads(pointer.read_text())["folder"]
    return folder if (folder / "meta.json").is_file() else None


def trained_before(folder: pathlib.Path) -> dict[str, int]:
    """Updates and tokens of all that the agent in a folder was trained for (0 tokens: unknown)."""
    before = read_meta(folder).get("before", {})
    metrics = folder / "metrics.csv"
    tokens = int(pd.read_csv(metrics).tokens.max()) if metrics.is_file() else 0
    return {
        "steps": trained_on(folder).updates,
        "tokens": tokens + before.get("tokens", 0),
    }


def pieces_of(folder: pathlib.Path | None) -> TextTokenizer | None:
    """The text pieces of the agent in a folder, if it has any."""
    path = folder and folder / "text.model"
    return TextTokenizer(path) if path and path.is_file() else None


def generalist_in(folder: str, run: Run) -> pathlib.Path:
    """Folder of the generalist of another run. Raises ConfigError where there is none."""
    home = Run.of(folder, run)
    found = find_agent(home, "generalist")
    if found is None:
        raise ConfigError(f"{home}: no agent 'generalist' there; run 04_training there first")
    return found


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What the agent in a folder was trained on, and how."""

    data: DataConfig
    train: TrainConfig
    before: int = 0  # updates of the agent that it was started from

    @property
    def steps(self) -> int:
        return self.train.steps

    @property
    def updates(self) -> int:
        """All that it was trained for, with those of the agent that it was started from."""
        return self.before + self.train.steps

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.data.tasks


def trained_on(folder: str | os.PathLike) -> TrainedOn:
    """Settings of the data and of the training of the agent in `folder`."""
    meta = read_meta(folder)
    data, train = DataConfig.from_dict(meta["data"]), TrainConfig.from_dict(meta["train"])
    return TrainedOn(data, train, meta.get("before", {}).get("steps", 0))


@dataclasses.dataclass(frozen=True)
class Loader:
    """Returns `load_agent` of a folder, in whichever process it is called.

    `step` is the checkpoint's: two loaders are equal if they load the same parameters.
    """

    folder: str
    checkpoint: str = "latest"
    choices: tuple[tuple[str, Any], ...] = ()
    step: int = 0

    def __call__(self) -> Agent:
        return load_agent(self.folder, self.checkpoint, **dict(self.choices))


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Returns a task's kept demonstrations, as they lie in the run's data folder.

    Without those that were set aside, where the data is: no prompt shows them either.
    """

    run: Run
    data: DataConfig

    def __call__(self, task: str) -> list[Episode]:
        data = dataclasses.replace(self.data, tasks=(task,))
        (item,) = collections(self.run, data, held_out=True)
        episodes = collection.load(item)[0]
        return set_aside.without(task, episodes) if data.goals_aside else episodes


def demonstrations(run: Run, config: DataConfig) -> Demonstrations:
    """A function from a task to its kept demonstrations, for prompts.

    They are collected where they are missing, as after a change of the code that makes them: an
    agent outlives its data.
    """
    # What is imported or led by an agent is no prompt.
    collect(run, dataclasses.replace(config, imports=(), practice=()))
    return Demonstrations(run, config)


def prompts_for(
    run: Run, folder: pathlib.Path, where: str, tasks: Sequence[str] = ()
) -> Callable[[str], list[Episode]] | None:
    """A function from a task to demonstrations, for prompts: None if `where` is "none".

    A released agent has the ends of some; others' are collected, for `tasks` or for all that it was
    trained on. Raises ConfigError for the start of what comes with a released agent, and DataError
    where that is another file than was released.
    """
    if where == "none":
        return None
    if expected := read_meta(folder).get("released", {}).get("prompts_sha256"):
        if where != "end":
            raise ConfigError(
                f"prompt is {where!r}: {folder.name} comes with the ends of demonstrations alone"
            )
        path = folder / PROMPTS
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise DataError(f"{path}: sha256 is {found[:12]}..., expected {expected[:12]}...")
        return Prompts(str(path))
    data = trained_on(folder).data
    wanted = tuple(t for t in tasks or data.tasks if t not in domains.HELD_OUT)
    return demonstrations(run, dataclasses.replace(data, tasks=wanted)) if wanted else None


def tiny_agent(
    run: Run, name: str, seed: int, documents: str = "", tasks: Sequence[str] = SMALL_TASKS
) -> pathlib.Path:
    """Train a tiny agent in seconds, for a smoke run of a notebook that needs one.

    It acts in `tasks`, or, with `documents` (as `select_documents`), reads and writes. Raises
    ConfigError at any other preset: there the real agent is wanted.
    """
    if run.preset != "smoke":
        raise ConfigError(
            f"{run}: no agent {name!r} there; run 04_training at {run.preset!r} first"
        )
    data = DataConfig(
        tasks=() if documents else tuple(tasks),
        episodes=episodes_by_domain("babyai 8, others 4", () if documents else tasks),
        documents=select_documents(documents),
        context_length=56,
        document_length=112,
        batch_tokens=700,
        prompt_fraction=0.0,
        vocabulary_size=1024,
        seed=seed,
    )
    network = model_config("w64d2", text_rows=1024, value_rows="ordinal", stochastic_depth=0.0)
    fit = TrainConfig(
        steps=60, peak_lr=2e-3, warmup_steps=20, clip_norm=1.0, soft_sigma=3.0, seed=seed
    )
    return train_agent(run, name, network, fit, prepare(run, data))[0]


# What decides what an agent with given parameters does in an episode.
ACTING_CODE = (*TRAINING_CODE, "agent.py", "collection.py", "evaluation.py")


def play(
    run: Run,
    folder: pathlib.Path,
    episodes: int,
    seed: int,
    *,
    lanes: int,
    prompt: str,
    workers: int = 1,
    checkpoint: str = "latest",
    tasks: Sequence[str] = (),
    **choices: Any,
) -> pd.DataFrame:
    """Play `tasks`, or every task that the agent in `folder` was trained on; prints progress.

    Played episodes are kept beside the agent, so an interrupted evaluation goes on. `choices` are
    those of `Agent`. Raises ConfigError where it was trained on imports or documents alone, which
    have no simulator.
    """
    trained = trained_on(folder)
    tasks = tuple(tasks) or trained.tasks
    if not tasks:
        raise ConfigError(
            f"{folder.name}: trained on imports or documents alone, there is nothing to play"
        )
    step = checkpoint_step(folder, checkpoint)
    settings = [re.sub(r"[ ,]+", "_", f"{k}_{v}") for k, v in sorted(choices.items())]
    name = "-".join(["episodes", prompt, *settings, f"step_{step}"])
    given = read_meta(folder).get("released", {}).get("prompts_sha256")
    if given and prompt != "none":  # the folder is named by the parameters alone
        name += f"-prompts_{given[:8]}"
    evaluation = Evaluation(
        Loader(str(folder), checkpoint, tuple(sorted(choices.items())), step),
        seed,
        prompts_for(run, folder, prompt, tasks),
        prompt,
    )
    path = folder / name
    return play_all(evaluation, tasks, episodes, path, lanes=lanes, workers=workers)


def play_all(
    evaluation: Evaluation,
    tasks: Sequence[str],
    episodes: int,
    path: pathlib.Path,
    *,
    lanes: int,
    workers: int,
    code: Sequence[str] = (),
) -> pd.DataFrame:
    """`rollouts` to the end; prints progress.

    The episodes are kept in a file whose name begins like `path` and holds the lanes and a digest
    of the code that decides them: the simulators', that of acting, and the modules in `code`.
    """
    parts = [domains.domain_of(t).code for t in tasks]
    text = source_digest(*ACTING_CODE, *code) + "".join(sorted(set(parts)))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = path.with_name(f"{path.name}-lanes_{lanes}-{digest}.csv")
    total, progress, begin, before = episodes * len(tasks), Progress(), time.time(), None
    for played in rollouts(evaluation, tasks, episodes, path, lanes=lanes, workers=workers):
        before = len(played) if before is None else before
        rate = (len(played) - before) / (time.time() - begin + 1e-9)
        left = f", about {duration((total - len(played)) / rate)} left" if rate > 0 else ""
        progress(f"{len(played)} of {total} episodes played{left}", done=len(played) == total)
    return played


# --- conversation ---------------------------------------------------------------------------------

Turns = Sequence[tuple[int, str]]  # of speaker 0, who asks, or 1, the agent; and what they say


def reply(
    agent: Agent, turns: Turns, sampling: Sampling, context_length: int, seed: int, most: int = 40
) -> str:
    """What the agent says next, at most `most` tokens: the rest of its line (paper 4.3).

    The oldest turns are left out where they do not fit the context. Turn n has random numbers of
    its own. Raises ConfigError where not even the last turn fits.
    """
    for first in range(len(turns)):
        prompt = vision_language.conversation(turns[first:]) + f"{vision_language.SPEAKERS[1]}:"
        if len(agent.text.encode(prompt)) + most <= context_length:
            break
    else:
        raise ConfigError(f"the last turn does not fit {context_length} tokens, less {most}")
    (said,) = sample_texts(
        agent.config,
        agent.params,
        agent.text,
        [Document((prompt,))],
        sampling,
        max_tokens=most,
        context_length=context_length,
        seed=seed + 1_000 * len(turns),
        stop="\n",
    )[0]
    return said


def talk_html(turns: Turns) -> str:
    """A conversation as HTML, each line escaped."""
    lines = [f"<b>{'you' if who == 0 else 'agent'}</b>: {html.escape(said)}" for who, said in turns]
    return "<br>".join(lines)


# --- trials ---------------------------------------------------------------------------------------


class Experiment(Protocol):
    """One point of a grid: picklable settings, and `run`: metrics, and what was played.

    `name` and `train.seed` together are its own; `data` is what it is trained on, and `key` all
    that decides the outcome, wherever it runs.
    """

    name: str
    train: TrainConfig
    data: DataConfig
    held_out: bool

    @property
    def key(self) -> str: ...

    def run(self, run: Run) -> tuple[pd.DataFrame, pd.DataFrame]: ...


@dataclasses.dataclass(frozen=True)
class Trial:
    """An agent that is trained and then plays.

    `train.seed` decides the first parameters and the order of batches. Every trial plays the same
    `episodes` of each task.
    """

    name: str
    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    episodes: int
    prompt: str = "none"
    continuous: str = "sample"
    lanes: int = 5
    held_out: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """All settings."""
        return repr(self)

    def run(self, run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Metrics (as `train_agent`) and played episodes (as `play`).

        What was done before is not done again.
        """
        prepared = _prepare_once(run, self.data)
        folder, metrics = train_agent(run, self.name, self.model, self.train, prepared)
        played = play(
            run,
            folder,
            self.episodes,
            seed=0,
            lanes=self.lanes,
            prompt=self.prompt,
            continuous=self.continuous,
        )
        return metrics, played


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """An agent that goes on learning from a few demonstrations, and plays as it learns (App. E).

    Attributes:
      train: `train.seed` decides the batches, and which demonstrations are drawn (`draw_few`).
      few: how many demonstrations of each task; 0 trains nothing.
      pieces: folder of the agent whose text pieces are used.
      start: folder of the agent that is started from; empty: random parameters.
      every: updates from one evaluation to the next.
      episodes: played of each task in every evaluation, always the same ones.
      final: others, played at the end: nothing was chosen by them.
    """

    name: str
    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    few: int
    pieces: str
    start: str
    every: int
    episodes: int
    final: int
    continuous: str = "sample"
    lanes: int = 5
    held_out: ClassVar[bool] = True

    @property
    def key(self) -> str:
        """All settings; of folders the names, which hold digests, and not where they lie."""
        names = {k: pathlib.Path(getattr(self, k)).name for k in ("pieces", "start")}
        return repr(dataclasses.replace(self, **names)) + inspect.getsource(draw_few)

    def run(self, run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Metrics (as `train_agent`), and played episodes with `updates` and whether `final`.

        Nothing of it is kept: it is minutes at most, and done again after an interruption.
        """
        text = TextTokenizer(pathlib.Path(self.pieces) / "text.model")
        if self.start:
            params = load_agent(self.start).params
        else:
            params = initial_state(self.model, self.train)["params"]
        rows, played = [], []

        def play_now(params: Any, updates: int, first: int, count: int, final: bool) -> None:
            agent = Agent(
                self.model,
                params,
                text,
                self.data.context_length,
                lengths,
                self.data.parallel_actions,
                self.data.tell_return,
                self.data.executed_domains,
                continuous=self.continuous,
            )
            how = Evaluation(lambda: agent, 0)
            for batch in batches(self.data.tasks, count, self.lanes):
                again = how.play(tuple((task, first + index) for task, index in batch))
                played.extend(row | {"updates": updates, "final": final} for row in again)

        lengths: dict[str, int] = {}
        step = 0
        if self.few:
            few = (self.few, self.train.seed)
            prepared = prepare(run, self.data, text, held_out=True, few=few)
            lengths = {group.name: group.length for group in prepared.mixture.groups}
            cadence = {"report_every": self.every, "save_every": self.train.steps}
            for metrics, trained in train(
                self.model, self.train, prepared.mixture, params=params, **cadence
            ):
                rows += _metric_rows(metrics)
                # The next update is given those away.
                params, step = jax.tree.map(jnp.copy, trained), metrics.step
                play_now(params, step, 0, self.episodes, False)
        play_now(params, step, self.episodes, self.final, True)
        close_environments()
        return pd.DataFrame(rows), pd.DataFrame(played)


def run_trial(run: Run, trial: Experiment) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`trial.run`; an error carries the trial's name."""
    try:
        return trial.run(run)
    except Exception as error:
        error.add_note(f"in trial {trial.name!r}, seed {trial.train.seed}")
        raise


_prepare_once = functools.lru_cache(maxsize=1)(prepare)


def run_trials(
    run: Run, trials: Sequence[Experiment], workers: int = 1
) -> Iterator[tuple[Experiment, pd.DataFrame, pd.DataFrame]]:
    """Run trials, `workers` at a time on a core each, yielding (trial, metrics, played).

    Each is yielded when it is done. Trials of one data set follow each other, so that a worker
    seldom has to read another. Prints progress. With one worker everything happens in this process,
    on all cores. Raises ConfigError for two equal trials; an error in a trial carries its name, and
    comes when those that run beside it are done and were yielded.
    """
    if len({(t.name, t.train.seed) for t in trials}) < len(trials):
        raise ConfigError("two trials have the same name and seed")
    progress, begin = Progress(every=0.0), time.perf_counter()
    trials = sorted(trials, key=lambda t: t.data.digest())
    for config in dict.fromkeys(t.data for t in trials):
        held_out = any(t.held_out for t in trials if t.data == config)
        collect(run, config, held_out=held_out)  # before the workers start: they would all
    with contextlib.ExitStack() as stack:
        if workers == 1:
            outcomes = ((t, run_trial(run, t)) for t in trials)
        else:
            pool = stack.enter_context(collection.worker_pool(workers, pinned=True))
            outcomes = _in_turn(pool, functools.partial(_run_quietly, run), trials, workers)
        for number, (trial, outcome) in enumerate(outcomes, start=1):
            spent = time.perf_counter() - begin
            left = duration(spent / number * (len(trials) - number))
            progress(f"{number} of {len(trials)} trials: {trial.name}, about {left} left")
            yield trial, *outcome


def sweep(
    run: Run,
    name: str,
    trials: Sequence[Experiment],
    rows_of: Callable[[Any, pd.DataFrame, pd.DataFrame], list[dict[str, Any]]],
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
) -> pd.DataFrame:
    """Run a grid of trials and return its rows: those of every trial that is done, in order.

    The rows of each are in a file of their own, `results/<name>/<trial>-<digest>.csv`, written when
    the trial is over; the digest is of its settings and of the code, but not of `rows_of`: let that
    keep raw numbers, and judge them afterwards. A trial whose file is there is not run again, so a
    grid that was interrupted goes on. `part` (i, n) is one of n machines' share: each runs every
    n-th trial, and their files, copied into one folder, are the whole. How many are done is
    printed. Raises what `run_trials` and `results.read_rows` raise.
    """
    code = source_digest(*ACTING_CODE)
    paths = {}
    for trial in trials:
        sources = sorted({domains.domain_of(t).code for t in trial.data.tasks})
        parts = [trial.key, inspect.getsource(type(trial).run), code, *sources]
        digest = hashlib.sha256("".join(parts).encode()).hexdigest()[:8]
        paths[trial] = run.results / name / f"{trial.name}-{digest}.csv"
    if len(set(paths.values())) < len(trials):
        raise ConfigError(f"{name}: two trials are the same")
    index, of = part
    todo = [t for t in trials[index::of] if not paths[t].is_file()]
    for trial, metrics, played in run_trials(run, todo, workers):
        results.write_rows(paths[trial], rows_of(trial, metrics, played))
    done = [path for path in paths.values() if path.is_file()]
    print(f"{len(done)} of {len(trials)} trials are done")
    if not done:
        return pd.DataFrame(columns=list(results.COLUMNS))
    return pd.concat([results.read_rows(path) for path in done], ignore_index=True)


def _in_turn(
    pool: concurrent.futures.Executor,
    function: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int,
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) of each, `workers` at a time, as they end.

    After the first that fails none begins any more, and it is raised last: what runs at that moment
    may have taken an hour, and is yielded. No more are submitted than run, for those that a pool
    has put in line can not be stopped.
    """
    waiting, running, failed = iter(items), {}, None
    while True:
        while failed is None and len(running) < workers:
            try:
                item = next(waiting)
            except StopIteration:
                break
            running[pool.submit(function, item)] = item
        if not running:
            break
        ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in ended:
            item = running.pop(future)
            if error := future.exception():
                failed = failed or error
            else:
                yield item, future.result()
    if failed:
        raise failed


def _run_quietly(run: Run, trial: Experiment) -> tuple[pd.DataFrame, pd.DataFrame]:
    jax.clear_caches()  # what the worker's last trial compiled is not wanted again
    with contextlib.redirect_stdout(io.StringIO()):
        return run_trial(run, trial)


# --- specialists ----------------------------------------------------------------------------------


def mixture_domains(config: DataConfig) -> list[str]:
    """The domains of a mixture, in the order in which `prepare` groups them."""
    named = [*config.tasks, *(source.name for source in sources(config))]
    for entry in config.documents:
        of_user = entry.startswith("{")
        named.append(importers.Source.load(entry).name if of_user else entry.partition(" ")[0])
    return list(dict.fromkeys(name.split("/")[0] for name in named))


def updates_by_domain(trained: TrainedOn) -> dict[str, int]:
    """How many updates of a training each domain had, counted in the order of its batches."""
    names = mixture_domains(trained.data)
    weights = trained.data.domain_weights
    parts = [grain.MapDataset.range(1).repeat().map(lambda _, name=n: name) for n in names]
    order = grain.MapDataset.mix(parts, weights=[weights.get(n, 1.0) for n in names])
    drawn = [order[i] for i in range(trained.steps)]
    return {n: drawn.count(n) for n in names}


def specialist(trained: TrainedOn, domain: str, steps: int) -> TrainedOn:
    """Settings of an agent for one of the domains that `trained` holds; all else is equal.

    Its batches, by number, are those that the generalist has of the domain if both have the same
    pieces of text. Raises ConfigError.
    """
    data = trained.data
    tasks = tuple(t for t in data.tasks if t.split("/")[0] == domain)
    if not tasks:
        raise ConfigError(f"{domain!r}: the generalist was trained on {mixture_domains(data)}")
    own = tuple((n, w) for n, w in data.weights if n.split("/")[0] == domain)
    return TrainedOn(
        dataclasses.replace(
            data,
            tasks=tasks,
            episodes=tuple((d, n) for d, n in data.episodes if d.split("/")[0] == domain),
            weights=own if any("/" in name for name, _ in own) else (),
            imports=(),
            documents=(),
            parallel_actions=tuple(d for d in data.parallel_actions if d == domain),
        ),
        dataclasses.replace(
            trained.train,
            steps=steps,
            warmup_steps=min(trained.train.warmup_steps, steps // 2),
        ),
    )


def tokens_seen(mixture: Mixture, seed: int, updates: int) -> int:
    """Tokens in the first batches of a training, padding not counted: they are drawn again."""
    batches = mixture.dataset(seed)
    return sum(count_tokens(batches[i].batch) for i in range(updates))


# --- progress -------------------------------------------------------------------------------------


class Progress:
    """Prints a line at most every few seconds, and always the last."""

    def __init__(self, every: float = 10.0):
        self._every = every
        self._begin = time.perf_counter()
        self._last = -every

    def __call__(self, line: str, done: bool = False) -> None:
        now = time.perf_counter() - self._begin
        if done or now - self._last >= self._every:
            self._last = now
            print(f"[{duration(now):>8}] {line}", flush=True)


def duration(seconds: float) -> str:
    """As in 4 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def provenance() -> str:
    """One line for the end of a notebook."""
    return f"commit {results.git_sha()} | {results.hardware()} | {results.versions()}"
