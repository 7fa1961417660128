# Sourced by train.sh and test.sh: makes .venv in the clone with what pyproject.toml asks for, once, and puts it first on
# the PATH. A mark, renewed when pyproject.toml changes, makes later starts quick. PYTHON chooses another interpreter.
#
#   source scripts/setup.sh EXTRA      EXTRA: "" or an extra of pyproject.toml, as in test

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
extra=${1:-}
mark=.venv/.installed${extra:+-$extra}
if [ ! -e "$mark" ] || [ pyproject.toml -nt "$mark" ]; then
    echo "setting up .venv (once)"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
    touch "$mark"
fi
export PATH="$PWD/.venv/bin:$PATH"
