# Thin aliases of the `simplear` verbs. Every target sets .venv up if need be; ARGS="…" is passed on.
#   make demo                                      the whole story on two CPU cores, offline
#   make train-sft ARGS="--trainer.max_steps 10"   one stage of the demo, with an override
#   make paper-sft SIZE=1.5b VARIANTS=rope-2d      a stage of the paper on one machine of 8 GPUs (docs/scale.md)

PYTHON ?= python3
ARGS ?=
CKPT ?= checkpoints/demo/sft
SERVED ?= checkpoints/demo/sft checkpoints/demo/grpo
LOGDIR ?= checkpoints
SIZE ?= 0.5b
VARIANTS ?=
MACHINE ?= gpu8
VENV := .venv
READY := $(VENV)/.ready
SIMPLEAR := $(VENV)/bin/simplear
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
FLOOR_VENV := .venv-floor
FLOOR_READY := $(FLOOR_VENV)/.ready
OLD_PYTHON := Python 3.11 or newer is needed; name one: make PYTHON=python3.11
# The tests ask no network, and their models are so small that a second thread would only wait.
OFFLINE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# Two processes, a test file in one of them.
PYTEST := python -m pytest --numprocesses 2 --dist loadscope
define venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(OLD_PYTHON)"; exit 1; }
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef
configs = $(foreach file,$(or $(CONFIG),$(1)),--config $(file))
paper = $(SIMPLEAR) fit $(foreach name,$(1) $(SIZE) $(VARIANTS) $(2),--config configs/paper/$(name).yaml) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup vllm-env demo test test-floor test-long lint bench gpu table2 table3 ablations train-tokenizer tokenize pretrain train-sft \
	train-grpo train-clip evaluate generate serve tensorboard clean paper-tokenize-512 paper-tokenize-1024 paper-pretrain paper-sft \
	paper-grpo

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	$(call venv,$(VENV))
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

$(VLLM_READY): pyproject.toml constraints-vllm.txt
	$(call venv,$(VLLM_VENV))
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $(VLLM_READY)

$(FLOOR_READY): pyproject.toml constraints-floor.txt
	$(call venv,$(FLOOR_VENV))
	$(FLOOR_VENV)/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable ".[dev]"
	@touch $(FLOOR_READY)

setup: $(READY)  ## make .venv and install; every other target does so by itself

vllm-env: $(VLLM_READY)  ## make .venv-vllm, in which .venv-vllm/bin/simplear draws with vLLM (--engine vllm)

demo: $(READY)  ## train everything small from nothing and look at what it draws (about 20 minutes)
	@$(SIMPLEAR) demo $(ARGS)

test: $(READY)  ## the tests
	@$(OFFLINE) $(VENV)/bin/$(PYTEST) $(ARGS)

test-floor: $(FLOOR_READY)  ## the tests in .venv-floor, at the oldest versions that pyproject.toml allows
	@$(OFFLINE) $(FLOOR_VENV)/bin/$(PYTEST) $(ARGS)

test-long: $(READY) $(VLLM_READY) $(if $(ARGS),,test-floor)  ## the tests that take many minutes
	@$(OFFLINE) $(VENV)/bin/python -m pytest -m long $(ARGS)

bench: $(READY)  ## measure what docs/results.md claims about speed and memory, and fill in its tables
	$(VENV)/bin/python benchmarks/data.py
	$(VENV)/bin/python benchmarks/training.py
	$(VENV)/bin/python benchmarks/training_cost.py
	$(VENV)/bin/python benchmarks/grpo_speed.py
	$(VENV)/bin/python benchmarks/inference.py
	$(VENV)/bin/python benchmarks/host_time.py
	$(VENV)/bin/python benchmarks/serving.py
	$(VENV)/bin/python benchmarks/demo.py
	$(VENV)/bin/python benchmarks/grpo.py
	$(VENV)/bin/python benchmarks/grpo.py --ablations
	$(VENV)/bin/python benchmarks/tables.py

gpu: $(READY)  ## on a GPU: what must hold there, then how fast it draws and trains (eight minutes)
	$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

table2: $(READY)  ## the paper's Table 2 at the demo's size: a language model's weights or random ones (50 minutes, after make demo)
	$(VENV)/bin/python benchmarks/ablations.py --tables table2 $(ARGS)
	$(VENV)/bin/python benchmarks/tables.py

table3: $(READY)  ## the paper's Table 3 at the demo's size: 1-D or 2-D RoPE (half an hour, half of it the arm it shares with table2)
	$(VENV)/bin/python benchmarks/ablations.py --tables table3 $(ARGS)
	$(VENV)/bin/python benchmarks/tables.py

ablations: $(READY)  ## both, and text mixing, caption dropout, long or short captions (two hours and a half)
	$(VENV)/bin/python benchmarks/ablations.py $(ARGS)
	$(VENV)/bin/python benchmarks/tables.py

lint: $(READY)  ## style, types and import directions
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

train-tokenizer: $(READY)  ## train the text tokenizer and the visual tokenizer
ifndef CONFIG
	@test -d data/demo/text_tokenizer || $(SIMPLEAR) train-text-tokenizer --config configs/demo/text_tokenizer.yaml
endif
	@$(SIMPLEAR) fit $(call configs,configs/demo/visual_tokenizer.yaml) $(ARGS)

tokenize: $(READY)  ## pictures and captions into token shards
ifdef CONFIG
	@$(SIMPLEAR) tokenize $(call configs,) $(ARGS)
else
	@for part in pretrain pretrain-validation sft sft-validation; do $(SIMPLEAR) tokenize --config configs/demo/tokenize-$$part.yaml $(ARGS) || exit; done
endif

pretrain: $(READY)  ## pretrain the language model
	@$(SIMPLEAR) fit $(call configs,configs/demo/pretrain.yaml) $(ARGS)

train-sft: $(READY)  ## fine-tune at the higher resolution
	@$(SIMPLEAR) fit $(call configs,configs/demo/sft.yaml) $(ARGS)

train-grpo: $(READY)  ## reinforcement learning from the fine-tuned checkpoint (scene reward)
	@$(SIMPLEAR) fit $(call configs,configs/demo/grpo-scene.yaml) $(ARGS)

train-clip: $(READY)  ## the small CLIP that configs/demo/grpo-clip.yaml takes as reward
	@$(SIMPLEAR) fit $(call configs,configs/demo/clip.yaml) $(ARGS)

evaluate: $(READY)  ## scene accuracy of CKPT
	@$(SIMPLEAR) evaluate scenes $(CKPT) --out $(CKPT)-evaluation $(ARGS)

generate: $(READY)  ## draw with CKPT: ARGS='--prompt "a photo of a red circle"'
	@$(SIMPLEAR) generate $(CKPT) --out $(CKPT)-images $(ARGS)

serve: $(READY)  ## draw in the browser, and OpenAI's image API: http://127.0.0.1:8000
	@$(SIMPLEAR) serve $(SERVED) $(ARGS)

define paper-tokenize
@for set in $(2) validation; do $(SIMPLEAR) tokenize --config configs/paper/data/$(1).yaml --config configs/paper/data/$$set.yaml $(ARGS) || exit; done
endef

paper-tokenize-512: $(READY)  ## the paper's corpora for pretraining into token shards: ARGS="--devices 8"
	$(call paper-tokenize,512,cc3m cc12m openimages sa-1b megalith)

paper-tokenize-1024: $(READY)  ## the same for fine-tuning
	$(call paper-tokenize,1024,journeydb synthetic-1m)

paper-pretrain: $(READY)  ## the paper's pretraining: SIZE=1.5b VARIANTS="from-scratch rope-2d" MACHINE=one-gpu
	@$(call paper,pretrain,$(MACHINE))

paper-sft: $(READY)  ## the paper's fine-tuning of that model, named by the same SIZE and VARIANTS
	@$(call paper,sft,$(MACHINE))

paper-grpo: $(READY)  ## the paper's GRPO of that model, on seven GPUs: VARIANTS=hps for the other reward
	@$(call paper,grpo,)

tensorboard: $(READY)  ## curves and pictures of all runs
	@$(VENV)/bin/tensorboard --logdir $(LOGDIR) $(ARGS)

clean:  ## remove what the demo wrote, not .venv
	rm -rf data/demo checkpoints/demo
