"""Probe directories that are made in no time, and what tests do to registries of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from lapwing_detector import probe_files
from lapwing_detector.identity import sha256
from lapwing_detector.probe import Probe
from tests.detector.probes import random_probe


def a_revision(number: int, name: str = "alpha") -> Probe:
    """Revisions of one name that differ in their bias, which is the number."""
    return replace(random_probe(name=name), bias=float(number))


def write_probe(directory: Path, probe: Probe) -> Path:
    """Saves a probe without drawing its pictures, which takes seconds."""
    with mock.patch.object(probe_files, "card_pictures", return_value={}):
        return probe.save_pretrained(directory, files={"predictions.jsonl": b'{"id": "a"}\n'})


def sources(root: Path, count: int, name: str = "alpha") -> list[Path]:
    """Directories of the revisions 0, 1, ... of a name."""
    return [write_probe(root / f"{name}-{number}", a_revision(number, name)) for number in range(count)]


def resign(directory: Path, **changes: object) -> None:
    """Makes the manifest vouch for the files as they are, as a careful forger would."""
    path = directory / probe_files.MANIFEST
    manifest = json.loads(path.read_text()) | changes
    manifest["files"] = {name: sha256((directory / name).read_bytes()) for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def fill(data: bytearray, draw: random.Random) -> None:
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.randint(1, 64))
    data[begin:end] = bytes(end - begin)


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, truncate, fill)


def damage(path: Path, how: Callable[[bytearray, random.Random], None], draw: random.Random) -> bytes:
    """Changes a file, really; returns what it was."""
    whole = path.read_bytes()
    data = bytearray(whole)
    while data == whole:  # zeros over zeros are no damage
        how(data, draw)
    path.write_bytes(data)
    return whole
