"""A language model in this process, scored by a server in another: only its attention's sums travel.

    lapwing serve --port 50051
    python client/examples/own_model.py localhost:50051 "Question: which country is the city of Bergen in? Answer:"

The model must be the one that the server's probe was fitted on. Needs the detector: pip install 'lapwing[detector]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from lapwing_client import Client, Detection
from lapwing_detector import Probe, capture_attention, embedded, identity_of

PROMPT = "Question: which country is the city of Bergen in? Answer:"  # as the embedded model was taught


def score(client: Client, model: Any, tokenizer: Any, inputs: Any, options: dict[str, Any]) -> tuple[Detection, Any]:
    """Writes an answer, and then has it scored."""
    with capture_attention(model) as captured:
        model.generate(**inputs, **options)
    tokens = inputs["input_ids"].shape[1]
    detection = client.score_attention(captured.chunks(), model=identity_of(model, tokenizer), prompt_tokens=tokens)
    return detection, captured


class Live(StoppingCriteria):
    """Sends the new rows after every token, shows the running score, and stops where it is high."""

    def __init__(self, captured: Any, stream: Any, stop_above: float) -> None:
        self.captured = captured
        self.stream = stream
        self.stop_above = stop_above
        self.probabilities: list[float | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Asked by `generate` whether to stop."""
        for chunk in self.captured.chunks(final=False):
            self.stream.send(chunk)
        probability = self.stream.score_now().probability
        self.probabilities.append(probability)
        print(f"{input_ids.shape[1]} tokens: {probability}", file=sys.stderr)
        stop = probability is not None and probability > self.stop_above
        return torch.full((len(input_ids),), stop, device=input_ids.device)


def score_live(
    client: Client, model: Any, tokenizer: Any, inputs: Any, options: dict[str, Any], stop_above: float
) -> tuple[Detection, Any]:
    """Has an answer scored while it is being written."""
    identity, tokens = identity_of(model, tokenizer), inputs["input_ids"].shape[1]
    with (
        capture_attention(model) as captured,
        client.attention_stream(
            model=identity, layers=captured.layers, heads=identity.heads, prompt_tokens=tokens
        ) as stream,
    ):
        live = Live(captured, stream, stop_above)
        model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([live]))
        for chunk in captured.chunks():
            stream.send(chunk)
        return stream.finish(), captured


def main() -> None:
    """Prints what the server says as JSON, and with --probe what the library says here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="localhost:50051", help="HOST:PORT of a server")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--model", default=str(embedded.model_path()), help="Hub id or path; the embedded one without")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--live", action="store_true", help="score after every token")
    parser.add_argument("--stop-above", type=float, default=1.0, help="end a live answer at this probability")
    parser.add_argument("--probe", type=Path, help="also score here, with this probe directory")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    inputs = tokenizer(given.prompt.replace("\\n", "\n"), return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": given.new_tokens, "do_sample": False}
    with Client(given.target) as client:
        if given.live:
            detection, captured = score_live(client, model, tokenizer, inputs, options, given.stop_above)
        else:
            detection, captured = score(client, model, tokenizer, inputs, options)
    report = {"probability": detection.probability, "logit": detection.logit, "tokens": detection.response_tokens}
    if given.probe:
        report["logit_here"] = Probe.from_pretrained(given.probe).score(captured.summaries()[0])[0]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
