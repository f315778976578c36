"""The grader: its rules by example, sympy as an oracle, that it never raises, hangs or executes, and its command."""

import json
import pathlib
import random
import re
import subprocess
import sys
import time

import grader
from plumbing import numeric

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(grader.__file__).parent
SLACK: float = 3.0  # seconds of processor time after which something hangs, on a slow machine, too; it takes 0.1


# Extraction -----------------------------------------------------------------------------------------------------------
EXTRACTED = [
    (r"so \boxed{7}", "7"), (r"\boxed{6}, no, it is \boxed{7}", "7"), (r"\boxed{7} and then \boxed{8", "7"),
    (r"\boxed{\frac{1}{\sqrt{2}}} follows", r"\frac{1}{\sqrt{2}}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{ x = \boxed{3} }", "3"), (r"\fbox{7}", "7"), (r"\boxed {7}", "7"), ("$$\n\\boxed{\n7\n}\n$$", "7"),
    (r"either $\boxed{1}$ and $\boxed{2}$.", "1, 2"), (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3"),
    (r"$x = \boxed{1}$ and $y = \boxed{2}$", "1, 2"), (r"\boxed{1} red and \boxed{2} blue ones", "1, 2"),
    (r"it is \boxed{1} and so the answer is \boxed{2}", "2"), (r"$$\boxed{1}$$ $$\boxed{2}$$", "2"),
    ("\\boxed{1}\n\n\\boxed{2}", "2"), (r"\boxed{7}<|im_end|> \boxed{8}", "7"), (r"\\boxed{7}", "7"), (r"\boxed{}", ""),
    (r"\boxed 7 and", "7"), (r"so $\boxed 42$.", "42"), (r"\boxed{1} or \boxed{2}", "1, 2"),
    (r"\boxed{41}. Alternatively, \boxed{42}", "41, 42"),
    ("the answer is 7", None), (r"\boxed{7", None), (r"\boxed", None), ("boxed{7}", None), ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answer"), EXTRACTED)
def test_extract(response, answer):
    assert grader.extract_answer(response) == answer


# The rules ------------------------------------------------------------------------------------------------------------
RULES = r"""
# numbers
7 == 7.0 == 07 == +7 == 7 == 7. != 8 != -7 != 70 != 0.7 != 7x != 7i != 7\sqrt2 != 7,8 != 7 or 8 != \frac17 != ?
    != \ldots != 7\pm 1
1234567 == 1,234,567 == 1{,}234{,}567 == 1{,}\!234{,}\!567 == 1,\!234,\!567 == 1\,234\,567 == 1 234 567
0.5 == .5 == 1/2 == \frac{1}{2} == \frac12 == \dfrac{1}2 == \frac{3}{6} == ½ == 5\times 10^{-1} == 5e-1 == one half
6.02e23 == 6.02\times 10^{23} == 10^{23}\cdot 6.02 == 6.02 × 10²³ == 6.02E23 == 602 * 10^21
25 == twenty-five == 0.000025 million == \text{twenty-five} == \sqrt{625}
384 == 8!!
5/4 == 1\frac{1}{4} == 1 1/4 == 1.25
1/3 == 0.333333333333 == 0.3333333333333333 != 0.333 != 0.33333333333 != 3 != 33\%
42 == 42_{10} == \phantom{43}42 == \color{blue}{42} == \textcolor{red}{42} != 32 != 42 \pm 10^{-60} != 42\\43
    != 41<42<43 != \begin{cases} 42 \\ 43 \end{cases} != 42 \lor 43 != x = 42 = 43 != 42 \approx 43
    != x \approx 42 \approx 43 != 42.3 \approx 42
30.25^\circ == 30^\circ 15' == 30^\circ15'0'' == 30.25
\infty == \text{infinity} == infinity
0.\overline{36} == 4/11 == 0.36\overline{36}
1 != 0.99999999999999999999 != 1+10^{-300} != 1+e^{-700} != \tanh 500 != \coth 500 != 1-e^{-e^{e^2}} != \frac00
720 != 3!! != 10 \cdot 9 = 720
# dress
12 == $12$ == \(12\) == \[12\] == {12} == \boxed{12} == \text{12} == \displaystyle 12 == **12** == 12\,
(1, \frac{3}{2}) == \left(1,\tfrac32\right) == (1,1.5) == \big( 1 ,\; 3/2 \big) == $(1, 1.5)$.
{}_{10}C_3 == \binom{10}{3} == C_{10}^3 == {10 \choose 3} == 120
2\sqrt{3} == 2√3 == 2*sqrt(3) == 2 \sqrt3 == \sqrt{12} == \frac{6}{\sqrt 3}
# units and words
5\text{ cm} == 5 == 5 cm == 5\,\mathrm{cm} == 5 centimeters == \text{5 cm} == 5 \mbox{ cm}. != 5\text{ m} != 5 inches
    != 6 cm != 5\text{ cm}^2
12\text{ m}^2 == 12 m^2 == 12 == 12\text{ square meters} == 12\,\mathrm{m^2} == 12 \text{ m}^{2}
-\$4.50 == -4.5 == -4.50\text{ dollars} == \$-4.50 == -4.50 dollars == negative 4.5
60\text{ km/h} == 60 == 60 \mathrm{~km} / \mathrm{h} == 60 kilometers per hour
40^\circ == 40 == 40° == 40 degrees == 40^{\circ} == 40\text{ degrees} == \frac{2\pi}{9}
25\% == 25 == 0.25 == \frac14 == 25 percent == 25%
25^\circ C == 25 == 25^\circ\text{C} == 25 degrees C
3 \pmod 7 == 3 == 3 \mod 7 == x \equiv 3 \pmod{7} != 3 \pmod 5 != 4 \pmod 7
8 == \text{The answer is } 8 == x = 8 == = 8 == 8 apples
\text{east} == East == EAST == \textbf{east} == east. == \mathbf{east}
\text{4:30 p.m.} == 4:30 P.M. == 4:30 pm != 4:30 a.m. != 4:31 p.m.
1\text{ day }2\text{ hours }30\text{ minutes} == 26.5\text{ hours}
2\text{ hours }30\text{ minutes} == 150\text{ minutes} == 2.5\text{ hours} == 2\text{ hours and }30\text{ minutes}
    != 2.3\text{ hours} != 5\text{ MW}
5\ \mu\text{m} == 5 micrometers == 5\text{ µm} == 5
9.8\,\frac{\text{m}}{\text{s}^2} == 9.8\text{ m/s}^2 == 9.8\text{ m} \cdot \text{s}^{-2}
    == 9.8 meters per second squared
9.6\,\mathring{\mathrm{A}} == 9.6\,\AA == 9.6 angstroms == 9.6
7\text{ integers} == 7 == 7 integers == 7\text{ positive integers}
\text{an ellipse} == \text{ellipse} == \text{the ellipse}
\text{yes} != \text{no} != 7 != not yes
\text{ellipse} != \text{not ellipse} != e
42 != \text{not } 42 != 42 is wrong != \text{less than } 42 != 42 at most != 42\text{ or more} != 42 thousand
    != 42\text{ million} != 42 dozen != half of 42 != minus 42 != up to 42 != over 42 != multiples of 42 != 42 squared
    != 42 is incorrect != 42\text{ (could also be 43)} != 42 hundredths != 42 perhaps != 42 times != 42 \bmod 5
    != 42\text{ percent of } x != 42\text{ squared} != 42\text{ (or 43)}
\tan 15^\circ != \tan 15
\text{odd} != \text{neither odd nor even} != \text{even}
# choices
B == (B) == B. == \text{B} == \text{(B)} == b == B) == \mathrm{B} == \textbf{(B)} == (B) 12 == Choice B != C != (A)
    != \text{Bob} != 12 != (C) 12 != (B) or (C) != (B)^2 != (B)\sqrt2 != \text{non}(B) != (B) 12, (C) 13
    != \text{(B) is incorrect} != \text{(B) or (C)} != \text{not B} != A, B
27 != (B) 28 != (B) 27, (C) 28 != (B) 27 or (C) 27
# lists
1,2,3 == 3, 2, 1 == \{1,2,3\} == 1, 2 \text{ and } 3 == 1 or 2 or 3 == x = 1, 2, 3 == 1;2;3 == 1, 2, 2, 3
\pm 3 == 3, -3 == \{-3,3\} == x = \pm 3 != 3
123,456 == 123, 456 == 123456
f(2), f(1), f(4) == f(2) < f(1) < f(4)
(3, \frac{\pi}{2}) == r = 3, \theta = \frac{\pi}{2}
\frac{\pi}{3}+2k\pi == \frac{\pi}{3}+2k\pi, k \in \mathbb{Z} == \{\frac{\pi}{3}+2k\pi : k\in\mathbb{Z}\}
f(x)=2x == f(x)=2x \quad \forall x \in \mathbb{R} == f(x) = 2x \text{ for all } x
\{1,2\},\{3,4\} != \{1,3\},\{2,4\} != 1,2,3,4
2,-1,-18 != a=-1, h=2, k=-18
(-2,1) != x=-2 \text{ or } x=1
f(n)=n, g(n)=1 != f(n)=1, g(n)=n
f(2), f(1) != f(1) < f(2)
# intervals
(-\infty,1) == x<1 == 1>x == x \in (-\infty, 1) == -x>-1 == 2x<2 == \{x \mid x<1\}
(1,2] == 1<x\le 2 == x>1 \text{ and } x\le 2 == \{x\in\mathbb{R} : 1<x\leqslant 2\} == 1<f(x)\le 2
(-\infty,1)\cup(2,\infty) == x<1 \text{ or } x>2
\mathbb{R} == (-\infty,\infty) == (-\infty, +\infty) == \text{all real numbers}
\emptyset == \varnothing == \{\} == ∅
(2,\infty) == \text{all real numbers greater than 2} == \text{all real numbers } x \text{ such that } x > 2
(-\infty,3)\cup(3,\infty) == x\ne 3 == \text{all real numbers except 3} == \mathbb{R} \setminus \{3\}
    == x \in \mathbb{R}, x \ne 3 == \text{all real numbers except } x = 3
(-\infty,2)\cup(3,\infty) == x \notin [2,3] == x<2 \text{ or } x>3 == (x-2)(x-3)>0
(1,2) != [1,2] != (1,2] != (2,1) != (1,2,3)
[0,1)\cup(2,3] != [0,1) != [0,1)\cup(2,3) != [0,3]
x<1 != x>1 != x\le 1 != x<2 != (1,\infty) != y<1 != \mathbb{R}
(0,\infty) != x \in (0,2), x > 1
# matrices
\begin{pmatrix} 1 \\ 2 \end{pmatrix} == \langle 1, 2 \rangle == \begin{bmatrix}1\\2\end{bmatrix}
    == \begin{pmatrix}\frac22\\2.0\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}1&2\end{pmatrix} != \begin{pmatrix}1\\3\end{pmatrix} != (1,2)
# equations
y=2x+3 == 2x+3 == 2x-y+3=0 == y-3=2x == 3+2x=y
f(x)=x+1 == x+1 == y=x+1 != g(x)=x+1
x=5 == 2x=10 == 5 == x=2+3=5 == x \approx 5
\frac13 == \frac13 \approx 0.33 == x = \frac13 \approx 0.33
\frac35 == \sin\theta=\frac35 == \sin \theta = 0.6
12 == \text{lcm}(4,6) = 12 == \lim_{x\to 0} g(x) = 12 == f^{-1}(3) = 12 == \gcd(24, 36) = 12 == \max f = 12
\frac12 == P(X=2)=\frac12 == P(A \cap B) = \frac12 == P(A|B) = 0.5
12\pi == \text{Area} = 12\pi \text{ cm}^2 == [ABC] = 12\pi
x'+3x=t == \dot x + 3x = t == \frac{dx}{dt}+3x=t == dx/dt + 3x = t == x^{\prime} + 3x - t = 0 != x''+3x=t != y'+3x=t
0.56 = 56\% == 0.56 == 56\%
\begin{cases} 1 & x>0 \\ 2 & x<0 \end{cases} == \begin{cases} 2 & \text{if } x < 0 \\ 1 & \text{if } x > 0 \end{cases}
    != \begin{cases} 2 & x>0 \\ 1 & x<0 \end{cases} != 1,2
x^2+y^2=1 != 0\cdot(x^2+y^2-1)=0 != 0=0
# expressions
(x+1)(x-1) == x^2-1 == -1+x^2
\sum_{k=0}^{n} F_k F_{n-k} == \sum_{k=0}^{n} F_{n-k} F_k
\sqrt[3]{-8} == -2
\binom{n}{2} == \frac{n(n-1)}{2} == \frac{n!}{2(n-2)!}
\arctan 1 == \frac{\pi}{4} == \tan^{-1} 1
204_5 == 204_{5} != 204_6 != 203_5
\sqrt{4\pi G\rho_0 r_0^2} == 2r_0\sqrt{\pi G\rho_0}
1+\sqrt3 i == 2\operatorname{cis}\frac{\pi}{3}
\lfloor\log_2 n\rfloor+1 == \lceil\log_2(n+1)\rceil
\ln ab == \ln a+\ln b
x != y != X != \sqrt{x^2} != 2x != \max(x,-5) != \sqrt{x}^2 != e^{\ln x} != \max(x, -900)
    != x+\lfloor\frac{1}{1+(x-3)^2}\rfloor != x+\lfloor e^{-x^2}\rfloor != \max(x, -10^9)
f(x) != g(x) != f(y) != f(2x) != f(-x)
(-1)^n != 1 != (-1)^{n+1}
3:2 != 2:3
n != n+\lfloor\frac{n}{10^{15}}\rfloor != (-1)^{2n}+n-1+\lfloor\frac{n}{10^6}\rfloor != n+0^{|n-7|} != n+(n-7)!-(n-7)!
42 != \arg(\sum_{n} x)
"""
ASKED = r"""
- | 1.22 == 1,22
- | 5,15 != 5.15
- | 113 == m+n=113
- | x+y=5 != 5
- | 1011_2 == 1011_{\text{two}}
Compute $99^2+99+1$. | 9901 != 99^2+99+1 == 9901 == 99^2+99+1 = 9901 != (1+99)+99^2 == 99(99+1)+1
Compute 99^2+99+1. | 9901 != x = 99^2+99+1+0
Solve \(2x=10\). | 5 != 2x = 10
There are $5$ apples. | 5 == 5
Find $\sin 20^\circ \sin 40^\circ$. | 9/256 != \sin 20^\circ \sin 40^\circ
Find $\log_2 8$. | 3 != 1 + \log_2 8 - 1
How often? | 3 == \log_2 8
List them in increasing order. | 1,2,3 != 3,2,1
Is $\frac12$ or $\frac13$ larger? | \frac{1}{2} == \frac12 == 1/2
in order from least to greatest | f(2),f(1) == f(2)<f(1)
- | f(2),f(1) != f(2)>f(1)
in decreasing order | f(2),f(1) == f(2)>f(1)
Find the ordered pair. | (1,2) != 1<x<2
Find $a$ and $h$. | 2,-1 != -1,2 == h=-1, a=2
Write it in base $5$. | 204_5 == 204
What is the wavelength in angstroms? | 6630 != 6630\text{ nm} == 6630\,\AA
- | 80 == AB^2 = 80 != x^2 = 80 != 2AB = 80
- | 7 == 7\text{ balls} == 100m+n = 7 != 2x = 7 != 7 widgets
How many feet long is it? | 85 != 85 inches == 85 ft
Find ${9\choose 3}$. | 84 != \binom{9}{3}
What is its degree measure? | 45 != 45 rad == 45°
Convert $135^\circ$ to radians. | \frac{3\pi}{4} != 135^\circ
In how many months? | 5 != 5 years
How many inches are in 3 feet? | 36 != 3 feet
He walks on for some m, 3 m each step. | 5 != 5 km
Factor $x^2-9$. | (x-3)(x+3) != f(x) = x^2-9 != -9+x^2 == (x+3)(x-3)
What is $0.\overline3$? | \frac13 != 0.\overline{3}
Simplify $\sqrt[3]{8\cdot 27}$. | 6 != (8\cdot 27)^{1/3}
Find $\log_264$. | 6 != \log_2 64
Find $\sin^{-1}\frac12$. | \frac{\pi}{6} != \arcsin\frac12
Find $\log_2 x$. | 5 == \log_2 x = 5
In which quadrant? | II == Quadrant II
How many red and how many blue balls? | 3,4 == 3\text{ red}, 4\text{ blue}
(C) east | C == \text{(C) east} != \text{(C) million}
- | C != \text{(C), 12}
How many widgets are made, in millions? | 7 == 7 widgets != 7 million
"""


def read_table(table: str) -> list[list[str]]:
    """[first answer, sign, answer, sign, answer, ...] of each line; a line that begins with spaces goes on."""
    lines = table.strip().replace("\n    ", " ").splitlines()
    return [re.split(r" (==|!=) ", line) for line in lines if not line.startswith("# ")]


@pytest.mark.parametrize("line", read_table(RULES), ids=lambda line: line[0])
def test_rules(line):
    """The first answer against each other, both ways, without a question."""
    first, *others = line
    for sign, other in zip(others[::2], others[1::2], strict=True):
        for pair in ((first, other), (other, first)):
            assert grader.is_equivalent(*pair) == (sign == "=="), pair


@pytest.mark.parametrize("line", read_table(ASKED), ids=lambda line: line[0])
def test_question_and_gold(line):
    (question, gold), others = line[0].split(" | "), line[1:]
    for sign, answer in zip(others[::2], others[1::2], strict=True):
        verdict = grader.grade(f"\\boxed{{{answer}}}", gold, question=question)
        assert verdict.correct == (sign == "=="), (answer, gold, question)


def test_reflexive():
    """What the reader cannot read still agrees with itself."""
    unreadable = [r"\left\{1,2", "a^", r"\foo{1}{2", "{x", r"\text{if } x>0 \text{ then}", "((((", r"\frac", "1 2 3 x"]
    examples = [text for line in read_table(RULES) for text in line[::2]]
    for text in examples + unreadable:
        assert grader.is_equivalent(text, text), text


def test_grade():
    assert grader.submit(r"\boxed{\frac{1}{2}}", "0.5").done()  # a cheap verdict is there at once
    assert grader.grade(r"\boxed{9}", "8") == grader.Verdict("9", False, "wrong")
    assert grader.grade("8", "8") == grader.Verdict(None, False, "no_answer")
    assert [grader.grade(r"\boxed{1} and \boxed{2}", gold).status for gold in ("2,1", "2")] == ["correct", "wrong"]
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
    one, other = grader.grade_answer(a, b), grader.grade_answer(b, a)
    assert one.correct == other.correct or "timeout" in (one.status, other.status)
    assert grader.grade(f"\\boxed{{{a}}}", b).status in ("correct", "wrong", "no_answer", "timeout")


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
    "x" + "'" * 900, r"\boxed{1}" + " " * 100_000 + r"!\boxed{2}", r"\text{prime}(10^{15})", "1 m" * 300,
    "1 m^{9999999}", r"\frac12 \bmod 99999999999999", r"1\text{ m}" + r"\frac{m}{m}" * 80, r"{1 \over " * 200,
]  # fmt: skip


@pytest.mark.parametrize("text", HUGE, ids=lambda text: text[:20])
def test_huge_answers_are_wrong_soon(text):
    started = time.process_time()
    for gold in ("42", "x^2+1", "(1,2)"):
        assert not grader.is_equivalent(text, gold)
        assert not grader.is_equivalent(gold, text)
    grader.grade(text, "42")
    assert time.process_time() - started < SLACK


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = f"touch {tmp_path}/pwned"
    call = f"__import__('os').system('{command}')"
    payloads = [
        call, f"S({call!r})", f"$({command})", f"`{command}`", rf"\immediate\write18{{{command}}}", "exit()",
        "Symbol('x').__class__.__mro__", "open('pwned','w')", rf"\text{{{call}}}", f"x if {call} else y",
    ]  # fmt: skip
    for payload in payloads:
        for gold in ("42", payload):
            grader.is_equivalent(payload, gold)
            grader.is_equivalent(f"|x| < {payload}", "(1,2)")
    assert list(tmp_path.iterdir()) == []


# sympy as an oracle ---------------------------------------------------------------------------------------------------
X, Y = sympy.symbols("x y", real=True)
REWRITES = [sympy.expand, sympy.factor, sympy.together, sympy.cancel, sympy.powsimp, sympy.trigsimp]
ORACLE_CASES: int = 500  # expressions; each is rewritten once and perturbed five times


def draw_expression(rng: random.Random, depth: int) -> sympy.Expr:
    """A random expression of x and y whose value is real for all real x and y, or a random number."""
    if depth == 0:
        return rng.choice([X, Y, X, sympy.Rational(rng.randint(-9, 9), rng.randint(1, 6)), sympy.Integer(2)])
    first, second = draw_expression(rng, depth - 1), draw_expression(rng, depth - 1)
    kinds = [first + second, first * second, first - 2 * second, first**2, sympy.sin(first), first / (second**2 + 1)]
    return rng.choice([*kinds, sympy.cos(first) + second, sympy.sqrt(first**2 + 2), sympy.exp(first / 9)])


def test_sympy_agrees():
    """What sympy has rewritten is the same answer, or takes too long; with a term more, it is another."""
    rng, statuses = random.Random(15), []
    for _ in range(ORACLE_CASES):
        expression = draw_expression(rng, rng.choice([1, 2, 2, 3]))
        gold, rewritten = sympy.latex(expression), sympy.latex(rng.choice(REWRITES)(expression))
        statuses.append(grader.grade_answer(rewritten, gold).status)
        assert statuses[-1] != "wrong", (rewritten, gold)
        small = sympy.Rational(1, rng.choice([2, 1000, 10**30]))
        for term in (small, small * X, small * sympy.cos(Y), X * Y, sympy.exp(-X) * small):
            assert not grader.is_equivalent(sympy.latex(expression + term), gold), (expression, term)
    assert statuses.count("timeout") < ORACLE_CASES / 50


def test_sympy_agrees_on_sets():
    """Solutions of random inequalities, as sympy has them, against the inequality and against a moved end point."""
    rng = random.Random(15)
    for _ in range(60):
        roots = [sympy.Rational(rng.randint(-9, 9), rng.choice([1, 2, 3])) for _ in range(rng.randint(1, 3))]
        relation = rng.choice([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge])(sympy.prod(X - root for root in roots), 0)
        solution = sympy.solveset(relation, sympy.Symbol("x", real=True), sympy.S.Reals)
        if solution not in (sympy.S.EmptySet, sympy.S.Reals):
            assert grader.is_equivalent(sympy.latex(relation), sympy.latex(solution)), (relation, solution)
            moved = solution.subs(roots[0], roots[0] + sympy.Rational(1, 7))
            same = moved == solution
            assert grader.is_equivalent(sympy.latex(relation), sympy.latex(moved)) == same, (relation, moved)


# The command ----------------------------------------------------------------------------------------------------------
def run_command(*lines: str) -> subprocess.CompletedProcess:
    """The command with these lines on stdin; it does without sympy, which is the oracle here."""
    script = "import sys, grader; grader.main(); assert 'sympy' not in sys.modules"
    command = [sys.executable, "-c", script]
    text = "\n".join(lines)
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)


def test_command():
    cases = [
        ({"pred": r"\frac{1}{2}", "gold": "0.5"}, r"\frac{1}{2}", "correct"),
        ({"response": r"\boxed{|x|<1} follows", "gold": "(-1,1)"}, "|x|<1", "correct"),
        ({"response": "nothing", "gold": "1"}, None, "no_answer"),
        ({"pred": 0.1, "gold": 0.1000}, "0.1", "correct"),
        ({"pred": 12345678901234567890, "gold": "12345678901234567891"}, "12345678901234567890", "wrong"),
        ({"pred": "2+2", "gold": 4, "question": "What is $2+2$?"}, "2+2", "wrong"),
        ({"pred": "3.1", "gold": "3", "tolerance": 0.2}, "3.1", "correct"),
        ({"pred": "\ud800", "gold": "4"}, "\ud800", "wrong"),
    ]
    done = run_command(*(json.dumps(case) for case, _, _ in cases))
    expected = [{"answer": a, "correct": s == "correct", "status": s} for _, a, s in cases]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected and done.returncode == 0


BAD_ROWS = ['{"pred": "1"}', "{", "[1]", '{"gold": "1", "pred": null}', '{"gold": ["1"], "pred": "1"}']


@pytest.mark.parametrize("line", BAD_ROWS)
def test_bad_row_of_the_command(line):
    done = run_command('{"pred": "1", "gold": "1"}', line)
    assert done.returncode == 1 and json.loads(done.stdout)["correct"]
    assert done.stderr.startswith("line 2: ") and "Traceback" not in done.stderr


def test_timeout_is_a_matter_of_work(monkeypatch):
    """Not of the clock: the same verdict with every run, and none where there is more to spend."""
    terms = "+".join(f"e^{{{i}x}}" for i in range(60))
    hard = rf"\sum_{{k}} 1+{terms}", f"x^2+{terms}"
    monkeypatch.setattr(numeric, "MAX_WORK", 1e6)
    assert {grader.grade_answer(*hard).status for _ in range(3)} == {"timeout"}
    monkeypatch.setattr(numeric, "MAX_WORK", 1e12)
    assert grader.grade_answer(*hard).status == "wrong"
