"""How fast a run goes, and how much of what the hardware can do it uses."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .loss import Losses

REPEATS = 5


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOPs per second of a large matrix product on this device now: what a share of the hardware is counted by.

    Of a smaller one where large ones would take more than a second, as bf16 does on a CPU that has no such numbers.
    """
    size *= 1 if device.type == "cpu" else 8
    rate = _matmul_rate(device, dtype, size // 4)
    return rate if REPEATS * 2 * size**3 > rate else max(rate, _matmul_rate(device, dtype, size))


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repetitions: int,
    device: torch.device | None = None,
    *,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Seconds of each: median, least and most of so many rounds, in which all take turns; a first one warms up.

    Args:
        before: called before each, outside of its time.
    """
    device = device or torch.device("cpu")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repetitions + 1):
        for name, function in functions.items():
            before()
            _wait(device)
            started = time.perf_counter()
            function()
            _wait(device)
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: spread(found) for name, found in times.items()}


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Meter:
    """Tokens, nats and time of the steps since the last line of metrics.

    Args:
        flops: of training on one sequence of so many tokens.
        peak: FLOPs per second of one process's device, from `matmul_peak`.
        device: where memory is measured.
    """

    def __init__(self, flops: Callable[[int], float], peak: float, device: torch.device) -> None:
        self._flops, self._peak, self._device = flops, peak, device
        self.start(0)

    def start(self, step: int) -> None:
        """Begin to count, at so many steps done."""
        self._step, self._began = step, time.perf_counter()
        self._tokens = self._predicted = 0
        self._work = 0.0
        self._nats = self._kl = torch.zeros((), dtype=torch.float64)

    def add(self, ids: Tensor, losses: Losses) -> None:
        """A micro-batch `[batch, tokens]` of this process."""
        self._tokens += ids.numel()
        self._work += len(ids) * self._flops(ids.shape[1])
        self._predicted += losses.tokens
        self._nats, self._kl = self._nats + losses.nats.double().cpu(), self._kl + losses.kl.double().cpu()

    @property
    def loss(self) -> float:
        """Nats per token of this process since the last line."""
        return float(self._nats) / max(1, self._predicted)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    def since_last(self, step: int, steps: int, accelerator: Any) -> dict[str, float]:
        """The numbers since the last call, over all processes.

        nats, kl: per predicted token. tokens_per_second, of all processes. mfu: FLOPs of the model by `spans.cost`,
        per second and process, over the peak. peak_memory in bytes, of the process that has most. seconds_left.
        """
        seconds = time.perf_counter() - self._began
        own = [self._tokens, self._predicted, float(self._nats), float(self._kl), self._work]
        sums = torch.tensor(own, dtype=torch.float64, device=self._device)
        memory = torch.tensor([peak_memory(self._device)], dtype=torch.float64, device=self._device)
        tokens, predicted, nats, kl, work = accelerator.reduce(sums).tolist()
        numbers = {
            "nats": nats / max(1.0, predicted),
            "kl": kl / max(1.0, predicted),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "mfu": work / seconds / accelerator.num_processes / self._peak,
            "peak_memory": float(accelerator.gather(memory).max()),
            "seconds_left": seconds / max(1, step - self._step) * (steps - step),
        }
        self.start(step)
        return numbers
