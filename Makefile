# Every line here is one that a person could type.
TOOLS := convert pretrain sft rlhf infer
ENVIRONMENTS := $(TOOLS:%=tools/%/.venv/.ready)
WORK ?= demo-work
REAL_WORK ?= demo-real-work
STAGES ?= sft
BENCH_WORK ?= bench-work
MINUTES ?= 30
PROOFS := $(CURDIR)/.proofs
PYTEST := -m pytest -q --numprocesses 2 --durations 5
export OMP_NUM_THREADS ?= 2
# where it is set, every start of a tool compiles its libraries anew, for half a minute
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo demo-real pipeline-docker test lint format lock clean $(TOOLS:%=test-%) test-pipeline test-golden test-slurm test-terminal test-containers images peers bench-convert bench-train bench-save bench-attention bench-experts bench-fp8 bench-fp8-memory bench-fp8-gpu proofs layouts command-line bench-lora parity test-hostile bench-serve bench-rehearsal rehearsals bench-data test-trlx bench-rlhf bench-rollout-gap bench-preference
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(ENVIRONMENTS) ## one environment for each tool: tools/<tool>/.venv

tools/%/.venv/.ready: tools/%/requirements.lock tools/%/pyproject.toml tests/requirements.lock tools/environment.sh
	tools/environment.sh tools/$*

tests/lint/.venv/.ready: tests/lint/requirements.lock tools/environment.sh
	tools/environment.sh tests/lint

tests/hostile/.venv/.ready: tests/hostile/requirements.lock tools/environment.sh
	tools/environment.sh tests/hostile

tests/peers/.venv/.ready: tests/peers/requirements.lock tools/environment.sh
	tools/environment.sh tests/peers

containers/.venv/.ready: containers/requirements.lock tools/environment.sh
	tools/environment.sh containers

demo: setup ## the whole road on this machine: text -> tokenizer -> pretraining -> SFT -> PPO -> a served model
	tools/pretrain/.venv/bin/python demo/demo.py --work $(WORK)

demo-real: setup ## a pretrained model of the package index: LoRA to answers in JSON, served beside its base; STAGES=sft,dpo,grpo
	tools/pretrain/.venv/bin/python demo/real --work $(REAL_WORK) --stages $(STAGES)

images: $(TOOLS:%=image-%) image-convert-logits ## an image for each tool; BASES=registry builds on those for GPUs

image-%: containers/.venv/.ready ## image-convert: convert:0.1.0 and convert:latest
	containers/engine.sh
	containers/build.sh $(subst -, ,$*)

pipeline-docker: containers/.venv/.ready ## the demo in containers, one for each stage
	containers/.venv/bin/python containers/pipeline.py --work $(WORK)

test: lint $(TOOLS:%=test-%) test-pipeline ## every test, each in its tool's environment

test-convert: setup containers/.venv/.ready tests/hostile/.venv/.ready ## the contract, families, mapping, convert and the command lines
	OMP_NUM_THREADS=1 tools/convert/.venv/bin/python $(PYTEST) tests/test_*.py \
	    $(filter-out tests/shared/test_weight_account.py,$(wildcard tests/shared/test_*.py)) tests/shared/checkpoint tests/shared/architecture \
	    tests/shared/families tests/shared/mapping tests/shared/quantized tests/tools/convert tests/tools/test_every_command.py \
	    tests/containers/test_compose.py tests/containers/test_dockerfiles.py tests/containers/test_supply_chain.py tests/benchmarks tests/hostile

test-pretrain: setup ## Megatron-Core on this machine, data, pretraining
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python $(PYTEST) tests/shared/data tests/shared/kernels tests/shared/model \
	    tests/shared/rehearsal tests/shared/report tests/shared/runtime tests/shared/training tests/tools/pretrain tests/layouts tests/rehearsals tests/demo

test-sft: setup ## supervised fine-tuning
	OMP_NUM_THREADS=1 tools/sft/.venv/bin/python $(PYTEST) tests/tools/sft

test-rlhf: setup ## reward model, PPO, GRPO
	OMP_NUM_THREADS=1 tools/rlhf/.venv/bin/python $(PYTEST) tests/shared/test_weight_account.py tests/tools/rlhf

test-trlx: setup ## rlhf ppo --backend trlx; trlx at BATON_TRLX, a checkout or wheel
	@test -n "$(BATON_TRLX)" || { echo "make test-trlx: set BATON_TRLX to a checkout or wheel of trlx (tools/rlhf/README.md)"; exit 2; }
	OMP_NUM_THREADS=1 tools/rlhf/.venv/bin/python -m pytest -q --durations 5 -m trlx tests/tools/rlhf

test-infer: setup tests/hostile/.venv/.ready ## vLLM and lm-evaluation-harness
	OMP_NUM_THREADS=1 tools/infer/.venv/bin/python $(PYTEST) tests/tools/infer

test-pipeline: setup ## the stages, through their commands and directories only, and test-golden
	tools/convert/.venv/bin/python $(PYTEST) tests/pipeline tests/golden

test-golden: setup ## losses of tiny runs, equal to those recorded in tests/golden/curves
	tools/convert/.venv/bin/python -m pytest -q --durations 3 tests/golden

test-slurm: setup ## the Slurm scripts on a cluster of two nodes on this machine (Debian, as root)
	tools/convert/.venv/bin/python -m pytest -q --durations 5 tests/slurm

test-terminal: setup ## infer chat typed into tmux (Debian, as root, or where tmux is)
	command -v tmux > /dev/null || apt-get install -y -qq --no-install-recommends tmux
	OMP_NUM_THREADS=1 tools/infer/.venv/bin/python -m pytest -q --durations 5 tests/terminal

test-containers: setup containers/.venv/.ready ## images built and run (Debian as root, or where Docker is)
	-containers/engine.sh
	tools/convert/.venv/bin/python -m pytest -q --durations 5 tests/containers

peers: tests/peers/.venv/.ready ## Megatron-Bridge, mbridge and mcore-bridge, for test-convert and bench-convert to compare with (6 GB)

bench-convert: setup ## how fast conversions are beside copying the same bytes (20 GB of disk at BENCH_WORK)
	OMP_NUM_THREADS=1 tools/convert/.venv/bin/python tests/benchmarks/bench_convert.py --work $(BENCH_WORK)

bench-fp8: setup ## convergence of FP8 training beside bf16 and fp32: hours of one core, resumed where it stopped (at BENCH_WORK), recorded by cell
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_fp8.py --work $(BENCH_WORK) --record

bench-fp8-memory: setup ## bytes of activations that a layer keeps in bf16 and in FP8
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_fp8_memory.py

bench-fp8-gpu: setup ## FP8 kernels, linear layers and whole updates on a GPU, beside bf16 and TransformerEngine
	tools/pretrain/.venv/bin/python tests/benchmarks/bench_fp8_gpu.py --work $(BENCH_WORK)

bench-train: setup ## tokens per second of training beside plain torch loops of Megatron-Core and of transformers
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_train.py

bench-serve: setup ## throughput and latency of `infer serve` beside bare `vllm serve`
	OMP_NUM_THREADS=1 tools/infer/.venv/bin/python tests/benchmarks/bench_serve.py

test-hostile: setup tests/hostile/.venv/.ready ## random and hostile requests to a server, with its memory; MINUTES=30, IMAGE=infer:0.1.0
	OMP_NUM_THREADS=1 tools/infer/.venv/bin/python tests/hostile/hostile.py --minutes $(MINUTES) $(if $(IMAGE),--image $(IMAGE))

bench-save: setup ## what training waits for a save, blocking and with --async-save (6 GB of disk)
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_save.py

bench-attention: setup ## attention of packed rows and windows, up to 128k tokens: seconds, and memory that is linear
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_attention.py --record

bench-experts: setup ## experts of MoE: grouped GEMM beside a loop over experts, in fp32 and bf16
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_experts.py --record

bench-data: setup ## MB/s of `pretrain prepare` beside reading, the tokenizer alone and Megatron-LM's way (at BENCH_WORK)
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_data.py --work $(BENCH_WORK) --record

bench-lora: setup ## bytes of weights, gradients, optimizer and checkpoint: LoRA beside training all weights
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_lora.py --record

bench-rehearsal: setup ## peaks of memory as a rehearsal says them, beside those that torch measures in the same runs on the CPU
	OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/benchmarks/bench_rehearsal.py --record

bench-rlhf: setup ## phases of a step of rlhf ppo and grpo beside TRL alone, and trlx alone where BATON_TRLX names it
	OMP_NUM_THREADS=1 tools/rlhf/.venv/bin/python tests/benchmarks/bench_rlhf.py --record

bench-rollout-gap: setup ## log-probabilities of a server of infer rollouts beside the trainer's, over 200 updates at two learning rates
	OMP_NUM_THREADS=1 tools/rlhf/.venv/bin/python tests/benchmarks/bench_rollout_gap.py --record

bench-preference: setup ## rewards sampled from what rlhf publishes beside controls at learning rate 0, three seeds; resumed where it stopped (at BENCH_WORK)
	OMP_NUM_THREADS=1 tools/rlhf/.venv/bin/python tests/benchmarks/bench_preference.py --work $(BENCH_WORK) --record

proofs: setup ## run what proves each family and record it for `convert families`; FAMILIES="gemma2 glm" for some
	rm -rf $(PROOFS) && mkdir -p $(PROOFS)
	-PROOFS=$(PROOFS) OMP_NUM_THREADS=1 tools/convert/.venv/bin/python $(PYTEST) tests/shared/families tests/tools/convert
	-PROOFS=$(PROOFS) OMP_NUM_THREADS=1 tools/infer/.venv/bin/python $(PYTEST) tests/tools/infer
	tools/convert/.venv/bin/python tests/record_proofs.py $(PROOFS)
	tools/convert/.venv/bin/convert families --markdown > tools/convert/FAMILIES.md
	tools/convert/.venv/bin/python -m pytest -q tests/tools/convert/test_proofs.py

layouts: setup ## train and resume every model kind in every parallel layout, into tools/pretrain/LAYOUTS.md; goes on where it stopped. MISSING=1: only cells that were never run
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python tests/layouts/record.py $(CURDIR)/.layouts $(if $(MISSING),--missing)

rehearsals: setup ## rehearse big models, and a layout of each family on 1,024 GPUs, into docs/rehearsal.md; goes on where it stopped
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 tools/pretrain/.venv/bin/python -m tests.rehearsals.record

parity: setup ## 20 updates of sft train beside TRL's SFTTrainer, full and LoRA, into tools/sft/PARITY.md
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 tools/sft/.venv/bin/python -m tests.tools.sft.parity

lint: tests/lint/.venv/.ready setup ## ruff, mypy, shellcheck, hadolint, compose
	tests/lint/.venv/bin/ruff check .
	tests/lint/.venv/bin/ruff format --check .
	tests/lint/.venv/bin/mypy
	tests/lint/.venv/bin/shellcheck tools/environment.sh tools/lock.sh .ci/run containers/*.sh containers/install/*.sh tests/golden/*.sh containers/slurm/*.sh containers/slurm/*.sbatch
	tests/lint/.venv/bin/hadolint containers/*/Dockerfile
	@if docker compose version >/dev/null 2>&1; then env UID=0 GID=0 docker compose -f compose.yaml -f compose.gpu.yaml config --quiet; \
	else echo "compose.yaml not checked: docker compose is not here"; fi

format: tests/lint/.venv/.ready ## lay the Python files out
	tests/lint/.venv/bin/ruff check --fix .
	tests/lint/.venv/bin/ruff format .

command-line: tools/convert/.venv/.ready ## record every tool's flags in tests/golden/command_line.txt
	tools/convert/.venv/bin/python tests/command_line.py

lock: tools/pretrain/.venv/.ready ## resolve every requirements.lock anew
	tools/lock.sh $(TOOLS)

clean: ## remove the environments and the demo
	rm -rf $(TOOLS:%=tools/%/.venv) tests/lint/.venv tests/peers/.venv tests/hostile/.venv containers/.venv .uv $(WORK) $(REAL_WORK)
