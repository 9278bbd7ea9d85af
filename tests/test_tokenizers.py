"""Ids typed by hand from the paper's ranges, and round trips of anything hypothesis thinks of."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gato_lib import tokenizers as tk


def test_ranges():
    assert (tk.TEXT_IDS, tk.CONTINUOUS_START, tk.SEPARATOR) == (32000, 32000, 33024)
    assert tk.VOCABULARY == 33025


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-1.0, 32000),
        (1.0, 33023),  # the last bin, not one past the range
        (0.0, 32512),
        (np.nextafter(1.0, 0.0), 33023),
        (np.nextafter(-1.0, 0.0), 32000),
        (np.nextafter(0.0, -1.0), 32511),
        (-0.998046875, 32001),  # -1 + 2/1024: an edge belongs to the bin above it
        (np.nextafter(-0.998046875, -1.0), 32000),
        (5.0, 33023),
        (-5.0, 32000),
        (np.inf, 33023),
        (-np.inf, 32000),
    ],
)
def test_actions_are_cut_into_uniform_bins(value, expected):
    assert tk.encode_continuous(np.array(value), companded=False) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 32512),
        (1.0, 32744),  # F(1) = 0.45475: floor(1.45475 * 512) = 744
        (-1.0, 32279),
        (256.0, 33023),
        (-256.0, 32000),
        (np.nextafter(0.0, -1.0), 32511),  # neighbours of the edges at 0 and +-256
        (np.nextafter(0.0, 1.0), 32512),
        (np.nextafter(256.0, 0.0), 33023),
        (np.nextafter(256.0, 300.0), 33023),
        (np.nextafter(-256.0, 0.0), 32000),
        (1e9, 33023),
        (np.finfo(np.float64).max, 33023),
        (np.inf, 33023),
        (-np.inf, 32000),
    ],
)
def test_observations_are_companded(value, expected):
    assert tk.encode_continuous(np.array(value), companded=True) == expected


def test_mu_law_values():
    np.testing.assert_allclose(
        tk.mu_law_encode(np.array([0.0, 1.0, 256.0])), [0, 0.454675, 1], atol=1e-6
    )
    np.testing.assert_allclose(tk.mu_law_encode(np.array([-1.0])), [-0.454675], atol=1e-6)


@pytest.mark.parametrize("companded", [True, False])
def test_nan_is_refused(companded):
    with pytest.raises(ValueError, match=r"NaN at index \[1\]"):
        tk.encode_continuous(np.array([0.0, np.nan]), companded=companded)
    with pytest.raises(TypeError, match="real numbers"):
        tk.encode_continuous(np.array(["a"]), companded=companded)


@pytest.mark.parametrize("companded", [True, False])
def test_every_bin_centre_is_its_own_round_trip(companded):
    ids = np.arange(32000, 33024)
    again = tk.encode_continuous(
        tk.decode_continuous(ids, companded=companded), companded=companded
    )
    np.testing.assert_array_equal(again, ids)


@pytest.mark.parametrize("bad", [31999, 33024, -1])
def test_decoding_outside_the_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"outside \[32000, 33024\)"):
        tk.decode_continuous(np.array([bad]), companded=False)


def test_discrete_ranges():
    values = np.array([0, 1023])
    assert tk.encode_discrete(values).tolist() == [0, 1023]
    own = tk.encode_discrete(values, discrete_range="own")
    assert own.tolist() == [33025, 34048]
    assert tk.decode_discrete(own, discrete_range="own").tolist() == [0, 1023]
    for bad in (-1, 1024):
        with pytest.raises(ValueError, match=r"outside \[0, 1024\)"):
            tk.encode_discrete(np.array([bad]))
    with pytest.raises(TypeError, match="integers"):
        tk.encode_discrete(np.array([0.5]))


# Any shape, dtype and value, extremes among them.
THOROUGH = settings.get_profile("thorough")  # conftest.py
EXTREMES = [0.0, -0.0, 1.0, -1.0, 256.0, -256.0, np.inf, -np.inf]
EXTREMES += [float(np.nextafter(np.float32(e), np.float32(d))) for e in (1, -1) for d in (-9, 9)]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def floats(dtype):
    width = np.dtype(dtype).itemsize * 8
    representable = [float(dtype(e)) for e in EXTREMES]
    anything = st.floats(width=width, allow_nan=False) | st.sampled_from(representable)
    return hnp.arrays(dtype, SHAPES, elements=anything | st.floats(-1, 1, width=width))


@pytest.mark.parametrize("companded", [False, True], ids=["actions", "observations"])
def test_continuous_round_trips(companded):
    encode = tk.mu_law_encode if companded else np.asarray

    @THOROUGH
    @given(st.sampled_from([np.float16, np.float32, np.float64]).flatmap(floats))
    def check(values):
        ids = tk.encode_continuous(values, companded=companded)
        assert ids.shape == values.shape and ids.dtype == np.int32
        assert ((ids >= 32000) & (ids < 33024)).all()
        back = tk.decode_continuous(ids, companded=companded)
        wanted = np.clip(encode(values.astype(np.float64)), -1, 1)
        # Half a bin in the encoded domain: at most at an edge, below it elsewhere.
        assert np.all(np.abs(encode(back) - wanted) <= 1 / 1024 + 1e-12)
        np.testing.assert_array_equal(tk.encode_continuous(back, companded=companded), ids)

    check()


INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64, np.bool_]


@pytest.mark.parametrize("discrete_range", ["shared", "own"])
def test_discrete_round_trips(discrete_range):
    def integers(dtype):
        most = 1 if dtype is np.bool_ else min(1023, np.iinfo(dtype).max)
        elements = st.booleans() if dtype is np.bool_ else st.integers(0, most)
        return hnp.arrays(dtype, SHAPES, elements=elements)

    @THOROUGH
    @given(st.sampled_from(INTEGERS).flatmap(integers))
    def check(values):
        ids = tk.encode_discrete(values, discrete_range=discrete_range)
        first = {"shared": 0, "own": 33025}[discrete_range]
        assert ids.shape == values.shape and ids.dtype == np.int32
        assert ((ids >= first) & (ids < first + 1024)).all()
        back = tk.decode_discrete(ids, discrete_range=discrete_range)
        np.testing.assert_array_equal(back, values.astype(np.int64))

    check()


@THOROUGH
@given(hnp.arrays(st.sampled_from([np.int64, np.int16]), SHAPES, elements=st.integers(-3000, 3000)))
def test_discrete_values_outside_the_range_are_refused(values):
    if values.size and (values.min() < 0 or values.max() > 1023):
        with pytest.raises(ValueError, match=r"outside \[0, 1024\)"):
            tk.encode_discrete(values)
    else:
        assert tk.encode_discrete(values).tolist() == values.tolist()


def test_text_round_trips():
    text = tk.TextTokenizer()

    @THOROUGH
    @given(st.text(st.characters(exclude_categories=["Cs"]) | st.just("▁"), max_size=40))
    def check(string):
        ids = text.encode(string)
        assert text.decode(ids) == string and all(text.legal[i] and i != text.end for i in ids)

    check()
    # SentencePiece writes a space as U+2581, and alone could not tell its own from the text's.
    assert text.decode(text.encode("a▁b ▁")) == "a▁b ▁"
    assert text.piece(text.end) == "</s>" and text.decode([*text.encode("a b"), text.end]) == "a b"
    assert (~text.legal).nonzero()[0].tolist() == [0, 1], "the unknown and the beginning"


def test_vendored_text_model_is_lossless_and_fits_the_ids():
    text = tk.TextTokenizer()
    assert text.size == 32000
    for sentence in (
        "put the green key next to the blue ball",
        "Grüße, 世界! 🤖",
        "  two  spaces ",
    ):
        ids = text.encode(sentence)
        assert text.decode(ids) == sentence and max(ids) < 32000


def test_trained_text_model(tmp_path):
    texts = ["go to the red ball", "open the blue door"] * 3
    text = tk.train_text_tokenizer(texts, tmp_path / "a.model", 400)
    assert text.size <= 400
    assert text.decode(text.encode("a door never seen: §")) == "a door never seen: §"
    again = tk.train_text_tokenizer(texts, tmp_path / "b.model", 400)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert again.size == text.size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model"]
    with pytest.raises(ValueError, match="no text"):
        tk.train_text_tokenizer([], tmp_path / "c.model", 400)


def test_a_text_model_of_any_size(tmp_path):
    """One long text, lines and all: what it repeats becomes pieces."""
    licence = (pathlib.Path(__file__).parent.parent / "LICENSE").read_text()
    assert len(licence) > 10_000  # longer than what SentencePiece would skip
    text = tk.train_text_tokenizer([licence], tmp_path / "t.model", 1500)
    assert text.size == 1500 and text.decode(text.encode(licence)) == licence
    pieces = {text.piece(i) for i in text.encode("the Licensed Work")}
    assert "▁the" in pieces and len(text.encode(licence)) < len(licence) / 3
    for size in (299, 32_001):
        with pytest.raises(ValueError, match=f"vocabulary_size is {size}, expected 300 to 32000"):
            tk.train_text_tokenizer([licence], tmp_path / "no.model", size)
    assert [p.name for p in tmp_path.iterdir()] == ["t.model"]


def test_foreign_text_model_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="x.model: not a SentencePiece model"):
        tk.TextTokenizer(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tk.TextTokenizer(tmp_path / "nowhere")
