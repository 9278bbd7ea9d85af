"""Values to ids and back (paper 2.1, App. B).

    id range            holds
    [0, 32000)          SentencePiece text
    [0, 1024)           discrete values, sharing rows with text by the letter of the paper ...
    [33025, 34049)      ... or here, where `discrete_range="own"`
    [32000, 33024)      continuous values, 1,024 uniform bins on [-1, 1]
    33024               the separator '|' between observation and action

The paper gives no id for the separator and says that discrete values use [0, 1024). Its parameter
totals would allow them a range of their own as well (notebook 03; README, Deviations).
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from gato_lib.files import write_bytes

TEXT_IDS = 32_000
NUM_BINS = 1_024
CONTINUOUS_START = TEXT_IDS
SEPARATOR = CONTINUOUS_START + NUM_BINS  # 33024
VOCABULARY = SEPARATOR + 1  # 33025
DISCRETE_OWN_START = VOCABULARY
MU, M = 100.0, 256.0  # App. B

VENDORED_MODEL = pathlib.Path(__file__).parent / "assets" / "tokenizer.model.v1"


def mu_law_encode(values: np.ndarray) -> np.ndarray:
    """F(x) = sgn(x) log(|x| mu + 1) / log(M mu + 1): [-256, 256] to [-1, 1] (App. B).

    Any shape, float64 out. Values beyond 256 leave [-1, 1]; `encode_continuous` clips them.
    """
    x = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):  # near the largest float the product is infinite
        return np.sign(x) * np.log1p(np.abs(x) * MU) / np.log1p(M * MU)


def mu_law_decode(values: np.ndarray) -> np.ndarray:
    """The inverse of `mu_law_encode`."""
    y = np.asarray(values, np.float64)
    return np.sign(y) * ((1.0 + M * MU) ** np.abs(y) - 1.0) / MU


def encode_continuous(values: np.ndarray, *, companded: bool) -> np.ndarray:
    """Floats of any shape to ids in [32000, 33024), same shape, int32.

    Observations are companded with the mu-law; actions, already in [-1, 1], are not. Values
    outside (and infinities) saturate to the end bins. Raises ValueError on NaN and TypeError
    where `values` are not real numbers.
    """
    x = np.asarray(values)
    if not (np.issubdtype(x.dtype, np.floating) or np.issubdtype(x.dtype, np.integer)):
        raise TypeError(f"continuous values must be real numbers, got dtype {x.dtype}")
    x = x.astype(np.float64)
    if np.isnan(x).any():
        where = np.argwhere(np.isnan(np.atleast_1d(x)))[0].tolist()
        raise ValueError(f"NaN at index {where} of a continuous array of shape {x.shape}")
    if companded:
        x = mu_law_encode(x)
    x = np.clip(x, -1.0, 1.0)
    # floor((x + 1) / 2 * 1024), in a form exact for every float: x + 1 would round.
    bins = np.floor(x * (NUM_BINS // 2)) + NUM_BINS // 2
    # x = 1 belongs to the last bin, not to a bin 1024 in the neighbouring range.
    return np.clip(bins, 0, NUM_BINS - 1).astype(np.int32) + CONTINUOUS_START


def decode_continuous(ids: np.ndarray, *, companded: bool) -> np.ndarray:
    """Ids to bin centres, float64, same shape. Raises ValueError outside [32000, 33024)."""
    ids = np.asarray(ids)
    _check_range(ids, CONTINUOUS_START, SEPARATOR, "continuous")
    centres = bin_centres()[ids - CONTINUOUS_START]
    return mu_law_decode(centres) if companded else centres


def bin_centres() -> np.ndarray:
    """The 1,024 bin centres on [-1, 1], float64."""
    return (np.arange(NUM_BINS) + 0.5) * (2.0 / NUM_BINS) - 1.0


def discrete_start(discrete_range: str) -> int:
    """First id of discrete values: 0 for "shared", 33025 for "own"."""
    if discrete_range not in ("shared", "own"):
        raise ValueError(f"discrete_range is {discrete_range!r}, expected 'shared' or 'own'")
    return 0 if discrete_range == "shared" else DISCRETE_OWN_START


def encode_discrete(values: np.ndarray, *, discrete_range: str = "shared") -> np.ndarray:
    """Integers in [0, 1024) to ids, same shape, int32. Raises on others."""
    x = np.asarray(values)
    if not (np.issubdtype(x.dtype, np.integer) or x.dtype == bool):
        raise TypeError(f"discrete values must be integers, got dtype {x.dtype}")
    x = x.astype(np.int64)
    _check_range(x, 0, NUM_BINS, "discrete value")
    return (x + discrete_start(discrete_range)).astype(np.int32)


def decode_discrete(ids: np.ndarray, *, discrete_range: str = "shared") -> np.ndarray:
    """The inverse of `encode_discrete`, int64. Raises ValueError outside the range."""
    start = discrete_start(discrete_range)
    ids = np.asarray(ids)
    _check_range(ids, start, start + NUM_BINS, "discrete")
    return ids.astype(np.int64) - start


def _check_range(ids: np.ndarray, low: int, high: int, what: str) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{what} ids must be integers, got dtype {ids.dtype}")
    if ids.size and (ids.min() < low or ids.max() >= high):
        bad = ids[(ids < low) | (ids >= high)].ravel()[0]
        raise ValueError(f"{what} {bad} outside [{low}, {high})")


class TextTokenizer:
    """SentencePiece behind two methods. Ids are below `size`, which is at most 32,000.

    Attributes:
      end: id of the end of a text.
      legal: bool (size,), the ids that a text may be written with, `end` among them.
    """

    def __init__(self, model: str | os.PathLike = VENDORED_MODEL):
        self.path = pathlib.Path(model)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no SentencePiece model there")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except Exception as error:
            raise ValueError(f"{self.path}: not a SentencePiece model ({error})") from error
        self.size = self._processor.get_piece_size()
        if self.size > TEXT_IDS:
            raise ValueError(f"{self.path}: {self.size} pieces, at most {TEXT_IDS} fit the ids")
        self.end = self._processor.eos_id()
        if self.end < 0:
            raise ValueError(f"{self.path}: the model has no piece for the end of a text")
        model = self._processor
        self.legal = np.array(
            [
                i == self.end or not (model.is_control(i) or model.is_unknown(i))
                for i in range(self.size)
            ]
        )

    def encode(self, text: str) -> list[int]:
        """Ids without `end`; `decode` brings back the same text, byte for byte.

        SentencePiece writes a space as U+2581. A text that itself has that character is spelled
        in bytes.
        """
        if "\u2581" in text:
            return [self._processor.piece_to_id(f"<0x{b:02X}>") for b in text.encode()]
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token_id: int) -> str:
        """The piece as written in the model, e.g. '▁ball'."""
        return self._processor.id_to_piece(int(token_id))


def train_text_tokenizer(
    texts: Iterable[str], path: str | os.PathLike, vocabulary_size: int
) -> TextTokenizer:
    """Train a lossless SentencePiece BPE (identity normalisation, byte fallback) and write it.

    The model may hold fewer pieces than asked for where the text has no more. The file appears
    whole or not at all. Raises ValueError where there is no text, or where `vocabulary_size` is not
    300 (256 bytes and some text) to 32,000.
    """
    if not 300 <= vocabulary_size <= TEXT_IDS:
        raise ValueError(f"vocabulary_size is {vocabulary_size}, expected 300 to {TEXT_IDS}")
    texts = sorted({t for t in texts if t})
    if not texts:
        raise ValueError("no text to train a tokenizer on")
    model = io.BytesIO()  # not a model prefix: the file would hold the path and differ by folder
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocabulary_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        max_sentence_length=1 << 30,  # longer texts would be left out without a word
        num_threads=1,
        minloglevel=2,
    )
    write_bytes(path, model.getvalue())
    return TextTokenizer(path)
