"""Answers that are being written: whole batches in a file beside the one that is to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapwing_training.data.generations import LabelledGeneration, parse_line, to_line
from lapwing_training.errors import InvalidData
from lapwing_training.files import digest, unwritten


@dataclass(frozen=True)
class Partial:
    """A file that only the same questions, options and model go on with."""

    path: Path

    @classmethod
    def beside(cls, target: Path, asked: Any) -> Partial:
        """Of a target; `asked` is everything that decides what is written, as JSON values."""
        known = digest(json.dumps(asked, ensure_ascii=False).encode())[:12]
        return cls(target.with_name(f"{target.name}.{known}.partial"))

    def answers(self, ids: Sequence[str]) -> list[LabelledGeneration]:
        """The answers that are there, of the first of these ids; what a crash left damaged ends them."""
        found: list[LabelledGeneration] = []
        for id, line in zip(ids, self._lines(), strict=False):
            answer = _answer_in(line)
            if answer is None or answer.id != id:
                break
            found.append(answer)
        return found

    def keep(self, answers: int) -> None:
        """Cut the file back to its first answers, of which there are so many."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = sum(len(line) + 1 for line in self._lines()[:answers])
        with self.path.open("ab") as file:
            file.truncate(kept)

    def append(self, answers: Sequence[LabelledGeneration]) -> None:
        """Add a batch.

        Raises:
            OSError: there is no room; names the file.
        """
        try:
            with self.path.open("ab") as file:
                file.write("".join(to_line(one) for one in answers).encode())
        except OSError as error:
            raise unwritten(error, self.path) from error

    def _lines(self) -> list[bytes]:
        """Without what follows the last line end: it was being written."""
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []


def _answer_in(line: bytes) -> LabelledGeneration | None:
    try:
        return parse_line(line.decode(), LabelledGeneration)
    except (InvalidData, UnicodeDecodeError):
        return None
