"""Prompts to token ids: Wan2.1's cleaning, a `tokenizer.json`, one width; closed vocabularies refuse what they lack."""

import difflib
import html
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from packforcing_jax.errors import InputError, require

PAD = "<pad>"
END = "</s>"
UNKNOWN = "<unk>"

log = logging.getLogger(__name__)


def clean(text: str) -> str:
    """`text` with broken encoding and HTML entities mended and single spaces; case is kept (Wan2.1 'whitespace')."""
    mended = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", mended).strip()


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the `tokenizers` library and the number of ids every prompt is padded or cut to."""

    inner: tokenizers.Tokenizer
    max_words: int
    source: str = "tokenizer"

    def __post_init__(self):
        require(
            self.max_words > 1,
            f"max_words={self.max_words} leaves no room for a word and an end; give 2 or more.",
        )
        for name in (PAD, END):
            known = self.inner.token_to_id(name) is not None
            require(
                known,
                f"{self.source} has no token {name!r}; use the tokenizer.json of the text encoder.",
            )

    @classmethod
    def from_file(cls, path: str | Path, max_words: int) -> "Tokenizer":
        """The tokenizer saved in `path`, a `tokenizer.json`."""
        require(
            Path(path).is_file(),
            f"tokenizer file {path} does not exist; give the path of a tokenizer.json.",
        )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare exceptions
            raise InputError(
                f"{path} is not a tokenizer.json ({error}); give the text encoder's."
            ) from error
        inner.no_truncation()  # the file may ask for both; width is decided here
        inner.no_padding()
        return cls(inner, max_words, str(path))

    @property
    def closed(self) -> bool:
        """Whether the vocabulary is a list of whole words, outside which nothing has a meaning."""
        return isinstance(self.inner.model, models.WordLevel)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of each text, int32 [b, max_words]: the words, one end token, padding; mask 1 up to the end."""
        require(not isinstance(texts, str), f"prompts={texts!r} is one text; give a list of texts.")
        rows = [self._words(text, index, len(texts)) for index, text in enumerate(texts)]
        cut = [max(0, len(row) + 1 - self.max_words) for row in rows]
        if any(cut):
            log.warning(
                "%d of %d prompts exceed %d tokens; cut %d tokens off their ends.",
                np.count_nonzero(cut),
                len(rows),
                self.max_words,
                sum(cut),
            )
        ids = np.full((len(rows), self.max_words), self.inner.token_to_id(PAD), np.int32)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            row_ids = [*row[: self.max_words - 1], self.inner.token_to_id(END)]
            ids[index, : len(row_ids)] = row_ids
            mask[index, : len(row_ids)] = 1
        return ids, mask

    def _words(self, text: str, index: int, total: int) -> list[int]:
        """The ids of one prompt without an end token, however many."""
        cleaned = clean(text)
        require(
            cleaned != "",
            f"prompt {index + 1} of {total} is empty; say what the video should show.",
        )
        if self.closed:
            refuse_unknown(self, cleaned)
        ids = self.inner.encode(cleaned, add_special_tokens=False).ids
        require(
            len(ids) > 0,
            f"prompt {index + 1} of {total} ({cleaned!r}) has no words; describe the video.",
        )
        return ids


def word_tokenizer(words: Sequence[str]) -> tokenizers.Tokenizer:
    """A tokenizer that knows `words` and nothing else, in any case and without punctuation.

    Ids 0, 1, 2 are padding, end and unknown.
    """
    vocabulary = {word: index for index, word in enumerate((PAD, END, UNKNOWN, *words))}
    require(
        len(vocabulary) == len(words) + 3,
        "the vocabulary repeats a word or a special token; list each word once.",
    )
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")]
    )
    inner.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    for word in words:
        whole = inner.encode(word, add_special_tokens=False).ids == [vocabulary[word]]
        require(
            whole,
            f"word {word!r} cannot be a vocabulary entry; give one lower-case word of letters and digits.",
        )
    return inner


def _unknown(inner: tokenizers.Tokenizer, text: str) -> Iterator[str]:
    """Each word of `text` outside the vocabulary, once, as it was written."""
    encoded = inner.encode(text, add_special_tokens=False)
    spans = [
        span
        for index, span in zip(encoded.ids, encoded.offsets)
        if index == inner.token_to_id(UNKNOWN)
    ]
    yield from dict.fromkeys(text[start:end] for start, end in spans)


def _nearest(word: str, known: Sequence[str]) -> str:
    """Known words spelt like `word`, best first; if none is, the three that come closest."""
    near = difflib.get_close_matches(word.lower(), known)
    return ", ".join(near or difflib.get_close_matches(word.lower(), known, cutoff=0.0))


def refuse_unknown(tokenizer: Tokenizer, text: str) -> None:
    """Raises `InputError` naming every word of `text` outside a closed vocabulary and the nearest known ones."""
    known = sorted(set(tokenizer.inner.get_vocab()) - {PAD, END, UNKNOWN})
    sentences = [
        f"word {word!r} in prompt is not in this model's vocabulary; nearest: {_nearest(word, known)}"
        for word in _unknown(tokenizer.inner, clean(text))
    ]
    known_words = (
        f"its {len(known)} words are in tokenizer.json, the Stage world's also in docs/sampling.md"
    )
    require(not sentences, f"{'; '.join(sentences)}; {known_words}.")
