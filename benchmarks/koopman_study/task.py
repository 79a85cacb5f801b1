"""Associative recall: which value followed this key?

A sequence of 64 tokens over a vocabulary of 256 holds four (key, value) pairs at random places
among filler tokens; the last token repeats one of the keys and the answer is its value. Keys,
values and filler come from disjoint quarters (the filler from the other half) of the vocabulary.
After arXiv 2602.22988, which gives the sizes; how pairs are placed is our reading.
"""

from __future__ import annotations

import torch

LENGTH = 64
VOCABULARY = 256
PAIRS = 4


def batch(
    size: int, generator: torch.Generator, length: int = LENGTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw sequences.

    Returns:
        (tokens [size, length], answers [size]), int64.
    """
    quarter = VOCABULARY // 4
    tokens = torch.randint(2 * quarter, VOCABULARY, (size, length), generator=generator)
    keys = torch.rand(size, quarter, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.randint(quarter, 2 * quarter, (size, PAIRS), generator=generator)
    # Pairs sit on even places, so that no two overlap.
    places = 2 * torch.rand(size, (length - 1) // 2, generator=generator).argsort(-1)[:, :PAIRS]
    tokens.scatter_(1, places, keys)
    tokens.scatter_(1, places + 1, values)
    asked = torch.randint(0, PAIRS, (size, 1), generator=generator)
    tokens[:, -1:] = keys.gather(1, asked)
    return tokens, values.gather(1, asked).squeeze(1)
