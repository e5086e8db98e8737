"""Processes with a gloo group between them, which run functions of test modules."""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT = 30.0  # s, of a collective that another process does not join
CALL_LIMIT = 120.0  # s, of a call
GRACE = 2.0  # s, that the others have to answer when one has failed

# Forked from a process that has imported torch and done nothing with it: a fresh one costs little.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


@dataclass(frozen=True)
class Failure:
    """What a process answers that has no result: its traceback, or how it ended."""

    text: str


class ProcessError(Exception):
    """A call failed on at least one process."""


class Processes:
    """`ranks` processes that are one gloo group; they start at the first call.

    They stay for the next calls, unless one fails: what the others are then in the middle of nobody
    knows, so all are killed, and the next call has new ones.
    """

    def __init__(self, ranks: int, group_timeout: float = GROUP_TIMEOUT) -> None:
        self._ranks, self._group_timeout = ranks, group_timeout
        self._workers: list[tuple[Any, connection.Connection]] = []

    def run(
        self, function: Callable[..., Any], *arguments: object, limit: float = CALL_LIMIT
    ) -> list[Any]:
        """What `function(*arguments)` returns on each rank; seeds are 0.

        `function` is one of a module's top level: it goes by the module's file and its name,
        arguments and results by pickle. ProcessError, with each traceback, if it fails on a rank,
        takes longer than `limit` seconds, or leaves ranks with collectives that others do not join.
        """
        answers = self.answers(function, *arguments, limit=limit, grace=GRACE)
        failures = {rank: a.text for rank, a in enumerate(answers) if isinstance(a, Failure)}
        if failures:
            texts = (f"rank {rank} of {self._ranks}: {text}" for rank, text in failures.items())
            raise ProcessError("\n".join(texts))
        return answers

    def answers(
        self,
        function: Callable[..., Any],
        *arguments: object,
        limit: float = CALL_LIMIT,
        grace: float = CALL_LIMIT,
    ) -> list[Any]:
        """As `run`, with a `Failure` in place of a result; where one has failed, all others have
        `grace` seconds more.
        """
        path = sys.modules[function.__module__].__file__
        call = (function.__module__, path, function.__name__, pickle.dumps(arguments))
        answers: list[Any] = []
        try:
            if not self._workers:
                self._start()
            for _, pipe in self._workers:
                pipe.send_bytes(pickle.dumps(call))
            answers = self._collected(limit, grace)
        finally:
            if not answers or any(isinstance(answer, Failure) for answer in answers):
                self.close()
        return answers

    def close(self) -> None:
        """Kill the processes."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        if self._workers:
            self._folder.cleanup()
        self._workers = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self._ranks):
            Path(self._folder.name, f"stack{rank}").touch()
            pipe, other = _context.Pipe()
            facts = (rank, self._ranks, self._folder.name, self._group_timeout)
            process = _context.Process(target=_serve, args=(other, *facts), daemon=True)
            process.start()
            other.close()
            self._workers.append((process, pipe))

    def _collected(self, limit: float, grace: float) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + limit
        while len(answers) < self._ranks and (left := deadline - time.monotonic()) > 0:
            ranks = {p: rank for rank, (_, p) in enumerate(self._workers) if rank not in answers}
            for pipe in connection.wait(list(ranks), left):
                rank = ranks[pipe]
                answers[rank] = self._answer(rank)
                if isinstance(answers[rank], Failure):
                    deadline = min(deadline, time.monotonic() + grace)
        return [
            answers[rank] if rank in answers else self._overdue(rank) for rank in range(self._ranks)
        ]

    def _answer(self, rank: int) -> Any:
        process, pipe = self._workers[rank]
        try:
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            process.join()
            return Failure(f"it ended with exit code {process.exitcode}")

    def _overdue(self, rank: int) -> Failure:
        """Ask a process that has not answered where it is."""
        process, _ = self._workers[rank]
        where = Path(self._folder.name, f"stack{rank}")
        process.terminate()
        for _ in range(20):
            time.sleep(0.05)
            if where.stat().st_size:
                break
        return Failure(f"no answer in time, it is at\n{where.read_text()}")


# ---------------------------------------------------------------------- in the processes


def _serve(
    pipe: connection.Connection, rank: int, ranks: int, folder: str, group_timeout: float
) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # fully_shard would take GPUs, gloo does not
    stack = Path(folder, f"stack{rank}").open("w")  # noqa: SIM115  (open as long as the process)
    faulthandler.register(signal.SIGTERM, stack)
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    store.set(f"started {rank}", "")  # to wait for a start takes more patience than the group has
    store.wait([f"started {other}" for other in range(ranks)])
    timeout = timedelta(seconds=group_timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:  # the tests have ended
            return
        try:
            answer = pickle.dumps(_called(*pickle.loads(call)))
            dist.barrier()  # what one rank does more shows here, not in the next call
        except BaseException:  # pytest's own are no Exceptions
            answer = pickle.dumps(Failure(traceback.format_exc()))
        pipe.send_bytes(answer)


def _called(module: str, path: str, function: str, arguments: bytes) -> Any:
    if module not in sys.modules:
        parts = module.split(".")
        for end in range(1, len(parts)):  # the folders, which pickle asks for by name
            name = ".".join(parts[:end])
            sys.modules.setdefault(name, types.ModuleType(name))
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    torch.manual_seed(0)
    return getattr(sys.modules[module], function)(*pickle.loads(arguments))
