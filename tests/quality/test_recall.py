"""Recall: what is asked, of which cache, in which order, and where the answer stands in the text."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from labkit import models
from labkit.cache import GrowingCache
from labkit.llama import Llama
from labkit.quality import Answer, Fact, Recall, load_facts, load_text, recall
from tests.quality.subjects import CoarseCache, make, surprise, text


def test_a_recall_counts_hits_and_its_spread_is_not_zero_when_all_hit() -> None:
    answers = [Answer(Fact("", "q", "a"), hit, value, None, 0) for hit, value in ((True, -1.0), (True, -3.0))]
    all_hit = Recall(tuple(answers))
    assert (all_hit.hits, all_hit.facts, all_hit.share) == (2, 2, 1)
    assert all_hit.share_spread == pytest.approx((1 / 4) / (1 + 1 / 2))
    assert (all_hit.log_probability, all_hit.log_probability_spread) == (-2, 1)
    half = Recall((answers[0], replace(answers[1], hit=False)))
    assert half.share_spread == pytest.approx(math.sqrt(1 / 8 + 1 / 16) / 1.5)
    assert str(half).startswith("1 of 2 facts recalled, a share of 0.50 ± 0.29; log-probability -2.0 ± 1.0")


class Words:
    """A tokenizer of words, whose ids are their order of first appearance."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True):
        words = [self.ids.setdefault(word, len(self.ids)) for word in text.split()]
        return type("Encoding", (), {"input_ids": words})


def test_recall_says_what_a_pass_over_the_whole_prompt_says(model: Llama) -> None:
    words = Words()
    story = "the cat sat on the red mat and the dog ran to a far hill"
    facts = [
        Fact(story, "so the cat sat on", "the red mat"),
        Fact(story, "it ran to", "nowhere"),
        Fact("", "why", "cat"),
    ]
    found = recall(model, words, {"grown": model.cache}, facts, chunk=4)["grown"]
    assert [answer.fact for answer in found.answers] == facts
    assert [answer.position for answer in found.answers] == [4, None, None]
    assert [answer.text_tokens for answer in found.answers] == [15, 15, 0]
    for answer in found.answers:
        prompt = words(f"{answer.fact.text} {answer.fact.question} {answer.fact.answer}").input_ids
        length = len(words(answer.fact.answer).input_ids)
        tokens = torch.tensor([prompt])
        by_hand = -surprise(model(tokens), tokens)[-length:].mean()
        assert answer.log_probability == pytest.approx(by_hand.item(), rel=1e-10)
        assert answer.hit == torch.equal(model(tokens)[0, -length - 1 : -1].argmax(-1), tokens[0, -length:])


def test_a_copy_of_a_cache_leaves_it_as_it_was(model: Llama) -> None:
    for layer in (GrowingCache, CoarseCache):
        cache = make(layer)
        model(text(10), cache)
        before, fork = [layer.k.clone() for layer in cache.layers], copy.deepcopy(cache)
        model(text(5, seed=1), fork)
        assert cache.seq_len == 10
        assert all(torch.equal(old, layer.k) for old, layer in zip(before, cache.layers, strict=True))


def test_every_question_is_put_to_a_cache_that_has_read_the_text_alone(model: Llama) -> None:
    words = Words()
    facts = [Fact("the cat sat on the mat", question, "cat") for question in ("who sat", "what lay there", "who sat")]
    found = recall(model, words, {"coarse": lambda: make(CoarseCache)}, facts, chunk=3, full=model.cache)
    assert list(found) == ["full", "coarse"]
    for answers in found.values():
        first, other, again = (answer.log_probability for answer in answers.answers)
        assert first == again != other


def test_recall_of_nothing_is_refused(model: Llama) -> None:
    fact = Fact("a text", "a question", "an answer")
    for caches, facts, chunk, message in (
        ({"full": model.cache}, [], 8, "got 1 and 0"),
        ({}, [fact], 8, "got 0 and 1"),
        ({"full": model.cache}, [fact], 0, "at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            recall(model, Words(), caches, facts, chunk=chunk)


def test_the_lab_model_recalls_facts_of_a_text_it_read_and_none_without_it(lab_model, monkeypatch) -> None:
    monkeypatch.delenv("LABKIT_MODEL", raising=False)
    model, tokenizer = models.load(device="cpu"), models.tokenizer()
    start = load_text("lighthouse")[:2200]
    facts = [replace(fact, text=start) for fact in load_facts("lighthouse") if fact.answer in start]
    found = recall(model, tokenizer, {"full": model.cache}, facts)["full"]
    alone = recall(model, tokenizer, {"full": model.cache}, [fact.without_text() for fact in facts])["full"]
    assert found.facts >= 2
    assert found.share >= 0.5
    assert alone.hits == 0
    assert alone.log_probability < found.log_probability - 1
    for answer in found.answers:
        tokens = tokenizer(start).input_ids[answer.position :]
        assert tokenizer.decode(tokens).lstrip().startswith(answer.fact.answer)


def test_answers_come_in_the_order_of_the_facts_whatever_text_they_are_of(model: Llama) -> None:
    words = Words()
    one, two = "the cat sat on the mat", "the dog ran to a hill"
    facts = [
        Fact(one, "who sat", "cat"),
        Fact(two, "who ran", "dog"),
        Fact("", "why", "mat"),
        Fact(one, "where", "mat"),
    ]
    found = recall(model, words, {"coarse": lambda: make(CoarseCache)}, facts, full=model.cache)
    for answers in found.values():
        assert [answer.fact for answer in answers.answers] == facts
    alone = recall(model, words, {"full": model.cache}, facts[1:2])["full"]
    assert found["full"].answers[1] == alone.answers[0]


def test_a_cache_called_full_and_a_full_one_besides_are_refused(model: Llama) -> None:
    with pytest.raises(ValueError, match='one of the caches is called "full" already: give it another name'):
        recall(model, Words(), {"full": model.cache}, [Fact("a text", "what", "text")], full=model.cache)


@pytest.mark.parametrize(
    ("story", "answer", "position"),
    [
        ("the category of a cat", "cat", 4),
        ("a concat and a cat", "cat", 4),
        ("The CAT sat", "cat", 1),
        ("a category", "cat", None),
        ("he paid 100 and then 10", "10", 5),
        ("we saw the U.S. flag", "U.S.", 3),
        ("it cost (five) or five", "(five)", 2),
    ],
)
def test_an_answer_is_placed_where_it_stands_as_whole_words(model: Llama, story, answer, position) -> None:
    (found,) = recall(model, Words(), {"grown": model.cache}, [Fact(story, "what", answer)])["grown"].answers
    assert found.position == position
