# make demo        the paper's figure in small, on any machine: toy world, two trainings, evaluation (runs/demo)
# make test        ruff and the tests
# make reproduce   the demo over three seeds; renews the table and the figure in docs
# make score       SCoRe's two stages against plain multi-turn and single-turn RL, where checking is easier than finding (runs/score)
# make programs    multi-attempt RL on programs: is it worth something to be told which test failed? (runs/told)
# make ablations   change one constant, see what it does: a table over three seeds (runs/ablations; hours)
# make data        the toy world alone (data/toy)
# make benchmarks  AIME 2024, AMC 2023, MATH-500, Minerva, OlympiadBench and MATH level 3-5 into data/*.jsonl (needs network)
# make install     .venv with pinned packages for the CPU, which all of the above use; they call it, and it is quick if done
# make cuda        .venv-cuda with pinned packages for training on NVIDIA GPUs (see README.md)
PYTHON ?= python3
VENV := .venv
CUDA_VENV := .venv-cuda

.PHONY: install cuda demo reproduce score programs ablations data benchmarks test lint clean

install: $(VENV)/installed-requirements-cpu.txt

cuda: $(CUDA_VENV)/installed-requirements.txt

define check_python
	@test "$$(uname -s)" = Linux || { echo "make: vLLM runs on Linux (or WSL 2), this is $$(uname -s)"; exit 1; }
	@command -v $(PYTHON) > /dev/null || { echo "make: no $(PYTHON); install Python 3.11 to 3.13, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "make: $$($(PYTHON) --version) is not among the supported 3.11 to 3.13; say make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
	  { echo "make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
endef

$(VENV)/installed-requirements-cpu.txt: requirements-cpu.txt
	$(check_python)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q "$$(grep '^torch==' requirements-cpu.txt)"
	$(VENV)/bin/python -m pip install -q --no-deps -r requirements-cpu.txt
	@touch $@

$(CUDA_VENV)/installed-requirements.txt: requirements.txt
	$(check_python)
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -q -r requirements.txt
	@touch $@

data: install
	$(VENV)/bin/python -m experiments.median

benchmarks: install
	$(VENV)/bin/python -m data.prepare

demo: install
	$(VENV)/bin/python -m experiments.demo

reproduce: install
	$(VENV)/bin/python -m experiments.demo SEEDS=4,5,6 OUT=runs/reproduce

score: install
	$(VENV)/bin/python -m experiments.score

programs: install
	$(VENV)/bin/python -m experiments.told

ablations: install
	$(VENV)/bin/python -m experiments.ablations

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) $(CUDA_VENV) runs data/toy data/arrows data/programs
