"""What every result can do: become JSON, and show itself in a line. Knows no server."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

SHORTENED = reprlib.Repr()
SHORTENED.maxtuple = SHORTENED.maxdict = 4
SHORTENED.maxstring = SHORTENED.maxother = SHORTENED.maxlong = 120
"""How much of a value is shown where a result shows itself: a prompt may have thousands of tokens."""

EMPTY: tuple[Any, ...] = (None, "", b"", (), {})
"""What a result leaves out where it shows itself."""


class Result:
    """A value that can be written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; NaN, which JSON does not have, is None, and of bytes only their number is told."""
        return {name: plain(value) for name, value in named(self)}

    def __repr__(self) -> str:
        shown = (f"{name}={short(value)}" for name, value in named(self) if value not in EMPTY)
        return f"{type(self).__name__}({', '.join(shown)})"


def named(result: Result) -> list[tuple[str, Any]]:
    """Name and value of each field."""
    assert is_dataclass(result)
    return [(field.name, getattr(result, field.name)) for field in fields(result)]


def plain(value: Any) -> Any:
    """A value as JSON values."""
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def short(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>" if value else "b''"
    if isinstance(value, tuple) and len(value) > SHORTENED.maxtuple:
        return f"<{len(value)} items>"
    return repr(value) if isinstance(value, Result) else SHORTENED.repr(value)


@dataclass(frozen=True, repr=False)
class Matrix(Result):
    """Numbers in rows and columns, without needing numpy."""

    shape: tuple[int, int]
    values: tuple[float, ...]
    """Row by row."""

    def __getitem__(self, place: tuple[int, int]) -> float:
        row, column = place
        if not (0 <= row < self.shape[0] and 0 <= column < self.shape[1]):
            raise IndexError(f"[{row}, {column}] is outside of {self.shape}")
        return self.values[row * self.shape[1] + column]

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """The same as one tuple for each row."""
        width = self.shape[1]
        return tuple(self.values[i * width : (i + 1) * width] for i in range(self.shape[0]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"shape": list(self.shape), "rows": plain(self.rows)}
