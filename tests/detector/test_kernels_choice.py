"""Which kernel runs, and that a fused attention of torch's and the column sums fit together."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from lapwing_detector import kernels
from lapwing_detector.kernels import fused, tiles
from tests.detector.kernel_cases import DEVICE, EXACT, Case, case, error, small_tiles

__all__ = ["small_tiles"]

GPU = torch.device("cuda", 0)


# Torch's fused attention.


def _of_the_cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, causal, scale=scaling)  # type: ignore[no-any-return]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Torch's flash attention for CPUs in place of the GPU's; whether each call was causal."""
    calls: list[bool] = []

    def choose(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float) -> fused.Operator:
        calls.append(causal)
        return _of_the_cpu

    monkeypatch.setattr(fused, "choose", choose)
    return calls


needs_the_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="stands in for the GPU's own flash attention")


@needs_the_cpu
@pytest.mark.parametrize("rows", [(37, 0), (1, 30), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_and_column_sums(asked: list[bool], rows: tuple[int, int], dtype: torch.dtype) -> None:
    some = case(*rows, dtype=dtype, heads=4, shared=2, value_width=12, right=(0, 1))
    # In bfloat16 this stand-in's products are rounded where the GPU's are not, so its log-sum-exp is off.
    assert error(some) < (EXACT if dtype == torch.float32 else 0.02)
    assert asked == [rows[0] > 1]


@needs_the_cpu
def test_control_log_sum_exp_of_the_fused_attention(asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def in_bits(*arguments: Any) -> tuple[Tensor, Tensor]:
        output, lse = _of_the_cpu(*arguments)
        return output, lse * 1.4427

    monkeypatch.setattr(fused, "choose", lambda *_, **__: in_bits)
    some = case(20, value_width=12)
    assert error(some, against=some) > 0.01


@pytest.mark.parametrize(
    "special",
    [
        {"rows": 20, "window": 9},
        {"rows": 20, "softcap": 1.5},
        {"rows": 20, "sinks": True},
        {"rows": 5, "first": 20},
        {"rows": 1, "first": 20, "window": 9},
    ],
)
def test_what_fused_attention_can_not_do_never_goes_there(asked: list[bool], special: dict[str, Any]) -> None:
    assert error(case(**special)) < EXACT
    assert asked == []


# Its choice. Tensors of a GPU without one: they have a shape and a device, and no numbers.


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What torch would choose, under "chosen"; and what it was asked, under "asked"."""
    state: dict[str, Any] = {"chosen": SDPBackend.FLASH_ATTENTION}

    def choice(query: Tensor, key: Tensor, value: Tensor, *rest: object, **options: object) -> int:
        state["asked"] = (rest, options)
        return int(state["chosen"].value)

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode():
        yield state


def _on_a_gpu(dtype: torch.dtype = torch.bfloat16, width: int = 64, rows: int = 32) -> list[Tensor]:
    return [torch.empty(2, heads, rows, width, dtype=dtype, device=GPU) for heads in (4, 2, 2)]


@pytest.mark.parametrize("chosen", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_the_fused_attention_that_torch_chooses(backend: dict[str, Any], chosen: SDPBackend) -> None:
    backend["chosen"] = chosen
    inputs = _on_a_gpu()
    operator = fused.choose(*inputs, causal=True, scaling=0.3)
    assert operator is not None
    assert operator.__name__ == {"FLASH_ATTENTION": "_flash", "CUDNN_ATTENTION": "_cudnn"}[chosen.name]
    output, lse = operator(*inputs, True, 0.3)  # torch checks the arguments and gives the shapes
    assert (output.shape, lse.shape, lse.dtype) == ((2, 4, 32, 64), (2, 4, 32), torch.float32)
    assert backend["asked"] == ((None, 0.0, True), {"scale": 0.3, "enable_gqa": True})


@pytest.mark.parametrize("chosen", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])
def test_another_choice_is_no_fused_attention(backend: dict[str, Any], chosen: SDPBackend) -> None:
    backend["chosen"] = chosen
    assert fused.choose(*_on_a_gpu(), causal=True, scaling=0.3) is None


def test_other_numbers_are_not_asked_about(backend: dict[str, Any]) -> None:
    assert fused.choose(*_on_a_gpu(torch.float32), causal=True, scaling=0.3) is None
    assert fused.choose(*_on_a_gpu(width=84), causal=True, scaling=0.3) is None
    assert fused.choose(*(one.cpu() for one in _on_a_gpu()), causal=True, scaling=0.3) is None
    assert "asked" not in backend


# Where kernels run.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with a new GPU, a CUDA build of torch, and a compiler."""
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    forget = (kernels._unfit.cache_clear, kernels.missing.cache_clear, kernels._say.cache_clear)
    for clear in forget:
        clear()
    yield monkeypatch
    for clear in forget:
        clear()


def test_kernels_run_on_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    assert kernels.available(GPU)


def test_kernels_do_not_run_on_an_old_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.available(GPU)


def test_kernels_do_not_run_on_another_makers_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "cuda", None)
    assert not kernels.available(GPU)


def test_the_cpu_is_for_tests(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(kernels, "INTERPRETED", False)
    assert not kernels.available(torch.device("cpu"))
    gpu.setattr(kernels, "INTERPRETED", True)
    assert kernels.available(torch.device("cpu"))


def test_missing_triton_is_said_once(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(kernels, "find_spec", lambda name: None)
    with pytest.warns(kernels.KernelsMissing, match="pip install triton"):
        assert not kernels.available(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.available(GPU)
        assert not kernels.available(torch.device("cpu"))


def test_a_missing_compiler_is_said(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(kernels, "which", lambda name: None)
    gpu.delenv("CC", raising=False)
    with pytest.warns(kernels.KernelsMissing, match="install gcc"):
        assert not kernels.available(GPU)


def test_a_device_that_they_are_not_for_is_said_once(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for device, why in ((GPU, r"8\.0, this GPU has \(7, 5\)"), (torch.device("mps"), "for NVIDIA GPUs")):
        with pytest.warns(kernels.KernelsMissing, match=why):
            assert not kernels.available(device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not kernels.available(device)


def test_the_package_imports_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import lapwing_detector.kernels"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(subprocess.CalledProcessError):  # the control: the kernels themselves do need it
        subprocess.run([sys.executable, "-c", program + ".attending"], check=True, capture_output=True)


# Sizes of blocks.


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize(("itemsize", "widest"), [(2, 256), (4, 128)])
def test_blocks_are_what_kernels_need(capability: tuple[int, int], itemsize: int, widest: int) -> None:
    for width in (16, 32, 64, 128, 256):
        chosen = tiles.choose(capability, itemsize, min(width, widest))
        for tile in (chosen.sums, chosen.forward, chosen.row):
            assert min(tile.rows, tile.columns) >= 16  # the least that tensor cores multiply
            assert all(size & (size - 1) == 0 for size in (tile.rows, tile.columns, tile.warps))
        assert chosen.sums.columns % chosen.sums.rows == 0 or chosen.sums.rows % chosen.sums.columns == 0


def test_widths_are_padded() -> None:
    assert [tiles.block_width(width) for width in (1, 16, 17, 80, 128, 192)] == [16, 16, 32, 128, 128, 256]


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    some: Case = case(20, window=9)
    monkeypatch.setattr("lapwing_detector.kernels.attending.tiles_for", tiles.tiles_for)
    assert error(some) < EXACT
