"""Layout, local positions and mask, typed by hand for a two-step episode with every modality."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gato_lib import sequence as sq
from gato_lib import tokenizers as tk
from gato_lib.episodes import Document, Episode, select, stack_observations

SPACE = gym.spaces.Dict(
    {
        "b_image": gym.spaces.Box(0, 255, (16, 32, 3), np.uint8),
        "a_button": gym.spaces.Discrete(5),
        "d_words": gym.spaces.Text(20),
        "c_pose": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
    }
)
ACTIONS = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)


class TwoWords:
    """A text tokenizer with two words."""

    def encode(self, text):
        return [{"go": 700, "stop": 701}[w] for w in text.split()]


@pytest.fixture
def episode():
    image = np.zeros((3, 16, 32, 3), np.uint8)
    image[0, :, 16:] = 9
    return Episode(
        task="t/x",
        observations={
            "d_words": ["go", "go stop", "stop"],
            "a_button": np.array([3, 4, 0]),
            "b_image": image,
            "c_pose": np.array([[0.0, 1.0], [-1.0, 256.0], [0.0, 0.0]]),
        },
        actions=np.array([[-2.0, 2.0], [0.0, 1.0]], np.float32),
        executed=np.zeros((2, 2), np.float32),
        rewards=np.zeros(2),
        success=True,
        seed=0,
    )


@pytest.fixture
def tokens(episode):
    return sq.Tokenizer(SPACE, ACTIONS, TwoWords()).episode(episode)


# Keys in lexicographic order: a_button, b_image, c_pose, d_words; then '|' and the actions.
IDS = [3, 0, 0, 32512, 32744, 700, 33024, 32000, 33023]
IDS += [4, 0, 0, 32279, 33023, 700, 701, 33024, 32512, 32768]
LOCAL = [0, 1, 2, 3, 4, 5, -1, 512, 512] + [0, 1, 2, 3, 4, 5, 6, -1, 512, 512]
MASK = [0, 0, 0, 0, 0, 1, 0, 1, 1] + [0, 0, 0, 0, 0, 1, 1, 0, 1, 1]
KINDS = "dIIcctsaa" + "dIIccttsaa"


def test_layout(tokens):
    assert tokens.ids.tolist() == IDS
    assert tokens.local.tolist() == LOCAL
    assert tokens.loss_mask().astype(int).tolist() == MASK
    letters = {"d": sq.DISCRETE, "I": sq.IMAGE, "c": sq.CONTINUOUS, "t": sq.TEXT}
    letters |= {"s": sq.SEPARATOR, "a": sq.ACTION}
    assert tokens.kinds.tolist() == [letters[k] for k in KINDS]
    assert tokens.offsets.tolist() == [0, 9, 19]
    without_text = np.array(MASK) * (np.array(list(KINDS)) != "t")
    assert tokens.loss_mask(text_loss=False).astype(int).tolist() == without_text.tolist()


def test_patches_are_kept_once_and_point_right(tokens):
    assert len(tokens.patches) == 2  # black, and the one patch of nines
    shown = tokens.patches[tokens.patch[tokens.kinds == sq.IMAGE]]
    assert shown.max(axis=(1, 2, 3)).tolist() == [0, 9, 0, 0]
    # One row, two columns: rows [0, 128), columns [0, 64) and [64, 128).
    assert tokens.intervals[1].tolist() == [0, 128, 0, 64]
    assert tokens.intervals[2].tolist() == [0, 128, 64, 128]


def test_patch_positions_of_the_papers_example():
    # App. C.3: an 80 x 64 image of 4 x 5 patches; the patch at row 1, column 2.
    intervals = sq.patch_intervals(64, 80)[7]
    assert intervals.tolist() == [32, 64, 51, 77]
    row, col = sq.patch_positions(intervals[None], None)
    assert (row[0], col[0]) == (48, 64)
    draws = np.random.default_rng(0).random((4000, 2))
    rows, cols = sq.patch_positions(np.tile(intervals, (4000, 1)), draws)
    assert (rows.min(), rows.max()) == (32, 63) and (cols.min(), cols.max()) == (51, 76)


def test_batch(tokens):
    batch = sq.make_batch(tokens, [[(0, 9)], [(0, 9), (9, 19)]], 20, 8, 4)
    assert batch.ids.shape == (2, 20)
    assert batch.ids[0].tolist() == IDS[:9] + [0] * 11
    assert batch.local[1].tolist() == [*LOCAL, -2]  # padding
    # Each target is predicted from the position before it.
    assert batch.target_positions[0][:3].tolist() == [4, 6, 7]
    assert batch.target_ids[0][:3].tolist() == [700, 32000, 33023]
    assert batch.target_weights.sum(axis=1).tolist() == [3, 7]
    assert batch.patch[0, 1] != batch.patch[0, 2]
    assert (batch.patch[:, 0] == 4).all()  # no image: one past the last slot
    assert sq.count_tokens(batch) == 9 + 19


def test_executed_actions_are_read_and_the_experts_predicted(episode, tokens):
    """Executed were zeros, bin 512 of 1,024: id 32512; the expert's ids are those of `IDS`."""
    seen = sq.Tokenizer(SPACE, ACTIONS, TwoWords(), inputs="executed").episode(episode)
    assert seen.ids.tolist() == [*IDS[:7], 32512, 32512, *IDS[9:17], 32512, 32512]
    assert seen.targets.tolist() == IDS and tokens.targets is None
    joined = sq.concatenate([tokens, seen])
    assert joined.targets.tolist() == IDS + IDS and joined.ids[:19].tolist() == IDS
    batch = sq.make_batch(seen, [[(0, 9)], [(9, 19)]], 10, 4, 4)
    assert batch.ids[0, 7:9].tolist() == [32512, 32512]
    assert batch.target_ids.tolist() == [[700, 32000, 33023, 0], [700, 701, 32512, 32768]]
    with pytest.raises(ValueError, match="inputs is 'mine', expected one of"):
        sq.Tokenizer(SPACE, ACTIONS, inputs="mine")


def test_packed_windows_do_not_predict_each_other(tokens):
    """The first token of a segment is no target: what stands before it is another episode's."""
    spans = [(0, 9), (9, 19)]
    packed = sq.make_batch(tokens, [spans], 22, 8, 4, segments=[[0, 1]])
    assert packed.segments[0].tolist() == [0] * 9 + [1] * 10 + [-1] * 3
    plain = sq.make_batch(tokens, [spans], 22, 8, 4)
    assert plain.segments is None
    document = sq.document_tokens(Document(("a cat sat on the mat",)), tk.TextTokenizer())
    n = len(document)
    both = sq.concatenate([document, document])
    packed = sq.make_batch(both, [[(0, n), (n, 2 * n)]], 2 * n, 2 * n, 0, segments=[[0, 1]])
    positions = packed.target_positions[0][packed.target_weights[0] > 0]
    assert positions.tolist() == [*range(n - 1), *range(n, 2 * n - 1)]
    assert set(packed.target_kinds[0][: len(positions)]) == {sq.MODALITIES.index("text")}


def test_batch_drops_nothing(tokens):
    with pytest.raises(ValueError, match="row 0 needs 19 tokens"):
        sq.make_batch(tokens, [[(0, 19)]], 18, 8, 4)
    with pytest.raises(ValueError, match="7 targets, the shape holds 6"):
        sq.make_batch(tokens, [[(0, 19)]], 19, 6, 4)
    with pytest.raises(ValueError, match="2 distinct patches, the shape holds 1"):
        sq.make_batch(tokens, [[(0, 19)]], 19, 7, 1)


def test_first_token_of_a_window_is_never_a_target():
    space = gym.spaces.Text(20)
    episode = Episode("t/x", ["go", "go"], np.array([1]), np.array([1]), np.zeros(1), True, 0)
    tokens = sq.Tokenizer(space, gym.spaces.Discrete(3), TwoWords()).episode(episode)
    assert tokens.ids.tolist() == [700, 33024, 1]
    batch = sq.make_batch(tokens, [[(0, 3)]], 3, 3, 0)
    assert batch.target_ids[batch.target_weights > 0].tolist() == [1]


def test_concatenate(tokens):
    both = sq.concatenate([tokens, tokens])
    assert both.ids.tolist() == IDS * 2
    assert both.offsets.tolist() == [0, 9, 19, 28, 38]
    assert len(both.patches) == 2
    image = both.patch >= 0
    np.testing.assert_array_equal(
        both.patches[both.patch[image]],
        np.concatenate([tokens.patches[tokens.patch[tokens.patch >= 0]]] * 2),
    )


def test_actions_are_scaled_by_their_bounds_and_round_trip():
    spec = sq.ActionSpec(ACTIONS)
    assert spec.legal_ids.tolist() == [[32000, 33024]] * 2 and spec.num_tokens == 2
    value = spec.decode(spec.encode(np.array([[-2.0, 1.0]], np.float32))[0])
    np.testing.assert_allclose(value, [-2.0, 1.0], atol=2 / 1024)
    assert value.dtype == np.float32 and ACTIONS.contains(value)
    discrete = sq.ActionSpec(gym.spaces.Discrete(7))
    assert discrete.legal_ids.tolist() == [[0, 7]] and discrete.num_tokens == 1
    assert discrete.decode(np.array([6])) == 6
    own = sq.ActionSpec(gym.spaces.Discrete(7), "own")
    assert own.legal_ids.tolist() == [[33025, 33032]]
    with pytest.raises(ValueError, match="finite bounds"):
        sq.ActionSpec(gym.spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(TypeError, match="action 'say': text has no fixed number of tokens"):
        sq.ActionSpec(gym.spaces.Dict({"say": gym.spaces.Text(5)}))
    with pytest.raises(TypeError, match="2000 values, discrete tokens have 1024"):
        sq.ActionSpec(gym.spaces.Discrete(2000))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("c_pose", np.zeros((1, 3)), r"'c_pose' has shape \(3,\), expected \(2,\)"),
        ("c_pose", np.array([[np.nan, 0.0]]), "'c_pose': NaN"),
        ("b_image", np.zeros((1, 16, 32, 3), np.float32), "'b_image' has dtype float32"),
        ("a_button", np.array([2000]), "'a_button': discrete value 2000"),
    ],
)
def test_bad_observations_are_refused(episode, key, value, message):
    observation = {k: v[:1] for k, v in episode.observations.items()} | {key: value}
    tokenizer = sq.Tokenizer(SPACE, ACTIONS, TwoWords())
    one = Episode(
        "t/x", observation, episode.actions[:1], episode.executed[:1], np.zeros(1), True, 0
    )
    with pytest.raises(ValueError, match=message):
        tokenizer.episode(one)


def test_a_missing_key_is_refused(episode):
    del episode.observations["c_pose"]
    with pytest.raises(ValueError, match="observation keys"):
        sq.Tokenizer(SPACE, ACTIONS, TwoWords()).episode(episode)


def test_too_many_observation_tokens_are_refused():
    space = gym.spaces.Box(-1, 1, (513,), np.float32)
    episode = Episode(
        "t/x", np.zeros((2, 513), np.float32), np.array([0]), np.array([0]), np.zeros(1), True, 0
    )
    with pytest.raises(ValueError, match="513 observation tokens, at most 512"):
        sq.Tokenizer(space, gym.spaces.Discrete(2)).episode(episode)


BOX = gym.spaces.Box


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (gym.spaces.Discrete(7), sq.DISCRETE),
        (gym.spaces.Discrete(1024), sq.DISCRETE),
        (gym.spaces.MultiDiscrete([3, 4]), sq.DISCRETE),
        (gym.spaces.MultiBinary(6), sq.DISCRETE),
        (gym.spaces.Text(5), sq.TEXT),
        (BOX(-1, 1, (3,), np.float32), sq.CONTINUOUS),
        (BOX(-np.inf, np.inf, (3, 2), np.float64), sq.CONTINUOUS),
        (BOX(0, 1, (64, 64, 3), np.float32), sq.CONTINUOUS),  # not bytes, so no picture
        (BOX(0, 255, (64, 64, 3), np.uint8), sq.IMAGE),
        (BOX(0, 255, (210, 160, 3), np.uint8), sq.IMAGE),
        (BOX(0, 255, (64, 64, 1), np.uint8), sq.IMAGE),
        (BOX(0, 255, (3, 64, 64), np.uint8), sq.IMAGE),
        (BOX(0, 255, (210, 160), np.uint8), sq.IMAGE),
        (BOX(0, 255, (7, 7, 3), np.uint8), sq.DISCRETE),  # raw MiniGrid: symbols, not a picture
        (BOX(0, 255, (128,), np.uint8), sq.DISCRETE),  # Atari's memory
        (BOX(-500, 523, (2,), np.int64), sq.DISCRETE),
        (BOX(-500, 524, (2,), np.int64), sq.CONTINUOUS),  # 1,025 values
        (BOX(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64), sq.CONTINUOUS),
        (BOX(0, 1, (2,), bool), sq.DISCRETE),
    ],
    ids=str,
)
def test_spaces_are_recognised(space, kind):
    assert sq.space_kind(space) == kind


def test_any_space_of_strings_is_text_and_is_not_disturbed():
    from minigrid.core.mission import MissionSpace

    space = MissionSpace(lambda color: f"go to the {color}", [["red", "blue", "green"]])  # no Text
    space.seed(0)
    expected = [space.sample() for _ in range(4)]
    space.seed(0)
    assert sq.space_kind(space) == sq.TEXT
    assert [space.sample() for _ in range(4)] == expected


def test_spaces_without_a_rule_are_refused():
    for space in (gym.spaces.Sequence(gym.spaces.Discrete(2)), gym.spaces.Graph(BOX(0, 1), None)):
        with pytest.raises(TypeError, match="no tokens for the space"):
            sq.space_kind(space)
    with pytest.raises(TypeError, match="1025 values, discrete tokens have 1024"):
        sq.space_kind(gym.spaces.MultiDiscrete([3, 1025]))
    bad = gym.spaces.Dict({"a/b": gym.spaces.Discrete(2)})
    with pytest.raises(ValueError, match="key 'a/b': keys are strings without '/'"):
        sq.Tokenizer(bad, ACTIONS).steps([{"a/b": 1}], np.zeros((1, 2), int))


def test_nested_observations_by_hand():
    """Keys in lexicographic order, a tuple's parts in theirs; row-major; values from the lowest."""
    inner = gym.spaces.Dict({"z": gym.spaces.Discrete(3, start=-1), "Z": gym.spaces.MultiBinary(2)})
    space = gym.spaces.Dict(
        {
            "b": gym.spaces.Tuple(
                [gym.spaces.MultiDiscrete([[5, 5], [5, 5]], start=[[0, 0], [0, 1]]), *[inner] * 10]
            ),
            "a": BOX(-3, 4, (2,), np.int32),
            "B": BOX(-1, 1, (1, 2), np.float32),
        }
    )
    parts = [{"z": i % 3 - 1, "Z": np.array([0, 1], np.int8)} for i in range(10)]
    observation = {
        "b": (np.array([[4, 3], [2, 1]]), *parts),
        "a": np.array([-3, 4], np.int32),
        "B": np.array([[0.0, 1.0]], np.float32),
    }
    tokens = sq.Tokenizer(space, gym.spaces.Discrete(2)).steps([observation], np.array([[1]]))
    # "B" < "a" < "b" and "Z" < "z": upper case first. Part 10 comes after part 9, not after part 1.
    expected = [32512, 32744, 0, 7, 4, 3, 2, 0]
    for i in range(10):
        expected += [0, 1, i % 3]
    assert tokens.ids.tolist() == [*expected, 33024, 1]
    assert tokens.local.tolist() == [*range(38), -1, 512]


def test_discrete_values_in_a_range_of_their_own(episode):
    tokens = sq.Tokenizer(SPACE, gym.spaces.Discrete(4), TwoWords(), "own").steps(
        [select(episode.observations, 0)], np.array([[33025 + 2]])
    )
    assert tokens.ids.tolist() == [33028, 0, 0, 32512, 32744, 700, 33024, 33027]


@pytest.mark.parametrize(
    ("space", "action", "ids", "ranges"),
    [
        (gym.spaces.Discrete(3, start=5), 7, [2], [[0, 3]]),
        (
            gym.spaces.MultiDiscrete([[2, 3], [4, 5]]),
            np.array([[1, 2], [3, 4]]),
            [1, 2, 3, 4],
            [[0, 2], [0, 3], [0, 4], [0, 5]],
        ),
        (gym.spaces.MultiBinary(2), np.array([1, 0], np.int8), [1, 0], [[0, 2], [0, 2]]),
        (BOX(-2, 1, (1,), np.int32), np.array([-1], np.int32), [1], [[0, 4]]),
        (
            gym.spaces.Dict(
                {"b": gym.spaces.Discrete(9), "a": gym.spaces.Tuple([BOX(-1, 1, (1,), np.float32)])}
            ),
            {"a": (np.array([1 / 1024], np.float32),), "b": 8},
            [32512, 8],
            [[32000, 33024], [0, 9]],
        ),
    ],
    ids=str,
)
def test_action_spaces_by_hand(space, action, ids, ranges):
    spec = sq.ActionSpec(space)
    assert spec.legal_ids.tolist() == ranges and spec.num_tokens == len(ids)
    encoded = spec.encode(stack_observations([action]))
    assert encoded.tolist() == [ids]
    decoded = spec.decode(encoded[0])
    assert space.contains(decoded)
    assert str(decoded) == str(action)  # equal, and of the same types
    with pytest.raises(ValueError, match="legal are"):
        spec.decode(np.array(ids) + 1024)


def test_actions_with_other_keys_are_refused():
    spec = sq.ActionSpec(gym.spaces.Dict({"a": gym.spaces.Discrete(2)}))
    with pytest.raises(ValueError, match=r"action keys \['b'\], expected \['a'\]"):
        spec.encode({"b": np.array([1])})


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (
            gym.spaces.Discrete(4),
            np.array([1.9]),
            "actions: expected whole numbers, got dtype float",
        ),
        (gym.spaces.Discrete(4), np.array([7]), r"actions: a value outside Discrete\(4\)"),
        (gym.spaces.Discrete(4), np.array([-1]), "actions: discrete value -1"),
        (gym.spaces.MultiDiscrete([3, 4]), np.array([[2, 900]]), "actions: a value outside Multi"),
        (
            gym.spaces.MultiBinary(1),
            np.array([[5]], np.int8),
            "actions: a value outside MultiBinary",
        ),
        (BOX(0, 10, (2,), np.int64), np.array([[3, 11]]), "actions: a value outside Box"),
        (BOX(-1, 1, (4,), np.float32), np.zeros((3, 1)), r"shape \(1,\), expected \(4,\)"),
        (gym.spaces.Discrete(4), np.zeros((3, 3), int), r"shape \(3,\), expected \(\)"),
        (BOX(-1, 1, (1,), np.float32), np.array([[np.nan]]), "actions: NaN at index"),
    ],
    ids=str,
)
def test_bad_actions_are_refused(space, actions, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sq.ActionSpec(space).encode(actions)


def test_an_action_that_cannot_move_is_kept():
    huge = BOX(-1.7e308, 1.7e308, (1,), np.float64)
    with pytest.raises(ValueError, match="finite bounds"):
        sq.ActionSpec(huge)
    space = BOX(np.array([-1.0, 2.0]), np.array([1.0, 2.0]), dtype=np.float64)
    spec = sq.ActionSpec(space)
    ids = spec.encode(np.array([[0.0, 2.0]]))
    assert ids.tolist() == [[32512, 32000]]
    assert spec.decode(ids[0]).tolist() == [2 / 2048, 2.0]


def test_spaces_without_values_are_refused():
    empty = gym.spaces.Dict({})
    with pytest.raises(ValueError, match="empty Dict or Tuple"):
        sq.ActionSpec(empty)
    with pytest.raises(ValueError, match="empty Dict or Tuple"):
        sq.Tokenizer(gym.spaces.Tuple([]), ACTIONS).steps([()], np.zeros((1, 2), int))


THOROUGH = settings.get_profile("thorough")  # conftest.py


@THOROUGH
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.integers(1, 3), st.integers(1, 4)),
        elements=st.floats(-1, 1, width=32),
    ),
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
)
def test_continuous_actions_round_trip(unit, low, size):
    high = low + size
    space = BOX(low, high, unit.shape[1:], np.float64)
    spec = sq.ActionSpec(space)
    actions = np.clip(low + (unit.astype(np.float64) + 1) / 2 * size, low, high)
    ids = spec.encode(actions)
    assert ((ids >= 32000) & (ids < 33024)).all()
    for action, row in zip(actions, ids, strict=True):
        back = spec.decode(row)
        assert space.contains(back)
        assert np.abs(back - action).max() <= size / 2048 * (1 + 1e-6) + 1e-9 * abs(low)


@THOROUGH
@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)).map(
            lambda x: (x[0], 16 * x[1], 16 * x[2], 3)
        ),
        elements=st.integers(0, 255),
        fill=st.integers(0, 255),
    )
)
def test_images_round_trip(images):
    """Patches laid out in raster order are the image again, pixel by pixel."""
    w = images.shape[2]
    patches = sq.patch_images(images)
    again = np.zeros_like(images)
    for i in range(patches.shape[1]):
        r, c = divmod(i, w // 16)
        again[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] = patches[:, i]
    np.testing.assert_array_equal(again, images)


def test_images_of_other_sizes_are_enlarged():
    rng = np.random.default_rng(0)
    atari = rng.integers(0, 255, (2, 210, 160, 3), dtype=np.uint8)
    assert sq.as_images(atari).shape == (2, 224, 160, 3)
    even = np.full((1, 20, 33, 3), 77, np.uint8)
    enlarged = sq.as_images(even)
    assert enlarged.shape == (1, 32, 48, 3) and (enlarged == 77).all()
    exact = atari[:, :208]
    assert sq.as_images(exact) is exact  # nothing is touched where nothing has to be
    # A grey picture, and one with channels first, are the picture they stand for.
    grey = sq.as_images(exact[..., 0], "HW")
    np.testing.assert_array_equal(grey, np.repeat(exact[..., :1], 3, axis=-1))
    np.testing.assert_array_equal(sq.as_images(np.moveaxis(exact, -1, 1), "CHW"), exact)
    # Halves of an image stay halves.
    half = np.zeros((1, 24, 24, 3), np.uint8)
    half[:, :, 12:] = 200
    enlarged = sq.as_images(half)
    assert (enlarged[..., :14, :] == 0).all() and (enlarged[..., 18:, :] == 200).all()


@pytest.mark.parametrize("shape", [(40, 24, 3), (40, 24, 1), (40, 24), (3, 40, 24)])
def test_image_observations_of_any_layout(shape):
    space = BOX(0, 255, shape, np.uint8)
    observations = [space.sample() for _ in range(2)]
    tokens = sq.Tokenizer(space, gym.spaces.Discrete(2)).steps(observations, np.array([[0], [1]]))
    assert np.diff(tokens.offsets).tolist() == [6 + 2] * 2  # 48 x 32: three rows of two patches
    assert (tokens.kinds == sq.IMAGE).sum() == 12


def test_documents_by_hand():
    image = np.zeros((20, 32, 3), np.uint8)
    image[:, 16:] = 255
    document = Document(("go stop", image, "go"))
    tokens = sq.document_tokens(document, TwoWords())
    assert tokens.ids.tolist() == [700, 701, 0, 0, 0, 0, 700]
    assert tokens.kinds.tolist() == [sq.TEXT] * 2 + [sq.IMAGE] * 4 + [sq.TEXT]
    assert tokens.local.tolist() == [-1] * 7
    assert tokens.patch.tolist() == [-1, -1, *tokens.patch[2:6], -1]
    assert tokens.loss_mask().tolist() == [True, True, False, False, False, False, True]
    assert tokens.offsets.tolist() == list(range(8))
    shown = tokens.patches[tokens.patch[2:6]]
    assert shown.mean(axis=(1, 2, 3)).tolist() == [0, 255, 0, 255]
    assert tokens.intervals[3].tolist() == [0, 64, 64, 128]
    batch = sq.make_batch(tokens, [[(0, 7)], [(2, 5)]], 9, 8, 4)
    assert batch.target_ids[0][:3].tolist() == [701, 700, 0]  # the first token is never a target
    assert batch.target_positions[0][:2].tolist() == [0, 5]
    assert batch.target_weights.sum(axis=1).tolist() == [2, 0]
    assert sq.count_tokens(batch) == 7 + 3


def test_bad_documents_are_refused():
    with pytest.raises(ValueError, match="at least one item"):
        sq.document_tokens(Document(()), TwoWords())
    for item in (np.zeros((16, 16, 3)), np.zeros((16, 16, 4), np.uint8), np.zeros(16, np.uint8)):
        with pytest.raises(ValueError, match="item 1, of dtype .* and shape .*, is no image"):
            sq.document_tokens(Document(("go", item)), TwoWords())
    with pytest.raises(ValueError, match="item 0, of dtype int64 and shape"):
        sq.document_tokens(Document(([1, 2],)), TwoWords())
    with pytest.raises(ValueError, match="item 0 is text, but there is no text tokenizer"):
        sq.document_tokens(Document(("go",)), None)
    thin = np.zeros((10, 200), np.uint8)  # a document says what is an image; any size will do
    assert len(sq.document_tokens(Document((thin,)), None)) == 13


def test_real_demonstrations(demonstrations):
    from gato_lib import domains

    for task, length in (("babyai/GoToObj", None), ("metaworld/drawer-close", 44)):
        env = domains.make_env(task)
        tokenizer = sq.Tokenizer(env.observation_space, env.action_space, tk.TextTokenizer())
        episode = demonstrations[task][0]
        tokens = tokenizer.episode(episode)
        assert tokens.steps == episode.steps
        if length:
            assert (np.diff(tokens.offsets) == length).all()
        separators = tokens.offsets[1:] - 1 - tokenizer.action_spec.num_tokens
        assert (tokens.ids[separators] == tk.SEPARATOR).all()
        assert (tokens.ids == tk.SEPARATOR).sum() == episode.steps
