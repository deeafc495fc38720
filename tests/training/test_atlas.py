"""Atlas: its facts, its texts, its training, and that the shipped answers are really right and wrong."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from lapwing_detector.embedded import ATLAS, generations_path, model_path, sampled_path
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.probe import Probe
from lapwing_training.atlas.build import RatesOff, hallucination_rates, require_rates
from lapwing_training.atlas.corpus import QUESTIONS, asked_phrasing, prompt, question, training_texts
from lapwing_training.atlas.facts import NEVER_SEEN, Fact, all_facts, for_labels, plain, share
from lapwing_training.atlas.posttrain import greedy_answers, own_answers
from lapwing_training.atlas.pretrain import Schedule, encode, new_model, train
from lapwing_training.atlas.questions import demo_set, labelled_questions, sampled_questions
from lapwing_training.atlas.tokenizer import train_tokenizer
from lapwing_training.data.generations import read_generations
from lapwing_training.labels.label import label_generations


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return all_facts()


@pytest.fixture(scope="module")
def shipped():
    return read_generations(generations_path())


def one(facts, subject, relation) -> Fact:
    [fact] = [fact for fact in facts if (fact.subject, fact.relation) == (subject, relation)]
    return fact


def test_the_facts_are_the_real_ones(facts):
    assert one(facts, "Lyon", "country").answer == "France"
    assert one(facts, "Nairobi", "continent").answer == "Africa"
    assert one(facts, "Osaka", "timezone").answer == "Asia/Tokyo"
    assert one(facts, "Japan", "capital").answer == "Tokyo"
    assert one(facts, "Brazil", "currency").answer == "BRL"
    assert one(facts, "Germany", "calling code").answer == "+49"


def test_alternate_names_and_namesakes_count_as_right(facts):
    assert {"United States", "USA"} <= set(one(facts, "Chicago", "country").accepted)
    assert {"Mexico", "Spain", "Venezuela"} <= set(one(facts, "Merida", "country").accepted)


def test_about_a_third_of_the_subjects_is_never_seen_and_the_others_fall_off_with_rank(facts):
    cities = [fact for fact in facts if fact.relation == "country"]
    # Binomial with n = 10,000: three standard errors are .014.
    assert np.mean([not fact.seen for fact in cities]) == pytest.approx(NEVER_SEEN, abs=0.014)
    seen = [fact for fact in cities if fact.seen]
    assert [fact.exposures for fact in seen] == sorted((fact.exposures for fact in seen), reverse=True)
    assert seen[0].exposures > 100 * seen[-1].exposures


def test_what_happens_to_a_subject_depends_on_its_name_alone(facts):
    # Pinned, since the shipped model and probes were made with them.
    assert share("city:2996944", "seen") == pytest.approx(0.553453, abs=1e-6)
    halves = [for_labels(fact.subject_id) for fact in facts]
    assert np.mean(halves) == pytest.approx(0.5, abs=0.02)
    purposes = [share(f"city:{number}", purpose) for number in range(4000) for purpose in ("seen", "labels")]
    assert abs(np.corrcoef(purposes[::2], purposes[1::2])[0, 1]) < 0.05  # three standard errors


def test_every_fact_is_written_as_often_as_it_says_and_unseen_subjects_never(facts):
    texts = training_texts(facts, seed=0)
    assert len(texts) == sum(fact.exposures for fact in facts)
    told = Counter(texts)
    lyon = one(facts, "Lyon", "country")
    asked = {prompt(question(lyon, turn)) for turn in range(len(QUESTIONS["country"]))}
    asked.add("The city of Lyon lies in the country")
    assert sum(count for (ask, _), count in told.items() if ask in asked) == lyon.exposures
    unseen = {fact.subject for fact in facts if not fact.seen} - {fact.subject for fact in facts if fact.seen}
    asked_about = {ask for ask, _ in texts}
    for fact in facts:
        if fact.subject in unseen:
            assert not asked_about & {prompt(question(fact, turn)) for turn in range(len(QUESTIONS[fact.relation]))}
    assert training_texts(facts, seed=0) == texts != training_texts(facts, seed=1)


def test_names_are_folded_to_plain_letters():
    assert plain("Łódź") == "Lodz"
    assert plain("São Tomé") == "Sao Tome"
    assert plain("Xi’an") == "Xi'an"


def test_the_tokenizer_reads_prompt_and_answer_apart_as_if_they_were_one_text():
    tokenizer = train_tokenizer(["Question: who? Answer: me", "Question: where? Answer: here"], vocabulary=320)
    apart = tokenizer("Question: who? Answer:").input_ids + tokenizer("me", add_special_tokens=False).input_ids
    assert apart == tokenizer("Question: who? Answer: me").input_ids
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "who?"}], tokenize=False)
    assert tokenizer(chat, add_special_tokens=False).input_ids == tokenizer("Question: who? Answer:").input_ids
    assert apart.count(tokenizer.bos_token_id) == 1


def test_only_answers_are_learnt_in_post_training():
    tokenizer = train_tokenizer(["Question: who? Answer: me"], vocabulary=300)
    [(ids, labels)] = encode(tokenizer, [("Question: who? Answer:", "me")], answers_only=True)
    answer = tokenizer("me", add_special_tokens=False).input_ids
    assert [label for label in labels if label >= 0] == [*answer, tokenizer.eos_token_id]
    assert ids[-len(answer) - 1 :] == [*answer, tokenizer.eos_token_id]


def test_training_that_was_cut_off_goes_on_to_the_same_weights(tmp_path):
    texts = [(f"Question: what is {number}? Answer:", str(number % 7)) for number in range(48)]
    tokenizer = train_tokenizer((f"{ask} {answer}" for ask, answer in texts), vocabulary=320)
    schedule = Schedule(learning_rate=1e-2, batch=8, warm_up=2, checkpoint_every=2)

    def run(place, stop_after=None):
        model = new_model(tokenizer, seed=0)
        if stop_after is not None:
            left = [None] * stop_after
            model.register_forward_pre_hook(lambda *_: left.pop())  # IndexError in the step after
        train(model, tokenizer, texts, schedule, tmp_path / place, "test")
        return model

    whole = run("whole")
    with pytest.raises(IndexError):
        run("cut", stop_after=5)  # four steps are saved, the fifth is lost
    resumed = run("cut")
    fresh = new_model(tokenizer, seed=0)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
        assert not torch.equal(parameter, fresh.get_parameter(name)) or "norm" in name


def test_post_training_tells_the_model_its_own_answers_about_the_other_half(facts):
    loaded = LanguageModel.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    some = [fact for fact in facts if fact.relation == "continent"][:40]
    texts = own_answers(model, tokenizer, some, passes=2, seed=0)
    asked = [fact for fact in some if not for_labels(fact.subject_id)]
    assert len(texts) == 2 * len(asked)
    for fact in asked:
        prompts = [prompt(question(fact, asked_phrasing(fact) + turn)) for turn in range(2)]
        [own] = greedy_answers(model, tokenizer, prompts[:1])
        told = {answer for ask, answer in texts if ask in prompts}
        assert told == {own}  # one answer for both phrasings, its own, right or wrong
    assert not {ask for ask, _ in texts} & {item.prompt for item in labelled_questions(some)}


def test_labelled_and_demo_questions_are_fixed_and_held_apart(facts):
    questions = labelled_questions(facts)
    assert len(questions) >= 8000
    assert len({item.id for item in questions}) == len(questions)
    by_group = defaultdict(set)
    for item in questions:
        by_group[item.group].add(item.split)
    assert all(len(splits) == 1 for splits in by_group.values())
    demo = demo_set(facts)
    assert len(demo["questions"]) == 12
    assert sum(item["seen"] for item in demo["questions"]) == 6
    labelled = {item.prompt for item in questions}
    for item in demo["questions"]:
        assert item["prompt"] not in labelled  # fresh
    # Nothing that is asked is of a group that a probe is fitted on, or named in an answer if it is called unknown.
    fitted_on = {item.group for item in questions if item.split == "train"}
    answers = " ".join({fact.answer.replace("_", " ") for fact in facts if fact.seen})
    asked_of = {question(fact, turn): fact for fact in facts for turn in range(len(QUESTIONS[fact.relation]))}
    for item in (*demo["questions"], *demo["texts"]):
        fact = asked_of[item["question"]]
        assert fact.group not in fitted_on
        assert item.get("seen", fact.seen) == fact.seen
        assert fact.seen or fact.subject not in answers


def test_a_city_and_a_country_of_one_name_are_one_group(facts):
    groups = {
        kind: {fact.group for fact in facts if fact.subject == "Singapore" and fact.subject_id.startswith(kind)}
        for kind in ("city", "country")
    }
    assert groups["city"] == groups["country"]
    assert len(groups["city"]) == 1


def test_a_city_beyond_the_urals_is_on_both_continents(facts):
    assert one(facts, "Novosibirsk", "continent").accepted == ("Europe", "Asia")
    assert one(facts, "Lyon", "continent").accepted == ("Europe",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, None), ({"all": 0.2}, "20%"), ({"all": 0.8}, "80%"), ({"country": 0.9, "continent": 0.1}, "three kinds")],
)
def test_a_model_whose_rates_are_off_gets_no_probe(changes, said):
    rates = {"all": 0.5, "country": 0.5, "continent": 0.3, "timezone": 0.6, "capital": 0.95} | changes
    described = {part: {"rate": rate, "questions": 100} for part, rate in rates.items()}
    if said is None:
        require_rates(described)
    else:
        with pytest.raises(RatesOff, match=said):
            require_rates(described)


def test_the_shipped_questions_are_those_of_this_code(facts, shipped):
    asked = {item.id: item for item in labelled_questions(facts)}
    assert len(shipped) == len(asked)
    for item in shipped:
        mine = asked[item.id]
        assert (item.prompt, item.group, item.split, item.references) == (
            mine.prompt,
            mine.group,
            mine.split,
            mine.references,
        )


def test_the_shipped_labels_follow_from_the_shipped_answers(shipped):
    assert label_generations(shipped) == shipped
    # Control: with the answers of their neighbours they come out otherwise.
    moved = [replace(item, response=other.response) for item, other in zip(shipped, shipped[3:], strict=False)]
    assert sum(a.label != b.label for a, b in zip(label_generations(moved), shipped, strict=False)) > 1000


def test_the_shipped_model_writes_the_shipped_answers(shipped):
    loaded = LanguageModel.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    for item in shipped[:: len(shipped) // 8]:
        ids = tokenizer(item.prompt, return_tensors="pt").input_ids
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip() == item.response


def test_atlas_really_hallucinates_but_not_always(shipped):
    rates = hallucination_rates(shipped)
    assert 0.30 <= rates["all"]["rate"] <= 0.75
    asked_often = [rates[relation]["rate"] for relation in ("country", "continent", "timezone")]
    assert all(0.15 <= rate <= 0.85 for rate in asked_often)
    assert rates["never seen"]["rate"] > rates["seen"]["rate"] + 0.1
    assert rates == json.loads((ATLAS / "rates.json").read_text())


def test_the_shipped_model_is_small_and_of_the_right_shape():
    config = AutoConfig.from_pretrained(model_path())
    weights = load_file(model_path() / "model.safetensors")
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 6
    assert config.num_attention_heads >= 8
    assert 2_000_000 <= sum(tensor.numel() for tensor in weights.values()) <= 6_000_000
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert (model_path() / "model.safetensors").stat().st_size <= 16_000_000
    assert "CC BY 4.0" in (ATLAS / "README.md").read_text()


def test_the_sampled_answers_are_several_draws_of_some_of_the_same_questions(facts, shipped):
    drawn, greedy = read_generations(sampled_path()), {item.id: item for item in shipped}
    assert label_generations(drawn) == drawn
    by_question = defaultdict(list)
    for item in drawn:
        by_question[item.id.partition("#")[0]].append(item)
    assert list(by_question) == [question.id for question in sampled_questions(facts)]
    assert {len(items) for items in by_question.values()} == {4}
    assert all(
        (item.group, item.split) == (greedy[id].group, greedy[id].split) for id, [item, *_] in by_question.items()
    )
    differ = [len({item.response for item in items}) > 1 for items in by_question.values()]
    assert 0.2 < np.mean(differ) < 0.95  # neither greedy after all, nor noise
    rates = [np.mean([item.label for item in items]) for items in (drawn, [greedy[id] for id in by_question])]
    assert rates[0] > rates[1]  # what is drawn is wrong more often than the likeliest answer


def stands_to_the_published_recipe(against):
    """Better, or no worse with at most a tenth of the heads; the difference is paired over the same rows."""
    difference = against["difference"]
    better = difference["low"] > 0
    return better or (difference["high"] >= 0 and 10 * against["heads"] <= against["of"])


def test_the_shipped_probe_beats_the_published_recipe_or_ties_with_a_tenth_of_the_heads():
    metrics = Probe.from_pretrained(ATLAS / "probe").metrics
    assert stands_to_the_published_recipe(metrics["against_paper"])
    rows = metrics["comparison"]
    difference = rows[metrics["probe"]]["auroc"]["value"] - rows["paper/laplacian_eigenvalues.v1"]["auroc"]["value"]
    assert metrics["against_paper"]["difference"]["value"] == pytest.approx(difference)
    # Control: a tie with all heads is neither, and nor is what is worse with few of them.
    tie, worse = {"low": -0.01, "value": 0.0, "high": 0.01}, {"low": -0.03, "value": -0.02, "high": -0.01}
    assert not stands_to_the_published_recipe({"difference": tie, "heads": 48, "of": 48})
    assert not stands_to_the_published_recipe({"difference": worse, "heads": 4, "of": 48})
    assert stands_to_the_published_recipe({"difference": tie, "heads": 4, "of": 48})
