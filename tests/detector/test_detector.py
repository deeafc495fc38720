"""The detector on the embedded model: what it says alone, in a batch, and while writing is one and the same."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lapwing_detector.answer_text import TextStream
from lapwing_detector.calibration import Calibration, StageCalibration
from lapwing_detector.capture import capture_attention
from lapwing_detector.choosing import Chooser, choose
from lapwing_detector.detection import Detection, Reason, State
from lapwing_detector.detector import Detector
from lapwing_detector.embedded import model_path
from lapwing_detector.errors import InvalidInput, ProbeMismatch, TooLong, UnsupportedModel
from lapwing_detector.generation import GeneratedToken, Generation
from lapwing_detector.identity import identity_of
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from tests.detector.probes import random_probe
from tests.detector.tiny_models import LONG, long_model, token_ids

QUESTION = "Question: which country is the city of Lyon in? Answer:"


@pytest.fixture(scope="module")
def detector() -> Detector:
    loaded = LanguageModel.load()
    probe = random_probe(layers=6, heads=8, k=10, identity=loaded.identity)
    return Detector.from_pretrained(loaded.model, probe, tokenizer=loaded.tokenizer)


def last(detector: Detector, prompt, **options) -> tuple[list[GeneratedToken], Generation]:
    *tokens, generation = detector.generate(prompt, **options)
    assert all(isinstance(token, GeneratedToken) for token in tokens)
    assert isinstance(generation, Generation)
    return tokens, generation


def test_a_detection_accounts_for_itself(detector):
    detection = detector.score(QUESTION, "France", false_positive_rate=0.1)
    assert detection.state is State.SCORED
    assert detection.probability == detector.probe.calibration.probability(detection.logit)
    assert detection.flagged == (detection.logit > 0.5)
    assert detection.token_contributions.sum() == pytest.approx(detection.logit - detection.bias, abs=1e-5)
    contributions = [head.contribution for head in detection.head_contributions]
    assert sum(contributions) == pytest.approx(detection.logit - detection.bias, abs=1e-5)
    assert contributions == sorted(contributions, key=lambda share: -abs(share))
    assert len(contributions) == detector.probe.selected.sum()
    assert len(detection.token_ids) == detection.prompt_tokens + detection.response_tokens
    assert detection.probe_revision == detector.probe.revision
    assert set(detection.seconds) == {"tokenise", "forward", "probe"}


def test_text_messages_and_ids_of_the_same_words_score_the_same(detector):
    by_text = detector.score(QUESTION, "France")
    question = QUESTION.removeprefix("Question: ").removesuffix(" Answer:")
    by_chat = detector.score([{"role": "user", "content": question}], "France")
    ids = detector.tokens(QUESTION, "France")
    by_ids = detector.score(ids.prompt_ids, ids.response_ids)
    assert by_text.token_ids == by_chat.token_ids == by_ids.token_ids
    assert by_text.logit == by_chat.logit == by_ids.logit
    assert detector.score(QUESTION, "Peru").logit != by_text.logit


def test_each_item_of_a_batch_is_scored_as_alone_and_a_bad_one_fails_alone(detector):
    items = [(QUESTION, "France"), ("", ""), (QUESTION, "a much longer answer than the other ones have"), ([1], [2])]
    first, bad, second, short = detector.score_batch(items)
    assert isinstance(bad, InvalidInput)
    assert bad.field == "prompt"
    # Padding changes the order of float32 sums only.
    assert first.logit == pytest.approx(detector.score(*items[0]).logit, abs=1e-5)
    assert second.logit == pytest.approx(detector.score(*items[2]).logit, abs=1e-5)
    assert (short.state, short.reason) == (State.UNSCORED, Reason.TOO_SHORT)
    assert detector.score_batch([]) == []


def test_one_probe_scores_a_whole_batch_though_another_is_set_meanwhile(detector, monkeypatch):
    loaded = LanguageModel(detector.model, detector.tokenizer)
    first, second = (replace(detector.probe, name=name) for name in ("first", "second"))
    swapped = Detector(loaded, first)
    read = LanguageModel.summaries

    def swap_and_read(model, sequences, heads):
        swapped.probe = second
        return read(model, sequences, heads)

    monkeypatch.setattr(LanguageModel, "summaries", swap_and_read)
    assert {one.probe_name for one in swapped.score_batch([(QUESTION, "France"), (QUESTION, "Peru")])} == {"first"}
    assert swapped.score(QUESTION, "France").probe_name == "second"


def test_too_short_is_said_and_never_reads_as_a_score(detector):
    detection = detector.score([1, 2, 3], [4])
    assert (detection.state, detection.reason) == (State.UNSCORED, Reason.TOO_SHORT)
    assert detection.probability is detection.logit is detection.flagged is None
    assert "4 tokens; the probe needs 10" in detection.message
    assert detection.flagged_at == ()


def test_no_response_is_no_score_since_there_is_nothing_that_could_be_made_up(detector):
    for response in ("", [], [detector.tokenizer.eos_token_id]):
        detection = detector.score(QUESTION, response)
        assert (detection.state, detection.reason) == (State.UNSCORED, Reason.TOO_SHORT)
        assert "no tokens" in detection.message
    # Control: one token of a response is scored.
    assert detector.score(QUESTION, [5]).state is State.SCORED


def test_the_end_of_sequence_token_that_generate_leaves_behind_is_not_scored(detector):
    ids = detector.tokens(QUESTION, "France")
    end = detector.tokenizer.eos_token_id
    alone = detector.score(ids.prompt_ids, ids.response_ids)
    assert detector.score(ids.prompt_ids, (*ids.response_ids, end, end)).logit == alone.logit
    # One inside is content.
    assert detector.score(ids.prompt_ids, (end, *ids.response_ids)).token_ids[len(ids.prompt_ids)] == end


def test_special_tokens_spelt_out_in_an_answer_are_text(detector):
    written = detector.tokens(QUESTION, "<s> France </s>").response_ids
    assert not set(written) & {detector.tokenizer.bos_token_id, detector.tokenizer.eos_token_id}


def test_ids_beyond_the_model_are_refused_before_it_runs(detector):
    tokenizer = copy.deepcopy(detector.tokenizer)
    tokenizer.add_tokens(["lapwing"])
    probe = replace(detector.probe, identity=identity_of(detector.model, tokenizer))
    other = Detector(LanguageModel(detector.model, tokenizer), probe)
    with pytest.raises(InvalidInput, match="the tokenizer that belongs to it"):
        other.score("a lapwing lives here", "yes")


def test_a_model_in_training_mode_is_refused(detector):
    training = copy.deepcopy(detector.model).train()
    with pytest.raises(InvalidInput, match=r"model\.eval\(\)"):
        LanguageModel(training, detector.tokenizer)


def test_attention_that_is_not_finite_is_said(detector):
    broken = copy.deepcopy(detector.model)
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.weight.fill_(float("nan"))
    probe = random_probe(layers=6, heads=8, k=10, identity=identity_of(broken, detector.tokenizer))
    other = Detector(LanguageModel(broken, detector.tokenizer), probe)
    for options in ({}, {"temperature": 1.0, "seed": 0}):
        *_, generation = other.generate(QUESTION, max_new_tokens=2, **options)
        assert generation.detection.state is State.UNSCORED
    detection = other.score(QUESTION, "France")
    assert (detection.state, detection.reason) == (State.UNSCORED, Reason.NON_FINITE)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.0, "top_p": 0.5, "seed": 1}]
)
def test_every_running_score_is_the_score_of_that_prefix_read_at_once(detector, options):
    tokens, generation = last(detector, QUESTION, max_new_tokens=12, **options)
    ids = detector.tokens(QUESTION).prompt_ids
    for token in tokens:
        prefix = generation.token_ids[: token.index + 1]
        assert prefix[-1] == token.token_id
        # Step by step and at once sum in another order; 1e-4 is what float32 allows for it.
        assert token.logit == pytest.approx(detector.score(ids, prefix).logit, abs=1e-4)
    assert generation.detection.logit == pytest.approx(detector.score(ids, generation.token_ids).logit, abs=1e-4)
    assert generation.detection.token_ids == ids + generation.token_ids
    assert "".join(token.text for token in tokens) == generation.text


def test_the_running_score_moves(detector):
    tokens, _ = last(detector, "Question: which time zone is the city of Paris in? Answer:")
    assert len({token.logit for token in tokens}) == len(tokens) > 1


def test_greedy_writing_is_that_of_transformers(detector):
    _, generation = last(detector, QUESTION, max_new_tokens=12)
    ids = torch.tensor([detector.tokens(QUESTION).prompt_ids])
    theirs = detector.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    theirs = [token for token in theirs[0, ids.shape[1] :].tolist() if token != detector.tokenizer.eos_token_id]
    assert list(generation.token_ids) == theirs


def test_a_seed_repeats_and_another_seed_does_not(detector):
    texts = [last(detector, QUESTION, temperature=3.0, seed=seed, max_new_tokens=8)[1].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_log_probabilities_are_those_of_the_model_whatever_the_temperature(detector):
    tokens, generation = last(detector, QUESTION, temperature=2.0, seed=1, max_new_tokens=4)
    ids = torch.tensor([(*generation.prompt_ids, *generation.token_ids)])
    logits = detector.model(ids).logits[0].log_softmax(-1)
    at = len(generation.prompt_ids) - 1
    for token in tokens:
        assert token.log_probability == pytest.approx(logits[at + token.index, token.token_id].item(), abs=1e-4)


def test_generations_take_turns_with_each_other_and_with_scores(detector):
    alone = [last(detector, QUESTION, temperature=1.0, seed=seed, max_new_tokens=6)[1] for seed in (1, 2)]
    running = [iter(detector.generate(QUESTION, temperature=1.0, seed=seed, max_new_tokens=6)) for seed in (1, 2)]
    between = detector.score(QUESTION, "France").logit
    results: list = [None, None]
    while any(not isinstance(result, Generation) for result in results):
        for index, generation in enumerate(running):
            results[index] = next(generation, results[index])
        assert detector.score(QUESTION, "France").logit == between
    for mine, theirs in zip(results, alone, strict=True):
        assert (mine.token_ids, mine.detection.logit) == (theirs.token_ids, theirs.detection.logit)


def test_leaving_the_iterator_leaves_the_model_as_it_was(detector):
    before = detector.model.config._attn_implementation
    generation = detector.generate(QUESTION)
    next(generation)
    assert detector.model.config._attn_implementation == before
    generation.close()
    assert detector.model.config._attn_implementation == before


def test_the_end_is_named(detector):
    assert last(detector, QUESTION, max_new_tokens=1)[1].finish_reason == "length"
    assert last(detector, QUESTION, max_new_tokens=40)[1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": None}, "max_new_tokens"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused_before_anything_runs(detector, options, field):
    with pytest.raises(InvalidInput) as caught:
        detector.generate(QUESTION, **options)
    assert caught.value.field == field


def test_more_than_the_context_is_refused_by_field(detector):
    with pytest.raises(TooLong) as caught:
        detector.score([5] * 10, [6] * 247)
    assert caught.value.field == "response"
    assert "257 tokens" in str(caught.value)
    assert detector.score([5] * 10, [6] * 246).state is State.SCORED
    with pytest.raises(TooLong) as caught:
        detector.generate([5] * 256)
    assert caught.value.field == "prompt"


def test_no_temperature_is_too_low_to_sample_with(detector):
    greedy = last(detector, QUESTION, max_new_tokens=4)[1]
    assert last(detector, QUESTION, max_new_tokens=4, temperature=1e-38, seed=0)[1].token_ids == greedy.token_ids


def test_the_pieces_of_text_always_make_up_the_whole(detector):
    # At this temperature bytes come in any order, so that many answers end inside a character.
    for seed in range(30):
        tokens, generation = last(detector, QUESTION, max_new_tokens=6, temperature=50.0, seed=seed)
        assert "".join(token.text for token in tokens) == generation.text


def test_a_generation_ends_where_the_context_ends(detector):
    tokens, generation = last(detector, [1, *[5] * 250], temperature=2.0, seed=0, max_new_tokens=50)
    assert len(generation.prompt_ids) + len(tokens) <= 256


def test_characters_of_several_tokens_come_whole(detector):
    text = " Zürich 東京 🐦 end"
    ids = detector.tokenizer(text, add_special_tokens=False).input_ids
    stream = TextStream(detector.tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == detector.tokenizer.decode(ids)
    assert "" in pieces  # the first bytes of a character give nothing yet
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_foreign_model_is_refused(detector):
    other = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1e-3)
    with pytest.raises(ProbeMismatch, match="weights"):
        Detector(LanguageModel(other, detector.tokenizer), detector.probe)


def test_another_dtype_warns_and_scores(detector):
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="fitted in float32, the model runs in bfloat16"):
        other = Detector(LanguageModel(model, detector.tokenizer), detector.probe)
    assert isinstance(other.score(QUESTION, "France"), Detection)


def test_the_embedded_model_runs_in_float32_though_it_is_stored_in_float16():
    loaded = LanguageModel.load()
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training


def test_a_model_without_a_probe_or_a_tokenizer_says_what_is_missing(detector):
    with pytest.raises(InvalidInput, match="lapwing train"):
        Detector.from_pretrained(detector.model)
    with pytest.raises(InvalidInput, match="tokenizer"):
        Detector.from_pretrained(detector.model, detector.probe)


def test_a_model_that_lacks_weights_is_refused_and_not_filled_with_random_ones(detector, tmp_path):
    detector.model.save_pretrained(tmp_path)
    detector.tokenizer.save_pretrained(tmp_path)
    assert LanguageModel.load(tmp_path).model.config.num_hidden_layers == 6
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(InvalidInput, match=r"lacks \d+ of its weights, such as model\.layers\.6"):
        LanguageModel.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InvalidInput, match="can't be loaded"):
        LanguageModel.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),  # whose package is not here
        ({"num_hidden_layers": "six"}, "can't be loaded as a causal language model: "),
        ({"rope_parameters": 3}, "can't be loaded as a causal language model: "),
    ],
)
def test_a_model_that_transformers_cannot_load_is_refused_in_words(detector, tmp_path, change, said):
    detector.model.save_pretrained(tmp_path)
    detector.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InvalidInput, match=said) as caught:
        LanguageModel.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_device_or_dtype_that_is_none_is_refused():
    with pytest.raises(InvalidInput, match="bogus"):
        LanguageModel.load(device="bogus")
    with pytest.raises(InvalidInput, match="float32, bfloat16, float16"):
        LanguageModel.load(dtype="float64")


def test_a_tokenizer_that_brings_code_is_never_run(detector, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask for
    detector.model.save_pretrained(tmp_path)
    detector.tokenizer.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    described |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with contextlib.suppress(InvalidInput):
        LanguageModel.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_models_that_are_none_or_bring_code_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="can't be loaded"):
        LanguageModel.load(tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "evil.py"}}')
    with pytest.raises(UnsupportedModel, match="auto_map"):
        LanguageModel.load(tmp_path)


def test_sampling_takes_only_the_likeliest_tokens_under_top_p():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    chooser = Chooser(GenerationOptions(temperature=1.0, top_p=0.5, seed=0))
    assert {choose([chooser], logits)[0][0] for _ in range(50)} == {0}
    chooser = Chooser(GenerationOptions(temperature=1.0, seed=0))
    drawn = np.bincount([choose([chooser], logits)[0][0] for _ in range(400)], minlength=3) / 400
    assert drawn == pytest.approx([0.6, 0.3, 0.1], abs=0.1)  # four standard errors


def test_a_long_text_in_the_batch_does_not_change_the_frequencies_of_a_short_one(detector):
    loaded = LanguageModel(long_model("longrope"), detector.tokenizer)
    short, long = token_ids(1, LONG - 5)[0].tolist(), token_ids(1, LONG + 9)[0].tolist()
    alone = loaded.summaries([short])[0].received
    assert np.array_equal(loaded.summaries([short, long])[0].received, alone)
    # Control: in one padded forward it would read with those of the long one.
    rows = torch.tensor([short + [0] * 14, long])
    mask = torch.tensor([[1] * len(short) + [0] * 14, [1] * len(long)])
    with capture_attention(loaded.model) as captured, torch.no_grad():
        loaded.model(rows, attention_mask=mask)
    assert abs(captured.summaries()[0].received - alone).max() > 1e-2


def test_while_writing_the_calibration_of_the_stage_speaks(detector, monkeypatch):
    stages = (StageCalibration(0.25, 1.0, 3.0, -1.0), StageCalibration(0.5, 2.0, 0.1, 0.5))
    monkeypatch.setattr(detector, "_probe", replace(detector.probe, stages=stages))
    tokens, generation = last(detector, QUESTION, max_new_tokens=3, temperature=5.0, seed=3)
    scored = [token for token in tokens if token.logit is not None]
    assert len(scored) == 3, "the question alone has enough tokens"
    first, second, third = scored
    assert first.probability == Calibration(3.0, -1.0).probability(first.logit)
    assert second.probability == Calibration(0.1, 0.5).probability(second.logit)
    # The last token is told with the detection, which is of the finished answer.
    assert third.probability == generation.detection.probability
    assert third.probability == detector.probe.calibration.probability(third.logit)


@pytest.mark.parametrize(("mode", "warned"), [("supplied", 1), ("generated", 0)])
def test_a_probe_of_supplied_texts_warns_before_it_scores_what_the_model_writes(detector, monkeypatch, mode, warned):
    monkeypatch.setattr(detector, "_probe", replace(detector.probe, training={"mode": mode}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        last(detector, QUESTION, max_new_tokens=1)
        detector.score(QUESTION, "France")
    assert sum("only read" in str(one.message) for one in seen) == warned
