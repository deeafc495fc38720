"""A response with its score after every token, stopped as soon as it is probably made up.

lapwing serve --port 50051
python client/examples/live_generation.py localhost:50051 "Question: which country is the city of Bergen in? Answer:"
"""

from __future__ import annotations

import argparse

from lapwing_client import Client, Detection, GeneratedToken

PROMPT = "Question: which country is the city of Bergen in? Answer:"  # as the embedded model was taught


def main() -> None:
    """Prints one line for each token, and what became of the response."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="localhost:50051", help="HOST:PORT of a server")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--stop-above", type=float, default=0.9, help="end the response at this probability")
    given = parser.parse_args()

    with (
        Client(given.target) as client,
        client.generate(
            given.prompt.replace("\\n", "\n"),
            max_new_tokens=24,
            stop_when_probability_above=given.stop_above,
            minimum_tokens=3,
        ) as stream,
    ):
        for event in stream:
            if isinstance(event, GeneratedToken):
                print(f"{bar(event.probability)} {event.text!r}")
            else:
                print(f"{event.finish_reason}: {event.text.strip()!r} is {verdict(event.detection)}")


def bar(probability: float | None) -> str:
    """The probability that what is written so far is made up."""
    return " too short " if probability is None else f"{probability:4.0%} {'#' * round(6 * probability):6}"


def verdict(detection: Detection) -> str:
    """What is known of a response. Without a score nothing is."""
    if detection.probability is None:
        return f"not known to be true or made up: {detection.message}"
    return f"made up with probability {detection.probability:.0%}"


if __name__ == "__main__":
    main()
