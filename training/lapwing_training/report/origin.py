"""Where a probe comes from: data, model, command, libraries. Knows no numbers of quality."""

from __future__ import annotations

from collections.abc import Iterator

from lapwing_detector.probe import Probe
from lapwing_detector.probe_files import library_versions
from lapwing_detector.token_statistics import TOKEN_STATISTICS
from lapwing_training.report.blocks import Block, Code, Table, Text
from lapwing_training.report.words import one_line, title


def origin(probe: Probe) -> Iterator[Block]:
    """Facts as a table, the command, the libraries."""
    facts = [*_data(probe), *_model(probe)]
    yield Table(("", ""), tuple((name, one_line(str(value), 120)) for name, value in facts), wide=True)
    command = probe.metrics.get("command", probe.training.get("command"))
    if command:
        yield Text("The same probe again:")
        yield Code(str(command))
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    yield Text(f"Made with {versions}.")


def _data(probe: Probe) -> Iterator[tuple[str, object]]:
    training = probe.training
    yield "probe", f"{probe.name}, revision {probe.revision}"
    names = {
        "store_digest": "feature store (SHA-256)",
        "left_out": "items left out of the store",
        "stratum": "stratum",
        "seed": "seed",
    }
    for key, name in names.items():
        if training.get(key) is not None:
            yield name, training[key]
    if "trained_as" in training:
        yield "recipe", title(str(training["trained_as"]))
    for id, weight in probe.statistic_weights.items():
        yield f"weight of {TOKEN_STATISTICS[id].title}", f"{weight:.4g}"
    if training.get("chosen"):
        yield (
            "chosen inside",
            ", ".join(f"{name} = {_short_value(value)}" for name, value in sorted(training["chosen"].items())),
        )


def _model(probe: Probe) -> Iterator[tuple[str, object]]:
    identity = probe.identity
    yield "model", identity.name
    if identity.commit:
        yield "commit on the Hub", identity.commit
    yield "layers and heads", f"{identity.layers} and {identity.heads}"
    yield "dtype, quantisation", f"{identity.dtype}, {identity.quantisation}"
    for name in ("architecture", "parameters", "weights", "tokenizer", "chat_template"):
        yield f"{name.replace('_', ' ')} (digest)", getattr(identity, name)


def _short_value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
