"""How text is scored, and what it is compared with (paper 4.3 shows samples and no numbers).

Captions: CIDEr-D, BLEU-4, the whole phrase. Questions: VQA accuracy. Intervals over examples. What
needs no network: the commonest text, the nearest picture, and for running text an n-gram model.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

LONGEST = 4  # CIDEr and BLEU-4 compare sequences of one to four words
CIDER_SIGMA = 6.0  # words: CIDEr-D's tolerance for a length that differs
VQA_AGREE = 3  # annotators who must have given an answer for it to count in full
RESAMPLED = 2**22  # values drawn at once by a bootstrap
IMAGES = 1024  # images compared at once
PIXELS = 1024  # channels multiplied at once, see `nearest_by_pixels`


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; apostrophes and hyphens stay inside a word.

    All scores here compare these. The field's script (pycocoevalcap) uses the Penn Treebank
    tokenizer of Stanford's CoreNLP, a Java program, which also parts "isn't" into "is n't":
    numbers differ a little from published ones where texts have contractions.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = text.replace("\u2019", "'")  # the curly apostrophe
    kept = (" " if unicodedata.category(c)[0] == "P" and c not in "'-" else c for c in text)
    return [word for part in "".join(kept).split() if (word := part.strip("'-"))]


def _tokenized(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> list[tuple[list[str], list[list[str]]]]:
    """Words of each text and of each of its references; ValueError names an example without any."""
    if len(texts) != len(references):
        raise ValueError(
            f"{len(texts)} texts and {len(references)} lists of references: "
            f"example {min(len(texts), len(references))} lacks one"
        )
    if not len(texts):
        raise ValueError("no examples to score")
    for i, known in enumerate(references):
        if isinstance(known, str) or not len(known):
            raise ValueError(f"example {i}: references {known!r}, expected a list of one or more")
    known_words = ([words(r) for r in known] for known in references)
    return [(words(text), known) for text, known in zip(texts, known_words, strict=True)]


# --- scores of captions and answers ---------------------------------------------------------------


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each candidate against its references, float64 (N,), 0 to 10.

    Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015,
    as pycocoevalcap computes it. Texts are vectors of n-gram counts, each weighted by how few of
    the examples have it in a reference (tf-idf). For n of 1 to 4, and the mean over n and over
    references: the cosine of candidate and reference, a candidate's weights clipped to the
    reference's, times a Gaussian of the difference in length; in all times 10.

    Scores depend on the whole set and are all 0 for a single example. A text shorter than four
    words has no 4-grams, so that a perfect caption of three words scores 7.5 at most.
    Raises ValueError for lengths that differ and for an example without references.
    """
    examples = _tokenized(candidates, references)
    grams = [(_ngrams(text), [_ngrams(r) for r in known]) for text, known in examples]
    found_in = collections.Counter(g for _, known in grams for g in set().union(*known))

    def vectors(counts: collections.Counter) -> list[dict[tuple[str, ...], float]]:
        by_length: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            weight = math.log(len(examples) / max(1, found_in[gram]))
            by_length[len(gram) - 1][gram] = count * weight
        return by_length

    scores = np.zeros(len(examples))
    for i, ((text, known), (counts, known_counts)) in enumerate(zip(examples, grams, strict=True)):
        candidate = vectors(counts)
        for reference, reference_counts in zip(known, known_counts, strict=True):
            cosines = map(_clipped_cosine, candidate, vectors(reference_counts))
            penalty = math.exp(-((len(text) - len(reference)) ** 2) / (2 * CIDER_SIGMA**2))
            scores[i] += 10 * penalty * sum(cosines) / (LONGEST * len(known))
    return scores


def _ngrams(text: Sequence[str]) -> collections.Counter:
    """How often each sequence of one to `LONGEST` words occurs."""
    shifted = [text[k:] for k in range(LONGEST)]
    sequences = (zip(*shifted[:n], strict=False) for n in range(1, LONGEST + 1))
    return collections.Counter(gram for same_length in sequences for gram in same_length)


def _clipped_cosine(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> float:
    product = sum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b)
    if product == 0:
        return 0.0  # no n-gram in common, or only such as all examples have
    return product / (math.hypot(*a.values()) * math.hypot(*b.values()))


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of the set with n-grams of one to four words, 0 to 1, without smoothing.

    Papineni, Roukos, Ward and Zhu, "BLEU: a Method for Automatic Evaluation of Machine
    Translation", ACL 2002: the geometric mean of the four precisions, each a sum over the set,
    times a penalty where candidates are shorter than the references nearest to them in length.
    0 where no four words in a row are right anywhere. Raises ValueError as `cider` does.

    Not NLTK's `corpus_bleu`: that counts one n-gram in each candidate that is too short to have
    any, and so marks short captions down; pycocoevalcap does not.
    """
    right, possible = np.zeros(LONGEST), np.zeros(LONGEST)
    length = nearest_length = 0
    for text, known in _tokenized(candidates, references):
        most: collections.Counter = collections.Counter()  # of each n-gram in one reference
        for reference in known:
            most |= _ngrams(reference)
        for gram, count in _ngrams(text).items():
            possible[len(gram) - 1] += count
            right[len(gram) - 1] += min(count, most[gram])
        length += len(text)
        nearest_length += min((abs(len(k) - len(text)), len(k)) for k in known)[1]
    if not right.all():
        return 0.0
    penalty = min(1.0, math.exp(1 - nearest_length / length))
    return float(penalty * np.exp(np.log(right / possible).mean()))


def exact(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether the whole phrase is one of the references, word by word, bool (N,).

    Raises ValueError as `cider` does.
    """
    return np.array([text in known for text, known in _tokenized(candidates, references)])


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Agreement of each answer with its annotators', float64 (N,), 0 to 1.

    Goyal et al., "Making the V in VQA Matter", CVPR 2017, with its ten annotators: the mean, over
    leaving out one of them at a time, of min(1, same answers among the others / 3). Where fewer
    than three others are left, as many as there are make a full score; a single annotator's answer
    must be the same. The official script also drops articles and writes "two" as "2", `words` does
    not. Raises ValueError as `cider` does.
    """
    scores = []
    for answer, known in _tokenized(answers, references):
        n, same = len(known), known.count(answer)
        if n == 1:
            scores.append(float(same))
            continue
        enough = min(VQA_AGREE, n - 1)
        left_out = [same - 1] * same + [same] * (n - same)  # same answers among the others
        scores.append(sum(min(1, others / enough) for others in left_out) / n)
    return np.array(scores)


# --- intervals ------------------------------------------------------------------------------------


def bootstrap(
    values: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float, float]:
    """Mean of values (N,), and its 95 % percentile interval: (mean, low, high).

    Examples that are not independent, such as the questions of one image, share a label in
    `clusters` (N,) and are drawn together. A single cluster has no interval: both ends are nan.
    Raises ValueError for no values, lengths that differ, and a value that is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values of shape {values.shape}, expected (N,) with N of 1 or more")
    if not np.isfinite(values).all():
        i = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"value {i} is {values[i]}")
    labels = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    if labels.shape != values.shape:
        raise ValueError(
            f"{len(values)} values and clusters of shape {labels.shape}: "
            f"value {min(len(values), labels.size)} lacks its partner"
        )
    _, member = np.unique(labels, return_inverse=True)
    sizes, sums = np.bincount(member), np.bincount(member, weights=values)
    mean, count = float(values.mean()), len(sizes)
    if count == 1:
        return mean, math.nan, math.nan

    rng, means = np.random.default_rng(seed), np.empty(resamples)
    rows = max(1, RESAMPLED // count)
    for i in range(0, resamples, rows):
        drawn = rng.integers(count, size=(min(rows, resamples - i), count), dtype=np.int32)
        drawn_sizes = count if count == len(values) else sizes[drawn].sum(axis=1)
        means[i : i + rows] = sums[drawn].sum(axis=1) / drawn_sizes
    low, high = np.percentile(means, [2.5, 97.5])
    return mean, float(low), float(high)


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float, float]:
    """Mean of a - b over the same examples (N,), and its interval as of `bootstrap`.

    What is hard for both cancels, so that a difference shows which two separate intervals hide.
    Raises ValueError as `bootstrap` does.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        first = min(a.size, b.size)
        raise ValueError(f"{a.size} and {b.size} values: value {first} lacks its partner")
    return bootstrap(a - b, clusters, seed=seed, resamples=resamples)


# --- what a network is compared with --------------------------------------------------------------


def most_frequent(captions: Sequence[str]) -> str:
    """The commonest caption, of equals the first; the same `words` are the same caption.

    Spelt as it first occurs. Raises ValueError for no captions.
    """
    if not len(captions):
        raise ValueError("no texts to choose from")
    keys = [tuple(words(c)) for c in captions]
    commonest, _ = collections.Counter(keys).most_common(1)[0]
    return captions[keys.index(commonest)]


def majority_answer(answers: Sequence[str]) -> str:
    """The commonest answer, likewise: what is best said without question and image."""
    return most_frequent(answers)


def majority_by_question(train: Sequence[tuple[str, str]], questions: Sequence[str]) -> list[str]:
    """For each question the commonest answer to the same `words` in `train`, (question, answer)s.

    What is best said without the image, short of reading the question. A question that `train`
    lacks gets the commonest answer of all. Raises ValueError where `train` is empty.
    """
    answers = collections.defaultdict(list)
    for question, answer in train:
        answers[tuple(words(question))].append(answer)
    otherwise = majority_answer([answer for _, answer in train])
    best = {question: majority_answer(given) for question, given in answers.items()}
    return [best.get(tuple(words(question)), otherwise) for question in questions]


def nearest_by_pixels(train_images: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Index of the training image with the least squared distance to each image, int64 (M,).

    Images are uint8, (N, H, W, 3) and (M, H, W, 3). Distances are exact and ties go to the first:
    channels less 128 lie within 2^7, 1024 products of two within 2^24, and so far float32 counts
    without rounding. Memory beyond the images is some 100 MB at 64x64. Raises ValueError for other
    dtypes, shapes that differ, and no training images.
    """
    for name, x in (("images", images), ("train_images", train_images)):
        if x.dtype != np.uint8 or x.ndim != 4:
            raise ValueError(f"{name} are {x.dtype} {x.shape}, expected uint8 (N, H, W, 3)")
    if train_images.shape[1:] != images.shape[1:]:
        raise ValueError(f"train_images of {train_images.shape[1:]}, images of {images.shape[1:]}")
    if not len(train_images):
        raise ValueError("no training images")
    nearest = np.zeros(len(images), np.int64)
    for q in range(0, len(images), IMAGES):
        queries = _centred(images[q : q + IMAGES])
        least = np.full(len(queries), np.inf)
        for t in range(0, len(train_images), IMAGES):
            known = _centred(train_images[t : t + IMAGES])
            # |known - query|^2 less |query|^2, which is the same for all of `known`
            distances = np.einsum("td,td->t", known, known, dtype=np.float64)[None]
            for d in range(0, known.shape[1], PIXELS):
                product = queries[:, d : d + PIXELS] @ known[:, d : d + PIXELS].T  # (q, t)
                distances = distances - 2 * product.astype(np.float64)
            best = distances.argmin(axis=1)
            value = distances[np.arange(len(best)), best]
            closer = value < least
            nearest[q : q + IMAGES][closer], least[closer] = t + best[closer], value[closer]
    return nearest


def _centred(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) to float32 (N, H * W * 3) of -128 to 127."""
    return images.reshape(len(images), -1).astype(np.float32) - np.float32(128)


@dataclasses.dataclass(frozen=True)
class NgramModel:
    """Interpolated Kneser-Ney over token ids, in which every id has some probability.

    Kneser and Ney, "Improved Backing-off for M-gram Language Modeling", ICASSP 1995, in the
    interpolated form of Chen and Goodman (1999). With h' the context h less its first
    token, and D an absolute discount:

        p(w | h) = (max(c(h w) - D, 0) + D * N(h) * p(w | h')) / c(h)

    c(h w) counts occurrences at the highest order; below it counts the distinct tokens that stand
    before h w (a document's beginning is one of them), since these orders only speak where the ones
    above know little. N(h) is how many different tokens follow h. A context that was never seen is
    shortened. Beneath the unigrams lies the uniform distribution. Each order's D is n1 / (n1 + 2
    n2), n1 and n2 the n-grams counted once and twice, half a count added.

    Documents stand alone, without padding: a document's first token has no context, its second a
    context of one token. With order 1 this is the unigram model, of plain counts.

    NLTK's `KneserNeyInterpolated` agrees where its documents are padded with one symbol at their
    beginning, the unigrams' D is 0 (what it has not seen has probability 0) and the other orders
    share one D. It searches all contexts for each probability: nearly an hour for 40,000 tokens
    after 400,000, where this takes seconds.

    Attributes:
      vocabulary: how many ids there are, from 0.
      counts: c of each n-gram, by order.
      contexts: c and N of each context, by order.
      discounts: D, by order.
    """

    vocabulary: int
    counts: tuple[dict[tuple[int, ...], int], ...]
    contexts: tuple[dict[tuple[int, ...], tuple[int, int]], ...]
    discounts: tuple[float, ...]

    @classmethod
    def fit(
        cls,
        documents: Iterable[Sequence[int]],
        order: int,
        vocabulary: int,
        discounts: Sequence[float] | None = None,
    ) -> NgramModel:
        """Count the documents' n-grams of up to `order` tokens.

        Raises ValueError for an order below 1, no tokens at all, and an id outside the vocabulary.
        """
        if order < 1:
            raise ValueError(f"order {order}, expected 1 or more")
        distinct: list[set[tuple[int, ...]]] = [set() for _ in range(order - 1)]
        occurrences: collections.Counter[tuple[int, ...]] = collections.Counter()
        tokens = 0
        for i, document in enumerate(documents):
            ids = _checked_ids(document, vocabulary, f"document {i}")
            tokens += len(ids)
            occurrences.update(_windows(ids, order))
            for k, found in enumerate(distinct):
                found.update(_windows([-1, *ids], k + 2))  # -1: a beginning, never a context
        if not tokens:
            raise ValueError("no tokens to count")
        counts = [collections.Counter(gram[1:] for gram in found) for found in distinct]
        counts.append(occurrences)

        contexts = []
        for by_gram in counts:
            totals: dict[tuple[int, ...], tuple[int, int]] = {}
            for gram, count in by_gram.items():
                total, different = totals.get(gram[:-1], (0, 0))
                totals[gram[:-1]] = total + count, different + 1
            contexts.append(totals)
        if discounts is None:
            discounts = [_discount(by_gram) for by_gram in counts]
        elif len(discounts) != order:
            raise ValueError(f"{len(discounts)} discounts, expected {order}")
        return cls(vocabulary, tuple(counts), tuple(contexts), tuple(discounts))

    def probability(self, token: int, context: Sequence[int] = ()) -> float:
        """p(token | context); only the last order - 1 tokens of the context count."""
        p = 1 / self.vocabulary
        for k in range(min(len(self.counts), len(context) + 1)):
            seen = tuple(context[len(context) - k :])
            if seen not in self.contexts[k]:
                break  # nor was any longer context that ends so
            total, different = self.contexts[k][seen]
            count, discount = self.counts[k].get((*seen, token), 0), self.discounts[k]
            p = (max(count - discount, 0) + discount * different * p) / total
        return p

    def log_probability(self, document: Sequence[int], skip_first: int = 0) -> tuple[float, int]:
        """Sum of log p (natural) over a document's tokens, and how many they are.

        The first `skip_first` are context only: 1 compares with a network that predicts no first
        token. Perplexity over documents is exp(-sum / number). Raises ValueError for an id outside
        the vocabulary and a negative `skip_first`.
        """
        if skip_first < 0:
            raise ValueError(f"skip_first {skip_first}, expected 0 or more")
        ids = _checked_ids(document, self.vocabulary, "the document")
        width = len(self.counts) - 1
        scored = range(min(skip_first, len(ids)), len(ids))
        logs = (math.log(self.probability(ids[i], ids[max(0, i - width) : i])) for i in scored)
        return math.fsum(logs), len(scored)


def _checked_ids(document: Sequence[int], vocabulary: int, where: str) -> list[int]:
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{where} is {ids.dtype} {ids.shape}, expected token ids (T,)")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(f"{where}: token {i} is {ids[i]}, expected an id below {vocabulary}")
    return ids.tolist()


def _windows(ids: list[int], length: int) -> Iterable[tuple[int, ...]]:
    return zip(*(ids[k:] for k in range(length)), strict=False)


def _discount(counts: dict[tuple[int, ...], int]) -> float:
    """n1 / (n1 + 2 n2); half a count added keeps it between 0 and 1 on small texts."""
    once, twice = (sum(count == n for count in counts.values()) for n in (1, 2))
    return (once + 0.5) / (once + 2 * twice + 1)
