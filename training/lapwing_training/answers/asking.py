"""From questions to what is asked: several samples of each, examples before it, as text or as chat. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lapwing_training.data.columns import Columns
from lapwing_training.data.data_sets import Source
from lapwing_training.data.generations import Question, read_questions
from lapwing_training.data.importing import kind_of, questions_of_table
from lapwing_training.errors import InvalidData, InvalidOption

FORMS = ("text", "chat")
PLACE = "{prompt}"
"""Where the question goes in a file of examples."""


@dataclass(frozen=True)
class Asking:
    """How questions are put to a model."""

    samples: int = 1
    """Answers to each question."""

    few_shot: str = PLACE
    """Text around every prompt."""

    form: str = "text"
    """`text`, or `chat` for prompts as one message of a user; what is chat messages already stays so."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InvalidOption(f"samples is {self.samples}; it must be at least 1")
        if self.form not in FORMS:
            raise InvalidOption(f"form is `{self.form}`; known are {', '.join(FORMS)}")

    def require_sampling(self, temperature: float) -> None:
        """Several samples are worth asking for.

        Raises:
            InvalidOption: they would all be the same.
        """
        if self.samples > 1 and temperature == 0.0:
            raise InvalidOption(
                f"samples is {self.samples} at temperature 0, where they are all the same; "
                "raise the temperature or ask for one"
            )


def ask(questions: Sequence[Question], asking: Asking) -> list[Question]:
    """What is asked, the samples of a question one after the other with ids `q#0`, `q#1`, ...

    Whatever is put around a prompt, its group stays that of the bare question.

    Raises:
        InvalidData: examples can't be put before chat messages.
    """
    asked = [_asked(question, asking) for question in questions]
    if asking.samples == 1:
        return asked
    return [replace(one, id=f"{one.id}#{number}") for one in asked for number in range(asking.samples)]


def read_few_shot(path: Path) -> str:
    """Examples with `{prompt}` where the question goes; the end of the file's last line is no part of them.

    Raises:
        InvalidData: it can't be read, or the place of the question is not named exactly once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(path, None, f"can't be read: {error}; expected a text file in UTF-8") from error
    if text.count(PLACE) != 1:
        raise InvalidData(path, None, f"holds {PLACE} {text.count(PLACE)} times; put it once, where the question goes")
    return text.removesuffix("\n")


def questions_of(source: Source, columns: Columns | None, limit: int | None = None) -> list[Question]:
    """Questions of a table, or of our own JSON Lines where no columns are named; at most the first `limit`.

    Raises:
        InvalidOption: a column is not there, or the limit is less than 1.
        InvalidData: the questions can't be read.
    """
    if limit is not None and limit < 1:
        raise InvalidOption(f"limit is {limit}; it must be at least 1")
    if columns is not None:
        return questions_of_table(source, columns, limit)
    if kind_of(Path(source.name)) in (".csv", ".parquet"):
        raise InvalidOption(f"{source.name} is a table; name the column of its prompts or chat messages")
    return read_questions(source.name)[:limit]


def _asked(question: Question, asking: Asking) -> Question:
    if asking.few_shot == PLACE and (asking.form == "text" or question.prompt is None):
        return question
    if question.prompt is None:
        raise InvalidData(
            f"item `{question.id}`", None, "holds chat messages; examples go before prompts only: leave one of them out"
        )
    prompt = asking.few_shot.replace(PLACE, question.prompt)
    grouped = replace(question, group=question.group_or_prompt, prompt=prompt)
    return replace(grouped, prompt=None, messages=_chat(prompt)) if asking.form == "chat" else grouped


def _chat(prompt: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": prompt},)
