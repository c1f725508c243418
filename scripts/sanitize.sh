#!/usr/bin/env bash
# Run the kernel tests with the compiled kernels built to check themselves: AddressSanitizer (no access outside a
# tensor, a page table or a scratch buffer) and UndefinedBehaviorSanitizer (no overflow, no misaligned or invalid value).
#
#   scripts/sanitize.sh [ISA...]      default: every instruction set that was built and runs here
#
# The checked module is built in build/sanitize and takes the place of the installed one only in the processes started
# here (tests/sanitized.py). Leaks are not looked for: Python and torch keep memory until the process ends on purpose.
# PYTEST_ARGS are passed on; CMAKE_ARGS too, such as -DIBTPO_EMULATE_AVX512=ON where the build has that option.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PYTHON=${PYTHON:-.venv/bin/python} BUILD=build/sanitize

say() { printf '[sanitize] %s\n' "$*"; }

# The run-time library of the compiler in use has to come before everything else in the process; and the C++ library with
# it, for the sanitizer looks up what throws exceptions when it starts.
preload() {
  local compiler name path
  compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$BUILD/CMakeCache.txt")
  for name in libasan.so "libclang_rt.asan-$(uname -m).so" libclang_rt.asan.so; do
    path=$("$compiler" -print-file-name="$name")
    if [[ $path == */* && -e $path ]]; then
      printf '%s %s' "$(readlink -f "$path")" "$("$compiler" -print-file-name=libstdc++.so.6)"
      return
    fi
  done
  say "$compiler has no shared AddressSanitizer library; install it (Debian: libasan, libclang-rt-dev) or set CXX" >&2
  return 1
}

build() {
  local generator=()
  if [[ ! -e $BUILD/CMakeCache.txt ]] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
  # shellcheck disable=SC2086 # several words
  cmake -S . -B "$BUILD" "${generator[@]}" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DIBTPO_SANITIZE=ON \
    -DPython_EXECUTABLE="$(realpath -s "$PYTHON")" \
    -Dnanobind_DIR="$("$PYTHON" -m nanobind --cmake_dir)" ${CMAKE_ARGS:-} >"$BUILD.log" 2>&1 &&
    cmake --build "$BUILD" >>"$BUILD.log" 2>&1 || { cat "$BUILD.log" >&2; return 1; }
}

run() { # run COMMAND...: with the checked module in place of the installed one
  local module=("$BUILD"/_cpu*.so)
  LD_PRELOAD=$LIBRARY PYTHONPATH=tests IBTPO_CHECKED=$(realpath "${module[0]}") PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:quarantine_size_mb=32 UBSAN_OPTIONS=print_stacktrace=1 "$@"
}

main() {
  mkdir -p build
  say "building into $BUILD"
  build
  LIBRARY=$(preload)
  readonly LIBRARY

  # A sanitizer that is not there would pass every test: see it stop a process first.
  if run "$PYTHON" tests/sanitized.py >"$BUILD.log" 2>&1 || ! grep -q "AddressSanitizer: heap-buffer-overflow" "$BUILD.log"; then
    cat "$BUILD.log" >&2
    say "an access past the end of a tensor was not reported: the sanitizer does not work here" >&2
    return 1
  fi

  local isa isas=("$@") status=0
  if ((${#isas[@]} == 0)); then read -ra isas <<<"$(run "$PYTHON" tests/sanitized.py --isas)"; fi
  for isa in "${isas[@]}"; do
    say "tests with $isa"
    # shellcheck disable=SC2086 # several words
    run env IBTPO_CHECKED_ISA="$isa" "$PYTHON" -m pytest -p sanitized -p no:cacheprovider \
      tests/test_kernels_*.py tests/test_native_decoder.py ${PYTEST_ARGS:-} || status=1
  done
  if ((status != 0)); then say "FAILED; the report is above" >&2; else say "clean: ${isas[*]}"; fi
  return "$status"
}

main "$@"
