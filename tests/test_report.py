"""The figure and report.html: what they show is what results.json says; the page in a browser, when there is one."""

import base64
import gzip
import hashlib
import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

import evaluate
import rollout
from data import report
from tests.browser import Browser, find_browser

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\"><b>bold</b>"


def said(text: str, answer: str | None, status: str) -> dict:
    return {"text": text, "answer": answer, "status": status, "ending": "stop", "tokens": 9}


def played(benchmark: str, name: str, *attempts: dict, K: int = 3, control: bool = False) -> dict:
    return {"benchmark": benchmark, "id": name, "K": K, "control": control, "sample": 0, "attempts": list(attempts)}


WRONG, AGAIN = said(r"It is \boxed{\frac{1}{3}}.", r"\frac{1}{3}", "wrong"), said(r"Still \boxed{1/3}.", "1/3", "wrong")
RIGHT = said(r"Hence $x^2 = \frac12$ and \boxed{7}.", "7", "correct")
PROBLEMS = [
    {"benchmark": "easy", "id": "e/1", "question": r"Find $\sqrt{x_1}$ & more <i>now</i>", "answer": "7"},
    {"benchmark": "easy", "id": "e/2", "question": HOSTILE, "answer": "<u>8</u>"},
    {"benchmark": "hard", "id": "h/1", "question": "A triangle costs $5 or \\$6", "answer": "7"},
]
MODELS = {
    "first": [
        played("easy", "e/1", RIGHT),
        played("easy", "e/2", said(HOSTILE, HOSTILE, "wrong"), said("no box", None, "no_answer"), WRONG),
        played("hard", "h/1", WRONG, AGAIN, RIGHT),
    ],
    "second": [
        played("easy", "e/1", WRONG, RIGHT),
        played("easy", "e/2", WRONG, AGAIN, WRONG),
        played("hard", "h/1"),
    ],
}
TOKENS = {
    "step": 8,
    "id": "t/1",
    "gold": "7",
    "max_attempts": 2,
    "tokens": ["What", " is", "\n", "It", HOSTILE],
    "mask": [0, 0, 0, 1, 1],
    "advantages": [0, 0, 0, -0.5, 2.0],
    "values": [math.nan, 0, 0, 0.25, -0.125],
    "returns": [0, 0, 0, -0.25, 1.875],
    "attempts": [{"status": "wrong", "answer": None, "reward": -1.0}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A report of two models with all that it can show."""
    out = tmp_path_factory.mktemp("report")
    run = out / "runs" / "first"
    (run / "policy").mkdir(parents=True)
    rows = [{"step": i, "reward": i / 8 - 1, "accuracy": i / 16} for i in range(9)]
    lines = [TOKENS | {"step": step} for step in (7, 8)]
    (run / "tokens.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 9, "cut')
    results = {"settings": {"MAX_ATTEMPTS": 3, "CONFIDENCE": 0.95}, "versions": {"torch": "0"}}
    results |= evaluate.summarise(MODELS)
    report.draw(report.curves(results["models"]), out)
    data = evaluate.report_data(results, MODELS, PROBLEMS, {"first": run / "policy", "second": out / "second"})
    (out / "report.html").write_text(report.page(out, data, {"first": rows}), encoding="utf-8")
    (out / "results.json").write_text(evaluate.to_json(results))
    return out


def embedded(page: str) -> dict:
    packed = re.search(r'<script id="data" type="text/plain">(.*?)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def lines_of(svg: Path) -> dict[str, list[tuple[float, float]]]:
    """The curves of a figure in the units of their axes, read back from the SVG with the help of its tick labels."""
    root = ElementTree.parse(svg).getroot()
    found = {}
    for panel in (g for g in root.iter(f"{SVG}g") if re.fullmatch(r"axes_\d+", g.get("id", ""))):
        scale = {}
        for axis, place in ("x", "x"), ("y", "y"):
            ticks = []
            for tick in (g for g in panel.iter(f"{SVG}g") if g.get("id", "").startswith(f"{axis}tick_")):
                label = next(tick.iter(f"{SVG}text"), None)
                if label is not None:
                    ticks.append((float(next(tick.iter(f"{SVG}use")).get(place)), float(label.text.replace("−", "-"))))
            (p, a), (q, b) = ticks[0], ticks[-1]
            scale[axis] = (a - p * (b - a) / (q - p), (b - a) / (q - p))
        for g in panel.iter(f"{SVG}g"):
            if g.get("id", "").startswith("curve-"):
                numbers = [float(x) for x in re.findall(r"-?[\d.]+", next(g.iter(f"{SVG}path")).get("d"))]
                (x0, dx), (y0, dy) = scale["x"], scale["y"]
                points = zip(numbers[::2], numbers[1::2], strict=True)
                found[g.get("id")] = [(x0 + dx * x, y0 + dy * y) for x, y in points]
    return found


def test_figure_says_what_the_results_say(made):
    results = json.loads((made / "results.json").read_text())
    lines = lines_of(made / "accuracy.svg")
    assert len(lines) == 2 * 3  # two models on two benchmarks and their average
    for panel, benchmark in enumerate(("easy", "hard", "average")):
        for place, name in enumerate(("first", "second")):
            read = lines[f"curve-{panel}-{place}"]
            assert [x for x, _ in read] == pytest.approx([1, 2, 3], abs=1e-3)
            assert [y for _, y in read] == pytest.approx(results["models"][name][benchmark]["accuracy"], abs=1e-3)
    text = (made / "accuracy.svg").read_text()
    assert all(f">{words}<" in text for words in ("first", "second", "easy (n = 2)", "hard (n = 1)", "average (n = 3)"))
    assert (made / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_bands_and_controls_in_the_figure(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    control = {"value": [0.25, 0.5, None], "low": [0.1, 0.2, None], "high": [0.4, 0.7, None]}
    result = {
        "n": 4,
        "accuracy": [0.5, 0.5, 0.75],
        "low": [0.2] * 3,
        "high": [0.8, 0.8, 0.9],
        "metrics": {"pass": control},
    }
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report.draw(report.curves({"m": {"x": result}}), tmp_path)
    panel = drawn[0].axes[0]
    shown = {tuple(line.get_ydata()): line.get_linestyle() for line in panel.lines}
    assert shown == {(0.5, 0.5, 0.75): "-", (0.25, 0.5): ":"}
    band = panel.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.2, 0.9)
    assert [text.get_text() for text in panel.texts] == ["m"]
    # Nobody tells an intrinsic dialogue what is right: beside it the vote, not what an oracle would choose.
    result["metrics"] |= {"i_to_c": control, "majority": {"value": [0.125, 0.25, None]}}
    assert [c.accuracy for c in report.curves({"m": {"x": result}})["x (n = 4)"][1:]] == [[0.125, 0.25]]


def test_learning_curves_say_what_the_metrics_say(made):
    lines = lines_of(made / "training.svg")
    assert lines["curve-0-0"] == [pytest.approx((i, i / 8 - 1), abs=2e-3) for i in range(9)]  # reward
    assert lines["curve-1-0"] == [pytest.approx((i, i / 16), abs=2e-3) for i in range(9)]  # accuracy


def test_a_model_has_one_colour_in_all_figures():
    results = evaluate.summarise(MODELS)["models"]
    color_of = report.colors(results)
    (shown,) = (c.color for c in report.curves(results)["easy (n = 2)"] if c.label == "second")
    (trained,) = report.learning_curves({"second": [{"step": 1, "reward": 0.5}]}, color_of)["reward"]
    assert shown == trained.color == report.OKABE_ITO[1]
    assert len(report.colors(map(str, range(9)))) == 9  # more than there are colours


def test_labels_keep_their_distance_and_order():
    draw = random.Random(0)
    for _ in range(200):
        heights = [draw.random() for _ in range(draw.randint(1, 8))]
        placed = report.spread(heights, 0.07)
        assert [placed[i] for i in sorted(range(len(heights)), key=heights.__getitem__)] == sorted(placed)
        assert all(b - a > 0.07 - 1e-9 for a, b in pairwise(sorted(placed)))


def test_page_carries_the_results_and_runs_its_own_script_alone(made):
    page = (made / "report.html").read_text(encoding="utf-8")
    data = embedded(page)
    assert data["results"] == json.loads((made / "results.json").read_text())
    assert [p[1] for p in data["problems"]] == ["e/1", "e/2", "h/1"]
    assert data["problems"][2][4][0] == [  # h/1 of the first model: the second answer repeats the first
        "first",
        [[*WRONG.values(), False], [*AGAIN.values(), True], [*RIGHT.values(), False]],
    ]
    assert [line["step"] for line in data["tokens"]["first"]] == [7, 8]  # the third is still being written
    assert data["tokens"]["first"][0]["values"][0] is None  # NaN, which no browser reads
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page
    assert not re.search(
        "__[A-Z_]+__", re.sub(r'<script id="data".*?</script>', "", page, flags=re.DOTALL)
    )  # no place is unfilled
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert "document.title" not in page  # what models said is packed, never markup


def test_too_many_dialogues_are_thinned(made, monkeypatch):
    results = json.loads((made / "results.json").read_text())
    size = sum(len(a["text"]) for records in MODELS.values() for r in records for a in r["attempts"])
    monkeypatch.setattr(evaluate, "REPORT_CHARACTERS", size - 1)
    data = evaluate.report_data(results, MODELS, PROBLEMS, {})
    assert [p[1] for p in data["problems"]] == ["e/1", "h/1"]  # every second one
    assert data["left_out"] == 1


# In a browser --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chromium():
    """No package of ours: it is there or not, and without it the page's text and data are tested alone."""
    if not find_browser():
        pytest.skip("no Chromium or Chrome is installed: the page is not looked at in a browser")


@pytest.fixture(scope="module")
def browser(made, chromium):
    browser = Browser()
    browser.open(made / "report.html")
    yield browser
    browser.close()


def test_page_opens_without_errors_or_requests(made, browser):
    assert browser.errors() == []
    assert browser.requests() == [(made / "report.html").as_uri()]
    assert browser.run("document.querySelectorAll('section[hidden]').length") == 0
    assert browser.run("document.querySelectorAll('figure svg').length") == 2
    # Every control has a label, and every id is there once.
    assert browser.run("[...document.querySelectorAll('input, select')].every(e => e.labels.length === 1)")
    ids = browser.run("[...document.querySelectorAll('main [id]:not(svg *)')].map(e => e.id)")
    assert len(ids) == len(set(ids)) > 10


def test_page_shows_the_numbers(made, browser):
    results = json.loads((made / "results.json").read_text())
    for metric in ("accuracy", "repeat", "tokens"):
        browser.run(f"($('metric').value = '{metric}', $('metric').onchange())")
        rows = browser.run("[...$('table').rows].map(r => [...r.cells].map(c => c.textContent))")[1:]
        assert len(rows) == 6
        for benchmark, model, _, *cells in rows:
            r = results["models"][model][benchmark.split()[0]]
            m = r["metrics"][metric]
            scale, digits = (1, 2) if metric == "tokens" else (100, 1)
            for cell, *expected in zip(cells, m["value"], m["low"], m["high"], strict=True):
                numbers = [float(x) for x in re.findall(r"[\d.]+", cell)]
                assert numbers == [pytest.approx(scale * x, abs=0.51 * 10**-digits) for x in expected if x is not None]
    browser.run("($('metric').value = '', $('metric').onchange())")
    shown = browser.run("[...$('table').rows].map(r => r.cells[2].textContent)")[1:]
    assert shown == ["accuracy", "repeat"] * 6  # no controls were played
    pairs = browser.run("[...$('pairs').rows].map(r => r.cells[3].textContent)")[1:]
    assert len(pairs) == 3
    assert f"p {results['comparisons'][0]['p'][0]:.1f}" in pairs[0]


def choose(browser: Browser, **controls: str) -> list[str]:
    """Set search, model, benchmark and outcome -> the entries of the list, without the line of the question."""
    for name in ("search", "model", "benchmark", "outcome"):
        browser.run(f"($('{name}').value = {json.dumps(controls.get(name, ''))}, $('{name}').oninput())")
    entries = browser.run("[...$('list').querySelectorAll('button')].map(b => b.firstChild.textContent)")
    shown = int(browser.run("$('count').textContent").split()[0])
    assert shown == len(entries)
    return [entry.strip().replace(" · ", " ") for entry in entries]


def test_search_and_filters(browser):
    assert len(choose(browser)) == 6
    assert choose(browser, search="TRIANGLE") == ["h/1 first", "h/1 second"]
    assert choose(browser, search="still", model="first") == ["h/1 first"]
    assert choose(browser, search="nowhere") == []
    assert choose(browser, benchmark="easy", outcome="1") == ["e/1 first"]
    assert choose(browser, outcome="2") == ["e/1 second"]
    assert choose(browser, outcome="3") == ["h/1 first"]
    assert choose(browser, outcome="0") == ["e/2 first", "e/2 second", "h/1 second"]
    assert choose(browser, outcome="again") == ["e/2 second", "h/1 first"]


def test_dialogue_shows_attempts_verdicts_and_answers(browser):
    choose(browser, search="triangle", model="first")
    text = browser.run("$('dialogue').textContent")
    for number, verdict in enumerate(("wrong", "wrong", "correct"), 1):
        assert f"Attempt {number} of 3: {verdict}, 9 tokens" in text
    assert text.count("an answer given before") == 1
    assert "A triangle costs $5 or $6" in text  # dollars that are no formula
    assert browser.run("$('dialogue').querySelectorAll('.said.good').length") == 1
    assert browser.run("$('dialogue').querySelectorAll('math .boxed').length") == 3  # boxes outside of dollars, too
    browser.run("$('dialogue').querySelector('p button').click()")  # the other model's dialogue of the problem
    assert "h/1 · second" in browser.run("$('dialogue').textContent")
    assert "No attempt" in browser.run("$('dialogue').textContent")
    browser.run("$('source').click()")
    choose(browser, search="triangle", model="first")
    assert r"It is \boxed{\frac{1}{3}}." in browser.run("$('dialogue').textContent")
    browser.run("$('source').click()")


def test_arrow_keys_move_through_the_list(browser):
    choose(browser)
    browser.run("$('list').querySelector('button').focus()")
    for key, expected in ("ArrowDown", "e/1 · second"), ("ArrowDown", "e/2 · first"), ("ArrowUp", "e/1 · second"):
        for kind in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)
        assert browser.run("$('dialogue').querySelector('h3').textContent") == expected


def test_what_a_model_says_does_nothing(browser):
    choose(browser, search="</script>", model="first")
    assert (
        browser.run("$('dialogue').textContent").count("<img src=x onerror=") >= 2
    )  # question, attempt, answer: as text
    assert browser.run("document.title") == "Accuracy by allowed attempts"
    assert browser.run("document.querySelectorAll('img, b:not(.good, .bad), u, i').length") == 0
    assert browser.errors() == []
    # Were it markup by mistake, the page's policy would still not let it run.
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("document.title") == "Accuracy by allowed attempts"
    browser.run("document.querySelector('img').remove()")


@pytest.mark.parametrize(
    ("latex", "mathml"),
    [
        (r"\frac12", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"),
        (r"\sqrt[3]{x_1^2}", "<mroot><msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup><mn>3</mn></mroot>"),
        (r"\text{two words}", "<mtext>two words</mtext>"),
        (r"a \le b'", "<mi>a</mi><mo>≤</mo><msup><mi>b</mi><mo>′</mo></msup>"),
        (r"\unknown{x}", r"<mtext>\unknown</mtext><mi>x</mi>"),
        (r"2^{10}_a, 2^10", "<msup><mn>2</mn><mn>1</mn></msup><mn>0</mn>"),
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            "<mtr><mtd><mn>1</mn></mtd><mtd><mn>2</mn></mtd></mtr><mtr><mtd><mn>3</mn></mtd><mtd><mn>4</mn></mtd></mtr>",
        ),
        (r"\left( \sum_{i=1}^n i \right]", "<munderover>"),
        (r"<img src=x>", '<mo stretchy="false">&lt;</mo>'),
        (r"\constructor\toString{x}", r"<mtext>\constructor</mtext><mtext>\toString</mtext><mi>x</mi>"),
        (r"\begin{valueOf} x \end{valueOf}", "<mtd><mi>x</mi></mtd>"),
        ("{" * 30 + "x", "<mi>x</mi>"),
        ("a" + "^x" * 9, "<msup><mi>a</mi><mrow>" + "<mi>x</mi>" * 9 + "</mrow></msup>"),
    ],
)
def test_formulas(browser, latex, mathml):
    assert mathml in browser.run(f"formula({json.dumps(latex)}).outerHTML")


def test_unfinished_formulas_are_shown_as_they_are(browser):
    for text in (
        r"\boxed{1",
        "$x",
        r"\[ x",
        "{" * 100_000,
        "$" + "{" * 100_000 + "$",
        "$" + "{" * 200 + "}" * 200 + "$",
        "$" + r"\sqrt" * 200 + "$",
        r"\begin{align} x",
        r"\left",
        "$$",
    ):
        shown = browser.run(f"(d => d.textContent)(make('div', prose({json.dumps(text)})))")
        assert shown.replace("$", "")[:3] == text.replace("$", "").replace("\\boxed{", "")[:3]


def test_tokens_are_shaded_by_their_numbers(browser):
    spans = "[...$('tokens').children].map(s => [s.textContent, s.className, s.title, s.style.background])"
    shown = browser.run(spans)
    assert [x[0] for x in shown] == ["What", " is", "⏎\n", "It", HOSTILE]
    assert [x[1] for x in shown] == ["told", "told", "told", "", ""]
    assert shown[3][2] == "advantage -0.500, value 0.250, return -0.250"
    assert shown[3][3] == "rgba(var(--minus), 0.212)"  # a quarter of 2.0, the largest
    assert shown[4][3] == "rgba(var(--plus), 0.850)"
    browser.run("($('shade').value = 'values', $('shade').onchange())")
    assert [x[3] for x in browser.run(spans)][3:] == ["rgba(var(--plus), 0.850)", "rgba(var(--minus), 0.425)"]
    assert "Blue was made" not in browser.run("$('scale').textContent")
    browser.run("($('shade').value = 'advantages', $('shade').onchange())")
    assert "Blue was made more likely" in browser.run("$('scale').textContent")
    assert "Gold 7; 1 of 2 attempts: wrong (no answer, reward -1)" in browser.run("$('scale').textContent")
    assert browser.run("[...$('which').options].map(o => o.textContent)")[-1].endswith("step 8, t/1")


@pytest.fixture
def open_page(tmp_path, chromium):
    """Opens a page of one model's records in a browser of its own."""
    browsers = []

    def show(records: list[dict], feedback: str, tokens: dict | None = None) -> Browser:
        settings = {"MAX_ATTEMPTS": 3, "CONFIDENCE": 0.95, "FEEDBACK": feedback}
        results = {"settings": settings, "versions": {}} | evaluate.summarise({"m": records})
        report.draw(report.curves(results["models"]), tmp_path)
        data = evaluate.report_data(results, {"m": records}, PROBLEMS, {})
        data["tokens"] = {"m": [tokens]} if tokens else {}
        (tmp_path / "report.html").write_text(report.page(tmp_path, data, {}), encoding="utf-8")
        browsers.append(Browser())
        browsers[-1].open(tmp_path / "report.html")
        return browsers[-1]

    yield show
    for browser in browsers:
        browser.close()


def test_intrinsic_dialogues_are_right_when_their_last_attempt_is(open_page, monkeypatch):
    """As in the table: right and then wrong is wrong."""
    monkeypatch.setattr(rollout, "FEEDBACK", "intrinsic")
    dialogues = [
        played("easy", "e/1", WRONG, RIGHT, RIGHT),
        played("easy", "e/2", RIGHT, RIGHT, WRONG),
        played("hard", "h/1", RIGHT),  # the context was full
    ]
    browser = open_page(dialogues, "intrinsic")
    assert choose(browser, outcome="i → c") == ["e/1 m"]
    assert choose(browser, outcome="c → i") == ["e/2 m", "h/1 m"]
    assert choose(browser, outcome="c → c") == choose(browser, outcome="i → i") == []
    assert len(choose(browser)) == 3
    shown = browser.run("[...$('list').querySelectorAll('b')].map(b => b.textContent)")
    assert shown == ["✓ i → c", "✗ c → i", "✗ c → i"]
    assert browser.run("$('table').rows[1].cells[5].textContent").startswith("50.0")  # easy: one of two


def test_the_page_survives_numbers_that_are_none(open_page):
    browser = open_page(MODELS["first"], "verified", TOKENS | {"values": [None, 0, 0, None, 0.5]})
    assert browser.errors() == []
    titles = browser.run("[...$('tokens').children].map(s => s.title)")
    assert titles[3] == "advantage -0.500, value not finite, return -0.250"


def test_dark_page_has_a_dark_background(made, chromium):
    browser = Browser(dark=True)
    browser.open(made / "report.html")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(23, 23, 26)"
    browser.close()
