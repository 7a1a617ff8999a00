# `make demo` and `make test` set everything up first; a second call starts at once.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python

# A stamp, not the extension itself: without a compiler the package is there without it.
NATIVE  := $(VENV)/built
SOURCES := $(wildcard csrc/*.h csrc/*/*)
CPP     := $(SOURCES) bench/stream.cpp tests/probe.h tests/mover.cpp

# How tests are spread over processes; PARALLEL= runs them in one.
PARALLEL ?= -n 2 --dist worksteal

# The oldest Triton that is supported, beside the newest one of requirements-dev.txt: code generation is tested with both.
OLDEST_TRITON := triton==3.6.0
OLDEST        := $(VENV)/triton-oldest

# The libraries that people train with, in an environment of its own beside the same torch.
ECOSYSTEM := $(VENV)/ecosystem
# Those that ask for a torchvision, whose compiled operators only its own torch can load (tests/ecosystem does without).
ALONE := timm==1.0.31 torchvision==0.28.0

.PHONY: demo test test-ecosystem mutants torture bench peers bench-gpu codegen convergence study check lint format dist wheel-manylinux wheel-aarch64 kernels clean

demo: $(NATIVE)
	$(RUN) bench/demo.py

# What `make test` leaves out: the slow ones, whose mark says why, and what needs a GPU.
TESTS ?= not slow and not gpu

test: $(NATIVE) $(OLDEST)
	$(RUN) -m pytest $(PARALLEL) -m "$(TESTS)"

test-ecosystem: $(NATIVE) $(ECOSYSTEM)/ready  ## real training loops of other libraries, beside torch's class in the same loop
	PYTHONPATH=. $(ECOSYSTEM)/bin/python -m pytest $(subst worksteal,loadfile,$(PARALLEL)) -c tests/ecosystem/pytest.ini tests/ecosystem $(MATRIX)

mutants: $(NATIVE) $(OLDEST)  ## plants 616 faults in copies of the product: do the tests that should see each? (some hours)
	$(RUN) tests/mutants/run.py --hints-only $(MUTANTS)

torture: $(NATIVE)  ## what else may run during a step, ours and torch's: exceptions, signals, threads, forks (half an hour)
	$(RUN) tests/torture.py $(TORTURE)

bench: $(NATIVE)  ## against every peer that is installed; those that are missing are named
	$(RUN) -m pytest bench --benchmark-quiet --benchmark-json=bench.json
	$(RUN) bench/report.py bench.json

peers: $(VENV)/ready  ## the other libraries that the benchmark compares with; torch stays as it is
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -r requirements-peers.txt

bench-gpu:  ## on a machine with a GPU, with the Python that has its torch; needs no network
	$(PYTHON) bench/gpu.py --out gpu

codegen: $(NATIVE) $(OLDEST)  ## what the GPU kernels compile to, kept in bench/results
	$(RUN) bench/codegen.py --save
	PYTHONPATH=$(OLDEST) $(RUN) bench/codegen.py --save
	$(RUN) bench/codegen_cuda.py --save

convergence: $(NATIVE)  ## every storage format on real training, and pure weight decay (half an hour)
	$(RUN) bench/convergence.py $(CONVERGENCE)

study: $(NATIVE)  ## decoupled weight decay, seen: trains grids of networks (half an hour of one core), goes on where it was interrupted
	$(RUN) bench/study

.PHONY: docs
docs: $(NATIVE)  ## the documentation site, into build/docs; every warning is an error
	$(RUN) -m sphinx -q -W --keep-going -b html docs build/docs

dist: $(VENV)/ready  ## sdist, and from it the wheel, into dist/
	rm -rf dist
	$(RUN) -m build --no-isolation

# torch's libraries are not packed: the torch that is there has them.
REPAIR := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist

wheel-manylinux: $(VENV)/ready  ## sdist and wheel as `make dist` makes them, but for older systems: glibc 2.24, where torch's own wheels want 2.28
	rm -rf dist
	WD_KERNELS_LINK_WITH="$$($(RUN) bench/old_glibc.py build/glibc)" $(RUN) -m build --no-isolation
	$(REPAIR) dist/*-linux_*.whl
	rm dist/*-linux_*.whl

# With a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user-static); torch's libraries of that
# processor are linked against, and are not run.
CROSS    ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64-static
ARM      := build/aarch64

wheel-aarch64: $(NATIVE) $(ARM)/torch  ## for 64-bit Arm, by a cross compiler; its kernels run in an emulator, and what they gave is kept
	PYTHONPATH=bench:. $(RUN) tests/portable.py --compiler $(CROSS) --run "$(EMULATOR)" --save aarch64
	_PYTHON_HOST_PLATFORM=linux-aarch64 CXX=$(CROSS) WD_KERNELS_CUDA=0 WD_KERNELS_TORCH_HOME="$(CURDIR)/$(ARM)" $(RUN) -m build --wheel --no-isolation
	$(REPAIR) dist/*-linux_aarch64.whl
	rm dist/*-linux_aarch64.whl

$(ARM)/torch: requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --target $(ARM) --upgrade --platform manylinux_2_28_aarch64 --only-binary=:all: --no-deps $$(grep '^torch==' requirements-dev.txt)
	touch $@

kernels: $(VENV)/ready  ## the folder that Hugging Face's `kernels` loads, into dist/kernels
	$(RUN) bench/kernels_folder.py

check: $(NATIVE)  ## what is installed, and does it compute right
	$(RUN) -m wd_kernels

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

$(VENV)/ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements-dev.txt)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(ECOSYSTEM)/ready: requirements-ecosystem.txt requirements-peers.txt $(VENV)/ready
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements-dev.txt)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -r requirements-ecosystem.txt
	$(ECOSYSTEM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(ALONE)
	touch $@

$(OLDEST): $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ $(OLDEST_TRITON)
	touch $@

# The extension is built in place and the package is installed editable, both without build isolation: an isolated
# build would fetch another torch.
$(NATIVE): $(VENV)/ready setup.py pyproject.toml $(SOURCES)
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build dist *.egg-info wd_kernels/_C.* wd_kernels/_cuda.* $(NATIVE) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
