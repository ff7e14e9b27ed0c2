"""The course: one source, a grader that nothing a student writes can stop, and the audit's verdicts."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import exercises

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A student's copy."""
    folder = tmp_path_factory.mktemp("course") / "copy"
    exercises.make(folder)
    return folder


def graded(folder, *numbers):
    """{check's number: its entry} of results.json."""
    report = Path(folder).parent / "results.json"
    exercises.grade(Path(folder), numbers, report)
    return {test["number"]: test for test in json.loads(report.read_text())["tests"]}


def points(tests, exercise=None):
    return round(sum(test["score"] for number, test in tests.items()
                     if exercise is None or number.startswith(f"{exercise}.")), 2)


def changed(copy, tmp_path, name, old, new):
    """The repository's files in a folder of their own, with one change in one of them."""
    folder = tmp_path / "hand-in"
    folder.mkdir()
    for file in exercises.FILES:
        shutil.copyfile(ROOT / file, folder / file)
    source = (folder / name).read_text()
    assert old in source
    (folder / name).write_text(source.replace(old, new))
    return folder


def test_the_repository_gets_all_points(tmp_path):
    """Which is also a test of the repository: the checks compare with computations of their own."""
    report = tmp_path / "results.json"
    exercises.main(["grade", str(ROOT), "--json", str(report)])
    tests = {test["number"]: test for test in json.loads(report.read_text())["tests"]}
    assert {number: test["output"] for number, test in tests.items() if test["status"] == "failed"} == {}
    assert points(tests) == 85  # 80, and 5 of the optional exercise


def test_a_students_copy_imports_and_has_no_points(copy):
    names = [name[:-3] for name in [*exercises.FILES, "sample.py"]]
    code = f"import sys; sys.path.insert(0, {str(copy)!r}); import {', '.join(names)}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=copy)
    assert not any((copy / name).exists() for name in (".git", "tests/audit", "docs/answers.md", ".ci"))
    assert "```python" not in (copy / "docs" / "tutorial.md").read_text()
    assert points(graded(copy)) == 0
    for name in exercises.FILES:  # signature and docstring are kept
        ours, theirs = (ast.parse((folder / name).read_text()) for folder in (ROOT, copy))
        for function in (f.split(": ")[1] for e in exercises.EXERCISES for f in e.functions if f.startswith(name)):
            one, other = exercises.find(ours, function), exercises.find(theirs, function)
            assert ast.dump(one.args) == ast.dump(other.args) and ast.get_docstring(one) == ast.get_docstring(other)
            assert exercises.is_stub(other) and not exercises.is_stub(one)


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=lambda exercise: exercise.name)
def test_an_exercise_stands_alone(copy, tmp_path, exercise):
    """With its functions alone put back into a student's copy it has full points."""
    folder = tmp_path / "hand-in"
    folder.mkdir()
    for name in exercises.FILES:
        tree, whole = ast.parse((copy / name).read_text()), ast.parse((ROOT / name).read_text())
        for function in (f.split(": ")[1] for f in exercise.functions if f.startswith(name)):
            exercises.put(tree, function, exercises.find(whole, function))
        (folder / name).write_text(ast.unparse(tree))
    tests = graded(folder, exercise.number)
    assert {number: test["output"] for number, test in tests.items() if test["status"] == "failed"} == {}


def test_make_writes_no_folder_that_has_something(copy, tmp_path, capsys):
    for folder, word in ((copy, "is there already"), (ROOT / "inside", "inside")):
        with pytest.raises(SystemExit) as stop:
            exercises.main(["make", str(folder)])
        assert stop.value.code == 2 and word in capsys.readouterr().err
    with pytest.raises(SystemExit):
        exercises.main(["grade", str(tmp_path / "nowhere")])
    assert "no such folder" in capsys.readouterr().err


FIRST_LINE = "    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)"  # of rotate, exercise 2


@pytest.mark.parametrize("line, hint", [
    ("while True: pass", "does a loop never end"),
    ("kept = []\n    while True: kept.append(torch.empty(2**26))", "memory"),
    ("import sys; sys.exit(0)", "sys.exit"),
    ("import os; os._exit(0)", "ended the process"),
    ("print('x' * 10**7); raise KeyError('y')", "KeyError"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended the process"),
    ("import os; [os.fork() for _ in range(2)]; raise ValueError('many')", "ValueError"),
    ("import os; os.closerange(3, 99)", "ended the process"),
    ("for fd in range(3, 99):\n        try: __import__('os').write(fd, b'?\\n')\n        except OSError: pass", "nonsense"),
    ("raise NotImplementedError", "not implemented")])
def test_what_a_student_writes_costs_its_own_checks(copy, tmp_path, line, hint):
    """The checks of rotate, and not the one of rotary_table; and the report is written."""
    folder = changed(copy, tmp_path, "d2c.py", FIRST_LINE, f"    {line}\n{FIRST_LINE}")
    tests = graded(folder, 2)
    failed = [test for test in tests.values() if test["status"] == "failed"]
    assert failed and len(failed) < len(tests)
    assert any(hint in test["output"] for test in failed), [test["output"] for test in failed]


def test_missing_files_and_syntax_errors(copy, tmp_path):
    """A function with a syntax error, or a file that is not there, costs its own exercises."""
    folder = changed(copy, tmp_path, "d2c.py", FIRST_LINE, "    a, b = = x\n")
    (folder / "fid.py").unlink()
    tests = graded(folder, 2, 5, 10)
    assert points(tests, 5) == 11 and points(tests, 10) == 0 and 0 < points(tests, 2) < 5
    assert any("not there" in test["output"] for test in tests.values())


def test_deleting_the_grader_changes_no_points(copy, tmp_path):
    """All that the grader needs is read before the first line of a student runs."""
    repository, report = tmp_path / "repository", tmp_path / "results.json"
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".git", "runs", "docs", "audit"))
    folder = changed(copy, tmp_path, "d2c.py", FIRST_LINE,
                     f"    import shutil; shutil.rmtree({str(repository)!r}, ignore_errors=True)\n{FIRST_LINE}")
    subprocess.run([sys.executable, repository / "tests" / "exercises.py", "grade", folder, "--exercise", "2", "3", "10",
                    "--json", report], check=True, cwd=tmp_path)
    assert json.loads(report.read_text())["score"] == 21 and not (repository / "tests").exists()


def test_a_missing_function_costs_itself(copy, tmp_path):
    folder = changed(copy, tmp_path, "d2c.py", "def rotate(x, table):", "def turn(x, table):")
    tests = graded(folder, 2, 3)
    assert points(tests, 3) == 9 and 0 < points(tests, 2) < 5


def test_the_audit_counts(tmp_path, capsys):
    """A mistake, a right variant, one that does not apply, in one file."""
    (tmp_path / "some.py").write_text("""# file: d2c.py
# function: ema_decay
# exercise: training
# kind: mutant
# why: no such function in that file
def ema_decay(step, longest):
    return longest
# file: train.py
# function: ema_decay
# exercise: training
# kind: mutant
# why: no warm-up
def ema_decay(step, longest):
    return longest
# file: train.py
# function: ema_decay
# exercise: training
# kind: right
# why: the same, with a condition
def ema_decay(step, longest):
    young = (1 + step) / (10 + step)
    return young if young < longest else longest
""")
    exercises.audit([tmp_path], verbose=True)
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "mistakes caught: 1 of 1; right variants accepted: 1 of 1"
    assert "does not apply: some[0]" in said and re.search(r"caught: some\[1\].*no warm-up\n +\S", said)
    assert "accepted: some[2]" in said


def test_the_planted_mistakes_are_many():
    """The whole audit takes minutes; a command runs it: python tests/exercises.py audit."""
    found = exercises.replacements(exercises.AUDIT)
    kinds = [replacement.facts["kind"] for replacement in found]
    functions = {function for exercise in exercises.EXERCISES for function in exercise.functions}
    for function in functions:
        name = function.split(": ")[1]
        assert sum(r.facts["function"] == name and r.facts["kind"] == "right" for r in found) >= 3, name
    assert kinds.count("mutant") >= 150
    reference = exercises.sources(ROOT)
    assert [r.name for r in found if exercises.applied(r, reference, {})[0] is None] == []
