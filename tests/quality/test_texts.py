"""Our own texts and the facts planted in them: long enough, clean, distinct, each fact found in one place."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from labkit import models
from labkit.quality import Fact, load_facts, load_text

FOLDER = Path(__file__).parents[2] / "data" / "texts"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.txt"))}
FACTS = json.loads((FOLDER / "facts.json").read_text(encoding="utf-8"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")

LEAST_TOKENS = 12_000
LEAST_FACTS = 8  # in each text
WORDS = range(1_500, 2_501)
LONGEST_PARAGRAPH = 1_000  # characters

ids = [f"{fact['text'].removesuffix('.txt')}: {fact['answer']}" for fact in FACTS]
each_text = pytest.mark.parametrize("name", TEXTS)
each_fact = pytest.mark.parametrize("fact", FACTS, ids=ids)


def paragraphs(name):
    return TEXTS[name].removesuffix("\n").split("\n\n")


@pytest.fixture(scope="module")
def tokens():
    """The number of tokens of each text, with the lab model's tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LABKIT_MODEL", raising=False)
        tokenizer = models.tokenizer()
    return {name: len(tokenizer(text).input_ids) for name, text in TEXTS.items()}


def test_there_are_six_texts_and_every_one_has_facts():
    assert len(TEXTS) == 6
    assert {fact["text"] for fact in FACTS} == set(TEXTS)


def test_the_texts_together_are_long_enough(tokens):
    assert sum(tokens.values()) >= LEAST_TOKENS


@each_text
def test_a_text_has_the_length_it_should_have(name):
    assert len(TEXTS[name].split()) in WORDS


def test_the_readme_tells_the_counts_of_every_text(tokens):
    rows = re.findall(r"^\| `(\w+\.txt)` \|.*\| ([\d,]+) \| ([\d,]+) \| (\d+) \|$", README, re.MULTILINE)
    told = {name: tuple(int(figure.replace(",", "")) for figure in figures) for name, *figures in rows}
    facts = Counter(fact["text"] for fact in FACTS)
    assert told == {name: (len(text.split()), tokens[name], facts[name]) for name, text in TEXTS.items()}


@each_text
def test_a_text_is_plain_ascii_in_paragraphs_of_one_line(name):
    raw = (FOLDER / name).read_bytes()
    assert raw.isascii()
    assert not set(raw) & {*range(0x0A), *range(0x0B, 0x20), 0x7F}, "a control character, a tab or a carriage return"
    assert raw.endswith(b"\n")
    for paragraph in paragraphs(name):
        assert paragraph
        assert "\n" not in paragraph
        assert paragraph == " ".join(paragraph.split()), "spaces at an end, or two in a row"
        assert len(paragraph) <= LONGEST_PARAGRAPH
        assert paragraph[0] not in "#-*>|", "markdown"
        assert paragraph[-1] in '.?!"'


def test_no_paragraph_occurs_twice():
    counts = Counter(paragraph for name in TEXTS for paragraph in paragraphs(name))
    assert counts.most_common(1)[0][1] == 1


def test_no_long_phrase_occurs_twice():
    """Twelve words in a row may stand once: repeated prose would make a compressed cache look better than it is."""
    phrases = Counter()
    for text in TEXTS.values():
        words = re.findall(r"[\w'-]+", text.lower())
        phrases.update(" ".join(words[start : start + 12]) for start in range(len(words) - 11))
    assert [phrase for phrase, count in phrases.items() if count > 1] == []


@each_fact
def test_a_fact_has_the_four_fields(fact):
    assert set(fact) == {"text", "question", "answer", "sentence"}
    assert all(isinstance(value, str) and value == value.strip() != "" for value in fact.values())


@each_fact
def test_the_sentence_stands_whole_in_its_text_and_once(fact):
    text, sentence = TEXTS[fact["text"]], fact["sentence"]
    assert text.count(sentence) == 1
    start = text.index(sentence)
    assert sentence[0].isupper()
    assert sentence[-1] in ".?!"
    assert start == 0 or re.search(r"([.?!]\"? |\n\n)$", text[:start])
    assert text[start + len(sentence)] in " \n"


@each_fact
def test_the_answer_stands_in_its_text_once_and_in_its_sentence(fact):
    answer = fact["answer"].lower()
    assert TEXTS[fact["text"]].lower().count(answer) == 1
    assert answer in fact["sentence"].lower()


@each_fact
def test_the_answer_stands_in_no_other_text(fact):
    others = [name for name, text in TEXTS.items() if name != fact["text"] and fact["answer"].lower() in text.lower()]
    assert others == []


@each_fact
def test_the_question_is_a_beginning_that_does_not_tell_the_answer(fact):
    question = fact["question"]
    assert question[0].isupper()
    assert question[-1].isalpha() or question[-1] == ","
    told = {word for word in re.findall(r"\w+", question.lower()) if len(word) > 3}
    assert told.isdisjoint(re.findall(r"\w+", fact["answer"].lower()))


def test_no_answer_and_no_question_is_used_twice():
    for field in ("answer", "question"):
        assert Counter(fact[field].lower() for fact in FACTS).most_common(1)[0][1] == 1


@each_text
def test_facts_are_enough_and_stand_in_every_quarter_in_order(name):
    text, facts = TEXTS[name], [fact for fact in FACTS if fact["text"] == name]
    places = [text.index(fact["answer"]) for fact in facts]
    assert len(facts) >= LEAST_FACTS
    assert places == sorted(places)
    assert {4 * place // len(text) for place in places} == {0, 1, 2, 3}


def test_one_of_our_texts_is_found_by_name_and_any_other_by_path(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("Señora", encoding="utf-8")
    assert load_text("lighthouse") == load_text("lighthouse.txt")
    assert load_text(mine) == load_text(str(mine)) == "Señora"
    with pytest.raises(ValueError, match=r"no text is called 'lighthous'; nearest: lighthouse.*path of a text file"):
        load_text("lighthous")
    mine.write_bytes(b"\xff\xfe")
    for wrong in (mine, tmp_path, "a text instead of its name " * 300):
        with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
            load_text(wrong)


def test_facts_come_with_their_text_in_the_order_of_the_file() -> None:
    facts = load_facts("lighthouse")
    assert len(facts) == 11
    assert {fact.text for fact in facts} == {load_text("lighthouse")}
    assert [fact for fact in load_facts() if fact.text == facts[0].text] == facts
    with pytest.raises(ValueError, match=r"nearest: lighthouse.*Fact\(text, question, answer\)"):
        load_facts("lighthose")
    with pytest.raises(ValueError, match="needs a question and an answer"):
        Fact("text", "question", " ")
