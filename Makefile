# make demo: from a fresh clone to a trained detector (SEED=1, ARGS="train.epochs=2", THREADS=1
# change it);
# make test: the complete test suite; make test-fast: that of the core, without the slow ones;
# make lint: style, formatting and types; make docs: the documentation as a site, in site/.
# Everything is installed into .venv; PYTHON chooses the interpreter (3.11 to 3.13).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := datasets/demo
RUN ?= runs/demo
SEED ?= 0
ARGS ?=
FAST := $(addprefix tests/,losses ops assign models test_architecture.py test_config.py test_docs.py test_measure.py)
# threads of the training: the machine's cores, up to the number from which small batches no longer get faster
THREADS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
# processes of the test suite, about 2.5 GB each
WORKERS ?= $(THREADS)
# every question that accelerate would ask or warn about is answered here
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --quiet \
	--num_cpu_threads_per_process $(THREADS)

.PHONY: demo test test-fast lint docs clean

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(DATA)/annotations/val.json: $(VENV)/installed brs_detr/data/synthetic.py
	$(BIN)/python -m brs_detr make-dataset $(DATA)

demo: $(DATA)/annotations/val.json
	$(LAUNCH) train.py configs/demo.yaml output_dir=$(RUN) seed=$(SEED) $(ARGS) --overwrite
	$(BIN)/python eval.py $(RUN)
	@echo "images: $(RUN)/evaluation/detections.png, all on one page: $(RUN)/report.html"

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(FAST)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed-docs: requirements-docs.txt $(VENV)/installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) datasets/demo runs/demo site
