r"""Grading completions in worker processes.

A reward can hang, crash or exhaust memory on a policy's text: the algebra system below math-verify does, and so may a
user's code. Time limits by signal work only in a process's main thread. So every grading happens in a worker process:

    submit -> queue -> one thread a worker -> pipe -> worker process (grading_worker.py; no torch)

A worker interrupts a reward after `timeout` seconds and is then replaced, since the interrupted code (an import, say)
may have left an inconsistent state; a worker that does not answer shortly after is killed. Every worker is a session of
its own and ends together with all processes that its rewards have started. Gradings that time out or fail get 0.0, are
counted and logged, and do not affect others. If too many of the last `WINDOW` gradings failed, the grader raises, so
that no run trains on meaningless rewards.

Workers are started as new interpreters, never forked: forking a process that runs torch's threads can deadlock.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Self

from ibtpo import grading_worker
from ibtpo.printable import counted
from ibtpo.rewards import Graded, RewardSpec

WINDOW = 100  # number of latest gradings over which the failed share is computed
_GRACE = 1.0  # seconds after its time limit before a worker that has not interrupted itself is killed
_DYING = 0.05  # seconds a process that is ending gets before it is killed, to keep its own exit code
_START_TIMEOUT = 120.0  # seconds a worker may take to import its rewards' modules
_START_ATTEMPTS = 3
_LOG = logging.getLogger(__name__)


class GraderError(RuntimeError):
    """No worker process can be started, or too many gradings fail."""


class Grader:
    """Grades completions in worker processes.

    Args:
        rewards: names and weights; a grading is their weighted mean.
        workers: processes.
        timeout: seconds each reward may take on a completion.
        max_failed_share: raise if more than this share of the last `WINDOW` gradings failed or timed out.

    Attributes:
        timeouts: gradings in which a reward took too long.
        failures: gradings in which a reward raised, returned no number in [0, 1], or its process died.
        last_fault: description of the latest time-out or failure.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSpec] = (RewardSpec("math"),),
        workers: int = 1,
        timeout: float = 5.0,
        max_failed_share: float = 1.0,
    ) -> None:
        self.timeouts = 0
        self.failures = 0
        self.last_fault = ""
        self._max_failed_share = max_failed_share
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._workers = [_Worker(rewards, timeout) for _ in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, graded: Graded) -> Future[float]:
        """Grade a completion; the future has a reward in [0, 1], or raises GraderError.

        Raises:
            RuntimeError: the grader is closed.
        """
        future: Future[float] = self._enqueue("grade", graded).future
        return future

    def extract(self, graded: Graded) -> Future[str | None]:
        """The completion's answer as the first reward extracts it; None if it gives none or extraction fails.

        Raises:
            RuntimeError: the grader is closed.
        """
        future: Future[str | None] = self._enqueue("extract", graded).future
        return future

    def ready(self) -> None:
        """Wait until a worker has loaded its rewards.

        Raises:
            GraderError: it cannot.
        """
        self._enqueue("ready", None).future.result()

    def close(self) -> None:
        """Cancel waiting gradings and end every worker process; may be called twice."""
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

    def _enqueue(self, kind: str, graded: Graded | None) -> _Job:
        with self._lock:
            if self._closed:
                raise RuntimeError("this grader is closed")
            job = _Job(kind, graded)
            self._jobs.put(job)
        return job

    def _serve(self, worker: _Worker) -> None:
        with contextlib.suppress(GraderError, OSError):
            worker.start()  # imports take a second: begin before the first completion arrives
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self._do(worker, job))
            except Exception as error:  # no worker can be started, or too many failures: for the caller
                job.future.set_exception(error)
        worker.reap()

    def _do(self, worker: _Worker, job: _Job) -> float | str | None:
        worker.start()
        if job.graded is None:
            return None
        reply = worker.ask(job.kind, job.graded)
        if job.kind == "extract":
            return reply.get("answer")
        self._count(reply["faults"])
        return float(reply["reward"])

    def _count(self, faults: list[list[str]]) -> None:
        """Record a grading's time-outs and failures.

        Raises:
            GraderError: too many of the last ones failed.
        """
        with self._lock:
            if self._closed:  # gradings that `close` cuts off have not failed
                return
            self.timeouts += any(kind == "timeout" for _, kind, _ in faults)
            self.failures += any(kind == "failure" for _, kind, _ in faults)
            self._recent.append(bool(faults))
            for name, _, message in faults:
                self.last_fault = f"{name}: {message}"
            failed, count = sum(self._recent), self.timeouts + self.failures
            if faults and (count in (1, 10, 100) or count % 1000 == 0):
                failures = counted(count, "grading")
                _LOG.warning("reward %s (%s failed so far; a failed reward counts as 0)", self.last_fault, failures)
        if len(self._recent) == WINDOW and failed > self._max_failed_share * WINDOW:
            raise GraderError(
                f"{failed} of the last {WINDOW} gradings failed, the last with: reward {self.last_fault}; fix the "
                f"reward, or raise jsonl.max_failed_share (now {self._max_failed_share:g}) or jsonl.grade_timeout"
            )


class _Job:
    def __init__(self, kind: str, graded: Graded | None) -> None:
        self.kind, self.graded = kind, graded
        self.future: Future[Any] = Future()


class _Worker:
    """The parent's side of a worker process, which is started when first needed and replaced if it died."""

    def __init__(self, rewards: Sequence[RewardSpec], timeout: float) -> None:
        self._rewards, self._timeout = list(rewards), timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # held while starting, killing or reaping the process

    def start(self) -> None:
        """Make sure a process is up and ready to grade.

        Raises:
            GraderError: none can be started, or a reward cannot be loaded.
        """
        for _ in range(_START_ATTEMPTS):
            if self._closed or (self._process is not None and not _has_ended(self._process)):
                return
            self.reap()  # it may have died since
            with self._lock:
                if not self._closed:
                    self._process = self._spawn()
            greeting = self._exchange(b"", _START_TIMEOUT)
            if greeting is not None and "error" in greeting:
                self.reap()
                raise GraderError(f"reward: {greeting['error']}; check the name, and that its packages are installed")
            if greeting is not None:
                return
            self.reap()
        if not self._closed:
            raise GraderError(
                f"no grading process could be started in {_START_ATTEMPTS} attempts; try: "
                f'{sys.executable} -c "import ibtpo.rewards", and check that memory and processes are left'
            )

    def ask(self, kind: str, graded: Graded) -> dict[str, Any]:
        """Send a request (see grading_worker.py) and return the reply.

        If the process died or had to be killed, all its rewards count as 0, and the fault names all that may have
        caused it. A process that interrupted a reward is ended.
        """
        begin, timeout = time.monotonic(), self._timeout * len(self._rewards) + _GRACE
        reply = self._exchange(base64.b64encode(pickle.dumps((kind, *graded))) + b"\n", timeout)
        if reply is not None:
            if any(kind == "timeout" for _, kind, _ in reply["faults"]):
                self.reap()
            return reply
        late = time.monotonic() - begin >= timeout
        code = self.reap()
        fault = ["timeout", "did not even stop when told to"] if late else ["failure", f"its process died ({code})"]
        suspects = self._rewards[:1] if kind == "extract" else self._rewards
        return {"reward": 0.0, "faults": [[" or ".join(reward.name for reward in suspects), *fault]]}

    def close(self) -> None:
        """End the process, which wakes a thread waiting for its reply, and start no other."""
        with self._lock:
            self._closed = True
        self._kill()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", grading_worker.__file__, json.dumps(self._rewards), str(self._timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), os.getcwd()])},
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes us
        )

    def _exchange(self, request: bytes, timeout: float) -> dict[str, Any] | None:
        """Write a request and read the reply; None if the process died, or was killed after `timeout` seconds."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        deadline = threading.Timer(timeout, self._kill, [process])
        deadline.daemon = True
        deadline.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            reply: dict[str, Any] = json.loads(process.stdout.readline())
            return reply
        except (OSError, ValueError):  # the process closed its pipe, or died in the middle of a line
            return None
        finally:
            deadline.cancel()

    def reap(self) -> str:
        """End the process, if there is one, and free its resources; returns how it ended."""
        process = self._process
        if process is None:
            return "not running"
        deadline = time.monotonic() + _DYING
        while not _has_ended(process) and time.monotonic() < deadline:
            time.sleep(0.001)
        self._kill()
        with self._lock:
            code = process.wait()
            self._process = None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # closing flushes, which fails for requests it never read
                    pipe.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _kill(self, process: subprocess.Popen[bytes] | None = None) -> None:
        """Kill the process (if it still is `process`) and its session; its id is not reused before it is reaped."""
        with self._lock:
            if self._process is not None and process in (None, self._process):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Has the process ended? Unlike `poll`, this does not reap it, so that its id is not reused."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # SIGCHLD is ignored, so the system has reaped it
        return True
