# Sourced by ./dit-sparse, ./run-tests and .ci/run (POSIX sh). Needs $root, the repository's folder.
#
#   setup_environment LEVEL     LEVEL: run (what `dit-sparse` needs) or dev (tests, linters and extras as well)
#
# makes a virtual environment in .dit-sparse/venv with the versions of constraints/tested.txt and sets $venv. A stamp
# is written last: without it the environment counts as half made and is made anew. With it nothing is done, so a
# second run costs some milliseconds.

home=${DIT_SPARSE_HOME:-$root/.dit-sparse}
# The scripts change the folder later on.
case $home in /*) ;; *) home=$(pwd)/$home ;; esac
venv=$home/venv

say() {
    printf 'dit-sparse: %s\n' "$*" >&2
}

stop() {
    say "$*"
    exit 2
}

# Prints the path of a Python that can be used. Otherwise stops with one line that says what to install.
find_python() {
    old= bare=
    names=${DIT_SPARSE_PYTHON:-python3 python3.13 python3.12 python3.11 python}
    for name in $names; do
        path=$(command -v "$name" 2>/dev/null) || continue
        version=$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if ! "$path" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
            old=${old:-$version ($path)}
        elif ! "$path" -c 'import venv, ensurepip; ensurepip.version()' >/dev/null 2>&1; then
            bare=${bare:-$version ($path)}
            bare_version=${bare_version:-$version}
        else
            printf '%s\n' "$path"
            return
        fi
    done
    [ -z "$bare" ] || stop "Python $bare cannot make virtual environments; run: sudo apt install python$bare_version-venv"
    [ -z "$old" ] || stop "needs Python 3.11 or newer, found only $old; run: sudo apt install python3.11 python3.11-venv"
    stop "found no Python ($names); needs 3.11 or newer; run: sudo apt install python3 python3-venv"
}

# What the environment was made for: this folder, these requirements, these extras.
fingerprint() {
    printf '%s %s ' "$root" "$1"
    cat "$root/pyproject.toml" "$root/constraints/tested.txt" | cksum
}

is_ready() {
    [ -x "$venv/bin/python" ] && [ -f "$home/ready-$level" ] &&
        [ "$(cat "$home/ready-$level")" = "$(fingerprint "$extras")" ]
}

# pip shows its progress on a terminal; elsewhere its output goes to a log, whose end is shown when it fails.
run_pip() {
    if [ -t 2 ]; then
        "$venv/bin/python" -m pip --disable-pip-version-check install "$@" >&2 || stop "the installation failed (see above)"
    elif ! "$venv/bin/python" -m pip --disable-pip-version-check install -q "$@" >"$home/setup.log" 2>&1; then
        tail -n 5 "$home/setup.log" >&2
        stop "the installation failed; all of pip's output is in $home/setup.log"
    fi
}

setup_environment() {
    level=$1
    extras=
    [ "$level" = run ] || extras=dev,eval,app
    # PyTorch's build for CUDA comes with its own Triton; the extra makes sure of it.
    if command -v nvidia-smi >/dev/null 2>&1; then extras=${extras:+$extras,}gpu; fi
    if is_ready; then return; fi

    python=$(find_python) || exit 2
    mkdir -p "$home" || stop "cannot write $home"
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$home/lock"
        flock -n 9 || { say "another set-up is running; waiting for it"; flock 9; }
        if is_ready; then exec 9>&-; return; fi
    fi
    # A finished environment of this very folder can be updated; programs in it hold the folder's path.
    if ! grep -q -x -F "$root" "$home/folder" 2>/dev/null || [ ! -x "$venv/bin/python" ]; then
        say "making a virtual environment in $venv (once; some minutes)"
        rm -rf "$venv"
        "$python" -m venv "$venv" >"$home/setup.log" 2>&1 ||
            stop "$python could not make a virtual environment in $venv; see $home/setup.log"
    else
        say "bringing the virtual environment in $venv up to date"
    fi
    rm -f "$home"/ready-* "$home/folder"
    run_pip -c "$root/constraints/tested.txt" -e "$root${extras:+[$extras]}"
    # What was installed for the tests serves the command too.
    for done_level in run "$level"; do
        made_for=$extras
        if [ "$done_level" = run ]; then
            case $extras in *gpu*) made_for=gpu ;; *) made_for= ;; esac
        fi
        fingerprint "$made_for" >"$home/ready-$done_level"
    done
    printf '%s\n' "$root" >"$home/folder"
    exec 9>&-
    say "set-up finished"
}
