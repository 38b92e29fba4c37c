#!/usr/bin/env bash
# Every benchmark on one GPU, from a bare checkout, in less than 8 minutes.
#
#     bash benchmarks/gpu.sh                                # gpu.json and gpu.md in benchmarks/results
#     bash benchmarks/gpu.sh FOLDER                         # in another folder
#     bash benchmarks/gpu.sh FOLDER layer memory            # only these of its steps
#     BENCHMARK_TRY=1 bash benchmarks/gpu.sh FOLDER         # only try the programs, on any device
#
# Uses the python3 on the PATH, or $PYTHON, where JAX has to see the GPU; PyTorch is compared with
# where it is there. What is missing is installed beside it, in an environment that is thrown away.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-benchmarks/results}
only=${*:2}
python=${PYTHON:-python3}
try=${BENCHMARK_TRY:-}
deadline=450 # seconds, after which nothing is begun, and what runs is stopped
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD BENCHMARK_RESULTS=$work/tables

fail() {
    echo "gpu.sh: $*" >&2
    exit 1
}

# What has to be installed, in pip's words.
missing() {
    "$python" - "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)" <<'EOF'
import sys
from importlib.util import find_spec

driver = sys.argv[1].split(".")[0]
names = ("flax", "optax", "jaxtyping", "numpy", "rich", "matplotlib")
found = [name for name in names if find_spec(name) is None]
with_gpu = f"jax[cuda{13 if int(driver) >= 580 else 12}]" if driver.isdigit() else "jax"
if find_spec("jax") is None:
    found.append(with_gpu)
else:
    import jax

    if driver and jax.default_backend() != "gpu":
        found.append(f"{with_gpu}=={jax.__version__}")
print(*found)
EOF
}

# An environment in which all is visible that $python sees, whether or not that is one itself.
install() {
    "$python" -m venv --without-pip "$work/env"
    "$python" -c 'import sys; print(*filter(None, sys.path), sep="\n")' \
        >"$(echo "$work"/env/lib/python*/site-packages)/parent.pth"
    "$python" -m pip --python "$work/env/bin/python" install --quiet --timeout 10 --retries 1 "$@" ||
        fail "needs $*, which $python does not have and which could not be installed"
    python=$work/env/bin/python
}

notes=()
failed=

# step NAME SECONDS COMMAND...: run it within so many seconds, and go on whatever comes of it.
step() {
    local name=$1 limit=$2 status=0
    shift 2
    [[ -z $only || " $only " == *" $name "* ]] || return 0
    local left=$((deadline - SECONDS))
    if [ "$left" -lt 15 ]; then
        notes+=("$name: left out for want of time")
        return
    fi
    printf '\n=== %s (%s s)\n' "$name" "$SECONDS"
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" || status=$?
    if [ "$status" = 124 ]; then
        notes+=("$name: stopped when its time was up")
    elif [ "$status" != 0 ]; then
        notes+=("$name: failed with status $status")
        failed=yes
    fi
}

command -v "$python" >/dev/null || fail "there is no $python"
read -ra needed <<<"$(missing)"
[ "${#needed[@]}" = 0 ] || install "${needed[@]}"
[ -n "$try" ] || "$python" -c 'import jax; assert jax.default_backend() == "gpu"' 2>/dev/null ||
    fail "the JAX of $python sees no GPU"

# As `python -m parity_tests --golden`, which reads a command line with a package more.
golden='
from parity_tests.environment import prepare
prepare()
from parity_tests import golden
from rich.console import Console
raise SystemExit(not golden.verify_all(Console()))
'

step golden 100 "$python" -c "$golden"
if [ -n "$try" ]; then
    step layer 100 "$python" benchmarks/layer.py --rounds 1 --shapes 1x4x4x8 --only "Flax|formulas" \
        --tables training
    step train_step 200 "$python" benchmarks/train_step.py --rounds 1 --batches 2 --no-compile
    step memory 100 "$python" benchmarks/memory.py --rounds 1 --shape 2x8x8x64 --blocks 1 --gib 0.05
    step costs 60 "$python" benchmarks/costs.py --rounds 1 --only import
    step parallel 60 env JAX_PLATFORMS=cpu "$python" benchmarks/parallel.py
else
    step layer 120 "$python" benchmarks/layer.py --tables training
    step train_step 140 "$python" benchmarks/train_step.py --rounds 10 --batches 64
    step memory 80 "$python" benchmarks/memory.py
    step parts 60 "$python" benchmarks/layer.py --tables parts --rounds 10
    step costs 80 "$python" benchmarks/costs.py --rounds 1
    step nnx 60 "$python" benchmarks/nnx.py --rounds 15
    step scaling 60 "$python" benchmarks/scaling.py
    step fold 60 "$python" benchmarks/fold.py
    # On virtual devices, which only CPUs have.
    step parallel 60 env JAX_PLATFORMS=cpu "$python" benchmarks/parallel.py
fi

"$python" benchmarks/join.py "$BENCHMARK_RESULTS" "$folder" "${notes[@]}"
printf '\n=== done (%s s)\n' "$SECONDS"
[ -z "$failed" ]
