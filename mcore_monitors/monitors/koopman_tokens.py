"""Which tokens of a step a profile looks at, and where each of them lies, on any layout.

The choice does not depend on how the run is sharded: of each sequence of the step's global batch
the same number of tokens at even distances. A rank knows by arithmetic alone which of them pass
through it, so nothing has to be agreed on and no value is read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..views import ResidualStream

#: tokens of a sequence that are worth more than further sequences
_FEW = 64


class TokenChoice:
    """The tokens of a step as a table of sequences and columns, and this rank's part of it.

    Args:
        stream: where this rank stands.
        tokens: at most this many are chosen.

    Attributes:
        sequences, columns: sizes of the table over all ranks.
        rows, own_columns: sizes of this rank's part; either may be 0.
    """

    def __init__(self, stream: ResidualStream, tokens: int) -> None:
        columns = max(tokens // stream.sequences, min(_FEW, tokens))
        self.columns = min(columns, stream.length or columns)
        self.sequences = min(stream.sequences, tokens // self.columns)
        of = stream.pieces_of
        #: (piece of the sequence, its first column, its end)
        self._spans = [
            (piece, -(-piece * self.columns // of), -(-(piece + 1) * self.columns // of))
            for piece in stream.pieces
        ]
        self._of = of
        #: of each micro-batch: (first row here, first row of the table, how many)
        self._batches: list[tuple[int, int, int]] = []
        rank, size, batch = stream.replica.rank, stream.replica.size, stream.micro_batch
        self.rows = 0
        for micro_batch in range(-(-self.sequences // (size * batch))):
            first = (micro_batch * size + rank) * batch
            count = max(0, min(batch, self.sequences - first))
            self._batches.append((self.rows, first, count))
            self.rows += count
        self.own_columns = sum(end - first for _, first, end in self._spans)

    def take(self, micro_batch: int, x: Tensor, into: Tensor) -> list[tuple[slice, slice]]:
        """Copy this rank's tokens of one micro-batch.

        Args:
            micro_batch: its number in the step, from 0.
            x: [S, B, D], the pieces of each sequence that this rank holds, one after another.
            into: [rows, own_columns, D].

        Returns:
            the (rows, columns) of ``into`` that were filled.
        """
        if micro_batch >= len(self._batches) or not self._spans:
            return []
        row, _, count = self._batches[micro_batch]
        count = min(count, x.shape[1])
        length = x.shape[0] // len(self._spans)
        filled, column = [], 0
        for number, (piece, first, end) in enumerate(self._spans):
            places = self._places(piece, first, end, length, x.device)
            part = x[number * length : (number + 1) * length, :count].index_select(0, places)
            at = slice(row, row + count), slice(column, column + places.shape[0])
            into[at].copy_(part.transpose(0, 1))
            filled.append(at)
            column += end - first
        return filled

    def _places(
        self, piece: int, first: int, end: int, length: int, device: torch.device
    ) -> Tensor:
        """Where the tokens of columns ``first`` to ``end`` stand in a piece; made on the device."""
        whole = length * self._of
        if whole < self.columns:  # a short sequence: all of it, and some columns stay empty
            return torch.arange(min(length, end - first), device=device)
        return torch.arange(first, end, device=device) * whole // self.columns - piece * length

    def spread(self, part: Tensor, table: Tensor) -> None:
        """Put this rank's part [rows, own_columns, ...] into the table of all ranks.

        Args:
            table: [sequences, columns, ...]; what other ranks hold is left as it is.
        """
        for row, first, count in self._batches:
            column = 0
            for _, start, end in self._spans:
                width = end - start
                table[first : first + count, start:end] = part[
                    row : row + count, column : column + width
                ]
                column += width
