# Every target sets up .venv itself: a fresh machine needs Python 3.11 or newer and this file.
PYTHON ?= python3
RUN := .venv/bin/python
# One worker more than there are cores, as many tests wait for processes that they start.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
TESTS := -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick faults lint docs bench floors wheel extras clean

demo: .venv/done  ## The main job: train one small student four ways, compare, export, load back.
	$(RUN) benchmarks/demo.py --output runs/demo

test: .venv/done  ## The whole suite, a file at a time on every core.
	$(RUN) $(TESTS)

quick: .venv/done  ## Before each commit: every test that is not marked slow, under three minutes on two cores.
	$(RUN) $(TESTS) -m "not slow"

faults: .venv/done  ## Kills, hangs, corruption and full disks, by the hundred: under 10 minutes on two cores.
	$(RUN) -m pytest -o addopts=-q tests/faults  # without the checks of types, which cost each start seconds
	$(RUN) -m pytest -m long tests/cli/test_main.py tests/distributed/test_sharding.py tests/test_distiller.py

lint: .venv/done  ## Style, types, direction of imports, dead code, spelling, links.
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/mypy
	.venv/bin/vulture
	.venv/bin/codespell
	$(RUN) -m pytest -o addopts=-q tests/docs/test_pages.py -k "not site"  # `make docs` and `make test` build it

docs: .venv/done  ## The pages of docs/ as a site in docs/_build; a broken link is an error.
	$(RUN) -m sphinx --fail-on-warning --keep-going --fresh-env -q docs docs/_build
	@echo "docs/_build/index.html"

bench: .venv/done  ## Measure the tables of docs/results.md again, without those that need other data.
	$(RUN) benchmarks/step.py
	$(RUN) benchmarks/step.py --amp --rounds 4
	$(RUN) benchmarks/step.py --teacher cifar_resnet20 --student cifar_resnet8x05 --size 28 --classes 10 --steps 150 --rounds 5
	$(RUN) benchmarks/step.py --against plain --amp --rounds 4 --steps 20
	$(RUN) benchmarks/step.py --against plain --amp --compile --rounds 4 --steps 20
	$(RUN) benchmarks/step.py --against plain --amp --stored --rounds 4 --steps 20
	$(RUN) benchmarks/step.py --against alone --amp --stored --rounds 4
	$(RUN) benchmarks/criteria.py
	$(RUN) benchmarks/hosts.py
	$(RUN) benchmarks/any_timm.py
	$(RUN) benchmarks/shortcuts.py
	$(RUN) benchmarks/allocator.py
	$(RUN) benchmarks/demo.py --seeds 5
	$(RUN) benchmarks/memory.py --check
	$(RUN) benchmarks/qat.py
	$(RUN) benchmarks/readme.py

floors:  ## The suite on the lowest versions that pyproject.toml admits.
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/pip install --quiet uv
	.venv-floors/bin/uv pip install --python .venv-floors/bin/python --resolution lowest-direct --editable . --group dev \
		"torchvision==0.25.0"  # the one that belongs to the lowest torch; timm asks for any
	.venv-floors/bin/python $(TESTS)

wheel: dist/done  ## The wheel in an empty environment: types, the demo, every step from training to a student for timm.
	.venv-wheel/bin/uv venv --quiet --clear --python $(PYTHON) .venv-wheel/empty
	.venv-wheel/bin/uv pip install --quiet --python .venv-wheel/empty dist/*.whl
	cd .venv-wheel && bin/mypy --strict --config-file= --python-executable empty/bin/python ../tests/package/consumer.py
	.venv-wheel/empty/bin/python tests/package/from_wheel.py .venv-wheel/empty/bin/mgd-timm

extras: dist/done  ## Each extra alone in an empty environment, with the tests that concern it.
	.venv-wheel/bin/python tests/package/extras.py --python $(PYTHON)

# The wheel is built from the sdist.
dist/done: pyproject.toml MANIFEST.in README.md LICENSE $(shell find mgd_timm -type f -not -path '*/__pycache__/*')
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet "build[uv]>=1.5" "mypy>=2.4" "twine>=6.2" "uv>=0.11"
	rm -rf dist
	.venv-wheel/bin/python -m build --installer uv --outdir dist .
	.venv-wheel/bin/twine check --strict dist/*
	touch $@

# uv takes seconds where pip takes minutes.
.venv/done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet uv
	.venv/bin/uv pip install --quiet --python $(RUN) --editable . --group dev
	touch $@

clean:
	rm -rf .venv .venv-floors .venv-wheel dist runs docs/_build
