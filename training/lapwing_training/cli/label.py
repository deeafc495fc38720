"""The verb `label`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapwing_training.cli.common import AsJson, failures, tell

if TYPE_CHECKING:
    from lapwing_training.data.generations import LabelledGeneration
    from lapwing_training.labels.judging import Judge

RULE = (
    "exact: equal to an accepted answer, case and accents folded. f1 (words as SQuAD's), rouge-l: shares enough "
    "words with one. "
    "judge: a model decides. published: F1 or ROUGE-L of .99 is right, else a model decides; its `incorrect` is not "
    "believed at a ROUGE-L of .75."
)
COUNTED = (("hallucinated", 1), ("right", 0), ("unknown", None))


def label(
    generations: Annotated[Path, typer.Argument(help="JSON Lines with response and references.")],
    out: Annotated[Path, typer.Option(help="Labelled generations to write; may be the same file.")],
    rule: Annotated[str, typer.Option(help=RULE)] = "exact",
    at_least: Annotated[float | None, typer.Option(help="f1, rouge-l: least score of a right answer; .5.")] = None,
    judge: Annotated[str, typer.Option(help="judge, published: name of the model that judges.")] = "",
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, such as http://localhost:8000/v1.")] = "",
    prompt: Annotated[
        Path | None, typer.Option(help="Text for the judge with {question}, {references} and {response}.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 8,
    retries: Annotated[int, typer.Option(help="Of a request that fails.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for one answer.")] = 60.0,
    cache: Annotated[
        Path | None, typer.Option(help="The judge's answers, asked for once; beside --out without it.")
    ] = None,
    price_in: Annotated[float | None, typer.Option(help="Of a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Of a million tokens of the judge's answers.")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Leave out what has no label.")] = False,
    as_json: AsJson = False,
) -> None:
    """Label answers: 1 made up, 0 right, null where there are no references or a judge gives no verdict.

    The judge's key is read from OPENAI_API_KEY. A run that was stopped goes on, and asks for no answer twice.

    Next: lapwing extract.

    Example: lapwing label answers.jsonl --out labelled.jsonl --rule published --judge gpt-4.1-mini
    """
    from lapwing_training.data.generations import read_generations, write_generations
    from lapwing_training.errors import InvalidOption, NotEnoughData
    from lapwing_training.labels.label import JUDGED, label_generations

    with failures("label"):
        require_prices(price_in, price_out)
        items = read_generations(generations)
        who = None
        if judge and rule not in JUDGED:
            raise InvalidOption(f"judge is `{judge}`, but rule `{rule}` asks none; give --rule {' or '.join(JUDGED)}")
        if rule in JUDGED:
            place = cache or out.with_name(f"{out.name}.judge.jsonl")
            who = make_judge(judge, base_url, timeout, retries, place, prompt, concurrency)
        labelled = label_generations(items, rule, at_least, who)
        kept = [item for item in labelled if item.label is not None or not drop]
        if not kept:
            raise NotEnoughData(f"none of the {len(items)} items got a label; without --drop the file says why")
        write_generations(out, kept)
        result = {"generations": str(out), "items": len(kept), "dropped": len(labelled) - len(kept), **counts(labelled)}
        if who is not None:
            result["judge"] = used(who, price_in, price_out)
        tell(result, as_json, told(result))


def make_judge(
    model: str, base_url: str, timeout: float, retries: int, cache: Path, prompt: Path | None, concurrency: int
) -> Judge:
    """A judge that was asked nothing yet.

    Raises:
        InvalidOption: an option that makes no sense, a prompt or a cache that is none.
    """
    from lapwing_training.labels.judge import TEMPLATE
    from lapwing_training.labels.judge_cache import JudgeCache
    from lapwing_training.labels.judge_endpoint import Endpoint, EndpointOptions
    from lapwing_training.labels.judging import Judge

    endpoint = Endpoint(EndpointOptions(model, base_url, timeout, retries))
    template = TEMPLATE if prompt is None else read_prompt(prompt)
    return Judge(endpoint, JudgeCache(cache), template, concurrency)


def read_prompt(path: Path) -> str:
    """The text of a file.

    Raises:
        InvalidOption: it can't be read.
    """
    from lapwing_training.errors import InvalidOption

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"prompt is {path}, which can't be read: {error}; expected a text file") from None


def require_prices(price_in: float | None, price_out: float | None) -> None:
    """Neither is below nothing.

    Raises:
        InvalidOption: one is.
    """
    from lapwing_training.errors import InvalidOption

    for name, price in (("price-in", price_in), ("price-out", price_out)):
        if price is not None and not 0.0 <= price < float("inf"):
            raise InvalidOption(f"{name} is {price}; expected what a million tokens cost, from 0")


def counts(labelled: Sequence[LabelledGeneration]) -> dict[str, Any]:
    """How many items have which label, and what the judge's verdicts were."""
    verdicts = Counter(str(item.labelling["verdict"]) for item in labelled if "verdict" in item.labelling)
    found = {name: sum(item.label == value for item in labelled) for name, value in COUNTED}
    return {**found, **({"verdicts": dict(sorted(verdicts.items()))} if verdicts else {})}


def used(judge: Judge, price_in: float | None, price_out: float | None) -> dict[str, Any]:
    """What this run asked of the judge, and what that cost if a price is known."""
    from dataclasses import asdict

    spent: dict[str, Any] = {"model": judge.name, **asdict(judge.usage)}
    if price_in is not None or price_out is not None:
        spent["price"] = judge.usage.price(price_in or 0.0, price_out or 0.0)
    return spent


def told(result: Mapping[str, Any]) -> str:
    """The same for a person."""
    known = result["hallucinated"] + result["right"]
    share = f"{result['hallucinated'] / known:.1%}" if known else "none"
    items = result["items"] + result["dropped"]
    lines = [f"{items} items, {share} of {known} labelled ones hallucinated, {result['unknown']} without label"]
    if result["dropped"]:
        lines.append(f"{result['dropped']} without label left out")
    if "verdicts" in result:
        lines.append("verdicts: " + ", ".join(f"{count} {name}" for name, count in result["verdicts"].items()))
    if "judge" in result:
        spent = result["judge"]
        price = f", price {spent['price']:.4f}" if "price" in spent else ""
        tokens = f"{spent['prompt_tokens']:,} prompt and {spent['completion_tokens']:,} completion tokens"
        lines.append(f"judge {spent['model']}: {spent['requests']} requests, {spent['cached']} cached, {tokens}{price}")
    return "\n".join(lines)
