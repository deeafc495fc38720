"""Keeps what a judge answered as JSON Lines, a whole line as soon as it is known. Knows no endpoint and no verdicts.

An answer is found again by the digest of model, prompt, parameters and address, so that nothing is ever paid for twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from threading import Lock
from typing import Any

from lapwing_training.errors import InvalidOption
from lapwing_training.files import digest
from lapwing_training.labels.judge import Answer
from lapwing_training.labels.judge_endpoint import require_answer

OPENING = '{"key": "'
"""Every line of ours starts so; in no other file is anything written."""


def answer_key(model: str, prompt: str, parameters: Mapping[str, Any], address: str) -> str:
    """SHA-256 of all that an answer depends on; behind another address the same name may be another model."""
    return digest(json.dumps([model, prompt, parameters, address], sort_keys=True).encode())


class JudgeCache:
    """Answers by key; what is added is in the file before the call returns."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a line that a kill or a full disk left unfinished is passed over and asked for again.

        Raises:
            InvalidOption: the file is something else.
        """
        self.path = path
        self._lock = Lock()
        self._answers: dict[str, Answer] = {}
        data = path.read_bytes() if path.exists() else b""
        # What is added must not be glued to a line that was cut off.
        self._gap = b"\n" if data and not data.endswith(b"\n") else b""
        for number, line in enumerate(data.decode(errors="replace").split("\n"), 1):
            if not (line.startswith(OPENING) or OPENING.startswith(line)):
                raise InvalidOption(f"{path}, line {number}: no answer of a judge; give another file with --cache")
            self._read(line)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def add(self, key: str, model: str, answer: Answer) -> None:
        """Keep one answer; several threads may."""
        line = json.dumps({"key": key, "model": model, **asdict(answer)}).encode() + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            gap, self._gap = self._gap, b"\n"  # after a write that fails half way
            with self.path.open("ab") as file:
                file.write(gap + line)
            self._gap = b""
            self._answers[key] = answer

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
            answer = require_answer(Answer(**{entry.name: record[entry.name] for entry in fields(Answer)}))
            # The first stays: a second is there only if two runs asked at once.
            self._answers.setdefault(record["key"], answer)
        except (ValueError, KeyError):
            return
