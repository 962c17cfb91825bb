# Every target sets up what it needs and then runs. `make demo` and `make test` work on a fresh machine.
# SEED=1 make demo runs another seed into runs/demo-seed1, FAMILY=qwen3_vl (or gemma3) make demo another model family into runs/demo-qwen3_vl.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-control demo-rft demo-random demo-seeds start starts tables-phantom full-start \
	labels-phantom iu-phantom iu-phantom-sft iu-phantom-rft iu-phantom-both iu-labels \
	bench bench-gpu wheelhouse radeval soak browser test test-slow test-gpu lint clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEED ?= 0
KILLS ?= 30
# as there are cores: 2 on two, 4 on eight; asked for when .venv is there
RANKS ?= $(shell $(BIN)/python -c 'from mrg_r1.cores import demo_ranks, read_cores; print(demo_ranks(read_cores()))')
# the demo's tiny policy is of this model family (mrg_r1/policy/families)
FAMILY ?= qwen2_5_vl
DEMO := runs/demo$(if $(filter-out qwen2_5_vl,$(FAMILY)),-$(FAMILY))$(if $(filter-out 0,$(SEED)),-seed$(SEED))
IU ?= ../shared/data/iu_xray

# Ranks share out the cores that this process may use (mrg_r1/cores.py); your own OMP_NUM_THREADS comes first. No hub is asked
# for anything.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_PROGRESS_BARS := 1

# GPU machines: `make demo LAUNCH='deepspeed --num_gpus 2'`
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR := cpu
endif
LAUNCH ?= $(BIN)/deepspeed --num_gpus $(RANKS) --master_port $(shell shuf -i 20000-29999 -n 1)
MRG := $(BIN)/mrg-r1

# A stage says in a line what it does, and what it runs says what came out. `make -n TARGET` shows the commands.
SAY := @printf '\n%s\n'

# $(call launch,RUN,what launch/ is given): the launcher's own lines go to RUN/launch.log. A rank that fails has spoken
# itself; of one that was killed only the launcher knows.
define launch
@mkdir -p $(1)
@$(LAUNCH) launch/$(2) >> $(1)/launch.log || { code=$$?; test $$code -lt 128 || \
	{ tail -n 3 $(1)/launch.log; echo "exit code $$code: a rank was killed; more in $(1)/launch.log"; } >&2; exit $$code; }
endef

help:  ## this list
	@sed -nE 's/^##: ([^:]+): /\1\t/p; s/^([a-z0-9-]+):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '%-19s %s\n' "$$name" "$$text"; done

setup: $(READY)  ## the virtual environment in .venv

# DeepSpeed is a source distribution whose build imports torch: torch first, and no isolated build. Modules are
# compiled by all cores at the end and not by one as pip does; some are templates that are no Python, as pip knows too.
$(READY): setup.py constraints.txt
	$(SAY) 'setup: torch, DeepSpeed and what else is needed, into $(VENV) (a few minutes, once)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ sudo -n apt-get install -y python3-venv || apt-get install -y python3-venv; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "make PYTHON=python3.11, or newer")'
	@$(BIN)/pip install --quiet --no-compile -c constraints.txt setuptools wheel ninja packaging torch numpy
	@$(BIN)/pip install --quiet --no-compile -c constraints.txt --no-build-isolation deepspeed
	@$(BIN)/pip install --quiet --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

# ---- the demo: phantoms -> labeler -> tiny policy -> SFT stopped early -> GRPO -> table. Finished stages are not run again.

demo: $(DEMO)/summary.json  ## train and evaluate a tiny policy on phantoms, from nothing to a table
	$(SAY) 'What GRPO changed:'
	@$(MRG) summary $(DEMO) $(if $(wildcard $(DEMO)/control/summary.json),--control $(DEMO)/control)

demo-control: $(DEMO)/summary.json $(DEMO)/control/summary.json  ## the same start, studies and time by further SFT
	$(SAY) 'What GRPO changed, and what further SFT did in the same time:'
	@$(MRG) summary $(DEMO) --control $(DEMO)/control

##: demo-CONTROL: rft or random: rejection fine-tuning on the best of each group, or a random reward, instead of GRPO
demo-rft demo-random: demo-%: $(DEMO)/summary.json
	$(call launch,$(DEMO)/$*,train.py launch/recipes/demo.yaml control=$* output_dir=$(DEMO)/$* policy.path=$(DEMO)/sft/policy $(DEMO_KEYS))
	@$(MRG) summary $(DEMO) --control $(DEMO)/$*

SEEDS ?= 0 1 2
demo-seeds:  ## the demo and its control over three seeds (SEEDS="0 1 2"), and the mean gain
	@for seed in $(SEEDS); do $(MAKE) --no-print-directory demo-control SEED=$$seed; done
	@$(MRG) summary $(foreach seed,$(SEEDS),$(patsubst %-seed$(SEED),%,$(DEMO))$(if $(filter-out 0,$(seed)),-seed$(seed)))

# Radiologists who word the normal alike and pass over two findings of five: who imitates them learns to be silent.
HABITS := --faint 0.3 --writers 4 --negatives-stated 0.9 --passed-over 0.4 --normal-alike 0.9
PHANTOMS := $(DEMO)/phantoms/manifest.jsonl

$(PHANTOMS): | $(READY)
	$(SAY) '1/5 Phantoms: chest radiographs are drawn from findings, and reports written that name them'
	@mkdir -p $(DEMO)
	@$(MRG) prepare phantom -o $(DEMO)/phantoms --preset five --splits sft=4000,train=1920,val=256,test=512 \
		--side 84 --seed $(SEED) $(HABITS)

$(DEMO)/labeler/training.json: $(PHANTOMS)
	$(SAY) '2/5 Labeler: a small BERT learns to read findings out of reports; its reading will be the reward'
	@$(MRG) labeler train $(DEMO)/phantoms/reports.csv $(DEMO)/phantoms/labels.csv -o $(DEMO)/labeler \
		--seed $(SEED) --passes 5

$(DEMO)/tiny-policy/config.json: $(PHANTOMS)
	$(SAY) '3/5 Policy: a tiny vision-language model, whose vision tower is taught to see before it can write'
	@$(MRG) prepare tiny-policy -o $(DEMO)/tiny-policy --family $(FAMILY) --manifest $(PHANTOMS) --side 84 --seed $(SEED) \
		--teach-tower $(PHANTOMS) --teach-split sft --teach-steps 200

DEMO_KEYS = seed=$(SEED) data.manifest=$(PHANTOMS) reward.labeler=$(DEMO)/labeler

$(DEMO)/sft/summary.json: $(DEMO)/labeler/training.json $(DEMO)/tiny-policy/config.json
	$(SAY) '4/5 Cold start: SFT teaches it to write reports as the radiologists do, silence included'
	$(call launch,$(DEMO)/sft,sft.py launch/recipes/demo_sft.yaml output_dir=$(DEMO)/sft \
		policy.path=$(DEMO)/tiny-policy $(DEMO_KEYS))

$(DEMO)/summary.json: $(DEMO)/sft/summary.json
	$(SAY) '5/5 GRPO: it samples eight reports a study and learns from what the labeler reads in them'
	$(call launch,$(DEMO),train.py launch/recipes/demo.yaml output_dir=$(DEMO) policy.path=$(DEMO)/sft/policy $(DEMO_KEYS))

$(DEMO)/control/summary.json: $(DEMO)/summary.json
	$(SAY) 'Control: from the same start, further SFT for as many processor seconds as GRPO and its labeler took'
	$(call launch,$(DEMO)/control,sft.py launch/recipes/demo_control.yaml output_dir=$(DEMO)/control \
		policy.path=$(DEMO)/sft/policy $(DEMO_KEYS) control_of=$(DEMO))

# ---- labels without reports: few reports to imitate, many films with labels alone. SFT on the reports, at four lengths, and
# ---- GRPO on the films from one of them.

LBL := runs/labels$(if $(filter-out 0,$(SEED)),-seed$(SEED))
LBL_MANIFEST := $(LBL)/phantoms/manifest.jsonl
# all with the reward of demo.yaml, so that the mean rewards compare
LBL_WEIGHTS := {ce_f1: 0.6, format: 0.1, repetition: 0.3, mccs: 0.0}
LBL_KEYS = seed=$(SEED) data.manifest=$(LBL_MANIFEST) reward.labeler=$(LBL)/labeler 'reward.weights=$(LBL_WEIGHTS)'
LBL_START := 300
LBL_LENGTHS := 150 300 600 1200

labels-phantom: $(LBL)/summary.json $(foreach steps,$(LBL_LENGTHS),$(LBL)/sft$(steps)/summary.json)
	$(SAY) 'From SFT of $(LBL_START) steps, what GRPO on labels changed, beside every SFT:'
	@for steps in $(LBL_LENGTHS); do echo "SFT of $$steps steps:"; $(MRG) summary $(LBL) --control $(LBL)/sft$$steps; done

$(LBL_MANIFEST): | $(READY)
	@mkdir -p $(LBL)
	@$(MRG) prepare phantom -o $(LBL)/phantoms --preset five --splits sft=300,train=4992,val=256,test=512 \
		--without-reports train --side 84 --seed $(SEED) $(HABITS)

$(LBL)/labeler/training.json: $(LBL_MANIFEST)
	@$(MRG) labeler train $(LBL)/phantoms/reports.csv $(LBL)/phantoms/labels.csv -o $(LBL)/labeler --seed $(SEED) --passes 5

$(LBL)/tiny-policy/config.json: $(LBL_MANIFEST)
	@$(MRG) prepare tiny-policy -o $(LBL)/tiny-policy --manifest $(LBL_MANIFEST) --split sft --side 84 --seed $(SEED) \
		--teach-tower $(LBL_MANIFEST) --teach-split train --teach-steps 200

$(LBL)/sft%/summary.json: $(LBL)/labeler/training.json $(LBL)/tiny-policy/config.json
	$(call launch,$(LBL)/sft$*,sft.py launch/recipes/demo_sft.yaml output_dir=$(LBL)/sft$* policy.path=$(LBL)/tiny-policy \
		steps=$* optimizer.warmup_steps=15 evaluation.every=150 evaluation.test=true $(LBL_KEYS))

$(LBL)/summary.json: $(LBL)/sft$(LBL_START)/summary.json
	$(call launch,$(LBL),train.py launch/recipes/demo.yaml output_dir=$(LBL) policy.path=$(LBL)/sft$(LBL_START)/policy \
		steps=156 evaluation.every=39 checkpoint.every=39 $(LBL_KEYS))

# ---- tables: rows are recipes over seeds; finished rows are kept, an interrupted table goes on. On phantoms two rows at a
# ---- time, one rank each. On reports:
# ---- make table-main-iu TABLE_KEYS='data.manifest=... policy.path=... reward.labeler=...' TABLE_LAUNCH='deepspeed --num_gpus 8'

TABLES := launch/recipes/tables
TABLE_KEYS ?=
TABLE_PARALLEL ?= 1
TABLE_LAUNCH ?= $(BIN)/deepspeed --num_gpus 1
TABLE = @$(MRG) table $(TABLES)/$(1).yaml $(TABLE_KEYS) --launch '$(TABLE_LAUNCH)' --parallel
RARE = Cardiomegaly=0.08,Pneumothorax=0.08
FULL := runs/tables/full-phantoms-seed$(SEED)

start: $(DEMO)/sft/summary.json

starts:  ## the cold starts of three seeds, from which the phantom tables go on
	@for seed in 0 1 2; do $(MAKE) --no-print-directory start SEED=$$seed; done

##: table-NAME-phantom: rewards, margin, format, advantages, rare or context, on phantoms
table-rewards-phantom table-margin-phantom table-format-phantom table-advantages-phantom: table-%: starts
	$(call TABLE,$*) 2

table-rare-phantom: starts
	@for seed in 0 1 2; do $(MRG) prepare phantom -o runs/tables/rare-phantoms-seed$$seed \
		--splits train=1920,val=32,test=2048 --side 84 --seed $$seed --prevalence $(RARE) $(HABITS); done
	$(call TABLE,rare-phantom) 2

full-start: $(FULL)/labeler/training.json $(FULL)/tiny-policy/config.json

$(FULL)/manifest.jsonl: | $(READY)
	@$(MRG) prepare phantom -o $(FULL) --preset full --splits sft=4000,train=1920,val=64,test=512 --side 84 --seed $(SEED)

$(FULL)/labeler/training.json: $(FULL)/manifest.jsonl
	@$(MRG) labeler train $(FULL)/reports.csv $(FULL)/labels.csv -o $(FULL)/labeler --seed $(SEED) --passes 5

$(FULL)/tiny-policy/config.json: $(FULL)/manifest.jsonl
	@$(MRG) prepare tiny-policy -o $(FULL)/tiny-policy --manifest $(FULL)/manifest.jsonl --side 84 --seed $(SEED)

table-context-phantom:
	@for seed in 0 1 2; do $(MAKE) --no-print-directory full-start SEED=$$seed; done
	$(call TABLE,context-phantom) 2

tables-phantom: table-rewards-phantom table-margin-phantom table-rare-phantom table-format-phantom  ## the four tables that docs/findings.md reports

##: table-NAME: main-iu, main-mimic, rewards, margin, format, advantages or context, on reports (TABLE_KEYS=)
table-main-iu table-main-mimic table-rewards table-margin table-format table-advantages table-context: table-%: $(READY)
	$(call TABLE,$*) $(TABLE_PARALLEL)

# ---- real IU X-Ray reports over rendered radiographs: IU holds annotation.json and chexbert_labels_train_val.csv. What is pretrained (films, tower, grammar) and the labelers are made once,
# ---- in runs/iu-phantom; a seed is GRPO and its controls from there, over films of its own.

IUB := runs/iu-phantom
IUP := $(IUB)$(if $(filter-out 0,$(SEED)),-seed$(SEED))
IU_LABELS := $(IU)/chexbert_labels_train_val.csv
IU_KEYS = seed=$(SEED) data.manifest=$(IUP)/data/manifest.jsonl

iu-phantom: $(IUP)/summary.json  ## the same on real IU X-Ray reports, their radiographs rendered from labels (IU=folder)
	$(SAY) 'What GRPO changed:'
	@$(MRG) summary $(IUP)

##: iu-phantom-ARM: sft, rft or both: the same start by SFT on the real reports, by rejection fine-tuning, by SFT and then GRPO
iu-phantom-sft: $(IUP)/control/summary.json
	@$(MRG) summary $(IUP) --control $(IUP)/control

iu-phantom-rft: $(IUP)/summary.json
	$(call launch,$(IUP)/rft,train.py launch/recipes/iu_phantom.yaml control=rft output_dir=$(IUP)/rft $(IU_KEYS))
	@$(MRG) summary $(IUP) --control $(IUP)/rft

iu-phantom-both: $(IUP)/control/summary.json
	$(call launch,$(IUP)/both,train.py launch/recipes/iu_phantom.yaml output_dir=$(IUP)/both \
		policy.path=$(IUP)/control/policy $(IU_KEYS))
	@$(MRG) summary $(IUP)/both

$(IUP)/control/summary.json: $(IUP)/summary.json
	$(SAY) 'SFT on the real reports, from the same start, for as many processor seconds as GRPO and its labeler took'
	$(call launch,$(IUP)/control,sft.py launch/recipes/iu_phantom_control.yaml output_dir=$(IUP)/control \
		control_of=$(IUP) $(IU_KEYS))

# Few real reports and many films with labels alone: SFT of the 300 reports at three lengths, the same with as much of the
# grammar beside them at two, and GRPO on the other films' labels from the first of these.
FEW := $(IUP)/few
FEW_SFT = sft.py launch/recipes/iu_phantom_pretrained_sft.yaml policy.path=$(IUB)/pretrained/policy seed=$(SEED) \
	data.train_split=sft optimizer.learning_rate=1.0e-3 optimizer.warmup_steps=5 evaluation.test=true \
	evaluation.batch_size=128 evaluation.lexical=off evaluation.held_out_labeler=$(IUB)/held_out \
	'reward.weights={ce_f1: 0.45, mccs: 0.25, repetition: 0.2, format: 0.1}' checkpoint.every=1000

iu-labels: $(FEW)/summary.json $(foreach arm,sft30 sft100 sft300 mixed450,$(FEW)/$(arm)/summary.json)  ## few real reports and many films with labels alone: SFT, then GRPO
	@for arm in sft30 sft100 sft300 mixed150 mixed450; do echo "SFT, $$arm:"; $(MRG) summary $(FEW) --control $(FEW)/$$arm; done

$(FEW)/manifest.jsonl: $(IUP)/data/manifest.jsonl $(IUB)/balanced/manifest.jsonl
	@$(BIN)/python docs/experiments/few_reports.py $(IUP)/data $(IUB)/balanced $(FEW) $(SEED)

$(FEW)/sft%/summary.json: $(FEW)/manifest.jsonl $(IUB)/pretrained/summary.json
	$(call launch,$(FEW)/sft$*,$(FEW_SFT) steps=$* output_dir=$(FEW)/sft$* data.manifest=$(FEW)/manifest.jsonl)

$(FEW)/mixed%/summary.json: $(FEW)/manifest.jsonl $(IUB)/pretrained/summary.json
	$(call launch,$(FEW)/mixed$*,$(FEW_SFT) steps=$* output_dir=$(FEW)/mixed$* data.manifest=$(FEW)/mixed.jsonl)

$(FEW)/summary.json: $(FEW)/mixed150/summary.json
	$(call launch,$(FEW),train.py launch/recipes/iu_phantom.yaml output_dir=$(FEW) steps=165 evaluation.every=41 \
		seed=$(SEED) data.manifest=$(FEW)/manifest.jsonl policy.path=$(FEW)/mixed150/policy)

# First for its report CSVs: the test reports have no labels yet, so their studies are refused here.
$(IUB)/texts/reports.csv: | $(READY)
	@test -f $(IU)/annotation.json || \
		{ echo "IU=$(IU): no annotation.json; name the folder of R2Gen's IU X-Ray files: make iu-phantom IU=..." >&2; exit 2; }
	$(SAY) '1/6 Reports: for the labeler (studies of the test split have no labels yet and are refused here)'
	@$(MRG) prepare iu-xray $(IU)/annotation.json -o $(IUB)/texts --side 56 --render-missing $(IU_LABELS)

# The policy begins in a grammar's words, so a labeler is taught on those too: what it was not taught it misreads, and GRPO finds
# that. The second one, of other texts, is never rewarded: what it reads says whether the first is being fooled.
TEXTS_OF_labeler := 2,2401p
TEXTS_OF_held_out := 5002,7401p
$(IUB)/labeler/training.json $(IUB)/held_out/training.json: $(IUB)/%/training.json: $(IUB)/texts/reports.csv $(IUB)/balanced/manifest.jsonl
	$(SAY) '3/6 Labeler ($*): a small BERT learns to read findings out of reports'
	@{ cat $(IUB)/texts/reports_train.csv; tail -n +2 $(IUB)/texts/reports_val.csv; \
		sed -n '$(TEXTS_OF_$*)' $(IUB)/balanced/reports.csv; } > $(IUB)/texts/$*_reports.csv
	@{ cat $(IU_LABELS); sed -n '$(TEXTS_OF_$*)' $(IUB)/balanced/labels.csv; } > $(IUB)/texts/$*_labels.csv
	@$(MRG) labeler train $(IUB)/texts/$*_reports.csv $(IUB)/texts/$*_labels.csv -o $(IUB)/$* --seed $(if $(filter held_out,$*),1,0)

# Nobody publishes the test labels: the labeler reads them, and the test split's radiographs are rendered from its reading.
$(IUB)/texts/test_labels.csv: $(IUB)/labeler/training.json $(IUB)/held_out/training.json
	@$(MRG) label $(IUB)/texts/reports_test.csv --labeler $(IUB)/labeler -o $@

$(IUP)/data/manifest.jsonl: $(IUB)/texts/test_labels.csv
	$(SAY) '4/6 Studies: radiographs are rendered for every report, from its labels; three for each that is learned from'
	@mkdir -p $(IUP)
	@$(MRG) prepare iu-xray $(IU)/annotation.json -o $(IUP)/data --side 84 --films 3 --seed $(SEED) \
		--render-missing $(IU_LABELS) --render-missing $(IUB)/texts/test_labels.csv

$(IUB)/balanced/manifest.jsonl: | $(READY)
	$(SAY) '2/6 Phantoms: films that show every finding often, for a policy that has seen none'
	@$(MRG) prepare phantom -o $(IUB)/balanced --preset balanced --splits train=12000,val=400 --side 84

$(IUB)/tiny-policy/config.json: $(IUB)/texts/reports.csv $(IUB)/balanced/manifest.jsonl
	$(SAY) '5/6 Policy: a tiny vision-language model is taught to see, and to name what it sees'
	@$(MRG) prepare tiny-policy -o $(IUB)/tiny-policy --manifest $(IUB)/texts/manifest.jsonl --side 84 \
		--teach-tower $(IUB)/balanced/manifest.jsonl --teach-head mean --teach-steps 1200

$(IUB)/pretrained/summary.json: $(IUB)/labeler/training.json $(IUB)/tiny-policy/config.json
	$(call launch,$(IUB)/pretrained,sft.py launch/recipes/iu_phantom_pretrained_sft.yaml)

$(IUP)/summary.json: $(IUP)/data/manifest.jsonl $(IUB)/pretrained/summary.json
	$(SAY) '6/6 GRPO: it samples reports and learns from what the labeler reads in them and in the real ones'
	$(call launch,$(IUP),train.py launch/recipes/iu_phantom.yaml output_dir=$(IUP) $(IU_KEYS))

# ---- bench: TRL in an environment of its own, so that neither side bends to the other's requirements

TRL_VENV := .venv-trl

$(TRL_VENV)/.ready: benchmarks/trl-constraints.txt | $(READY)
	test -x $(TRL_VENV)/bin/python || $(BIN)/python -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/pip install --quiet -c benchmarks/trl-constraints.txt torch
	$(TRL_VENV)/bin/pip install --quiet -c benchmarks/trl-constraints.txt trl transformers peft datasets accelerate pillow
	touch $@

bench: $(READY) $(TRL_VENV)/.ready  ## our step beside TRL's, our rollout beside generate (at most 20 minutes)
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

bench-gpu: $(GPU_VENV)/.ready  ## our step beside TRL's at 7B shapes on one CUDA card (WHEELHOUSE=folder without a network)
	env -u OMP_NUM_THREADS $(GPU_VENV)/bin/python -m benchmarks.gpu --out runs/bench-gpu --minutes 10 $(GPU_ARGS)

# DeepSpeed is a source distribution whose build imports torch; everything else is a wheel for the other machine's Python. pycocoevalcap loses
# METEOR's and SPICE's files, nine tenths of 100 MB: the bench calls neither. WHEELS and WHEELS_TRL can be cut to what that machine lacks.
wheelhouse: $(READY)  ## fill WHEELHOUSE with what bench-gpu needs on a machine without a network (GPU_PYTHON=3.12)
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

# ---- radeval: RadGraph, RaTEScore, BERTScore, RadCliQ in an environment of their own (docs/scores.md). No weights come with
# ---- it; nothing here asks a hub for them.

RADEVAL_VENV := .venv-radeval
RADEVAL_PYTHON ?= python3.11

radeval: $(RADEVAL_VENV)/.ready  ## an environment of RadEval's metrics, for `mrg-r1 score --with radeval --python .venv-radeval/bin/python`

# A torchvision of another build than torch takes transformers' models with it, and no metric needs one.
$(RADEVAL_VENV)/.ready: radeval-constraints.txt
	test -x $(RADEVAL_VENV)/bin/python || $(RADEVAL_PYTHON) -m venv $(RADEVAL_VENV)
	$(RADEVAL_VENV)/bin/python -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else "make radeval RADEVAL_PYTHON=python3.11")'
	$(RADEVAL_VENV)/bin/pip install --quiet -c radeval-constraints.txt torch
	$(RADEVAL_VENV)/bin/pip install --quiet -c radeval-constraints.txt radeval
	$(RADEVAL_VENV)/bin/python -c 'import torchvision' 2> /dev/null || $(RADEVAL_VENV)/bin/pip uninstall --quiet --yes torchvision
	$(RADEVAL_VENV)/bin/python -c 'from importlib.metadata import version; print("radeval", version("radeval"))'
	touch $@

# ---- tests

# A machine that cannot have a browser skips the page's browser tests, which say so.
browser:  ## chromium and its driver, for the tests of the page
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || { \
		for root in '' 'sudo -n'; do $$root apt-get update -qq && $$root apt-get install -y -qq chromium chromium-driver && break; done > /dev/null 2>&1; \
		command -v chromium > /dev/null || echo "no chromium could be installed: the page's browser tests will be skipped" >&2; }

test test-slow soak: export OMP_NUM_THREADS := 1

test: $(READY) browser  ## style, types, import rules and every test but the slow ones
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --durations 20 -m "not slow and not gpu"

test-slow: $(READY)  ## tests of minutes: training a labeler, a run end to end
	$(BIN)/python -m pytest -n 2 --durations 20 -m "slow and not gpu"

test-gpu: $(READY)  ## what needs a CUDA device: kernels, captured graphs, bf16
	$(BIN)/python -m pytest -m gpu

soak: $(READY)  ## kill a run of two ranks 30 times (KILLS=30) and compare it with an undisturbed one
	rm -rf runs/soak
	$(BIN)/python -m tests.soak --kills $(KILLS) -o runs/soak

lint: $(READY)  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove runs (not .venv)
	rm -rf runs
