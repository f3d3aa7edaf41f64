# make demo   the main job, narrated      make test   everything CI runs      make check   lint, types, layering only
# make bench  the figures of docs/performance.md           make soak   simulated clusters until stopped, make soak-clusters sets of them
# make mutants   whether the tests of the pure modules notice small changes (an hour; LIMIT=30 draws 30 of each module)
VENV    ?= .venv
PYTHON  ?= python3
STORAGE ?= embedded
TARGET  ?= policy
RUNS    ?= 1000000
BIN     := $(VENV)/bin

.PHONY: setup demo test check clients compatibility bench fuzz soak soak-clusters mutants soak-faults soak-timing clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/python scripts/demo.py --storage $(STORAGE)

test: setup
	$(BIN)/python -m tests.check

check: setup
	$(BIN)/python -m tests.check --static

bench: setup
	$(BIN)/python bench/store_write.py
	$(BIN)/python bench/write_path.py
	$(BIN)/python bench/api.py
	$(BIN)/python bench/replication_lag.py
	$(BIN)/python bench/replication.py
	$(BIN)/python bench/failover.py
	$(BIN)/python bench/disaster.py
	$(BIN)/python bench/index.py
	$(BIN)/python bench/recovery.py
	$(BIN)/python bench/diff.py

# Published clients' own test suites against this server, started as vault (docs/clients.md); ten minutes.
clients: setup
	$(BIN)/python scripts/client_suites.py $(SUITE)

# docs/compatibility.md, from the routes and from what the tests reach
compatibility: setup
	$(BIN)/python scripts/compatibility.py --record

# atheris on one parser: make fuzz TARGET=policy RUNS=1000000 (needs the dependency group "fuzz")
fuzz: setup
	$(BIN)/python -m tests.fuzz $(TARGET) -runs=$(RUNS) -max_len=512

soak: setup
	$(BIN)/python -m tests.sim --soak

soak-clusters: setup
	$(BIN)/python -m tests.sim --clusters --soak

mutants: setup
	nice $(BIN)/python scripts/mutants.py $(if $(LIMIT),--limit $(LIMIT))

# Whether logins can be told apart by their time, over 10,000 pairs (half an hour); see tests/support/timing.py.
soak-timing: setup
	OUTRIDER_TIMING_PAIRS=10000 $(BIN)/python -m pytest -q -s -o timeout=7200 tests/unit/test_timing_statement.py

# The fault tests on real processes and a real Consul, each fault many times over.
soak-faults: setup
	OUTRIDER_FAULT_ROUNDS=25 $(BIN)/python -m pytest -q -s -o timeout=3600 tests/integration/test_faults.py \
	  tests/integration/test_consul_cluster.py tests/integration/test_store_changed.py tests/integration/test_failpoints.py \
	  tests/integration/test_links.py tests/integration/test_two_datacenters.py tests/unit/test_frame_damage.py \
	  tests/integration/test_killed_in_a_row.py tests/integration/test_killed_in_large_batches.py \
	  tests/integration/test_killed_while_revoking.py

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build dist
