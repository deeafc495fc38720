"""Which of many answers to look at first: scored several at once, the most doubtful ones printed.

lapwing serve --port 50051
python client/examples/many_answers.py localhost:50051
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from lapwing_client import Client, Detection

TARGET = sys.argv[1] if sys.argv[1:] else "localhost:50051"
CITIES = ("Lyon", "Bergen", "Kyoto", "Cusco", "Tartu", "Aswan")
COUNTRIES = ("France", "Norway", "Japan", "Peru")


def answers() -> Iterator[tuple[str, str]]:
    """Prompts and responses, read as they are needed: they may come from a file that fits into no memory."""
    for city in CITIES:
        for country in COUNTRIES:
            yield f"Question: which country is the city of {city} in? Answer:", country


def main() -> None:
    """Prints the five most doubtful answers, and how many could not be scored."""
    found: list[tuple[float, str]] = []
    left_out = 0
    with Client(TARGET) as client:
        client.wait_until_ready(60)
        for (prompt, response), outcome in client.score_many(answers(), concurrency=8):
            if isinstance(outcome, Detection) and outcome.probability is not None:
                found.append((outcome.probability, f"{prompt} {response}"))
            else:  # an error, or a response that is too short: neither true nor made up, as far as anyone knows
                left_out += 1
    for probability, text in sorted(found, reverse=True)[:5]:
        print(f"{probability:4.0%}  {' '.join(text.split())}")
    print(f"{len(found)} scored, {left_out} not")


if __name__ == "__main__":
    main()
