"""The doctor's look at the tokenizer: exactly one beginning-of-sequence token, with chat template and without."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lapwing_detector.doctor.patient import TEXT, Patient
from lapwing_detector.doctor.verdict import Check
from lapwing_detector.tokens import Prompt, build_ids

PROMPTS: dict[str, Prompt] = {"text": TEXT, "messages": [{"role": "user", "content": TEXT}]}

DOUBLED = (
    "tokenizer(text) of the chat template's text has BOS twice; where you make ids yourself, use "
    "tokenizer(text, add_special_tokens=False). The ids that are made here have it once"
)


def check_bos(patient: Patient) -> Check:
    """One BOS token in front of a text and of chat messages, if the tokenizer puts one there.

    A second one would split the attention sink and move every statistic.

    Raises:
        InvalidInput: the chat template refuses a user's message.
    """
    tokenizer = patient.language_model.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None:
        return Check("bos", "ok", "the tokenizer has no BOS token, so none is doubled", {"bos": None})
    adds = bos in tokenizer("a")["input_ids"]
    shown = {what: one for what, one in PROMPTS.items() if what == "text" or tokenizer.chat_template is not None}
    ids = {what: build_ids(tokenizer, prompt).prompt_ids for what, prompt in shown.items()}
    faults = {what: fault for what, one in ids.items() if (fault := bos_fault(one, bos, adds, what == "text"))}
    counts = {what: one.count(bos) for what, one in ids.items()}
    said = (
        f"{tokenizer.bos_token!r} (id {bos}) {'' if adds else 'is not put in front by the tokenizer: '}"
        + ", ".join(f"{count} in {what}" for what, count in counts.items())
        + ("" if "messages" in ids else "; there is no chat template")
    )
    if faults:
        said = "; ".join(f"{what}: {fault}" for what, fault in faults.items()) + f"; {said}"
    again = tokenised_again(tokenizer) if "messages" in ids else ()
    numbers = {
        "bos": bos,
        "put_in_front": adds,
        "counts": counts,
        "chat_template": "messages" in ids,
        "tokenised_again": again.count(bos),
    }
    note = DOUBLED if (bos, bos) in pairwise(again) else ""
    return Check("bos", "failed" if faults else "ok", said, numbers, note)


def tokenised_again(tokenizer: Any) -> tuple[int, ...]:
    """The chat template's text as a plain text: what those get who leave special tokens to the tokenizer."""
    text = tokenizer.apply_chat_template(PROMPTS["messages"], tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text)["input_ids"])


def bos_fault(ids: tuple[int, ...], bos: int, adds: bool, is_text: bool) -> str | None:
    """What is wrong with the BOS tokens of a prompt; None if nothing is.

    Args:
        ids: of the prompt.
        bos: the token.
        adds: whether the tokenizer puts it in front. Otherwise a template may use it as it likes, such as to mark
            every turn.
        is_text: whether the prompt is plain text.
    """
    count = ids.count(bos)
    if (bos, bos) in pairwise(ids):
        return "BOS stands twice, one behind the other"
    if adds and count != 1:
        return f"BOS stands {count} times; once is right"
    if adds and ids[0] != bos:
        return "BOS does not stand in front"
    return "BOS is there, and the tokenizer puts none" if is_text and not adds and count else None
