"""What is to be scored and waits for its turn. Filled by the event loop, emptied by the worker."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from lapwing_detector.detection import Detection
from lapwing_detector.probe import Probe
from lapwing_detector.tokens import TokenIds
from lapwing_server.engine import Prompt, Response

Outcome = Detection | Exception


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt and response, and who says what of them."""

    prompt: Prompt
    response: Response
    probe: Probe
    false_positive_rate: float
    shadows: tuple[Probe, ...] = ()
    """Score unseen from the same attention."""

    role: str = "active"
    """Why `probe` scores, as the metrics call it: active, named or shadow; empty for a score that they don't count."""

    ids: TokenIds | None = None
    """Prompt and response when they are tokenised already; the two are not looked at then."""

    @property
    def characters(self) -> int:
        """Of the text that is to be tokenised."""
        return characters(self.prompt) + characters(self.response) if self.ids is None else 0

    @property
    def token_count(self) -> int:
        """Of what is tokenised already."""
        return len(self.ids.all) if self.ids else counted(self.prompt) + counted(self.response)


def characters(content: Prompt | Response) -> int:
    """How many are to be tokenised."""
    if isinstance(content, str):
        return len(content)
    return sum(len(turn["content"]) + len(turn["role"]) for turn in content if isinstance(turn, dict))


def counted(content: Prompt | Response) -> int:
    """How many tokens there are already."""
    return len(content) if isinstance(content, list) and content and isinstance(content[0], int) else 0


@dataclass(eq=False, slots=True)
class Call:
    """The items of one request, which is answered when all of them have an outcome."""

    begun: float
    deadline: float | None
    """Both by the scheduler's clock."""

    answer: asyncio.Future[list[Outcome]] | None
    """None when nobody waits."""

    client: str = ""
    """Whose it is: the name of a principal; empty for the server's own."""

    entries: deque[Entry] = field(default_factory=deque)
    """Those that still wait."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By place."""

    items: int = 0

    gone: bool = False
    """Nobody waits any more, so that nothing of it is to be computed."""

    def settle(self, place: int, outcome: Outcome) -> bool:
        """Notes what came of an item; whether it was the last one."""
        self.outcomes[place] = outcome
        return len(self.outcomes) == self.items


@dataclass(eq=False, slots=True)
class Entry:
    """One item of a call on its way."""

    call: Call
    place: int
    item: Item
    size: int
    """Tokens, estimated until it is tokenised."""

    ids: TokenIds | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def settle(self, outcome: Outcome) -> bool:
        """Notes what came of it; whether it was the last one of its call."""
        if isinstance(outcome, Detection):
            outcome = replace(outcome, seconds={**self.seconds, **outcome.seconds})
        return self.call.settle(self.place, outcome)


def call_of(
    items: Sequence[Item],
    sizes: Sequence[int],
    begun: float,
    deadline: float | None,
    answer: asyncio.Future[list[Outcome]] | None,
    client: str = "",
) -> Call:
    """A call with an entry for each item.

    Args:
        items: what is to be scored.
        sizes: of each, in tokens.
        begun: when it was asked for.
        deadline: after which nothing of it is computed.
        answer: what becomes of it; None when nobody waits.
        client: whose it is.
    """
    call = Call(begun, deadline, answer, client, items=len(items))
    call.entries.extend(Entry(call, *each) for each in zip(range(len(items)), items, sizes, strict=True))
    return call


@dataclass(eq=False, slots=True)
class Line:
    """The calls of one client, which take turns."""

    calls: OrderedDict[Call, None] = field(default_factory=OrderedDict)
    items: int = 0
    tokens: int = 0

    def first(self, turns: int) -> int:
        """Tokens of what is taken in so many turns."""
        return self.tokens if self.items <= turns else sum(entry.size for entry in islice(self.in_turn(), turns))

    def before(self, items: int) -> tuple[int, int]:
        """Tokens and number of what is taken before the last item of a new call of so many items."""
        if self.items == len(self.calls):  # of one item each, as most are
            return self.tokens, self.items
        sizes = [entry.size for call in self.calls for entry in islice(call.entries, items)]
        return sum(sizes), len(sizes)

    def in_turn(self) -> Iterator[Entry]:
        """All that waits, in the order in which it would be taken."""
        going = deque(iter(call.entries) for call in self.calls)
        while going:
            entries = going.popleft()
            if (entry := next(entries, None)) is not None:
                yield entry
                going.append(entries)


class Waiting:
    """Clients take turns, and with each turn the next of their calls, one item at a time.

    So neither a large call holds up the small ones behind it, nor many calls of one client those of another.
    """

    def __init__(self) -> None:
        self.items = 0
        self.tokens = 0
        self._lines: OrderedDict[str, Line] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, call: Call) -> None:
        """Its items wait from now on."""
        with self._lock:
            line = self._lines.setdefault(call.client, Line())
            line.calls[call] = None
            self._count(line, call.entries, 1)

    def remove(self, call: Call) -> int:
        """Those of its items that still wait do so no longer; how many they were."""
        with self._lock:
            line = self._lines.get(call.client)
            if line is None or call not in line.calls:
                return 0
            del line.calls[call]
            self._count(line, call.entries, -1)
            if not line.calls:
                del self._lines[call.client]
            return len(call.entries)

    def take(self, tokens: float = math.inf) -> Entry | None:
        """The item whose turn it is; None when none waits, or it has more tokens than these."""
        with self._lock:
            if not self._lines:
                return None
            client, line = next(iter(self._lines.items()))
            call = next(iter(line.calls))
            if call.entries[0].size > tokens:
                return None
            entry = call.entries.popleft()
            self._count(line, (entry,), -1)
            if call.entries:
                line.calls.move_to_end(call)
            else:
                del line.calls[call]
            if line.calls:
                self._lines.move_to_end(client)
            else:
                del self._lines[client]
            return entry

    def items_of(self, client: str) -> int:
        """How many items of one client wait."""
        with self._lock:
            line = self._lines.get(client)
            return line.items if line is not None else 0

    def ahead_of(self, items: int, client: str = "") -> int:
        """Tokens of what is taken before the last item of a new call of so many items of this client."""
        with self._lock:
            own = self._lines.get(client, Line())
            tokens, entries = own.before(items)
            turns = entries + items
            for name, line in self._lines.items():
                if name == client:
                    turns -= 1  # those behind it have had one turn less when its last one comes
                else:
                    tokens += line.first(turns)
            return tokens

    def _count(self, line: Line, entries: Sequence[Entry] | deque[Entry], sign: int) -> None:
        for total in (self, line):
            total.items += sign * len(entries)
            total.tokens += sign * sum(entry.size for entry in entries)
