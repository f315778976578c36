"""README and docs say what is true: commands, constants, functions, files, links and printed numbers exist."""

import ast
import importlib
import re
import shlex

from experiments import one_dialogue
from plumbing import constants
from plumbing.presets import PRESETS
from tests.conftest import ROOT

import pytest

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("ppo", "rollout", "evaluate", "grader")
PLUMBING = (*constants.WHERE_AND_HOW_FAST, "report")
BUDGETS = {"ppo.py": 650, "rollout.py": 420, "grader.py": 520, "evaluate.py": 560, "README.md": 220}
BUDGETS |= {"docs/tutorial.md": 300, "docs/results.md": 250}
ENVIRONMENT = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "PIP_EXTRA_INDEX_URL")  # of others
FENCE = re.compile(r"```.*?```", re.S)


def modules_of(script: str) -> constants.Modules:
    """Everything whose constants the script's command line can change."""
    others = [*STAGES, *(f"plumbing.{name}" for name in PLUMBING)]
    modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in (script, *others)}
    return {script.rpartition(".")[2]: modules.pop(script.rpartition(".")[2])} | modules


def commands() -> list[str]:
    """What the pages tell to type, without the comments, and with lines that end in a backslash joined."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").split("\n"):
                if re.match(r"\s*(?:python|torchrun|make) ", line):
                    found.append(line.split("  #")[0].split(" < ")[0].strip())
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", commands())
def test_commands(command):
    """Targets and scripts exist, and every NAME=value fits (rollout.py and grader.py have constants of their own)."""
    words = [word for word in shlex.split(command) if word != "..."]
    if words[0] == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in words[1:])
        return
    script = words[words.index("-m") + 1] if "-m" in words else next(w for w in words if w.endswith(".py"))[:-3]
    path = ROOT / f"{script.replace('.', '/')}.py"
    assert path.is_file()
    changes = [word for word in words if re.match(r"(?:\w+\.)?[A-Z_]+=", word)]
    if not script.startswith("tests"):
        constants.parse_changes(changes, modules_of(script), PRESETS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_links(page):
    """Constants, functions, files and links that a page names are there."""
    text = page.read_text()
    modules = modules_of("ppo")
    source = "".join(path.read_text() for path in ROOT.rglob("*.py") if ".venv" not in str(path))
    for word in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        for name in re.findall(r"\b([A-Z][A-Z_]{2,})(?==|$)", word):
            is_defined = re.search(rf'^ *{name}: |"{name}"', source, re.M)
            assert is_defined or name in ENVIRONMENT, f"no constant {name}"
        if re.fullmatch(r"[\w/.]+\.(?:py|md|jsonl?)", word) and "/" in word and not word.startswith(("runs", "data/")):
            assert (ROOT / word).exists(), word
        if match := re.fullmatch(r"(ppo|rollout|grader|evaluate)\.(\w+)", word):
            assert match[2] == "py" or hasattr(modules[match[1]], match[2]), word
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_metrics_of_the_tutorial_are_logged():
    table = (ROOT / "docs/tutorial.md").read_text().partition("## 12.")[2].partition("## 13.")[0]
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", table, re.M))
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("ppo", "rollout", "plumbing/logs"))
    for name in re.findall(r"`(\w+?)(?:_k| / [^`]+)?`", first_cells):
        stem = re.sub(r"^(?:actor|critic)_|(?<=ending|status)_\w+|(?<=seconds)_\w+", "", name)
        assert stem in source, name


def test_the_tutorial_shows_what_the_script_prints(ranks):
    tutorial = (ROOT / "docs/tutorial.md").read_text()
    for title, lines in one_dialogue.make_sections().items():
        assert f"<!-- {title} -->\n```\n" + "\n".join(lines) + "\n```\n" in tutorial, title


def test_budgets():
    """Lines are the reader's time."""
    for name, most in BUDGETS.items():
        assert len((ROOT / name).read_text().splitlines()) <= most, name
    for path in [ROOT / f"{name}.py" for name in STAGES] + sorted((ROOT / "plumbing").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
