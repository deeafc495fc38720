"""Probe directories: safetensors and JSON with the SHA-256 of every file; nothing in them is ever executed."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.calibration import Calibration, StageCalibration
from lapwing_detector.durable import sync as _sync
from lapwing_detector.durable import write as _write
from lapwing_detector.errors import ProbeCorrupt
from lapwing_detector.features import FEATURES
from lapwing_detector.head_map import STATISTICS
from lapwing_detector.identity import ModelIdentity, sha256
from lapwing_detector.pictures import card_pictures
from lapwing_detector.probe import Probe, Threshold

SCHEMA_VERSIONS = (1, 2)
"""Of attention alone, and of a probe that reads log-probabilities, too, which who knows only the first must refuse."""

TENSORS, MANIFEST, CARD = "probe.safetensors", "manifest.json", "README.md"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

LEFT_SECONDS = 3600.0
"""Age from which on an unfinished save is taken for one that was killed."""

BROKEN = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What reading JSON and arrays that are not ours may end in."""

MAX_MANIFEST = 4 << 20
MAX_TENSORS = 256 << 20
MAX_OTHER = 256 << 20
"""Bytes; larger files are refused before they are read."""


def save(probe: Probe, directory: Path, files: Mapping[str, bytes], card: str | None) -> Path:
    """See `Probe.save_pretrained`."""
    for name in files:
        if not FILE_NAME.fullmatch(name) or name in (TENSORS, MANIFEST, CARD):
            raise ValueError(f"a file named {name!r} can't stand in a probe directory; give it another, plain name")
    directory = directory.resolve()  # a link to a probe is followed, and not replaced
    _recover(directory)
    _require_replaceable(directory)
    content = {**card_pictures(probe), **files}
    content[TENSORS] = _tensor_bytes(probe)
    content[CARD] = (card if card is not None else model_card(probe)).encode()
    manifest = _manifest(probe) | {"files": {name: sha256(data) for name, data in sorted(content.items())}}
    content[MANIFEST] = (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        partial.chmod(0o755)
        for name, data in content.items():
            _write(partial / name, data)
        _sync(partial)
        _replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _recover(directory: Path) -> None:
    """Clean up after a save that was killed: the probe that it had moved aside comes back, what it left goes."""
    name = glob.escape(f".{directory.name}.")
    for aside in directory.parent.glob(f"{name}old.*/old"):
        if not directory.exists():
            os.replace(aside, directory)
    for left in directory.parent.glob(f"{name}*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > LEFT_SECONDS:  # another save may be at work
            shutil.rmtree(left, ignore_errors=True)


def _require_replaceable(directory: Path) -> None:
    """Nothing is replaced but a probe, with nothing beside it that is not its own."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        listed = {MANIFEST, *_read_manifest(directory)["files"]}
    except (ProbeCorrupt, OSError):
        raise FileExistsError(f"{directory} exists and is no probe directory; give another path or remove it") from None
    others = sorted(path.name for path in directory.iterdir() if path.name not in listed)
    if others:
        raise FileExistsError(f"{directory} holds {others[0]}, which is not the probe's; move it away first")


def load(source: str | Path) -> Probe:
    """See `Probe.from_pretrained`."""
    return load_directory(located(source))


def located(source: str | Path) -> Path:
    """A directory as it is, or that into which a probe of the Hugging Face Hub was fetched."""
    directory = Path(source)
    return directory if directory.is_dir() else _download(str(source))


def load_directory(directory: Path, manifest_digest: str | None = None) -> Probe:
    """Loads and verifies a probe directory.

    Args:
        directory: where it lies; nothing is fetched.
        manifest_digest: SHA-256 that the manifest must have, where somebody kept it: the manifest vouches for every
            file but itself.

    Raises:
        ProbeCorrupt: a file is missing, changed, too large or holds what it should not.
    """
    manifest = _read_manifest(directory, manifest_digest)
    tensors = b""
    for name, digest in manifest["files"].items():
        data = read(directory, name)
        if sha256(data) != digest:
            raise _changed(directory / name)
        tensors = data if name == TENSORS else tensors
    return _assemble(directory, manifest, tensors)


def listed_files(directory: Path) -> tuple[str, ...]:
    """Names of all files of a probe directory, the manifest last.

    Raises:
        ProbeCorrupt: its manifest is none.
    """
    return (*(name for name in _read_manifest(directory)["files"] if name != MANIFEST), MANIFEST)


def _changed(path: Path) -> ProbeCorrupt:
    return ProbeCorrupt(f"{path} is not the file that was saved (sha256 differs); fetch it again")


def read(directory: Path, name: str) -> bytes:
    """One file of a probe directory, its size capped before it is read.

    Raises:
        ProbeCorrupt: the name leads out of the directory, the file is missing, no plain file, or too large.
    """
    path = directory / name
    cap = {TENSORS: MAX_TENSORS, MANIFEST: MAX_MANIFEST}.get(name, MAX_OTHER)
    if not FILE_NAME.fullmatch(name):
        raise ProbeCorrupt(f"{directory} lists a file named {name!r}, which is no plain name")
    if not path.is_file() or not path.resolve().is_relative_to(_root(directory)):
        raise ProbeCorrupt(f"{path} is missing or leads out of its directory; fetch the probe again")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(cap + 1) if size <= cap else b""
    if size > cap or len(data) > cap:  # it may have grown since
        raise ProbeCorrupt(f"{path} has {max(size, len(data))} bytes; at most {cap} are read")
    return data


def _root(directory: Path) -> Path:
    """What the files of a probe directory must lie in, wherever their links lead.

    The cache of the Hub keeps the files of `snapshots/<commit>/` in `blobs/` beside it.
    """
    repository = directory.resolve().parent.parent
    in_cache = directory.resolve().parent.name == "snapshots" and (repository / "blobs").is_dir()
    return repository if in_cache else directory.resolve()


def push(probe: Probe, repo_id: str, private: bool, directory: Path | None) -> str:
    """See `Probe.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = directory or save(probe, Path(folder) / probe.name, {}, None)
        return str(api.upload_folder(repo_id=repo_id, folder_path=source).commit_url)


def model_card(probe: Probe) -> str:
    """A short README.md for a probe that was saved without one."""
    pictures = "\n".join(f"![{name}]({name})" for name in card_pictures(probe))
    more = " It reads more than attention: log-probabilities of the response's tokens." * probe.reads_log_probabilities
    return (
        f"# {probe.name}\n\nA Lapwing probe (revision {probe.revision}) for {probe.identity.name}: "
        f"{int(probe.selected.sum())} of {probe.selected.size} heads, features {', '.join(probe.features)}, "
        f"k = {probe.k}.{more}\n\n{pictures}\n"
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape a probe, as far as they are installed."""
    versions = {}
    for name in ("lapwing", "torch", "transformers", "numpy", "scikit-learn", "scipy", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _manifest(probe: Probe) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSIONS[probe.reads_log_probabilities],
        "name": probe.name,
        "revision": probe.revision,
        "features": list(probe.features),
        "k": probe.k,
        "token_span": "prompt and response, without the end-of-sequence token",
        "tensor_order": "layers, heads, width; width is the features in their order, ranked values descending",
        "layers": list(probe.layers),
        "heads": int(probe.selected.shape[1]),
        "bias": probe.bias,
        "calibration": _calibration_entry(probe.calibration),
        **({"stages": [vars(stage) for stage in probe.stages]} if probe.stages else {}),
        **({"statistic_weights": dict(probe.statistic_weights)} if probe.reads_log_probabilities else {}),
        "thresholds": [vars(point) for point in probe.thresholds],
        "identity": probe.identity.to_dict(),
        "metrics": dict(probe.metrics),
        "training": dict(probe.training),
        "libraries": library_versions(),
    }


def _calibration_entry(calibration: Calibration) -> dict[str, Any]:
    entry = {"method": "platt", "slope": calibration.slope, "intercept": calibration.intercept}
    return entry | (
        {"method": "isotonic", "knots": [list(knot) for knot in calibration.knots]} if calibration.knots else {}
    )


def _tensor_bytes(probe: Probe) -> bytes:
    from safetensors.numpy import save as to_bytes

    tensors: dict[str, NDArray[Any]] = {
        "weights": probe.weights.astype("<f4"),
        "selected": probe.selected.astype(np.uint8),
    }
    tensors |= {f"statistics/{key}": value.astype("<f4") for key, value in probe.statistics.items()}
    return bytes(to_bytes({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))


def _read_manifest(directory: Path, digest: str | None = None) -> dict[str, Any]:
    data = read(directory, MANIFEST)
    if digest is not None and sha256(data) != digest:
        raise _changed(directory / MANIFEST)
    try:
        manifest = json.loads(data)
        version = manifest["schema_version"]
        files = manifest["files"]
    except BROKEN as error:
        raise ProbeCorrupt(f"{directory / MANIFEST} is no manifest of a probe: {error!r}; fetch it again") from error
    if type(version) is not int or version not in SCHEMA_VERSIONS:
        known = " and ".join(map(str, SCHEMA_VERSIONS))
        raise ProbeCorrupt(f"{directory} has schema version {str(version)[:80]}, known are {known}; update lapwing")
    if ("statistic_weights" in manifest) != (version == SCHEMA_VERSIONS[1]):
        raise ProbeCorrupt(
            f"{directory / MANIFEST} is of schema version {version} and must hold statistic_weights if and only if "
            f"that is {SCHEMA_VERSIONS[1]}; fetch it again"
        )
    if not isinstance(files, dict) or TENSORS not in files:
        raise ProbeCorrupt(f"{directory / MANIFEST} must list {TENSORS} with its sha256")
    return dict(manifest)


def _assemble(directory: Path, manifest: Mapping[str, Any], data: bytes) -> Probe:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    try:
        tensors = from_bytes(data)
        shape = (len(manifest["layers"]), int(manifest["heads"]))
        statistics = {name.removeprefix("statistics/"): tensors.pop(name) for name in sorted(tensors) if "/" in name}
        _check_tensors(tensors, statistics, shape)
        probe = Probe(
            name=expect(manifest["name"], str),
            features=tuple(expect(feature, str) for feature in expect(manifest["features"], list)),
            k=expect(manifest["k"], int),
            layers=tuple(expect(layer, int) for layer in expect(manifest["layers"], list)),
            weights=tensors["weights"],
            bias=float(expect(manifest["bias"], int, float)),
            selected=tensors["selected"].astype(bool),
            calibration=_calibration(manifest["calibration"]),
            thresholds=tuple(_threshold(point) for point in expect(manifest["thresholds"], list)),
            identity=ModelIdentity.from_dict(manifest["identity"]),
            stages=tuple(_stage(stage) for stage in expect(manifest.get("stages", []), list)),
            statistic_weights=_statistic_weights(manifest),
            statistics=statistics,
            metrics=expect(manifest["metrics"], dict),
            training=expect(manifest["training"], dict),
        )
        if probe.revision != manifest["revision"]:
            raise ValueError(f"it says revision {manifest['revision']}, its content is {probe.revision}")
        return probe
    except (*BROKEN, SafetensorError) as error:
        raise ProbeCorrupt(f"{directory} does not hold a whole probe: {error}; fetch it again") from error


def expect(value: Any, *kinds: type) -> Any:
    """A JSON value of one of these kinds; true and false are no numbers.

    Raises:
        TypeError: it is of another kind.
    """
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{str(value)[:80]!r} must be {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _calibration(described: Mapping[str, Any]) -> Calibration:
    if described["method"] not in ("platt", "isotonic"):
        raise ValueError(f"calibration is {described['method']!r}, known are 'platt' and 'isotonic'")
    slope, intercept = (float(expect(described[name], int, float)) for name in ("slope", "intercept"))
    if described["method"] == "platt":
        return Calibration(slope, intercept)
    if not described["knots"]:
        raise ValueError("an isotonic calibration needs knots")
    pairs = [[float(expect(number, int, float)) for number in knot] for knot in expect(described["knots"], list)]
    return Calibration(slope, intercept, tuple((logit, probability) for logit, probability in pairs))


def _stage(described: Mapping[str, Any]) -> StageCalibration:
    names = ("fraction", "tokens", "slope", "intercept")
    return StageCalibration(*(float(expect(described[name], int, float)) for name in names))


def _statistic_weights(manifest: Mapping[str, Any]) -> dict[str, float]:
    weights = expect(manifest.get("statistic_weights", {}), dict)
    return {id: float(expect(weight, int, float)) for id, weight in weights.items()}


def _threshold(described: Mapping[str, Any]) -> Threshold:
    rate, logit = (float(expect(described[name], int, float)) for name in ("false_positive_rate", "logit"))
    realised = described["realised_rate"]
    return Threshold(
        rate,
        logit,
        None if realised is None else float(expect(realised, int, float)),
        expect(described["negatives"], int),
    )


def _check_tensors(
    tensors: Mapping[str, NDArray[Any]], statistics: Mapping[str, NDArray[Any]], shape: tuple[int, int]
) -> None:
    if set(tensors) != {"weights", "selected"}:
        raise ValueError(f"tensors are {sorted(tensors)}, expected weights and selected")
    for name, tensor in statistics.items():
        feature, _, statistic = name.partition("/")
        if feature not in FEATURES or statistic not in STATISTICS:
            raise ValueError(f"statistics/{name[:80]} is of no feature and statistic that are known")
        if tensor.shape != shape or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise ValueError(f"statistics/{name} must be finite float32 {shape}, is {tensor.dtype} {tensor.shape}")
    if tensors["weights"].dtype != np.float32 or tensors["selected"].dtype != np.uint8:
        raise ValueError("weights must be float32 and selected uint8")


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=["*.safetensors", "*.json", "*.md", "*.png", "*.html", "*.jsonl"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ProbeCorrupt(
            f"{repo_id!r} is neither a probe directory nor a repository of the Hugging Face Hub that can be reached "
            f"({type(error).__name__}); give the path that lapwing train wrote"
        ) from error


def _replace(partial: Path, directory: Path) -> None:
    if not directory.exists():
        os.replace(partial, directory)
    else:
        trash = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        try:
            os.replace(directory, trash / "old")
            try:
                os.replace(partial, directory)
            except BaseException:
                os.replace(trash / "old", directory)
                raise
        finally:
            shutil.rmtree(trash, ignore_errors=True)
    _sync(directory.parent)
