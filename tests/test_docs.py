"""What the documentation claims to be proven is proven by a test that exists."""

import ast
import re

import pytest
from conftest import ROOT

FOLDERS = (
    ".",
    "benchmarks",
    "checkpoint",
    "data",
    "docs",
    "hf",
    "model",
    "parallelize",
    "resilience",
    "scripts",
    "tests",
)
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).iterdir()
    if path.suffix in (".py", ".md")
)
PRODUCT = [f for f in FILES if f.endswith(".py") and f.split("/")[0] not in ("tests", "scripts", "benchmarks")]
LECTURES = [f"parallelize/{name}.py" for name in (
    "mesh", "pipeline", "context", "tensor", "expert", "fsdp", "activation", "compile", "float8"
)]  # fmt: skip


def proofs(file: str) -> list[tuple[str, str]]:
    """(test file, test function) of each that the docstring's "Proof:" names."""
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
    text = docstring.partition("Proof:")[2]
    return re.findall(r"(tests/\w+\.py)::(\w+)", text)


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", [f for f in PRODUCT if "Proof:" in (ROOT / f).read_text()])
def test_proof_names_tests_that_exist(file):
    """After "Proof:", each `tests/file.py::test_name` is a test function, and there is at least one."""
    named = proofs(file)
    assert named, f'{file}: after "Proof:", name a test as tests/file.py::test_name'
    for test_file, name in named:
        assert (ROOT / test_file).is_file() and name in functions_of(test_file), f"{file}: {test_file}::{name}"


@pytest.mark.parametrize("file", LECTURES)
def test_every_lecture_has_a_proof(file):
    """Each file of parallelize/ that teaches a parallelism names the test that proves it."""
    assert proofs(file)


@pytest.mark.parametrize("file", [f for f in FILES if f.endswith(".md")])
def test_paths_in_documents_exist(file):
    """Links and `paths/with.suffix` in a document are files of the repository."""
    text = (ROOT / file).read_text()
    folder = (ROOT / file).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), f"{file} links to {link}"
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|toml|md|png|csv|json))`", text):
        assert (ROOT / path).exists() or path.startswith("outputs/"), f"{file} names {path}"
