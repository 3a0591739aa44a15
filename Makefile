# make demo | make test | make bench | make peers | make lint | make sanitize | make fuzz | make interpret | make install; each makes .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test bench peers lint sanitize fuzz interpret clean

install: $(VENV)/installed $(VENV)/library

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, found {v[0]}.{v[1]}: make PYTHON=python3.12 install")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch 'setuptools>=64' wheel
	PQK_FAST_BUILD_EXT=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,plot,vision,test,dev]'
	touch $@

# The C++ library, built in place; again whenever its sources change.
$(VENV)/library: $(VENV)/installed setup.py csrc $(wildcard csrc/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: install
	$(BIN)/pqk-fast demo

test: install
	$(BIN)/python -m pytest

# All of it, for docs/benchmarks.md, on a machine that does nothing else; OUT=bench/results PAGE=docs to commit it.
OUT := runs/bench
PAGE := $(OUT)
bench: install
	$(BIN)/python -m pqk_fast bench --all --out $(OUT) --page $(PAGE)

# The libraries that it compares with, each in an environment of its own (0.7 GB, some ten minutes); without them, the
# page says that they are not installed.
peers: install
	$(BIN)/python bench/peers/install.py all

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests of the operations with a library that AddressSanitizer and UndefinedBehaviorSanitizer watch.
SANITIZED := build/sanitized
UNDER_SANITIZERS = LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 PQK_FAST_REQUIRE_NATIVE=1 PQK_FAST_LIBRARY=$(SANITIZED)/pqk_fast/_C.abi3.so
.PHONY: sanitized
sanitized: install
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" LDFLAGS="-fsanitize=address,undefined" \
	  $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects

sanitize: sanitized
	$(UNDER_SANITIZERS) $(BIN)/python -m pytest tests/test_dispatch.py tests/test_fake_quant.py tests/test_topk_mask.py tests/test_int4.py tests/test_batch_norm.py tests/test_pooling.py tests/test_runtime.py tests/test_executor.py tests/test_dual_forward.py -k 'not opcheck' --capture=no -q

# Damaged files and programs, for that long.
SECONDS := 600
fuzz: sanitized
	$(UNDER_SANITIZERS) $(BIN)/python tests/fuzz_packed.py --seconds $(SECONDS)

# The tests of the operations on the GPU's kernels, which Triton's interpreter runs on the CPU.
OPERATIONS := dispatch fake_quant topk_mask int4 dual_forward fusion masks layers ops
interpret: install
	TRITON_INTERPRET=1 PQK_FAST_NATIVE=0 PQK_FAST_REQUIRE_INTERPRETER=1 \
	  $(BIN)/python -m pytest -q -k 'not large' $(OPERATIONS:%=tests/test_%.py)

clean:
	rm -rf build dist *.egg-info pqk_fast/_C*.so $(VENV)/library .pytest_cache .ruff_cache .mypy_cache
