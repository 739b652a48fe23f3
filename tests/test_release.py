"""The files of a release agree with each other, and those that GitHub reads fit its schemas."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastnorm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted(GITHUB.glob("ISSUE_TEMPLATE/[!c]*.yml"))
SCHEMAS = {
    "github-workflows": sorted(GITHUB.glob("workflows/*.yml")),
    "github-issue-forms": FORMS,
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "dependabot": [GITHUB / "dependabot.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}


def test_changelog_and_citation_name_this_version_and_one_date():
    version, date = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert version == fastnorm.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation and f"\ndate-released: {date}\n" in citation


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_fit_their_schemas(schema):
    assert SCHEMAS[schema]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflows_run_targets_of_the_makefile():
    text = "".join(path.read_text() for path in SCHEMAS["github-workflows"])
    (matrix,) = re.findall(r"^ +target: \[(.*)\]$", text, re.MULTILINE)
    targets = {*re.findall(r"run: make ([a-z-]+)", text), *matrix.split(", ")}
    known = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    assert targets >= {"test-torch", "docs"} and not targets - known


def test_the_matrix_has_every_python_and_torch_that_is_supported():
    text = (GITHUB / "workflows" / "tests.yml").read_text()
    tested = {name: {*re.findall(rf'{name}: "([\d.]+)"', text)} for name in ("python", "torch")}
    for name in tested:
        tested[name] |= {*re.findall(r'"([\d.]+)"', re.search(rf"^ +{name}: \[(.*)\]$", text, re.MULTILINE)[1])}
    metadata = (ROOT / "pyproject.toml").read_text()
    assert tested["python"] == {*re.findall(r"Python :: (3\.\d+)", metadata)}
    minors = sorted(int(version.split(".")[1]) for version in tested["torch"])
    assert minors == list(range(int(re.search(r'"torch>=2\.(\d+)"', metadata)[1]), minors[-1] + 1))


def test_issue_forms_of_faults_ask_for_the_report():
    asked = {path.stem: "`python -m fastnorm`" in path.read_text() for path in FORMS}
    assert asked == {"bug": True, "request": True, "speed": True}
