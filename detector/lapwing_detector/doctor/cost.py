"""What capturing a model takes at several lengths, drawn out from the time of shorter ones. An estimate."""

from __future__ import annotations

from lapwing_detector.doctor.clock import read, seconds, without_collection
from lapwing_detector.doctor.layers import layer_kinds, reaches
from lapwing_detector.doctor.memory import Memory
from lapwing_detector.doctor.patient import Patient
from lapwing_detector.doctor.verdict import Check
from lapwing_detector.layers import WITHOUT_ATTENTION

LENGTHS = (1024, 8192, 32768)
"""For which memory and time are estimated."""

MEASURED = (128, 256, 512, 1024, 2048)
"""At which time is measured, as long as it stays below PATIENCE."""

PATIENCE = 0.2
"""Seconds of one forward from which on no longer one is measured; but always two lengths."""

FALLBACK_MOST = 1024
"""Longest text that is measured with whole maps: a longer one might not fit into memory."""


def check_cost(patient: Patient, measure: bool = True) -> Check:
    """Memory and time that it takes to read texts of LENGTHS tokens under capture.

    Args:
        measure: without it nothing is said of time.
    """
    measured, stopped = measured_seconds(patient) if measure else ({}, "")
    context, memory = patient.language_model.max_tokens, Memory.of(patient)
    lengths = [
        {
            "tokens": tokens,
            "seconds": measured.get(tokens, estimated_seconds(patient, measured, tokens)),
            "measured": tokens in measured,
            "beyond_context": tokens > context,
            **memory.at(tokens),
        }
        for tokens in LENGTHS
    ]
    said = (
        f"an estimate for one text; total: the weights of {megabytes(memory.weights)}, cache, sums and "
        f"{'one map with its masks' if patient.makes_maps else 'masks'}, without activations"
    )
    said += f"; the context is {context:,}" if context < max(LENGTHS) else ""
    said += f"; no longer text was measured: {stopped}" if stopped else ""
    numbers = {
        "weights_bytes": memory.weights,
        "context": context,
        "measured_seconds": measured,
        "stopped": stopped,
        "lengths": lengths,
    }
    return Check("cost", "measured", said, numbers)


def megabytes(size: float) -> str:
    """Bytes in words, of powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e6:,.1f} MB"


def measured_seconds(patient: Patient) -> tuple[dict[int, float], str]:
    """Tokens -> seconds of one forward under capture with its summaries, at lengths that are quick enough.

    And the error at which it ended, such as for want of memory; mostly empty.
    """
    found: dict[int, float] = {}
    most = FALLBACK_MOST if patient.makes_maps else max(MEASURED)
    if not patient.takes_positions:
        most = min(most, patient.language_model.max_tokens)
    with without_collection():
        for tokens in MEASURED:
            if tokens > most or (len(found) > 1 and max(found.values()) > PATIENCE):
                break
            try:
                found[tokens] = quickest(patient, tokens)
            except (RuntimeError, IndexError) as error:  # too large for memory, or for a table of the model
                said = " ".join(str(error).split())[:200]
                return found, f"{tokens:,} tokens ended in {type(error).__name__}: {said}"
    return found, ""


def quickest(patient: Patient, tokens: int) -> float:
    """Seconds of two forwards under capture: the first meets memory that was never touched."""
    return min(seconds(patient, lambda: read(patient, tokens, captured=True)) for _ in range(2))


def estimated_seconds(patient: Patient, measured: dict[int, float], tokens: int) -> float | None:
    """From the two longest that were measured: a share for each token, and one for each pair that attends."""
    if len(measured) < 2:
        return None
    (short, before), (long, last) = sorted(measured.items())[-2:]
    pairs = {count: attended_pairs(patient, count) for count in (short, long, tokens)}
    # before = token * short + pair * pairs[short], last = token * long + pair * pairs[long]
    beyond = pairs[long] - pairs[short] * long / short  # none where every row sees a chunk: pairs grow like tokens
    pair = (last - before * long / short) / beyond if beyond > 0 else 0.0
    pair = min(max(pair, 0.0), last / max(pairs[long], 1.0))  # noise must not make one of the shares negative
    token = (last - pair * pairs[long]) / long
    return token * tokens + pair * pairs[tokens]


def attended_pairs(patient: Patient, tokens: int) -> float:
    """Pairs of tokens of which one sees the other, summed over the layers; of whole maps those that are computed."""
    seen = {} if patient.makes_maps else reaches(patient.model)
    kinds = [kind for kind in layer_kinds(patient.model) if kind not in WITHOUT_ATTENTION]
    return sum(_pairs(kind, min(seen.get(kind, tokens), tokens), tokens) for kind in kinds)


def _pairs(kind: str, reach: int, tokens: int) -> float:
    if "chunked" in kind:
        chunks, rest = divmod(tokens, reach)
        return (chunks * reach**2 + rest**2) / 2
    return reach * (tokens - reach / 2)
