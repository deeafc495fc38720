"""Several responses written at the same time, by a program that awaits; they share one deadline.

    lapwing serve --port 50051
    python client/examples/async_generation.py localhost:50051

In a notebook, whose cells may await:

    async with AsyncClient("localhost:50051") as client:
        print(await answer(client, "Lyon"))
"""

from __future__ import annotations

import asyncio
import sys

from lapwing_client import AsyncClient, Deadline, Detection, Generation, LapwingError

TARGET = sys.argv[1] if sys.argv[1:] else "localhost:50051"
CITIES = ("Lyon", "Bergen", "Kyoto", "Cusco")


async def answer(client: AsyncClient, city: str, deadline: Deadline | None = None) -> str:
    """What the server's model says of one city, in a line."""
    prompt = f"Question: which country is the city of {city} in? Answer:"  # as the embedded model was taught
    try:
        async with client.generate(prompt, max_new_tokens=24, timeout=deadline) as stream:
            async for event in stream:
                if isinstance(event, Generation):
                    return f"{city}: {event.text.strip()!r} {verdict(event.detection)}"
    except LapwingError as error:
        return f"{city}: {error} ({error.who_acts})"
    return f"{city}: the stream ended before its last event"


def verdict(detection: Detection) -> str:
    """What is known of a response. Without a score nothing is."""
    if detection.probability is None:
        return f"could not be scored ({detection.reason})"
    return f"is made up with probability {detection.probability:.0%}"


async def main() -> None:
    """Prints a line for each city."""
    deadline = Deadline(60.0)
    async with AsyncClient(TARGET) as client:
        await client.wait_until_ready(deadline)
        for line in await asyncio.gather(*(answer(client, city, deadline) for city in CITIES)):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
