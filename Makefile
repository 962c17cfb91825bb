# Every target sets up what it needs and then runs. `make demo` and `make test` work on a fresh machine.
# SEED=1 make demo runs another seed into runs/demo-seed1.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-control demo-seeds start starts iu-phantom tables-phantom bench bench-gpu wheelhouse soak browser test test-slow test-gpu lint clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEED ?= 0
KILLS ?= 30
RANKS ?= 2
DEMO := runs/demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))
IU ?= ../shared/data/iu_xray

# One thread a rank: ranks that each take every core slow one another down tenfold. No hub is asked for anything.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_PROGRESS_BARS := 1

# GPU machines: `make demo LAUNCH='deepspeed --num_gpus 2'`
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR := cpu
endif
LAUNCH ?= $(BIN)/deepspeed --num_gpus $(RANKS) --master_port $(shell shuf -i 20000-29999 -n 1)

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

setup: $(READY)  ## the virtual environment in .venv

# DeepSpeed is a source distribution whose build imports torch: torch first, and no isolated build.
$(READY): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { sudo -n apt-get install -y python3-venv || apt-get install -y python3-venv; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel ninja packaging torch numpy
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# ---- the demo: phantoms -> labeler -> tiny policy -> SFT stopped early -> GRPO -> table. Finished stages are not run again.

demo: $(DEMO)/summary.json  ## train and evaluate a tiny policy on phantoms, from nothing to a table
	@$(BIN)/mrg-r1 summary $(DEMO) $(if $(wildcard $(DEMO)/control/summary.json),--control $(DEMO)/control)

demo-control: $(DEMO)/summary.json $(DEMO)/control/summary.json  ## the same start, studies and time by further SFT, printed beside the demo
	@$(BIN)/mrg-r1 summary $(DEMO) --control $(DEMO)/control

demo-seeds:  ## the demo and its control over three seeds, and the mean gain
	for seed in 0 1 2; do $(MAKE) --no-print-directory demo-control SEED=$$seed; done
	$(BIN)/mrg-r1 summary runs/demo runs/demo-seed1 runs/demo-seed2

$(DEMO)/phantoms/manifest.jsonl: | $(READY)
	@mkdir -p $(DEMO)
	$(BIN)/mrg-r1 prepare phantom -o $(DEMO)/phantoms --preset five --splits sft=4000,train=1920,val=256,test=512 --side 84 --seed $(SEED)

$(DEMO)/labeler/training.json: $(DEMO)/phantoms/manifest.jsonl
	$(BIN)/mrg-r1 labeler train $(DEMO)/phantoms/reports.csv $(DEMO)/phantoms/labels.csv -o $(DEMO)/labeler --seed $(SEED) --passes 5

$(DEMO)/tiny-policy/config.json: $(DEMO)/phantoms/manifest.jsonl
	$(BIN)/mrg-r1 prepare tiny-policy -o $(DEMO)/tiny-policy --manifest $(DEMO)/phantoms/manifest.jsonl --side 84 --seed $(SEED)

DEMO_KEYS = seed=$(SEED) data.manifest=$(DEMO)/phantoms/manifest.jsonl reward.labeler=$(DEMO)/labeler

$(DEMO)/sft/summary.json: $(DEMO)/labeler/training.json $(DEMO)/tiny-policy/config.json
	$(LAUNCH) launch/sft.py launch/recipes/demo_sft.yaml output_dir=$(DEMO)/sft policy.path=$(DEMO)/tiny-policy $(DEMO_KEYS)

$(DEMO)/summary.json: $(DEMO)/sft/summary.json
	$(LAUNCH) launch/train.py launch/recipes/demo.yaml output_dir=$(DEMO) policy.path=$(DEMO)/sft/policy $(DEMO_KEYS)

$(DEMO)/control/summary.json: $(DEMO)/summary.json
	$(LAUNCH) launch/sft.py launch/recipes/demo_control.yaml output_dir=$(DEMO)/control policy.path=$(DEMO)/sft/policy $(DEMO_KEYS) \
		sft.max_seconds=$$($(BIN)/mrg-r1 summary $(DEMO) --training-seconds)

# ---- tables: rows are recipes over seeds; finished rows are kept, an interrupted table goes on. On phantoms two rows at a time, one rank each.
# ---- On reports: make table-main-iu TABLE_KEYS='data.manifest=... policy.path=... reward.labeler=...' TABLE_LAUNCH='deepspeed --num_gpus 8'

TABLES := launch/recipes/tables
TABLE_KEYS ?=
TABLE_PARALLEL ?= 1
TABLE_LAUNCH ?= $(BIN)/deepspeed --num_gpus 1
TABLE = $(BIN)/mrg-r1 table $(TABLES)/$(1).yaml $(TABLE_KEYS) --launch '$(TABLE_LAUNCH)' --parallel
RARE = Cardiomegaly=0.08,Pneumothorax=0.08
FULL := runs/tables/full-phantoms-seed$(SEED)

start: $(DEMO)/sft/summary.json

starts:  ## the cold starts of three seeds, from which the phantom tables go on
	for seed in 0 1 2; do $(MAKE) --no-print-directory start SEED=$$seed; done

table-rewards-phantom table-margin-phantom table-format-phantom table-advantages-phantom: table-%: starts
	$(call TABLE,$*) 2

table-rare-phantom: starts
	for seed in 0 1 2; do $(BIN)/mrg-r1 prepare phantom -o runs/tables/rare-phantoms-seed$$seed --splits train=1920,val=32,test=2048 --side 84 \
		--seed $$seed --prevalence $(RARE); done
	$(call TABLE,rare-phantom) 2

full-start: $(FULL)/labeler/training.json $(FULL)/tiny-policy/config.json

$(FULL)/manifest.jsonl: | $(READY)
	$(BIN)/mrg-r1 prepare phantom -o $(FULL) --preset full --splits sft=4000,train=1920,val=64,test=512 --side 84 --seed $(SEED)

$(FULL)/labeler/training.json: $(FULL)/manifest.jsonl
	$(BIN)/mrg-r1 labeler train $(FULL)/reports.csv $(FULL)/labels.csv -o $(FULL)/labeler --seed $(SEED) --passes 5

$(FULL)/tiny-policy/config.json: $(FULL)/manifest.jsonl
	$(BIN)/mrg-r1 prepare tiny-policy -o $(FULL)/tiny-policy --manifest $(FULL)/manifest.jsonl --side 84 --seed $(SEED)

table-context-phantom:
	for seed in 0 1 2; do $(MAKE) --no-print-directory full-start SEED=$$seed; done
	$(call TABLE,context-phantom) 2

tables-phantom: table-rewards-phantom table-margin-phantom table-rare-phantom table-format-phantom  ## the tables that docs/findings.md reports

table-main-iu table-main-mimic table-rewards table-margin table-format table-advantages table-context: table-%: $(READY)  ## (TABLE_KEYS=...)
	$(call TABLE,$*) $(TABLE_PARALLEL)

# ---- real IU X-Ray reports over rendered radiographs: IU holds annotation.json and chexbert_labels_train_val.csv

IUP := runs/iu-phantom

iu-phantom: $(IUP)/summary.json  ## the same on real IU X-Ray reports, their radiographs rendered from labels (IU=folder)
	@$(BIN)/mrg-r1 summary $(IUP)

# First for its report CSVs: the test reports have no labels yet, so their studies are refused here.
$(IUP)/texts/reports.csv: | $(READY)
	test -f $(IU)/annotation.json || { echo "IU=$(IU): no annotation.json there; give the folder of R2Gen's IU X-Ray files: make iu-phantom IU=..." >&2; exit 2; }
	$(BIN)/mrg-r1 prepare iu-xray $(IU)/annotation.json -o $(IUP)/texts --side 56 --render-missing $(IU)/chexbert_labels_train_val.csv
	cp $(IUP)/texts/reports_train.csv $(IUP)/texts/reports_labelled.csv
	tail -n +2 $(IUP)/texts/reports_val.csv >> $(IUP)/texts/reports_labelled.csv

$(IUP)/labeler/training.json: $(IUP)/texts/reports.csv
	$(BIN)/mrg-r1 labeler train $(IUP)/texts/reports_labelled.csv $(IU)/chexbert_labels_train_val.csv -o $(IUP)/labeler

# Nobody publishes the test labels: the labeler reads them, and the radiographs of the test split are rendered from what it read.
$(IUP)/texts/test_labels.csv: $(IUP)/labeler/training.json
	$(BIN)/mrg-r1 label $(IUP)/texts/reports_test.csv --labeler $(IUP)/labeler -o $@

$(IUP)/data/manifest.jsonl: $(IUP)/texts/test_labels.csv
	$(BIN)/mrg-r1 prepare iu-xray $(IU)/annotation.json -o $(IUP)/data --side 112 \
		--render-missing $(IU)/chexbert_labels_train_val.csv --render-missing $(IUP)/texts/test_labels.csv

$(IUP)/tiny-policy/config.json: $(IUP)/data/manifest.jsonl
	$(BIN)/mrg-r1 prepare tiny-policy -o $(IUP)/tiny-policy --manifest $(IUP)/data/manifest.jsonl

$(IUP)/sft/summary.json: $(IUP)/tiny-policy/config.json
	$(LAUNCH) launch/sft.py launch/recipes/iu_phantom_sft.yaml

$(IUP)/summary.json: $(IUP)/sft/summary.json
	$(LAUNCH) launch/train.py launch/recipes/iu_phantom.yaml

# ---- bench: TRL in an environment of its own, so that neither side bends to the other's requirements

TRL_VENV := .venv-trl

$(TRL_VENV)/.ready: benchmarks/trl-constraints.txt | $(READY)
	test -x $(TRL_VENV)/bin/python || $(BIN)/python -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/pip install --quiet -c benchmarks/trl-constraints.txt torch
	$(TRL_VENV)/bin/pip install --quiet -c benchmarks/trl-constraints.txt trl transformers peft datasets accelerate pillow
	touch $@

bench: $(READY) $(TRL_VENV)/.ready  ## our step beside TRL's, our rollout beside generate, and how the step grows (at most 20 minutes)
	$(BIN)/python -m benchmarks.bench --out runs/bench --minutes 20 --trl-python $(TRL_VENV)/bin/python

# ---- bench-gpu: one CUDA card, and the machine's own torch, which knows its driver. Without a network: WHEELHOUSE=folder, filled
# ---- elsewhere by `make wheelhouse` for that machine's Python.

GPU_VENV := .venv-gpu
GPU_PYTHON ?= 3.12
WHEELHOUSE ?=
# as in GPU_ARGS='--minutes 8 --contenders ours'
GPU_ARGS ?=
GPU_CONSTRAINTS = -c $(GPU_VENV)/constraints.txt
GPU_INDEX = $(if $(WHEELHOUSE),--no-index --find-links $(WHEELHOUSE))
# What our step imports beside torch and transformers; then TRL, which may be left out: its rows say so.
GPU_OURS := deepspeed peft accelerate pydantic pydicom rich PyYAML pillow jinja2 sacrebleu pycocoevalcap setuptools wheel
GPU_TRL := trl datasets
# The same with what they need in turn, as far as a machine with torch and transformers may lack it.
WHEELS ?= deepspeed einops hjson msgpack ninja psutil py-cpuinfo pydantic pydantic_core pydicom annotated-types typing-inspection typing_extensions \
	tqdm packaging peft accelerate rich markdown-it-py mdurl Pygments PyYAML pillow Jinja2 MarkupSafe sacrebleu portalocker regex tabulate \
	colorama lxml pycocoevalcap pycocotools setuptools wheel
WHEELS_TRL ?= trl datasets pyarrow pandas dill multiprocess xxhash python-dateutil tzdata fsspec

# A .pth shows the packages of $(PYTHON) even where that is a virtual environment itself, which --system-site-packages would pass over.
# Constraints leave alone what the machine has: its torch and transformers are what it is measured with.
$(GPU_VENV)/.ready: setup.py constraints.txt benchmarks/trl-constraints.txt
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv --without-pip --system-site-packages $(GPU_VENV)
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\n")' \
		> $$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth
	$(GPU_VENV)/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "CUDA", torch.version.cuda, "transformers", transformers.__version__)'
	$(GPU_VENV)/bin/python -m pip list --format freeze | grep -iE '^(torch|transformers|tokenizers|numpy|huggingface_hub|huggingface-hub|safetensors)==' > $(GPU_VENV)/constraints.txt
	$(GPU_VENV)/bin/python -m pip install --quiet $(GPU_INDEX) $(GPU_CONSTRAINTS) --no-build-isolation $(GPU_OURS)
	$(GPU_VENV)/bin/python -m pip install --quiet $(GPU_INDEX) $(GPU_CONSTRAINTS) $(GPU_TRL) || echo "TRL is left out: it could not be installed (above)"
	$(GPU_VENV)/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
	touch $@

bench-gpu: $(GPU_VENV)/.ready  ## our step beside TRL's at 7B shapes on one CUDA card, 10 minutes (WHEELHOUSE=folder without a network)
	env -u OMP_NUM_THREADS $(GPU_VENV)/bin/python -m benchmarks.gpu --out runs/bench-gpu --minutes 10 $(GPU_ARGS)

# DeepSpeed is a source distribution whose build imports torch; everything else is a wheel for the other machine's Python. pycocoevalcap loses
# METEOR's and SPICE's files, nine tenths of 100 MB: the bench calls neither. WHEELS and WHEELS_TRL can be cut to what that machine lacks.
wheelhouse: $(READY)  ## fill WHEELHOUSE with what bench-gpu needs on a machine without a network (GPU_PYTHON=3.12, torch is not in it)
	test -n "$(WHEELHOUSE)" || { echo "name the folder: make wheelhouse WHEELHOUSE=wheelhouse" >&2; exit 2; }
	mkdir -p $(WHEELHOUSE)
	pinned() { for name in "$$@"; do grep -ihE "^$${name//[-_]/[-_]}==" constraints.txt benchmarks/trl-constraints.txt | head -n 1 | grep . || { echo "$$name is pinned nowhere" >&2; return 1; }; done; }; \
	DS_BUILD_OPS=0 $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEELHOUSE) $$(pinned deepspeed hjson); \
	pinned $(filter-out deepspeed hjson,$(WHEELS)) $(WHEELS_TRL) > $(WHEELHOUSE)/requirements.txt
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp --abi cp$(subst .,,$(GPU_PYTHON)) --abi abi3 --abi none \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_26_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform linux_x86_64 \
		--dest $(WHEELHOUSE) -r $(WHEELHOUSE)/requirements.txt
	if test -f $(WHEELHOUSE)/pycocoevalcap-*.whl; then \
		rm -rf $(WHEELHOUSE)/unpacked; $(BIN)/wheel unpack -d $(WHEELHOUSE)/unpacked $(WHEELHOUSE)/pycocoevalcap-*.whl; \
		rm -rf $(WHEELHOUSE)/unpacked/*/pycocoevalcap/spice/lib $(WHEELHOUSE)/unpacked/*/pycocoevalcap/meteor/data; \
		find $(WHEELHOUSE)/unpacked -name '*.jar' -delete; \
		$(BIN)/wheel pack -d $(WHEELHOUSE) $(WHEELHOUSE)/unpacked/*; rm -rf $(WHEELHOUSE)/unpacked; fi
	du -sh $(WHEELHOUSE)

# ---- tests

# A machine that cannot have a browser skips the page's browser tests, which say so.
browser:  ## chromium and its driver, for the tests of the page
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { \
		for root in '' 'sudo -n'; do $$root apt-get update -qq && $$root apt-get install -y -qq chromium chromium-driver && break; done > /dev/null 2>&1; \
		command -v chromium > /dev/null || echo "no chromium could be installed: the page's browser tests will be skipped" >&2; }

test: $(READY) browser  ## style, types, import rules and every test but the slow ones
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations 20 -m "not slow and not gpu"

test-slow: $(READY)  ## tests of minutes: training a labeler, a run end to end
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations 20 -m "slow and not gpu"

test-gpu: $(READY)  ## what needs a CUDA device: kernels, captured graphs, bf16
	$(BIN)/python -m pytest -m gpu

soak: $(READY)  ## kill a run of two ranks 30 times (KILLS=30), each time at a random moment, and compare it with an undisturbed one
	rm -rf runs/soak
	$(BIN)/python -m tests.soak --kills $(KILLS) -o runs/soak

lint: $(READY)  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove runs (not .venv)
	rm -rf runs
