"""Answers from processes that can be ended: a question may take forever or all memory, and costs its asker neither.

A worker is a fresh interpreter at the other end of two pipes, which inherits nothing of the caller: no threads, no
CUDA, no __main__. The kernel ends it by an alarm, whatever it is stuck in and even if the caller is gone, and another
one takes its place, which costs no more than its imports.
"""

import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

WORKERS: int = 2  # processes; of the grader each holds sympy, about 60 MB


# In a worker ----------------------------------------------------------------------------------------------------------
def serve_requests(answer: Callable[..., Any], seconds: float, clock_seconds: float, address_space: int) -> None:
    """Answer each request on stdin, a JSON list of arguments, by a line of JSON, until stdin is closed, as it is when
    the caller ends. The process dies of a request that takes more processor time, time by the clock or bytes of memory.
    """
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # either signal ends the process
        signal.setitimer(signal.ITIMER_REAL, clock_seconds)
        reply = json.dumps(answer(*json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


# In the calling process -----------------------------------------------------------------------------------------------
class Pool:
    """WORKERS processes that answer requests; they start with the first one.

    `command` returns the command line of a worker. It is called as late as that, so that the limits in it may change.
    """

    def __init__(self, command: Callable[[], Sequence[str]]) -> None:
        self.command = command
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # a forked child has none of the threads

    def reset(self) -> None:
        """Forget the workers; the next request starts new ones."""
        self.lock, self.started = threading.Lock(), False
        self.requests: queue.SimpleQueue[tuple[list, Callable, Future]] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the workers, if they have not been started, without waiting for their imports."""
        with self.lock:
            if not self.started:
                for _ in range(WORKERS):
                    arguments = (self.requests, self.command())
                    threading.Thread(target=pass_on_requests, args=arguments, daemon=True).start()
            self.started = True

    def submit(self, request: list, convert: Callable[[Any], Any]) -> Future:
        """`convert` of the reply as a future; the reply to a request that a worker died of is None."""
        self.start()
        future: Future = Future()
        self.requests.put((request, convert, future))
        return future


def pass_on_requests(requests: queue.SimpleQueue[tuple[list, Callable, Future]], command: Sequence[str]) -> None:
    """In a thread: one request after the other to a worker, and to another one after it has died."""
    process = None
    while True:
        with contextlib.suppress(OSError):  # no process to be had now: try again at the next request
            process = process or start_worker(command)
        request, convert, future = requests.get()  # not before the worker is ready: others may be, sooner
        reply = ask_worker(process, request) if process else ""
        if process and not reply:
            process.kill()
            process.wait()
            process = None
        if future.set_running_or_notify_cancel():
            future.set_result(convert(json.loads(reply or "null")))


def start_worker(command: Sequence[str]) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # Ctrl-C is not for the worker
    process.stdout.readline()  # until it is ready
    return process


def ask_worker(process: subprocess.Popen, request: list) -> str:
    """The line that a worker replies, or nothing if it died instead."""
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
    except OSError:
        return ""
    return reply if reply.endswith("\n") else ""
