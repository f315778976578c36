# make demo       the paper's figure in small, on any machine: toy world, two trainings, evaluation (runs/demo)
# make test       ruff and the tests
# make reproduce  the demo over three seeds; renews the README's table and figure
# make score      SCoRe's two stages against plain multi-turn and single-turn RL in the toy world (runs/score)
# make ablations  change one constant, see what it does: a table over three seeds (runs/ablations; hours)
# make benchmarks AIME 2024, AMC 2023, MATH-500, Minerva, OlympiadBench and MATH level 3-5 into data/*.jsonl (needs network)
# make install    .venv with pinned packages; the others call it, and a second call costs a second
PYTHON ?= python3
VENV := .venv
# The CUDA set where there is an NVIDIA driver, the CPU set elsewhere.
REQUIREMENTS := $(if $(wildcard /proc/driver/nvidia/version),requirements.txt,requirements-cpu.txt)
INSTALLED := $(VENV)/installed-$(REQUIREMENTS)

.PHONY: install demo reproduce score ablations data benchmarks test lint clean

install: $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS)
	@test "$$(uname -s)" = Linux || { echo "make: vLLM runs on Linux (or WSL 2), this is $$(uname -s)"; exit 1; }
	@command -v $(PYTHON) > /dev/null || { echo "make: no $(PYTHON); install Python 3.11 to 3.13, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "make: $$($(PYTHON) --version) is not among the supported 3.11 to 3.13; say make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
	  { echo "make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(REQUIREMENTS),requirements.txt)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
else
	$(VENV)/bin/python -m pip install -q "$$(grep '^torch==' requirements-cpu.txt)"
	$(VENV)/bin/python -m pip install -q --no-deps -r requirements-cpu.txt
endif
	@touch $@

data: install
	$(VENV)/bin/python -m data.toy

benchmarks: install
	$(VENV)/bin/python -m data.prepare

demo: install
	$(VENV)/bin/python -m data.demo

reproduce: install
	$(VENV)/bin/python -m data.demo SEEDS=4,5,6 OUT=runs/reproduce

score: install
	$(VENV)/bin/python -m data.score

ablations: install
	$(VENV)/bin/python -m data.ablations

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	$(VENV)/bin/python -m pytest

clean:
	rm -rf $(VENV) runs data/toy
