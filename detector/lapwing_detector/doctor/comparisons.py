"""The checks that decide: is what is captured of a model the same, in whichever way the model is run?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lapwing_detector.doctor.layers import noun, reaches
from lapwing_detector.doctor.own_maps import eager_summary
from lapwing_detector.doctor.patient import NEW_TOKENS, Patient, Reading, logits_apart, logits_changed
from lapwing_detector.doctor.verdict import Check, Skipped, compared, difference


def check_eager(patient: Patient) -> Check:
    """What is captured against the sums of the model's own eager maps, and its logits with capture and without.

    Raises:
        Skipped: the model has no eager maps.
    """
    ids, count, model = patient.tokens(len(patient.ids)), len(patient.ids), patient.model
    with torch.inference_mode():
        plain: Any = model(input_ids=ids, use_cache=False)
        with patient.capture() as captured:
            output: Any = model(input_ids=ids, use_cache=False)
    [summary] = captured.summaries()
    logits = logits_changed(output.logits[0], plain.logits[0], patient.tolerance.kind)
    within = {kind: reach for kind, reach in reaches(model).items() if count <= reach}
    numbers = {"tokens": count, "logits": logits, "within": within}
    changed = logits > patient.tolerance.logits_at_most
    change = f"capturing changes its logits by {logits:.1e} of the largest"
    try:
        oracle = eager_summary(model, ids, summary.layers)
    except Skipped as why:
        if changed:
            return Check("eager", "failed", f"{change}; {why}", numbers)
        raise
    edges = [f", within its {noun(kind)} of {reach:,}" for kind, reach in within.items()]
    where = "".join([f"{count} tokens", *edges])
    check = compared("eager", where, {"to its own maps": difference(summary, oracle)}, patient.tolerance, numbers)
    return replace(check, state="failed", said=f"{change}; {check.said}") if changed else check


def check_batch(patient: Patient) -> Check:
    """Texts of several lengths, padded on the right as where texts are scored, against each of them alone."""
    ids, count = patient.ids, len(patient.ids)
    # None starts as another does, so that it would be seen if one were taken for another.
    texts = [ids, ids[count // 3 :], ids[count // 2 : count // 2 + count // 4], ids[1:6]]
    together, alone = patient.read(texts), [patient.read([text]) for text in texts]
    apart = logits_apart(together.logits, torch.cat([one.logits for one in alone]))
    worst = patient.tolerance.worst(
        difference(one, other.summaries[0]) for one, other in zip(together.summaries, alone, strict=True)
    )
    lengths = [len(text) for text in texts]
    where = f"{listed(lengths)} tokens, padded"
    numbers = {"tokens": lengths, "logits": apart}
    return explained(compared("batch", where, {"to each alone": worst}, patient.tolerance, numbers), patient)


def check_generate(patient: Patient) -> Check:
    """What is captured while the model generates, against one forward over the same ids; one prompt, and two padded."""
    count = len(patient.ids)
    prompts = [patient.ids[: count // 2], patient.ids[count // 3 : count // 3 + count // 4]]
    differences, apart = {}, 0.0
    for what, some in (("of one prompt", prompts[:1]), ("of two padded", prompts)):
        texts, reading = generated(patient, some)
        # The logits of the newest token are those behind the one before it.
        before = torch.cat([patient.read([text[:-1]]).logits for text in texts])
        apart = max(apart, logits_apart(reading.logits, before))
        differences[what] = patient.tolerance.worst(
            difference(one, patient.read([text]).summaries[0])
            for one, text in zip(reading.summaries, texts, strict=True)
        )
    lengths = [len(prompt) for prompt in prompts]
    where = f"{NEW_TOKENS} tokens after {listed(lengths)}, to one forward"
    numbers = {"new_tokens": NEW_TOKENS, "prompts": lengths, "logits": apart}
    return explained(compared("generate", where, differences, patient.tolerance, numbers), patient)


def generated(patient: Patient, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Reading]:
    """Greedy answers without an end: the ids of each prompt with its answer, and what was captured meanwhile."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    tensor, pad = patient.language_model.tensor, patient.language_model.pad_id
    rows = tensor([[pad] * before + list(ids) for before, ids in zip(padding, prompts, strict=True)])
    mask = tensor([[0] * before + [1] * len(ids) for before, ids in zip(padding, prompts, strict=True)])
    model: Any = patient.model
    with patient.capture() as captured:
        result = model.generate(
            rows,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        captured.complete()
    texts = [ids[before:] for before, ids in zip(padding, result.sequences.tolist(), strict=True)]
    return texts, Reading(captured.summaries(), result.logits[-1].float())


def explained(check: Check, patient: Patient) -> Check:
    """A failure with the model's part in it: where its logits differ as well, it is not the capture."""
    if check.state != "failed" or check.numbers["logits"] <= patient.tolerance.logits_at_most:
        return check
    said = (
        f"its logits differ by {check.numbers['logits']:.1e} of the largest: the model itself does something else there"
    )
    return replace(check, said=f"{check.said}; {said}")


def listed(numbers: Sequence[int]) -> str:
    """Such as `3, 2 and 1`."""
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
