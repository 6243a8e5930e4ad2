#!/usr/bin/env bash
# The truth from a GPU in one command: build, tests, sanitizer, benchmarks, profile; under ten minutes, no network.
#
#   PYTHON=python3 WHEELS=folder OUT=folder benchmarks/gpu.sh [op …]
#
#   PYTHON    a Python with torch (>= 2.11), and for most of it triton, setuptools, pytest, hypothesis
#   WHEELS    wheels of peers (trl, liger_kernel …) and of what is missing; unpacked for this run only
#   OUT       logs, results and profiles (gpu-results)
#   op …      tests and benchmarks of these ops only; without them the results also go to benchmarks/results/
#   STEPS     some of: machine wheels build gputests tests memcheck racecheck benchmarks profile
#   MINUTES   for all of it (10). Of ten: machine and wheels 25 s, build 110 s, gputests (test_gpu.py) 50 s, tests 130 s,
#             memcheck and racecheck 45 s each, profile 40 s, benchmarks 145 s and what the others leave
#   DRY_RUN   1: what a CPU can do of it, on a machine without a GPU
#
# A step that fails or runs out of time does not stop the others; it is named at the end and in the exit status.
set -uo pipefail

PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu-results} WHEELS=${WHEELS:-} MINUTES=${MINUTES:-10} DRY_RUN=${DRY_RUN:-0}
STEPS=${STEPS:-machine wheels build gputests tests memcheck racecheck benchmarks profile}
ops=("$@") failed=() left_out=()
[[ $PYTHON != */* || $PYTHON = /* ]] || PYTHON=$PWD/$PYTHON
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
[ -z "$WHEELS" ] || WHEELS=$(cd "$WHEELS" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/site"
export PYTHONPATH="$scratch/site:$PWD/python" PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=PASSIVE
unset TRITON_INTERPRET RLHF_KERNELS_BACKEND
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"

for op in "${ops[@]}"; do
    [ -f "benchmarks/bench_$op.py" ] || { echo "gpu.sh: there is no op $op" >&2; exit 2; }
done
device=cuda
"$PYTHON" -c 'import torch' || { echo "gpu.sh: $PYTHON has no torch" >&2; exit 2; }
if [ "$DRY_RUN" = 1 ]; then
    device=cpu
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no GPU; DRY_RUN=1 runs what a CPU can" >&2
    exit 2
fi
export RLHF_TEST_DEVICE=$device

wanted() { [[ " $STEPS " == *" $1 "* ]]; }
leave_out() { left_out+=("$1: $2"); echo "== $1 is left out: $2"; }
has() { "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }
share() { echo $(($1 * MINUTES / 10)); } # seconds of ten minutes

step() { # name, seconds, command …: its output goes to a log of its own, the end of it is shown
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    echo "== $name, at most $limit s"
    timeout -s INT -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    tail -n "${TAIL:-4}" "$OUT/$name.log" | cut -c1-200 | sed 's/^/   /'
    [ $status = 124 ] || [ $status = 137 ] && echo "   out of time"
    [ $status = 0 ] || failed+=("$name")
    echo "   $name: exit status $status after $((SECONDS - start)) s"
    return $status
}

if wanted machine; then
    TAIL=100 step machine "$(share 15)" "$PYTHON" - <<'EOF'
import importlib.util, os, shutil, subprocess, sys
import torch

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} CPUs")
for number in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(number)
    print(f"GPU {number}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
for tool, option in (("nvidia-smi", "-L"), ("nvcc", "--version"), ("c++", "--version"), ("compute-sanitizer", "--version"),
                     ("ncu", "--version"), ("ninja", "--version")):
    try:
        lines = subprocess.run([tool, option], capture_output=True, text=True, timeout=10).stdout.split("\n")
        print(f"{tool}: {next((x for x in lines if 'release' in x or 'ersion' in x), lines[0])}")
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{tool}: not there ({type(error).__name__})")
EOF
fi

if wanted wheels; then
    if [ -z "$WHEELS" ]; then
        leave_out wheels "WHEELS names no folder"
    elif has pip; then
        step wheels "$(share 20)" "$PYTHON" -m pip install --no-index --no-deps --no-compile --disable-pip-version-check \
            --target "$scratch/site" "$WHEELS"/*.whl
    else # a wheel is a zip file
        step wheels "$(share 20)" bash -c 'cd "$1" && shift && for wheel; do "$0" -m zipfile -e "$wheel" . || exit; done' \
            "$PYTHON" "$scratch/site" "$WHEELS"/*.whl
    fi
fi
for module in triton setuptools ninja pytest hypothesis xdist trl liger_kernel torchrl; do
    has "$module" || missing="${missing:-} $module"
done
[ -z "${missing:-}" ] || echo "== not installed:$missing"

if wanted build; then
    if [ $device = cuda ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
        TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
        export TORCH_CUDA_ARCH_LIST
    fi
    step build "$(share 110)" "$PYTHON" setup.py -q build_ext --inplace
fi

# Tests: those of the ops, and what holds for all of them.
files=() words=""
for bench in benchmarks/bench_*.py; do
    op=$(basename "$bench" .py) op=${op#bench_}
    [ ${#ops[@]} = 0 ] || [[ " ${ops[*]} " == *" $op "* ]] || continue
    file=tests/test_$op.py
    [ -f "$file" ] || file=tests/test_rm_losses.py
    [[ " ${files[*]:-} " == *" $file "* ]] || files+=("$file")
    words="${words:+$words or }$op or $(basename "$file" .py)"
done
everything=("${files[@]}" tests/test_registration.py)
if [ ${#ops[@]} = 0 ]; then
    everything+=(tests/test_masked.py tests/test_triton.py)
    words="test" # all
fi
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --tb short --maxfail 50) workers=()
if has xdist && [ $device = cuda ]; then # they share the GPU, and compile side by side
    workers=(-n $(($(nproc) < 8 ? $(nproc) : 8)))
fi

test_step() { # name, seconds, pytest's arguments …
    local name=$1 limit=$2
    shift 2
    wanted "$name" || return 0
    if has pytest && has hypothesis; then
        TAIL=12 step "$name" "$limit" "${pytest[@]}" ${workers[@]+"${workers[@]}"} "$@"
    else
        failed+=("$name")
        leave_out "$name" "pytest or hypothesis is missing"
    fi
}

if [ $device = cuda ]; then
    test_step gputests "$(share 50)" -k "$words" tests/test_gpu.py
elif wanted gputests; then
    leave_out gputests "they need a GPU"
fi
test_step tests "$(share 130)" -k "$words" "${everything[@]}"

workers=()
pytest=(compute-sanitizer --tool "" --error-exitcode 1 "${pytest[@]}" -p no:xdist)
for tool in memcheck racecheck; do
    if wanted $tool && [ $device = cpu ]; then
        leave_out $tool "it needs a GPU"
    elif wanted $tool && ! command -v compute-sanitizer >/dev/null; then
        leave_out $tool "there is no compute-sanitizer"
    else # small tests of the CUDA C++ kernels; every allocation of its own, so that a step beyond its end shows
        pytest[2]=$tool
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            test_step $tool "$(share 45)" -k "native and known_values and ($words)" "${files[@]}"
    fi
done

name=$("$PYTHON" -c 'import re, sys, torch
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "dry-run"
print(re.sub("[^a-z0-9]+", "-", name.lower()))' $device)
if wanted benchmarks; then
    profile=0 quick=()
    ! wanted profile || profile=$(share 40)
    [ $device = cuda ] || quick=(--quick)
    limit=$((60 * MINUTES - SECONDS - profile - 5)) # a case that has begun is finished
    TAIL=12 step benchmarks "$limit" "$PYTHON" -m benchmarks "${ops[@]}" --device $device "${quick[@]}" \
        --seconds $((limit - 40)) --json "$OUT/$name.json"
    if [ $device = cuda ] && [ ${#ops[@]} = 0 ] && [ -f "$OUT/$name.json" ]; then
        cp "$OUT/$name.json" benchmarks/results/ && echo "   python -m benchmarks --readme writes them into README.md"
    fi
fi

if wanted profile; then
    if [ ! -f "$OUT/$name.json" ]; then
        leave_out profile "there are no results to choose by"
    elif ! command -v ncu >/dev/null && [ $device = cuda ]; then
        leave_out profile "there is no ncu"
    else
        ncu=(ncu --clock-control none --profile-from-start off --section SpeedOfLight --section MemoryWorkloadAnalysis
            --section Occupancy --section LaunchStats --section WarpStateStats)
        [ $device = cuda ] || { ncu=() && leave_out ncu "it needs a GPU"; }
        while IFS=$'\t' read -r op case; do
            step "profile-$op" "$(share 20)" ${ncu[@]+"${ncu[@]}"} "$PYTHON" -m benchmarks.profile run "$op" "$case"
        done < <("$PYTHON" -m benchmarks.profile worst "$OUT/$name.json" 2)
    fi
fi

echo "== $SECONDS s, logs and results in $OUT"
for line in "${left_out[@]}"; do echo "   left out: $line"; done
[ ${#failed[@]} = 0 ] || { echo "   failed: ${failed[*]}"; exit 1; }
