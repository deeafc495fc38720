"""What a registry says is in force, as a value: how it reads, and what every change makes of it. Touches no file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lapwing_detector.errors import InvalidInput, RegistryError, UnknownProbe
from lapwing_detector.identity import sha256
from lapwing_detector.probe import NAME

SCHEMA = 1
REVISION = re.compile(r"[0-9a-f]{12}")
DIGEST = re.compile(r"[0-9a-f]{64}")

MOST_HISTORY = 100
"""Earlier revisions of a name that are remembered."""

MOST_SHADOWS = 8
"""Every one is scored with each request."""

Reference = tuple[str, str]
"""Name and revision."""


@dataclass(frozen=True)
class Current:
    """The probes of a registry, and which of them score."""

    active: str = ""
    """Name of the probe that scores; empty until the first one is published."""

    previous: str = ""
    """Name of the probe that scored before another name was activated; empty after a rollback."""

    revisions: Mapping[str, str] = field(default_factory=dict)
    """The revision that each name stands for."""

    history: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The revisions that it stood for before, oldest first."""

    shadows: tuple[str, ...] = ()
    """Probes that score beside the active one: `NAME`, or `NAME@REVISION` for a revision of their own."""

    published: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Of each name the revisions, oldest first, with the SHA-256 of their manifests."""

    def resolve(self, name: str, revision: str | None = None) -> Reference:
        """A published revision: the one that is given, else the one that the name stands for.

        Raises:
            UnknownProbe: there is no such name, or it has no such revision.
        """
        known = self.published.get(name)
        if known is None:
            raise UnknownProbe("name", f"no probe is called {name[:63]!r}", sorted(self.published))
        if revision and revision not in known:
            raise UnknownProbe("revision", f"{name} has no revision {revision[:63]!r}", self.newest_first(name))
        return name, revision or self.revisions[name]

    def newest_first(self, name: str) -> tuple[str, ...]:
        """The published revisions of a name."""
        return tuple(self.published.get(name, ()))[::-1]

    @property
    def shadow_references(self) -> tuple[Reference, ...]:
        """Name and revision of every shadow."""
        return tuple(dict.fromkeys(self.resolve(*reference(shadow)) for shadow in self.shadows))

    def with_published(self, name: str, revision: str, digest: str, *, activate: bool = False) -> Current:
        """After a revision was published, with the SHA-256 of its manifest.

        Its name stands for it from now on, unless it is the name of the active probe, which only activating changes.
        The first probe of a registry becomes the active one. What was published before stays as it is.
        """
        known = self.published.get(name, {})
        grown = replace(self, published={**self.published, name: {**known, revision: digest}})
        if activate or not self.active:
            return grown.with_active(name, revision)
        return grown if revision in known or name == self.active else grown._standing_for(name, revision)

    def with_active(self, name: str, revision: str | None = None) -> Current:
        """After a probe was made the one that scores; without a revision the one that its name stands for.

        Raises:
            UnknownProbe: it was not published.
        """
        name, revision = self.resolve(name, revision)
        if (name, revision) == (self.active, self.revisions.get(name)):
            return self
        previous = self.active if name != self.active else ""
        return replace(self._standing_for(name, revision), active=name, previous=previous)._without_idle_shadows()

    def rolled_back(self, name: str | None = None) -> Current:
        """After the last change was undone.

        Args:
            name: goes back to the revision that this name stood for before; without it, what scored before scores
                again, be it of another name or an earlier revision of the active one.

        Raises:
            RegistryError: there is nothing to go back to.
        """
        if name is None and self.previous:
            return replace(self, active=self.previous, previous="")._without_idle_shadows()
        if not self.active:
            raise RegistryError("nothing was published yet, so there is nothing to go back to")
        name, _ = self.resolve(name or self.active)
        older = self.history.get(name, ())
        if not older:
            raise self._first(name)
        back = replace(self, revisions={**self.revisions, name: older[-1]}, history={**self.history, name: older[:-1]})
        return back._without_idle_shadows()

    def with_shadow(self, name: str, revision: str | None = None, *, on: bool = True) -> Current:
        """After a probe began or ceased to score beside the active one.

        Raises:
            UnknownProbe: it was not published, or was no shadow when it should cease.
            RegistryError: it is the active one, or there are too many.
        """
        shadow = f"{name}@{revision}" if revision else name
        others = tuple(one for one in self.shadows if one != shadow)
        if not on:
            if shadow not in self.shadows:
                raise UnknownProbe("name", f"{shadow!r} is no shadow", self.shadows)
            return replace(self, shadows=others)
        if self.resolve(name, revision) == self.resolve(self.active):
            raise RegistryError(f"{shadow} is the active probe, which scores anyway; name another one or a revision")
        if len(others) >= MOST_SHADOWS:
            raise RegistryError(f"there are {len(others)} shadows, the most; end one: lapwing probes shadow NAME --off")
        return replace(self, shadows=(*others, shadow))

    def to_bytes(self) -> bytes:
        """As it is written; the digest makes a flipped bit show."""
        content = {
            "schema": SCHEMA,
            "active": self.active,
            "previous": self.previous,
            "revisions": dict(self.revisions),
            "history": {name: list(older) for name, older in self.history.items()},
            "shadows": list(self.shadows),
            "published": {name: [*map(list, known.items())] for name, known in self.published.items()},
        }
        return (json.dumps(content | {"sha256": digest_of(content)}, indent=1) + "\n").encode()

    def _first(self, name: str) -> RegistryError:
        others = [one for one in self.newest_first(name) if one != self.revisions[name]]
        mend = f"activate another: lapwing probes activate {name}@{others[0]}" if others else "it has no other"
        return RegistryError(f"{name} stands for the first revision it had, {self.revisions[name]}; {mend}")

    def _standing_for(self, name: str, revision: str) -> Current:
        before = self.revisions.get(name)
        if before == revision:
            return self
        history = self.history
        if before is not None:
            history = {**history, name: (*history.get(name, ()), before)[-MOST_HISTORY:]}
        return replace(self, revisions={**self.revisions, name: revision}, history=history)

    def _without_idle_shadows(self) -> Current:
        """Without those that the active probe has become."""
        active = self.resolve(self.active)
        return replace(self, shadows=tuple(one for one in self.shadows if self.resolve(*reference(one)) != active))


def reference(text: str) -> tuple[str, str | None]:
    """The parts of `NAME` or `NAME@REVISION`.

    Raises:
        InvalidInput: it is neither.
    """
    name, at, revision = text.partition("@")
    if not NAME.fullmatch(name) or (at and not REVISION.fullmatch(revision)):
        raise InvalidInput(
            "probe",
            f"{text[:80]!r} is neither NAME nor NAME@REVISION; a name has 1 to 63 of a-z, 0-9 and -, the first one no "
            "hyphen, a revision 12 of 0-9 and a-f",
        )
    return name, revision if at else None


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, however they are spaced."""
    return sha256(json.dumps(content, sort_keys=True).encode())


def current_of(data: bytes) -> Current:
    """What was written by `Current.to_bytes`.

    Raises:
        ValueError: it is something else, or was changed; RegistryError when a newer version wrote it.
    """
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if content.get("schema") != SCHEMA:
        raise RegistryError(f"it has schema {str(content.get('schema'))[:20]}, known is {SCHEMA}; update lapwing")
    digest = content.pop("sha256", None)
    if digest != digest_of(content):
        raise ValueError("its sha256 differs")
    try:
        current = Current(
            active=content["active"],
            previous=content["previous"],
            revisions=dict(content["revisions"]),
            history={name: tuple(older) for name, older in content["history"].items()},
            shadows=tuple(content["shadows"]),
            published={name: dict(known) for name, known in content["published"].items()},
        )
        require_consistent(current)
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"it lacks a part or holds one of another kind: {type(error).__name__}") from error
    return current


def require_consistent(current: Current) -> None:
    """Names are names, so that paths can be made of them, and nothing is in force that was not published.

    Raises:
        ValueError: they are not.
    """
    for name, known in current.published.items():
        if not NAME.fullmatch(name) or not known:
            raise ValueError(f"{name[:80]!r} is no name of a probe with revisions")
        for revision, digest in known.items():
            if not (REVISION.fullmatch(revision) and DIGEST.fullmatch(digest)):
                raise ValueError(f"{name} has a revision {revision[:80]!r}, which is none")
    if current.revisions.keys() != current.published.keys():
        raise ValueError("a name stands for no revision")
    if current.active not in current.published and (current.active or current.published):
        raise ValueError("the active probe was not published")
    if current.previous and current.previous not in current.published:
        raise ValueError("the previous probe was not published")
    named = [(name, (revision,)) for name, revision in current.revisions.items()]
    for name, revisions in (*named, *current.history.items()):
        if not set(revisions) <= current.published.get(name, {}).keys():
            raise ValueError(f"{name[:80]!r} stands or stood for a revision that was not published")
    try:
        tuple(current.shadow_references)
    except (InvalidInput, UnknownProbe) as error:
        raise ValueError("a shadow was not published") from error
