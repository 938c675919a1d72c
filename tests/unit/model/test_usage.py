import pytest
import torch
from fakes import tiny_config, tiny_model

from pixrec.model import usage as module
from pixrec.model.usage import flops_per_token, peak_flops, usage


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12)]
)
def test_known_devices_by_their_names(name, expected):
    assert peak_flops(name) == expected


def test_an_unknown_device_has_no_mfu(monkeypatch):
    assert peak_flops("Some Accelerator") is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    for name, figures in (("Some Accelerator", {"peak_memory_bytes"}), ("NVIDIA H100", {"peak_memory_bytes", "mfu"})):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert set(usage(tiny_model().tower, 100.0, torch.device("cuda"))) == figures


def test_mfu_is_the_arithmetic_of_the_tokens_over_that_of_the_device(monkeypatch):
    tower = tiny_model().tower
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    figures = usage(tower, 1e6, torch.device("cuda"))
    assert figures["mfu"] == pytest.approx(1e6 * flops_per_token(tower) / module.PEAK_FLOPS["H100"])


def test_a_frozen_weight_costs_no_gradient():
    full = flops_per_token(tiny_model().tower)
    lora = flops_per_token(tiny_model(tiny_config(model={"lora": {"enabled": True, "rank": 1}})).tower)
    assert 4 / 6 < lora / full < 0.8
