"""MFU: of a known peak, of a measured one, and never above 1."""

import pytest
import torch

from train.utilisation import UtilisationError, datasheet_peak, measured_peak, utilisation

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Some other card", None),
    ],
)
def test_peaks_by_name(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert datasheet_peak(CUDA) == (None if tflops is None else tflops * 1e12)
    assert datasheet_peak(CPU) is None


def test_a_measured_peak_is_a_rate():
    assert 1e8 < measured_peak(CPU, repetitions=2) < 1e14


def test_utilisation_above_one_is_an_error():
    assert utilisation(494.7e12, 989.4e12) == pytest.approx(0.5)
    with pytest.raises(UtilisationError, match=r"MFU is 1\.01"):
        utilisation(1000e12, 989.4e12)
