"""The grader: its rules by example, that it never raises, hangs or executes, and that its workers are bounded."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import grader
from plumbing import numeric, workers

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(grader.__file__).parent
ENDLESS = "x^{100}+x+1>0"  # sympy solves this for minutes
SLACK: float = 30.0  # seconds after which something hangs, however slow the machine


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine must not turn verdicts into timeouts; tests of the limit set their own."""
    monkeypatch.setattr(grader, "VERDICT_SECONDS", SLACK)


@pytest.fixture
def new_pool():
    """No workers now, and others afterwards, for tests that start them with constants of their own."""
    end_workers()
    yield
    end_workers()


@pytest.fixture(scope="module", autouse=True)
def end_workers_at_last():
    yield
    end_workers()


# Extraction -----------------------------------------------------------------------------------------------------------
EXTRACTED = [
    (r"so \boxed{7}", "7"), (r"\boxed{6}, no, it is \boxed{7}", "7"), (r"\boxed{7} and then \boxed{8", "7"),
    (r"\boxed{\frac{1}{\sqrt{2}}} follows", r"\frac{1}{\sqrt{2}}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{ x = \boxed{3} }", "3"), (r"\fbox{7}", "7"), (r"\boxed {7}", "7"), ("$$\n\\boxed{\n7\n}\n$$", "7"),
    (r"either $\boxed{1}$ and $\boxed{2}$.", "1, 2"), (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3"),
    (r"$x = \boxed{1}$ and $y = \boxed{2}$", "1, 2"), (r"\boxed{1} red and \boxed{2} blue ones", "1, 2"),
    (r"it is \boxed{1} and so the answer is \boxed{2}", "2"), (r"$$\boxed{1}$$ $$\boxed{2}$$", "2"),
    ("\\boxed{1}\n\n\\boxed{2}", "2"), (r"\boxed{7}<|im_end|> \boxed{8}", "7"), (r"\\boxed{7}", "7"), (r"\boxed{}", ""),
    ("the answer is 7", None), (r"\boxed{7", None), (r"\boxed", None), ("boxed{7}", None), ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answer"), EXTRACTED)
def test_extract(response, answer):
    assert grader.extract_answer(response) == answer


# The rules ------------------------------------------------------------------------------------------------------------
EQUAL = r"""
# numbers
7 == 7.0 == 07 == +7 == 7 == 7.
1234567 == 1,234,567 == 1{,}234{,}567 == 1{,}\!234{,}\!567 == 1,\!234,\!567 == 1\,234\,567 == 1 234 567
0.5 == .5 == 1/2 == \frac{1}{2} == \frac12 == \dfrac{1}2 == \frac{3}{6} == ½ == 5\times 10^{-1} == 5e-1
6.02e23 == 6.02\times 10^{23} == 10^{23}\cdot 6.02 == 6.02 × 10²³ == 6.02E23 == 602 * 10^21
5/4 == 1\frac{1}{4} == 1 1/4 == 1\frac14 == 1.25
-5/4 == -1\frac{1}{4} == -1 1/4 == -\frac{5}{4} == \frac{5}{-4} == -{5 \over 4}
59319/1225 == 48 519/1225 == 48\frac{519}{1225}
1.22 == 1,22 == 1.220
0.1\overline{6} == 1/6 == 0.1\bar{6}
100!/98! == 9900
2^{100} == 4^{50} == 1267650600228229401496703205376
# dress
12 == $12$ == \(12\) == \[12\] == {12} == \boxed{12} == \text{12} == \displaystyle 12 == **12** == 12\,
(1, \frac{3}{2}) == \left(1,\tfrac32\right) == (1,1.5) == \big( 1 ,\; 3/2 \big) == $(1, 1.5)$.
2\sqrt{3} == 2√3 == 2*sqrt(3) == 2 \sqrt3 == \sqrt{12} == \frac{6}{\sqrt 3}
\frac{\sqrt2}{2} == \mathbf{\frac{\sqrt{2}}{2}} == {\large\frac{\sqrt2}{2}.} == (\frac{\sqrt{2}}{2}.)
x^2 == x² == x**2 == x*x == x^{2}
\pi r^2 == πr² == r^2\pi == pi r^2
# units and words
5\text{ cm} == 5 == 5 cm == 5\,\mathrm{cm} == 5 centimeters == \text{5 cm} == 5 \mbox{ cm}.
12\text{ m}^2 == 12 == 12\text{ square meters} == 12\,\mathrm{m^2} == 12 \text{ m}^{2}
\$4.50 == 4.5 == 4.50 dollars == 4.50\text{ dollars} == \$ 4.50
60\text{ km/h} == 60 == 60 \mathrm{~km} / \mathrm{h} == 60 kilometers per hour
40^\circ == 40 == 40° == 40 degrees == 40^{\circ} == 40\text{ degrees} == \frac{2\pi}{9}
25\% == 25 == 0.25 == \frac14 == 25 percent == 25%
-5^\circ == -5 == -5\text{ degrees} == -5°
25^\circ C == 25 == 25^\circ\text{C} == 25 degrees C
4.5e33 == 4.5\times 10^{33}\,\mathrm{erg\,s^{-1}}
2k == 2k\text{ units}
\approx 8.24\text{ mph} == 8.24 == x \approx 8.24
3 \pmod 7 == 3 == x \equiv 3 \pmod{7}
3 m == 3\text{ m}
8 == \text{The answer is } 8 == x = 8 == = 8 == 8 apples
\text{east} == East == EAST == \textbf{east} == east. == \mathbf{east}
\text{VW} == VW == "VW" == \!\text{VW}\!
\text{4:30 p.m.} == 4:30 P.M. == 4:30 pm
# choices
B == (B) == B. == \text{B} == \text{(B)} == b == B) == \mathrm{B} == \textbf{(B)} == (B) 12 == Choice B
# lists
1,2,3 == 3, 2, 1 == \{1,2,3\} == 1, 2 \text{ and } 3 == 1 or 2 or 3 == x = 1, 2, 3 == 1;2;3 == 1, 2, 2, 3
\pm 3 == 3, -3 == \{-3,3\} == x = \pm 3
1\pm\sqrt{2} == 1+\sqrt2, 1-\sqrt2
4 == \{4\}
x=1, y=2 == y=2, x=1 == (1,2)
(1,2),(3,4) == (3,4),(1,2) == \{(1,2),(3,4)\}
123,456 == 123, 456 == 123456
\begin{cases} a+b=\frac12 \\ a-b=3 \end{cases} == a-b=3, a+b=0.5
(5,8),(8,5) == (x,y)=(5,8) \text{ and } (8,5)
# intervals
(-\infty,1) == x<1 == 1>x == x \in (-\infty, 1) == -x>-1 == 2x<2 == \{x \mid x<1\}
(1,2] == 1<x\le 2 == x>1 \text{ and } x\le 2 == \{x\in\mathbb{R} : 1<x\leqslant 2\} == 1<f(x)\le 2
(-\infty,1)\cup(2,\infty) == x<1 \text{ or } x>2
[-1,1] == -1\le x\le 1 == |x|\le 1 == x^2 \le 1
(-\infty,0)\cup(0,\infty) == (0,\infty)\cup(-\infty,0) == x\ne 0 == \mathbb{R}\setminus\{0\}
\mathbb{R} == (-\infty,\infty) == (-\infty, +\infty) == \text{all real numbers}
\emptyset == \varnothing == \{\} == ∅
# matrices
\begin{pmatrix} 1 \\ 2 \end{pmatrix} == \begin{bmatrix}1\\2\end{bmatrix} == \begin{pmatrix}\frac22\\2.0\end{pmatrix}
\begin{pmatrix}3\\4\end{pmatrix} == \begin{pmatrix}3\\[4pt]4\end{pmatrix} == \frac12\begin{pmatrix}6\\8\end{pmatrix}
    == \begin{pmatrix}1\\2\end{pmatrix}+2\begin{pmatrix}1\\1\end{pmatrix}
\left[\begin{array}{cc}1&2\\3&4\end{array}\right] == \begin{pmatrix}1&2\\3&4\\\end{pmatrix}
# equations
y=2x+3 == 2x+3 == 2x-y+3=0 == y-3=2x == 3+2x=y
x^2+y^2=1 == 2x^2+2y^2-2=0
f(x)=x+1 == x+1 == y=x+1
f(n)=n == n=f(n)
\frac{NO}{BO}=\frac{1}{\sqrt6} == \frac{\sqrt6}{6}
x=5 == 2x=10 == 5 == x=2+3=5 == x \approx 5
\frac13 == \frac13 \approx 0.33 == x = \frac13 \approx 0.33
# expressions
(x+1)(x-1) == x^2-1 == -1+x^2
\sin 2x == 2\sin x\cos x == \sin(2x)
\sec^2 x == 1+\tan^2 x
\sqrt{x^2} == |x|
\sqrt{5+2\sqrt6} == \sqrt2+\sqrt3
\frac{1}{1-i} == \frac{1+i}{2}
\tanh x == \frac{e^x-e^{-x}}{e^x+e^{-x}}
\sum_{k=0}^{n} F_k F_{n-k} == \sum_{k=0}^{n} F_{n-k} F_k
\log_2 8 == 3 == \frac{\ln 8}{\ln 2}
\sqrt[3]{-8} == -2
\binom{n}{2} == \frac{n(n-1)}{2}
(-1)^n == \cos(n\pi)
\lfloor n/2\rfloor == \frac{n}{2}-\frac{1-(-1)^n}{4}
e^{i\pi} == -1
\arctan 1 == \frac{\pi}{4} == \tan^{-1} 1
a_n + b == b+a_{n}
204_5 == 204_{5}
3:2 == 3 : 2
"""
DIFFERENT = r"""
# numbers
7 != 8 != -7 != 70 != 0.7 != 7x != 7i != 7\sqrt2 != 7,8 != 7 or 8 != \frac17 != ? != \ldots != 7\pm 1
1/3 != 0.333 != 0.3333333333333333 != 3 != 33\%
0.1 != 0.10001 != 10 != 0.01
\pi != 3.14 != 22/7 != 3.14159265358979
0.25 != 25 != 0.0025
2\frac14 != \frac12 != 2.4
1 != 0.99999999999999999999 != 1+10^{-300} != 1+e^{-700} != \tanh 500 != \coth 500
1,2 != 1.2
\frac{1}{100!} != \frac{1}{101!} != 0
\sqrt2\cdot 10^{-200} != \sqrt3\cdot 10^{-200} != 0
2^{2024} != 2^{2023}
4.5e33 != 4.5 != 4.5e32 != 4.6e33
# units and words
5\text{ cm} != 5\text{ m} != 5 inches != 6 cm != 5\text{ cm}^2
\$5 != 5 euros != \$6
\text{4:30 p.m.} != \frac{2}{15} != 4:30 a.m. != 4:31 p.m.
\text{yes} != \text{no} != 7 != not yes
\text{ellipse} != \text{not ellipse} != e
0 != \text{nothing} != \emptyset
42 != \text{not } 42 != 42 is wrong != \text{less than } 42 != 42 at most != 42\text{ or more}
# choices
B != C != (A) != \text{Bob} != 12 != (C) 12 != (B) or (C) != (B)^2 != (B)\sqrt2 != \text{non}(B)
# lists
1,2 != 1 != 1,2,3 != (1,2) != 12 != 1,3
3 != 3,4
\pm 3 != 3
(1,2),(3,4) != (1,2) != (2,1),(3,4)
# intervals
(1,2) != [1,2] != (1,2] != (2,1) != (1,2,3)
[0,1)\cup(2,3] != [0,1) != [0,1)\cup(2,3) != [0,3]
x<1 != x>1 != x\le 1 != x<2 != (1,\infty) != y<1 != \mathbb{R}
# matrices
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}1&2\end{pmatrix} != \begin{pmatrix}1\\3\end{pmatrix} != (1,2)
# equations
y=2x+3 != y=2x-3 != x=2y+3 != 0
x=5 != y=5 != x=6
2x+z=1 != 1
x^2=1 != x^2=-1
# expressions
x != y != X != \sqrt{x^2} != 2x
m+k != 2m != 2k != m+n != k+N
f(x) != g(x) != f(y) != f(2x) != f(-x)
i != -i != 1
\cot x != \tan x
(-1)^n != 1 != (-1)^{n+1}
\sum_{k=0}^{n} F_k != \sum_{k=0}^{n-1} F_k
\lfloor\sqrt{n-1}\rfloor != \lfloor\sqrt{n-2}\rfloor
204_5 != 204_6 != 203_5
\infty != -\infty != 0 != \infty-\infty
3:2 != 2:3
"""


def read_table(table: str, sign: str) -> dict[str, list[list[str]]]:
    """{topic: groups of answers} of a table in which lines that begin with spaces continue the line before."""
    topics = table.replace("\n    ", " ").split("# ")[1:]
    groups = {topic.splitlines()[0]: topic.splitlines()[1:] for topic in topics}
    return {topic: [line.split(f" {sign} ") for line in lines] for topic, lines in groups.items()}


EQUAL, DIFFERENT = read_table(EQUAL, "=="), read_table(DIFFERENT, "!=")


@pytest.mark.parametrize("topic", EQUAL)
def test_equal_and_different(topic):
    for table, expected in ((EQUAL, True), (DIFFERENT, False)):
        for first, *others in table.get(topic, []):
            for other in others:
                assert grader.is_equivalent(other, first) == expected, (other, first)
                assert grader.is_equivalent(first, other) == expected, (first, other)


def test_reflexive():
    """What the reader cannot read still agrees with itself."""
    assert set(DIFFERENT) <= set(EQUAL)  # each topic is tested
    assert grader.is_equivalent(" 7 ", "7")
    assert grader.is_equivalent(r"1\cup0,1,-1,-1,2", r"1\cup0,1,-1,2,2")
    unreadable = [r"\left\{1,2", "a^", r"\foo{1}{2", "{x", r"\text{if } x>0 \text{ then}", "((((", r"\frac", "1 2 3 x"]
    examples = [text for table in (EQUAL, DIFFERENT) for groups in table.values() for group in groups for text in group]
    for text in examples + unreadable:
        assert grader.is_equivalent(text, text), text


def test_grade():
    assert grader.submit(r"\boxed{\frac{1}{2}}", "0.5").done()  # a cheap verdict is there at once
    assert grader.grade(r"\boxed{8}", "8") == grader.Verdict("8", True, "correct")
    assert grader.grade(r"\boxed{9}", "8") == grader.Verdict("9", False, "wrong")
    assert grader.grade("8", "8") == grader.Verdict(None, False, "no_answer")
    assert grader.grade(r"\boxed{}", "8").status == "wrong"
    assert grader.grade(r"\boxed{1} and \boxed{2}", "2,1").correct
    assert not grader.grade(r"\boxed{1} and \boxed{2}", "2").correct


def test_tolerance_only_where_stated():
    assert not grader.is_equivalent("3.14", "3.15")
    answers = {"3.14": True, r"\pi": True, "3.18": False, "x": False}
    assert {answer: grader.is_equivalent(answer, "3.15", tolerance=0.02) for answer in answers} == answers


# Any text -------------------------------------------------------------------------------------------------------------
PIECES = [
    *"0123456789+-*/^_=<>()[]{}|,.;:!%'$&~ \\xyzabniePE", r"\frac", r"\sqrt", r"\left", r"\right", r"\{", r"\}", r"\pm",
    r"\cup", r"\infty", r"\sin", r"\log", r"\text{", r"\boxed{", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\le",
    r"\in", r"\circ", r"\overline", r"\binom", r"\lfloor", r"\pi", r"\mathbb{R}", r"\setminus", "and", "or", "cm",
    "²", "√",
]  # fmt: skip
LATEX = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
ANY_TEXT = st.one_of(LATEX, st.text(max_size=40))


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_any_text_has_a_verdict(a, b):
    """No exception, the same verdict both ways; an answer with any content agrees with itself."""
    for text in (a, b):
        grader.extract_answer(text)
        assert grader.is_equivalent(text, text) or not grader.tidy_answer(text)
    one, other = grader.submit_answer(a, b).result(), grader.submit_answer(b, a).result()
    assert one.correct == other.correct or "timeout" in (one.status, other.status)
    assert grader.grade(f"\\boxed{{{a}}}", b).status in ("correct", "wrong", "no_answer", "timeout")


FRACTIONS = st.fractions(min_value=-50, max_value=50, max_denominator=40)


@settings(max_examples=100, deadline=None)
@given(FRACTIONS, FRACTIONS, st.sampled_from("+-*"))
def test_arithmetic_agrees_with_python(a, b, sign):
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    text = rf"\frac{{{a.numerator}}}{{{a.denominator}}} {sign} \left({b.numerator}/{b.denominator}\right)"
    assert grader.is_equivalent(text, str(value))
    assert not grader.is_equivalent(text, str(value + Fraction(1, 10**30)))


# Hostile input --------------------------------------------------------------------------------------------------------
HUGE = [
    "100000000!", "9!!!!!!", "((9!)!)!", "9^{9^{9^{9}}}", "10^{10^{10}}", "1e999999999", "2^{-100000000}", "1/0", "0^0",
    r"\sqrt{2^{1000000}}", r"\sin(10^{10^{10}})", r"\binom{10^9}{5\cdot 10^8}", "(x+1)^{100000}", r"\log_1 2",
    r"\tan\frac{\pi}{2}", "(x!)^{3000}", "x!^{x!^{50}}", "2999!/2998!+x!", r"\sin(x)^{20000}+x!",
    r"\sum_{n=1}^{\infty}\sin(n^n)", "0." + "3" * 5000, "1" * 5000, "{" * 100_000, "(" * 900, "-" * 900 + "1",
    "1" + "!" * 900, ",".join(map(str, range(20_000))), r"\frac" * 200, r"\frac" * 50_000, r"1\pm " * 40 + "1",
    "|" * 900, " " * 100_000, r"\begin{pmatrix}" + "1&" * 300 + r"1\end{pmatrix}", "x" * 999, "$" * 999, ", " * 499,
    r"\(" * 499, r"\text{" * 190, "*".join(f"x_{{{i}}}" for i in range(150)),
    r"\begin{pmatrix}x&x\\x&x\end{pmatrix}" * 24, "1 000!" * 150, "`" * 900, "e9!" * 300, r"\left(" * 150,
    "x" + "'" * 900, r"\text{prime}(10^{15})",
]  # fmt: skip


@pytest.mark.parametrize("text", HUGE, ids=lambda text: text[:20])
def test_huge_answers_are_wrong_soon(text):
    started = time.monotonic()
    for gold in ("42", "x^2+1", "(1,2)"):
        assert not grader.is_equivalent(text, gold)
        assert not grader.is_equivalent(gold, text)
    grader.grade(text, "42")
    assert time.monotonic() - started < SLACK


def test_many_hard_comparisons_go_to_a_worker():
    """A list costs the square of its length; each comparison of two gamma functions takes milliseconds."""
    left, right = (",".join(f"(x+{i})!" for i in range(start, start + 80)) for start in (1, 82))
    assert grader.is_equivalent(left, ",".join(reversed(left.split(","))))  # whatever is literally there costs little
    with pytest.raises(numeric.NeedsWorker):
        grader.judge(f"{left}+x", f"{right}+x")


def test_long_texts_between_boxes_are_not_searched():
    assert grader.extract_answer(r"\boxed{1}" + " " * 100_000 + "!" + r"\boxed{2}") == "2"


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = f"touch {tmp_path}/pwned"
    payloads = [
        f'__import__("os").system("{command}")', f"S('__import__(\"os\").system(\"{command}\")')", f"$({command})",
        f"`{command}`", f"; {command}", rf"\immediate\write18{{{command}}}", rf"\input{{|{command}}}", "exit()",
        "quit()", f"(lambda: __import__('os').system('{command}'))()", "Symbol('x').__class__.__mro__",
        "open('pwned','w')", rf"\text{{__import__('os').system('{command}')}}",
        f"x if __import__('os').system('{command}') else y", "{{7*7}}",
    ]  # fmt: skip
    for payload in payloads:
        for gold in ("42", payload):
            grader.is_equivalent(payload, gold)
            grader.is_equivalent(f"|x| < {payload}", "(1,2)")
            grader.judge_in_worker(f"|x| < {payload}", "(-2, 2)", None)  # sympy, in this process
    assert list(tmp_path.iterdir()) == []


# Workers --------------------------------------------------------------------------------------------------------------
def end_workers():
    grader.POOL.reset()
    for worker in workers_of(os.getpid()):
        worker.kill()


def until(condition):
    """Wait for a condition, for a generous while; whether it came."""
    deadline = time.monotonic() + SLACK
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    return condition()


def workers_of(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if "--worker" in child.cmdline():
                found.append(child)
    return found


def test_hanging_worker_costs_one_verdict(new_pool, monkeypatch):
    monkeypatch.setattr(workers, "WORKERS", 1)
    monkeypatch.setattr(grader, "VERDICT_SECONDS", 3.0)
    started = time.monotonic()
    futures = [grader.submit(rf"\boxed{{{text}}}", "(-2,2)") for text in ("x^2<4", ENDLESS, "x^2<4", "x^2<5", "|x|<2")]
    statuses = [future.result(timeout=4 * SLACK).status for future in futures]
    assert statuses == ["correct", "timeout", "correct", "wrong", "correct"]
    assert time.monotonic() - started < 2 * SLACK


def test_killed_worker_is_replaced():
    assert grader.is_equivalent("|x|<3", "(-3,3)")
    for worker in workers_of(os.getpid()):
        worker.kill()
    statuses = [grader.submit_answer("|x|<3", "(-3,3)").result().status for _ in range(6)]
    assert statuses.count("timeout") <= workers.WORKERS
    assert statuses[-1] == "correct"


def test_memory_of_workers_is_bounded():
    for bound in range(20):
        assert grader.is_equivalent(f"|x|<{bound + 1}", f"(-{bound + 1},{bound + 1})")
    assert until(lambda: len(workers_of(os.getpid())) == workers.WORKERS)
    for worker in workers_of(os.getpid()):  # one that has just started has not set its limit
        assert until(lambda worker=worker: worker.rlimit(psutil.RLIMIT_AS)[1] == grader.WORKER_BYTES)


def test_the_caller_imports_no_sympy_and_starts_no_process_for_cheap_verdicts():
    script = "import sys, grader; print(grader.is_equivalent('1/2', '.5'), 'sympy' in sys.modules, grader.POOL.started)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "True False False\n"


def test_submit_from_threads():
    with ThreadPoolExecutor(4) as threads:
        cases = [(rf"\sqrt{{{i}}}+{i}", rf"{i}+\sqrt{{{i}}}") for i in range(2, 60)] + [("|x|<1", "(-1,1)")] * 6
        assert all(threads.map(lambda case: grader.is_equivalent(*case), cases))


def test_forked_child_has_its_own_pool():
    assert grader.is_equivalent("|x|<1", "(-1,1)")
    child = os.fork()
    if child == 0:
        os._exit(0 if grader.is_equivalent("|x|<2", "(-2,2)") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert grader.is_equivalent("|x|<3", "(-3,3)")


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_their_parent(busy):
    """Also if it is killed, read from a pipe and has no __main__ guard; a busy worker ends by its alarm."""
    script = f"""
import grader, signal
grader.VERDICT_SECONDS = 2.0
print(grader.is_equivalent("|x|<1", "(-1,1)"), flush=True)
if {busy}:
    [grader.submit_answer({ENDLESS!r}, "(1,2)") for _ in range(2)]
signal.pause()
"""
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-"], stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    parent.stdin.write(script)
    parent.stdin.close()
    try:
        assert parent.stdout.readline() == "True\n"
        assert until(lambda: len(workers_of(parent.pid)) == workers.WORKERS)
        started = workers_of(parent.pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert until(lambda: all(not w.is_running() or w.status() == psutil.STATUS_ZOMBIE for w in started))


# The command ----------------------------------------------------------------------------------------------------------
def test_command():
    cases = [
        {"pred": r"\frac{1}{2}", "gold": "0.5"},
        {"response": r"\boxed{|x|<1} follows", "gold": "(-1,1)"},
        {"response": "nothing", "gold": "1"},
        {"pred": "3", "gold": "4"},
        {"pred": "\ud800", "gold": "4"},
    ]
    stdin = "".join(json.dumps(case) + "\n" for case in cases)
    command = [sys.executable, str(ROOT / "grader.py")]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True, timeout=4 * SLACK)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[:4] == [
        {"answer": r"\frac{1}{2}", "correct": True, "status": "correct"},
        {"answer": "|x|<1", "correct": True, "status": "correct"},
        {"answer": None, "correct": False, "status": "no_answer"},
        {"answer": "3", "correct": False, "status": "wrong"},
    ]
    assert lines[4]["status"] == "wrong"
