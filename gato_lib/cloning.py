"""Behaviour cloning with a small convolutional network: the baseline of RGB Stacking (5.3, 5.4).

The paper sets Gato beside BC-IMP of Lee et al. 2021, a convolutional network that sees the newest
observation alone and imitates the demonstrator's action. Ours is of that kind:

    each camera (H, W, 3) -> 8x8 stride 4 -> 4x4 stride 2 -> 3x3 -> features -.
    all numbers, standardised ------------------------------------------------+-> two layers -> p(a)

Actions are scaled to [-1, 1] by the bounds of their space. p(a) is a mixture of Gaussians, of which
an action is drawn, as BC-GMM of Mandlekar et al. 2021 does. Demonstrators wait, turn back and try
again for reasons that no single image shows; a network that answers with one action for each image,
the mean or the median of them, stops where they most often waited, and stays there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx

from gato_lib.config import ConfigError, Settings, source_digest
from gato_lib.episodes import DataError, Episode, check_observation, flatten, validate
from gato_lib.files import atomic_path
from gato_lib.sequence import IMAGE, TEXT, as_images, image_layout, space_kind

KERNELS = ((8, 4), (4, 2), (3, 1))  # side and stride of each convolution
POOLS = ("flat", "softmax", "both")
MIN_DEVIATION = 0.02  # of a Gaussian, 1 % of the range: a density has no limit without


@dataclasses.dataclass(frozen=True)
class CloningConfig(Settings):
    """The network and its training.

    Attributes:
      channels: of the three convolutions, which every camera has for itself.
      pool: what is read off the last of them: "flat", every value; "softmax", where in the image
        each channel is strongest (a spatial soft-argmax); or "both".
      width: of the two layers behind.
      modes: Gaussians of the mixture, each over all numbers of an action at once.
      shift: pixels by which a training image is moved at most, each way and each camera for itself;
        the border is repeated. 0 is off.
      validation_fraction: share of the episodes, rounded down, that training never sees.
    """

    channels: tuple[int, ...] = (16, 32, 32)
    pool: str = "both"
    width: int = 256
    modes: int = 5
    steps: int = 4_000
    batch_size: int = 256
    peak_lr: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 1e-2
    shift: int = 0
    validation_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "channels", tuple(int(c) for c in self.channels))
        self._require(
            len(self.channels) == len(KERNELS) and min(self.channels) > 0,
            f"channels is {self.channels}, expected {len(KERNELS)} positive numbers",
        )
        self._require(self.pool in POOLS, f"pool is {self.pool!r}, expected one of {POOLS}")
        for name in ("width", "modes", "steps", "batch_size", "peak_lr"):
            self._require(getattr(self, name) > 0, f"{name} must be positive")
        self._require(
            0 <= self.warmup_steps < self.steps,
            f"warmup_steps {self.warmup_steps} must be below steps {self.steps}",
        )
        for name in ("weight_decay", "shift", "seed"):
            self._require(getattr(self, name) >= 0, f"{name} must be >= 0")
        self._require(0 <= self.validation_fraction < 1, "validation_fraction must lie in [0, 1)")


# --- what goes in and out -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """What of the two spaces the network depends on.

    Attributes:
      images: key and shape (H, W, 3) of each image, as the network gets it.
      numbers: key and number of values of every other leaf.
      low, high: bounds of the actions, flat.
    """

    images: tuple[tuple[str, tuple[int, ...]], ...]
    numbers: tuple[tuple[str, int], ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, observation_space: gym.Space, action_space: gym.Space) -> Layout:
        """Raises DataError for text observations and for actions that are no bounded Box."""
        images, numbers = [], []
        for key, space in flatten(observation_space).items():
            kind = space_kind(space)
            if kind == TEXT:
                raise DataError(f"observation {key!r} is text, which this network cannot read")
            if kind == IMAGE:
                blank = as_images(np.zeros((1, *space.shape), np.uint8), image_layout(space))
                images.append((key, blank.shape[1:]))
            else:
                numbers.append((key, int(np.prod(space.shape, dtype=int))))
        if not (
            isinstance(action_space, gym.spaces.Box)
            and action_space.dtype.kind == "f"
            and action_space.is_bounded()
        ):
            raise DataError(f"actions are {action_space}, expected a Box of floats with bounds")
        bounds = (tuple(map(float, b.ravel())) for b in (action_space.low, action_space.high))
        return cls(tuple(images), tuple(numbers), *bounds)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        images = tuple((str(k), tuple(map(int, shape))) for k, shape in values["images"])
        numbers = tuple((str(k), int(n)) for k, n in values["numbers"])
        return cls(images, numbers, tuple(values["low"]), tuple(values["high"]))

    @property
    def width(self) -> int:
        """How many numbers there are beside the images."""
        return sum(n for _, n in self.numbers)

    def read_numbers(self, leaves: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
        """Float32 (rows, `width`)."""
        parts = [np.asarray(leaves[k], np.float32).reshape(rows, -1) for k, _ in self.numbers]
        return np.concatenate([np.zeros((rows, 0), np.float32), *parts], axis=1)

    def scale(self, actions: np.ndarray) -> np.ndarray:
        """Actions (B, ...) to float32 (B, A) in [-1, 1]."""
        low, high = np.array(self.low), np.array(self.high)
        flat = actions.reshape(len(actions), -1)
        return (2.0 * (flat - low) / (high - low) - 1.0).astype(np.float32)

    def unscale(self, actions: np.ndarray) -> np.ndarray:
        """The inverse, clipped to the bounds."""
        low, high = np.array(self.low), np.array(self.high)
        return low + (np.clip(actions, -1.0, 1.0) + 1.0) * (high - low) / 2.0


Inputs = dict[str, Any]  # "images": key -> uint8 (B, H, W, 3), "numbers": float32 (B, N)


class Steps:
    """The timesteps of episodes, gathered a batch at a time: images are never copied as a whole."""

    def __init__(self, episodes: Sequence[Episode], layout: Layout, space: gym.Space):
        self._layout = layout
        self._observed = [flatten(e.observations) for e in episodes]
        self._styles = {key: image_layout(flatten(space)[key]) for key, _ in layout.images}
        lengths = [e.steps for e in episodes]
        self._episode = np.repeat(np.arange(len(episodes)), lengths)
        self._step = np.concatenate([np.zeros(0, int), *map(np.arange, lengths)])
        # All but the last observation, on which nobody acted.
        whole = zip(self._observed, lengths, strict=True)
        cut = [{k: v[k][:n] for k, _ in layout.numbers} for v, n in whole]
        empty = np.zeros((0, layout.width), np.float32)
        pairs = zip(cut, lengths, strict=True)
        self.numbers = np.concatenate([empty, *(layout.read_numbers(c, n) for c, n in pairs)])
        none = np.zeros((0, len(layout.low)), np.float32)
        self.actions = np.concatenate([none, *(layout.scale(e.actions) for e in episodes)])

    def __len__(self) -> int:
        return len(self._step)

    def gather(
        self, index: np.ndarray, shift: int = 0, rng: np.random.Generator | None = None
    ) -> tuple[Inputs, np.ndarray]:
        """Inputs of these timesteps, and their actions (B, A); images moved by up to `shift`."""
        places = list(zip(self._episode[index].tolist(), self._step[index].tolist(), strict=True))
        images = {}
        for key, _ in self._layout.images:
            batch = np.stack([self._observed[e][key][t] for e, t in places])
            images[key] = as_images(batch, self._styles[key])
            if shift:
                images[key] = shifted(images[key], rng.integers(-shift, shift + 1, (len(index), 2)))
        return {"images": images, "numbers": self.numbers[index]}, self.actions[index]


def shifted(images: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Images (B, H, W, 3) moved by (down, right) pixels (B, 2), the border repeated."""
    most = int(np.abs(by).max(initial=0))
    _, h, w, _ = images.shape
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    out = np.empty_like(images)
    for i, (down, right) in enumerate(most - by):
        out[i] = padded[i, down : down + h, right : right + w]
    return out


# --- the network ----------------------------------------------------------------------------------


class CameraNet(nnx.Module):
    """uint8 images (B, H, W, 3) to features (B, F)."""

    def __init__(self, config: CloningConfig, *, rngs: nnx.Rngs):
        layers, inputs = [], 3
        for (side, stride), outputs in zip(KERNELS, config.channels, strict=True):
            layers.append(nnx.Conv(inputs, outputs, (side, side), (stride, stride), rngs=rngs))
            layers.append(nnx.relu)
            inputs = outputs
        self.layers = nnx.Sequential(*layers[:-1])
        self.sharpness = nnx.Param(jnp.ones(())) if config.pool != "flat" else None
        self.pool = config.pool

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.layers(images.astype(jnp.float32) / 127.5 - 1.0)  # (B, h, w, C)
        rows, h, w, channels = x.shape
        features = []
        if self.pool != "softmax":
            features.append(nnx.relu(x).reshape(rows, -1))
        if self.pool != "flat":
            p = jax.nn.softmax(self.sharpness[...] * x.reshape(rows, h * w, channels), axis=1)
            down, right = jnp.meshgrid(
                jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij"
            )
            at = jnp.stack([down.ravel(), right.ravel()])
            features.append(jnp.einsum("bpc,xp->bcx", p, at).reshape(rows, -1))
        return jnp.concatenate(features, axis=1)


Mixture = tuple[Any, Any, Any]
"""Log-weights (B, K), means and standard deviations (B, K, A) of Gaussians over scaled actions."""


def log_density(mixture: Mixture, actions: jax.Array) -> jax.Array:
    """Log of the density of scaled actions (B, A): (B,)."""
    weights, means, deviations = mixture
    each = jax.scipy.stats.norm.logpdf(actions[:, None], means, deviations).sum(axis=2)  # (B, K)
    return jax.nn.logsumexp(weights + each, axis=1)


def draw(mixture: Mixture, rngs: Sequence[np.random.Generator]) -> np.ndarray:
    """A scaled action (A,) for each row, of that row's own generator: (B, A)."""
    actions = []
    for weights, means, deviations, rng in zip(*mixture, rngs, strict=True):
        share = np.exp(weights, dtype=np.float64)
        mode = rng.choice(len(share), p=share / share.sum())
        actions.append(rng.normal(means[mode], deviations[mode]))
    return np.stack(actions)


class CloningNet(nnx.Module):
    """Images and standardised numbers to a `Mixture`, whose means may lie past the bounds."""

    def __init__(self, layout: Layout, config: CloningConfig, *, rngs: nnx.Rngs):
        self.cameras = nnx.Dict({key: CameraNet(config, rngs=rngs) for key, _ in layout.images})
        seen = 0
        for key, shape in layout.images:
            blank = jax.ShapeDtypeStruct((1, *shape), np.uint8)
            seen += jax.eval_shape(self.cameras[key], blank).shape[1]
        width = config.width
        self.look = nnx.Linear(seen, width, rngs=rngs) if seen else None
        self.norm = nnx.LayerNorm(width, rngs=rngs) if seen else None
        inputs = layout.width + (width if seen else 0)
        self.hidden = nnx.Linear(inputs, width, rngs=rngs)
        self.hidden2 = nnx.Linear(width, width, rngs=rngs)
        self.shape = config.modes, len(layout.low)
        self.weights = nnx.Linear(width, config.modes, rngs=rngs)
        self.means = nnx.Linear(width, config.modes * len(layout.low), rngs=rngs)
        self.deviations = nnx.Linear(width, config.modes * len(layout.low), rngs=rngs)

    def __call__(self, images: Mapping[str, jax.Array], numbers: jax.Array) -> Mixture:
        if self.look is not None:
            features = [camera(images[key]) for key, camera in self.cameras.items()]
            seen = nnx.relu(self.norm(self.look(jnp.concatenate(features, axis=1))))
            numbers = jnp.concatenate([seen, numbers], axis=1)
        x = nnx.relu(self.hidden2(nnx.relu(self.hidden(numbers))))
        means, wide = (layer(x).reshape(-1, *self.shape) for layer in (self.means, self.deviations))
        return jax.nn.log_softmax(self.weights(x)), means, MIN_DEVIATION + jax.nn.softplus(wide)


Norm = tuple[
    np.ndarray, np.ndarray
]  # mean and standard deviation of the numbers, float32 (N,) each


def standardise(numbers: jax.Array, norm: Norm) -> jax.Array:
    """Numbers (B, N) about 0 and of size 1; what is far off is clipped."""
    mean, deviation = norm
    return jnp.clip((numbers - mean[None]) / deviation[None], -10.0, 10.0)


def _shell(layout: Layout, config: CloningConfig) -> tuple[Any, Any]:
    """The network's graph definition, and the shapes of its parameters."""
    return nnx.split(
        nnx.eval_shape(lambda: CloningNet(layout, config, rngs=nnx.Rngs(0))), nnx.Param
    )


def _named(params: Any) -> dict[str, Any]:
    """Leaves of a pytree of parameters by '/'-joined path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))
    return {"/".join(str(part.key) for part in path): leaf for path, leaf in leaves}


# --- training -------------------------------------------------------------------------------------


def fit(
    episodes: Sequence[Episode],
    held_out: Sequence[Episode],
    observation_space: gym.Space,
    action_space: gym.Space,
    config: CloningConfig,
    report_every: int = 200,
) -> Iterator[tuple[dict[str, float], Any, Norm]]:
    """Train, yielding (metrics, params, norm) every so many steps and at the end.

    Metrics are "step", "loss" (mean since the last report, in nats a number of the scaled action; a
    density's, so it may be negative), "validation_loss" (of all the held-out timesteps; NaN without
    any) and "timesteps_per_second". The parameters are given away to the next step: copy what is to
    outlive it. Raises DataError for an episode that does not fit its spaces, and FloatingPointError
    at the next report where the loss was not finite.
    """
    if not episodes:
        raise DataError("there are no episodes to train on")
    for i, episode in enumerate([*episodes, *held_out]):
        validate(episode, observation_space, action_space, f"episode {i}")
    layout = Layout.of(observation_space, action_space)
    steps, unseen = (Steps(part, layout, observation_space) for part in (episodes, held_out))
    deviation = steps.numbers.std(axis=0)
    # What never changes says nothing, and would be divided by zero.
    norm = steps.numbers.mean(axis=0), np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)

    graph, params = nnx.split(CloningNet(layout, config, rngs=nnx.Rngs(config.seed)), nnx.Param)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.peak_lr, config.warmup_steps, config.steps, end_value=config.peak_lr / 100
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay)
    )

    def errors(params, inputs, actions):
        """Loss of each timestep (B,)."""
        mixture = nnx.merge(graph, params)(inputs["images"], standardise(inputs["numbers"], norm))
        return -log_density(mixture, actions) / actions.shape[1]

    @jax.jit
    def validate_batch(params, inputs, actions):
        return errors(params, inputs, actions)

    def update(params, state, inputs, actions):
        loss, grads = jax.value_and_grad(lambda p: errors(p, inputs, actions).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def validation_loss() -> float:
        losses = []
        for first in range(0, len(unseen), config.batch_size):
            index = np.arange(first, min(first + config.batch_size, len(unseen)))
            whole = np.resize(index, config.batch_size)  # of one shape, the last one too
            losses.append(np.asarray(validate_batch(params, *unseen.gather(whole)))[: len(index)])
        return float(np.concatenate(losses).mean()) if losses else float("nan")

    update = jax.jit(update, donate_argnums=(0, 1))
    state, losses = jax.jit(tx.init)(params), []
    rng = np.random.default_rng(config.seed)
    order, since = np.zeros(0, int), time.perf_counter()
    for step in range(1, config.steps + 1):
        while len(order) < config.batch_size:
            order = np.concatenate([order, rng.permutation(len(steps))])
        index, order = order[: config.batch_size], order[config.batch_size :]
        batch = steps.gather(index, config.shift, rng)
        params, state, loss = update(params, state, *batch)
        losses.append(loss)
        if step % report_every and step < config.steps:
            continue
        loss = float(np.mean(jax.device_get(losses)))
        if not np.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} before step {step}")
        rate = len(losses) * config.batch_size / (time.perf_counter() - since)
        metrics = {"step": step, "loss": loss, "validation_loss": validation_loss()}
        yield metrics | {"timesteps_per_second": rate}, params, norm
        losses, since = [], time.perf_counter()


def split(
    episodes: Sequence[Episode], config: CloningConfig
) -> tuple[list[Episode], list[Episode]]:
    """Episodes to train on, and whole ones that are held out."""
    order = np.random.default_rng(config.seed).permutation(len(episodes))
    count = int(config.validation_fraction * len(episodes))
    return [episodes[i] for i in order[count:]], [episodes[i] for i in order[:count]]


def content(episodes: Sequence[Episode]) -> str:
    """Eight hex digits that change when the observations or actions of episodes do."""
    digest = hashlib.sha256()
    for episode in episodes:
        for name in ("observations", "actions"):
            for key, leaf in flatten(getattr(episode, name)).items():
                leaf = np.ascontiguousarray(leaf)
                digest.update(f"{name} {key} {leaf.shape} {leaf.dtype} ".encode())
                digest.update(zlib.crc32(leaf).to_bytes(4, "little"))  # SHA-256 of images is slow
    return digest.hexdigest()[:8]


def train_cloner(
    root: pathlib.Path,
    name: str,
    episodes: Sequence[Episode],
    observation_space: gym.Space,
    action_space: gym.Space,
    config: CloningConfig,
    report_every: int = 200,
) -> tuple[pathlib.Path, pd.DataFrame]:
    """Train in a folder of its own under `root`: (folder, what `fit` reported).

    The folder's name holds the settings, the code and the data. It appears when training is done;
    one that is there is not trained again. Raises what `fit` raises.
    """
    parts = config.digest(), source_digest("cloning.py"), content(episodes)
    folder = (
        pathlib.Path(root) / f"{name}-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:8]}"
    )
    if not folder.is_dir():
        layout, reports = Layout.of(observation_space, action_space), []
        training = fit(
            *split(episodes, config), observation_space, action_space, config, report_every
        )
        for report in training:
            metrics, *trained = report
            reports.append(metrics)
        with atomic_path(folder) as partial:
            save_cloner(partial, layout, config, *trained)
            pd.DataFrame(reports).to_csv(partial / "metrics.csv", index=False)
    return folder, pd.read_csv(folder / "metrics.csv")


# --- on disk --------------------------------------------------------------------------------------


def save_cloner(
    folder: pathlib.Path, layout: Layout, config: CloningConfig, params: Any, norm: Norm
) -> None:
    """Write meta.json and params.npz into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"config": config.to_dict(), "layout": dataclasses.asdict(layout)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    arrays = {f"params/{k}": np.asarray(v) for k, v in _named(params).items()}
    np.savez(folder / "params.npz", mean=norm[0], deviation=norm[1], **arrays)


def load_cloner(folder: str | pathlib.Path) -> Cloner:
    """The policy in a folder.

    Raises FileNotFoundError where there is none, and DataError naming the file that is damaged.
    """
    folder = pathlib.Path(folder)
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        config, layout = CloningConfig.from_dict(meta["config"]), Layout.from_dict(meta["layout"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no trained policy there") from error
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise DataError(f"{path}: not a policy's settings ({error})") from error
    path = folder / "params.npz"
    graph, shapes = _shell(layout, config)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as z:
            arrays = {k: z[k] for k in z.files}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: the policy's parameters are missing") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a policy's parameters ({error})") from error
    expected = {f"params/{k}": v.shape for k, v in _named(shapes).items()}
    expected |= {"mean": (layout.width,), "deviation": (layout.width,)}
    if {k: v.shape for k, v in arrays.items()} != expected:
        raise DataError(f"{path}: its arrays are not those of the network in meta.json")
    named = iter(k for k in expected if k.startswith("params/"))
    pure = jax.tree.map(lambda _: arrays[next(named)], nnx.to_pure_dict(shapes))
    return Cloner(layout, graph, nnx.State(pure), (arrays["mean"], arrays["deviation"]))


@dataclasses.dataclass(frozen=True)
class CloneLoader:
    """Returns `load_cloner` of a folder, in whichever process it is called."""

    folder: str

    def __call__(self) -> Cloner:
        return load_cloner(self.folder)


# --- acting ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spaces:
    """The spaces of an environment: this policy's stand-in for a tokenizer."""

    observation_space: gym.Space
    action_space: gym.Space


class Cloner:
    """A trained policy, which `evaluation.Evaluation` plays as it plays an `Agent`.

    It has no prompt and no memory. What is drawn in an episode depends on the episode's seed alone.
    """

    def __init__(self, layout: Layout, graph: Any, params: Any, norm: Norm):
        self.layout, self.params = layout, jax.tree.map(jnp.asarray, params)
        self._act = jax.jit(
            lambda params, inputs: nnx.merge(graph, params)(
                inputs["images"], standardise(inputs["numbers"], norm)
            )
        )

    def for_domain(self, domain: str) -> Cloner:
        """The policy itself: it is the same in every domain."""
        return self

    def tokenizer(self, env: Any) -> Spaces:
        """Raises DataError where the environment's spaces are not those that it was trained in."""
        found = Layout.of(env.observation_space, env.action_space)
        if found != self.layout:
            raise DataError(f"the policy was trained for {self.layout}, this is {found}")
        return Spaces(env.observation_space, env.action_space)

    def player(
        self, spaces: Spaces, seeds: Sequence[int], prompts: Sequence[None] | None = None
    ) -> ClonePlayer:
        """Begin an episode for each seed. Raises ValueError where one has a prompt."""
        if any(prompt is not None for prompt in prompts or ()):
            raise ValueError("this policy takes no prompt")
        return ClonePlayer(self, spaces, seeds)

    def mixture(self, inputs: Inputs) -> Mixture:
        """What actions are drawn from, as NumPy arrays."""
        return jax.device_get(self._act(self.params, inputs))


class ClonePlayer:
    """Acts in a batch of episodes, a forward pass a step."""

    def __init__(self, cloner: Cloner, spaces: Spaces, seeds: Sequence[int]):
        self._cloner, self._spaces = cloner, spaces
        # Not default_rng(seed): an environment may lay out its episode with that stream.
        self._rngs = [np.random.default_rng([seed, 2]) for seed in seeds]

    def __len__(self) -> int:
        return len(self._rngs)

    def only(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; the other episodes are over."""
        self._rngs = [self._rngs[row] for row in rows]

    def act(self, observations: Sequence[Any]) -> list[np.ndarray]:
        """An action for each row; raises DataError for an observation that does not fit."""
        rows = len(self)
        if len(observations) != rows:
            raise ValueError(f"{len(observations)} observations for {rows} episodes")
        space, action_space = self._spaces.observation_space, self._spaces.action_space
        for observation in observations:
            check_observation(observation, space, "act")
        leaves = [flatten(observation) for observation in observations]
        # Rows up to a power of two are copies of others: few shapes are compiled.
        leaves += leaves[:1] * ((1 << (rows - 1).bit_length()) - rows)
        together = {key: np.stack([seen[key] for seen in leaves]) for key in leaves[0]}
        layout = self._cloner.layout
        images = {
            key: as_images(together[key], image_layout(flatten(space)[key]))
            for key, _ in layout.images
        }
        numbers = layout.read_numbers(together, len(leaves))
        mixture = self._cloner.mixture({"images": images, "numbers": numbers})
        actions = layout.unscale(draw([part[:rows] for part in mixture], self._rngs))
        return list(actions.reshape(-1, *action_space.shape).astype(action_space.dtype))
