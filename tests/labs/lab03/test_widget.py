import json
import shutil

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from labkit import plots, sizing, specs
from labkit.labs.lab03 import plan_figure
from labkit.labs.lab03 import widget as module
from labkit.labs.lab03.widget import Planner
from labkit.sizing import GB, RESERVE
from labkit.specs import SpecError


def plan(model="qwen2.5-7b", gpu="h100-80gb", **how):
    return sizing.plan(specs.model(model), specs.gpu(gpu), **how)


def bars(figure, color, row=0):
    """From where to where the bars of a colour go in a row, in GB."""
    found = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    drawn = [p for p in found if abs(p.get_y() + p.get_height() / 2 - row) < 0.01 and p.get_hatch() is None]
    same = [p for p in drawn if to_hex(p.get_facecolor()) == color.lower()]
    return [(p.get_x(), p.get_x() + p.get_width()) for p in same]


def hatched(figure):
    return [patch for patch in figure.axes[0].patches if patch.get_hatch()]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.fixture
def planner():
    return Planner("qwen2.5-7b", "h100-80gb", context=8192, users=32)


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A copy of `data/`, to put files into."""
    shutil.copytree(specs.DATA / "models", tmp_path / "models")
    shutil.copy(specs.DATA / "gpus.json", tmp_path)
    monkeypatch.setattr(specs, "DATA", tmp_path)
    return tmp_path


def test_parts_stand_behind_one_another_and_fill_the_memory():
    asked = plan(users=32)
    figure = plan_figure.plan_bars([asked])
    end = 0.0
    for part in ("weights", "reserve", "cache", "free"):
        ((left, right),) = bars(figure, plots.COLORS[part])
        assert left == pytest.approx(end)
        assert right - left == pytest.approx(getattr(asked, part) / GB)
        end = right
    assert end == pytest.approx(asked.memory / GB)
    assert hatched(figure) == []
    assert not any("over" in text for text in texts(figure))


def test_what_does_not_fit_is_hatched_from_the_mark_to_the_end_of_the_bar():
    asked = plan(users=140)
    figure = plan_figure.plan_bars([asked])
    (over,) = hatched(figure)
    assert over.get_x() == pytest.approx(asked.memory / GB)
    assert over.get_width() == pytest.approx(-asked.free / GB)
    assert f"{-asked.free / GB:.1f} over" in texts(figure)
    assert bars(figure, plots.COLORS["cache"])[-1][1] == pytest.approx((asked.memory - asked.free) / GB)
    assert to_hex(over.get_edgecolor()) == plots.COLORS["highlight"].lower()


def test_a_part_that_is_cut_at_the_mark_still_shows_its_whole_size():
    asked = plan("llama-3.1-70b", users=1)
    assert asked.weights > asked.memory
    assert f"{asked.weights / GB:.0f}" in texts(plan_figure.plan_bars([asked]))


def test_a_bar_beyond_the_axis_says_how_long_it_is():
    asked = plan(context=2**20, users=4096)
    figure = plan_figure.plan_bars([asked])
    assert figure.axes[0].get_xlim()[1] < 3 * asked.memory / GB
    assert f"{-asked.free / GB:,.0f} over →" in texts(figure)


def test_each_plan_has_its_bar_its_label_its_floor_and_its_memorys_mark():
    plans = [plan(users=32), plan(gpu="rtx-4090", dtype="int4"), plan("llama-3.1-70b", "h200", ranks=2)]
    figure = plan_figure.plan_bars(plans)
    for row, asked in enumerate(plans):
        assert bars(figure, plots.COLORS["weights"], row)
        (label,) = [text for text in texts(figure) if text.startswith(asked.model) and asked.gpu in text]
        assert f"weights in {asked.weight_dtype}, K and V in {asked.kv_dtype}" in label
        assert f"TPOT ≥ {asked.step * 1e3:.{2 if asked.step < 0.01 else 1}f} ms" in texts(figure)
    marks = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert marks == pytest.approx([asked.memory / GB for asked in plans])
    assert "2 x h200" in " ".join(texts(figure))
    assert "on each device" in figure.axes[0].get_xlabel()
    assert "GB" in figure.axes[0].get_xlabel()


def test_no_plan_is_no_picture():
    with pytest.raises(ValueError, match="at least one plan"):
        plan_figure.plan_bars([])


@pytest.mark.parametrize("name", ["gemma-3-27b", "deepseek-v3", "jamba-v0.1", "gpt2"])
def test_every_kind_of_layer_and_the_smallest_and_largest_asks_can_be_drawn(name):
    for context, users in ((1, 1), (2**20, 4096)):
        assert plan_figure.plan_bars([plan(name, context=context, users=users)]).axes


def test_the_label_says_bytes_limits_floor_and_what_breaks_first(planner):
    asked = plan(context=8192, users=32)
    said = planner.label.value
    for text in (
        f"weights {asked.weights / GB:.1f} GB",
        f"cache {asked.cache / GB:.1f} GB",
        f"free {asked.free / GB:.1f} GB",
        "users that fit at 8,192 tokens: 126",
        f"longest context for 32 users: {asked.context_that_fits:,} tokens",
        f"TPOT at least {asked.step * 1e3:.2f} ms (memory decides)",
        asked.verdict,
    ):
        assert text in said
    planner.users.value = 256
    assert "too much" in planner.label.value
    assert "The cache breaks first: 126 of 256 users fit" in planner.label.value
    planner.model.value = "llama-3.1-70b"
    assert "The weights break first" in planner.label.value
    assert "longest context for 256 users: none" in planner.label.value


@pytest.mark.parametrize(
    ("control", "value", "argument"),
    [
        ("model", "llama-3.1-8b", None),
        ("gpu", "h200", None),
        ("context", 2**17, "context"),
        ("users", 64, "users"),
        ("kv_dtype", "int4", "dtype"),
        ("weight_dtype", "int8", "weight_dtype"),
        ("ranks", 4, "ranks"),
    ],
)
def test_each_control_redraws_with_one_plan_of_what_is_chosen(planner, monkeypatch, control, value, argument):
    asked, real = [], sizing.plan
    monkeypatch.setattr(
        sizing, "plan", lambda model, gpu, **how: asked.append((model, gpu, how)) or real(model, gpu, **how)
    )
    before = planner.image.png, planner.label.value
    getattr(planner, control).value = value
    ((model, gpu, how),) = asked
    seen = {"model": model.name, "gpu": gpu.name}.get(control) if argument is None else how[argument]
    assert seen == value
    assert planner.image.png != before[0]
    assert planner.label.value != before[1]
    assert planner.image.png.startswith(b"\x89PNG")


def test_several_gpus_talk_over_the_fastest_link_that_theirs_names(planner):
    planner.ranks.value = 2
    link = specs.link(specs.gpu("h100-80gb").links[0])
    assert planner.plan == plan(context=8192, users=32, ranks=2, link=link)
    assert planner.plan.step > plan(context=8192, users=32, ranks=2).step
    assert "on each GPU" in planner.label.value


def test_heads_that_do_not_divide_are_one_line_and_the_picture_stays(planner):
    before = planner.image.png
    planner.ranks.value = 8
    assert planner.label.value == "28 query heads do not divide over 8 ranks: take one of [1, 2, 4, 7, 14, 28]"
    assert planner.image.png == before
    planner.ranks.value = 4
    assert "weights" in planner.label.value


def test_a_first_size_that_cannot_be_is_a_line_without_a_broken_picture():
    planner = Planner("qwen2.5-7b", "h100-80gb", ranks=8)
    assert "do not divide" in planner.label.value
    assert planner.image.layout.display == "none"
    planner.ranks.value = 1
    assert planner.image.layout.display is None


def test_a_context_and_users_between_the_steps_of_the_sliders_can_be_asked_for():
    planner = Planner("qwen2.5-7b", "h100-80gb", context=10_000, users=50)
    assert planner.plan == plan(context=10_000, users=50)
    contexts = [value for _, value in planner.context.options]
    assert contexts == sorted(contexts)
    assert {1024, 10_000, 2**20} <= set(contexts)
    assert [value for _, value in planner.users.options][::13] == [1, 4096]


def test_the_reserve_can_be_said():
    assert Planner("qwen2.5-7b", "h100-80gb", reserve=0.0).plan == plan(users=32, reserve=0.0)
    assert Planner("qwen2.5-7b", "h100-80gb").plan == plan(users=32, reserve=RESERVE)


@pytest.mark.parametrize("names", [{"model": "qwen2.5-7"}, {"gpu": "h100-80"}])
def test_a_name_that_is_not_there_is_answered_with_the_nearest(names):
    with pytest.raises(SpecError, match=r"nearest: .*(qwen2\.5-7b|h100-80gb)"):
        Planner(**names)


def test_a_users_own_model_and_gpu_can_be_chosen(own_data):
    model = json.loads((own_data / "models" / "qwen2.5-7b.json").read_text()) | {"name": "mine", "num_layers": 14}
    (own_data / "models" / "mine.json").write_text(json.dumps(model))
    gpu = json.loads((own_data / "gpus.json").read_text())["gpus"][0] | {"name": "my-gpu", "memory_gib": 1000}
    (own_data / "gpus-mine.json").write_text(json.dumps({"gpus": [gpu]}))
    planner = Planner("qwen2.5-7b", "h100-80gb")
    planner.model.value, planner.gpu.value = "mine", "my-gpu"
    assert (planner.plan.model, planner.plan.gpu) == ("mine", "my-gpu")
    assert planner.plan.memory == 1000 * 2**30
    assert planner.plan.bytes_per_token == 57_344 / 2


def test_every_model_on_every_gpu_is_answered_in_four_lines():
    pairs = [(model, gpu) for model in specs.models().values() for gpu in specs.gpus().values()]
    assert len(pairs) >= 35 * 10
    for model, gpu in pairs:
        lines = module.summary(sizing.plan(model, gpu, context=2**17, users=512))
        assert len(lines) == 4
        assert all(lines), f"{model.name} on {gpu.name}"
