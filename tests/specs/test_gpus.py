"""The table of GPUs and links: rates without sparsity, units as they are named, one line for a file that is wrong."""

import json
import os
import re
import shutil

import pytest

from labkit import specs
from labkit.specs import GpuSpec, LinkSpec, SpecError

GPUS = specs.gpus()
CARDS = [name for name, spec in GPUS.items() if spec.kind in ("datacenter", "workstation", "consumer")]
MINE = {
    "name": "mine",
    "title": "My GPU",
    "kind": "datacenter",
    "memory_gib": 64.0,
    "bandwidth_gb_s": 1000.0,
    "tflops": {"bfloat16": 200.0},
    "source": "measured",
    "date": "2026-01-01",
    "links": ["pcie4-x16"],
}
LINK = {"name": "my-link", "title": "My link", "gb_s": 12.5, "source": "measured", "date": "2026-01"}
# 16-bit over float32, as the design of each generation's tensor cores has it: float32 is printed without sparsity, so
# a 16-bit rate with it is twice as far off.
PER_FLOAT32 = {
    8: ["t4", "v100-16gb", "v100-32gb", "mi300x", "mi325x"],
    16: ["a30", "a100-40gb", "a100-40gb-pcie", "a100-80gb", "a100-80gb-pcie"],
    15: ["h100-80gb", "h100-pcie", "h100-nvl", "h200", "gh200"],
    30: ["b200", "gb200"],
    4: ["a10", "a40", "rtx-a6000", "l4", "l40s", "mi250x-gcd"],
    2: ["a10g", "rtx-3090", "rtx-4070-laptop", "rtx-4080", "rtx-4090", "rtx-5090"],
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A copy of gpus.json in a folder that specs reads in place of `data/`."""
    shutil.copy(specs.DATA / "gpus.json", tmp_path)
    monkeypatch.setattr(specs, "DATA", tmp_path)
    return tmp_path


def write(folder, gpus=(), links=(), name="gpus-mine.json"):
    path = folder / name
    path.write_text(json.dumps({"gpus": list(gpus), "links": list(links)}, indent=1), encoding="utf-8")
    return path


def said_of(folder, **changes):
    """What is said of a file of one's own whose GPU has these changes; a field changed to ... is left out."""
    path = write(folder, [{key: value for key, value in {**MINE, **changes}.items() if value is not ...}])
    assert set(specs.gpus()) == set(GPUS)  # none of the course's is lost, and none of the file's is there
    (said,) = specs.problems()
    assert "\n" not in said
    assert said.startswith("gpus-mine.json, line ")
    line = int(said.split("line ")[1].split(":")[0])
    return said, path.read_text(encoding="utf-8").splitlines()[line - 1].strip()


class TestTheTable:
    def test_it_has_cards_of_every_kind(self):
        assert len(GPUS) >= 24
        assert {spec.kind for spec in GPUS.values()} == {"datacenter", "workstation", "consumer", "apple", "cpu"}

    def test_a_devices_total_is_as_pytorch_reports_it_not_as_it_is_sold(self):
        h100 = specs.gpu("h100-80gb")
        assert (h100.memory_gib, h100.bandwidth_gb_s, h100.tflops["bfloat16"]) == (79.1, 3350.0, 989.0)
        assert h100.memory_bytes == 84_932_978_278
        assert h100.bytes_per_s == 3.35e12
        assert h100.flop_per_s("bfloat16") == 9.89e14

    @pytest.mark.parametrize("name", GPUS)
    def test_a_spec_says_where_each_figure_is_from(self, name):
        spec = GPUS[name]
        assert len(spec.source) > 15
        assert len(spec.date) == len("2022-03-22")
        assert "GiB" in spec.memory_note or "MiB" in spec.memory_note or "nominal" in spec.memory_note
        assert "float32" in spec.tflops

    @pytest.mark.parametrize("name", CARDS)
    def test_memory_is_not_more_than_was_sold_nor_a_tenth_less(self, name):
        sold = float(re.search(r"(\d+) GB", GPUS[name].title)[1])
        assert 0.9 * sold <= GPUS[name].memory_gib <= sold

    @pytest.mark.parametrize("name", CARDS)
    def test_a_card_reads_its_memory_in_10_to_100_milliseconds(self, name):
        assert 0.01 < GPUS[name].memory_bytes / GPUS[name].bytes_per_s < 0.1

    @pytest.mark.parametrize("name", [name for name in CARDS if GPUS[name].kind == "datacenter"])
    def test_a_datacenter_card_does_10_to_1000_operations_per_byte(self, name):
        assert 10 < GPUS[name].flop_per_s("bfloat16") / GPUS[name].bytes_per_s < 1000

    @pytest.mark.parametrize("name", CARDS)
    def test_16_bit_rates_are_without_sparsity(self, name):
        ratio = next(ratio for ratio, names in PER_FLOAT32.items() if name in names)
        rates = GPUS[name].tflops
        assert rates["float16"] / rates["float32"] == pytest.approx(ratio, rel=0.08)
        assert rates.get("bfloat16", rates["float16"]) == rates["float16"]

    @pytest.mark.parametrize("name", CARDS)
    def test_other_rates_follow_from_the_16_bit_rate(self, name):
        rates = GPUS[name].tflops
        # Consumer cards and the whitepapers' float32 sums halve float16 and float8, but neither int8 nor float4.
        int8, float4 = (4, 4) if GPUS[name].kind == "consumer" else (2, 2)
        if name == "mi250x-gcd":
            int8 = 1
        for dtype, factor, of in [("tf32", 0.5, "float16"), ("float8", 2, "float16"), ("int8", int8, "float16"),
                                  ("float4", float4, "float8")]:  # fmt: skip
            if dtype in rates:
                assert rates[dtype] / rates[of] == pytest.approx(factor, rel=0.03), dtype

    @pytest.mark.parametrize("name", GPUS)
    def test_links_are_listed_from_the_fastest_on(self, name):
        rates = [specs.link(link).gb_s for link in GPUS[name].links]
        assert rates == sorted(rates, reverse=True)

    @pytest.mark.parametrize("name", [name for name in GPUS if GPUS[name].kind not in ("apple", "cpu")])
    def test_a_link_is_slower_than_memory(self, name):
        assert max(specs.link(link).gb_s for link in GPUS[name].links) < GPUS[name].bandwidth_gb_s / 2

    def test_links_count_one_direction_in_bytes(self):
        rates = {name: spec.gb_s for name, spec in specs.links().items()}
        assert [rates[f"nvlink{n}"] for n in (2, 3, 4, 5)] == [150, 300, 450, 900]
        assert rates["infiniband-ndr"] == rates["ethernet-400"] == 50
        for name, rate in rates.items():
            if name.startswith("ethernet-"):
                assert rate == int(name.removeprefix("ethernet-")) / 8
        for lanes, generation, transfers in ((16, 3, 8), (16, 4, 16), (8, 4, 16), (16, 5, 32)):
            assert rates[f"pcie{generation}-x{lanes}"] == pytest.approx(transfers * lanes * 128 / 130 / 8, rel=1e-3)


def gpu_with(**tflops):
    return GpuSpec(**{**MINE, "tflops": tflops})


class TestFlopPerS:
    def test_a_dtype_that_is_listed_has_its_own_rate_even_where_a_wider_one_is_faster(self):
        assert gpu_with(float8=100.0, bfloat16=200.0).flop_per_s("float8") == 1e14

    @pytest.mark.parametrize(
        ("listed", "dtype", "rate"),
        [
            ({"bfloat16": 200.0, "float32": 20.0}, "float4", 200e12),
            ({"float8": 400.0, "bfloat16": 200.0}, "float4", 400e12),
            ({"float8": 400.0, "bfloat16": 200.0}, "int8", 200e12),  # float8 does not hold 127
            ({"float16": 65.0, "float32": 8.1}, "bfloat16", 8.1e12),  # float16 does not hold 1e30
            ({"bfloat16": 65.0, "float32": 8.1}, "float16", 8.1e12),  # bfloat16 does not hold 1.001
            ({"tf32": 150.0, "float32": 20.0}, "bfloat16", 150e12),
            ({"tf32": 150.0, "float32": 20.0}, "float32", 20e12),
            ({"float64": 10.0, "float32": 20.0}, "tf32", 20e12),
        ],
    )
    def test_one_that_is_not_runs_in_the_fastest_that_holds_its_values(self, listed, dtype, rate):
        assert gpu_with(**listed).flop_per_s(dtype) == rate

    def test_where_nothing_holds_its_values_there_is_no_rate(self):
        with pytest.raises(SpecError, match=r"^mine has no rate for float64 .*; it has bfloat16$"):
            gpu_with(bfloat16=200.0).flop_per_s("float64")

    def test_an_unknown_dtype_gets_the_nearest_names(self):
        with pytest.raises(SpecError, match=r"^no arithmetic is called 'fp16'; nearest: .*\bfloat16\b"):
            gpu_with(bfloat16=200.0).flop_per_s("fp16")


class TestAFileOfOnesOwn:
    def test_its_gpu_and_link_appear_beside_the_courses(self, data):
        write(data, [{**MINE, "links": ["my-link", "nvlink4"]}], [LINK])
        assert set(specs.gpus()) == {*GPUS, "mine"}
        assert specs.gpu("mine").links == ["my-link", "nvlink4"]
        assert specs.link("my-link").gb_s == 12.5

    def test_it_is_read_anew_when_it_changes_and_gone_when_it_goes(self, data):
        path = write(data, [MINE])
        assert specs.gpu("mine").memory_gib == 64.0
        path = write(data, [{**MINE, "memory_gib": 32.0}])
        os.utime(path, (1, 1))  # a time that differs, on a file system with coarse times too
        assert specs.gpu("mine").memory_gib == 32.0
        path.unlink()
        assert "mine" not in specs.gpus()

    def test_changing_the_answer_does_not_change_the_table(self):
        specs.gpus().clear()
        specs.links().clear()
        assert set(specs.gpus()) == set(GPUS)
        assert "nvlink4" in specs.links()

    def test_it_may_not_replace_a_gpu_of_the_course(self, data):
        said, line = said_of(data, name="h200")
        assert said.endswith('gpus.0.name: "h200" is in gpus.json already: take another name')
        assert line == '"name": "h200",'

    def test_it_may_not_replace_a_link_of_the_course(self, data):
        write(data, [], [{**LINK, "name": "nvlink4"}])
        (said,) = specs.problems()
        assert 'links.0.name: "nvlink4" is in gpus.json already' in said
        assert specs.link("nvlink4").gb_s == 450

    def test_it_may_not_say_one_name_twice(self, data):
        write(data, [MINE, MINE])
        (said,) = specs.problems()
        assert 'gpus.1.name: "mine" is in gpus-mine.json already' in said
        assert set(specs.gpus()) == set(GPUS)

    def test_a_link_that_is_in_no_file_gets_the_nearest_names(self, data):
        said, line = said_of(data, links=["pcie4-x16", "nvlink9"])
        assert "gpus.0.links.1: mine: no link is called 'nvlink9'; nearest: nvlink" in said
        assert 'add it to "links"' in said
        assert line == '"nvlink9"'

    @pytest.mark.parametrize(
        ("changes", "where", "remedy"),
        [
            ({"bandwidth_gb_s": 3.35}, "mine: bandwidth_gb_s", "was TB/s meant? 3.35 TB/s is 3350"),
            ({"bandwidth_gb_s": 3.35e6}, "mine: bandwidth_gb_s", "was MB/s meant?"),
            ({"memory_gib": 81559}, "mine: memory_gib", "were MiB or bytes meant?"),
            ({"tflops": {"bfloat16": 0.989}}, "mine: tflops", "was PFLOP/s meant?"),
            ({"tflops": {"bfloat16": 9.89e14}}, "mine: tflops", "989 TFLOP/s is 989"),
            ({"tflops": {}}, "mine: tflops is empty", "give the peak rate"),
            ({"source": " "}, "mine: source is empty", "name the datasheet"),
            ({"date": "March 2022"}, 'mine: date is "March 2022"', "write YYYY-MM-DD"),
            ({"date": "2022-13-01"}, 'mine: date is "2022-13-01"', "write YYYY-MM-DD"),
        ],
    )
    def test_a_wrong_unit_or_origin_is_one_line_with_the_remedy(self, data, changes, where, remedy):
        said, line = said_of(data, **changes)
        assert where in said
        assert remedy in said
        assert line == "{"  # the GPU that is meant begins here

    @pytest.mark.parametrize(
        ("changes", "words", "shown"),
        [
            ({"memory_gib": -80.0}, "gpus.0.memory_gib input should be greater than 0; got -80", '"memory_gib"'),
            ({"memory_gib": "80 GB"}, "gpus.0.memory_gib must be a number; got '80 GB'", '"memory_gib"'),
            ({"memory_gib": float("nan")}, "gpus.0.memory_gib", '"memory_gib"'),
            ({"tflops": {"bf16": 989.0}}, "'bfloat16'", '"bf16"'),
            ({"kind": "toaster"}, "gpus.0.kind input should be 'datacenter'", '"kind"'),
            ({"source": ...}, "gpus.0.source is missing: add it", "{"),
            ({"memory_gb": 80.0}, "gpus.0.memory_gb is no field of a spec: take it out", '"memory_gb"'),
        ],
    )
    def test_a_wrong_field_is_named_with_its_line(self, data, changes, words, shown):
        said, line = said_of(data, **changes)
        assert words in said
        assert line.startswith(shown)

    def test_a_file_whose_links_stand_in_a_bad_file_is_bad_too_and_others_are_not(self, data):
        write(data, [MINE], [LINK | {"gb_s": -1.0}], name="gpus-a.json")
        write(data, [{**MINE, "name": "b", "links": ["my-link"]}], name="gpus-b.json")
        write(data, [{**MINE, "name": "c"}], name="gpus-c.json")
        assert set(specs.gpus()) == {*GPUS, "c"}
        assert [said.split(",")[0] for said in specs.problems()] == ["gpus-a.json", "gpus-b.json"]

    def test_broken_json_is_named_with_its_line(self, data):
        (data / "gpus-mine.json").write_text('{\n "gpus": [\n', encoding="utf-8")
        (said,) = specs.problems()
        assert re.match(r"gpus-mine\.json, line \d: not valid JSON", said)
        assert set(specs.gpus()) == set(GPUS)

    def test_the_courses_file_missing_is_one_line(self, data):
        (data / "gpus.json").unlink()
        with pytest.raises(SpecError, match=r"^gpus\.json cannot be read"):
            specs.gpus()


def test_an_unknown_gpu_gets_the_nearest_names():
    with pytest.raises(SpecError, match=r"^no GPU is called 'H100'; nearest: .*h100-80gb"):
        specs.gpu("H100")


def test_a_link_built_by_hand_is_checked_too():
    with pytest.raises(SpecError, match=r"^my-link: gb_s is 450000 GB/s: was MB/s meant\?"):
        LinkSpec(**{**LINK, "gb_s": 450_000.0})
