"""Checks a model before anyone relies on what is captured of it. Shows nothing: see report.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lapwing_detector.doctor.bos import check_bos
from lapwing_detector.doctor.comparisons import check_batch, check_eager, check_generate
from lapwing_detector.doctor.cost import check_cost
from lapwing_detector.doctor.layers import check_layers
from lapwing_detector.doctor.overhead import check_overhead
from lapwing_detector.doctor.patient import Patient
from lapwing_detector.doctor.verdict import Check, Skipped
from lapwing_detector.errors import DetectorError, UnsupportedModel
from lapwing_detector.language_model import LanguageModel

Look = Callable[[Patient], Check]

DECIDING: dict[str, Look] = {
    "layers": check_layers,
    "eager": check_eager,
    "batch": check_batch,
    "generate": check_generate,
    "bos": check_bos,
}
"""By name, in the order in which they are made; a failure of one says that the model is not to be relied on."""

MEASURING: dict[str, Look] = {"cost": check_cost, "overhead": check_overhead}
"""These never decide: the machine may be busy."""

QUICK: dict[str, Look] = {"cost": lambda patient: check_cost(patient, measure=False)}
"""In place of MEASURING."""

WITHOUT_MODEL = frozenset({"bos"})
"""Checks of the tokenizer, which can be made of a model that is refused."""


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found."""

    patient: Mapping[str, Any]
    """Who it is: JSON values."""

    checks: tuple[Check, ...]

    @property
    def wrong(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if check.state == "failed"]

    @property
    def skipped(self) -> list[str]:
        """Names of the checks that were not made."""
        return [check.name for check in self.checks if check.state == "skipped"]


def examine(
    language_model: LanguageModel,
    *,
    fallback: Literal["eager"] | None = None,
    quick: bool = False,
    begin: Callable[[str], object] = lambda name: None,
) -> Diagnosis:
    """Makes every check; one that fails does not keep the others from being made.

    Args:
        language_model: is left as it is.
        fallback: see `capture_attention`.
        quick: measure no time.
        begin: called with the name of each check before it is made.
    """
    patient, checks, refused = Patient(language_model, fallback), [], False
    for name, look in looks(quick).items():
        begin(name)
        if refused and name not in WITHOUT_MODEL:
            checks.append(Check(name, "skipped", "nothing can be captured"))
            continue
        check, error = made(name, look, patient)
        refused = refused or isinstance(error, UnsupportedModel)
        checks.append(check)
    return Diagnosis(described(patient), tuple(checks))


def looks(quick: bool = False) -> dict[str, Look]:
    """The checks by name, in order."""
    return {**DECIDING, **(QUICK if quick else MEASURING)}


def made(name: str, look: Look, patient: Patient) -> tuple[Check, Exception | None]:
    """A check, whatever happens, and the error that ended it."""
    try:
        return look(patient), None
    except Skipped as why:
        return Check(name, "skipped", one_line(why)), None
    except Exception as error:  # any model may come here, and what it does is what is looked for
        said = one_line(error) if isinstance(error, DetectorError) else f"{type(error).__name__}: {one_line(error)}"
        return Check(name, "failed" if name in DECIDING else "skipped", said), error


def one_line(error: Exception) -> str:
    """Its text, however many lines it has, cut where it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else f"{text[:499]}…"


def described(patient: Patient) -> dict[str, Any]:
    """Who the model is."""
    model, config = patient.model, patient.model.config.get_text_config(decoder=True)
    return {
        "name": patient.language_model.name,
        "class": type(model).__name__,
        "parameters": sum(one.numel() for one in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": str(config._attn_implementation),
        "context": patient.language_model.max_tokens,
        "fallback": patient.fallback,
    }
