# make setup | test | demo SEED=n | demo-deepspeed SEED=n | clean   (all in the environment .venv)
SEED ?= 0
PYTHON := .venv/bin/python
STAMP := .venv/.setup-done

.PHONY: setup test demo demo-deepspeed clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# The stamp is as new as what the environment was made from, so a second make costs nothing.
$(STAMP): pyproject.toml launch/setup.sh launch/find_python.sh $(shell find patches -type f)
	@sh launch/setup.sh
	@touch $@

test: $(STAMP)
	$(PYTHON) -m pytest

demo: $(STAMP)
	$(PYTHON) -W ignore launch/demo.py --seed $(SEED)

demo-deepspeed: $(STAMP)
	$(PYTHON) -W ignore launch/demo_deepspeed.py --seed $(SEED)

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
