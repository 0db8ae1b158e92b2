"""The claims ledger: every figure recomputed, every verdict derived, the page up to date, bad files named in a line."""

import dataclasses
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import pytest

from labkit import claims
from labkit.claims.compute import evaluate, wrong_with
from labkit.sizing import SizeError
from labkit.specs import SpecError

ALL = claims.claims()
GOOD = """
sources:
  "000":
    title: A text
    short: Text
claims:
  - id: "000-01"
    claim: Two and two
    claimed: 4
    recomputed: 4.0
    compute: {sum: [2, 2]}
    verdict: holds
    lab: "03"
"""


def one(**fields):
    """A claim that holds, with changes."""
    given = {"id": "000-01", "claim": "c", "claimed": 4, "recomputed": 4, "compute": 4, "verdict": "holds", "lab": "03"}
    return claims.Claim(**{**given, **fields})


def figures(claim):
    """What the claim comes to, and what it comes to otherwise, if it says so."""
    return claims.recompute(claim), claims.recompute(claim.otherwise) if claim.otherwise else None


def contrary(claim, value):
    """What the text would have to say for the verdict to be another."""
    ours = [Decimal(str(round(float(one), 6))) for one in (value if isinstance(value, list) else [value])]
    if claim.verdict == "wrong":  # say what is right
        factor = {"at least": Decimal("0.99"), "at most": Decimal("1.01")}.get(claim.relation, Decimal(1))
        said = [one * factor for one in ours]
    else:  # say something far off
        said = [one / 3 if claim.relation == "at most" else 3 * one + 1 for one in ours]
    if claim.relation == "within":
        return [min(said), max(said)] if claim.verdict == "wrong" else [max(said), max(said) + 1]
    return said if isinstance(claim.claimed, list) else said[0]


@pytest.mark.parametrize("claim", ALL, ids=[claim.id for claim in ALL])
class TestEveryClaim:
    def test_what_is_stored_is_what_is_recomputed(self, claim):
        value, otherwise = figures(claim)
        assert claims.same(claim.recomputed, value)  # exact, to the digits stored
        if claim.otherwise:
            assert claims.same(claim.otherwise.recomputed, otherwise)

    def test_its_verdict_follows_from_the_figures(self, claim):
        assert claim.follows(*figures(claim))

    def test_another_figure_in_the_text_would_change_the_verdict(self, claim):
        value, otherwise = figures(claim)
        assert not dataclasses.replace(claim, claimed=contrary(claim, value)).follows(value, otherwise)


class TestTheLedger:
    def test_it_holds_at_least_sixty_claims_and_eight_of_each_text(self):
        assert len(ALL) >= 60
        assert set(claims.sources()) == {"000", "001", "002", "003", "004"}
        for key in claims.sources():
            assert sum(claim.source == key for claim in ALL) >= 8, key

    def test_ids_are_unique_and_in_order(self):
        ids = [claim.id for claim in ALL]
        assert ids == sorted(set(ids))

    def test_no_two_claims_are_worded_alike(self):
        said = [(claim.source, claim.claim) for claim in ALL]
        assert len(said) == len(set(said))

    def test_labs_03_and_04_settle_claims_of_every_verdict(self):
        for lab in ("03", "04"):
            assert {claim.verdict for claim in claims.claims(lab)} == {"holds", "holds if", "wrong"}

    def test_an_unknown_claim_is_answered_with_the_nearest(self):
        with pytest.raises(SpecError, match=r"no claim is called '004-99'; nearest: 004-"):
            claims.claim("004-99")

    def test_the_known_errors_are_there(self):
        assert {claims.claim(id).verdict for id in ("000-03", "000-04", "002-10", "002-11", "003-04", "004-10")} == {
            "wrong"
        }
        assert float(claims.recompute(claims.claim("000-03"))) == 16.384
        assert claims.recompute(claims.claim("004-02")) == 57_344

    def test_counted_figures_are_those_of_the_formulas(self):
        for new in (1, 7, 20):
            for cached in (True, False):
                for what in ("projections", "scores"):
                    given = {"new": new, "cached": cached}
                    counted = evaluate({"function": f"counted_{what}", **given})
                    assert counted == evaluate({"function": what, **given})  # exact

    def test_it_imports_no_torch(self):
        code = "import sys, labkit.claims as c; c.table('03'); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestAgreement:
    @pytest.mark.parametrize(
        ("claimed", "value", "agrees"),
        [
            ("2.5", "2.549", True),
            ("2.5", "2.56", False),
            ("2.50", "2.506", False),
            ("7", "7.5", True),
            ("7", "7.51", False),
        ],
    )
    def test_a_figure_agrees_to_half_of_the_last_digit_printed(self, claimed, value, agrees):
        assert one(claimed=Decimal(claimed)).agrees(Fraction(value)) is agrees

    def test_a_step_replaces_the_last_digit(self):
        assert one(claimed=140, to=10).agrees(Fraction(144))
        assert not one(claimed=140).agrees(Fraction(144))

    def test_bounds_and_ranges(self):
        assert one(relation="at least").agrees(Fraction(5))
        assert not one(relation="at most").agrees(Fraction(5))
        assert one(relation="within", claimed=[4, 32]).agrees([Fraction(4), Fraction(32)])
        assert not one(relation="within", claimed=[4, 32]).agrees([Fraction(4), Fraction(71)])

    def test_one_wrong_entry_makes_a_list_wrong(self):
        assert not one(claimed=[8, 8]).agrees([Fraction(8), Fraction(4)])
        assert not one(claimed=[8, 8]).agrees([Fraction(8)])

    def test_holds_if_needs_another_figure_otherwise(self):
        claim = one(verdict="holds if")
        assert claim.follows(Fraction(4), Fraction(5))
        assert not claim.follows(Fraction(4), Fraction(4))
        assert not claim.follows(Fraction(5), Fraction(6))

    def test_stored_figures_are_compared_in_their_own_digits(self):
        assert claims.same(Decimal("16.38"), Fraction("16.384"))
        assert not claims.same(Decimal("16.39"), Fraction("16.384"))
        assert not claims.same([Decimal(1)], [Fraction(1), Fraction(2)])


class TestCompute:
    def test_operations_go_entry_by_entry(self):
        assert evaluate({"product": [[1, 2, 3], 10]}) == [10, 20, 30]
        assert evaluate({"ratio": [[1, 2], 4], "per": "percent"}) == [25, 50]
        assert evaluate({"function": "projections", "each": {"new": [1, 2]}}) == [1, 3]

    def test_lists_of_unlike_lengths_do_not_go_together(self):
        with pytest.raises(SpecError, match="lists of 2 and 3 figures do not go together"):
            evaluate({"sum": [[1, 2], [1, 2, 3]]})

    def test_a_model_can_be_changed(self):
        like = {"function": "bytes_per_token", "model": {"like": "llama-3-70b", "num_kv_heads": 64}, "per": "MiB"}
        assert evaluate(like) == Fraction(5, 2)

    def test_a_missing_field_is_named(self):
        with pytest.raises(SpecError, match="gpu has no field 'memory'"):
            evaluate({"function": "gpu", "gpu": "h100-80gb", "field": "memory"})
        with pytest.raises(SpecError, match="gives no number"):
            evaluate({"function": "gpu", "gpu": "h100-80gb"})

    @pytest.mark.parametrize(
        ("compute", "said"),
        [
            ({"ratio": [1, 0]}, "ratio of [1, 0]"),
            ({"function": "bytes_per_token", "model": {"num_heads": 3}}, "bytes_per_token cannot take"),
            ({"function": "bytes_per_token", "model": "llama-3-70b", "dtype": {"format": "zip"}}, "'zip'"),
            ({"function": "bytes_per_token", "model": "llama-3-70"}, "nearest: llama-3-70b"),
            ({"function": "cache_bytes", "model": "llama-3-70b", "tokens": -1}, "at least 0"),
        ],
    )
    def test_what_fails_when_computed_is_said_in_a_line(self, compute, said):
        with pytest.raises((SpecError, SizeError)) as caught:
            evaluate(compute)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("compute", "said"),
        [
            ({"function": ["model"]}, "no function is called ['model']"),
            ({"sum": [1], "per": ["GB"]}, "['GB'] is no unit"),
            ("2 + 2", "neither a number nor a function"),
            (True, "neither a number nor a function"),
            ({"function": "eval", "code": "1"}, "no function is called 'eval'"),
            ({"function": "cache_bytes", "model": "llama-3-70b"}, "missing a required argument: 'tokens'"),
            ({"function": "cache_bytes", "model": "x", "tokens": 1, "token": 2}, "unexpected keyword argument 'token'"),
            ({"function": "model", "model": "x", "field": "__class__"}, "is no field of a result"),
            ({"sum": [1], "per": "Gb"}, "'Gb' is no unit"),
            ({"ratio": [1, 2, 3]}, "ratio needs two values"),
            ({"ratio": 3}, "ratio needs a list"),
            ({"per": "GB"}, "name one function or one of"),
            ({"function": "projections", "each": {"new": 3}}, "each names one argument and its values"),
        ],
    )
    def test_what_cannot_be_computed_is_said(self, compute, said):
        assert said in wrong_with(compute)


def changed(**fields):
    """GOOD with fields of its claim changed, added, or (None) taken out."""
    lines = GOOD.splitlines()
    for name, text in fields.items():
        at = next((i for i, line in enumerate(lines) if line.strip().removeprefix("- ").startswith(f"{name}:")), None)
        if at is None:
            lines.append(f"    {name}: {text}")
        elif text is None:
            del lines[at]
        else:
            lines[at] = lines[at][: lines[at].index(name)] + f"{name}: {text}"
    return "\n".join(lines) + "\n"


class TestBadFiles:
    def test_a_good_file_is_read(self, tmp_path):
        path = tmp_path / "claims.yaml"
        path.write_text(GOOD)
        (claim,) = claims.read(path).claims
        assert claim.recomputed.as_tuple().exponent == -1  # 4.0 keeps its digit

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (changed(claimed="four"), "line 9: claims.0.claimed: a number is needed; got 'four'"),
            (changed(claimed="[]"), "line 9: claims.0.claimed: the list is empty"),
            (changed(claimed=".nan"), "line 9: claims.0.claimed: a number is needed"),
            (changed(claimed="[4, 5]"), "line 9: 000-01 claimed: as many figures as recomputed are needed: 1"),
            (changed(verdict="true"), "line 12: claims.0.verdict"),
            (changed(verdict="wrong"), 'line 12: 000-01 verdict: "wrong" needs correction'),
            (changed(verdict="holds if"), 'line 12: 000-01 verdict: "holds if" needs condition'),
            (changed(correction="none"), 'line 12: 000-01 verdict: "holds" takes no correction'),
            (changed(relation="within"), 'line 9: 000-01 claimed: "within" needs two ends'),
            (changed(lab="3"), "line 13: claims.0.lab"),
            (GOOD.replace("    short: Text\n", "    short: Text\n    url: javascript:1\n"), "line 6: sources.000.url"),
            (changed(compute=None), "line 7: claims.0.compute is missing: add it"),
            (changed(compute="{sums: [2, 2]}"), "line 11: 000-01 compute: name one function or one of sum"),
            (changed(counted="true"), "line 14: 000-01 counted: true if one of"),
            (changed(source="a"), "line 14: claims.0.source is no field"),
            (changed(id='"007-01"'), "line 7: 007-01 id: it begins with its source, one of 000"),
            (changed(claimed="[4"), "line 10: not valid YAML"),
            (changed(compute="&a {sum: [*a]}"), "line 11: not valid YAML: an alias (*) is not known here"),
            (GOOD + GOOD[GOOD.index("  - id") :], "line 14: 000-01 id: it is there twice"),
            ("- 1\n", "line 1: input should be"),
        ],
    )
    def test_a_bad_file_is_named_in_one_line(self, tmp_path, text, said):
        path = tmp_path / "claims.yaml"
        path.write_text(text)
        with pytest.raises(SpecError) as caught:
            claims.read(path)
        message = str(caught.value)
        assert message.startswith("claims.yaml, line ")
        assert said in message
        assert "\n" not in message
        assert len(message) < 320

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(SpecError, match=r"claims.yaml cannot be read"):
            claims.read(tmp_path / "claims.yaml")


class TestThePage:
    def test_it_is_up_to_date(self):
        assert claims.PAGE.read_text(encoding="utf-8") == claims.as_page(), "run: python -m labkit.claims"

    def test_it_shows_every_claim_once(self):
        page = claims.as_page()
        assert all(page.count(f"| {claim.id} · ") == 1 for claim in ALL)

    def test_a_table_can_be_of_a_lab_a_verdict_or_a_choice(self):
        assert all(f"| {claim.id} · " in claims.table("04") for claim in claims.claims("04"))
        assert claims.table("04").count("\n") == len(claims.claims("04")) + 1
        wrong = claims.table("03", verdict="wrong")
        assert "**wrong**" in wrong
        assert "**holds**" not in wrong
        rows = claims.table(ids=["004-02", "000-03"]).splitlines()[2:]
        assert [row[2:8] for row in rows] == ["004-02", "000-03"]

    def test_an_id_of_another_lab_or_verdict_and_a_table_of_nothing_are_refused(self):
        with pytest.raises(SpecError, match=r"claim 000-10 belongs to lab 01 and is 'holds': leave its id out"):
            claims.table("03", ids=["000-03", "000-10"])
        with pytest.raises(SpecError, match="no claim has lab 99"):
            claims.table("99")

    def test_a_lab_s_table_names_the_text_and_links_it_where_its_address_is_known(self):
        table = claims.table("04", ids=["003-04", "004-20"])
        assert "| 003 *KV Cache in LLMs Explained* |" in table
        assert f"| 004 [*Understanding KV Cache in LLM Inference*]({claims.sources()['004'].url}) |" in table
        assert f"## 004 · [Understanding KV Cache in LLM Inference]({claims.sources()['004'].url})" in claims.as_page()

    def test_a_notebook_shows_a_table_where_print_writes_its_text(self):
        table = claims.table("05")
        assert table._repr_markdown_() == repr(table) == str(table)

    def test_two_dollar_signs_begin_no_formula(self):
        assert not re.search(r"(?<!<span>\\)\$|\$(?!</span>)", claims.as_page())

    def test_units_are_those_of_each_figure(self):
        assert "| 40 GB | 40.0 GiB | **holds if** GiB is meant; 42.9 GB otherwise |" in claims.table(ids=["004-21"])
        assert r"| <span>\$</span>9 to <span>\$</span>10 | <span>\$</span>9.00 |" in claims.table(ids=["000-17"])
        assert "| at least 1 request | 1 request |" in claims.table(ids=["003-12"])
