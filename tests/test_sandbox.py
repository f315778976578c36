"""plumbing/sandbox.py: right programs are paid, hostile ones are not and do no harm; what is told; what waits for whom.

Without bubblewrap the tests of what isolation holds are skipped, and say so.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import grader
from plumbing import sandbox
from plumbing.files import to_line
from plumbing.sandbox import ProgramTests as Checks
from plumbing.sandbox import run_tests
from tests.conftest import ROOT

import pytest

TESTS = Checks(["assert f(1) == 12", "assert f(2) == 23", "assert f(3) == [58, 'x']"], public=1)
RIGHT = "def f(x): return {1: 12, 2: 23, 3: [58, 'x']}[x]"
LIMIT = 2  # seconds, of a hostile program
try:
    sandbox.require_isolation("bwrap")
    MISSING = ""
except SystemExit as error:
    MISSING = f"not shown, what isolation holds: {str(error).splitlines()[0]}"
isolated = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(autouse=True)
def isolation(monkeypatch):
    if MISSING:
        monkeypatch.setattr(sandbox, "ISOLATION", "rlimits")


# Hostile programs; PORT, FOLDER, PID and ROOT are the test's own. One without f gets one that is wrong ----------------
HOSTILE = [
    # ends before the tests, or says that they passed
    "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()", "raise KeyboardInterrupt",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "import sys\ndef f(x): sys.exit(0)",
    "import os\ndef f(x): os._exit(0)", "print('loaded\\npassed\\npassed\\npassed')",
    "import os\nfor n in range(64):\n try: os.write(n, b'loaded\\n' + b'passed\\n' * 3)\n except OSError: pass",
    "import os\nfor n in range(3, 64):\n try: os.write(n, b't3\\ny\\ni1\\nn\\n.\\n' * 9)\n except OSError: pass",
    "import os\nfor n in range(3, 64):\n try: os.write(n, b'l9999999\\n.\\no-1\\n.\\n')\n except OSError: pass",
    "import os\nos.closerange(0, 99)", "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    # is equal to everything, or changes what comparing means
    "class A:\n def __eq__(self, o): return True\n __ne__ = __bool__ = lambda *a: False\ndef f(x): return A()",
    "class A(int):\n def __eq__(self, o): return True\n __hash__ = None\ndef f(x): return A(7)",
    "class A(list):\n def __eq__(self, o): return True\ndef f(x): return A([A()])",
    "class M(type):\n def __eq__(self, o): return True\nclass A(metaclass=M): pass\ndef f(x): return A",
    "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {'__new__': lambda c, *a: None})",
    "import builtins\nfor n in ('exec', 'print', 'isinstance'): setattr(builtins, n, lambda *a, **k: None)",
    "__builtins__ = {'AssertionError': None}\n__debug__x = False", "import ast; ast.Assert = ast.Pass",
    "f = __import__('unittest.mock').mock.MagicMock()",
    "import sys\nsys.modules['builtins'] = None\ndel sys.modules['sys']",
    "import sys\nsys.settrace(lambda *a: None); sys.excepthook = lambda *a: sys.exit(0)",
    "import sys\nm = sys.modules['__main__']\nfor n in list(vars(m)): setattr(m, n, lambda *a: True)",
    # looks for the tests, the nonce, the answers
    "import sys\ndef f(x):\n g = sys._getframe()\n while g.f_back: g = g.f_back\n return {**g.f_globals}['tests']",
    "import gc\ndef f(x): return [o for o in gc.get_objects() if type(o) is list and '58' in repr(o)]",
    "import sys\ndef f(x): return sys.stdin.read()", "import sys\ndef f(x): return sys.argv + sys.orig_argv",
    "import os\ndef f(x): return [os.readlink(f'/proc/self/fd/{n}') for n in range(9)]",
    "def f(x): return open('/proc/1/environ').read()", "import os\ndef f(x): return dict(os.environ)",
    "import os\ndef f(x): return [os.read(n, 1 << 16) for n in range(3, 9)]",
    "import ctypes\ndef f(x): return ctypes.CDLL(None).ptrace(16, 1, 0, 0)",
    "def f(x): return open('ROOT/grader.py').read()", "import os\ndef f(x): return os.listdir('FOLDER')",
    "import os\nassert os.path.exists('FOLDER') or os.path.exists('/etc/passwd')\n" + RIGHT,
    # answers the public case by heart
    "def f(x):\n if x == 1: return 12", "def f(x): return 12", "def f(x, seen=[]): seen.append(12); return seen[0]",
    # takes all there is
    "import os\nwhile True: os.fork()", "while True: pass", "import time; time.sleep(99)", "def f(x): return f(x)",
    "x = [0] * 10**12", "x = []\nwhile True: x.append('y' * 10**7)", "def f(x): return 'y' * 10**9",
    "print('y' * 2**27)", "import sys\nwhile True: sys.stdout.write('y' * 2**20)",
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1", "x = 9 ** 9 ** 9",
    "def f(x): return 1 << 10**8", "import itertools\ndef f(x): return itertools.count()",
    "x = []\nx.append(x)\ndef f(y): return x", "def f(x):\n y = []\n for _ in range(10**5): y = [y]\n return y",
    "exec('(' * 10**5)", "import re; re.match('(a+)+b', 'a' * 50)",
    "n = 0\nwhile True:\n open(f'/tmp/{n}', 'w').write('y' * 2**20); n += 1",
    "import signal\nfor n in (1, 2, 3, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile 1: 1",
    "import ctypes; ctypes.string_at(0)", "import threading\nwhile 1: threading.Timer(99, print).start()",
    # does harm, or leaves something behind
    "import os, signal\ntry: os.kill(PID, signal.SIGKILL)\nexcept OSError: pass\nos.kill(-1, signal.SIGKILL)",
    "import shutil; shutil.rmtree('/', ignore_errors=True)\nshutil.rmtree('FOLDER', ignore_errors=True)",
    "open('FOLDER/left', 'w').write('x')", "open('/left', 'w')", "open('ROOT/left.txt', 'w').write('x')",
    "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "import subprocess; subprocess.Popen(['/bin/sh', '-c', 'touch FOLDER/left; sleep 99'], start_new_session=True)",
    "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(99)\n os._exit(0)",
    "import threading, time; threading.Thread(target=time.sleep, args=[99]).start()",
    "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0\n" + RIGHT,
    "import os\nos.setuid(0)\n" + RIGHT, "import os\nos.nice(-5)\n" + RIGHT,
    "import os; os.mknod('/tmp/disk', 0o60666, 2048)\n" + RIGHT,
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n" + RIGHT,
]  # fmt: skip


@isolated
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_program_is_not_paid_and_leaves_nothing(number, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("12 23 58")
    listener, sentinel = socket.create_server(("127.0.0.1", 0)), subprocess.Popen(["sleep", "99"])
    listener.setblocking(False)
    places = {"PORT": listener.getsockname()[1], "FOLDER": tmp_path, "PID": sentinel.pid, "ROOT": ROOT}
    program, namespaces, kill = HOSTILE[number], [], sandbox.kill
    for name, value in places.items():
        program = program.replace(name, str(value))
    program += "" if "def f" in program or "\nf =" in f"\n{program}" else "\ndef f(x): return 0"

    def note_and_kill(box: subprocess.Popen) -> None:
        with contextlib.suppress(OSError):  # it has ended
            for child in Path(f"/proc/{box.pid}/task/{box.pid}/children").read_text().split():
                # Kept open, so that no sandbox of another test gets the number of one that has ended.
                namespaces.append(os.open(f"/proc/{child}/ns/pid", os.O_RDONLY))
        kill(box)

    monkeypatch.setattr(sandbox, "kill", note_and_kill)
    files, start = sorted(ROOT.iterdir()), time.perf_counter()
    outcome = run_tests(program, TESTS, LIMIT, 256)
    assert time.perf_counter() - start < 2 * LIMIT
    assert outcome.status != "correct" and outcome.passed <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["kept"] and sorted(ROOT.iterdir()) == files
    assert sentinel.poll() is None
    with pytest.raises(BlockingIOError):
        listener.accept()
    left = subprocess.run("readlink /proc/[0-9]*/ns/pid", shell=True, capture_output=True, text=True).stdout
    assert not {f"pid:[{os.fstat(opened).st_ino}]" for opened in namespaces} & set(left.split())
    for opened in namespaces:
        os.close(opened)
    assert run_tests(RIGHT, TESTS).status == "correct"  # the next one is as ever
    sentinel.kill()
    sentinel.wait()


# Right programs -------------------------------------------------------------------------------------------------------
VALUES = [  # as a test writes them
    "None", "True", "0", "-7", "0.1", "float('inf')", "2j", "''", "'½\\n\\ud800'", "b'\\x00a'", "[]", "[1, [2]]",
    "(1, (2,))", "{1, 2}", "frozenset({1})", "{'a': [1], (1, 2): None}", "[True, 1, 1.0]",
]  # fmt: skip
NODE = "class Node:\n def __init__(self, v, n=None): self.v, self.n = v, n\n def __len__(self): return 3\n"
NODE += " def __getitem__(self, i): return i * 2\n def __str__(self): return 'node'\n def add(self, k=1): self.v += k"
PAID = [  # program, tests
    (RIGHT, TESTS),
    ("print('hello'); f = lambda x: x", Checks([f"assert repr(f({v})) == repr({v})" for v in VALUES])),
    ("def f(x, kind): return [type(x) is kind, type(x)]", Checks(["assert f(1, int) == [True, int]"])),
    ("def f(x): return 10 ** x", Checks(["assert f(5000) == 10 ** 5000"])),
    ("def sum(a, b): return 6", Checks(["assert sum(10, 15) == 6"])),  # named as a built-in function
    ("import math\ndef f(x): return math.sqrt(x)", Checks(["assert math.isclose(f(2) ** 2, 2)"])),
    ("def f(x): x.sort(); x[0] = [9]", Checks(["x = [3, 1]", "f(x)", "assert x == [[9], 3]"])),
    ("def f(x, *, k): x.update(k=k)", Checks(["d = {}; f(d, k=1); assert d == {'k': 1}"])),
    ("def f(n): yield from range(n)", Checks(["assert list(f(3)) == [0, 1, 2]", "assert 2 in f(3)"])),
    ("import collections as c\ndef f(x): return c.Counter(x)", Checks(["assert f('aab') == {'a': 2, 'b': 1}"])),
    ("def f(x): return int(x)", Checks(["try: f('x')\nexcept ValueError: pass\nelse: assert False"])),
    (NODE, Checks(["n = Node(1, Node(2)); n.add(k=4); n.n.v = 7", "assert [n.v, n.n.v, len(n), n[4]] == [5, 7, 3, 8]",
                   "assert str(n) == f'{n}' == 'node' and n and n != Node(1)"])),
    (NODE + "\ndef f(ns): return ns[0].v + 1", Checks(["assert f([root]) == 9"], setup="root = Node(8)")),
    ("def f(x): return h(x)", Checks(["check(f)"], "def check(g): assert g(2) == h(2)", "def h(x): return x * 3")),
    ("from __future__ import annotations\ndef f(x: Any) -> No: return __name__", Checks(["assert f(1) == 'solution'"])),
    ("import random, json, re, typing\ndef f(): return open('/tmp/x', 'w').write('abc')", Checks(["assert f() == 3"])),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PAID)))
def test_a_right_program_is_paid(number):
    program, tests = PAID[number]
    assert run_tests(program, tests) == ("correct", len(tests.tests), "")


def test_what_a_program_says_of_its_own_objects_does_not_count():
    claims = "class A:\n __contains__ = __eq__ = lambda *a: True\n __iter__ = lambda s: iter([])\ndef f(x): return A()"
    for test in ("assert 5 in f(1)", "assert f(1) in [5]", "assert f(1) == f(1)", "assert f(1) == [f(1)]"):
        assert run_tests(claims, Checks([test])).status == "wrong"
    stops = "def f(x): raise StopIteration"
    assert run_tests(stops, Checks(["assert all(map(lambda x: f(x) == 1, [1]))"])).status == "wrong"


def test_the_program_of_another_problem_is_wrong():
    programs = [(program, tests) for program, tests in PAID if "f(" in tests.tests[0]]
    for (program, _), (_, tests) in zip(programs, programs[1:] + programs[:1], strict=True):
        assert run_tests(program, tests).status == "wrong", program


# What is said and told ------------------------------------------------------------------------------------------------
HEART = "def f(x):\n    if x == 1: return 12\n    return 0"
CASES = [  # program, status, failed, whether it may be told
    (RIGHT, "correct", "", False),
    ("def f(x): return 0", "wrong", "assert f(1) == 12\nAssertionError: the last call returned 0", True),
    (HEART, "wrong", "assert f(2) == 23\nAssertionError: the last call returned 0", False),
    ("def g(x): return 0", "wrong", "assert f(1) == 12\nNameError: name 'f' is not defined", True),
    ("def f(x) return 0", "wrong", "SyntaxError: expected ':' (solution, line 1)", True),
    ("def f(x): return 1 / 0", "wrong", "assert f(1) == 12\nZeroDivisionError: division by zero", True),
    ("def f(x):\n    while True: pass", "timeout", "assert f(1) == 12\nno result within 1 s", True),
    ("", "no_answer", "", False),
]


@pytest.mark.parametrize(("program", "status", "failed", "is_told"), CASES)
def test_verdicts(program, status, failed, is_told, monkeypatch):
    """What is paid is not what is told: a program that answers the public test by heart is wrong, and hears no more."""
    monkeypatch.setattr(grader, "RUN_SECONDS", 1)
    verdict = grader.grade(f"So:\n```python\n{program}\n```", TESTS)
    answer = f"{program}\n" if program else None
    assert verdict == grader.Verdict(answer, status == "correct", status, failed, failed if is_told else "")


def test_the_command_reads_programs(monkeypatch, capsys):
    rows = [{"response": f"```\n{program}\n```", "tests": TESTS.tests} for program, *_ in CASES[:3]]
    rows += [{"response": "\\boxed{}", "gold": "1"}, {"response": "x", "tests": ["assert"]}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(map(to_line, rows))))
    with pytest.raises(SystemExit, match=r'line 5: "tests" are not Python \(invalid syntax'):
        grader.main()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["status"] for line in said] == ["correct", "wrong", "wrong", "wrong"]
    assert ["failed" in line for line in said] == [False, True, True, False] and said[3]["answer"] == ""


# Who waits for whom, and without isolation ----------------------------------------------------------------------------
def test_programs_run_several_at_a_time_and_a_slow_one_delays_no_other(monkeypatch):
    monkeypatch.setattr(grader, "RUN_SECONDS", 3)
    slow = grader.submit("while True: pass", TESTS)
    quick = [grader.submit(RIGHT, TESTS) for _ in range(6)]
    assert [verdict.result().status for verdict in quick] == ["correct"] * 6 and not slow.done()
    assert slow.result().status == "timeout"


@isolated
def test_a_sandbox_that_has_hardly_begun_is_killed_at_once():
    """bwrap has no child yet then; a limit on the clock that waited for it would be a second late."""
    read, write = os.pipe()
    for _ in range(5):
        box = sandbox.start("program", 5, 256, read, write)
        start = time.perf_counter()
        sandbox.kill(box)
        assert time.perf_counter() - start < 0.5 and box.returncode is not None
    os.close(read)
    os.close(write)


def test_without_a_sandbox_programs_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "ISOLATION", "bwrap")
    monkeypatch.setenv("PATH", "")
    sandbox.require_isolation.cache_clear()
    sandbox.check_problems([{"answer": "1"}])
    with pytest.raises(SystemExit, match=r"cannot make one here: there is no bwrap\n  Install it"):
        sandbox.check_problems([{"answer": "1"}, {"tests": []}])
    sandbox.require_isolation.cache_clear()


def test_limits_alone(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "ISOLATION", "rlimits")
    sandbox.require_isolation.cache_clear()
    cases = {RIGHT: "correct", HEART: "wrong", "while 1: 1": "timeout", "x = [0] * 10**9": "wrong"}
    for program, status in cases.items():
        assert run_tests(program, TESTS, 1, 256).status == status
    assert capsys.readouterr().err.startswith("ISOLATION=rlimits: programs that the model writes can read and delete")
    sandbox.require_isolation.cache_clear()
