"""Figures in columns, in whatever width there is: no digit is ever cut.

Owns how a table that is too wide is shown. Does not own the figures (`terminal_tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

_PADDING = 3  # a blank on both sides and a line
_TEXT_COLUMNS = ("bound", "remedy")


class Figures(NamedTuple):
    """A row for each thing, with its name first, and a column for each figure of it."""

    title: str
    names: Sequence[str]  # of the columns
    rows: Sequence[Sequence[str]]
    has_sum: bool = False  # the last row

    def tables(self, width: int) -> list[Table]:
        """One table if it fits; else one with rows and columns turned; else several, of some columns each.

        Args:
            width: characters of a line.
        """
        if self._width() <= width:
            return [self._table(width)]
        turned = self._turned()
        if turned._width() <= width:
            return [turned._table(width)]
        parts, part = [], [0]
        for idx in range(1, len(self.names)):
            if len(part) > 1 and self._columns([*part, idx])._width() > width:
                parts.append(part)
                part = [0]
            part.append(idx)
        return [self._columns(part)._table(width) for part in [*parts, part]]

    def _width(self) -> int:
        return _table_width(self._least_widths())

    def _least_widths(self) -> list[int]:
        """Of the columns: each cell on one line, a name on several."""
        return [max(map(len, [*name.split(), *cells])) for name, *cells in zip(self.names, *self.rows, strict=True)]

    def _turned(self) -> Figures:
        first, *others = zip(self.names, *self.rows, strict=True)
        return Figures(self.title, first, others)

    def _columns(self, chosen: Sequence[int]) -> Figures:
        rows = [[row[idx] for idx in chosen] for row in self.rows]
        return self._replace(names=[self.names[idx] for idx in chosen], rows=rows)

    def _table(self, width: int) -> Table:
        widths = list(map(max, self._least_widths(), map(len, self.names)))
        if _table_width(widths) > width:
            widths = self._least_widths()
            widths[-1] = max(1, widths[-1] - max(0, _table_width(widths) - width))  # where not even two columns fit
        table = Table(title=Text(self.title), title_justify="left")
        for idx, name in enumerate(self.names):
            is_text = idx == 0 or name in _TEXT_COLUMNS
            table.add_column(
                Text(name),
                justify="left" if is_text else "right",
                width=widths[idx],
                overflow="fold",
            )
        for row in self.rows:
            if self.has_sum and row is self.rows[-1]:
                table.add_section()
            table.add_row(*map(Text, row))
        return table


def _table_width(column_widths: Sequence[int]) -> int:
    return sum(width + _PADDING for width in column_widths) + 1
