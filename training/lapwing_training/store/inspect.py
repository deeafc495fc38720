"""What a feature store holds, and whether it is whole. Knows no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lapwing_detector.identity import ModelIdentity
from lapwing_training.files import digest_of
from lapwing_training.progress import waiting
from lapwing_training.store.plan import ITEMS
from lapwing_training.store.shards import whole_shard
from lapwing_training.store.store import as_written, files_in, mode_of, read_index


def inspect_store(directory: str | Path) -> dict[str, Any]:
    """Everything but the features themselves, also of a store with damaged shards.

    Returns:
        JSON values; `whole` is False when a file is missing or not as it was written, and `files` says which.

    Raises:
        StoreCorrupt: no store, an unfinished one, or an index that is not ours.
    """
    path = Path(directory)
    index, labels = read_index(path)
    with as_written(path):
        files = _files(path, index)
        return {
            "store": str(path),
            "whole": all(file["whole"] for file in files),
            "bytes": sum(one.stat().st_size for one in path.iterdir() if one.is_file()),
            "model": _model(index["identity"]),
            "features": index["features"],
            "k": index["k"],
            "layers": len(index["layers"]),
            "heads": index["heads"],
            **_about(index["items"], labels["labels"]),
            "stages": {
                fraction: sum(file["items"] for file in files if file["name"] in names)
                for fraction, names in index["stages"].items()
            },
            "stratum": index["stratum"],
            "log_probabilities": sum(file["log_probabilities"] for file in files),
            "left_out": dict(Counter(index["left_out"].values()).most_common()),
            "files": files,
        }


def describe(found: Mapping[str, Any]) -> str:
    """The same for people."""
    labels, model = found["labels"], found["model"]
    lines = [
        ("store", f"{found['store']}, {_size(found['bytes'])}, {_state(found)}"),
        ("model", f"{model['name']} {model['digest'][:12]}, {model['dtype']}"),
        ("heads", f"{found['layers']} layers x {found['heads']} heads"),
        ("features", f"{', '.join(found['features'])}; k = {found['k']}"),
        ("items", f"{found['items']:,} in {found['groups']:,} groups, {found['mode']}"),
        (
            "labels",
            ", ".join(f"{count:,} {name}" for name, count in labels.items()),
        ),
        ("tokens", _lengths(found["tokens"])),
        ("response", _lengths(found["response_tokens"])),
        ("log-probabilities", f"of the response's tokens of {found['log_probabilities']:,} items"),
    ]
    if len(set(found["modes"])) > 1:
        lines.append(("modes", ", ".join(f"{count:,} {mode}" for mode, count in found["modes"].items())))
    if found["splits"]:
        lines.append(("split", ", ".join(f"{count:,} {name}" for name, count in found["splits"].items())))
    lines += [(f"at {fraction}", f"{items:,} items") for fraction, items in found["stages"].items()]
    for name, stratum in found["strata"].items():
        made_up = stratum["hallucinated"]
        known = made_up + stratum["right"]
        lines.append((f"stratum {name}", f"{stratum['items']:,} items, {made_up:,} of {known:,} made up"))
    lines += [("left out", f"{count:,}: {reason}") for reason, count in found["left_out"].items()]
    lines += [("damaged", file["name"]) for file in found["files"] if not file["whole"]]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _files(path: Path, index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every file that the index lists: how many items it holds, its size, and whether it is as it was written."""
    found = []
    for name, expected in waiting(list(files_in(index).items()), "verify"):
        file = whole_shard(path / name)
        whole = file is not None and file.digest == expected
        items, said = (len(file.shard.ids), len(file.shard.log_probabilities or ())) if file is not None else (0, 0)
        about = {"items": items, "log_probabilities": said, "bytes": _bytes(path / name), "whole": whole}
        found.append({"name": name, **about})
    texts = path / ITEMS
    whole = texts.is_file() and digest_of(texts) == index["texts"]
    about = {"items": len(index["items"]["id"]), "log_probabilities": 0, "bytes": _bytes(texts), "whole": whole}
    return [*found, {"name": ITEMS, **about}]


def _model(identity: Mapping[str, Any]) -> dict[str, str]:
    model = ModelIdentity.from_dict(identity)
    return {"name": model.name, "digest": model.digest, "dtype": model.dtype}


def _about(items: Mapping[str, Sequence[Any]], labels: Mapping[str, int | None]) -> dict[str, Any]:
    known = [labels.get(id) for id in items["id"]]
    named = sorted({str(name) for name in items["stratum"] if name})
    return {
        "items": len(known),
        "labels": _counted(known),
        "groups": len(set(items["group"])),
        "splits": dict(sorted(Counter(split for split in items["split"] if split).items())),
        "strata": {
            name: {
                "items": list(items["stratum"]).count(name),
                **_counted([label for label, own in zip(known, items["stratum"], strict=True) if own == name]),
            }
            for name in named
        },
        "tokens": _spread(items["token_count"]),
        "response_tokens": _spread(items["response_tokens"]),
        "mode": mode_of(items["mode"]),
        "modes": dict(sorted(Counter(mode or "unknown" for mode in items["mode"]).items())),
    }


def _counted(labels: Sequence[int | None]) -> dict[str, int]:
    counts = {"hallucinated": labels.count(1), "right": labels.count(0)}
    return {**counts, "unknown": len(labels) - sum(counts.values())}


def _spread(values: Sequence[int]) -> dict[str, float]:
    least, middle, most = np.quantile(values, (0.0, 0.5, 1.0)).tolist()
    return {"least": least, "median": middle, "most": most}


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _lengths(spread: Mapping[str, float]) -> str:
    return f"{spread['least']:.0f} to {spread['most']:.0f} tokens, median {spread['median']:g}"


def _state(found: Mapping[str, Any]) -> str:
    damaged = sum(not file["whole"] for file in found["files"])
    return f"{damaged} of {len(found['files'])} files damaged" if damaged else f"all {len(found['files'])} files whole"
