# Sourced by the other scripts: creates .venv in the clone with the dependencies of pyproject.toml, and puts it first on
# the PATH. Later starts are quick: a marker file tells that .venv is newer than pyproject.toml. The environment
# variable PYTHON names the interpreter to use.
#
#   source scripts/setup.sh EXTRA      EXTRA: "" or an extra of pyproject.toml, such as test

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
extra=${1:-}
marker=.venv/.installed${extra:+-$extra}
if [ ! -e "$marker" ] || [ pyproject.toml -nt "$marker" ]; then
    echo "setting up .venv (once)"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
    touch "$marker"
fi
export PATH="$PWD/.venv/bin:$PATH"
