# Shared by the scripts of this folder; source it, do not run it.
#   . "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# Sets KVANT_ROOT (the repository) and gives: say, die, print_help, job_count, setup, find_ccache.
set -euo pipefail

KVANT_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
KVANT_MODEL_DIR=${KVANT_MODEL_DIR:-$KVANT_ROOT/models}
export KVANT_MODEL_DIR

# Progress for people: on stderr, so that stdout stays what a script promises.
say() { printf '==> %s\n' "$*" >&2; }

# die MESSAGE [HINT...]: an error, and what to do about it.
die() {
  printf 'error: %s\n' "$1" >&2
  shift
  local hint
  for hint in "$@"; do printf '       %s\n' "$hint" >&2; done
  exit 1
}

# print_help FILE: the comment at the head of a script, without the #s.
print_help() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$1"; }

# Compile jobs: KVANT_JOBS, else one per processor, at least 1 GiB of memory each.
job_count() {
  if [ -n "${KVANT_JOBS:-}" ]; then echo "$KVANT_JOBS"; return; fi
  local by_cpu by_memory
  by_cpu=$(nproc)
  by_memory=$(awk '/^MemAvailable:/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null || echo "$by_cpu")
  [ "${by_memory:-0}" -ge 1 ] || by_memory=1
  echo $((by_cpu < by_memory ? by_cpu : by_memory))
}

setup() { "$KVANT_ROOT/scripts/setup" "$@"; }

# The options that make CMake use ccache where it is installed; nothing else depends on ccache.
find_ccache() {
  if command -v ccache >/dev/null; then echo "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache"; fi
}
