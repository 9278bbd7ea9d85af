"""Scores of captions, answers and text against hand-typed cases, the field's script and NLTK."""

from __future__ import annotations

import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gato_lib.vision_language import scores

# What pycocoevalcap 1.2 says of three sets; the third is the second less its shortest candidate.
FIXTURE = json.loads((pathlib.Path(__file__).parent / "data" / "cider.json").read_text())
CORPORA = FIXTURE["corpora"]
steady = settings(max_examples=60, deadline=None, derandomize=True, database=None)
sentences = st.lists(st.sampled_from(["ka", "lo", "mi", "ne"]), max_size=7).map(" ".join)
SCORES = [scores.cider, scores.bleu4, scores.exact, scores.vqa_accuracy]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red Apple.", ["a", "red", "apple"]),
        ("It isn't - or is it?", ["it", "isn't", "or", "is", "it"]),
        ("a T-shirt, 'new' --- (blue)", ["a", "t-shirt", "new", "blue"]),
        ("the dog\u2019s\tball\n", ["the", "dog's", "ball"]),
        ("caf\u00e9 cafe\u0301 \uff41\uff42", ["caf\u00e9", "caf\u00e9", "ab"]),
        ("snake_case/path 5+5=10 \U0001f34e!", ["snake", "case", "path", "5+5=10", "\U0001f34e"]),
        ("?!", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert scores.words(text) == expected


@pytest.mark.parametrize("name", CORPORA)
def test_the_fixture_is_tokenized_alike(name):
    corpus = CORPORA[name]
    for text in itertools.chain(corpus["candidates"], *corpus["references"]):
        assert scores.words(text) == text.split()


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_cider_is_that_of_the_fields_script(name):
    corpus = CORPORA[name]
    got = scores.cider(corpus["candidates"], corpus["references"])
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, corpus["cider"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CORPORA)
def test_bleu_is_that_of_the_fields_script(name):
    corpus = CORPORA[name]
    got = scores.bleu4(corpus["candidates"], corpus["references"])
    assert got == pytest.approx(corpus["bleu4"], abs=1e-6)


def test_cider_by_hand():
    # Two examples: each n-gram is in one, weight log 2, which cancels in the cosine.
    references = [["red cat"], ["blue dog"]]
    np.testing.assert_allclose(scores.cider(["Red cat!", "cat"], references), [10 * 2 / 4, 0])
    short = 10 / 4 * (1 / math.sqrt(2)) * math.exp(-1 / 72)  # one word of two, one word too few
    long = 10 / 4 * (2 / math.sqrt(10) + 1 / math.sqrt(2)) * math.exp(-1 / 72)  # clipped "red red"
    np.testing.assert_allclose(
        scores.cider(["red", "blue blue dog"], references), [short, long], rtol=1e-12
    )
    # "cat" is in both examples and weighs nothing.
    np.testing.assert_allclose(scores.cider(["a cat", "cat"], [["cat"], ["cat"]]), [0, 0])
    # A phrase that no other example has, and that is four words long, scores 10.
    assert scores.cider(["a b c d", ""], [["a b c d"], ["e"]]).tolist() == pytest.approx([10, 0])


@steady
@given(st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=4)), min_size=1))
def test_cider_of_the_reference_is_the_highest(examples):
    candidates = [candidate for candidate, _ in examples]
    single = [known[:1] for _, known in examples]
    best = scores.cider([known[0] for known in single], single)
    assert (scores.cider(candidates, single) <= best + 1e-9).all()
    assert (best <= 10 + 1e-9).all()

    references = [known for _, known in examples]
    forward = scores.cider(candidates, references)
    np.testing.assert_allclose(
        scores.cider(candidates, [known[::-1] for known in references]), forward, atol=1e-9
    )
    assert (forward >= 0).all()


def test_bleu_by_hand():
    # Precisions 4/5, 3/4, 2/3 and 1/2; as long as the reference, so there is no penalty.
    got = scores.bleu4(["a b c d x"], [["a b c d e"]])
    assert got == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # All right, but 4 words for 5: the penalty alone.
    assert scores.bleu4(["a b c d"], [["a b c d e"]]) == pytest.approx(math.exp(1 - 5 / 4))
    # Of two references that differ by one word in length the shorter counts.
    assert scores.bleu4(["a b c d"], [["a b c d e", "a b c"]]) == pytest.approx(1)
    # A short candidate has no 4-gram, right or wrong: a set of right ones scores 1.
    assert scores.bleu4(["red cat", "a b c d"], [["red cat"], ["a b c d"]]) == pytest.approx(1)
    for nothing in (["red cat"], ["a b c x"], [""]):
        assert scores.bleu4(nothing, [["a b c d"]]) == 0


def test_nltk_counts_an_ngram_in_texts_too_short_for_one():
    from nltk.translate.bleu_score import corpus_bleu

    def nltk(corpus):
        references = [[r.split() for r in known] for known in corpus["references"]]
        return corpus_bleu(references, [c.split() for c in corpus["candidates"]])

    long, short = CORPORA["realistic, four words or more"], CORPORA["realistic"]
    assert nltk(long) == pytest.approx(long["bleu4"], abs=1e-6)
    assert nltk(short) < short["bleu4"] - 1e-3


def test_exact():
    got = scores.exact(
        ["A red car.", "a red", "", "blue"], [["a red car"], ["a red car", "red"], ["!"], ["b l"]]
    )
    assert got.dtype == bool
    assert got.tolist() == [True, False, True, False]


# --- questions ------------------------------------------------------------------------------------


def test_vqa_accuracy_of_ten_annotators():
    references = [["Two"] * n + [f"other {i}" for i in range(10 - n)] for n in range(11)]
    got = scores.vqa_accuracy(["two"] * 11, references)
    np.testing.assert_allclose(got, [0, 0.3, 0.6, 0.9] + [1] * 7)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["yes"], 1),
        (["no"], 0),
        (["yes", "yes"], 1),
        (["yes", "no"], 1 / 2),  # one of two left out: the other agrees or does not
        (["yes", "no", "no"], 1 / 3),
        (["yes"] * 3, 1),
        (["yes"] * 2 + ["no"] * 3, (2 * 1 / 3 + 3 * 2 / 3) / 5),
    ],
)
def test_vqa_accuracy_of_other_numbers(references, expected):
    assert scores.vqa_accuracy(["Yes!"], [references])[0] == pytest.approx(expected)


@steady
@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=12), st.sampled_from("abc"))
def test_vqa_accuracy_is_the_mean_over_leaving_one_out(references, answer):
    others = [references[:i] + references[i + 1 :] for i in range(len(references))]
    expected = np.mean([min(1, o.count(answer) / 3) for o in others])
    assert scores.vqa_accuracy([answer], [references])[0] == pytest.approx(expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        (["a", "b"], [["a"]], "example 1 lacks one"),
        (["a"], [["a"], ["b"], ["c"]], "1 texts and 3 lists of references: example 1 lacks"),
        (["a", "b"], [["a"], []], "example 1: references \\[\\]"),
        (["a", "b"], [["a"], "b"], "example 1: references 'b'"),
        ([], [], "no examples"),
    ],
)
def test_scores_refuse(score, texts, references, message):
    with pytest.raises(ValueError, match=message):
        score(texts, references)


# --- intervals ------------------------------------------------------------------------------------


def test_bootstrap_of_two_clusters():
    # Draws of two clusters: both the first (mean 0), both the second (1), or one of each (1/3).
    mean, low, high = scores.bootstrap(np.array([0, 0, 1]), np.array(["a", "a", "b"]))
    assert (mean, low, high) == (pytest.approx(1 / 3), 0, 1)


def test_bootstrap_of_a_known_spread():
    values = np.random.default_rng(1).normal(3, 2, 4000)
    mean, low, high = scores.bootstrap(values)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(4000), rel=0.05)
    assert scores.bootstrap(values) == (mean, low, high)
    assert scores.bootstrap(values, seed=1) != (mean, low, high)
    # Ten copies of each add nothing once copies are drawn together.
    copies, labels = np.repeat(values, 10), np.repeat(np.arange(4000), 10)
    np.testing.assert_allclose(scores.bootstrap(copies, labels), (mean, low, high), rtol=1e-12)
    narrow = scores.bootstrap(copies, resamples=200)
    assert narrow[2] - narrow[1] < (high - low) / 2


def test_bootstrap_in_pieces(monkeypatch):
    monkeypatch.setattr(scores, "RESAMPLED", 1000)  # 10 resamples at a time
    mean, low, high = scores.bootstrap(np.arange(100) % 2, resamples=1995)
    assert low == pytest.approx(0.4, abs=0.02)
    assert high == pytest.approx(0.6, abs=0.02)
    assert mean == 0.5


@steady
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 5)), min_size=1, max_size=40))
def test_bootstrap_contains_the_mean(pairs):
    values, clusters = (np.array(x) for x in zip(*pairs, strict=True))
    mean, low, high = scores.bootstrap(values, clusters, resamples=500)
    assert mean == pytest.approx(values.mean())
    if len(set(clusters)) == 1:
        assert math.isnan(low)
        assert math.isnan(high)
    else:
        assert low - 1e-9 <= mean <= high + 1e-9
        assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9


def test_paired_bootstrap_sees_a_small_difference():
    hard = np.random.default_rng(0).normal(0, 1, 500)
    a, b = hard + 0.05 + 0.1 * np.sin(np.arange(500)), hard
    mean, low, high = scores.paired_bootstrap(a, b, np.arange(500) // 2)
    assert 0 < low < mean < high < 0.1
    assert mean == pytest.approx((a - b).mean())
    assert scores.bootstrap(a)[1] < scores.bootstrap(b)[2]  # alone, their intervals overlap
    backward = scores.paired_bootstrap(b, a, np.arange(500) // 2)
    np.testing.assert_allclose(backward, (-mean, -high, -low), rtol=1e-2)
    right, wrong = np.array([True, True, False]), np.array([False, True, False])
    assert scores.paired_bootstrap(right, wrong)[0] == pytest.approx(1 / 3)


def test_bootstrap_refuses():
    with pytest.raises(ValueError, match="shape \\(0,\\)"):
        scores.bootstrap(np.zeros(0))
    with pytest.raises(ValueError, match="shape \\(2, 2\\)"):
        scores.bootstrap(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="value 2 is nan"):
        scores.bootstrap(np.array([0, 1, np.nan, np.inf]))
    with pytest.raises(ValueError, match="value 2 lacks"):
        scores.bootstrap(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="3 and 4 values: value 3 lacks"):
        scores.paired_bootstrap(np.zeros(3), np.zeros(4))


# --- what a network is compared with --------------------------------------------------------------


def test_most_frequent():
    assert scores.most_frequent(["a dog", "A cat.", "a cat", "the end"]) == "A cat."
    assert scores.most_frequent(["b", "a", "a", "b"]) == "b"
    assert scores.majority_answer(["yes", "no", "No"]) == "no"
    for baseline in (scores.most_frequent, scores.majority_answer):
        with pytest.raises(ValueError, match="no texts"):
            baseline([])


def test_majority_by_question():
    train = [
        ("What colour is it?", "red"),
        ("what colour is it", "blue"),
        ("What colour is it?", "Blue"),
        ("Is it round?", "yes"),
        ("Is it round?", "no"),
        ("Is it square?", "red"),
    ]
    questions = ["what colour is it", "Is it round?", "Is it square", "How many?"]
    assert scores.majority_by_question(train, questions) == ["blue", "yes", "red", "red"]
    with pytest.raises(ValueError, match="no texts"):
        scores.majority_by_question([], questions)


def test_nearest_by_pixels(monkeypatch):
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)
    train[20] = train[4]  # a tie, in another piece
    images = np.concatenate([rng.integers(0, 256, (11, 6, 5, 3), dtype=np.uint8), train[[20, 7]]])
    differences = train[None].astype(np.int64) - images[:, None]
    expected = (differences**2).sum(axis=(2, 3, 4)).argmin(axis=1)
    assert expected[-2:].tolist() == [4, 7]
    for pieces in (1024, 5):
        monkeypatch.setattr(scores, "IMAGES", pieces)
        monkeypatch.setattr(scores, "PIXELS", 1024 if pieces == 1024 else 7)
        got = scores.nearest_by_pixels(train, images)
        assert got.dtype == np.int64
        assert got.tolist() == expected.tolist()
    assert scores.nearest_by_pixels(train, images[:0]).shape == (0,)


def test_nearest_by_pixels_tells_near_copies_apart():
    # Squared distances of a few levels between products of some 10^8, which float32 rounds.
    rng = np.random.default_rng(0)
    picture = rng.integers(2, 254, (64, 64, 3), dtype=np.uint8)
    images = picture + rng.integers(0, 3, (20, 64, 64, 3), dtype=np.uint8)
    train = np.repeat(picture[None], 60, axis=0)
    train[np.arange(60), np.arange(60)] += 1  # one row of pixels
    differences = train[None].astype(np.int32) - images[:, None]
    expected = (differences**2).sum(axis=(2, 3, 4)).argmin(axis=1)
    assert scores.nearest_by_pixels(train, images).tolist() == expected.tolist()


def test_nearest_by_pixels_refuses():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="images are float32"):
        scores.nearest_by_pixels(images, images.astype(np.float32))
    with pytest.raises(ValueError, match="train_images of \\(4, 2, 3\\), images of \\(4, 4"):
        scores.nearest_by_pixels(images[:, :, :2], images)
    with pytest.raises(ValueError, match="images are uint8 \\(4, 4, 3\\)"):
        scores.nearest_by_pixels(images, images[0])
    with pytest.raises(ValueError, match="no training images"):
        scores.nearest_by_pixels(images[:0], images)


# --- n-gram models --------------------------------------------------------------------------------

texts = st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=4).filter(any)


def test_bigrams_by_hand():
    # 0 is followed by 1 twice and by 2 once. What stands before: 0 (beginning, 1), 1 (0), 2 (0).
    model = scores.NgramModel.fit([[0, 1, 0, 1, 0, 2]], 2, 4, discounts=(0.5, 0.5))
    rest = 0.5 * 3 / 4 / 4  # three ids seen, of counts 4 in all, a fourth to each of four ids
    unigrams = np.array([1.5 / 4, 0.5 / 4, 0.5 / 4, 0]) + rest
    after_0 = np.array([0, 1.5 / 3, 0.5 / 3, 0]) + 0.5 * 2 / 3 * unigrams
    for context, expected in (((), unigrams), ((0,), after_0), ((2,), unigrams)):
        got = [model.probability(token, context) for token in range(4)]
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert model.probability(1, (3, 3, 0)) == model.probability(1, (0,))

    total, number = model.log_probability([0, 1, 3])
    assert number == 3
    # After 1 comes 0 alone, twice: of 3 only what the discount leaves to the unigrams.
    after_1 = 0.5 * 1 / 2 * unigrams[3]
    assert total == pytest.approx(math.log(unigrams[0] * after_0[1] * after_1))
    later, number = model.log_probability(np.array([0, 1, 3]), skip_first=1)
    assert (later, number) == (pytest.approx(math.log(after_0[1] * after_1)), 2)
    assert model.log_probability([0, 1, 3], skip_first=9) == (0, 0)
    assert model.log_probability([]) == (0, 0)


def test_unigrams_are_plain_counts():
    model = scores.NgramModel.fit([[0, 0, 0], [0, 1]], 1, 3, discounts=(0.25,))
    rest = 0.25 * 2 / 5 / 3
    got = [model.probability(token, (1, 2)) for token in range(3)]
    np.testing.assert_allclose(got, [3.75 / 5 + rest, 0.75 / 5 + rest, rest])


def test_documents_stand_alone():
    apart = scores.NgramModel.fit([[0, 1], [2, 3]], 2, 4)
    assert (1, 2) not in apart.counts[1]
    assert (1, 2) in scores.NgramModel.fit([[0, 1, 2, 3]], 2, 4).counts[1]


@pytest.mark.parametrize("order", [2, 3, 4])
def test_kneser_ney_is_that_of_nltk(order):
    from nltk.lm import KneserNeyInterpolated, Vocabulary
    from nltk.util import everygrams

    rng = np.random.default_rng(order)
    documents = [rng.geometric(0.3, n).clip(max=9).tolist() for n in (1, 2, 30, 40)]
    padded = [["<s>", *map(str, document)] for document in documents]
    symbols = [str(i) for i in range(10)] + ["<s>"]
    theirs = KneserNeyInterpolated(order, discount=0.3, vocabulary=Vocabulary(symbols))
    theirs.fit([list(everygrams(document, max_len=order)) for document in padded])
    ours = scores.NgramModel.fit(documents, order, 10, discounts=(0, *[0.3] * (order - 1)))
    contexts = [rng.geometric(0.3, n).clip(max=9).tolist() for n in range(order) for _ in range(20)]
    for context in contexts:
        got = [ours.probability(token, context) for token in range(10)]
        expected = [theirs.unmasked_score(str(i), tuple(map(str, context))) for i in range(10)]
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@steady
@given(texts, st.integers(1, 4), st.lists(st.integers(0, 8), max_size=4))
def test_probabilities_sum_to_one(documents, order, unseen):
    model = scores.NgramModel.fit(documents, order, 9)
    longest = max(documents, key=len)
    for context in (unseen, longest[:-1], longest[:1], longest[1:2], []):
        p = [model.probability(token, context) for token in range(9)]
        assert sum(p) == pytest.approx(1)
        assert min(p) > 0


def test_higher_orders_predict_better():
    rng = np.random.default_rng(0)

    def document(n):  # each id is one of two successors of the one before
        ids = [0]
        for step in rng.choice([1, 7], n - 1, p=[0.8, 0.2]):
            ids.append((3 * ids[-1] + step) % 50)
        return ids

    train, test = [document(200) for _ in range(40)], document(2000)
    perplexities = []
    for order in (1, 2, 3):
        total, number = scores.NgramModel.fit(train, order, 50).log_probability(test, skip_first=1)
        perplexities.append(math.exp(-total / number))
    entropy = math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert perplexities[0] > 10 * perplexities[1]
    assert perplexities[1] == pytest.approx(entropy, rel=0.05)
    assert perplexities[2] == pytest.approx(entropy, rel=0.05)


def test_ngram_model_refuses():
    fit = scores.NgramModel.fit
    with pytest.raises(ValueError, match="document 1: token 2 is 7, expected an id below 7"):
        fit([[0], [1, 2, 7]], 2, 7)
    with pytest.raises(ValueError, match="document 0: token 0 is -1"):
        fit([[-1]], 2, 7)
    with pytest.raises(ValueError, match="document 0 is float64"):
        fit([[0.5]], 2, 7)
    with pytest.raises(ValueError, match="order 0"):
        fit([[0]], 0, 7)
    with pytest.raises(ValueError, match="no tokens"):
        fit([[], []], 2, 7)
    with pytest.raises(ValueError, match="1 discounts, expected 2"):
        fit([[0]], 2, 7, discounts=[0.5])
    model = fit([[0]], 2, 7)
    with pytest.raises(ValueError, match="the document: token 0 is 9"):
        model.log_probability([9])
    with pytest.raises(ValueError, match="skip_first -1"):
        model.log_probability([0], skip_first=-1)
