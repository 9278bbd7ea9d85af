"""Layout, local positions and mask, typed by hand for a two-step episode with every modality."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from gato_lib import sequence as sq
from gato_lib import tokenizers as tk
from gato_lib.episodes import Episode

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
    rng = np.random.default_rng(0)
    rows, cols = sq.patch_positions(np.tile(intervals, (4000, 1)), rng)
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


def test_spaces_are_recognised():
    from minigrid.core.mission import MissionSpace

    assert sq.space_kind(MissionSpace(lambda: "go")) == sq.TEXT  # no gymnasium Text space
    assert sq.space_kind(gym.spaces.MultiDiscrete([3, 4])) == sq.DISCRETE
    assert sq.space_kind(gym.spaces.Box(0, 1, (64, 64, 3), np.float32)) == sq.CONTINUOUS
    assert sq.space_kind(gym.spaces.Box(0, 255, (64, 64, 1), np.uint8)) == sq.IMAGE


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
