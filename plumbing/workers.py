"""Answers from processes that can be ended: a question may take forever or all memory, and costs its asker neither.

A worker is a fresh interpreter at the other end of two pipes, which inherits nothing of the caller: no threads, no
CUDA, no __main__. It imports what it needs once and then forks a child for each request. The kernel ends the child by
an alarm, whatever it is stuck in and even if the caller is gone. Replacing a child takes a millisecond; replacing a
worker takes as long as its imports.
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
from typing import Any, NoReturn

WORKERS: int = 2  # processes; of the grader each holds sympy, about 60 MB


# In a worker ----------------------------------------------------------------------------------------------------------
def serve_requests(answer: Callable[..., Any], seconds: float, clock_seconds: float, address_space: int) -> None:
    """Answer each request on stdin, a JSON list of arguments, by a line of JSON; null if there was no answer in time.

    The limits of a request are processor time, time by the clock, and bytes of memory. Ends when stdin is closed, as it
    is when the caller ends.
    """
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answer_and_exit(answer, json.loads(line), seconds, clock_seconds)
        if os.waitpid(child, 0)[1] != 0:
            print("null", flush=True)


def answer_and_exit(answer: Callable[..., Any], request: list, seconds: float, clock_seconds: float) -> NoReturn:
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # either signal ends the process
        signal.setitimer(signal.ITIMER_REAL, clock_seconds)
        reply = json.dumps(answer(*request)) + "\n"
        signal.setitimer(signal.ITIMER_PROF, 0)  # no alarm after the reply: one request, one line
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(sys.stdout.fileno(), reply.encode())
        os._exit(0)
    finally:
        os._exit(1)


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
        """`convert` of the reply as a future; the reply to a request that failed is None."""
        self.start()
        future: Future = Future()
        self.requests.put((request, convert, future))
        return future


def pass_on_requests(requests: queue.SimpleQueue[tuple[list, Callable, Future]], command: Sequence[str]) -> None:
    """In a thread: one request after the other to a worker. One that ends, which none should, is replaced."""
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
    """The line that a worker replies, or nothing if it ended instead."""
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
    except OSError:
        return ""
    return reply if reply.endswith("\n") else ""
