"""What all hosts share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.host import redirect_output, set_num_threads, wait_for_gpu_memory
from ka2l.errors import ResourcesBusyError


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cpus", "threads"), [(0.1, 1), (1.0, 1), (1.8, 2)])
def test_a_fraction_of_a_core_is_rounded_to_threads(
    cpus: float, threads: int, restored_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    set_num_threads(cpus)
    assert torch.get_num_threads() == threads
    assert os.environ["OMP_NUM_THREADS"] == str(threads)


def test_output_of_native_code_goes_to_the_log_too(tmp_path: Path) -> None:
    saved = os.dup(1), os.dup(2)
    try:
        redirect_output(str(tmp_path / "worker.log"))
        os.write(1, b"from the library\n")
        os.write(2, b"from its logger\n")
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
    assert (tmp_path / "worker.log").read_text() == "from the library\nfrom its logger\n"


def test_a_worker_that_does_not_see_the_log_folder_keeps_its_output(tmp_path: Path) -> None:
    redirect_output(str(tmp_path / "elsewhere" / "worker.log"))
    assert not (tmp_path / "elsewhere").exists()


def _fake_gpu(monkeypatch: pytest.MonkeyPatch, free_gib: list[int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda: ((free_gib.pop(0) if len(free_gib) > 1 else free_gib[0]) << 30, 80 << 30)
    )


def test_an_engine_waits_until_the_memory_of_the_one_before_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10, 10, 79]
    _fake_gpu(monkeypatch, free)
    wait_for_gpu_memory(0.9, timeout_s=30)
    assert free == [79]


def test_memory_that_stays_taken_is_an_error_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_gpu(monkeypatch, [10])
    with pytest.raises(ResourcesBusyError, match=r"10\.0 of the GPU's 80\.0 GiB"):
        wait_for_gpu_memory(0.9, timeout_s=0.0)
