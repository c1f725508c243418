#!/usr/bin/env bash
# Everything that only a GPU can tell, on any machine with one and without a network, unattended, in some nine minutes.
#
#   bench/gpu.sh OUT_DIR [STAGE...]        stages: install tests sanitize bench; default: all, in this order
#
#   install    wheels of the folder $WHEELS, if given (peers; build tools; whatever the machine lacks), then this project,
#              editable. Without scikit-build-core or nanobind the C++ kernels are left out; a GPU does not need them.
#   tests      every GPU test, tests.xml
#   sanitize   compute-sanitizer (memcheck) over the small GPU tests, if it is on PATH: sanitize.xml, sanitize.log
#   bench      every GPU benchmark against its peers: engine_peers.csv, roofline_<device>.csv and .png
#
# OUT_DIR also gets environment.txt and log.txt; that is all, eight files. A stage that fails, or runs out of its time,
# does not stop the next ones.
# Exit status: 0; 1 if something of ours failed; 2 for a wrong call; 3 if there is no CUDA device.
#
# PYTHON (default python3) needs torch >= 2.10, triton >= 3.6 and transformers >= 5 (with which come rich and pyyaml); the
# tests need pytest and hypothesis. Seconds of each stage: INSTALL_SECONDS, TESTS_SECONDS, SANITIZE_SECONDS, BENCH_SECONDS.
# BENCH_ARGS goes to `python -m ibtpo_kernels.roofline`, which then has all the time of the benchmarks.
# DEVICE=cpu tries the script itself where there is no GPU: tests on an emulated one, a quick benchmark of the CPU.
set -uo pipefail

readonly STAGES=(install tests sanitize bench)
readonly PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda}
readonly INSTALL_SECONDS=${INSTALL_SECONDS:-90} TESTS_SECONDS=${TESTS_SECONDS:-150}
readonly SANITIZE_SECONDS=${SANITIZE_SECONDS:-60} BENCH_SECONDS=${BENCH_SECONDS:-270}
export PATH=$PATH:/usr/local/cuda/bin # nvcc and compute-sanitizer, where nobody has said so

say() { printf '[gpu %3ds] %s\n' "$SECONDS" "$*"; }

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
}

has_module() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" 2>/dev/null; }

# within SECONDS COMMAND...: interrupted at the end of its time, so that it can still write what it has.
within() {
  local status=0
  timeout --signal=INT --kill-after=20 "$@" || status=$?
  if ((status == 124 || status == 137)); then say "stopped after $1 s"; fi
  return "$status"
}

check_device() {
  [[ $DEVICE == cpu ]] && return
  local found
  found=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>&1 | tail -n 1)
  if [[ -z $found || $found == *Error* ]]; then
    say "no CUDA device: ${found:-torch of $PYTHON sees none}. Run this on a machine with one, or DEVICE=cpu to try the script."
    exit 3
  fi
  say "on $found"
}

environment() {
  {
    date -u +%FT%TZ
    uname -srm
    git rev-parse HEAD 2>/dev/null || echo "commit ${IBTPO_COMMIT:-unknown}"
    git status --short 2>/dev/null
    nvidia-smi 2>&1
    nvcc --version 2>&1 | tail -n 2
    "$PYTHON" --version
    "$PYTHON" -m pip list 2>/dev/null |
      grep -iE '^(torch|triton|numpy|transformers|flashinfer|apache-tvm|liger|cut-cross|trl|verl|pytest|hypothesis|matplotlib|nanobind|scikit-build|ibtpo)'
  } >"$OUT/environment.txt" 2>&1
}

stage_install() {
  local without=()
  if [[ -n ${WHEELS:-} ]]; then
    local wheel install=("$PYTHON" -m pip install --quiet --no-deps --no-index)
    if ! within "$INSTALL_SECONDS" "${install[@]}" "$WHEELS"/*.whl; then
      for wheel in "$WHEELS"/*.whl; do # one by one: a wheel that does not fit this machine keeps only itself out
        if ((SECONDS > INSTALL_SECONDS)) || ! within 30 "${install[@]}" "$wheel"; then say "left out: $wheel"; fi
      done
    fi
  fi
  if ! has_module nanobind || ! command -v cmake >/dev/null || ! command -v "${CXX:-c++}" >/dev/null; then
    say "nanobind, cmake or a C++ compiler is missing: IBTPO_NO_COMPILE=1, CPU ops run on plain torch"
    without=(IBTPO_NO_COMPILE=1)
  fi
  if has_module scikit_build_core &&
    within "$INSTALL_SECONDS" env "${without[@]}" "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .; then
    return
  fi
  say "not installed (scikit-build-core missing, or the error above): used from the sources, without the C++ kernels"
}

# The sources themselves, for whatever is not installed.
use_sources() {
  if ! (cd / && "$PYTHON" -c 'import ibtpo_kernels' 2>/dev/null); then
    export IBTPO_NO_COMPILE=1 PYTHONPATH="$PWD:$PWD/engine:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
  fi
}

# Without it every kernel fails, each with a long message of its own.
check_triton() {
  [[ $DEVICE == cpu ]] && return
  local lack
  lack=$("$PYTHON" -c 'from ibtpo_kernels.self_check import triton_lacks; print(triton_lacks() or "")' 2>&1 | tail -n 1)
  if [[ -n $lack ]]; then say "$lack"; fi
}

# FlashInfer compiles its kernels at first use, for minutes: let it do so while the tests run.
compile_peers() {
  if [[ $DEVICE == cuda && " $* " == *" bench "* ]] && has_module flashinfer; then
    say "FlashInfer compiles in the background"
    WARM=$(mktemp -d)
    timeout "$TESTS_SECONDS" "$PYTHON" -m ibtpo_kernels.roofline --quick --ops tree_decode plan_decode sample \
      --out "$WARM" >"$WARM/log" 2>&1 &
    PEERS=$!
  fi
}

wait_for_peers() {
  [[ -n ${PEERS:-} ]] || return 0
  wait "$PEERS" || { say "FlashInfer may not be ready:"; tail -n 5 "$WARM/log"; }
  rm -rf "$WARM"
}

run_pytest() { # run_pytest NAME SECONDS COMMAND...: pytest behind COMMAND, junit xml into NAME.xml
  local name=$1 seconds=$2
  shift 2
  if ! has_module pytest || ! has_module hypothesis; then
    say "pytest or hypothesis is missing; put their wheels into a folder and name it in WHEELS"
    return 1
  fi
  within "$seconds" "$@" -vv -rfEs -p no:cacheprovider --junitxml "$OUT/$name.xml" # -vv: where it was, if it hangs
}

stage_tests() {
  local tests=(tests/test_step_graphs.py tests/test_gpu_parity.py tests/test_gpu.py tests/test_kernels_flashinfer.py)
  local prefix=(env) options=(--durations 15)
  if [[ $DEVICE == cpu ]]; then
    prefix=(env TRITON_INTERPRET=1 PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}")
    options+=(-p emulated_cuda)
  fi
  # Most of the time goes to compiling some hundred kernels, each on one core.
  [[ $DEVICE == cuda ]] && has_module xdist && options+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  run_pytest tests "$TESTS_SECONDS" "${prefix[@]}" "$PYTHON" -m pytest "${tests[@]}" "${options[@]}"
}

stage_sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    say "compute-sanitizer is not on PATH: left out"
    return
  fi
  # Every tensor an allocation of its own, so that an access past its end is one past an allocation.
  run_pytest sanitize "$SANITIZE_SECONDS" env IBTPO_SMALL=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all --log-file "$OUT/sanitize.log" \
    "$PYTHON" -m pytest tests/test_gpu.py -k "float16 and not bfloat16 and not graph"
}

# Out of time (124): what was measured is kept. Each group of ops has its own share, so that none takes that of the others.
roofline() { # roofline SECONDS [OPTION...]
  local seconds=$1
  shift
  # shellcheck disable=SC2086 # several words
  within "$seconds" "$PYTHON" -m ibtpo_kernels.roofline --device "$DEVICE" --out "$OUT" --seconds 0.3 \
    --limit "$((seconds * 4 / 5))" "$@" ${BENCH_ARGS:-} || (($? == 124))
}

stage_bench() {
  local share=$((BENCH_SECONDS / 10)) failed=0
  if [[ $DEVICE == cpu ]]; then
    roofline "$BENCH_SECONDS" --quick
    return
  elif [[ -n ${BENCH_ARGS:-} ]]; then
    roofline "$BENCH_SECONDS"
    return
  fi
  within "$((3 * share))" "$PYTHON" bench/engine_peers.py graphs --out "$OUT" --repetitions 3 || (($? == 124)) || failed=1
  within "$share" "$PYTHON" bench/bookkeeping.py --device cuda --out "$OUT" || (($? == 124)) || failed=1
  roofline "$share" --ops tree_decode plan_decode || failed=1
  roofline "$((2 * share))" --ops linear_logprob policy_head || failed=1
  roofline "$share" --ops sample rms_norm add_rms_norm silu_mul rope append_kv rope_append || failed=1
  roofline "$((2 * share))" --ops tree_attention tree_attention_by_depth batch_invariant_linear \
    linear_sampled_logprob sampled_logprob || failed=1
  return "$failed"
}

main() {
  local stage failed=()
  check_device
  [[ " $* " == *" install "* ]] && { say "install"; stage_install || failed+=(install); }
  use_sources
  check_triton
  environment
  for stage in "${STAGES[@]:1}"; do
    [[ " $* " == *" $stage "* ]] || continue
    say "$stage"
    [[ $stage == tests ]] && compile_peers "$@"
    [[ $stage == bench ]] && wait_for_peers
    case $stage in
      tests) stage_tests ;;
      sanitize) stage_sanitize ;;
      bench) stage_bench ;;
    esac || failed+=("$stage")
  done
  if ((${#failed[@]})); then
    say "FAILED: ${failed[*]}; see $OUT/log.txt"
    return 1
  fi
  say "done: $*"
}

if (($# == 0)) || [[ $1 == -* ]]; then usage; fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd) || exit 2
readonly OUT
shift
(($#)) || set -- "${STAGES[@]}"
for stage in "$@"; do [[ " ${STAGES[*]} " == *" $stage "* ]] || usage; done
cd "$(dirname "$0")/.." || exit 2
main "$@" 2>&1 | tee "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
