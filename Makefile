# make demo       a city, a path, a generated video, scores, two minutes of training
# make test       every test but the slow ones; make test-long: those
# make test-faults  random kills by the dozen, flipped bits, malformed files
# make help       this text

PYTHON ?= python3
RUN := .venv/bin/python
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
DEMO := out/demo
TORCH := torch==2.13.0
# The compiler for TPUs that jax asks for. Aside, or every run here would look for TPUs.
LIBTPU := import importlib.metadata as m; \
  print(next(r.split(';')[0] for r in m.requires('jax') if r.startswith('libtpu')))

.PHONY: help demo test test-long test-faults clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable .
	touch $@

# torch first: a range would take the newest build with all of its GPU packages.
.venv/installed-tests: .venv/installed
	.venv/bin/pip install --quiet $(TORCH)
	.venv/bin/pip install --quiet --editable '.[test]'
	[ "$$(uname -sm)" != "Linux x86_64" ] || \
	$(RUN) -c "$(LIBTPU)" | xargs .venv/bin/pip install --quiet --no-deps --target .venv/tpu
	touch $@

# Beam asks for older packages than the tests do.
.venv/installed-beam: pyproject.toml
	$(PYTHON) -m venv .venv/beam
	.venv/beam/bin/pip install --quiet --editable '.[beam]'
	touch $@

demo: .venv/installed
	$(RUN) -m cityrag_jax.demo --out=$(DEMO)

test: .venv/installed-tests
	$(PYTEST)

test-long: .venv/installed-tests .venv/installed-beam
	$(PYTEST) -m long

test-faults: .venv/installed-tests
	$(PYTEST) -m faults

clean:
	rm -rf .venv out .pytest_cache
