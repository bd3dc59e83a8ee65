"""Where plans are measured: in this process, in several of this machine, or on the machines of a Ray cluster.

with workers(4) as executor:
    bench = Bench(..., executor=executor, loaded=loaded_from("models/m", dtype, "cpu", weights))
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any

import torch

from ..errors import InputError, ResourceError
from ..models.checkpoint import load, load_config, weights_digest


def loaded_from(source: str, dtype: torch.dtype, device: str, weights: str | None) -> Callable[[], Any]:
    """A function that any process can call for the model; each process loads it once.

    Args:
        weights: their digest in this process, which those found elsewhere must have.
    """
    return functools.partial(_loaded, source, dtype, device, weights)


@functools.lru_cache(maxsize=1)
def _loaded(source: str, dtype: torch.dtype, device: str, weights: str | None) -> Any:
    if weights_digest(source, load_config(source)[0]) != weights:
        raise InputError(f"{source} on {socket.gethostname()} is another model than here: give each machine the same")
    return load(source, dtype=dtype, device=device)


@contextlib.contextmanager
def workers(count: int, ray: str | None = None) -> Iterator[Executor | None]:
    """So many processes that share the cores of this machine, or what the Ray cluster at an address has ("local": one
    of so many processes, begun here); None for one process and no address: the caller's own.

    Raises:
        InputError: Ray is not installed, or nothing answers at an address of a machine and a port.
    """
    if ray is not None:
        with _ray(count, ray) as executor:
            yield executor
        return
    if count == 1:
        yield None
        return
    threads = max(1, (os.cpu_count() or 1) // count)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(threads,))
    try:
        yield pool
    except BaseException as error:
        for process in list((pool._processes or {}).values()):  # what they are at is lost, so nobody waits for it
            process.terminate()
        if isinstance(error, BrokenExecutor):
            raise ResourceError("a process was ended, perhaps for want of memory: use fewer --workers") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    """In every process of the pool; Ctrl-C, which reaches all of them, is the caller's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()


def _end_with_the_caller() -> None:
    """A caller that was killed cannot end its processes, and nobody waits for what they are at."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)


@contextlib.contextmanager
def _ray(count: int, address: str) -> Iterator[Executor]:
    try:
        import ray
    except ImportError as error:
        raise InputError("Ray is not installed: pip install 'masformer[ray]'") from error
    begun = not ray.is_initialized()
    if begun:
        _refuse_unreachable(address)
        where: dict[str, Any] = (
            {"num_cpus": count, "include_dashboard": False} if address == "local" else {"address": address}
        )
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield _RayExecutor(ray)
    finally:
        if begun:
            ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Ray itself would go on trying. Addresses that name no machine and port, as `auto`, are left to it."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        if parts.scheme in ("", "ray") and parts.port is not None:
            socket.create_connection((parts.hostname, parts.port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}") from error


class _RayExecutor(Executor):
    """`submit` as a Ray task, which the cluster puts where there is room."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        found: Future[Any] = Future()

        def done(future: Future[Any]) -> None:
            error = future.exception()
            if error is None:
                found.set_result(future.result())
            else:  # Ray's own has the whole traceback in its words
                found.set_exception(getattr(error, "cause", None) or error)

        self.ray.remote(_called).remote(fn, *args, **kwargs).future().add_done_callback(done)
        return found


def _called(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)
