"""Texts as whole numbers: words by a hash, characters by their bytes, so that no vocabulary tells of tasks to come."""

import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BUCKETS = 8192
"""Words are numbered by a checksum into so many numbers; the 5,340 words of clinc150 fall into 3,955 of them."""

LONGEST = 128
"""Words of a text that are read."""

WINDOW = 128
"""Characters that a language model reads at once."""


def tokens(text: str) -> list[int]:
    """Number the words of a text, in lower case and without punctuation, from 1 to `BUCKETS`."""
    words = re.findall(r"[\w']+", text.lower())
    return [zlib.crc32(word.encode()) % BUCKETS + 1 for word in words[:LONGEST]]


def padded(texts: Sequence[str], length: int | None = None) -> Tensor:
    """Return the words of each text as int64 (texts, length), 0 after its end; the length of the longest one when None."""
    rows = [tokens(text) for text in texts]
    length = length or max(1, *map(len, rows))
    return torch.tensor([row[:length] + [0] * (length - len(row)) for row in rows])


def windows(texts: Sequence[str], domain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut texts, joined in their order within each domain, into windows of characters and those that come next.

    A character is a byte of UTF-8. What is left at the end of a domain is less than a window, and dropped.

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
