# The two commands of the README are `make demo` and `make test`; each sets up `.venv` on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: env demo test bench docs lab export hooks

env: $(READY)

$(READY): settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchattacks==3.5.1
	touch $@

demo: env  ## train a natural and a jointly robust classifier, attack both, write runs/demo/report.html
	$(BIN)/python -m jat_nb.demo

test: env  ## every check: package, notebooks, site
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 15 --durations-min 10

bench: env  ## what an attack costs beyond the passes it needs: ratios in one run, into nbs/results/bench_cpu.json
	OMP_NUM_THREADS=1 $(BIN)/python -m jat_nb.bench --out nbs/results/bench_cpu.json

docs: env export  ## rebuild docs/ and README.md from the stored notebook outputs
	$(BIN)/python nbs/_site/build.py

lab: env  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

export: env  ## notebooks to modules, and notebooks cleaned
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

hooks: env  ## clean and export before every commit, merge notebooks cell by cell
	$(BIN)/nbdev_install_hooks
	$(BIN)/python -m pip install --quiet pre-commit
	$(BIN)/pre-commit install
