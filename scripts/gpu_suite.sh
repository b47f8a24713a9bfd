#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one command: tests, stream sanitizer, decode benchmarks with CSV rows.
#
#   scripts/gpu_suite.sh [--dry-run] [--quick] [--results DIR]
#
# Each step is bounded in time; a step that fails or runs over does not stop the next. Rows land in scripts/results/
# (or DIR) as soon as a step has them. --dry-run lists the steps, their limits and what they write.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[[ -x $python ]] || python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
results=scripts/results dry_run=0 quick=0
while (($# > 0)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --quick) quick=1 ;;
        --results) results=$2 && shift ;;
        *) echo "usage: scripts/gpu_suite.sh [--dry-run] [--quick] [--results DIR]" >&2 && exit 2 ;;
    esac
    shift
done

summary=()
step() { # step SECONDS WRITES COMMAND...
    local limit=$1 writes=$2 began=$SECONDS
    shift 2
    if ((dry_run)); then
        printf 'up to %4d s  writes %-32s  %s\n' "$limit" "$writes" "$*"
        return
    fi
    printf '\n== %s\n' "$*"
    timeout "$limit" "$@"
    summary+=("$(printf 'exit %3d  %4d s  %s' $? $((SECONDS - began)) "$*")")
}

if ((!dry_run)) && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: nothing to run (--dry-run lists the steps)" >&2
    exit 1
fi
quick_option=
((quick)) && quick_option=--quick
((dry_run)) || mkdir -p "$results"

step 60 - "$python" -m kvoffload.cli env
step 300 - "$python" -m pytest -q -m gpu tests/test_gpu.py -s
kernel_tests=(tests/test_{segment_attention,merge,rope,linear_rope,ops}.py)
step 400 - "$python" -m pytest -q -m gpu "${kernel_tests[@]}"
step 240 "$results/kernels.csv" "$python" scripts/bench_kernels.py ${quick_option:+"$quick_option"} --csv "$results/kernels.csv"
step 180 - "$python" -m pytest -q -m gpu tests/test_profiler.py
step 120 "$results/profile.json" "$python" -m kvoffload.cli profile ${quick_option:+"$quick_option"} --output "$results/profile.json"
presets=(opt-6.7b llama-3.1-8b opt-30b llama-2-7b opt-13b llama-2-13b)
((quick)) && presets=(opt-6.7b llama-3.1-8b)
for preset in "${presets[@]}"; do
    step 240 "$results/decode.csv" "$python" scripts/bench_decode.py --preset "$preset" --csv "$results/decode.csv"
done

((dry_run)) || printf '%s\n' "" "summary:" "${summary[@]}"
