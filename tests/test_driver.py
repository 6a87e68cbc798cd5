"""The driver gate says no, with the reason, wherever a TensorRT runtime would end the process;
and names the GPU where there is one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from bindings import driver

from runtime.core.errors import MissingComponent
from runtime.engines.gpu.probe import device, why_no_gpu


def test_driver_gate_names_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate tells a missing driver, a missing device and a failing driver apart."""
    assert (
        why_no_gpu("libcuda-absent.so.1")
        == "the NVIDIA driver is not installed (libcuda-absent.so.1 cannot be loaded)"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (
        why_no_gpu(driver(tmp_path, init=100))
        == "the NVIDIA driver answers CUDA_ERROR_NO_DEVICE (100)"
    )
    assert why_no_gpu(driver(tmp_path, init=803)) == "the NVIDIA driver answers CUresult (803)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (
        why_no_gpu(driver(tmp_path, count=0))
        == "the NVIDIA driver lists no GPU (CUDA_VISIBLE_DEVICES is '')"
    )
    assert why_no_gpu(driver(tmp_path)) is None


def test_gpu_description_is_complete(tmp_path: Path) -> None:
    """The device is named with its capability, its memory and its driver."""
    second = device(1, driver(tmp_path))
    assert (second.name, second.compute_capability, second.memory, second.driver) == (
        "NVIDIA Second",
        (8, 9),
        41 << 30,
        (13, 2),
    )
    assert str(second) == "NVIDIA Second (compute capability 8.9, 41.0 GiB)"


def test_absent_gpu_is_missing_component(tmp_path: Path) -> None:
    """The error of an absent device has a remedy."""
    with pytest.raises(MissingComponent, match="no GPU number 2, the driver lists 2"):
        device(2, driver(tmp_path))
    with pytest.raises(MissingComponent, match="driver is not installed") as caught:
        device(0, "libcuda-absent.so.1")
    assert caught.value.exit_code == 3 and "nvidia-smi" in caught.value.remedy
