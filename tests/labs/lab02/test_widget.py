import pytest

from labkit.labs.lab02.widget import CacheStepper

WORDS = ["The", "capital", "of", "France", "is", "Paris", "."]


@pytest.fixture
def stepper() -> CacheStepper:
    return CacheStepper(WORDS, prompt=5, num_layers=3, bytes_per_token=10)


def test_steps_run_from_prefill_to_the_last_token_held(stepper):
    assert (stepper.step.min, stepper.step.max) == (0, 2)
    assert stepper.held() == (0, 5)
    stepper.step.value = 2
    assert stepper.held() == (6, 1)


def test_bytes_count_every_layer_that_has_appended(stepper):
    assert stepper.nbytes() == 5 * 3 * 10
    stepper.step.value, stepper.layer.value = 1, 2
    assert stepper.nbytes() == (5 * 3 + 2) * 10
    assert "170 bytes held" in stepper.label.value
    assert "“Paris”; 2 of 3 layers" in stepper.label.value


def test_the_picture_follows_both_sliders(stepper):
    seen = {stepper.image.png}
    stepper.step.value = 1
    seen.add(stepper.image.png)
    stepper.layer.value = 1
    seen.add(stepper.image.png)
    assert len(seen) == 3


def test_a_words_markup_is_shown_and_not_obeyed():
    stepper = CacheStepper(["a", "<b>"], prompt=1, num_layers=1, bytes_per_token=1, step=1)
    assert "&lt;b&gt;" in stepper.label.value
