#!/usr/bin/env bash
# Makes the workbook's Python environment, or brings it up to date. Run by `make setup`, and so by
# every other target; returns at once when there is nothing to do.
#
#   experiments/setup.sh           make it
#   experiments/setup.sh --where   print where it is or would be
#
# .venv (a virtual environment), or .conda where conda or mamba is installed. It ends with a stamp
# that names what was installed; an interrupted first installation is made anew, a changed
# pyproject.toml is installed on top. A .venv that was there before is its owner's: it is installed
# into, its stamp begins with "adopted", and nothing here ever removes it.
#
#   USE_CONDA=0   a virtual environment even where conda is installed
#   GATO_ENV=dir  an environment of your own: used as it is, nothing is installed
#   GATO_NO_APT=1 never call apt-get (it is called only by root, on Debian and its kin)
#   EXTRAS=dev    extras of pyproject.toml to install, e.g. dev,cuda or dev,tpu (not with conda)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "setup: $*"; }
die() { printf '%s\n' "setup: $*" >&2; exit 1; }
trap 'die "interrupted; run make again"' INT TERM

conda=
if [[ -z ${GATO_ENV:-} && ${USE_CONDA:-1} != 0 ]]; then
  conda=$(command -v mamba || command -v conda || printf '%s' "${CONDA_EXE:-}")
fi
if [[ -n ${GATO_ENV:-} ]]; then env=$(cd "$GATO_ENV" 2>/dev/null && pwd) || die "GATO_ENV: no folder $GATO_ENV"
elif [[ -n $conda ]]; then env=$PWD/.conda
else env=$PWD/.venv
fi
if [[ ${1:-} == --where ]]; then printf '%s\n' "$env"; exit; fi

python=$env/bin/python
stamp=$env/.gato-stamp
extras=${EXTRAS:-dev}

sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }
# The folder is part of it: an environment does not survive being moved.
key=$({ cat pyproject.toml environment.yml experiments/setup.sh; printf '%s' "$extras $env"; } |
  sha256 | cut -d ' ' -f 1)

# Installs Debian packages as root; for anyone else prints the line that does, and fails.
apt_install() {
  if [[ $(id -u) == 0 && -z ${GATO_NO_APT:-} ]] && command -v apt-get >/dev/null; then
    say "installing $* with apt-get"
    if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y \
      --no-install-recommends "$@"; } >/dev/null 2>&1; then return 0; fi
  fi
  say "please run: sudo apt-get install -y $*"
  return 1
}

is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in python3.11 python3 python; do
    if is_311 "$candidate"; then printf '%s' "$candidate"; return; fi
  done
  return 1
}

make_venv() {
  local base
  if ! base=$(find_python); then
    say "Python 3.11 is needed; this machine has $(python3 --version 2>&1 || true)"
    apt_install python3.11 python3.11-venv || die "or install mamba or conda; then run make again"
    base=python3.11
  fi
  if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
    say "$base cannot make virtual environments"
    apt_install python3.11-venv || die "then run make again"
  fi
  mkdir -p "$env"
  echo building >"$stamp"
  "$base" -m venv "$env"
}

# Runs an installer: its output goes to a log, one line tells how far it is.
follow() {
  local log packages=0 line
  log=$(mktemp)
  if ! "$@" 2>&1 | tee "$log" | while IFS= read -r line; do
    case $line in
      Collecting* | Processing*)
        packages=$((packages + 1))
        if [[ -t 1 ]]; then printf '\rsetup: %d packages fetched ' "$packages"
        elif ((packages % 50 == 0)); then say "$packages packages fetched"; fi ;;
      "Installing collected packages"*)
        if [[ -t 1 ]]; then printf '\r'; fi
        say "$packages packages fetched, unpacking them" ;;
    esac
  done; then
    tail -n 15 "$log" >&2
    die "the installation failed (above: the end of $log); run make again to retry"
  fi
  rm -f "$log"
}

# The kernel "python3" is started with these by JupyterLab, papermill and nbval alike. Huge pages
# and a compilation cache each save up to half the time.
install_kernel() {
  local variables=(
    --env JAX_COMPILATION_CACHE_DIR "$env/share/jax-cache"
    --env JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS 0
    --env JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES -1
  )
  if [[ $(uname -s) == Linux ]]; then
    variables+=(--env GLIBC_TUNABLES glibc.malloc.hugetlb=1 --env MUJOCO_GL egl)
  fi
  "$python" -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (gato)" \
    "${variables[@]}" >/dev/null
}

# Tasks that are seen as pictures of MuJoCo's scenes need this, and so do films.
check_rendering() {
  [[ $(uname -s) == Linux ]] || return 0
  local probe='import mujoco; mujoco.GLContext(16, 16).make_current()'
  MUJOCO_GL=egl "$python" -c "$probe" >/dev/null 2>&1 && return 0
  say "libraries for rendering without a screen are missing"
  if apt_install libegl1 libegl-mesa0 libgl1-mesa-dri &&
    MUJOCO_GL=egl "$python" -c "$probe" >/dev/null 2>&1; then return 0; fi
  die "then run make again"
}

if [[ -n ${GATO_ENV:-} ]]; then
  is_311 "$python" || die "GATO_ENV: $python is not Python 3.11"
  (cd / && "$python" -c 'import gato_lib') 2>/dev/null ||
    die "GATO_ENV: gato_lib is not installed there; run: $python -m pip install -e '.[dev]'"
  say "using $env"
  exit
fi

done_key=$(cat "$stamp" 2>/dev/null || true)
adopted=
if [[ $done_key == adopted* || ( -z $conda && -z $done_key && -e $env ) ]]; then adopted="adopted "; fi
if [[ $done_key == "$adopted$key" ]] && is_311 "$python"; then
  say "${env##*/} is up to date"
  exit
fi
if [[ -e $env ]]; then # what was begun here and not finished, or has lost its Python, is made anew
  if [[ $done_key == building || ( -z $done_key && -n $conda ) ]]; then
    say "the last installation was interrupted; starting again"
    rm -rf "$env"
  elif ! is_311 "$python"; then
    [[ -z $adopted ]] || die "${env##*/} is not Python 3.11; move it away and run make again"
    rm -rf "$env"
  fi
fi

begin=$SECONDS
if [[ -e $env ]]; then say "bringing ${env##*/} up to date"
else say "making ${env##*/} (about 175 packages, 1.5 GB; a few minutes)"
fi
if [[ -n $conda ]]; then
  verb=(create)
  if [[ -e $env ]]; then verb=(update --prune); fi
  rm -f "$stamp"
  export CONDA_ALWAYS_YES=1 MAMBA_ALWAYS_YES=1 # conda's name for it, and mamba's
  follow "$conda" env "${verb[@]}" --prefix "$env" --file environment.yml
else
  # Until this is done, the stamp must fit no key: an interrupted update is installed again.
  if [[ -e $env ]]; then echo "${adopted:-updating}" >"$stamp"; else make_venv; fi
  follow "$python" -m pip install --disable-pip-version-check --progress-bar off -e ".[$extras]"
fi
install_kernel
check_rendering
printf '%s\n' "$adopted$key" >"$stamp.new" && mv "$stamp.new" "$stamp"
say "${env##*/} is ready after $((SECONDS - begin)) s: $("$python" --version), $(
  "$python" -c 'from importlib.metadata import version as v; print("jax", v("jax"), "flax", v("flax"))')"
