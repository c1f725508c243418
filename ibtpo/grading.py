r"""Grading completions in worker processes.

A reward can hang, crash or eat all memory on what a policy writes: the algebra system below math-verify does, and so
does code of the user's. Time limits by signal work only in a process's main thread. So every grading happens in a
worker process:

    submit -> queue -> one thread a worker -> pipe -> worker process (grading_worker.py; no torch)

A worker interrupts itself after `timeout` seconds a reward and is replaced, as what was interrupted (an import, say)
may be left half done; one that does not answer shortly after is killed. Every worker is a session of its own and ends
with all processes that its rewards have started. Time-outs and failures count as wrong (0.0), are counted and logged;
the other gradings never notice. When too many of the last `WINDOW` gradings failed, the grader gives up: a run on
rewards that mean nothing is worse than none.
Workers are started as fresh interpreters, never forked: forking a process that runs torch's threads can deadlock.
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
from ibtpo.rewards import Graded, RewardSpec

WINDOW = 100  # gradings over which the share of failed ones is taken
_GRACE = 1.0  # seconds after the time-out before a worker that did not interrupt itself is killed
_DYING = 0.05  # seconds in which a process that is about to end may still say how
_START_TIMEOUT = 120.0  # seconds a worker may take to import what its rewards need
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
        max_failed_share: give up when more than this share of the last `WINDOW` gradings failed or timed out.

    Attributes:
        timeouts: gradings in which a reward took too long.
        failures: gradings in which a reward raised, returned no number in [0, 1], or its process died.
        last_fault: what went wrong last, in words.
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
        """Grade a completion; the future's result lies in [0, 1], or it is a GraderError.

        Raises:
            RuntimeError: the grader is closed.
        """
        future: Future[float] = self._enqueue("grade", graded).future
        return future

    def extract(self, graded: Graded) -> Future[str | None]:
        """The answer the completion gives, as the first reward reads it; None where it gives none or cannot be read.

        Raises:
            RuntimeError: the grader is closed.
        """
        future: Future[str | None] = self._enqueue("extract", graded).future
        return future

    def ready(self) -> None:
        """Wait until a worker has imported all it needs.

        Raises:
            GraderError: it cannot.
        """
        self._enqueue("ready", None).future.result()

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

    def _enqueue(self, kind: str, graded: Graded | None) -> _Job:
        with self._lock:
            if self._closed:
                raise RuntimeError("this grader is closed")
            job = _Job(kind, graded)
            self._jobs.put(job)
        return job

    def _serve(self, worker: _Worker) -> None:
        with contextlib.suppress(GraderError, OSError):
            worker.start()  # imports take a second: begin before the first completion is there
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self._do(worker, job))
            except Exception as error:  # a worker that cannot be started, too many failures: the caller must hear of it
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
        """Note how a grading went.

        Raises:
            GraderError: too many of the last ones failed.
        """
        with self._lock:
            if self._closed:  # whoever is cut off now has not failed
                return
            self.timeouts += any(kind == "timeout" for _, kind, _ in faults)
            self.failures += any(kind == "failure" for _, kind, _ in faults)
            self._recent.append(bool(faults))
            for name, _, message in faults:
                self.last_fault = f"{name}: {message}"
            failed, count = sum(self._recent), self.timeouts + self.failures
            if faults and (count in (1, 10, 100) or count % 1000 == 0):
                _LOG.warning("reward %s (%d gradings failed so far; each counts as 0)", self.last_fault, count)
        if len(self._recent) == WINDOW and failed > self._max_failed_share * WINDOW:
            raise GraderError(
                f"{failed} of the last {WINDOW} gradings failed, the last with: reward {self.last_fault}; mend the "
                f"reward, or raise jsonl.max_failed_share (now {self._max_failed_share:g}) or jsonl.grade_timeout"
            )


class _Job:
    def __init__(self, kind: str, graded: Graded | None) -> None:
        self.kind, self.graded = kind, graded
        self.future: Future[Any] = Future()


class _Worker:
    """The parent's side of a worker process: started when first needed, replaced when it died."""

    def __init__(self, rewards: Sequence[RewardSpec], timeout: float) -> None:
        self._rewards, self._timeout = list(rewards), timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # guards starting, killing and reaping against each other

    def start(self) -> None:
        """Make sure a process is up and ready to grade.

        Raises:
            GraderError: none can be started, or a reward cannot be loaded.
        """
        for _ in range(_START_ATTEMPTS):
            if self._closed or (self._process is not None and not _has_ended(self._process)):
                return
            self.reap()  # it died since
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
        """One request (see grading_worker.py); a process that died or had to be killed is the first reward's fault.

        One that had to interrupt a reward is ended.
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
        return {"reward": 0.0, "faults": [[self._rewards[0].name, *fault]]}

    def close(self) -> None:
        """End the process; whoever waits for it wakes up. No other will be started."""
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
        """Write a request and read the reply; None if the process died, or had to be killed for its silence."""
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
        except (OSError, ValueError):  # its end of the pipe is gone, or it died in the middle of a line
            return None
        finally:
            deadline.cancel()

    def reap(self) -> str:
        """End the process, if there is one, and take back what it held; says how it ended."""
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
                with contextlib.suppress(OSError):  # what it never read cannot be flushed
                    pipe.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _kill(self, process: subprocess.Popen[bytes] | None = None) -> None:
        """Kill the process (if it still is `process`) and all of its session, whose number is its own until reaped."""
        with self._lock:
            if self._process is not None and process in (None, self._process):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Has the process ended? Unlike `poll`, this does not reap it, so that its number is not given to another."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # SIGCHLD is ignored: the system reaps
        return True
