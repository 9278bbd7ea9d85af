"""Sets of text and images, their sequences and batches (paper 3.2)."""

from __future__ import annotations

import io
import itertools
import pathlib

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gato_lib import sequence as sq
from gato_lib import tokenizers as tk
from gato_lib import vision_language as vl
from gato_lib import workbook
from gato_lib.config import ConfigError, DataConfig
from gato_lib.distributed import Placement
from gato_lib.episodes import Document
from gato_lib.mixture import (
    Mixture,
    _crop,
    build_documents,
    draw_row,
    group_batch,
    mixture_weights,
    paper_shares,
)
from gato_lib.vision_language import pictures
from gato_lib.vision_language.base import blind, hashed

ASSETS = pathlib.Path(sq.__file__).parent / "assets"


@pytest.fixture(scope="module")
def text():
    return tk.TextTokenizer()


@pytest.fixture(scope="module")
def small():
    """Every set, cut down."""
    return {name: vl.load(name, 40) for name in vl.SETS}


# --- what is embedded -----------------------------------------------------------------------------


def test_embedded_pictures():
    rows = pq.read_table(ASSETS / "emoji.parquet").to_pylist()
    fluent = [r for r in rows if r["style"] == "fluent-3d"]
    assert len({r["label"] for r in fluent}) == len(fluent) == 1852
    assert len({r["family"] for r in fluent}) == 1681, "skin tones and genders are one subject"
    splits = {}
    for row in rows:
        splits.setdefault(row["family"], set()).add(row["split"])
        assert PIL.Image.open(io.BytesIO(row["picture"])).size == (64, 64)
        assert "skin tone" not in row["label"]
    assert all(len(s) == 1 for s in splits.values()), "variants of a subject cross a split"
    labels = {}
    for row in rows:
        labels.setdefault(row["picture"], []).append(row["label"])
    # The package draws these two alike; both are of the training split.
    assert [two for two in labels.values() if len(two) > 1] == [["grinning cat", "cat face"]]
    sizes = sum(p.stat().st_size for p in ASSETS.iterdir())
    assert sizes < 15e6
    for name in ("emoji", "brown"):
        assert (ASSETS / f"{name}.LICENSE").read_text().strip()


def test_men_and_women_of_one_subject_are_of_one_split():
    split = {s.label: s.split for s in pictures.subjects()}
    for person in ("health worker", "singer", "astronaut", "firefighter"):
        assert len({split[p] for p in (person, f"man {person}", f"woman {person}")}) == 1
    assert len({split[f"{who} running"] for who in ("person", "man", "woman")}) == 1


@pytest.mark.parametrize("name", vl.SETS)
def test_splits_share_nothing_and_repeat(name, small):
    found = small[name]
    assert len(found.splits["train"]) == 40 and found.licence
    assert found.name == name and found.paired == (not name.startswith("text/"))
    shown = {}
    for split, examples in found.splits.items():
        assert examples
        for e in examples:
            key = e.items[0] if isinstance(e, Document) else e.image.tobytes()
            assert shown.setdefault(key, split) == split, f"{name}: in {shown[key]} and {split}"
            if found.paired:
                assert e.image.shape == (64, 64, 3) and e.image.dtype == np.uint8
    again = vl.SETS[name](40, 0)
    other = vl.SETS[name](40, 1)
    text_of = lambda s, split: [d.items[-1] for d in s.documents(split)]  # noqa: E731
    for split in found.splits:
        assert text_of(again, split) == text_of(found, split)
        assert split == "train" or text_of(other, split) == text_of(found, split)
    assert text_of(other, "train") != text_of(found, "train")


def test_every_caption_and_document_returns_from_its_ids(small, text):
    known = set()
    for found in small.values():
        for split in found.splits:
            for document in found.documents(split):
                known |= {i for i in document.items if isinstance(i, str)}
    known |= {d.items[0] for d in vl.load("text/brown").documents("train")[:60]}
    assert len(known) > 2000
    for item in known:
        assert text.decode(text.encode(item)).encode() == item.encode()
    for document in itertools.islice(small["vqa/easy"].documents("test"), 50):
        tokens = sq.document_tokens(document, text, end=True)
        written = text.decode(tokens.ids[tokens.kinds == sq.TEXT])
        assert written == " ".join(document.items[1:]), "a question and its answer read as one"


def test_easy_vqa_is_whole():
    found = vl.load("vqa/easy")
    assert {k: len(v) for k, v in found.splits.items()} == {
        "train": 36_631,
        "validation": 1_944,
        "test": 9_673,
    }
    assert len({e.image.tobytes() for e in found.splits["test"]}) <= 1_000
    answers = [e.answer for e in found.splits["test"]]
    assert len(set(answers)) == 13 and answers.count("yes") / len(answers) == pytest.approx(
        0.3733, abs=1e-4
    )


def test_conversations_are_lines_of_two():
    for document in vl.load("text/chitchat", 40).documents("train"):
        lines = document.items[0].split("\n")
        assert lines.pop() == "" and len(lines) > 1
        assert all(line[:3] in ("A: ", "B: ") and line[3:].strip() for line in lines)
        assert lines[0].startswith("A")
    assert vl.conversation([(0, "hi"), (1, "oh")]) == "A: hi\nB: oh\n"


# --- scenes ---------------------------------------------------------------------------------------


def test_captions_of_scenes():
    scene = pictures.Scene
    assert scene(("dog",), "red").caption() == "a dog on a red background"
    assert scene(("umbrella",), "blue", 3).caption() == "three umbrellas on a blue background"
    two = scene(("dog", "airplane"), "white")
    assert two.caption() == "a dog to the left of an airplane on a white background"
    below = scene(("butterfly", "key"), "black", vertical=True)
    assert below.caption() == "a butterfly above a key on a black background"


def visible(scene: pictures.Scene, seed: int) -> np.ndarray:
    """Where a scene differs from its ground, bool (64, 64)."""
    image = scene.draw(np.random.default_rng(seed)).astype(int)
    ground = np.array(pictures.GROUNDS[scene.ground])
    return (np.abs(image - ground) > 12).any(axis=-1)


@pytest.mark.parametrize("seed", range(5))
def test_scenes_show_what_their_captions_say(seed):
    ground = "blue"
    for first, second in (("banana", "zebra"), ("zebra", "banana")):
        pair = pictures.Scene((first, second), ground)
        image = pair.draw(np.random.default_rng(seed)).astype(int)
        yellow = (image[..., 0] > 200) & (image[..., 1] > 150) & (image[..., 2] < 140)
        left, right = yellow[:, :32].sum(), yellow[:, 32:].sum()
        assert (left > right) == (first == "banana")
        assert visible(pair, seed)[:, :32].any() and visible(pair, seed)[:, 32:].any()
        above = pictures.Scene((first, second), ground, vertical=True)
        assert visible(above, seed)[:32].any() and visible(above, seed)[32:].any()
    for number in (2, 3, 4):
        seen = visible(pictures.Scene(("strawberry",), ground, number), seed)
        cells = [seen[y : y + 32, x : x + 32].any() for y in (0, 32) for x in (0, 32)]
        assert sum(cells) == number


@pytest.mark.parametrize("name", ["captions/scenes_small", "captions/scenes"])
def test_held_out_combinations_never_enter_training(name):
    small = name.endswith("small")
    labels = pictures.nouns(small)
    assert len(labels) == (24 if small else 525)
    rng = np.random.default_rng(0)
    trained, held = set(), set()
    for _ in range(3000):
        trained |= set(pictures.random_scene(rng, labels).combinations())
    for _ in range(500):
        scene = pictures.random_scene(rng, labels, held_out=True)
        assert scene.held_out
        held |= {c for c in scene.combinations() if hashed(c) < pictures.HELD_OUT_SHARE}
    assert held and not trained & held
    parts = {part for c in trained for part in c.split(" + ")}
    unseen = {part for c in held for part in c.split(" + ")} - parts
    assert not small or not unseen, "each part of a held-out combination is trained on"


def test_the_held_out_style_is_another_drawing_of_a_trained_subject():
    fluent, noto = pictures.known(), pictures.known("noto")
    assert all(fluent[label].split == "train" for label in noto)
    same = [
        np.array_equal(np.asarray(noto[label].picture), np.asarray(fluent[label].picture))
        for label in noto
    ]
    assert not any(same)
    with pytest.raises(ValueError, match="style is 'oil'"):
        pictures.subjects("oil")


def test_questions_about_scenes_are_answered_by_their_captions():
    captions = vl.load("captions/scenes_small", 300, 0)
    asked = vl.load("vqa/scenes_small", 300, 0)
    kinds = set()
    for question in asked.splits["train"]:
        answer = question.answer
        kinds.add(question.question.split()[0] + answer * (answer in ("yes", "no")))
        assert question.prompt.items[1] == f"Q: {question.question} A:"
    assert kinds == {"what", "how", "isyes", "isno"}
    assert captions.splits.keys() == asked.splits.keys()


def test_of_several_answers_the_commonest_is_trained_on():
    image = np.zeros((16, 16, 3), np.uint8)
    question = vl.Question(image, "what?", ("cat", "dog", "dog", "cat", "dog"))
    (document,) = question.documents
    assert document.items[1:] == ("Q: what? A:", "dog") and document.given == (1,)
    two = vl.Caption(image, ("a cat", "some cat"))
    assert [d.items[1] for d in two.documents] == ["a cat", "some cat"]
    assert (blind(two).image == 128).all() and blind(two).texts == two.texts


def test_unknown_sets_are_refused():
    with pytest.raises(ConfigError, match="unknown set 'captions/coco'; known: captions/emoji"):
        vl.load("captions/coco")
    parse = workbook.select_documents
    assert parse("captions/emoji, vqa/easy 30,") == ("captions/emoji", "vqa/easy 30")
    assert parse("") == ()
    for wrong in ("captions", "vqa/easy many", "vqa/easy 0", "vqa/easy -1"):
        with pytest.raises(ConfigError, match="documents: "):
            parse(wrong)
    with pytest.raises(ConfigError, match="'vqa/easy' stands twice"):
        parse("vqa/easy, vqa/easy 3")


# --- sequences ------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one id a character; its end is 7."""

    end = 7

    def encode(self, string: str) -> list[int]:
        return [ord(c) for c in string]


def test_a_question_token_by_token():
    image = np.zeros((16, 32, 3), np.uint8)
    question = vl.Question(image, "B", ("C",))
    (document,) = question.documents
    #            p  p  Q   :   ' ' B   ' ' A   :   C   end
    ids = [0, 0, 81, 58, 32, 66, 32, 65, 58, 67, 7]
    both = [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    alone = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    for question_loss, mask in ((True, both), (False, alone)):
        tokens = sq.document_tokens(document, Letters(), end=True, question_loss=question_loss)
        assert tokens.ids.tolist() == ids
        assert tokens.loss_mask().tolist() == mask
        assert (tokens.local == sq.NO_POSITION).all()
        batch = sq.make_batch(tokens, [[(0, 11)]], 12, 11, 2)
        aims = batch.target_positions[0][batch.target_weights[0] > 0] + 1
        assert aims.tolist() == np.flatnonzero(mask).tolist()
    assert sq.document_tokens(question.prompt, Letters()).ids.tolist() == ids[:9]


def pairs(count: int, size: int, first: int = 0) -> list[sq.TokenSequence]:
    """Documents of one patch and `size` letters, all different."""
    out = []
    for i in range(first, first + count):
        image = np.full((16, 16, 3), i % 256, np.uint8)
        string = "".join(chr(1000 + 50 * i + j) for j in range(size))
        out.append(sq.document_tokens(Document((image, string)), Letters(), end=True))
    return out


CONFIG = DataConfig(tasks=(), episodes=(), documents=("x",), context_length=64, batch_tokens=256)


def test_five_pairs_make_a_row():
    group = build_documents("c", {"c/a": (pairs(30, 4), pairs(6, 4, 30))}, CONFIG, pairs=5)
    assert group.length == 5 * 6 and group.batch_size == 8
    seen = set()
    for seed in range(50):
        (window,) = draw_row(group, np.random.default_rng(seed))
        assert len(window.spans) == 5 and window.tokens == 30
        starts = [first // 6 for first, _ in window.spans]
        assert all(last - first == 6 and first % 6 == 0 for first, last in window.spans)
        seen |= set(starts)
        (window,) = draw_row(group, np.random.default_rng(seed), held_out=True)
        assert all(first // 6 >= 30 for first, _ in window.spans)
    assert seen == set(range(30)), "all of the training pairs, and no held-out one"
    batch = group_batch(group, CONFIG, 3).batch
    assert batch.ids.shape == (8, 30) and (batch.target_weights.sum(axis=1) == 25).all()
    assert batch.segments is None, "pairs of a row see those before them"


def test_rows_of_pairs_are_cropped_or_padded():
    mixed = [*pairs(10, 2), *pairs(10, 9, 10)]
    group = build_documents("c", {"c/a": (mixed, [])}, CONFIG, pairs=5)
    whole = {len(p) for p in mixed}
    assert whole == {4, 11}
    tokens, cropped = [], 0
    for seed in range(300):
        (window,) = draw_row(group, np.random.default_rng(seed))
        assert window.tokens <= group.length and len(window.spans) <= 5
        tokens.append(window.tokens)
        cropped += any(last - first not in whole for first, last in window.spans)
    assert min(tokens) < group.length == max(tokens)
    assert 30 < cropped < 270
    long = DataConfig(tasks=(), episodes=(), documents=("x",), document_length=12, batch_tokens=24)
    assert build_documents("c", {"c/a": (mixed, [])}, long, pairs=5).length == 12


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 2**31)
)
def test_a_crop_is_one_piece(sizes, length, seed):
    ends = np.cumsum(sizes) + 100
    spans = np.stack([ends - sizes, ends], axis=1)
    got = [t for a, b in _crop(spans, length, np.random.default_rng(seed)) for t in range(a, b)]
    total = sum(sizes)
    assert len(got) == min(length, total)
    assert got == list(range(got[0], got[0] + len(got))) and got[0] >= 100


def test_windows_of_documents_begin_anywhere(text):
    config = DataConfig(
        tasks=(), episodes=(), documents=("x",), context_length=32, batch_tokens=128
    )
    documents = vl.load("text/brown", 3).documents("train")
    tokens = [sq.document_tokens(d, text, end=True) for d in documents]
    group = build_documents("text", {"text/brown": (tokens[:2], tokens[2:])}, config)
    bounds = np.cumsum([0] + [len(t) for t in tokens])
    begins = set()
    for seed in range(300):
        (window,) = draw_row(group, np.random.default_rng(seed))
        ((first, last),) = window.spans
        assert last - first == 32 and last <= bounds[2]
        assert not first < bounds[1] < last, "a window crosses documents"
        begins.add(first)
    assert len(begins) > 250
    batch = group_batch(group, config, 0).batch
    assert (batch.target_weights.sum(axis=1) == 31).all(), "all but the first token of a window"


def test_sets_are_drawn_by_their_size():
    sets = {"c/a": (pairs(30, 4), []), "c/b": (pairs(10, 4, 30), [])}
    group = build_documents("c", sets, CONFIG, pairs=5)
    names = [draw_row(group, np.random.default_rng(s))[0].task for s in range(400)]
    assert 0.68 < names.count("c/a") / 400 < 0.82


def test_every_part_of_a_batch_of_pairs_is_the_same_wherever_it_is_built():
    config = DataConfig(
        tasks=(), episodes=(), documents=("x",), context_length=64, batch_tokens=256,
        rows_multiple=4,
    )  # fmt: skip
    group = build_documents("c", {"c/a": (pairs(30, 4), [])}, config, pairs=5)
    owners = ((0, 1), (2, 3))
    whole = group_batch(group, config, 11, Placement(((0, 1, 2, 3),), 4)).batch
    for process in range(2):
        part = group_batch(group, config, 11, Placement(owners, 4, process)).batch
        rows = slice(process * 4, process * 4 + 4)
        np.testing.assert_array_equal(part.ids, whole.ids[rows])
        np.testing.assert_array_equal(part.target_ids, whole.target_ids[rows])


# --- the mixture ----------------------------------------------------------------------------------


def test_weights_of_the_paper():
    weights = dict(mixture_weights("paper", ["babyai", "captions", "text", "vqa"]))
    total = 9.06 + 4 * 0.67 + 6.7 + 2 * 0.67
    assert weights["captions"] == pytest.approx(4 * 0.67 / total)
    assert weights["text"] == pytest.approx(6.7 / total)
    shares = paper_shares(weights)
    assert shares["coco"] == shares["okvqa"] == pytest.approx(0.67 / total)
    assert shares["babyai"] == pytest.approx(weights["babyai"]) and "m3w" not in shares
    assert paper_shares({"mine": 1.0}) == {}


def test_documents_are_prepared_and_validated(tmp_path):
    run = workbook.Run(tmp_path, "smoke")
    make = lambda **more: workbook.data_config(  # noqa: E731
        "",
        "others 1",
        "0",
        "captions 2, text 1, vqa 1",
        documents="captions/scenes_small 30, vqa/scenes_small 30, text/brown 2",
        context_length=64,
        document_length=96,
        batch_tokens=200,
        vocabulary_size=400,
        **more,
    )
    config = make()
    assert DataConfig.from_dict(config.to_dict()) == config
    prepared = workbook.prepare(run, config)
    assert isinstance(prepared.mixture, Mixture) and prepared.cards == []
    table = {row["domain"]: row for row in prepared.mixture.describe()}
    assert table["captions"]["weight"] == 0.5 and table["text"]["length"] == 96
    assert all(row["padding"] < 0.1 for row in table.values())
    assert set(prepared.content) == {"captions", "vqa", "text"}
    assert {s.domain for s in prepared.mixture.validation()} == set(table)
    assert [c["task"] for c in prepared.documents] == [
        "captions/scenes_small",
        "vqa/scenes_small",
        "text/brown",
    ]
    unseen = workbook.prepare(run, make(blind=True))
    patches = [len(g.seq.patches) for g in unseen.mixture.groups if g.name != "text"]
    assert patches == [1, 1]
    assert unseen.content["captions"] != prepared.content["captions"]
    assert unseen.content["text"] == prepared.content["text"]
    alone = workbook.prepare(run, make(question_loss=False))
    vqa = {p.mixture.groups[1].name: p.mixture.groups[1] for p in (alone,)}["vqa"]
    assert sq.GIVEN in vqa.seq.kinds


def test_a_users_own_set(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(8):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(f'{{"file_name": "{i}.png", "text": "picture number {i}"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "prose.txt").write_text("One sentence. " * 80)
    config = workbook.data_config(
        "",
        "others 1",
        "0",
        "equal",
        [
            {"name": "mine", "captions": str(folder), "image": 32},
            {"name": "prose", "text": str(tmp_path / "prose.txt")},
        ],
        context_length=64,
        batch_tokens=200,
        vocabulary_size=400,
    )
    assert len(config.documents) == 2 and not config.imports
    prepared = workbook.prepare(workbook.Run(tmp_path, "smoke"), config)
    captions, prose = prepared.mixture.groups
    assert captions.name == "mine" and captions.pairs == 5 and prose.pairs == 0
    assert captions.tasks["mine/all"].held_out >= 1
    with pytest.raises(ConfigError, match="the name 'vqa' is taken"):
        workbook.data_config(
            "", "others 1", "0", "equal", [{"name": "vqa", "text": str(tmp_path / "prose.txt")}]
        )
