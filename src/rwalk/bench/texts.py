"""Texts as whole numbers: words by a hash, characters by their bytes, so that no vocabulary anticipates later tasks.

Runs of one to three characters are numbered too in scripts without spaces between words, such as Chinese, Japanese or Thai, and
in anything too long for a word.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

BUCKETS = 8192
"""How many numbers a checksum distributes words among; the 5,340 words of clinc150 get 3,955 of them."""

LONGEST = 128
"""Words of a text that are read, or characters of writing without spaces."""

WINDOW = 128
"""Characters that a language model reads at once."""

WORD = 45
"""Letters of the longest word in English dictionaries; anything longer is taken as writing without spaces."""

RUN = 3
"""Characters that are numbered together."""

UNSPACED = re.compile(
    "(["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"  # Khmer, and scripts of the Dai
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c"  # signs among Chinese characters
    "\u3040-\u31ff\uff66-\uff9f"  # kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff"  # Chinese characters, Yi
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"  # rare kana and Chinese characters
    "]+)"
)
"""Scripts that are written without spaces between words; Korean has spaces and is not among them."""


def tokens(text: str) -> list[int]:
    """Number the words of a text, in lower case and without punctuation, from 1 to `BUCKETS`."""
    found: list[int] = []
    left = LONGEST
    for word, spaced in _words(text):
        if left > 0:
            found += [zlib.crc32(part.encode()) % BUCKETS + 1 for part in ([word] if spaced else _runs(word[:left]))]
            left -= 1 if spaced else len(word)
    return found


def _words(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the words of a text, and whether each is written with spaces around it."""
    for word in _word().findall(text.lower()):
        for part in [word] if word.isascii() else filter(None, UNSPACED.split(word)):
            yield part, len(part) <= WORD and not UNSPACED.match(part)


@cache
def _word() -> re.Pattern[str]:
    """Return the pattern of a word: letters, digits, and marks above, below or around them in other scripts."""
    signs = [chr(c) for c in (*range(0x370, 0xFE00), *range(0xFE10, 0x1F000)) if unicodedata.category(chr(c)) in ("Mn", "Mc")]
    return re.compile(rf"[\w'{''.join(signs)}]+")


def _runs(word: str) -> list[str]:
    """Return the word itself, if it is longer than a run, and the runs that begin at each of its characters."""
    whole = [word] if len(word) > RUN else []
    return whole + [word[i : i + n] for i in range(len(word)) for n in range(1, min(RUN, len(word) - i) + 1)]


def padded(texts: Sequence[str], length: int | None = None) -> Tensor:
    """Return the words of each text as int64 (texts, length), 0 after its end; None is the length of the longest text."""
    rows = [tokens(text) for text in texts]
    length = length or max(1, *map(len, rows))
    return torch.tensor([row[:length] + [0] * (length - len(row)) for row in rows])


def windows(texts: Sequence[str], domain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut texts, joined in their order within each domain, into windows of characters, each with the next character.

    A character is a byte of UTF-8. The rest at the end of a domain, less than a window, is dropped.

    Args:
        texts: one text for each row.
        domain: each row's domain, counted from 0.

    Returns:
        Characters and their successors, both int64 (windows, `WINDOW`), and each window's domain.
    """
    parts = [_cut("".join(texts[row] for row in (domain == d).nonzero().flatten().tolist())) for d in domain.unique()]
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    return x, y, torch.cat([torch.full((len(part),), d) for d, (part, _) in zip(domain.unique().tolist(), parts, strict=True)])


def _cut(text: str) -> tuple[Tensor, Tensor]:
    """Cut a text into windows, and shift them by one character."""
    every = torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64))
    end = max(len(every) - 1, 0) // WINDOW * WINDOW
    return every[:end].view(-1, WINDOW), every[1 : end + 1].view(-1, WINDOW)
