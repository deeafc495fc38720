"""The verb `lapwing score`: one response, or a file of them, scored by a running server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from lapwing_client.client import Client
from lapwing_client.results import Detection
from lapwing_client.score_lines import score_lines
from lapwing_client.tls import TLS


def score(
    server: Annotated[
        str, typer.Option(help="HOST:PORT of the server; several with commas between them.")
    ] = "localhost:50051",
    prompt: Annotated[str | None, typer.Option(help="What the model was given.")] = None,
    response: Annotated[str | None, typer.Option(help="What it answered.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="A file of lines with prompt (or messages) and response; - is standard input.")
    ] = None,
    probe: Annotated[str, typer.Option(help="Name of the probe that scores; the active one without it.")] = "",
    false_positive_rate: Annotated[
        float | None, typer.Option(help="Share of truthful responses that may be flagged; 0.05 without it.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1000, help="Lines that are scored at the same time.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that one response may take.")] = 60.0,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token to send; without it LAPWING_TOKEN is sent, if set.")
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt, and trust the authorities that this system does.")
    ] = False,
    tls_ca: Annotated[Path | None, typer.Option(help="Encrypt, and trust the authorities in this PEM file.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Our own certificate (PEM), for a server that asks.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of --tls-cert (PEM).")] = None,
    tls_name: Annotated[str, typer.Option(help="Name in the server's certificate, if not that of --server.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score responses with a running server: how likely is it that they are made up?

    Of a file, one line of JSON comes out for each line that goes in, in the same order.

    Example: lapwing score --server localhost:50051 --prompt "Question: which country is the city of Lyon in? Answer:"
    --response Peru
    """
    single = prompt is not None and response is not None
    if single == (jsonl is not None) or (jsonl is not None and (prompt is not None or response is not None)):
        raise typer.BadParameter("give either --prompt and --response, or --jsonl FILE")
    encrypted = tls or any((tls_ca, tls_cert, tls_key, tls_name))
    how = TLS(tls_ca, tls_cert, tls_key, tls_name) if encrypted else None
    with Client(server, token=token_of(token_file), tls=how, timeout=timeout) as client:
        if jsonl is not None:
            raise typer.Exit(score_lines(client, jsonl, concurrency, false_positive_rate, probe))
        found = client.score(prompt or "", response or "", false_positive_rate=false_positive_rate, probe=probe)
    print(json.dumps(found.to_dict()) if as_json else describe(found))


def token_of(path: Path | None) -> str | None:
    """What is in the file, without the end of the line; what the environment has without a file."""
    if path is None:
        return os.environ.get("LAPWING_TOKEN") or None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"  # whose own words would quote the token
        raise typer.BadParameter(f"--token-file {path} can't be read: {why}") from error
    if not token:
        raise typer.BadParameter(f"--token-file {path} is empty")
    return token


def describe(detection: Detection) -> str:
    """A detection for people."""
    if detection.probability is None or detection.logit is None:
        return f"could not score: {detection.message} ({detection.reason})"
    heads = ", ".join(f"layer {h.layer} head {h.head} ({h.contribution:+.3f})" for h in detection.strongest_heads[:5])
    places = range(len(detection.token_contributions))
    strongest = sorted(places, key=lambda i: -abs(detection.token_contributions[i]))[:5]
    tokens = ", ".join(
        f"{place_name(i, detection.prompt_tokens)} ({detection.token_contributions[i]:+.3f})" for i in strongest
    )
    return (
        f"made up with probability {detection.probability:.3f} (logit {detection.logit:+.3f})\n"
        f"{verdict(detection)}\n"
        f"strongest heads:  {heads}\n"
        f"strongest tokens: {tokens}\n"
        f"probe {detection.probe_name} {detection.probe_revision}, "
        f"{detection.prompt_tokens} + {detection.response_tokens} tokens"
    )


def verdict(detection: Detection) -> str:
    """Whether it is flagged, and at which operating points."""
    rate = f"{detection.false_positive_rate:.1%}"
    if detection.flagged is None:
        return f"the probe has no threshold for {rate} false alarms"
    passed = ", ".join(f"{rate:.1%}" for rate in detection.flagged_at) or "none"
    return f"{'flagged' if detection.flagged else 'not flagged'} at {rate} false alarms (flagged at: {passed})"


def place_name(index: int, prompt_tokens: int) -> str:
    """Where a token stands."""
    return f"prompt token {index}" if index < prompt_tokens else f"response token {index - prompt_tokens}"
