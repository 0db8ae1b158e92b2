from types import SimpleNamespace

import pytest
import torch

from labkit import device

GB = 1_000_000_000


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("LABKIT_DEVICE", "LABKIT_PROFILE", "LABKIT_THREADS"):
        monkeypatch.delenv(name, raising=False)
    device.cuda_problem.cache_clear()
    yield
    device.cuda_problem.cache_clear()


def pretend_gpu(monkeypatch, *, free=20 * GB, total=24 * GB, product=64.0, fails=None):
    """A CUDA device that exists only in the functions that `pick_device` asks."""

    def ones(*shape, device):
        assert device == "cuda"
        if fails:
            raise fails
        return torch.full(shape, product / 64)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretend 24")
    monkeypatch.setattr(device, "torch", SimpleNamespace(**{**vars(torch), "ones": ones}))


def test_auto_takes_a_gpu_that_has_memory_and_computes(monkeypatch):
    pretend_gpu(monkeypatch)
    picked = device.pick_device()
    assert picked.torch_device == torch.device("cuda")
    assert "Pretend 24" in picked.reason


def test_cpu_is_taken_when_asked_for_though_there_is_a_gpu(monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setenv("LABKIT_DEVICE", "cpu")
    picked = device.pick_device()
    assert picked.torch_device == torch.device("cpu")
    assert "LABKIT_DEVICE=cpu" in picked.reason


@pytest.mark.parametrize("setting", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ({"free": 1 * GB, "total": 2 * GB}, "1.0 GB free of 2.0 GB"),
        (
            {"fails": RuntimeError("CUDA error: no kernel image is available\nlong story")},
            "no kernel image is available)",
        ),
        ({"fails": AssertionError("Torch not compiled with CUDA enabled")}, "not compiled"),
        ({"product": 63.0}, "wrong product"),
    ],
)
def test_a_gpu_too_small_or_failing_falls_back_to_the_cpu_and_says_so(monkeypatch, setting, gpu, said):
    pretend_gpu(monkeypatch, **gpu)
    monkeypatch.setenv("LABKIT_DEVICE", setting)
    picked = device.pick_device()
    assert picked.torch_device == torch.device("cpu")
    assert said in picked.reason
    assert ("LABKIT_DEVICE=cuda cannot be met" in picked.reason) == (setting == "cuda")


def test_without_a_gpu_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in device.pick_device().reason


def test_a_gpu_once_taken_stays_taken_when_our_own_model_fills_it(monkeypatch):
    pretend_gpu(monkeypatch)
    assert device.pick_device().torch_device.type == "cuda"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * GB, 24 * GB))
    assert device.pick_device().torch_device.type == "cuda"


@pytest.mark.parametrize(
    ("name", "ask", "choices"),
    [("LABKIT_DEVICE", device.pick_device, device.DEVICES), ("LABKIT_PROFILE", device.profile, device.PROFILES)],
)
def test_a_wrong_setting_names_the_right_ones(monkeypatch, name, ask, choices):
    monkeypatch.setenv(name, "gpu0")
    with pytest.raises(ValueError, match=name) as caught:
        ask()
    assert all(choice in str(caught.value) for choice in ("gpu0", *choices))


@pytest.mark.parametrize(
    ("setting", "expected"), [(None, "quick"), ("", "quick"), ("FULL", "full"), ("quick", "quick")]
)
def test_the_profile_is_quick_unless_full_is_asked(monkeypatch, setting, expected):
    if setting is not None:
        monkeypatch.setenv("LABKIT_PROFILE", setting)
    assert device.profile() == expected


def test_threads_are_set_to_what_is_asked_or_to_the_usable_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("LABKIT_THREADS", "3")
        assert device.set_threads() == 3 == torch.get_num_threads()
        monkeypatch.delenv("LABKIT_THREADS")
        monkeypatch.setattr(device, "usable_cores", lambda: 2)
        assert device.set_threads() == 2 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("setting", ["0", "-1", "two", "1.5"])
def test_a_thread_count_that_is_none_is_refused(monkeypatch, setting):
    monkeypatch.setenv("LABKIT_THREADS", setting)
    with pytest.raises(ValueError, match="LABKIT_THREADS"):
        device.set_threads()
