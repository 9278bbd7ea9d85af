"""Episodes to flat token sequences, windows of them, and batches (paper 2.1, 2.3, App. B, C.3).

One timestep is its observation tokens, a separator, then its action tokens. Observation items come
in lexicographic order of their keys, each in row-major order; text in reading order; an image as
16 x 16 patches in raster order. Two timesteps, token by token (`local` is the position within the
timestep; `mask` is 1 where the token is a target):

    Meta-World   s00 s01 ... s38  |  a0  a1  a2  a3      39 + 1 + 4 = 44 tokens
      local        0   1 ...  38  -  512 512 512 512     one row for all actions, none for '|'
      mask         0   0 ...   0  0   1   1   1   1

    BabyAI       direction p00 p01 ... p15 ▁go ▁to ▁the ▁red ▁ball  |  a
      local              0   1   2 ...  16  17  18   19   20    21  - 512
      mask               0   0   0 ...   0   1   1    1    1     1  0   1

Rewards, returns and terminations are not in the sequence. A window is cut at timestep boundaries.
The token at position t is predicted from positions before t, so the first token of a window is
never a target.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import PIL.Image

from gato_lib import tokenizers
from gato_lib.episodes import (
    Document,
    Episode,
    children,
    discrete_bounds,
    flatten,
    is_text,
    stack_observations,
)

PATCH = 16
PATCH_LEVELS = 128  # App. C.3: patch intervals are quantised to 128 levels an axis
LOCAL_POSITIONS = 512  # rows for observation tokens; one more row is shared by all actions
ACTION_POSITION = LOCAL_POSITIONS
NO_POSITION = -1  # the separator, and documents, which have no timesteps
PADDING_POSITION = -2
RETURN = "return"  # what `Tokenizer.tell_return` tells
INPUTS = ("expert", "executed")  # whose actions stand in a sequence
NO_ID = -1  # an input whose token is not told: its vector is zero

TEXT, IMAGE, DISCRETE, CONTINUOUS, SEPARATOR, ACTION, PAD, GIVEN = range(8)
KIND_NAMES = (
    *("text", "image", "discrete", "continuous", "separator", "action", "padding"),
    "given text",  # not in the loss: a question's, where a run scores answers alone
)


# --- spaces ---------------------------------------------------------------------------------------


def space_kind(space: gym.Space) -> int:
    """TEXT, IMAGE, DISCRETE or CONTINUOUS for a leaf space.

    A uint8 Box that is laid out as an image (`image_layout`) is one. Other spaces of whole numbers
    are discrete where at most 1,024 values are possible, counted from the lowest; a Box with more,
    or without bounds, is continuous. Any space whose samples are strings is text. Raises TypeError
    for a space that there is no rule for, and for a Discrete or MultiDiscrete of more than 1,024
    values, which have no order that bins could keep.
    """
    spaces = gym.spaces
    if isinstance(space, spaces.Box):
        if image_layout(space):
            return IMAGE
        return CONTINUOUS if _lowest(space) is None else DISCRETE
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        count = int(_counts(space).max(initial=0))
        if count > tokenizers.NUM_BINS:
            raise TypeError(f"{space}: {count} values, discrete tokens have {tokenizers.NUM_BINS}")
        return DISCRETE
    if is_text(space):
        return TEXT
    raise TypeError(f"no tokens for the space {space}")


def image_layout(space: gym.Space) -> str | None:
    """ "HWC", "CHW" or "HW" for a space of uint8 images, otherwise None.

    An image has 1 or 3 channels, or no axis for them, and is at least one patch high and wide: a
    7 x 7 x 3 grid of symbols, as raw MiniGrid gives it, is no picture.
    """
    if not isinstance(space, gym.spaces.Box) or space.dtype != np.uint8:
        return None
    shape = space.shape
    if len(shape) == 2:
        return "HW" if min(shape) >= PATCH else None
    if len(shape) != 3:
        return None
    for layout, channels, sides in (("HWC", shape[2], shape[:2]), ("CHW", shape[0], shape[1:])):
        if channels in (1, 3) and min(sides) >= PATCH:
            return layout
    return None


def _counts(space: gym.Space) -> np.ndarray:
    """How many values each element of a space of whole numbers can take, float64 (n,)."""
    low, high = discrete_bounds(space)
    return high - low + 1


def _lowest(space: gym.Space) -> np.ndarray | None:
    """Lowest value of each element of a discrete space, int64 (n,); None for a continuous Box."""
    bounds = discrete_bounds(space)
    if bounds is None or (bounds[1] - bounds[0]).max(initial=0) >= tokenizers.NUM_BINS:
        return None
    return bounds[0].astype(np.int64)


def _action_name(key: str) -> str:
    """How errors call an action's leaf."""
    return f"action {key!r}" if key else "actions"


def _discrete_ids(values: np.ndarray, space: gym.Space, discrete_range: str) -> np.ndarray:
    """Ids of whole numbers (T, n), counted from the space's lowest. Raises on other values."""
    if values.dtype.kind not in "iub":
        raise TypeError(f"expected whole numbers, got dtype {values.dtype}")
    return tokenizers.encode_discrete(
        values.astype(np.int64) - _lowest(space), discrete_range=discrete_range
    )


@dataclasses.dataclass(frozen=True)
class _ActionLeaf:
    """One leaf of an action space: how many tokens, and what they mean."""

    space: gym.Space
    discrete_range: str

    @property
    def continuous(self) -> bool:
        return isinstance(self.space, gym.spaces.Box) and _lowest(self.space) is None

    @property
    def num_tokens(self) -> int:
        return int(np.prod(self.space.shape, dtype=int))

    def _box_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of each element of a Box, float64 (n,) each."""
        return tuple(x.ravel().astype(np.float64) for x in (self.space.low, self.space.high))

    def ranges(self) -> np.ndarray:
        """Legal ids of each token, half-open, int64 (n, 2)."""
        if self.continuous:
            return np.tile(
                [tokenizers.CONTINUOUS_START, tokenizers.SEPARATOR], (self.num_tokens, 1)
            )
        start = tokenizers.discrete_start(self.discrete_range)
        counts = _counts(self.space).astype(np.int64)
        return np.stack([np.full(self.num_tokens, start), start + counts], axis=1)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        actions = np.asarray(actions)
        if actions.shape[1:] != self.space.shape:
            raise ValueError(f"shape {actions.shape[1:]}, expected {self.space.shape}")
        actions = actions.reshape(len(actions), -1)
        if not self.continuous:
            ids = _discrete_ids(actions, self.space, self.discrete_range)
            low, high = self.ranges().T
            if ((ids < low) | (ids >= high)).any():
                raise ValueError(f"a value outside {self.space}")
            return ids
        low, high = self._box_bounds()
        span = np.where(high > low, high - low, 1.0)  # an element that cannot move has its lowest
        unit = (actions.astype(np.float64) - low) / span * 2.0 - 1.0
        return tokenizers.encode_continuous(unit, companded=False)

    def decode(self, ids: np.ndarray) -> Any:
        if not self.continuous:
            values = tokenizers.decode_discrete(ids, discrete_range=self.discrete_range)
            values = values + _lowest(self.space)
            if isinstance(self.space, gym.spaces.Discrete):
                return int(values[0])
        else:
            low, high = self._box_bounds()
            unit = tokenizers.decode_continuous(ids, companded=False)
            values = low + (unit + 1.0) / 2.0 * (high - low)
            if np.issubdtype(self.space.dtype, np.integer):
                values = np.round(values)
        return values.reshape(self.space.shape).astype(self.space.dtype)


@dataclasses.dataclass(frozen=True)
class ActionSpec:
    """How many action tokens a step has, which ids each may take, and how to decode them.

    Any nesting of Discrete, MultiDiscrete, MultiBinary and bounded Box spaces. Raises TypeError for
    other spaces and ValueError for a Box without bounds, naming the key.
    """

    space: gym.Space
    discrete_range: str = "shared"

    def __post_init__(self) -> None:
        for key, leaf in flatten(self.space).items():
            name = _action_name(key)
            if space_kind(leaf) == TEXT:
                raise TypeError(f"{name}: text has no fixed number of tokens, got {leaf}")
            if isinstance(leaf, gym.spaces.Box) and not (
                leaf.is_bounded()
                and (np.abs([leaf.low, leaf.high], dtype=np.float64) < 1e300).all()
            ):
                raise ValueError(f"{name}: continuous actions need finite bounds, got {leaf}")

    @functools.cached_property
    def _leaves(self) -> dict[str, _ActionLeaf]:
        return {
            k: _ActionLeaf(leaf, self.discrete_range) for k, leaf in flatten(self.space).items()
        }

    @functools.cached_property
    def num_tokens(self) -> int:
        return sum(leaf.num_tokens for leaf in self._leaves.values())

    @functools.cached_property
    def legal_ids(self) -> np.ndarray:
        """First id and end (exclusive) of what each action token may be, int64 (num_tokens, 2)."""
        return np.concatenate([leaf.ranges() for leaf in self._leaves.values()])

    @functools.cached_property
    def continuous(self) -> np.ndarray:
        """Which action tokens are continuous values, bool (num_tokens,)."""
        return self.legal_ids[:, 0] == tokenizers.CONTINUOUS_START

    def encode(self, actions: Any) -> np.ndarray:
        """Actions, leaves (T, ...), to ids (T, num_tokens).

        Continuous ones are scaled by their bounds to [-1, 1] and not companded (App. B). Raises
        ValueError or TypeError naming the key where a discrete one is not of its space, and where
        keys, shapes or dtypes are others.
        """
        leaves = flatten(actions)
        if set(leaves) != set(self._leaves):
            raise ValueError(f"action keys {sorted(leaves)}, expected {sorted(self._leaves)}")
        columns = []
        for key, leaf in self._leaves.items():
            try:
                columns.append(leaf.encode(leaves[key]))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{_action_name(key)}: {error}") from error
        return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)

    def decode(self, ids: np.ndarray) -> Any:
        """Ids (num_tokens,) to an action of the space. Raises ValueError for an illegal id."""
        ids = np.asarray(ids)
        low, high = self.legal_ids.T
        if ids.shape != low.shape or (ids < low).any() or (ids >= high).any():
            raise ValueError(f"ids {ids.tolist()}, legal are {self.legal_ids.tolist()}")
        first, values = 0, {}
        for key, leaf in self._leaves.items():
            values[key] = leaf.decode(ids[first : first + leaf.num_tokens])
            first += leaf.num_tokens
        return _nest(self.space, values)


def _nest(space: gym.Space, leaves: dict[str, Any], prefix: str = "") -> Any:
    """The inverse of `flatten`, for a value of `space`."""
    parts = children(space)
    if parts is None:
        return leaves[prefix]
    nested = {k: _nest(p, leaves, f"{prefix}/{k}" if prefix else k) for k, p in parts}
    return tuple(nested.values()) if isinstance(space, gym.spaces.Tuple) else nested


# --- images ---------------------------------------------------------------------------------------


def as_images(values: np.ndarray, layout: str = "HWC") -> np.ndarray:
    """Images (T, ...) in an `image_layout` to RGB (T, H, W, 3), sides multiples of 16.

    Other sizes are enlarged to the next multiple, bilinearly (the paper does not say how). Grey
    images become three equal channels.
    """
    if layout == "CHW":
        values = np.moveaxis(values, 1, -1)
    elif layout == "HW":
        values = values[..., None]
    if values.shape[-1] == 1:
        values = np.repeat(values, 3, axis=-1)
    t, h, w, _ = values.shape
    height, width = -(-h // PATCH) * PATCH, -(-w // PATCH) * PATCH
    if (height, width) == (h, w):
        return values
    out = np.empty((t, height, width, 3), np.uint8)
    for i, image in enumerate(np.ascontiguousarray(values)):
        resized = PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR)
        out[i] = np.asarray(resized)
    return out


def patch_images(images: np.ndarray) -> np.ndarray:
    """Images (T, H, W, 3) uint8 to patches (T, H/16 * W/16, 16, 16, 3) in raster order.

    Raises ValueError where a side is not a multiple of 16.
    """
    t, h, w, c = images.shape
    if h % PATCH or w % PATCH or c != 3:
        raise ValueError(f"images of shape {images.shape[1:]}: sides must be multiples of 16, RGB")
    x = images.reshape(t, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(t, -1, PATCH, PATCH, c)


def patch_intervals(height: int, width: int) -> np.ndarray:
    """Quantised [row_low, row_high, col_low, col_high) of each patch, int32 (P, 4) (App. C.3)."""
    rows, cols = height // PATCH, width // PATCH
    row_ends = np.round(np.arange(rows + 1) / rows * PATCH_LEVELS).astype(np.int32)
    col_ends = np.round(np.arange(cols + 1) / cols * PATCH_LEVELS).astype(np.int32)
    r, c = np.divmod(np.arange(rows * cols), cols)
    return np.stack([row_ends[r], row_ends[r + 1], col_ends[c], col_ends[c + 1]], axis=1)


def patch_positions(
    intervals: np.ndarray, draws: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column indices in [0, 128) for intervals (..., 4).

    Training: `draws` (..., 2), uniform in [0, 1), place an index in each interval, anew for every
    image. Evaluation (None): the rounded mean of the interval (App. C.3).
    """
    low, high = intervals[..., 0::2], intervals[..., 1::2]
    if draws is None:
        index = np.round((low + high) / 2).astype(np.int32)
    else:
        index = low + (draws * (high - low)).astype(np.int32)
    index = np.minimum(index, PATCH_LEVELS - 1)
    return index[..., 0], index[..., 1]


# --- sequences ------------------------------------------------------------------------------------


@dataclasses.dataclass
class TokenSequence:
    """Parallel arrays over L tokens, and the patches they point at.

    Attributes:
      ids: int32 (L,), the paper's ids; 0 at image tokens.
      kinds: uint8 (L,), TEXT ... GIVEN.
      local: int32 (L,), local position; NO_POSITION for the separator and in documents.
      patch: int32 (L,), index into `patches`; -1 where the token is no image patch.
      intervals: int32 (L, 4), patch intervals; zeros elsewhere.
      patches: uint8 (P, 16, 16, 3), distinct patches only.
      offsets: int64 (T + 1,), where each timestep's tokens start; the last one is L.
      targets: int32 (L,), what is to be predicted at each token, where that may differ from what
        stands there (`Tokenizer.inputs`); None where it is `ids`.
    """

    ids: np.ndarray
    kinds: np.ndarray
    local: np.ndarray
    patch: np.ndarray
    intervals: np.ndarray
    patches: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.ids)

    def loss_mask(self, text_loss: bool = True) -> np.ndarray:
        """1 for text and actions, 0 for everything else (2.3), bool (L,)."""
        mask = self.kinds == ACTION
        return mask | (self.kinds == TEXT) if text_loss else mask


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Tokenizes the observations and actions of one environment's spaces.

    With `tell_return` the last observation of every timestep is one value in [0, 1]: the episode's
    score as a share of the best, and the best while acting (5.3). `inputs` says which actions stand
    in an episode's sequence: the "expert"'s, which are also the targets, or those "executed", as in
    a history that the agent has made itself; the targets are the expert's all the same.

    Raises ValueError for other `inputs`.
    """

    observation_space: gym.Space
    action_space: gym.Space
    text: tokenizers.TextTokenizer | None = None
    discrete_range: str = "shared"
    tell_return: bool = False
    inputs: str = "expert"

    def __post_init__(self) -> None:
        if self.inputs not in INPUTS:
            raise ValueError(f"inputs is {self.inputs!r}, expected one of {INPUTS}")

    @functools.cached_property
    def action_spec(self) -> ActionSpec:
        return ActionSpec(self.action_space, self.discrete_range)

    def episode(self, episode: Episode, share: float = 1.0) -> TokenSequence:
        """All T timesteps of an episode; the observation after the last action is not used.

        `share` is what `tell_return` tells.
        """
        leaves = {k: v[: episode.steps] for k, v in flatten(episode.observations).items()}
        expert = self.action_spec.encode(episode.actions)
        if self.inputs == "expert":
            return self._sequence(leaves, expert, share)
        seq = self._sequence(leaves, self.action_spec.encode(episode.executed), share)
        seq.targets = seq.ids.copy()
        seq.targets[seq.kinds == ACTION] = expert.ravel()
        return seq

    def steps(self, observations: Sequence[Any], action_ids: np.ndarray) -> TokenSequence:
        """Timesteps given one by one, with action ids (T, num_tokens), as when acting."""
        return self._sequence(flatten(stack_observations(observations)), action_ids)

    @functools.cached_property
    def _spaces(self) -> dict[str, tuple[gym.Space, int]]:
        """Leaf spaces and their kinds, which can be costly to find out."""
        leaves = flatten(self.observation_space)
        if self.tell_return:
            leaves |= {RETURN: gym.spaces.Box(0.0, 1.0, ())}
        return {k: (leaf, space_kind(leaf)) for k, leaf in leaves.items()}

    def _sequence(
        self, leaves: dict[str, Any], actions: np.ndarray, share: float = 1.0
    ) -> TokenSequence:
        spaces, t = self._spaces, len(actions)
        if self.tell_return:
            leaves = leaves | {RETURN: np.full(t, share, np.float32)}
        if set(leaves) != set(spaces):
            raise ValueError(f"observation keys {sorted(leaves)}, expected {sorted(spaces)}")
        blocks = [self._leaf(key, *spaces[key], leaves[key], t) for key in spaces]
        observed = sum(b.lengths for b in blocks)
        if t and observed.max() > LOCAL_POSITIONS:
            raise ValueError(
                f"a timestep has {observed.max()} observation tokens, at most {LOCAL_POSITIONS} "
                "have a local position"
            )
        offsets = np.concatenate([[0], np.cumsum(observed + 1 + actions.shape[1])])
        total = int(offsets[-1])
        seq = TokenSequence(
            ids=np.zeros(total, np.int32),
            kinds=np.full(total, SEPARATOR, np.uint8),
            local=np.full(total, NO_POSITION, np.int32),
            patch=np.full(total, -1, np.int32),
            intervals=np.zeros((total, 4), np.int32),
            patches=np.zeros((0, PATCH, PATCH, 3), np.uint8),
            offsets=offsets,
        )
        before = np.zeros(t, np.int64)  # observation tokens already placed in each step
        patches = []
        for block in blocks:
            within = _ranges(block.lengths)
            local = np.repeat(before, block.lengths) + within
            where = np.repeat(offsets[:-1], block.lengths) + local
            seq.ids[where] = block.ids
            seq.kinds[where] = block.kind
            seq.local[where] = local
            if block.patches is not None:
                seq.patch[where] = sum(map(len, patches)) + np.arange(len(where))
                seq.intervals[where] = np.tile(block.intervals, (t, 1))
                patches.append(block.patches)
            before += block.lengths
        seq.ids[offsets[:-1] + before] = tokenizers.SEPARATOR
        where = (offsets[:-1] + before)[:, None] + 1 + np.arange(actions.shape[1])
        seq.ids[where] = actions
        seq.kinds[where] = ACTION
        seq.local[where] = ACTION_POSITION
        if patches:
            distinct, index = _distinct(np.concatenate(patches))
            seq.patches = distinct
            image = seq.patch >= 0
            seq.patch[image] = index[seq.patch[image]]
        return seq

    def _leaf(self, key: str, space: gym.Space, kind: int, values: Any, t: int) -> _Block:
        if kind == TEXT:
            if self.text is None:
                raise ValueError(f"observation {key!r} is text, but there is no text tokenizer")
            known = {text: self.text.encode(text) for text in set(values)}
            pieces = [known[text] for text in values]
            ids = np.array([i for p in pieces for i in p], np.int32)
            return _Block(kind, ids, np.array([len(p) for p in pieces], np.int64))
        values = np.asarray(values)
        if values.shape != (t, *space.shape):
            raise ValueError(
                f"observation {key!r} has shape {values.shape[1:]}, expected {space.shape}"
            )
        if kind == IMAGE:
            if values.dtype != np.uint8:
                raise ValueError(f"observation {key!r} has dtype {values.dtype}, expected uint8")
            values = as_images(values, image_layout(space))
            x = patch_images(values)
            intervals = patch_intervals(*values.shape[1:3])
            n = x.shape[1]
            flat = x.reshape(-1, PATCH, PATCH, 3)
            lengths = np.full(t, n, np.int64)
            return _Block(kind, np.zeros(t * n, np.int32), lengths, flat, intervals)
        values = values.reshape(t, -1)
        try:
            if kind == DISCRETE:
                ids = _discrete_ids(values, space, self.discrete_range)
            else:
                ids = tokenizers.encode_continuous(values, companded=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"observation {key!r}: {error}") from error
        return _Block(kind, ids.ravel(), np.full(t, values.shape[1], np.int64))


def document_tokens(
    document: Document,
    text: tokenizers.TextTokenizer | None,
    *,
    end: bool = False,
    question_loss: bool = True,
) -> TokenSequence:
    """A document's items in reading order, text as pieces and images as patches (2.1, 3.2).

    There is no timestep, so there is no local position (the paper names none); patches keep their
    row and column. A window may begin at any token.

    Args:
      end: whether the text's end follows, as in training; what is to be continued has none.
      question_loss: False makes `document.given` no targets.

    Raises ValueError for a document without items or for an item that is neither text nor an image.
    """
    if not document.items:
        raise ValueError("a document has at least one item")
    parts = []
    for i, item in enumerate(document.items):
        if isinstance(item, str):
            if text is None:
                raise ValueError(f"item {i} is text, but there is no text tokenizer")
            ids = text.encode(item)
            if end and i == len(document.items) - 1:
                ids.append(text.end)
            ids = np.array(ids, np.int32)
            kind = GIVEN if i in document.given and not question_loss else TEXT
            patches, intervals = (
                np.zeros((0, PATCH, PATCH, 3), np.uint8),
                np.zeros((1, 4), np.int32),
            )
        else:
            pixels = np.asarray(item)
            channels = pixels.shape[2:] in ((), (1,), (3,))
            if pixels.dtype != np.uint8 or pixels.ndim < 2 or not channels or not pixels.size:
                raise ValueError(
                    f"item {i}, of dtype {pixels.dtype} and shape {pixels.shape}, is no image"
                )
            images = as_images(pixels[None], "HW" if pixels.ndim == 2 else "HWC")
            patches, intervals = patch_images(images)[0], patch_intervals(*images.shape[1:3])
            ids, kind = np.zeros(len(patches), np.int32), IMAGE
        n = len(ids)
        parts.append(
            TokenSequence(
                ids=ids,
                kinds=np.full(n, kind, np.uint8),
                local=np.full(n, NO_POSITION, np.int32),
                patch=np.arange(n, dtype=np.int32) if kind == IMAGE else np.full(n, -1, np.int32),
                intervals=np.broadcast_to(intervals, (n, 4)),
                patches=patches,
                offsets=np.arange(n + 1),
            )
        )
    return concatenate(parts)


class _Block(NamedTuple):
    """One leaf's tokens for all steps, step after step."""

    kind: int
    ids: np.ndarray
    lengths: np.ndarray
    patches: np.ndarray | None = None
    intervals: np.ndarray | None = None


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _distinct(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct patches and, for each input patch, its index among them.

    Simulated frames repeat patches (floor, darkness), and the patch embedding depends on pixels
    only, so each distinct patch need be embedded once. Compared by a 64-bit hash, then verified.
    """
    words = np.ascontiguousarray(patches).reshape(len(patches), -1).view(np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, words.shape[1], dtype=np.uint64) | 1
    keys = np.zeros(len(words), np.uint64)
    # A domain's patches are gigabytes: temporaries of all of them would be many times that.
    parts = [slice(i, i + 8192) for i in range(0, len(words), 8192)]
    for part in parts:
        mixed = (words[part] ^ (words[part] >> np.uint64(29))) * factors
        keys[part] = (mixed ^ (mixed >> np.uint64(32))).sum(axis=1, dtype=np.uint64)
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    if not all(np.array_equal(words[first[index[p]]], words[p]) for p in parts):
        # A collision: compare the bytes.
        _, first, index = np.unique(words, axis=0, return_index=True, return_inverse=True)
    return patches[first], index.ravel().astype(np.int32)


def concatenate(sequences: Sequence[TokenSequence]) -> TokenSequence:
    """Join sequences; patches equal between them are kept once."""
    counts = np.cumsum([0] + [len(s.patches) for s in sequences])
    shifted = [
        np.where(s.patch >= 0, s.patch + n, -1) for s, n in zip(sequences, counts, strict=False)
    ]
    starts = np.cumsum([0] + [len(s) for s in sequences])
    patches, patch = np.concatenate([s.patches for s in sequences]), np.concatenate(shifted)
    if len(patches):
        patches, index = _distinct(patches)
        patch = np.where(patch >= 0, index[patch], -1)
    targets = None
    if any(s.targets is not None for s in sequences):
        parts = [s.ids if s.targets is None else s.targets for s in sequences]
        targets = np.concatenate(parts)
    return TokenSequence(
        targets=targets,
        ids=np.concatenate([s.ids for s in sequences]),
        kinds=np.concatenate([s.kinds for s in sequences]),
        local=np.concatenate([s.local for s in sequences]),
        patch=patch.astype(np.int32),
        intervals=np.concatenate([s.intervals for s in sequences]),
        patches=patches,
        offsets=np.concatenate(
            [s.offsets[:-1] + n for s, n in zip(sequences, starts, strict=False)] + [[starts[-1]]]
        ).astype(np.int64),
    )


# --- batches --------------------------------------------------------------------------------------


MODALITIES = ("text", "discrete", "continuous")  # of targets: documents, instructions; actions


class Batch(NamedTuple):
    """What the network is given: B sequences of T tokens, Q distinct patches, K targets each.

    Attributes:
      ids: int32 (B, T); NO_ID at actions that are not told.
      local: int32 (B, T), local position; negative where there is none.
      patch: int32 (B, T), index into `patches`; Q where the token is no image patch.
      rows, cols: int32 (B, T), patch positions in [0, 128).
      patches: uint8 (Q, 16, 16, 3).
      target_positions: int32 (B, K), the position that predicts the target: its own minus one.
      target_ids: int32 (B, K).
      target_weights: float32 (B, K), 1 for a target, 0 for an unused slot.
      target_kinds: int32 (B, K), index into `MODALITIES`.
      segments: int32 (B, T), number of the window within its row, or None where every row is one
        window. Tokens of different segments do not see each other.
    """

    ids: np.ndarray
    local: np.ndarray
    patch: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    patches: np.ndarray
    target_positions: np.ndarray
    target_ids: np.ndarray
    target_weights: np.ndarray
    target_kinds: np.ndarray
    segments: np.ndarray | None = None


def count_tokens(batch: Batch) -> int:
    """Tokens that are not padding."""
    return int((batch.local != PADDING_POSITION).sum())


def make_batch(
    seq: TokenSequence,
    windows: Sequence[Sequence[tuple[int, int]]],
    length: int,
    num_targets: int,
    num_patches: int,
    text_loss: bool = True,
    rngs: Sequence[np.random.Generator] | None = None,
    segments: Sequence[Sequence[int]] | None = None,
    parallel: bool = False,
) -> Batch:
    """Cut windows out of one long sequence into fixed shapes.

    Args:
      seq: a sequence holding all windows.
      windows: for each row of the batch, spans (first, last) of tokens, half-open, joined in
        order; a prompt is a first span. The rest of the row is padding.
      length: T. num_targets: K. num_patches: Q.
      rngs: one for each row, draw patch positions (training); None takes interval means
        (evaluation).
      segments: for each span the number of its segment, rising along the row; None makes the
        whole row one segment.
      parallel: whether no action is told as an input, so that all of a step's can be predicted
        in one pass (App. G).

    Raises ValueError where a row needs more than T tokens or K targets, or the batch more than Q
    distinct patches: nothing is dropped.
    """
    b = len(windows)
    take = np.full((b, length), -1, np.int64)
    segment = None if segments is None else np.full((b, length), -1, np.int32)
    for row, spans in enumerate(windows):
        n = 0
        for number, (first, last) in enumerate(spans):
            m = n + last - first
            if m > length:
                raise ValueError(f"row {row} needs {m} tokens or more, the shape holds {length}")
            take[row, n:m] = np.arange(first, last)
            if segment is not None:
                segment[row, n:m] = segments[row][number]
            n = m
    used = take >= 0
    at = lambda x, fill: np.where(used, x[take], np.asarray(fill, x.dtype))  # noqa: E731
    ids, kinds = at(seq.ids, 0), at(seq.kinds, PAD)
    local, patch = at(seq.local, PADDING_POSITION), at(seq.patch, -1)

    target = (kinds == ACTION) | ((kinds == TEXT) & text_loss)
    target[:, 0] = False  # nothing comes before it
    if segment is not None:
        target[:, 1:] &= segment[:, 1:] == segment[:, :-1]
    counts = target.sum(axis=1)
    if counts.max(initial=0) > num_targets:
        raise ValueError(f"a row has {counts.max()} targets, the shape holds {num_targets}")
    rows_, cols_ = np.nonzero(target)
    slots = _ranges(counts)
    positions = np.zeros((b, num_targets), np.int32)
    target_ids = np.zeros((b, num_targets), np.int32)
    weights = np.zeros((b, num_targets), np.float32)
    positions[rows_, slots] = cols_ - 1
    wanted = ids if seq.targets is None else at(seq.targets, 0)
    target_ids[rows_, slots] = wanted[rows_, cols_]
    weights[rows_, slots] = 1.0
    continuous = (target_ids >= tokenizers.CONTINUOUS_START) & (target_ids < tokenizers.SEPARATOR)
    modality = np.where(continuous, 2, 1).astype(np.int32)
    modality[rows_, slots] = np.where(kinds[rows_, cols_] == TEXT, 0, modality[rows_, slots])

    if parallel:
        ids[kinds == ACTION] = NO_ID
    image = patch >= 0
    distinct, index = np.unique(patch[image], return_inverse=True)
    if len(distinct) > num_patches:
        raise ValueError(f"{len(distinct)} distinct patches, the shape holds {num_patches}")
    slot = np.full((b, length), num_patches, np.int32)
    slot[image] = index
    patches = np.zeros((num_patches, PATCH, PATCH, 3), np.uint8)
    patches[: len(distinct)] = seq.patches[distinct]
    patch_rows = np.zeros((b, length), np.int32)
    patch_cols = np.zeros((b, length), np.int32)
    if image.any():
        draws = None
        if rngs is not None:
            numbers = image.sum(axis=1)
            draws = np.concatenate([g.random((n, 2)) for g, n in zip(rngs, numbers, strict=True)])
        r, c = patch_positions(seq.intervals[take[image]], draws)
        patch_rows[image], patch_cols[image] = r, c
    return Batch(
        ids,
        local,
        slot,
        patch_rows,
        patch_cols,
        patches,
        positions,
        target_ids,
        weights,
        modality,
        segment,
    )
