"""What a setting is called where it is given: limits.batch_items, LAPWING_LIMITS__BATCH_ITEMS, --limits-batch-items."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

PREFIX: Final = "LAPWING_"


def settable(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting by dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= settable(info.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = info
    return found


def variable(name: str) -> str:
    """The variable of a setting: limits.batch_items -> LAPWING_LIMITS__BATCH_ITEMS."""
    return PREFIX + name.replace(".", "__").upper()


def flag(name: str) -> str:
    """The flag of a setting: limits.batch_items -> --limits-batch-items."""
    return "--" + name.replace(".", "-").replace("_", "-")


def suggestion(name: str, known: set[str]) -> str:
    """The known name that looks most like it."""
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else "; lapwing serve --help names them all"
