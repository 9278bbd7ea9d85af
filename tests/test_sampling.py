"""The cache against the full forward pass, choosing against NumPy, and texts against a loop."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gato_lib import sampling as sp
from gato_lib import sequence as sq
from gato_lib.config import ConfigError, TrainConfig, model_config
from gato_lib.embedding import table_row
from gato_lib.episodes import Document
from gato_lib.sampling import Sampling, choose, log_likelihood, sample_texts
from gato_lib.tokenizers import SEPARATOR, train_text_tokenizer
from gato_lib.training import graph_of, initial_state, merge

# The linear patch embedder compiles faster, and patches are embedded before any cache.
TINY = model_config("w64d2", text_rows=1024, stochastic_depth=0.0, patch_embedder="linear")
GREEDY = Sampling(temperature=0.0)
CONTEXT = 64


def trained_like(config, seed=0):
    """Random parameters, all large enough to matter: biases start at zero otherwise."""
    params = initial_state(config, TrainConfig(steps=10, warmup_steps=1))["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [x + jnp.asarray(rng.normal(0, 0.15, x.shape), x.dtype) for x in leaves]
    return tree.unflatten(noisy)


@pytest.fixture(scope="module")
def params():
    return trained_like(TINY)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    sentences = [
        f"Q: what colour is the {noun}? A: {colour}\n"
        for noun in ("ball", "box", "key", "old door")
        for colour in ("red", "green", "blue", "purple and yellow")
    ]
    return train_text_tokenizer(sentences, tmp_path_factory.mktemp("text") / "t.model", 400)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def prompts(image):
    return [
        Document(("Q: what colour is the ball? A:",)),
        Document((image, "Q: what is this? A:")),
        Document(("the old door", image[:16], "is")),
        Document(("red",)),
    ]


# --- the cache ------------------------------------------------------------------------------------


def mixed_batch(rows=3, length=30):
    """Tokens of every kind, local positions and patches, at random."""
    rng = np.random.default_rng(1)
    shape, i32 = (rows, length), np.int32
    patch = np.where(rng.random(shape) < 0.2, rng.integers(0, 6, shape), 6)
    return sq.Batch(
        ids=rng.choice([*range(1024), *range(32000, 33025)], shape).astype(i32),
        local=rng.integers(-1, 513, shape).astype(i32),
        patch=patch.astype(i32),
        rows=rng.integers(0, 128, shape).astype(i32),
        cols=rng.integers(0, 128, shape).astype(i32),
        patches=rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8),
        **dict.fromkeys(("target_positions", "target_ids", "target_weights", "target_kinds")),
    )


def columns(batch, first, count):
    """Tokens first[b] ... first[b] + count - 1 of each row, past the end its last token again."""
    at = np.minimum(np.asarray(first)[:, None] + np.arange(count), batch.ids.shape[1] - 1)
    cut = {k: np.take_along_axis(getattr(batch, k), at, axis=1) for k in batch._fields[:5]}
    return batch._replace(**cut)


@pytest.mark.parametrize("positions", ["relative", "sinusoidal", "none"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_cached_equals_uncached(positions, chunk):
    """Rows of three lengths are prefilled; then come chunks of which each row uses another part."""
    config = dataclasses.replace(TINY, sequence_positions=positions)
    model = merge(graph_of(config), trained_like(config))
    batch = mixed_batch()
    expected = np.asarray(jax.jit(lambda b: model.hidden(b))(batch))
    prefill = jax.jit(lambda b, n: model.prefill(b, n, 30))
    extend = jax.jit(lambda b, c, n: model.extend(b, c, n))
    lengths = np.array([12, 3, 7], np.int32)
    hidden, cache = prefill(columns(batch, [0, 0, 0], 12), lengths)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :n], expected[row, :n], atol=1e-4)
    rng = np.random.default_rng(2)
    while lengths.min() < 30:
        counts = np.minimum(rng.integers(0 if chunk > 1 else 1, chunk + 1, 3), 30 - lengths)
        hidden, cache = extend(columns(batch, lengths, chunk), cache, counts.astype(np.int32))
        for row, (n, count) in enumerate(zip(lengths, counts, strict=True)):
            np.testing.assert_allclose(hidden[row, :count], expected[row, n : n + count], atol=1e-4)
        lengths = lengths + counts
        np.testing.assert_array_equal(cache.lengths, lengths)


def test_a_cache_can_begin_empty_forget_and_be_dealt_out_to_other_rows():
    model = merge(graph_of(TINY), trained_like(TINY))
    batch = mixed_batch()
    expected = np.asarray(jax.jit(lambda b: model.hidden(b))(batch))
    extend = jax.jit(lambda b, c, n: model.extend(b, c, n))
    ten = np.full(3, 10, np.int32)
    hidden, cache = extend(columns(batch, [0, 0, 0], 10), model.transformer.empty_cache(3, 30), ten)
    np.testing.assert_allclose(hidden, expected[:, :10], atol=1e-4)
    # Row 0 begins anew, row 1 goes back to its fourth token, row 2 goes on.
    lengths = np.array([0, 4, 10], np.int32)
    hidden, _ = extend(columns(batch, lengths, 10), cache._replace(lengths=lengths), ten)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(hidden[row], expected[row, n : n + 10], atol=1e-4)
    order = np.array([2, 2, 0])
    swapped = batch._replace(**{k: getattr(batch, k)[order] for k in batch._fields[:5]})
    hidden, _ = extend(columns(swapped, ten, 10), cache.rows(order), ten)
    np.testing.assert_allclose(hidden, expected[order, 10:20], atol=1e-4)


@pytest.mark.slow
def test_what_a_cache_forgets():
    """Of one layer a later token is what it would be without the forgotten; of more it is not."""
    ten = np.full(3, 10, np.int32)
    first, gone = np.array([0, 2, 3], np.int32), np.array([3, 4, 0], np.int32)
    for depth in (1, 2):
        config = dataclasses.replace(TINY, depth=depth)
        model = merge(graph_of(config), trained_like(config))
        batch = mixed_batch()
        empty = model.transformer.empty_cache(3, 30)
        extend = jax.jit(lambda b, c, n, model=model: model.extend(b, c, n))
        _, cache = extend(columns(batch, [0, 0, 0], 10), empty, ten)
        cache = cache.forget(first, gone)
        np.testing.assert_array_equal(cache.lengths, [7, 6, 10])
        hidden, _ = extend(columns(batch, ten, 5), cache, ten - 5)
        for row in range(3):
            kept = np.delete(np.arange(15), np.arange(first[row], first[row] + gone[row]))
            cut = {k: getattr(batch, k)[row : row + 1, kept] for k in batch._fields[:5]}
            expected = model.hidden(batch._replace(**cut))[0, -5:]
            error = np.abs(hidden[row] - expected).max()
            assert error < 1e-4 if depth == 1 or not gone[row] else error > 1e-3, (depth, row)


def test_an_id_that_is_not_told_embeds_as_zero():
    model = merge(graph_of(TINY), trained_like(TINY))
    batch = mixed_batch()
    batch = batch._replace(patch=np.full_like(batch.patch, 6), local=np.full_like(batch.local, 512))
    told = model.embedding(*batch[:6])
    blank = model.embedding(*batch._replace(ids=np.full_like(batch.ids, sq.NO_ID))[:6])
    np.testing.assert_array_equal(blank, np.broadcast_to(blank[0, 0], blank.shape))
    table = model.embedding.table[...]
    rows = table_row(batch.ids, TINY)
    np.testing.assert_allclose(told - blank, table[rows], atol=1e-6)


def test_cache_in_bfloat16():
    """Tolerance: 8 bits of mantissa, hidden states of about 1."""
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    model = merge(graph_of(config), trained_like(config))
    batch = mixed_batch()
    tens = np.full(3, 10, np.int32)

    @jax.jit
    def cached(prompt, rest):
        cache = model.prefill(prompt, tens, 30)[1]
        return model.extend(rest, cache, tens)

    first, rest = columns(batch, [0] * 3, 10), columns(batch, [10] * 3, 10)
    hidden, cache = cached(first, rest)
    assert {x.dtype for x in jax.tree.leaves(cache[:3])} == {jnp.dtype("bfloat16")}
    whole = jax.jit(lambda b: model.hidden(b))(columns(batch, [0] * 3, 20))
    difference = np.abs(np.asarray(hidden - whole[:, 10:], np.float32))
    assert difference.max() < 0.25 and difference.mean() < 0.03


# --- one choice -----------------------------------------------------------------------------------


def reference_choice(logits, u, temperature, top_k, top_p):
    """One row, by sorting and counting."""
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    p /= p.sum()
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = ranked[: top_k or None]
    total = sum(p[i] for i in kept)
    smallest = []
    for i in kept:
        if smallest and sum(p[j] for j in smallest) / total >= top_p:
            break
        smallest.append(i)
    in_order = smallest if top_k or top_p < 1 else range(len(p))
    mass, target = 0.0, u * sum(p[i] for i in smallest)
    for i in in_order:
        mass += p[i]
        if mass > target:
            return i
    raise AssertionError


@pytest.mark.parametrize("temperature", [0.5, 0.9, 5.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (99, 0.7), (0, 0.3)])
def test_choose_against_numpy(temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (300, 40)).astype(np.float32)
    logits[:, 7] = -np.inf
    noise = ((rng.integers(0, 1 << 23, 300)) / (1 << 23)).astype(np.float32)
    noise[:2] = 0.0, 1 - 2.0**-23
    chosen = choose(jnp.asarray(logits), jnp.asarray(noise), Sampling(temperature, top_k, top_p))
    settings = (temperature, top_k, top_p)
    expected = [reference_choice(*row, *settings) for row in zip(logits, noise, strict=True)]
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=0.5), {1}),  # exactly reached: nothing more is taken
        (Sampling(1.0, top_p=0.51), {1, 0}),  # 0 and 2 are as probable: the lower index
        (Sampling(1.0, top_p=0.8), {1, 0, 2}),
        (Sampling(1.0, top_p=1e-9), {1}),  # at least one
        (Sampling(1.0, top_k=2), {1, 0}),
        (Sampling(1.0, top_k=100), {0, 1, 2, 3}),  # more than there are
        (Sampling(1.0, top_k=2, top_p=0.6), {1}),  # of two thirds and one third
        (Sampling(0.0), {1}),
        (Sampling(0.0, top_k=3, top_p=0.9), {1}),
    ],
)
def test_what_can_be_chosen(sampling, possible):
    p = np.array([0.1875, 0.5, 0.1875, 0.125, 0.0])  # float32 holds these, and their sums
    noise = (np.arange(4096) / 4096).astype(np.float32)
    with np.errstate(divide="ignore"):
        logits = jnp.broadcast_to(jnp.asarray(np.log(p), jnp.float32)[None], (4096, 5))
    assert set(np.asarray(choose(logits, jnp.asarray(noise), sampling)).tolist()) == possible


def test_choices_have_the_distribution():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, 50), jnp.float32)
    noise = jnp.arange(1 << 14) / (1 << 14)
    chosen = choose(jnp.broadcast_to(logits[None], (1 << 14, 50)), noise, Sampling(0.7))
    share = np.bincount(chosen, minlength=50) / (1 << 14)
    np.testing.assert_allclose(share, jax.nn.softmax(logits / 0.7), atol=1.1 / (1 << 14))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


# --- texts ----------------------------------------------------------------------------------------


def naive_greedy(params, text, prompt, max_tokens):
    """Ids by a whole forward pass a token."""
    model = merge(graph_of(TINY), params)

    @jax.jit
    def next_logits(batch, last):
        return model.embedding.logits(model.hidden(batch)[0, last][None])[0]

    seq = sq.document_tokens(prompt, text)
    n = len(seq)
    batch = sq.make_batch(seq, [[(0, n)]], CONTEXT, CONTEXT, len(seq.patches))
    local = batch.local.copy()
    local[:] = sq.NO_POSITION  # padding is not seen
    batch = batch._replace(local=local)
    ids = []
    for i in range(n, n + max_tokens):
        logits = np.asarray(next_logits(batch, i - 1))[: text.size]
        ids.append(int(np.where(text.legal, logits, -np.inf).argmax()))
        batch.ids[0, i] = ids[-1]
    return ids


def test_greedy_equals_a_loop_of_full_passes(params, text, prompts):
    never_ends = favouring(params, text.end, -100.0)
    settings = {"max_tokens": 12, "context_length": CONTEXT}
    texts = sample_texts(TINY, never_ends, text, prompts, GREEDY, **settings)
    for prompt, (written,) in zip(prompts, texts, strict=True):
        ids = naive_greedy(never_ends, text, prompt, 12)
        assert written == text.decode(ids)
        assert len(set(ids)) > 1
    assert len(set(map(tuple, texts))) == len(prompts)
    first = sample_texts(TINY, never_ends, text, prompts, Sampling(5.0, top_k=1), **settings)
    assert first == texts


def decoded_ids(monkeypatch):
    """Record the ids that `_decode` returns."""
    seen, original = [], sp._decode

    def record(*arguments):
        seen.append(np.asarray(original(*arguments)))
        return seen[-1]

    monkeypatch.setattr(sp, "_decode", record)
    return seen


def test_only_legal_ids(params, text, prompts, monkeypatch):
    """Unknown, control and value ids are made the most probable by far; none comes."""
    seen = decoded_ids(monkeypatch)
    hidden = jax.tree.leaves(params["transformer"]["norm"]["bias"])[0]
    table = params["embedding"]["table"]
    illegal = [i for i in range(text.size) if not text.legal[i]]
    assert illegal
    for rows in (jnp.array(illegal), jnp.arange(text.size, table.shape[0])):
        table = table.at[rows].set(10.0 * jnp.sign(hidden)[None])
    biased = dict(params, embedding=dict(params["embedding"], table=table))
    settings = {"samples": 8, "max_tokens": 16, "context_length": CONTEXT}
    for sampling in (Sampling(5.0), Sampling(5.0, 1000, 0.99), GREEDY):
        sample_texts(TINY, biased, text, prompts, sampling, **settings)
        ids = seen[-1]
        assert ids.shape == (4, 8, 16) and text.legal[ids].all() and ids.max() < SEPARATOR
        assert sampling == GREEDY or len(np.unique(ids)) > 100


def favouring(params, token_id, by):
    """Parameters under which a token is more probable, whatever came before."""
    bias = params["transformer"]["norm"]["bias"]
    direction = jnp.zeros_like(bias).at[0].set(by)
    table = params["embedding"]["table"]
    table = table.at[:, 0].set(0.0).at[token_id, 0].set(1.0)
    norm = dict(params["transformer"]["norm"], bias=bias + direction)
    return dict(
        params,
        transformer=dict(params["transformer"], norm=norm),
        embedding=dict(params["embedding"], table=table),
    )


def test_stops_at_end(params, text, prompts, monkeypatch):
    seen = decoded_ids(monkeypatch)
    settings = {"samples": 16, "max_tokens": 24, "context_length": CONTEXT}
    texts = sample_texts(
        TINY, favouring(params, text.end, 4.0), text, prompts, Sampling(1.0), **settings
    )
    ends = []
    buckets = [sp._bucket(len(sq.document_tokens(p, text)), 16) for p in prompts]
    in_order = np.argsort(buckets, kind="stable")
    for i, row in zip(in_order, seen[0], strict=True):
        for written, ids in zip(texts[i], row.tolist(), strict=True):
            n = ids.index(text.end) if text.end in ids else 24
            assert set(ids[n:]) <= {text.end}
            assert written == text.decode(ids[:n])
            ends.append(n)
    assert len(set(ends)) > 4 and min(ends) < 24
    certain = favouring(params, text.end, 100.0)
    assert sample_texts(TINY, certain, text, prompts, GREEDY, **settings) == [[""] * 16] * 4


@pytest.mark.parametrize("stop", ["\n", "ed", "en ", "? A", "ll?"])
def test_stops_before_a_string(params, text, prompts, stop, monkeypatch):
    """The text is the one without `stop`, cut; nothing is chosen after a piece that holds it."""
    seen = decoded_ids(monkeypatch)
    likely = params
    for token in text.encode("red green ball? A: \n"):
        likely = favouring(likely, token, 1.0)
    table = likely["embedding"]["table"]
    wanted = jnp.array(sorted(set(text.encode("red green ball? A: \n"))))
    table = table.at[wanted, 0].set(1.0)
    likely = dict(likely, embedding=dict(likely["embedding"], table=table))
    settings = {"samples": 16, "max_tokens": 24, "context_length": CONTEXT}
    plain = sample_texts(TINY, likely, text, prompts, Sampling(1.0), **settings)
    stopped = sample_texts(TINY, likely, text, prompts, Sampling(1.0), stop=stop, **settings)
    assert stopped == [[t.split(stop, 1)[0] for t in samples] for samples in plain]
    assert any(stop in t for samples in plain for t in samples)
    final = sp._final(text, stop)
    for ids in seen[1].reshape(-1, 24):
        ends = np.flatnonzero(final[ids])
        assert not len(ends) or set(ids[ends[0] + 1 :]) <= {text.end}


def test_samples_are_seeded_and_do_not_depend_on_the_batch(params, text, prompts):
    settings = {"max_tokens": 10, "context_length": CONTEXT}
    together = sample_texts(
        TINY, params, text, prompts * 4, Sampling(1.0), samples=6, seed=3, **settings
    )
    assert len({t for samples in together for t in samples}) > 80  # of 96: each has its own stream
    again = sample_texts(
        TINY, params, text, prompts * 4, Sampling(1.0), samples=6, seed=3, **settings
    )
    assert again == together
    other = sample_texts(
        TINY, params, text, prompts[:1], Sampling(1.0), samples=6, seed=4, **settings
    )
    assert not set(other[0]) & set(together[0])
    # Prompts 0 and 1 without the others, and fewer samples of them: other shapes and padding.
    alone = sample_texts(
        TINY, params, text, prompts[:1], Sampling(1.0), samples=2, seed=3, **settings
    )
    assert alone[0] == together[0][:2]
    two = sample_texts(
        TINY, params, text, prompts[:2], Sampling(1.0), samples=6, seed=3, **settings
    )
    assert two == together[:2]


def test_a_space_after_the_prompt_is_not_part_of_the_text(params, text):
    """Certain to write "▁red", then it must not matter that a piece carries the space."""
    (token,) = text.encode("red")
    assert text.piece(token) == "▁red"
    certain = favouring(params, token, 100.0)
    prompt = Document(("Q: what colour is the ball? A:",))
    (written,) = sample_texts(
        TINY, certain, text, [prompt], GREEDY, max_tokens=2, context_length=CONTEXT
    )
    assert written == ["red red"]


def test_documents_before_a_prompt_are_ended(params, text, prompts, image):
    """Examples, then the question, as training rows have them: the ids and what is written."""
    shown = Document((image, "A: red"))
    seq = sp._prompt([shown, prompts[1]], text, 60)
    examples = sq.document_tokens(shown, text, end=True)
    assert examples.ids[-1] == text.end
    question = sq.document_tokens(prompts[1], text)
    np.testing.assert_array_equal(seq.ids, np.concatenate([examples.ids, question.ids]))
    assert seq.ids[-1] != text.end and len(seq.patches) == 6  # the same picture twice
    settings = {"max_tokens": 4, "context_length": CONTEXT}
    never_ends = favouring(params, text.end, -100.0)
    with_it, without = sample_texts(
        TINY, never_ends, text, [[shown, prompts[1]], prompts[1]], GREEDY, **settings
    )
    assert with_it != without


def test_bad_prompts_are_named(params, text, prompts, image):
    def sample(*prompts, **settings):
        return sample_texts(TINY, params, text, prompts, GREEDY, context_length=32, **settings)

    with pytest.raises(ValueError, match="prompt 1: 40 tokens"):
        sample(prompts[3], Document((np.zeros((128, 80, 3), np.uint8),)), max_tokens=1)
    n = len(sq.document_tokens(prompts[3], text))
    assert len(sample(prompts[3], max_tokens=32 - n)[0]) == 1
    with pytest.raises(ValueError, match="prompt 0"):
        sample(prompts[3], max_tokens=33 - n)
    with pytest.raises(ValueError, match="prompt 1: 0 tokens"):
        sample(prompts[3], Document(("",)), max_tokens=1)
    with pytest.raises(ValueError, match="prompt 0: .* at least one item"):
        sample(Document(()), max_tokens=1)
    with pytest.raises(ValueError, match="stop ''"):
        sample(prompts[3], stop="")
    assert sample() == []


# --- likelihood -----------------------------------------------------------------------------------


def naive_log_p(params, text, seq, context):
    """Token by token: the context of each is the window that the protocol gives it."""
    model = merge(graph_of(TINY), params)
    logits_after = jax.jit(lambda b, i: model.embedding.logits(model.hidden(b)[:, i]))
    batch = sq.make_batch(seq, [[(0, len(seq))]], len(seq), len(seq), 4)
    stride, total, count = context // 2, 0.0, 0
    for t in range(1, len(seq)):
        if seq.kinds[t] != sq.TEXT:
            continue
        first = 0
        while first + context <= t:
            first += stride
        cut = columns(batch, [first], context)  # what comes after t - 1 is not seen
        logits = logits_after(cut, t - first - 1)
        total += float(jax.nn.log_softmax(logits)[0, seq.ids[t]])
        count += 1
    return total, count


def test_log_likelihood_against_one_token_at_a_time(params, text, image):
    documents = [
        Document(("the old ball is red", image[:16], "and the key is not\n")),
        Document((image[:16, :16], "é: the old door")),
        Document(("x",)),
        Document((image[:16, :16],)),
    ]
    results = log_likelihood(TINY, params, text, documents, context_length=8)
    for document, result in zip(documents, results, strict=True):
        seq = sq.document_tokens(document, text)
        log_p, count = naive_log_p(params, text, seq, 8)
        assert result.tokens == count
        np.testing.assert_allclose(result.log_p, log_p, rtol=1e-4)
    assert len(sq.document_tokens(documents[0], text)) > 16  # three windows and more
    # What is scored: all but the first piece, "▁the".
    assert text.piece(text.encode("the old ball")[0]) == "▁the"
    assert results[0].bytes == len("the old ball is redand the key is not\n") - 3
    assert results[1].bytes == len("é: the old door".encode())
    whole = log_likelihood(TINY, params, text, documents, context_length=CONTEXT)
    assert [r.tokens for r in whole] == [r.tokens for r in results]
    ended = log_likelihood(TINY, params, text, documents, context_length=CONTEXT, end=True)
    assert [e.tokens - r.tokens for e, r in zip(ended, whole, strict=True)] == [1, 1, 1, 0]
    assert [e.bytes for e in ended] == [r.bytes for r in whole]
    with pytest.raises(ValueError, match="document 1"):
        log_likelihood(TINY, params, text, [documents[0], Document(())], context_length=8)
