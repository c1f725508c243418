"""What runs inside a grading process (see grading.py); started as a script, imports no torch.

A request is a line of JSON, [answer, completion]; a reply is {"reward": float} and, where the grading was given up,
{"error": "timeout" | "failure"}. The first line written, {}, says that imports are done.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any

MATH = "math-verify"  # names the built-in grading function; anything else is "module:function"
_SELF_DESTRUCT = 2.0  # seconds past the time-out after which a process stuck in C code, parent gone, ends itself
_MEMORY = 4 << 30  # bytes of address space: a power tower ends in MemoryError, not in swap


class _TimeUp(BaseException):
    """Not an Exception, so that no handler in the algebra system swallows it."""


def math_equal(answer: str, completion: str) -> float:
    """1.0 if the completion's final answer equals the reference, as math-verify sees it, else 0.0.

    The reference may be bare (``\\frac{1}{2}``), in dollars, or boxed.
    """
    math_verify = importlib.import_module("math_verify")
    marked = any(mark in answer for mark in ("$", r"\boxed", r"\(", r"\["))
    gold = math_verify.parse(answer if marked else rf"\boxed{{{answer}}}", parsing_timeout=None)
    found = math_verify.parse(completion, parsing_timeout=None)
    return float(math_verify.verify(gold, found, timeout_seconds=None))


def _load(function: str) -> Callable[[str, str], float]:
    if function == MATH:
        importlib.import_module("math_verify")
        math_equal("1", r"\boxed{1}")  # builds the parser's tables before the clock runs
        return math_equal
    module, name = function.split(":")
    loaded: Callable[[str, str], float] = getattr(importlib.import_module(module), name)
    return loaded


@contextlib.contextmanager
def _limit(timeout: float) -> Iterator[None]:
    """Raise _TimeUp after `timeout` seconds; a process stuck in C code ends itself a little later."""
    faulthandler.dump_traceback_later(timeout + _SELF_DESTRUCT, exit=True, file=2)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.cancel_dump_traceback_later()


def _time_up(_signal: int, _frame: FrameType | None) -> None:
    raise _TimeUp


def _reply(grade: Callable[[str, str], float], request: bytes, timeout: float) -> dict[str, Any]:
    try:
        with _limit(timeout):
            reward = min(max(float(grade(*json.loads(request))), 0.0), 1.0)
        return {"reward": reward} if reward == reward else {"reward": 0.0, "error": "failure"}
    except _TimeUp:
        return {"reward": 0.0, "error": "timeout"}
    except Exception:
        return {"reward": 0.0, "error": "failure"}


def _limit_memory() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(function: str, timeout: float) -> None:
    replies: IO[bytes] = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what graders print must not mix with the replies
    _limit_memory()
    signal.signal(signal.SIGALRM, _time_up)
    grade = _load(function)
    replies.write(b"{}\n")
    for request in sys.stdin.buffer:  # ends when the parent closes the pipe or is gone
        replies.write(json.dumps(_reply(grade, request, timeout)).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
