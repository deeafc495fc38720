"""The verb `import`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapwing_training.cli.common import AsJson, failures, tell
from lapwing_training.cli.table_options import Config, SplitName, column_names

if TYPE_CHECKING:
    from lapwing_training.data.importing import Imported


def import_(
    source: Annotated[str, typer.Argument(help="CSV, JSON, JSON Lines or Parquet file; or a data set, name or path.")],
    out: Annotated[Path, typer.Option(help="Labelled generations to write, .jsonl or .jsonl.gz.")],
    response: Annotated[str, typer.Option(help="Column of the answers; a.b is field b of the objects in a.")],
    prompt: Annotated[str, typer.Option(help="Column of the prompts.")] = "",
    messages: Annotated[str, typer.Option(help="Column of chat messages, instead of prompts.")] = "",
    label: Annotated[str, typer.Option(help="Column of the labels; without it all are null.")] = "",
    hallucinated_is: Annotated[str, typer.Option(help="Label that means hallucinated; never guessed.")] = "",
    right_is: Annotated[str, typer.Option(help="Label that means right; any other becomes null.")] = "",
    id_column: Annotated[str, typer.Option("--id", help="Column of ids; made from the content without it.")] = "",
    group: Annotated[str, typer.Option(help="Column of groups, which never straddle a split.")] = "",
    references: Annotated[str, typer.Option(help="Column of accepted answers: text, list, or JSON list.")] = "",
    meta: Annotated[str, typer.Option(help="Comma-separated columns to keep, such as topic,source.")] = "",
    config: Config = "",
    split_name: SplitName = "",
    mode: Annotated[str, typer.Option(help="generated if the model that will read them wrote them.")] = "supplied",
    rejected: Annotated[Path | None, typer.Option(help="JSON Lines file for the broken rows and why.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken rows out, not refuse all.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring labelled answers of others into our form; broken rows are listed with their numbers, nothing is guessed.

    Next: lapwing extract.

    Example: lapwing import others.csv --prompt question --response answer --label verdict --hallucinated-is wrong
    --right-is correct --out labelled.jsonl
    """
    from lapwing_training.data.columns import Columns, Polarity
    from lapwing_training.data.data_sets import Source
    from lapwing_training.data.generations import write_generations
    from lapwing_training.data.importing import import_table, require_apart, write_rejected

    with failures("import"):
        columns = Columns(
            prompt=prompt,
            messages=messages,
            response=response,
            label=label,
            id=id_column,
            group=group,
            references=references,
            meta=column_names(meta),
        )
        polarity = Polarity(hallucinated_is, right_is) if label or hallucinated_is or right_is else None
        require_apart(source, out, rejected)
        imported = import_table(Source(source, config, split_name), columns, polarity, mode)
        if rejected:
            write_rejected(rejected, imported.rejected)
        _list(source, imported)
        imported.require_whole(source, skip_broken)
        write_generations(out, imported.items)
        result = {"generations": str(out), **imported.counts(), "mode": mode}
        tell(result, as_json, _summary(result))


def _list(source: str, imported: Imported) -> None:
    for one in imported.rejected:
        print(f"{source}, {one}", file=sys.stderr)
    for value, count in imported.other_labels.items():
        print(f"{source}: {count} labels are `{value}`, which was not stated; they became null", file=sys.stderr)


def _summary(result: dict[str, Any]) -> str:
    labels = f"{result['hallucinated']} hallucinated, {result['right']} right, {result['unknown']} without label"
    where = f"{result['items']} items ({result['mode']}) in {result['generations']}"
    return f"{where}: {labels}; {result['rejected']} rejected"
