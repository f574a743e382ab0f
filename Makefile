# DeepSeek, Measured. `make` alone prints what each target does.
#
# Every path here is relative and every tool is called as `.venv/bin/python -m …`: the folder may have a space in its
# name, may be moved after the set-up, and may be built from elsewhere with `make -C`.

.DEFAULT_GOAL := help
.PHONY: help venv book test lab refresh record record-key model lint portability student clean

# How long a piece of training takes, the whole run when empty:  make model MINUTES=10
MINUTES ?=

# The Python that makes .venv, 3.11 or newer:  make book PYTHON=python3.12
PYTHON ?= python3
# What refresh works on, all notebooks when empty:  make refresh NB=chapters/start/your_machine.ipynb
NB ?=
# Keep the timings of cells that did not change:  make refresh KEEP=1 NB=…
KEEP ?=
# What portability tries, all rows when empty:  make portability ROWS="chinese readonly"
ROWS ?=
# What record measures: machine, gpu, or one of the longer parts that measured/record.py lists
PART ?=
# Which of it:  make record STALE=1 what no recording answers any more, ALL=1 also what older code answered
STALE ?=
ALL ?=

PY := .venv/bin/python

# Nothing of the caller's may leak in: neither other packages, nor options of Python (PYTHONINSPECT waits for a keyboard)
# and pytest, nor a plot backend that would swallow the figures. What is kept changes no output. Bytecode is written: every
# notebook is a process, and each would spend seconds on compiling torch and transformers again.
KEPT := PYTHONHASHSEED PYTHONUTF8 PYTHONIOENCODING PYTHONCOERCECLOCALE PYTHONPYCACHEPREFIX
unexport MPLBACKEND $(filter-out $(KEPT),$(filter PYTHON% PYTEST_%,$(.VARIABLES)))
export PYTHONNOUSERSITE := 1
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## print this list
	@echo 'DeepSeek, Measured: the first run of any target sets up .venv; later runs start at once.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  PYTHON=python3.12 chooses the Python that .venv is made with (3.11 or newer).'

venv: ## set up .venv, or repair it, if needed (every other target does this first)
	@"$(PYTHON)" tools/setup_venv.py

book: venv ## build the HTML book, check every page and link, print the page to open
	@$(PY) -m tools.book build

test: venv ## run the unit, parity and notebook tests
	@$(PY) -m tools.run_tests

lab: venv ## open JupyterLab on the chapters
	@$(PY) -m jupyterlab chapters

refresh: venv ## run the notebooks again and normalise them (NB=path for some, KEEP=1 to keep timings)
	@$(PY) -m tools.notebooks refresh $(if $(KEEP),--keep-timings) $(NB)

record: venv ## record this machine's measurements into data/recordings/ (PART=… for the long ones, see the module)
	@$(PY) -m measured.record $(PART) $(if $(STALE),--stale) $(if $(ALL),--all)

record-key: venv ## print what `python -m measured.record gpu` needs on a machine without git
	@$(PY) -m measured.record --key

model: venv ## train the course's own DeepSeek on this machine, below trained/ (MINUTES=10 for a piece; run again to go on)
	@$(PY) -m tools.model $(if $(MINUTES),--minutes $(MINUTES))

lint: venv ## check style and formatting of code and notebooks
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m tools.notebooks check && $(PY) -m tools.lines && $(PY) -m tools.heights

student: venv ## copies of the notebooks without solutions, below student/ (NB=path for some)
	@$(PY) -m tools.notebooks student $(NB)

portability: venv ## try the book where a machine may differ: folder, locale, home, Python, versions (ROWS=… for some)
	@$(PY) -m tools.portability $(ROWS)

clean: ## remove the built book and caches (keeps .venv)
	@rm -rf _build dist .pytest_cache .ruff_cache
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
