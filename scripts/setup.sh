#!/usr/bin/env bash
# Make .venv: a Python >= 3.11, torch (its CPU build where there is no NVIDIA GPU), then this package, editable.
# Quiet while all goes well; where a step fails, its output is shown and nothing after it is tried.
# IBTPO_LOWEST=1: .venv-lowest instead, with the lowest version of everything that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "$0")/.."

export PIP_NO_COMPILE=1 # Python compiles a module when it is first imported; most never are
unset PYTHONDONTWRITEBYTECODE # and keeps it then: otherwise every start would compile torch anew
readonly LOWEST=${IBTPO_LOWEST:-}
readonly VENV=.venv${LOWEST:+-lowest}
readonly CPU_INDEX="https://download.pytorch.org/whl/cpu"

say() { printf '[setup] %s\n' "$*"; }

step() { # step TITLE COMMAND...
  local title=$1 log status=0
  shift
  say "$title"
  log=$(mktemp)
  "$@" >"$log" 2>&1 || status=$?
  if ((status != 0)); then
    cat "$log" >&2
    say "failed (exit $status): $*" >&2
  fi
  rm -f "$log"
  return "$status"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} ${LOWEST:+python3.11} python3 python3.13 python3.12 python3.11 python3.14 python; do
    if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  say "no Python >= 3.11 found; install one (python.org, pyenv, uv python install 3.12) or set PYTHON=/path/to/python" >&2
  return 1
}

has_gpu() { [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }

# True where pip is already configured with a folder that offers this CPU build of torch for this Python.
has_local_cpu_torch() { # has_local_cpu_torch torch==VERSION
  local folder tag
  tag=$("$VENV/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  for folder in ${PIP_FIND_LINKS:-} $("$VENV/bin/pip" config get global.find-links 2>/dev/null || true); do
    compgen -G "${folder#file://}/torch-${1#torch==}*+cpu-$tag-*.whl" >/dev/null && return 0
  done
  return 1
}

install_torch() {
  local torch="torch==2.13.0"
  [[ -z $LOWEST ]] || torch=$(requirements | grep '^torch==')
  if "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    return
  fi
  if has_gpu; then
    step "installing $torch with CUDA" "$VENV/bin/pip" install "$torch"
  elif has_local_cpu_torch "$torch"; then
    step "installing $torch (CPU build, from the configured folder)" "$VENV/bin/pip" install "$torch"
  elif ! step "installing $torch (CPU build)" "$VENV/bin/pip" install "$torch" --index-url "$CPU_INDEX"; then
    say "$CPU_INDEX cannot be reached; put a CPU build of torch into $VENV yourself and run this again" >&2
    return 1
  fi
}

install_build_tools() {
  local tools=(ninja)
  command -v cmake >/dev/null || tools+=(cmake)
  step "installing the build tools" "$VENV/bin/pip" install "${tools[@]}" -r <(requirements build)
}

# What pyproject.toml names, a requirement a line: to build, or to run and test.
# The lowest versions come without TRL, which is asked for at its newest as a peer, and wants newer ones of others.
requirements() {
  "$VENV/bin/python" - "$LOWEST" "${1:-}" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
lowest, build = sys.argv[1:]
run = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
for line in project["build-system"]["requires"] if build else run:
    if not lowest:
        print(line)
    elif not line.startswith("trl"):
        print(line.replace(">=", "==", 1))
PYTHON
}

has_compiler() {
  local compiler
  for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
    command -v "$compiler" >/dev/null && return 0
  done
  return 1
}

main() {
  local python
  python=$(find_python)
  [[ -x $VENV/bin/python ]] || step "making $VENV with $("$python" --version)" "$python" -m venv "$VENV"
  install_torch
  install_build_tools
  if [[ -z ${IBTPO_NO_COMPILE:-} ]] && ! has_compiler; then
    say "no C++ compiler found: installing without compiled kernels (slower; install g++ or clang++ and run 'make setup')"
    export IBTPO_NO_COMPILE=1
  fi
  set -m # a process group of its own, to be ended with all that it started
  step "installing its dependencies" "$VENV/bin/pip" install -r <(requirements) &
  set +m
  readonly DEPENDENCIES=$!
  trap 'kill -- "-$DEPENDENCIES" 2>/dev/null || true' EXIT
  step "meanwhile compiling and installing ibtpo" "$VENV/bin/pip" install --no-build-isolation --no-deps \
    ${LOWEST:+--config-settings=build-dir=build/lowest} -e .
  wait "$DEPENDENCIES"
  trap - EXIT
  step "importing it once" "$VENV/bin/python" -c 'import ibtpo.train'
  touch "$VENV/.installed"
  say "done"
}

main
