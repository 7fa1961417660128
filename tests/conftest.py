"""Shared by all tests: the repository on the path of every process, and few threads, as there may be few cores."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo's remarks on host names

pytest.register_assert_rewrite("helpers.traffic")  # so that what differs is shown


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="write docs/*.md from what tests prove")


def pytest_sessionfinish(session):
    if session.config.getoption("--write-docs") and not hasattr(session.config, "workerinput"):
        from helpers import fault_table

        reports = session.config.pluginmanager.get_plugin("terminalreporter").stats
        fault_table.write({report.nodeid.split("[")[0] for report in reports.get("passed", ())})
