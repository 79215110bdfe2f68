# Two commands do everything on a fresh machine with python >= 3.11 and make:
#   make demo   trains a small DLCM and its LLaMA baseline on real text, compares them, lets them speak
#   make test   passes the test suite
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO := runs/demo

.PHONY: demo test lint types clean reproduce-headline
.DELETE_ON_ERROR:

# pip would write byte code on one core, and that of the packages' own tests too.
# What compileall cannot read, as templates of other versions of Python, no one imports: its status does not count.
$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	-$(PY) -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(VENV)/installed
	$(PY) -m train.prepare data/embedded.jsonl.xz --output $(DEMO)/data --tokenizer bpe:4096 --validation-fraction 0.05
	$(PY) -m train.pretrain configs/demo/dlcm.yaml
	$(PY) -m train.pretrain configs/demo/llama.yaml
	$(PY) -m eval.compare $(DEMO)/dlcm $(DEMO)/llama

# Days of a GPU: docs/headline_protocol.md.
HEADLINE := runs/headline
CORPUS := runs/corpus
SWEEPS := first rates-llama rates-dlcm splits ablations norms combined closing trend seeds
$(CORPUS)/manifest.json: | $(VENV)/installed
	$(PY) -m train.corpus --output $(CORPUS)

reproduce-headline: $(VENV)/installed $(CORPUS)/manifest.json
	$(PY) -m train.prepare $(CORPUS)/train.jsonl.xz --output $(HEADLINE)/bytes/data --tokenizer byte --validation-fraction 0.005
	$(PY) -m train.prepare $(CORPUS)/train.jsonl.xz --output $(HEADLINE)/bpe/data --tokenizer bpe:16384 --validation-fraction 0.005
	$(PY) -m train.sweep $(foreach kind,bytes bpe,$(SWEEPS:%=configs/headline/$(kind)/%.yaml))
	$(PY) -m eval.headline $(HEADLINE)

test: $(VENV)/installed
	$(PY) -m pytest -n 2 -q tests

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/mypy --num-workers 2

clean:
	rm -rf $(DEMO)
