"""TOML of files that may hold secrets: what is wrong with it is told by its place, and never quoted."""

from __future__ import annotations

import re
import tomllib
from typing import Any


class NoToml(ValueError):
    """A text is no TOML; says where not."""


def parsed(data: bytes) -> dict[str, Any]:
    """What the text says.

    Raises:
        NoToml: "is no TOML, line 3, column 5", without the place where there is none to name.
    """
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        place = re.search(r"\(at (line \d+, column \d+|end of document)\)", str(error))
        raise NoToml("is no TOML" + (f", {place[1]}" if place else "")) from None
    except RecursionError:
        raise NoToml("is nested too deeply") from None
