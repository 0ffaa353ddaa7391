# make demo   a first result in minutes: three rounds of self-play beside their control, with the expected time printed before they
#             start (goes on with runs/first; FRESH=1 begins anew; LONG=1 adds the run of twelve rounds, in runs/demo)
# make doctor does everything work on this machine? (ARGS="--model 1.5B --card 8": will that model fit on a card of 8 GB?)
# make gpu    every part of the library on this machine's GPU, under ten minutes
# make test   everything that CI checks
# make test-long   the checks that take long and whose subjects seldom change
# make floor  the library at the lowest versions that pyproject.toml allows, in an environment of its own, with an empty cache
# make colab  the install cell and seven pages with the versions of a Colab runtime (twenty minutes and more; needs Pythons 3.13 and 3.11)
# make lab    JupyterLab at index.ipynb
# make learning   the experiment behind the learning curve: three seeds, each with a control (fifty minutes)
# make costs      the measurements behind the chapter on costs
# make pictures   pictures of the widgets for the saved pages (needs Chromium: apt-get install chromium)
# make site       the book as a web site, from stored outputs, into build/site
# make course     student and solution notebooks, slides and two zips (students, instructors), into runs/course
# make scale      a real vLLM server on this machine's CPU, in an environment of its own (.venv/vllm, 3.5 GB): a league on it,
#             its speed beside ours, and runs that sample from it (ARGS="league speed" takes these parts alone)
PYTHON ?= python3
BIN = .venv/bin
FLOOR = .venv/floor
PYTHON313 ?= python3.13
PYTHON311 ?= python3.11
DIR ?= runs/first

.PHONY: demo test test-long floor lab learning costs pictures readme clean course doctor gpu site colab scale

demo: .venv/run
	$(BIN)/python -m selfplay_nb demo --run-dir $(DIR) $(if $(FRESH),--fresh) $(if $(LONG),--long) $(ARGS)

doctor: .venv/run
	$(BIN)/python -m selfplay_nb doctor $(ARGS)

gpu: .venv/run
	$(BIN)/python -m selfplay_nb gpu-check --out nbs/studies/gpu.json $(ARGS)

test: .venv/dev
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-long: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m long

floor: .venv/bin/python
	rm -rf $(FLOOR)
	$(BIN)/python -m venv $(FLOOR)
	$(BIN)/python tests/floor.py > $(FLOOR)/floor.txt
	$(FLOOR)/bin/python -m pip install -q --disable-pip-version-check -c $(FLOOR)/floor.txt -e .
	$(FLOOR)/bin/python tests/floor.py try

colab:
	$(PYTHON313) tests/colab.py resolve
	$(PYTHON311) tests/colab.py run

lab: .venv/dev
	$(BIN)/jupyter lab index.ipynb

learning: .venv/run
	$(BIN)/python -m selfplay_nb learning --out nbs/studies/learning.jsonl

costs: .venv/dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[costs]"
	$(BIN)/python -m selfplay_nb costs --out nbs/studies/costs.jsonl

# NAMES="stepper card" takes these alone
pictures: .venv/dev
	$(BIN)/python tests/pictures.py $(NAMES)

scale: .venv/dev
	$(BIN)/python tests/scale.py $(ARGS)

course: .venv/dev
	$(BIN)/python tests/course.py

site: .venv/dev
	$(BIN)/python tests/book.py

# After editing a notebook: first cells, export, clean, and make README.md from index.ipynb
readme: .venv/dev
	$(BIN)/python tests/install_cells.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname index.ipynb
	$(BIN)/python tests/readme.py

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'selfplay_nb needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Try: make $(MAKECMDGOALS) PYTHON=python3.12')"
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt tests/extras.txt
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e ".[lab,dev]"
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps -r tests/extras.txt
	touch $@ .venv/run

clean:
	rm -rf .venv build *.egg-info
