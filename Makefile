# Two commands do everything on a fresh machine with Python 3.11+ and make: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all coverage docs lint audit bench bench-layers bench-training bench-from-dense bench-answers bench-faults bench-edge bench-gpu bench-search einbench serve clean programs wheel sbom

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: $(VENV)/.run  ## a search of 16 candidates on real text, its answer and its page
	$(BIN)/einsum-nas demo

serve: $(VENV)/.run  ## REST service, dashboard and a worker on http://127.0.0.1:8000
	$(BIN)/einsum-nas serve

# Several tests wait for processes, hence three at once on two cores.  The last lines tell the 20
# slowest tests and the CPU time of all processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.accounting \
	$(BIN)/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder --durations 20

test: $(VENV)/.dev programs  ## within ten minutes: SQLite, PostgreSQL, Ray and a browser, all real
	$(PYTEST) -m "not full"

test-all: $(VENV)/.docs programs  ## every test: half an hour
	$(PYTEST)

coverage: $(VENV)/.dev programs  ## which lines the tests of `make test` reach, as htmlcov/index.html
	$(PYTEST) -m "not full" --cov --cov-report html --cov-report term:skip-covered

docs: $(VENV)/.docs  ## the documentation: site/index.html, which loads nothing from elsewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/.dev  ## formatting, style, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

audit: $(VENV)/.dev  ## known vulnerabilities of the pinned packages; AUDIT_OFFLINE_OK=1: none to ask is fine
	$(BIN)/python .ci/audit

bench: bench-layers  ## ratios measured in one run, as JSON and as tables
	$(BIN)/python -m benchmarks.kernels.sizing
	$(BIN)/python -m benchmarks.kernels.surgery
	$(BIN)/python -m benchmarks.kernels.mixtures
	$(BIN)/python -m benchmarks.kernels.steps
	$(BIN)/python -m benchmarks.science.coordinates
	$(BIN)/python -m benchmarks.science.proposals

bench-layers: $(VENV)/.dev  ## every structure against dense, torch.einsum, the papers and all plans; FULL=1: all
	$(BIN)/python -m benchmarks.kernels.layers

bench-training: $(VENV)/.dev  ## published regression, learning rates across widths, experts on text: an hour
	$(BIN)/python -m benchmarks.science.published
	$(BIN)/python -m benchmarks.science.rates
	$(BIN)/python -m benchmarks.science.families

bench-from-dense: $(VENV)/.dev  ## structured layers from trained dense weights, self-guided and not: 15 minutes on one core
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.from_dense

bench-answers: $(VENV)/.dev  ## fits, answers of known truth, and a million trials: three quarters of an hour
	$(BIN)/python -m benchmarks.science.coverage
	$(BIN)/python -m benchmarks.science.answers
	$(BIN)/python -m benchmarks.service.size

bench-faults: $(VENV)/.dev  ## kills, outages, races, lost nodes, backups under load, a soak: four hours
	$(BIN)/python -m benchmarks.service.faults
	$(BIN)/python -m benchmarks.service.cluster
	$(BIN)/python -m benchmarks.service.backup
	$(BIN)/python -m benchmarks.service.soak

bench-edge: $(VENV)/.dev  ## hostile clients beside others, and ten thousand fuzzed requests: half an hour
	$(BIN)/python -m benchmarks.service.edge
	$(BIN)/python -m benchmarks.service.fuzz

bench-search: $(VENV)/.dev  ## simulated searches on EinBench, every method: SEARCH_OUT=FOLDER keeps figures
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.search $(if $(SEARCH_OUT),--out $(SEARCH_OUT))

bench-gpu:  ## one GPU: plans, layers, mixtures, steps, a study; eight minutes; PYTHON with torch is enough
	$(PYTHON) -m benchmarks.gpu --out gpu-results $(ARGUMENTS)

einbench: $(VENV)/.dev  ## collects what EinBench lacks into EINSUM_NAS_HOME, and writes its files: hours
	$(BIN)/python -m benchmarks.einbench collect
	$(BIN)/python -m benchmarks.einbench write

wheel:  ## builds the wheel, and uses it in an empty environment: 2 GB for some minutes
	$(PYTHON) .ci/wheel

sbom: $(VENV)/.dev  ## what the program brings along at run time, as CycloneDX: dist/sbom.cdx.json
	$(BIN)/python .ci/sbom

# Programs that some tests run.  Where one is missing and this is a Debian machine, it is installed;
# else its tests are skipped.  The packages of nginx and promtool start servers, which no test needs.
programs:
	@$(call program,chromium google-chrome,chromium)
	@$(call program,nginx,--no-install-recommends nginx-light libnginx-mod-http-brotli-filter gettext-base openssl,[ ! -d /run/systemd/system ] || systemctl disable --now --quiet nginx)
	@$(call program,promtool,--no-install-recommends prometheus,[ ! -d /run/systemd/system ] || systemctl disable --now --quiet prometheus)

# one of these programs, or else this package, and what is done after it was installed
program = for name in $(1); do command -v $$name >/dev/null && exit 0; done; \
	{ command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(2) >/dev/null; } || \
	{ echo "no $(1) found, and none could be installed: the tests that run it will be skipped"; exit 0; }; \
	$(or $(3),true)

clean:  ## everything that the commands above made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov site build dist *.egg-info
