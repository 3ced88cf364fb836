"""The list of further cases names tests that there are; what it leaves out is what the rule says."""

import ast
from collections import defaultdict
from pathlib import Path

from tests import more


def _tests(file: str) -> set[str]:
    tree = ast.parse(Path(file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_line_names_a_test():
    by_file = defaultdict(set)
    for case in more.listed():
        file, *_, name = case.split("[")[0].split("::")
        by_file[file].add(name)
    assert by_file
    for file, names in by_file.items():
        assert Path(file).exists(), f"tests/more.txt names {file}, which is gone: make the list again"
        assert names <= _tests(file), f"tests/more.txt names {names - _tests(file)} of {file}: make the list again"


def test_first_cases_stay():
    times = {
        "a.py::f[x]": 0.6 * more.SECONDS,
        "a.py::f[y]": 0.6 * more.SECONDS,
        "a.py::f[z]": 0.3 * more.SECONDS,
        "a.py::g[x]": 1.1 * more.SECONDS,
        "a.py::g[y]": 0.1 * more.SECONDS,
        "a.py::h": 1.1 * more.LONGEST,
    }
    assert more.further(times, times) == ["a.py::f[y]", "a.py::g[y]", "a.py::h"]


def test_times_are_read_by_pytests_names(tmp_path):
    (tmp_path / "times.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.core.test_bits" name="test_a[int8-3]" time="0.5"/>'
        '<testcase classname="jaxcomp.core.bits" name="jaxcomp.core.bits.f" time="1"/></testsuite></testsuites>'
    )
    assert more.timed(tmp_path / "times.xml") == {"tests/core/test_bits.py::test_a[int8-3]": 0.5}
