"""Which settings exclude each other, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lapwing_server.addresses import is_loopback, overlap

if TYPE_CHECKING:
    from lapwing_server.limits import Limits
    from lapwing_server.settings import Settings


class Contradiction(ValueError):
    """Settings that exclude each other.

    Args:
        names: of the settings, dotted.
        message: what is wrong and how to mend it.
        without: further settings that, given, would have made it none.
    """

    def __init__(self, names: tuple[str, ...], message: str, without: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names
        self.without = without


class Contradictions(ValueError):
    """All that were found.

    Args:
        all: at least one.
    """

    def __init__(self, all: tuple[Contradiction, ...]) -> None:
        super().__init__("; ".join(map(str, all)))
        self.all = all


def contradictions(one: Settings) -> Iterator[Contradiction]:
    """All of the settings that exclude each other, the gravest first."""
    yield from of_encryption(one)
    yield from of_admin(one)
    if one.model and not one.probes:
        message = "--model needs --probes: the embedded probe was fitted on the embedded model only"
        yield Contradiction(("model", "probes"), message)
    if one.burst and not one.requests_per_second:
        yield Contradiction(("burst", "requests_per_second"), "burst needs requests_per_second: nothing is limited")
    yield from of_metrics(one)
    yield from of_queue(one)
    yield from of_streams(one.limits)


def of_encryption(one: Settings) -> Iterator[Contradiction]:
    """What is said of TLS."""
    if (one.tls_cert is None) != (one.tls_key is None):
        given, missing = ("tls_cert", "tls_key") if one.tls_cert else ("tls_key", "tls_cert")
        yield Contradiction((given, missing), f"{given} needs {missing}: give both, or neither")
    if one.tls_client_ca and not one.encrypted:
        yield Contradiction(("tls_client_ca", "tls_cert"), "tls_client_ca needs tls_cert and tls_key: there is no TLS")
    if one.insecure and one.encrypted:
        yield Contradiction(("insecure", "tls_cert"), "insecure is without encryption, tls_cert with it: drop one")
    if not (one.encrypted or is_loopback(one.host)):
        if one.tokens_file:
            message = f"tokens would travel readable by others to {one.host!r}: give tls_cert and tls_key"
            yield Contradiction(("tokens_file", "host"), message, ("tls_cert", "tls_key"))
        if not one.insecure:
            message = (
                f"others can reach {one.host!r}, and there is no encryption: give --tls-cert and --tls-key; "
                "or keep 127.0.0.1 behind a proxy that has it, with --tokens-file; or say --insecure"
            )
            yield Contradiction(("host",), message, ("tls_cert", "tls_key", "insecure"))


def of_admin(one: Settings) -> Iterator[Contradiction]:
    """What is said of who may change probes."""
    if not one.open_admin:
        return
    if one.tokens_file:
        message = "the file says who may change probes: drop open_admin, or give a token of it the scope admin"
        yield Contradiction(("open_admin", "tokens_file"), message)
    if one.tls_client_ca:
        message = "name the certificates that may change probes in a tokens_file, and drop open_admin"
        yield Contradiction(("open_admin", "tls_client_ca"), message)
    if not is_loopback(one.host):
        message = f"whoever reaches {one.host!r} could change probes: drop open_admin, and give tokens_file"
        yield Contradiction(("open_admin", "host"), message)


def of_metrics(one: Settings) -> Iterator[Contradiction]:
    """What is said of the page of the metrics."""
    if one.metrics_port is None:
        if one.metrics_host != "127.0.0.1":
            message = "metrics_host needs metrics_port: no metrics are served"
            yield Contradiction(("metrics_host", "metrics_port"), message)
        if one.metrics_insecure:
            message = "metrics_insecure needs metrics_port: no metrics are served"
            yield Contradiction(("metrics_insecure", "metrics_port"), message)
        return
    if not (is_loopback(one.metrics_host) or one.metrics_insecure or one.insecure):
        message = (
            f"others can reach {one.metrics_host!r}, and the metrics are neither encrypted nor asked a token for: "
            "keep 127.0.0.1, or say --metrics-insecure"
        )
        yield Contradiction(("metrics_host",), message, ("metrics_insecure", "insecure"))
    if one.metrics_port == one.port != 0 and overlap(one.metrics_host, one.host):
        yield Contradiction(("metrics_port", "port"), f"metrics_port and port are both {one.port}: give two")


def of_queue(one: Settings) -> Iterator[Contradiction]:
    """What is said of the items that wait."""
    limits = one.limits
    queue, each, batch = "limits.queue_items", "limits.queue_items_per_client", "limits.batch_items"
    if limits.batch_items > limits.queue_items:
        message = (
            f"a batch of {limits.batch_items} items would never fit into a queue of {limits.queue_items}: "
            f"give queue_items at least {limits.batch_items}, or batch_items less"
        )
        yield Contradiction((queue, batch), message)
    elif one.told_apart and limits.batch_items > (most := limits.for_many().items_of_one):
        message = (
            f"a batch of {limits.batch_items} items would never be let in, since {most} of one client "
            f"may wait: give queue_items_per_client at least {limits.batch_items}, or batch_items less"
        )
        yield Contradiction((each if limits.queue_items_per_client else queue, batch), message, (each,))
    if limits.queue_items_per_client is None:
        return
    if not one.told_apart:
        message = "it needs tokens_file or tls_client_ca: clients that don't say who they are can't be told apart"
        yield Contradiction((each,), message, ("tokens_file", "tls_client_ca"))
    if limits.queue_items_per_client > limits.queue_items:
        yield unreachable(each, limits.queue_items_per_client, queue, limits.queue_items)


def of_streams(limits: Limits) -> Iterator[Contradiction]:
    """What is said of streams. A bound for each that was not given gives way to a smaller one for all."""
    streams = limits.generate_streams + limits.attention_streams
    if limits.streams_per_client and limits.streams_per_client > streams:
        message = (
            f"{limits.streams_per_client} streams of one client are more than there can be of both kinds, {streams}: "
            "raise one of generate_streams and attention_streams, or lower it"
        )
        names = ("limits.streams_per_client", "limits.generate_streams", "limits.attention_streams")
        yield Contradiction(names, message)
    if "public_streams_per_client" in limits.model_fields_set:
        each, every = limits.public_streams_per_client, limits.public_streams
        if each > every:
            yield unreachable("limits.public_streams_per_client", each, "limits.public_streams", every)
    stream, client, total = limits.attention_bytes, limits.attention_bytes_per_client, limits.attention_total_bytes
    if stream > total:
        yield unreachable("limits.attention_bytes", stream, "limits.attention_total_bytes", total)
    if client and client > total:
        yield unreachable("limits.attention_bytes_per_client", client, "limits.attention_total_bytes", total)
    if client and stream > client:
        name = "limits.attention_bytes_per_client"
        yield unreachable("limits.attention_bytes", stream, name, client, "of one client")


def unreachable(each: str, one: int, every: str, all: int, of: str = "of all") -> Contradiction:
    """One may have more than several together."""
    names = [name.removeprefix("limits.") for name in (each, every)]
    message = f"{names[0]} is {one}, and {names[1]}, {of} together, only {all}: lower the one or raise the other"
    return Contradiction((each, every), message)
