"""Answers that the judge of the tests takes for right or wrong, and how it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from judge_server import JudgeServer
from typer.testing import CliRunner, Result

from lapwing_training.cli.label import label
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.labels.judge import TEMPLATE
from lapwing_training.labels.judge_cache import JudgeCache
from lapwing_training.labels.judge_endpoint import Endpoint, EndpointOptions
from lapwing_training.labels.judging import Judge

KEY = "sk-very-secret"


def generation(name: str, right: bool = False, **changes: Any) -> LabelledGeneration:
    """An answer that the server takes for right or wrong; the first and last words are no accepted answer."""
    response = f"{'right-answer' if right else 'wrong'} {name}"
    fields = {"prompt": f"About item-{name}?", "response": response, "references": ("Paris",), **changes}
    return LabelledGeneration(id=name, **fields)


def generations(count: int) -> list[LabelledGeneration]:
    return [generation(f"i{number}", right=number % 3 == 0) for number in range(count)]


def judge_of(server: JudgeServer, cache: Path, template: str = TEMPLATE, concurrency: int = 4, **options: Any) -> Judge:
    endpoint = Endpoint(EndpointOptions("model-j", server.url, **{"timeout": 10.0, "retries": 4, **options}))
    return Judge(endpoint, JudgeCache(cache), template, concurrency)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(label)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(server: JudgeServer, source: Path, out: Path, *more: object, rule: str = "judge") -> tuple[object, ...]:
    return source, "--out", out, "--rule", rule, "--judge", "model-j", "--base-url", server.url, *more
