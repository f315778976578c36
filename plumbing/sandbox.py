"""Run programs that a model wrote against their tests, without harm: response -> program -> Outcome.

A verdict takes two sandboxes and two pipes between them. In one runs the program; in the other run the tests, as they
are written: a function of the program's is there an object that sends its arguments over and gets a value back (see
inside.py). So a program sees the arguments of one call after the other, and nothing else: no test, no expected value,
no frame, file or process of the tests. What it returns is built anew from plain types before it is compared, so that
no __eq__ of its own has a say. The verdict is a nonce that the tests' side alone is told, after the last test.

Each sandbox is a bubblewrap (`bwrap`) container: no network, own processes, Python and the C library as the only files,
all read-only, a scratch folder in memory, no capabilities, no new privileges, as root another user. Limits: memory,
processes, size of files, processor time, and the clock on the wall; after it everything inside is killed.

What this does not stop: holes in the kernel (no seccomp filter); a program that computes wrongly on what the tests do
not try; up to MAX_PROCESSES times the memory limit; tests that ask the program itself what is right, as those that
compare two of its results, or that use an argument which the program may have changed.
"""

import ast
import builtins
import contextlib
import functools
import itertools
import marshal
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from plumbing import inside
from plumbing.constants import Count

ISOLATION: Literal["bwrap", "rlimits"] = "bwrap"  # rlimits: on a machine that may be lost; see WITHOUT_ISOLATION
WORKERS: Count = 4  # programs that run at a time; each keeps a core busy

INSTALL = (
    "programs are only run in a sandbox, and bubblewrap 0.7 or newer cannot make one here: {reason}\n"
    "  Install it (apt install bubblewrap, dnf install bubblewrap); a container must allow user namespaces (docker run "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined).\n"
    "  On a machine that may be lost, ISOLATION=rlimits runs programs without it."
)
WITHOUT_ISOLATION = (
    "ISOLATION=rlimits: programs that the model writes can read and delete what this user can, use the network, kill "
    "this user's processes, the training included, and leave processes behind. Only memory and time are limited."
)
SCRATCH = 1 << 26  # bytes that a program can write
KILLS = 40  # at most, 0.05 s apart
FIRST_USER, USERS = 40_000, 20_000  # whom programs run as where this process is root: each as another one


class ProgramTests(NamedTuple):
    """What a program is tested by."""

    tests: Sequence[str]  # Python statements that raise where the program is wrong
    setup: str = ""  # code that runs before them, where the program does not see it
    given: str = ""  # code that stands before the program, and before setup
    public: int = 0  # how many of the tests, from the first, may be told


def read_tests(row: dict[str, Any]) -> ProgramTests:
    """The ProgramTests of a problem. Raises ValueError for what is none.

    >>> read_tests({"tests": ["assert f(1) = 2"]})
    Traceback (most recent call last):
    ValueError: "tests" are not Python (invalid syntax)
    """
    tests = ProgramTests(**{name: row[name] for name in ProgramTests._fields if row.get(name) is not None})
    if not isinstance(tests.tests, list) or not tests.tests or not all(isinstance(test, str) for test in tests.tests):
        raise ValueError(f'"tests" must be a list of Python statements, not {str(tests.tests)[:40]!r}')
    if tests.public not in range(len(tests.tests) + 1):
        raise ValueError(f'"public" must say how many of the {len(tests.tests)} tests are')
    for name, code in (("given", tests.given), ("setup", tests.setup), *(("tests", test) for test in tests.tests)):
        try:
            compile(code, name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, TypeError) as error:
            raise ValueError(f'"{name}" are not Python ({getattr(error, "msg", error)})') from error
    return tests


class Outcome(NamedTuple):
    """What came of a program's tests."""

    status: str  # "correct", "wrong" or "timeout"
    passed: int  # tests before the one that failed; -1 if the program itself did not run to its end
    error: str  # what failed: the error's last line


# The program ----------------------------------------------------------------------------------------------------------
BLOCK = re.compile(r"^[ ]{0,3}(```+|~~~+)[^\n`]*\n(.*?)(?:^[ ]{0,3}\1[`~]*[ ]*$|\Z)", re.S | re.M)


def extract_program(response: str) -> str | None:
    r"""The last code block, whatever its language is called, or the whole response if it is Python; else None.

    >>> extract_program("First\n```\nx = 1\n```\nbetter:\n```python\nx = 2\n```\nThat is it.")
    'x = 2\n'
    >>> extract_program("x = 3"), extract_program("It cannot be done."), extract_program("```python\n```")
    ('x = 3', None, None)
    """
    blocks = [match[2] for match in BLOCK.finditer(response)]
    if blocks:
        return blocks[-1] if blocks[-1].strip() else None
    try:
        return None if all(isinstance(part, ast.Expr) for part in ast.parse(response).body) else response
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@functools.lru_cache(maxsize=4096)
def list_names(code: str) -> tuple[list[str], list[str]]:
    """The names that tests take from the program, and the modules of the standard library that they use without an
    import. Raises SyntaxError.

    >>> list_names("def check(f):\\n    assert math.isclose(f(2), g(abs(-2)))\\ncheck(f)")
    (['f', 'g'], ['math'])
    >>> list_names("assert sum(10, 15) == 6")  # nothing else is named: the program's, which hides the built-in one
    (['sum'], [])
    """
    used, bound = set[str](), set[str]()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
    used -= bound
    names = used - set(dir(builtins)) - sys.stdlib_module_names
    return sorted(names or used - sys.stdlib_module_names), sorted(used & sys.stdlib_module_names)


# The sandbox ----------------------------------------------------------------------------------------------------------
PYTHON = os.path.realpath(sys.executable)  # not the virtual environment's: programs have the standard library alone
users = itertools.count()


@functools.cache
def container() -> list[str]:
    """bwrap's part of a command: a container that has Python and the C library, and nothing else of this machine's."""
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--new-session", "--die-with-parent"]
    options += ["--as-pid-1", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # to become another user, which loses them
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    for path in dict.fromkeys([*libraries, sys.base_prefix, sys.base_exec_prefix, "/dev/null"]):
        for folder in reversed(Path(path).parents[:-1]):
            options += ["--dir", str(folder)]  # else only root could look into some
        options += ["--dev-bind" if path == "/dev/null" else "--ro-bind-try", path, path]
    options += ["--perms", "1777", "--size", str(SCRATCH), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return ["bwrap", *options]


@functools.cache
def boot() -> tuple[str, str]:
    """Arguments of Python that run inside.py without compiling it again."""
    code = compile(Path(inside.__file__).read_text(encoding="utf-8"), "inside", "exec")
    start = "exec(marshal.loads(bytes.fromhex(sys.argv[1]))); main(sys.argv[2], *map(int, sys.argv[3:]))"
    return f"import marshal, sys; {start}", marshal.dumps(code).hex()


def start(role: str, seconds: int, memory: int, read: int, write: int, pipes: Sequence[int] = ()) -> subprocess.Popen:
    is_open = all(folder.stat().st_mode & 1 for folder in Path(PYTHON).parents)  # another user could run Python
    becomes_another = os.geteuid() == 0 and (ISOLATION == "bwrap" or is_open)
    user = FIRST_USER + next(users) % USERS if becomes_another else 0
    numbers = map(str, (seconds, memory << 20, user, *pipes))
    command = [PYTHON, "-s", "-S", "-P", "-c", *boot(), role, *numbers]
    return subprocess.Popen(
        [*container(), *command] if ISOLATION == "bwrap" else command,
        stdin=read,
        stdout=write,
        stderr=subprocess.DEVNULL,
        pass_fds=pipes,
        start_new_session=True,
        cwd="/",
        env={"PYTHONHASHSEED": "0"},  # sets have the same order each time
    )


def kill(sandbox: subprocess.Popen) -> None:
    """Kill all that runs in a sandbox. bwrap has one child, the first process of the container (--as-pid-1): everything
    in there ends with that one, and bwrap after it."""
    for _ in range(KILLS):  # again, if bwrap had no child yet
        if ISOLATION == "bwrap":
            with contextlib.suppress(OSError):  # it has just ended
                for child in Path(f"/proc/{sandbox.pid}/task/{sandbox.pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
        else:
            with contextlib.suppress(OSError):
                os.killpg(sandbox.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            sandbox.wait(0.05)
            return
    sandbox.kill()  # --die-with-parent kills the child
    sandbox.wait()


def run_tests(program: str, tests: ProgramTests, seconds: int = 5, memory: int = 1024) -> Outcome:
    """Run a program against its tests, in order.

    seconds: limit on the wall clock, for all of it. memory: limit in MiB of each of its processes. Raises SyntaxError
    for tests that are not Python, SystemExit where there is no sandbox.

    >>> tests = ProgramTests(["assert double(2) == 4", "assert double(-1) == -2"])
    >>> run_tests("def double(x): return x + x", tests), run_tests("def double(x): return 4", tests).error
    (Outcome(status='correct', passed=2, error=''), 'AssertionError: the last call returned 4')
    """
    require_isolation(ISOLATION)
    nonce = secrets.token_hex(16)
    names, modules = list_names("\n".join([tests.given, tests.setup, *tests.tests]))
    imports = "".join(f"import {module}\n" for module in modules)
    message = (tests.given, program, names, imports + tests.setup, list(tests.tests), nonce)
    case = "\n".join([*inside.write_value(message, [], id), ".\n"])
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as copies:  # of the pipes' ends, that only the sandboxes shall have
            ends = [*os.pipe(), *os.pipe()]  # of requests: to read, to write; of replies
            for end in ends:
                copies.callback(os.close, end)
            stack.callback(kill, start("program", seconds, memory, ends[0], ends[3]))
            examiner = start("tests", seconds, memory, subprocess.PIPE, subprocess.PIPE, [ends[1], ends[2]])
            stack.callback(kill, examiner)
        try:
            said = examiner.communicate(case.encode(), timeout=seconds)[0].decode().splitlines()
        except subprocess.TimeoutExpired as error:
            said = (error.output or b"").decode().splitlines()
            return Outcome("timeout", said.count("passed") - ("loaded" not in said), f"no result within {seconds} s")
    passed = said.count("passed") - ("loaded" not in said)
    if said[-1:] == [nonce] and passed == len(tests.tests):
        return Outcome("correct", passed, "")
    failed = "".join(said[-1:]).partition("failed ")[2]
    return Outcome("wrong", passed, bytes.fromhex(failed).decode() or "the tests ended without a verdict")


@functools.cache
def require_isolation(isolation: str) -> None:
    """Raises SystemExit where programs cannot be run; says what it means to run them without isolation."""
    if isolation == "rlimits":
        print(WITHOUT_ISOLATION, file=sys.stderr)
        return
    if shutil.which("bwrap") is None:
        raise SystemExit(INSTALL.format(reason="there is no bwrap"))
    tried = subprocess.run([*container(), PYTHON, "-S", "-c", ""], capture_output=True, text=True, cwd="/")
    if tried.returncode != 0:
        raise SystemExit(INSTALL.format(reason=tried.stderr.strip()))


def check_problems(problems: Iterable[dict[str, Any]]) -> None:
    """require_isolation() if one of the problems asks for a program: at the start, not after the first answer."""
    if any("tests" in problem for problem in problems):
        require_isolation(ISOLATION)


@functools.cache
def workers() -> ThreadPoolExecutor:
    """Threads that wait for programs."""
    return ThreadPoolExecutor(WORKERS, "sandbox")
