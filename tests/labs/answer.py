"""Wrong answers: the mistakes people really make, each with the diagnosis that its check must give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wrong:
    """One wrong answer. `mistake` says in a few words what is wrong; `source` where it was met, if it was."""

    exercise: str
    diagnosis: str
    mistake: str
    answer: Callable
    source: str = ""


def there(answer: Callable) -> Callable:
    """The answer, with every tensor that it makes on the device of its first argument."""

    @functools.wraps(answer)
    def answered(first: Any, *args: Any, **kwargs: Any) -> Any:
        with first.device:
            return answer(first, *args, **kwargs)

    return answered
