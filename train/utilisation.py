"""Model FLOPs utilisation: the share of a device's peak that goes into what the model needs.

The peak is that of dense bf16 matrix products, in FLOP/s: by the datasheet, or measured on the spot.
"""

import statistics
import time

import torch

# Dense bf16 with fp32 accumulation, by NVIDIA's datasheets. The first that the device's name contains counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "L4": 121e12,
    "A10": 125e12,
}
PRODUCT = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}  # measured: width of a square, dtype


class UtilisationError(RuntimeError):
    """A utilisation that cannot be: the FLOPs or the seconds are wrong."""


def datasheet_peak(device: torch.device) -> float | None:
    """FLOP/s of a known GPU; None for a CPU or another GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def measured_peak(device: torch.device, repetitions: int = 10) -> float:
    """FLOP/s of a large matrix product, the median of some: bf16 on a GPU, fp32 on the CPU."""
    width, dtype = PRODUCT[device.type]
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))

    def seconds() -> float:
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for _ in range(3):
        seconds()
    return 2 * width**3 / statistics.median(seconds() for _ in range(repetitions))


def utilisation(flops_per_second: float, peak: float) -> float:
    """MFU.

    Raises:
        UtilisationError: it is above 1.
    """
    share = flops_per_second / peak
    if share > 1:
        raise UtilisationError(
            f"MFU is {share:.2f}: no step is faster than the hardware, so its FLOPs, its seconds or the peak of "
            f"{peak / 1e12:.1f} TFLOP/s are wrong"
        )
    return share
