r"""Grading mathematics with math-verify, in worker processes.

math-verify limits its own time with a signal, which works only in a process's main thread, and the algebra system
below it can hang, crash or eat all memory on what a policy writes. So every grading happens in a worker process:

    submit -> queue -> one thread a worker -> pipe -> worker process (grading_worker.py; no torch)

A worker interrupts itself after `timeout` seconds; one that does not answer shortly after is killed and replaced.
Time-outs and failures count as wrong (0.0) and are counted; the other gradings never notice. Workers are started as
fresh interpreters, never forked: forking a process that runs torch's threads can deadlock.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any, Self

from ibtpo import grading_worker
from ibtpo.grading_worker import MATH

_GRACE = 1.0  # seconds after the time-out before a worker that did not interrupt itself is killed
_START_TIMEOUT = 120.0  # seconds a worker may take to import math-verify
_START_ATTEMPTS = 3


class GraderError(RuntimeError):
    """No worker process can be started."""


class Grader:
    """Grades completions in worker processes.

    Args:
        workers: processes.
        timeout: seconds a grading may take.
        function: ``"module:name"`` of a function (answer, completion) -> float, importable in a fresh interpreter;
            by default math-verify's equality.

    Attributes:
        timeouts: gradings given up because they took too long.
        failures: gradings given up because the grader raised or its process died.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self, workers: int = 1, timeout: float = 5.0, function: str = MATH) -> None:
        if function == MATH and importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                'jsonl.grade: "math" needs the package math-verify; install it, or set jsonl.grade to "exact"'
            )
        self.timeouts = 0
        self.failures = 0
        self._timeout = timeout
        self._function = function
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._workers = [_Worker(function, timeout) for _ in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, answer: str, completion: str) -> Future[float]:
        """Grade a completion against the reference answer; the future's result lies in [0, 1].

        Raises:
            RuntimeError: the grader is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this grader is closed")
            job = _Job(answer, completion)
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Cancel what is waiting and end every worker process; closing twice is fine."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.future.cancel()
        for worker in self._workers:
            worker.close()
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _serve(self, worker: _Worker) -> None:
        with contextlib.suppress(GraderError, OSError):
            worker.start()  # imports take a second: begin before the first completion is there
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self._grade(worker, job))
            except Exception as error:  # only a worker that cannot be started: the caller must hear of it
                job.future.set_exception(error)
        worker.reap()

    def _grade(self, worker: _Worker, job: _Job) -> float:
        worker.start()
        reply = worker.ask(job.answer, job.completion)
        with self._lock:
            self.timeouts += reply.get("error") == "timeout"
            self.failures += reply.get("error") == "failure"
        return float(reply["reward"])


class _Job:
    def __init__(self, answer: str, completion: str) -> None:
        self.answer, self.completion = answer, completion
        self.future: Future[float] = Future()


class _Worker:
    """The parent's side of a worker process: started when first needed, replaced when it died."""

    def __init__(self, function: str, timeout: float) -> None:
        self._function, self._timeout = function, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # guards starting against closing

    def start(self) -> None:
        """Make sure a process is up and ready to grade.

        Raises:
            GraderError: none can be started.
        """
        for _ in range(_START_ATTEMPTS):
            if self._closed or (self._process is not None and self._process.poll() is None):
                return
            self.reap()  # it died since
            with self._lock:
                if not self._closed:
                    self._process = self._spawn()
            if self._exchange(b"", _START_TIMEOUT) is not None:
                return
            self.reap()
        if not self._closed:
            raise GraderError(
                f"no grading process could be started in {_START_ATTEMPTS} attempts; try: "
                f'{sys.executable} -c "import math_verify", and check that memory and processes are left'
            )

    def ask(self, answer: str, completion: str) -> dict[str, Any]:
        """One grading: {"reward": float} and, where it was given up, {"error": "timeout" | "failure"}."""
        begin = time.monotonic()
        reply = self._exchange(json.dumps([answer, completion]).encode() + b"\n", self._timeout + _GRACE)
        if reply is not None:
            return reply
        self.reap()
        late = time.monotonic() - begin >= self._timeout + _GRACE
        return {"reward": 0.0, "error": "timeout" if late else "failure"}

    def close(self) -> None:
        """End the process; whoever waits for it wakes up. No other will be started."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", grading_worker.__file__, self._function, str(self._timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes us
        )

    def _exchange(self, request: bytes, timeout: float) -> dict[str, Any] | None:
        """Write a request and read the reply; None if the process died, or had to be killed for its silence."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        deadline = threading.Timer(timeout, process.kill)
        deadline.daemon = True
        deadline.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            reply: dict[str, Any] = json.loads(process.stdout.readline())
            return reply
        except (OSError, ValueError):  # its end of the pipe is gone, or it died in the middle of a line
            return None
        finally:
            deadline.cancel()

    def reap(self) -> None:
        """End the process, if there is one, and take back what it held."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it never read cannot be flushed
                    pipe.close()
        self._process = None
