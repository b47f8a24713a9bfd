#!/usr/bin/env bash
# What needs a CUDA GPU, in one command for a bare machine; docs/gpu.md says what it will show.
#
#   scripts/gpu_suite.sh [--tier 1] [--wheels DIR] [--results DIR] [--dry-run] [--steps NAMES]
#   scripts/gpu_suite.sh --tier 2 [--wheels DIR] [--results DIR] [--dry-run] [--quick] [--fresh]
#   scripts/gpu_suite.sh --rehearse
#
# Tier 1, the default, takes at most eight minutes: the most valuable rows first, in one process, each saved as it is
# measured (scripts/gpu_suite.py; --steps chooses some). Tier 2 is the rest: tests, kernels, transfer, the decode grid,
# the campaign and the ablation, each bounded in time; steps that ended well at this commit are left out when it is
# started again, unless --fresh. --wheels DIR: packages that the machine lacks, installed beside those it has.
# $KVOFFLOAD_COMMIT names the commit where there is no git. --rehearse runs tier 1 on a device that is not there, and
# says how long its steps would take on two cards; --dry-run lists the steps, their limits and what they write.
set -uo pipefail
began=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[[ -x $python ]] || python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
tier=1 results=scripts/results wheels='' steps='' dry_run=0 quick=0 fresh=0
usage() {
    echo "usage: scripts/gpu_suite.sh [--tier 1] [--steps NAMES] | --tier 2 [--quick] [--fresh] | --rehearse;" \
        "either tier: [--wheels DIR] [--results DIR] [--dry-run]" >&2
    exit 2
}
while (($# > 0)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --quick) quick=1 ;;
        --fresh) fresh=1 ;;
        --rehearse) export TRITON_INTERPRET=1 PYTHONPATH=$PWD/tests:$PYTHONPATH && exec "$python" -m gpu.rehearsal ;;
        --tier) (($# > 1)) && [[ $2 == [12] ]] || usage && tier=$2 && shift ;;
        --wheels) (($# > 1)) || usage && wheels=$2 && shift ;;
        --results) (($# > 1)) || usage && results=$2 && shift ;;
        --steps) (($# > 1)) || usage && steps=$2 && shift ;;
        *) usage ;;
    esac
    shift
done
((tier == 1 && (quick || fresh))) && usage # they are tier 2's
[[ $tier == 2 && -n $steps ]] && usage

if [[ -n $wheels ]] && ((!dry_run)); then
    compgen -G "$wheels/*.whl" >/dev/null || { echo "gpu_suite: no wheels (*.whl) in $wheels" >&2 && exit 2; }
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl ||
        { echo "gpu_suite: the wheels in $wheels cannot be installed for $("$python" --version)" >&2 && exit 2; }
    export PYTHONPATH=$site:$PYTHONPATH
fi

if ((tier == 1)); then
    options=(--results "$results" --began "$began")
    ((dry_run)) && options+=(--dry-run)
    [[ -n $steps ]] && options+=(--steps "$steps")
    "$python" scripts/gpu_suite.py "${options[@]}"
    exit
fi

commit=unknown # as rows name it
((dry_run)) || commit=$("$python" -c 'from campaign.rows import commit; print(commit())' || echo unknown)
ended="$results/.gpu_suite-$commit" # one line for each step that ended well

summary=()
step() { # step SECONDS WRITES COMMAND...
    local limit=$1 writes=$2 began=$SECONDS code
    shift 2
    if ((dry_run)); then
        printf 'up to %4d s  writes %-32s  %s\n' "$limit" "$writes" "$*"
        return
    fi
    if ((!fresh)) && grep -qxF -- "$*" "$ended" 2>/dev/null; then
        summary+=("$(printf 'ended before     %s' "$*")")
        return
    fi
    printf '\n== %s\n' "$*"
    timeout --kill-after=10 "$limit" "$@"
    code=$?
    ((code == 0)) && echo "$*" >>"$ended"
    ((code == 124 || code == 137)) && echo "stopped after $limit s; what it had written is kept"
    summary+=("$(printf 'exit %3d  %4d s  %s' $code $((SECONDS - began)) "$*")")
}

if ((!dry_run)); then
    "$python" -m gpu.ready || exit
    mkdir -p "$results"
fi
brief=()
((quick)) && brief=(--quick)

# A warning of the installed versions is shown, and fails no test of the GPU.
tests=("$python" -m pytest -q -m gpu -W default)

step 60 - "$python" -m kvoffload.cli env
step 300 - "${tests[@]}" -k "not sanitizer" tests/test_gpu.py -s
step 200 - "${tests[@]}" -k sanitizer tests/test_gpu.py
step 400 - "${tests[@]}" tests/test_{segment_attention,stored_attention,merge,rope,linear_rope,ops}.py
step 180 - "${tests[@]}" tests/test_profiler.py
step 240 "$results/kernels.csv" "$python" scripts/bench_kernels.py "${brief[@]}" --csv "$results/kernels.csv"
step 120 "$results/profile.json" "$python" -m kvoffload.cli profile "${brief[@]}" --output "$results/profile.json"
step 200 "$results/transfer.csv" "$python" scripts/bench_transfer.py --csv "$results/transfer.csv"
presets=(opt-6.7b llama-3.1-8b opt-30b llama-2-7b opt-13b llama-2-13b)
((quick)) && presets=(opt-6.7b llama-3.1-8b)
for preset in "${presets[@]}"; do
    step 240 "$results/decode.csv" "$python" scripts/bench_decode.py --preset "$preset" --csv "$results/decode.csv"
done
campaign=(--budget-minutes 40 --repeats 5)
((quick)) && campaign=(--budget-minutes 5 --repeats 1)
step 3000 "$results/campaign.csv" "$python" scripts/bench_campaign.py "${campaign[@]}" --csv "$results/campaign.csv"
step 600 "$results/ablation.csv" "$python" scripts/ablation.py "${brief[@]}" --csv "$results/ablation.csv"

((dry_run)) || printf '%s\n' "" "summary, rows in $results:" "${summary[@]}"
