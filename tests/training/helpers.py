"""Training processes, forked from one that has imported everything: a start costs 0.3 s instead of 10.

    launcher = Launcher(tmp_path)
    started = launcher.start(work, ranks=2, steps=5)      # work(steps=5) on 2 ranks; a function of a module, and JSON
    launcher.wait(started)                                # [(exit code, what work returned), ...], by rank

Pytest's own process cannot be forked once it has gone backward through a graph.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 120
"""Seconds until processes that are waited for are killed."""
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class Launcher:
    """The process that forks. What its children print goes into `folder`, one file for each."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.training.helpers", str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | SETTINGS
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # it ends with its input

    def start(self, work: Callable[..., Any], ranks: int = 1, **given: Any) -> list[int]:
        """The ids of the processes, by rank."""
        pids: list[int] = self._ask([work.__module__, work.__name__, ranks, given])
        return pids

    def wait(self, pids: list[int]) -> list[tuple[int, Any]]:
        ended = [(code, result, log) for code, result, log in self._ask(pids)]
        for code, _, log in ended:
            assert code in (0, -signal.SIGKILL), Path(log).read_text()
        return [(code, result) for code, result, _ in ended]

    def run(self, work: Callable[..., Any], ranks: int = 1, **given: Any) -> list[Any]:
        """What `work` returned on every rank, all of which end well."""
        ended = self.wait(self.start(work, ranks, **given))
        assert all(code == 0 for code, _ in ended), "waited for too long"
        return [result for _, result in ended]

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the launcher died"
        return json.loads(answer)


def _serve(folder: Path) -> None:
    import torch

    from masformer.models.tokenizer import quiet
    from masformer.training import run  # noqa: F401  # what takes long

    torch.set_num_threads(1)
    quiet()
    alive: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request[0], str):
            answer: Any = _fork(folder, *request)
            alive |= {*answer}
        else:
            answer = _ended(folder, request)
            alive -= {*request}
        print(json.dumps(answer), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def _fork(folder: Path, module: str, name: str, ranks: int, given: dict[str, Any]) -> list[int]:
    work = getattr(importlib.import_module(module), name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gc.collect()
    gc.freeze()  # a collection in the child would touch, and so copy, everything that is there
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            if ranks > 1:
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                os.environ |= {key: str(value) for key, value in where.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _work(folder / str(os.getpid()), work, given)
        pids.append(pid)
    return pids


def _work(log: Path, work: Callable[..., Any], given: dict[str, Any]) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (0, 1, 2):
            os.dup2(output, stream)
        log.with_suffix(".json").write_text(json.dumps(work(**given)))
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _ended(folder: Path, pids: list[int]) -> list[tuple[int, Any, str]]:
    codes: dict[int, int] = {}
    limit = time.monotonic() + PATIENCE
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
            elif pid not in codes and time.monotonic() > limit:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    results = {pid: folder / f"{pid}.json" for pid in pids}
    return [
        (codes[pid], json.loads(file.read_text()) if codes[pid] == 0 else None, str(folder / str(pid)))
        for pid, file in results.items()
    ]


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
