"""The verb `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapwing_training.cli.common import AsJson, Device, Dtype, Model, failures, load_model, tell
from lapwing_training.cli.extract import StoredFeatures, StoredK, stored
from lapwing_training.cli.table_options import Config, SplitName, column_names

if TYPE_CHECKING:
    from lapwing_training.data.columns import Columns
    from lapwing_training.data.data_sets import Source


def generate(
    out: Annotated[Path, typer.Option(help="Generations to write, .jsonl or .jsonl.gz.")],
    questions: Annotated[
        Path | None,
        typer.Argument(help="JSON Lines: id, prompt or messages, references, group, meta; or a table with columns."),
    ] = None,
    model: Model = "",
    dataset: Annotated[str, typer.Option(help="Data set by name or path, instead of a file.")] = "",
    config: Config = "",
    split_name: SplitName = "",
    prompt_column: Annotated[str, typer.Option(help="Of a table: prompts; a.b is field b of the objects in a.")] = "",
    messages_column: Annotated[str, typer.Option(help="Of a table: chat messages, instead of prompts.")] = "",
    references_column: Annotated[str, typer.Option(help="Of a table: accepted answers.")] = "",
    id_column: Annotated[str, typer.Option(help="Of a table: ids; made from the prompts without it.")] = "",
    group_column: Annotated[str, typer.Option(help="Of a table: groups, which never straddle a split.")] = "",
    meta_columns: Annotated[str, typer.Option(help="Of a table: comma-separated columns to keep.")] = "",
    limit: Annotated[int | None, typer.Option(help="Ask only the first so many questions.")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each question.")] = 1,
    few_shot: Annotated[Path | None, typer.Option(help="Text file put around prompts, {prompt} their place.")] = None,
    form: Annotated[str, typer.Option("--as", help="text, or chat: each prompt as one message of a user.")] = "text",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus, in (0, 1].")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 32,
    store: Annotated[Path | None, typer.Option(help="Feature store to fill in the same pass.")] = None,
    features: StoredFeatures = "",
    k: StoredK = None,
    device: Device = "cpu",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """Let a model answer questions. First step of making a probe; goes on where it was killed.

    Next: lapwing label; then, with --store, lapwing extract LABELLED --out STORE, which only adds the labels.

    Example: lapwing generate questions.jsonl --model meta-llama/Llama-3.1-8B --out answers.jsonl --device cuda

    With a data set: lapwing generate --dataset mandarjoshi/trivia_qa --config rc.nocontext --split-name validation
    --prompt-column question --references-column answer.aliases --out answers.jsonl
    """
    from lapwing_training.answers.asking import PLACE, Asking, ask, questions_of, read_few_shot
    from lapwing_training.answers.generate import GenerateOptions, generate_answers, require_target

    with failures("generate"):
        options = GenerateOptions(max_new_tokens, temperature, top_p, seed, batch_size)
        asking = Asking(samples, read_few_shot(few_shot) if few_shot else PLACE, form)
        asking.require_sampling(temperature)
        kept = stored(store, features, k)
        require_target(out)
        source = _source(questions, dataset, config, split_name)
        columns = _columns(
            dataset,
            prompt=prompt_column,
            messages=messages_column,
            references=references_column,
            id=id_column,
            group=group_column,
            meta=meta_columns,
        )
        asked = ask(questions_of(source, columns, limit), asking)
        loaded = load_model(model, dtype, device)
        result = generate_answers(asked, out, loaded, options, store, kept.features, kept.k)
        tell(result, as_json, f"{result['answers']} answers in {out} ({result['resumed']} from an earlier run)")


def _source(questions: Path | None, dataset: str, config: str, split_name: str) -> Source:
    from lapwing_training.data.data_sets import Source
    from lapwing_training.errors import InvalidOption

    if bool(questions) == bool(dataset):
        raise InvalidOption(f"questions are `{questions or ''}` and dataset is `{dataset}`; give one of the two")
    return Source(dataset or str(questions), config, split_name)


def _columns(dataset: str, *, meta: str, **named: str) -> Columns | None:
    """None where the questions are in our own form: nothing is said of a table."""
    from lapwing_training.data.columns import Columns

    if not (dataset or meta or any(named.values())):
        return None
    return Columns(meta=column_names(meta), **named)
