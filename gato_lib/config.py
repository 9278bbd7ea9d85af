"""Sizes and settings: frozen dataclasses, checked when they are made.

`MODEL_SIZES` holds the paper's three networks (App. C.1, Table 5) and three small ones for two
cores. Everything a run depends on is in these dataclasses, so `digest` names a run.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Self


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type or is out of range."""


@functools.cache
def source_digest(*modules: str) -> str:
    """Eight hex digits that change when the code of these files of gato_lib does.

    What was made by code is kept under such a digest, so that changed code never passes off old
    data, weights or scores as its own. Comments do not count.
    """
    digest = hashlib.sha256()
    for name in modules:
        source = (pathlib.Path(__file__).parent / name).read_bytes()
        digest.update(ast.dump(ast.parse(source)).encode())
    return digest.hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all settings: types are checked when they are made, dicts are their stored form."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kind = {"int": int, "float": (int, float), "str": str, "bool": bool}.get(field.type)
            value = getattr(self, field.name)
            if kind and (
                not isinstance(value, kind) or (isinstance(value, bool) != (kind is bool))
            ):
                got = f"{type(value).__name__} {value!r}"
                raise ConfigError(
                    f"{type(self).__name__}: {field.name} is {got}, expected {field.type}"
                )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a plain dict; raises ConfigError naming an unknown or missing key."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown key {unknown}; known: {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error

    def digest(self) -> str:
        """Eight hex digits that change when any setting changes."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{type(self).__name__}: {message}")


def _one_of(config: Settings, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    config._require(value in allowed, f"{name} is {value!r}, expected one of {allowed}")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """The network (paper 2.2, 2.3, App. C).

    Attributes:
      depth, num_heads, width, head_dim: transformer blocks, attention heads, layer width, and
        key/value size (Table 5).
      mlp_dim: Table 5's feed-forward "hidden size". It counts both halves of the GEGLU: a
        projection to `mlp_dim`, split into `mlp_dim / 2` gates and as many values. This reading,
        with tied embeddings and one relative-position projection a layer, is the only one of those
        counted in notebook 03 that comes within 1 % of all three published totals.
      text_rows: rows of the lookup table kept for text ids `[0, text_rows)`. The ids are always
        the paper's (`tokenizers`); a small preset with a small SentencePiece keeps fewer rows.
      discrete_range: "shared" lets discrete values use text ids [0, 1024), by the letter of the
        paper; "own" gives them ids of their own.
      value_rows: how the 1,024 rows of the value bins start. "random": like every other row.
        "ordinal": fixed random cosine features of the bin centre, then trained freely.
      stochastic_depth: probability that a sub-layer is skipped in training (App. C).
      dropout: share of a sub-layer's outputs that training sets to zero. The paper drops in
        fine-tuning only, 0.1 (App. E); where is not stated.
      sequence_positions: "relative" (Transformer-XL), "sinusoidal" (absolute, added to the input)
        or "none". The paper names no scheme; see `mlp_dim` for what points to the first.
      local_positions: whether tokens carry their place within the timestep (App. C.3).
      patch_embedder: "residual" (App. C.2) or "linear", one matrix on the flattened patch.
      feed_forward: "geglu" as above; for comparison "geglu_full", mlp_dim gates and as many values,
        and "gelu", no gates.
      tied: whether the lookup table is also the output projection.
      attention: implementation of attention; `attention.py` says what each supports.
      scan_layers: compile one block and scan over depth, instead of unrolling.
      remat: compute a block's activations again in the backward pass instead of keeping them. Use
        it with `scan_layers`: unrolled it costs time and, on a CPU, saves nothing (notebook 03).
      compute_dtype: dtype of activations and matrix products; parameters are float32.

    `attention`, `scan_layers` and `remat` change speed and memory, never parameters, and results by
    no more than rounding. A run's name is made of all settings, of these too.
    """

    depth: int
    num_heads: int
    width: int
    mlp_dim: int
    head_dim: int
    text_rows: int = 32_000
    discrete_range: str = "shared"
    value_rows: str = "random"
    stochastic_depth: float = 0.1
    dropout: float = 0.0
    sequence_positions: str = "relative"
    local_positions: bool = True
    patch_embedder: str = "residual"
    feed_forward: str = "geglu"
    tied: bool = True
    attention: str = "auto"
    scan_layers: bool = False
    remat: bool = False
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "num_heads", "width", "mlp_dim", "head_dim"):
            self._require(getattr(self, name) > 0, f"{name} must be positive")
        self._require(self.width % 2 == 0, "width must be even (sinusoidal positions)")
        self._require(self.mlp_dim % 2 == 0, "mlp_dim must be even (two GEGLU halves)")
        self._require(
            1024 <= self.text_rows <= 32_000,
            f"text_rows is {self.text_rows}, expected 1024 to 32000 "
            "(discrete values share the first 1024)",
        )
        self._require(0 <= self.stochastic_depth < 1, "stochastic_depth must lie in [0, 1)")
        self._require(0 <= self.dropout < 1, "dropout must lie in [0, 1)")
        _one_of(self, "discrete_range", ("shared", "own"))
        _one_of(self, "value_rows", ("random", "ordinal"))
        _one_of(self, "sequence_positions", ("relative", "sinusoidal", "none"))
        _one_of(self, "patch_embedder", ("residual", "linear"))
        _one_of(self, "feed_forward", ("geglu", "geglu_full", "gelu"))
        _one_of(self, "attention", ("auto", "plain", "blocked", "dot_product", "flash"))
        _one_of(self, "compute_dtype", ("float32", "bfloat16"))


#                          depth heads width   mlp head_dim
MODEL_SIZES: dict[str, ModelConfig] = {
    "1.18B": ModelConfig(24, 16, 2048, 8192, 128),  # Table 5, Gato itself
    "364M": ModelConfig(12, 12, 1536, 6144, 128),
    "79M": ModelConfig(8, 24, 768, 3072, 32),
    # Ours, named by width and depth. The network is the same; only numbers shrink.
    "w256d6": ModelConfig(6, 8, 256, 1024, 32),
    "w128d4": ModelConfig(4, 4, 128, 512, 32),
    "w64d2": ModelConfig(2, 4, 64, 256, 16),
}


def model_config(size: str, **changes: Any) -> ModelConfig:
    """`MODEL_SIZES[size]` with some settings replaced; raises ConfigError for an unknown size."""
    if size not in MODEL_SIZES:
        raise ConfigError(f"unknown model size {size!r}; known: {sorted(MODEL_SIZES)}")
    return ModelConfig.from_dict(MODEL_SIZES[size].to_dict() | changes)


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """What is collected (paper 3.1, App. F) and how it is cut into batches (2.3, App. D).

    Attributes:
      tasks: task ids of `domains.TASKS`.
      episodes: demonstrations collected for each task, before the return filter, by domain, or by
        task where one has a number of its own.
      noise: fractions of executed actions that are random (discrete) or the standard deviation
        of Gaussian noise (continuous), cycled over episodes. The recorded action is always the
        expert's own.
      weights: share of sequences for each domain; empty means equal. Its tasks share it alike, but
        for those named here, which have weights of their own beside their domain's.
      context_length: longest training sequence, in tokens.
      batch_tokens: tokens a batch, before rounding to whole sequences.
      rows_multiple: batches have a multiple of so many sequences, so that as many devices can
        share them.
      validation_fraction: share of each task's episodes, rounded down, that training never sees
        and the validation loss is measured on.
      prompt_fraction: share of sequences that start with a prompt (25 % in the paper).
      prompt_ends: share of these whose prompt is the end of an episode (half in the paper); the
        others are from anywhere in one.
      inputs: whose actions stand in the sequences of the domains in `practice`: the "expert"'s, or
        those that were "executed", noise and the agent's included. What is predicted is the
        expert's (`Tokenizer`).
      practice: demonstrations in which an agent led part of the way and the expert said what it
        would have done (`dagger`): the agent's run or folder, and how many a task, by domain or
        task.
      text_loss: whether text observations count in the loss, as in the paper.
      vocabulary_size: SentencePiece pieces; 32000 is the vendored model, less is trained on the
        run's own text.
      discrete_range: ids of discrete values, as in ModelConfig; the two must agree.
      imports: data sets recorded elsewhere, each as `importing.Source.text`.
      documents: sets of text and images (3.2), each a name of `vision_language.SETS` with the
        number of examples to train on, as in "captions/scenes 2000", or a user's own as
        `vision_language.importers.Source.text`.
      document_length: longest sequence of these, in tokens; 0 is `context_length`. Text in them
        always counts in the loss.
      question_loss: whether the text of questions does too, by the letter of the paper.
      parallel_actions: domains whose actions are zeroed where they are inputs, so that all of a
        step's are predicted in one pass; the paper does so for its robot alone (App. G).
      tell_return: domains whose episodes are all kept, also those that failed, and told apart:
        every timestep has one more observation, the episode's score as a share of the best. Asked
        for the best, the agent then acts as in those (5.3).
      blind: whether their images are replaced by plain grey ones: what can be said of images that
        are never seen.
      goals_aside: whether the demonstrations of goals that `set_aside` names are left out, so that
        these can be played as nothing that was trained on.
    """

    tasks: tuple[str, ...]
    episodes: tuple[tuple[str, int], ...]
    noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    weights: tuple[tuple[str, float], ...] = ()
    context_length: int = 1024
    batch_tokens: int = 524_288
    rows_multiple: int = 1
    validation_fraction: float = 0.05
    prompt_fraction: float = 0.25
    text_loss: bool = True
    vocabulary_size: int = 32_000
    discrete_range: str = "shared"
    seed: int = 0
    imports: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    document_length: int = 0
    question_loss: bool = True
    parallel_actions: tuple[str, ...] = ()
    tell_return: tuple[str, ...] = ()
    blind: bool = False
    goals_aside: bool = False
    prompt_ends: float = 0.5
    inputs: str = "expert"
    practice: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        practice = [(str(a), tuple((str(d), int(n)) for d, n in of)) for a, of in self.practice]
        object.__setattr__(self, "practice", tuple(practice))
        counts = [n for _, of in practice for _, n in of]
        self._require(all(n > 0 for n in counts), "practice: numbers of episodes must be positive")
        self._require(0 <= self.prompt_ends <= 1, "prompt_ends must lie in [0, 1]")
        _one_of(self, "inputs", ("expert", "executed"))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "documents", tuple(self.documents))
        object.__setattr__(self, "imports", tuple(self.imports))
        object.__setattr__(self, "noise", tuple(float(x) for x in self.noise))
        object.__setattr__(self, "weights", tuple((str(d), float(w)) for d, w in self.weights))
        some = len(self.tasks) + len(self.imports) + len(self.documents)
        self._require(some > 0, "there are no tasks, no imports and no documents")
        self._require(len(set(self.tasks)) == len(self.tasks), "tasks holds a task twice")
        object.__setattr__(self, "episodes", tuple((str(d), int(n)) for d, n in self.episodes))
        missing = {t.split("/")[0] for t in self.tasks if not count_of(self.episodes, t)}
        self._require(not missing, f"episodes names no number for {sorted(missing)}")
        self._require(all(n > 0 for _, n in self.episodes), "episodes must be positive")
        object.__setattr__(self, "parallel_actions", tuple(self.parallel_actions))
        object.__setattr__(self, "tell_return", tuple(self.tell_return))
        self._require(len(self.noise) > 0 and min(self.noise) >= 0, "noise must be >= 0")
        self._require(all(w > 0 for _, w in self.weights), "weights must be positive")
        self._require(self.context_length > 0, "context_length must be positive")
        self._require(self.document_length >= 0, "document_length must be >= 0")
        self._require(self.batch_tokens > 0, "batch_tokens must be positive")
        self._require(self.rows_multiple > 0, "rows_multiple must be positive")
        self._require(0 <= self.validation_fraction < 1, "validation_fraction must lie in [0, 1)")
        _one_of(self, "discrete_range", ("shared", "own"))
        self._require(self.seed >= 0, "seed must be >= 0")
        self._require(0 <= self.prompt_fraction <= 1, "prompt_fraction must lie in [0, 1]")
        self._require(
            300 <= self.vocabulary_size <= 32_000,
            f"vocabulary_size is {self.vocabulary_size}, expected 300 to 32000",
        )

    @property
    def executed_domains(self) -> frozenset[str]:
        """Domains whose sequences hold the actions that were executed, for `inputs`."""
        led = frozenset(n.split("/")[0] for _, counts in self.practice for n, _ in counts)
        return led if self.inputs == "executed" else frozenset()

    @property
    def domain_weights(self) -> dict[str, float]:
        """`weights` by domain, each with those of its tasks."""
        sums: dict[str, float] = {}
        for name, weight in self.weights:
            domain = name.split("/")[0]
            sums[domain] = sums.get(domain, 0.0) + weight
        return sums

    def task_weights(self, tasks: Sequence[str]) -> dict[str, float] | None:
        """How often each of a domain's tasks is drawn, in proportion; None where all are alike."""
        weights = dict(self.weights)
        named = {t: weights[t] for t in tasks if t in weights}
        if not named:
            return None
        others = len(tasks) - len(named)
        rest = weights.get(tasks[0].split("/")[0], 0.0)
        self._require(
            (others > 0) == (rest > 0),
            f"weights: {others} of {len(tasks)} tasks of {tasks[0].split('/')[0]} have none of "
            f"their own, and {rest:g} to share",
        )
        return {t: named.get(t) or rest / others for t in tasks}


def count_of(counts: Sequence[tuple[str, int]], task: str) -> int:
    """A task's number in `DataConfig.episodes` or `practice`: its own or its domain's, or 0."""
    numbers = dict(counts)
    return numbers.get(task) or numbers.get(task.split("/")[0], 0)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """Optimisation (App. D). Defaults are the paper's for 1.18B parameters.

    Attributes:
      schedule: "cosine", linear warm-up from `start_lr` and decay to `final_lr_factor` of the
        peak, or "constant" (fine-tuning, App. E; `warmup_steps` apply there too).
      restarts: updates after which the cosine begins anew, warm-up included (Loshchilov and Hutter
        2017), as where an agent that was trained to its end is trained on; the paper has none.
      clip_norm: global gradient norm above which gradients are scaled down; 0 is off (the paper
        names none).
      soft_sigma: standard deviation, in bins, of a Gaussian over neighbouring bins used as the
        target of continuous actions; 0 is the paper's one bin.
    """

    steps: int = 1_000_000
    peak_lr: float = 1e-4
    start_lr: float = 1e-7
    schedule: str = "cosine"
    final_lr_factor: float = 0.1
    restarts: tuple[int, ...] = ()
    warmup_steps: int = 15_000
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 0.0
    soft_sigma: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.steps > 0, "steps must be positive")
        self._require(self.seed >= 0, "seed must be >= 0")
        object.__setattr__(self, "restarts", tuple(self.restarts))  # JSON has lists
        for at in self.restarts:
            self._require(type(at) is int, f"restarts {self.restarts} must be whole numbers")
        ends = (0, *self.restarts, self.steps)
        cycles = [end - begin for begin, end in itertools.pairwise(ends)]
        self._require(
            min(cycles) > 0, f"restarts {self.restarts} must rise, between 0 and steps {self.steps}"
        )
        self._require(
            0 <= self.warmup_steps < min(cycles),
            f"warmup_steps {self.warmup_steps} must be below steps {self.steps}, and below what "
            f"lies between restarts {self.restarts}",
        )
        self._require(self.peak_lr > 0, "peak_lr must be positive")
        self._require(0 < self.final_lr_factor <= 1, "final_lr_factor must lie in (0, 1]")
        _one_of(self, "schedule", ("cosine", "constant"))
        self._require(
            self.schedule == "cosine" or not self.restarts, "a constant rate has no restarts"
        )
        self._require(self.clip_norm >= 0, "clip_norm must be >= 0")
        self._require(self.soft_sigma >= 0, "soft_sigma must be >= 0")


# App. E: Adam (no decay) at a constant rate, with `ModelConfig.dropout` 0.1. Batches of 64 x 1,024.
FINE_TUNING = TrainConfig(
    steps=10_000, peak_lr=1e-5, schedule="constant", warmup_steps=0, weight_decay=0.0
)
