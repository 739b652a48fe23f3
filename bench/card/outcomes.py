"""A pytest plugin that writes a line of JSON for every test as it ends, into $CARD_RECORDS."""

import json
import os

import pytest


class Outcomes:
    """Of the process that talks to xdist's workers, or of the only one."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for every phase of a test."""
        if report.when != "call" and report.passed:
            return
        facts = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped:
            facts["why"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]
        elif report.failed:
            facts["why"] = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")][:4]
        self.record(**facts)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that can't be imported has no tests to fail."""
        if report.failed:
            why = [line for line in str(report.longrepr).splitlines() if line.startswith("E  ")][:4]
            self.record(test=report.nodeid, outcome="failed", seconds=0.0, why=why)

    def record(self, **facts: object) -> None:
        """One line."""
        with open(os.environ["CARD_RECORDS"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": "tests"} | facts) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Registers it."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes())
