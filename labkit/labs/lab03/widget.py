"""Will it run? A widget for a model, a device, a context and so many users."""

from __future__ import annotations

import html

import ipywidgets

from labkit import sizing, specs
from labkit.labs.lab03 import plan_figure
from labkit.sizing import SizeError, gigabytes
from labkit.sizing.links import link_between
from labkit.sizing.report import count_users
from labkit.specs import SpecError
from labkit.widgets import choice, picture, wide, with_value

CONTEXTS = [2**power for power in range(10, 21)]
USERS = [2**power for power in range(13)]
KV_DTYPES = ["float16", "float8", "int8", "int4", "int2"]
WEIGHT_DTYPES = ["bfloat16", "float8", "int8", "int4"]
RANKS = [1, 2, 4, 8]


class Planner(ipywidgets.VBox):
    """A model on a GPU: bars of weights, reserve, cache and what is free, the floor of a step, and what breaks first.

    Models and GPUs are those in `data/`, a user's own included. ranks: devices that share the model by tensor
    parallelism, over the fastest link that the GPU names. reserve: as in `sizing.plan`. Raises SpecError for a name
    that is not there.
    """

    def __init__(
        self,
        model: str = "qwen2.5-7b",
        gpu: str = "h100-80gb",
        context: int = 8192,
        users: int = 32,
        *,
        kv_dtype: str = "float16",
        weight_dtype: str = "bfloat16",
        ranks: int = 1,
        reserve: float = sizing.RESERVE,
    ) -> None:
        specs.model(model), specs.gpu(gpu)  # a wrong name is answered with the nearest ones
        self.models, self.gpus, self.reserve = specs.models(), specs.gpus(), reserve
        self.plan: sizing.Plan | None = None
        self.model = choice("model", list(self.models), model)
        self.gpu = choice("GPU", list(self.gpus), gpu)
        self.ranks = choice("how many", RANKS, ranks)
        self.kv_dtype = choice("K and V in", KV_DTYPES, kv_dtype)
        self.weight_dtype = choice("weights in", WEIGHT_DTYPES, weight_dtype)
        self.context = slider("context", CONTEXTS, context)
        self.users = slider("users", USERS, users)
        self.label = ipywidgets.HTML().add_class("labkit-label")
        self.image = picture("planner-image", display="none")
        self.controls = [
            self.model, self.gpu, self.ranks, self.kv_dtype, self.weight_dtype, self.context, self.users,
        ]  # fmt: skip
        super().__init__([*self.controls, self.label, self.image])
        self.add_class("planner")
        self.draw()
        for control in self.controls:
            control.observe(self.draw, "value")

    def draw(self, change: object = None) -> None:
        """Bring picture and label up to date; a size that cannot be is a line in the label, and the picture stays."""
        gpu, ranks = self.gpus[self.gpu.value], self.ranks.value
        try:
            self.plan = sizing.plan(
                self.models[self.model.value],
                gpu,
                context=self.context.value,
                users=self.users.value,
                dtype=self.kv_dtype.value,
                weight_dtype=self.weight_dtype.value,
                reserve=self.reserve,
                ranks=ranks,
                link=link_between(gpu, ranks),
            )
        except (SizeError, SpecError) as error:  # SpecError: of a GPU whose rates lack a dtype
            self.label.value = html.escape(str(error))
            return
        # The text first: it takes a few milliseconds, a picture a hundred.
        self.label.value = "<br>".join(html.escape(line) for line in summary(self.plan))
        self.image.show(plan_figure.plan_bars([self.plan]))
        self.image.layout.display = None


def summary(plan: sizing.Plan) -> list[str]:
    """A plan in four lines: bytes, limits, the floor of a step, what breaks first."""
    each = " on each GPU" if plan.ranks > 1 else ""
    left = f"free {gigabytes(plan.free)}" if plan.fits else f"{gigabytes(-plan.free)} too much"
    longest = {None: "any", 0: "none"}.get(plan.context_that_fits, f"{plan.context_that_fits or 0:,} tokens")
    return [
        f"weights {gigabytes(plan.weights)} · reserve {gigabytes(plan.reserve)} · cache {gigabytes(plan.cache)} · "
        f"{left}{each}",
        f"users that fit at {plan.context:,} tokens: {plan.users_that_fit:,} · "
        f"longest context for {count_users(plan.users)}: {longest} (trained for {plan.trained_context:,})",
        f"TPOT at least {plan.step * 1e3:,.2f} ms ({plan.step_bound} decides): "
        f"at most {plan.users / plan.step:,.0f} tokens/s for all users",
        plan.verdict,
    ]


def slider(description: str, options: list[int], value: int) -> ipywidgets.SelectionSlider:
    """A slider over counts that double, and `value` between them."""
    pairs = [(f"{count:,}", count) for count in sorted(with_value(options, value))]
    return ipywidgets.SelectionSlider(
        options=pairs, value=value, description=description, continuous_update=False, **wide()
    )
