"""plumbing/report.py: the figures and the page show what results.json says; the page's script runs on its own HTML."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import rollout
from plumbing import report
from plumbing.files import to_json, to_line
from tests.browser import Page, embedded_data, page_script

import pytest
from matplotlib import pyplot

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\"><b>bold</b>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def attempt(text: str, answer: str | None, status: str) -> dict:
    return {"text": text, "answer": answer, "status": status, "ending": "stop", "tokens": 9}


def played(benchmark: str, name: str, *attempts: dict) -> dict:
    return evaluate.Item(benchmark, name, 3, False, 0)._asdict() | {"attempts": list(attempts)}


WRONG = attempt(r"It is \boxed{\frac{1}{3}}.", r"\frac{1}{3}", "wrong")
AGAIN = attempt(r"Still \boxed{1/3}.", "1/3", "wrong")
RIGHT = attempt(r"Hence $x^2 = \frac12$ and \boxed{7}.", "7", "correct")
PROBLEMS = {
    ("easy", "e/1"): {"question": r"Find $\sqrt{x_1}$ & more <i>now</i>", "answer": "7"},
    ("easy", "e/2"): {"question": HOSTILE, "answer": "<u>8</u>"},
    ("hard", "h/1"): {"question": "A triangle costs $5 or \\$6", "answer": "7"},
}
FIRST = [
    played("easy", "e/1", RIGHT),
    played("easy", "e/2", attempt(HOSTILE, HOSTILE, "wrong"), attempt("no box", None, "no_answer"), WRONG),
    played("hard", "h/1", WRONG, AGAIN, RIGHT),
]
SECOND = [played("easy", "e/1", WRONG, RIGHT), played("easy", "e/2", WRONG, AGAIN, WRONG), played("hard", "h/1")]
TOKENS = {
    "step": 8, "id": "t/1", "gold": "7", "max_attempts": 2, "tokens": ["What", " is", "\n", "It", HOSTILE],
    "mask": [0, 0, 0, 1, 1], "advantages": [0, 0, 0, -0.5, 2.0], "values": [0, 0, 0, None, -0.125],
    "returns": [0, 0, 0, -0.25, 1.875], "attempts": [{"status": "wrong", "answer": None, "reward": -1.0}],
}  # fmt: skip


def make_report(out: Path, records: dict[str, list[dict]], feedback: str, folders: dict[str, Path]) -> Path:
    out.mkdir(exist_ok=True)
    settings = {"MAX_ATTEMPTS": 3, "CONFIDENCE": 0.95, "FEEDBACK": feedback}
    results = {"settings": settings, "versions": {"torch": "0"}} | evaluate.summarise(records)
    report.write_files(out, results, PROBLEMS, records, folders, evaluate.find_repeats)
    (out / "results.json").write_text(to_json(results))
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A report of two models with all that it can show."""
    out = tmp_path_factory.mktemp("report")
    run = out / "runs" / "first"
    (run / "policy").mkdir(parents=True)
    rows = [{"step": i, "reward": i / 8 - 1, "accuracy": i / 16} for i in range(9)]
    (run / "metrics.jsonl").write_text("".join(map(to_line, rows)))
    lines = [TOKENS | {"step": step} for step in (7, 8)]
    (run / "tokens.jsonl").write_text("".join(map(to_line, lines)) + '{"step": 9, "cut')
    return make_report(out, {"first": FIRST, "second": SECOND}, "verified", {"first": run / "policy"})


@pytest.fixture(scope="module")
def page(made) -> Page:
    return Page(made / "report.html")


# Figures --------------------------------------------------------------------------------------------------------------
def test_figures_show_the_numbers(made, tmp_path, monkeypatch):
    models, figures = json.loads((made / "results.json").read_text())["models"], []
    monkeypatch.setattr(pyplot, "close", figures.append)
    report.draw(report.accuracy_curves(models), tmp_path)
    for axes, benchmark, n in zip(figures[0].axes, ("easy", "hard", "average"), (2, 1, 3), strict=True):
        assert axes.get_title() == f"{benchmark} (n = {n})" and [t.get_text() for t in axes.texts] == list(models)
        for name, line, band in zip(models, axes.lines[::-1], axes.collections[::-1], strict=True):
            assert line.get_xydata().tolist() == [[k, y] for k, y in enumerate(models[name][benchmark]["accuracy"], 1)]
            edges = band.get_paths()[0].vertices[:, 1]
            assert edges.min() == min(models[name][benchmark]["low"])
            assert edges.max() == max(models[name][benchmark]["high"])
    for stem in ("accuracy", "training"):
        assert (made / f"{stem}.png").read_bytes().startswith(b"\x89PNG") and (made / f"{stem}.svg").is_file()


def test_the_table_ends_with_the_repeats_of_all_attempts(made):
    table = report.make_table(json.loads((made / "results.json").read_text())).splitlines()
    assert next(line for line in table if line.startswith("hard")).split()[-2] == "0.500"  # one of two retries


def test_each_model_has_its_control():
    """pass@k. With intrinsic feedback nobody tells which attempt is right: there it is the vote, not a choice by the
    answer."""
    result = {"n": 4, "accuracy": [0.5, 0.5, 0.75], "low": [0.2] * 3, "high": [0.8] * 3}
    result["metrics"] = {"pass": {"value": [0.25, 0.5, None]}, "majority": {"value": [0.125, 0.25, None]}}
    for more, values, label in (({}, [0.25, 0.5], "no feedback"), ({"i_to_c": {}}, [0.125, 0.25], "vote of samples")):
        result["metrics"] |= more
        own, control = report.accuracy_curves({"m": {"x": result}})["x (n = 4)"]
        assert (control.accuracy, control.line, control.label, control.color) == (values, ":", label, own.color)


# The page's data ------------------------------------------------------------------------------------------------------
def test_page_carries_the_results_and_runs_its_own_script_alone(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    data, script = embedded_data(text), page_script(text)
    assert data["results"] == json.loads((made / "results.json").read_text())
    repeats = [[*WRONG.values(), False, ""], [*AGAIN.values(), True, ""], [*RIGHT.values(), False, ""]]
    assert data["problems"][2][4][0] == ["first", repeats]
    assert [line["step"] for line in data["tokens"]["first"]] == [7, 8]  # the third line is still being written
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in text  # the policy allows this one
    assert not re.search(r"__[A-Z_]+__|(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)  # all filled in
    assert "document.title" not in text  # what models said is in the data alone
    # The script has no way to turn text into markup or code.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", script)


# The page's script ----------------------------------------------------------------------------------------------------
def test_numbers(made, page):
    results = json.loads((made / "results.json").read_text())
    for metric, scale in (("accuracy", 100), ("repeat", 100), ("tokens", 1)):
        page.run(f"($('metric').value = '{metric}', $('metric').onchange())")
        rows = page.run("$('table').children.map(row => row.children.map(cell => cell.textContent))")[1:]
        assert len(rows) == 6
        for benchmark, model, _, *cells in rows:
            m = results["models"][model][benchmark.split()[0]]["metrics"][metric]
            for cell, *expected in zip(cells, m["value"], m["low"], m["high"], strict=True):
                numbers = [float(x) for x in re.findall(r"[\d.]+", cell)]
                assert numbers == [pytest.approx(scale * x, abs=0.051) for x in expected if x is not None]
    pairs = page.run("$('pairs').children.map(row => row.children[3].textContent)")[1:]
    assert len(pairs) == 3 and f"p {results['comparisons'][0]['p'][0]:.1f}" in pairs[0]


def list_entries(page: Page, **controls: str) -> list[str]:
    """Set search, model, benchmark and outcome -> the entries of the list, without the line of the question."""
    for name in ("search", "model", "benchmark", "outcome"):
        page.run(f"($('{name}').value = {json.dumps(controls.get(name, ''))}, $('{name}').oninput())")
    entries = page.run("$('list').querySelectorAll('button').map(b => b.firstChild)")
    assert int(page.run("$('count').textContent").split()[0]) == len(entries)
    return [entry.strip().replace(" · ", " ") for entry in entries]


@pytest.mark.parametrize(
    ("controls", "entries"),
    [
        ({}, ["e/1 first", "e/1 second", "e/2 first", "e/2 second", "h/1 first", "h/1 second"]),
        ({"search": "TRIANGLE"}, ["h/1 first", "h/1 second"]),
        ({"search": "still", "model": "first"}, ["h/1 first"]),
        ({"benchmark": "easy", "outcome": "1"}, ["e/1 first"]),
        ({"outcome": "3"}, ["h/1 first"]),
        ({"outcome": "0"}, ["e/2 first", "e/2 second", "h/1 second"]),
        ({"outcome": "again"}, ["e/2 second", "h/1 first"]),
    ],
)
def test_search_and_filters(page, controls, entries):
    assert list_entries(page, **controls) == entries


def test_dialogue_shows_attempts_verdicts_and_answers(page):
    def shown() -> str:
        return page.run("$('dialogue').textContent")

    list_entries(page, search="triangle", model="first")
    for number, verdict in enumerate(("wrong", "wrong", "correct"), 1):
        assert f"Attempt {number} of 3: {verdict}, 9 tokens" in shown()
    assert shown().count("an answer given before") == 1
    assert "A triangle costs $5 or $6" in shown()  # dollars that are no formula
    assert page.run("$('dialogue').all.filter(e => e.className === 'boxed').length") == 3  # also outside of dollars
    page.run("$('dialogue').querySelector('button').click()")  # the other model's dialogue about the problem
    assert "h/1 · second" in shown() and "No attempt was made" in shown()
    page.run("$('source').click()")
    list_entries(page, search="triangle", model="first")
    assert r"It is \boxed{\frac{1}{3}}." in shown()
    page.run("$('source').click()")


def test_programs_are_shown_as_code_with_what_failed(tmp_path, change):
    """Dollars in code are no formulas, and what a program says stays text."""
    tests, failed = ["assert f(1) == '$x$'", "assert f(2) == 3"], "assert f(1) == '$x$'\nAssertionError: <b>$0$"
    change(sys.modules[__name__], PROBLEMS={("easy", "p/1"): {"question": "Write f for $x_1$.", "tests": tests}})
    program = "def f(x):\n    return '$0$'\n"
    said = attempt(f"First:\n```python\n{program}```\nDone.", f"```python\n{program}```", "wrong") | {"failed": failed}
    page = Page(make_report(tmp_path, {"m": [played("easy", "p/1", said)]}, "verified", {}) / "report.html")
    list_entries(page)
    code = page.run("$('dialogue').querySelectorAll('pre').map(e => e.textContent)")
    assert code == ["\n".join(tests) + "\n", program, failed]
    text = page.run("$('dialogue').textContent")
    assert "never tests: assert" in text and "Done.Attempt 1 of 3: wrong, 9 tokens; what failed: assert f(1)" in text
    assert "right answer" not in text
    assert page.run("$('dialogue').querySelectorAll('math').length") == 1  # the question's


@pytest.mark.parametrize(
    ("latex", "mathml"),
    [
        (r"\frac12", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"),
        (r"\sqrt[3]{x_1^2}", "<mroot><msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup><mn>3</mn></mroot>"),
        (r"a \le b'", "<mi>a</mi><mo>≤</mo><msup><mi>b</mi><mo>′</mo></msup>"),
        (r"\unknown{x}", r"<mtext>\unknown</mtext><mi>x</mi>"),
        (r"2^{10}_a, 2^10", "<msup><mn>2</mn><mn>1</mn></msup><mn>0</mn>"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "<mtr><mtd><mn>3</mn></mtd><mtd><mn>4</mn></mtd></mtr>"),
        (r"<img src=x>", '<mo stretchy="false">&lt;</mo>'),
        (r"\constructor\toString{x}", r"<mtext>\constructor</mtext><mtext>\toString</mtext><mi>x</mi>"),
        ("a" + "^x" * 9, "<msup><mi>a</mi><mrow>" + "<mi>x</mi>" * 9 + "</mrow></msup>"),
    ],
)
def test_formulas(page, latex, mathml):
    assert mathml in page.run(f"formula({json.dumps(latex)}).outerHTML")


@pytest.mark.parametrize("text", [r"\boxed{1", "$x", r"\[ x", r"\begin{align} x", "$$", "${" * 50_000])
def test_unfinished_formulas_are_shown_as_they_are(page, text):
    shown = page.run(f"make('div', prose({json.dumps(text)})).textContent")
    assert shown.replace("$", "")[:3] == text.replace("$", "").replace("\\boxed{", "")[:3]


def test_tokens_are_shaded_by_their_numbers(page):
    spans = "$('tokens').children.map(s => [s.textContent, s.className, s.title, s.style.background ?? ''])"
    shown = page.run(spans)
    assert [x[:2] for x in shown] == [["What", "told"], [" is", "told"], ["⏎\n", "told"], ["It", ""], [HOSTILE, ""]]
    assert shown[3][2:] == ["advantage -0.500, value not finite, return -0.250", "rgba(var(--minus), 0.212)"]
    assert shown[4][3] == "rgba(var(--plus), 0.850)"  # 2.0 is the largest, -0.5 a quarter of it
    assert "Right answer: 7; 1 of 2 attempts: wrong (no answer, reward -1)" in page.run("$('scale').textContent")
    page.run("($('shade').value = 'values', $('shade').onchange())")
    assert page.run(spans)[4][3] == "rgba(var(--minus), 0.850)"
    assert page.run("$('which').children.map(o => o.textContent)")[-1].endswith("step 8, t/1")


def test_intrinsic_dialogues_are_right_when_their_last_attempt_is(tmp_path, change):
    """As in the table: right and then wrong is wrong; and where the context was full there is no last one."""
    change(rollout, FEEDBACK="intrinsic")
    dialogues = [played("easy", "e/1", WRONG, RIGHT, RIGHT), played("easy", "e/2", RIGHT, RIGHT, WRONG)]
    dialogues.append(played("hard", "h/1", RIGHT))
    page = Page(make_report(tmp_path, {"m": dialogues}, "intrinsic", {}) / "report.html")
    assert list_entries(page, outcome="i → c") == ["e/1 m"]
    assert list_entries(page, outcome="c → i") == ["e/2 m", "h/1 m"]
    assert list_entries(page, outcome="c → c") == list_entries(page, outcome="i → i") == []
    list_entries(page)
    verdicts = page.run("$('list').querySelectorAll('b').map(b => b.textContent)")
    assert verdicts == ["✓ i → c", "✗ c → i", "✗ c → i"]
    assert page.run("$('table').children[1].children[5].textContent").startswith("50.0")  # easy: one of two


# In a browser ---------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome: the page's policy and decompression are not tried")
def test_page_in_a_browser(made, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--enable-logging=stderr"]
    command = [BROWSER, *flags, "--virtual-time-budget=20000", "--dump-dom", (made / "report.html").resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 'data-ready="yes"' in done.stdout
    assert "<title>Accuracy by allowed attempts</title>" in done.stdout  # nothing that a model said has run
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in done.stdout
    assert "CONSOLE" not in done.stderr  # no errors, and nothing that the policy had to refuse
