#!/bin/sh
# Makes .venv in the checkout: the tested versions, each file by its SHA-256 (requirements.lock), and this package, editable.
# An index that builds files of its own has other sums: NO_HASHES=1 takes the versions of constraints.txt alone.
#
#   .venv/.stamp holds the key of what is installed   -> nothing to do, back in milliseconds
#   .venv/.stamp holds another key                    -> pip brings the environment up to date
#   .venv/.unfinished, a Python that does not run,
#   or a stamp from another folder                    -> start again from nothing
#
# Why from nothing: pip takes a package that an interrupted run left half copied for an installed one,
# and the programs of a copied .venv start the Python of the original.
# `venv.sh latest` makes .venv-latest: the newest that pyproject.toml allows, on the torch of constraints.txt (a newer
# one would be gigabytes to fetch). Its stamp holds the day too, so that it is brought up to date once a day.
# POSIX sh; works with every pip that Python 3.10 to 3.13 ships. PYTHON=… chooses the interpreter.
set -eu

cd "$(dirname "$0")/.."
here=$(pwd -P)
case ${1:-} in
  '') venv=.venv pins=constraints.txt upgrade= day= ;;
  latest) venv=.venv-latest pins=.venv-latest/torch.txt upgrade='--upgrade --upgrade-strategy eager' day=", $(date +%F)" ;;
  *) printf 'venv.sh: found %s, expected nothing or: latest\n' "$1" >&2; exit 2 ;;
esac
log=$venv/install.log
# A stray PYTHONPATH would pass other people's packages off as installed; PIP_USER fights every virtual environment.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
# What builds the one package that comes as source: the second name since pip 25.3, the first before.
export PIP_CONSTRAINT=scripts/build-constraints.txt PIP_BUILD_CONSTRAINT=scripts/build-constraints.txt

# Two lines: what the environment was built from, and where.
key="$(cat pyproject.toml constraints.txt requirements.lock scripts/build-constraints.txt | cksum), $(grep '^__version__' instructft/version.py)$day
$here"

if [ ! -e $venv/.unfinished ] && [ "$(cat $venv/.stamp 2>/dev/null)" = "$key" ] && $venv/bin/python -c '' 2>/dev/null; then
  exit 0
fi

say() { printf '%s\n' "$@"; }
fail() { say "$@" >&2; exit 1; }

# Prints the first Python that fits and can make a virtual environment. A pyenv shim may exist and yet not run.
find_python() {
  unfit= no_venv=
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.12 python3.11 python3.13 python3.10 python; fi
  for name; do
    version=$("$name" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
    case $version in
      3.10.* | 3.11.* | 3.12.* | 3.13.*) ;;
      *) unfit="$unfit $name ($version)"; continue ;;
    esac
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then say "$name"; return; fi
    no_venv="$no_venv $name ($version)"
  done
  if [ -n "$no_venv" ]; then
    fail "No virtual environment can be made with$no_venv: its venv module is missing." \
      "On Debian and Ubuntu: apt install python3-venv"
  fi
  fail "No Python 3.10 to 3.13 found${unfit:+; found$unfit}${PYTHON:+; looked for $PYTHON}." \
    "Install one, or name it: make venv PYTHON=/path/to/python3.12"
}

# step TITLE COMMAND…: one line a step, which counts the seconds where a person watches.
step() {
  title=$1; shift
  begun=$(date +%s)
  if [ -t 1 ]; then
    (while kill -0 $$ 2>/dev/null; do
      printf '\r\033[K%s … %s s' "$title" $(($(date +%s) - begun)); sleep 1
    done) & ticker=$!
  else
    say "$title …"
  fi
  code=0
  "$@" >>$log 2>&1 </dev/null || code=$?
  if [ -n "$ticker" ]; then kill "$ticker" 2>/dev/null || :; ticker=; printf '\r\033[K'; fi
  if [ $code -ne 0 ]; then
    tail -n 20 $log >&2
    fail "$title: failed after $(($(date +%s) - begun)) s. The whole log: $here/$log"
  fi
  say "$title: $(($(date +%s) - begun)) s"
}

ticker=
trap '[ -z "$ticker" ] || kill "$ticker" 2>/dev/null' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

usable() {
  [ ! -e $venv/.unfinished ] && $venv/bin/python -c '' && { [ ! -e $venv/.stamp ] || grep -qxF "$here" $venv/.stamp; } &&
    { $venv/bin/python -m pip --version || $venv/bin/python -m ensurepip; } # `uv venv` makes one without pip
}

if ! usable >/dev/null 2>&1; then
  python=$(find_python)
  [ ! -e $venv ] || say "Removing an unfinished or foreign $venv."
  rm -rf $venv
  mkdir $venv
  touch $venv/.unfinished
  step "[1/4] virtual environment $venv, $("$python" --version)" "$python" -m venv $venv
else
  touch $venv/.unfinished
  : >$log
  say "[1/4] virtual environment $venv, $($venv/bin/python --version): here already"
fi
rm -f $venv/.stamp
[ $pins = constraints.txt ] || grep '^torch==' constraints.txt >$pins
# torch first and alone: it is most of the download, and its version decides what everything after it may ask for.
step "[2/4] torch, 0.2 to 3 GB to fetch the first time" $venv/bin/python -m pip install --no-compile -c $pins torch
from_the_lock() {
  $venv/bin/python -m pip install --no-compile --no-deps --require-hashes -r requirements.lock &&
    $venv/bin/python -m pip install --no-compile --no-deps --no-build-isolation -e .
}
if [ $pins = constraints.txt ] && [ -z "${NO_HASHES:-}" ]; then
  set -- from_the_lock
else
  # shellcheck disable=SC2086  # $upgrade is several words, or none
  set -- $venv/bin/python -m pip install --no-compile $upgrade -c $pins -e ".[dev,quant,ui]"
fi
step "[3/4] instructft and what it stands on" "$@"
# pip would compile 15,000 files, most never imported (--no-compile: half the time); this compiles those that are.
step "[4/4] first start" $venv/bin/python -c '
import datasets, matplotlib.pyplot, peft, pytest, sacrebleu, tensorboard, torch, transformers, trl
import transformers.models.gpt2.modeling_gpt2, transformers.models.llama.modeling_llama
trl.SFTTrainer'
printf '%s\n' "$key" >$venv/.stamp
rm -f $venv/.unfinished
