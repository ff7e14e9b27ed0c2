"""The course: make a student's copy, grade it, and audit the grader itself.  docs/course.md is the handout.

    python tests/exercises.py make DIR                                  a copy of the repository, to be filled in
    python tests/exercises.py grade DIR [--exercise N] [--json FILE]    points and hints; --json for Gradescope
    python tests/exercises.py audit [DIR]                               planted mistakes must lose points, right
                                                                        variants must not

An exercise is a list of functions. Grading one takes the student's files and puts the reference's bodies into the
functions of the *other* exercises, so that each stands on its own. (In the student's copy there is no reference: there
the others are the student's.) Every check of tests/checks/ runs in a process of its own, forked from this one, with
limits on time and memory; the student's files are read once and imported from memory. So a crash, a hang or a deleted
file costs that check and nothing else. Needs a system that can fork (Linux, macOS).
"""
import argparse
import ast
import contextlib
import copy
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.optim.swa_utils
import torch.utils.data
import torch.utils.mkldnn  # noqa: F401  (what the graded files import is loaded once, here)
import torch._dynamo  # noqa: F401  (torch.compiler.disable needs it)
import PIL.ImageDraw  # noqa: F401
import PIL.ImageOps  # noqa: F401
import scipy.linalg.lapack  # noqa: F401
import scipy.special  # noqa: F401

TESTS = Path(__file__).resolve().parent
ROOT, CHECKS, AUDIT = TESTS.parent, TESTS / "checks", TESTS / "audit"
SHARED = {name: (TESTS / f"{name}.py").read_text() for name in ("adapters", "formula")}  # the checks use them
FILES = ["tokenizers.py", "fusion.py", "d2c.py", "train.py", "fid.py"]  # those that hold exercises
LEFT_OUT = {  # of a student's copy
    ".git", ".venv", "runs", "__pycache__", ".pytest_cache", "audit", "answers.md", ".ci"}
SECONDS, SECONDS_AFTER_A_HANG, DEADLINE = 6, 2, 150  # of a check; of the others of its exercise then; of all
MEMORY = 2 * 2**30  # bytes for a check


@dataclass
class Exercise:
    number: int
    name: str       # of tests/checks/NAME.py
    title: str
    points: int
    functions: list  # "file.py: function" or "file.py: Class.method"
    bonus: bool = False


EXERCISES = [
    Exercise(1, "vq", "Two bottlenecks", 9, [
        "tokenizers.py: VQTokenizer.nearest", "tokenizers.py: VQTokenizer.forward", "tokenizers.py: KLTokenizer.sample",
        "tokenizers.py: KLTokenizer.forward", "train.py: Tokenizers.revive_codes"]),
    Exercise(2, "rotary", "Where a token is: 2-D rotary positions", 5, ["d2c.py: rotary_table", "d2c.py: rotate"]),
    Exercise(3, "attention", "Causal attention and its cache", 9, [
        "d2c.py: CausalAttention.forward", "d2c.py: DiscreteGenerator.logits", "d2c.py: DiscreteGenerator.decode_one"]),
    Exercise(4, "sampling", "Drawing codes: temperature, top-k, top-p, guidance", 9, [
        "d2c.py: sample_code", "d2c.py: DiscreteGenerator.stream"]),
    Exercise(5, "diffusion", "Diffusion forwards: schedule, posterior, loss", 11, [
        "d2c.py: diffusion_schedule", "d2c.py: posterior_step", "d2c.py: diffusion_loss"]),
    Exercise(6, "reverse", "Diffusion backwards", 6, ["d2c.py: denoising_step", "d2c.py: diffusion_sample"]),
    Exercise(7, "masked", "The masked autoencoder", 9, [
        "d2c.py: pick", "d2c.py: ContinuousGenerator.encode", "d2c.py: ContinuousGenerator.decode",
        "d2c.py: ContinuousGenerator.forward"]),
    Exercise(8, "fusion", "Fusion: cross-attention, Q-Former", 7, [
        "fusion.py: CrossAttention.forward", "fusion.py: CrossAttentionFusion.prepare",
        "fusion.py: QFormerFusion.prepare", "fusion.py: AlignedFusion.prepare", "d2c.py: ContinuousGenerator.prepare"]),
    Exercise(9, "generation", "Drawing latents: token schedule and loop", 8, [
        "d2c.py: token_schedule", "d2c.py: ContinuousGenerator.stream"]),
    Exercise(10, "metrics", "Is it any good?", 7, [
        "fid.py: statistics", "fid.py: frechet_distance", "fid.py: precision_recall", "fid.py: inception_score"]),
    Exercise(11, "training", "A batch and a step (optional)", 5, [
        "train.py: learning_rate", "train.py: ema_decay", "train.py: read_codes", "train.py: read_latents"],
        bonus=True),
]


class CourseError(Exception):
    """Something the user gave cannot be used; the message names it and the remedy."""


# Functions in a file's syntax tree -----------------------------------------------------------------------------------

def find(tree, path):
    """The node of `function` or `Class.method` in a tree, or None."""
    for name in path.split("."):
        tree = next((node for node in getattr(tree, "body", []) if getattr(node, "name", None) == name), None)
    return tree


def is_stub(node):
    """Is it left to the student?"""
    last = node.body[-1]
    return len(node.body) <= 2 and isinstance(last, ast.Raise) and "NotImplementedError" in ast.dump(last)


def put(tree, path, node):
    """The tree with this node in the place of `function` or `Class.method`, or added if there is none."""
    *owner, name = path.split(".")
    body = (find(tree, owner[0]) if owner else tree).body
    for i, old in enumerate(body):
        if getattr(old, "name", None) == name:
            body[i] = node
            return
    body.append(node)


def fits(new, old):
    """May a function stand in the place of another? Its parameters must have the same names."""
    names = [[argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)] for node in (new, old)]
    return names[0] == names[1]


UNREADABLE = SyntaxError, ValueError, RecursionError, MemoryError


def readable(source):
    """The syntax tree of a source that can be compiled. Raises UNREADABLE."""
    compile(source, "a file", "exec")
    return ast.parse(source)


def salvage(source, reference, paths):
    """For a file that is missing or has a syntax error: the reference's tree with those of the student's functions that
    can be read. What cannot be read raises the error when it is called."""
    tree = copy.deepcopy(reference)
    for path in paths:
        text, indent = source, ""
        for name in path.split("."):  # from here to the next line that is not further to the right
            found = re.search(rf"^{indent}(?:class|def) {name}\b.*?(?=^ {{0,{len(indent)}}}\S|\Z)", text, re.M | re.S)
            text, indent = found[0] if found else "", indent + "    "
        try:
            node = readable(textwrap.dedent(text)).body[0]
            node.decorator_list = find(reference, path).decorator_list
        except (*UNREADABLE, IndexError) as error:
            message = str(error) if text else "its file is not there, or has a syntax error and not this function"
            node = ast.parse(f"def {name}(*_, **__):\n    raise SyntaxError({message!r})").body[0]
        put(tree, path, node)
    return tree


def assemble(student, reference, exercise):
    """{file: syntax tree} for grading one exercise: the student's files, with the reference's functions where they
    belong to other exercises. student, reference: {file: source}."""
    trees = {}
    for name in FILES:
        other = ast.parse(reference[name])
        mine = [function.split(": ")[1] for each in EXERCISES for function in each.functions
                if function.startswith(name)]
        try:
            tree = readable(student[name])
        except (*UNREADABLE, KeyError):
            tree = salvage(student.get(name, ""), other, mine)
        for each in EXERCISES:
            for function in each.functions:
                file, path = function.split(": ")
                if file == name and each is not exercise and not is_stub(find(other, path)):
                    if "." in path and not find(tree, path.split(".")[0]):
                        put(tree, path.split(".")[0], find(other, path.split(".")[0]))
                    put(tree, path, find(other, path))
        trees[name] = ast.fix_missing_locations(tree)
    return trees


# One check in a process of its own -----------------------------------------------------------------------------------

class Memory(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules from {name: code object}."""
    def __init__(self, codes):
        self.codes = codes

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.codes else None

    def exec_module(self, module):
        module.__file__ = str(ROOT / f"{module.__name__}.py")
        exec(self.codes[module.__name__], module.__dict__)


class Modules:
    """What a check gets: the graded modules as attributes (d2c, fusion, ...), imported when they are asked for."""
    def __getattr__(self, name):
        return importlib.import_module(name)


@dataclass
class Job:
    """A check that waits, runs or has run. `hint` is empty where it passed."""
    check: object
    codes: dict
    hint: str = "was not run: the time was used up"
    seconds: float = 0.0
    hung: bool = False
    limit: int = SECONDS    # of processor time; the wall may show twice as much
    process: int = 0
    pipe: int = 0
    began: float = 0.0
    said: bytes = b""


def child(job, write, home):
    """In the forked process: run the check, tell the hint through the pipe, and be gone."""
    os.setsid()
    process = os.getpid()
    os.chdir(home)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    limits = {resource.RLIMIT_FSIZE: 2**26, resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: address_space() + MEMORY}
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (job.limit, job.limit + 1))  # the first ends it by SIGXCPU, which tells why
    sys.meta_path.insert(0, Memory(job.codes))
    for name in job.codes:  # whoever calls the grader in process may have imported others of these names
        sys.modules.pop(name, None)
    hint = "ended the process"
    try:
        torch.manual_seed(0)
        np.random.seed(0)
        job.check(Modules())
        hint = ""
    except BaseException as error:
        hint = explain(error)
    finally:
        try:
            if os.getpid() == process:  # and not one that the student's code has forked
                os.write(write, json.dumps(hint[:2000]).encode() + b"\n")
        finally:  # even if the pipe is closed: a child that returned would go on as a second grader
            os._exit(0)


def address_space():
    """Bytes of address space in use (Linux; elsewhere a generous guess)."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 2**36


def explain(error):
    """One or two lines for the student."""
    if isinstance(error, NotImplementedError):
        return "not implemented yet"
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    if isinstance(error, SystemExit):
        return "called sys.exit"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return f"asked for more than {MEMORY / 2**30:.0f} GB of memory"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in FILES]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def heard(said):
    """The hint that came through a pipe, into which the student's code may have written, too."""
    try:
        hint = json.loads(said) if said else "ended the process"
    except ValueError:
        hint = None
    return hint if isinstance(hint, str) else "wrote nonsense to the grader's files"


def run(jobs, deadline=None, first_failure_ends=False):
    """Run jobs, a few at once, each within its limits. Once one has hung, the others of the list get less time. Returns
    the jobs."""
    waiting, running, at_once = list(jobs), [], max(1, min(4, os.cpu_count() or 1))
    home = tempfile.mkdtemp()
    sys.stdout.flush()
    while waiting or running:
        late = deadline is not None and time.time() > deadline
        while waiting and len(running) < at_once and not late:
            job = waiting.pop(0)
            job.pipe, write = os.pipe()
            job.limit = SECONDS_AFTER_A_HANG if any(other.hung for other in jobs) else SECONDS
            job.began, job.process = time.time(), os.fork()
            if not job.process:
                child(job, write, home)
            os.close(write)
            os.set_blocking(job.pipe, False)
            running.append(job)
        if late or (first_failure_ends and any(job.process and job not in running and job.hint for job in jobs)):
            waiting = []
        time.sleep(0.003)
        for job in list(running):
            with contextlib.suppress(BlockingIOError):
                job.said += os.read(job.pipe, 2**16)
            over, status = os.waitpid(job.process, os.WNOHANG)
            job.seconds, done = time.time() - job.began, job.said.endswith(b"\n")
            out_of_time = bool(over) and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
            job.hung = not done and (out_of_time or (not over and (job.seconds > 2 * job.limit or late)))
            if over or done or job.hung:
                with contextlib.suppress(OSError):
                    os.killpg(job.process, signal.SIGKILL)  # and whatever it has started
                if not over:
                    os.kill(job.process, signal.SIGKILL)
                    os.waitpid(job.process, 0)
                with contextlib.suppress(BlockingIOError):
                    job.said += os.read(job.pipe, 2**16)
                os.close(job.pipe)
                running.remove(job)
                job.hint = heard(job.said)
                if job.hung:
                    job.hint = f"took more than {job.limit} seconds, well under one is enough: does a loop never end?"
    shutil.rmtree(home, ignore_errors=True)
    return jobs


# Grading -------------------------------------------------------------------------------------------------------------

def sources(folder):
    """{file: source} of those of FILES that a folder has."""
    return {name: (folder / name).read_text(errors="replace") for name in FILES if (folder / name).is_file()}


def checks_of(exercise):
    """[(weight, function)] of tests/checks/NAME.py."""
    sys.path[:0] = [path for path in (str(CHECKS),) if path not in sys.path]
    return importlib.import_module(f"{exercise.name}_checks").CHECKS


def compiled(trees):
    """{module name: code object} of the graded files, and of the grader's adapters."""
    codes = {name[:-3]: compile(tree, name, "exec") for name, tree in trees.items()}
    return codes | {name: compile(source, f"{name}.py", "exec") for name, source in SHARED.items()}


def title(check):
    """The first sentence of a check's docstring."""
    return " ".join(inspect.getdoc(check).split("\n\n")[0].split()).rstrip(".")


def entries(exercise):
    """What results.json says of each check of an exercise before it has run. The checks share its points by weight."""
    checks = checks_of(exercise)
    whole = sum(weight for weight, _ in checks)
    return [dict(name=f"{exercise.title}: {title(check)}", number=f"{exercise.number}.{i}", score=0.0,
                 max_score=exercise.points * weight / whole, output=Job.hint, status="failed", visibility="visible")
            for i, (weight, check) in enumerate(checks, 1)]


def grade(folder, numbers=(), save=None):
    """Print points and hints, and write Gradescope's results.json to `save`, anew after each exercise."""
    student, reference, began = sources(folder), sources(ROOT), time.time()
    chosen = [exercise for exercise in EXERCISES if not numbers or exercise.number in numbers]
    tests, points = {exercise.number: entries(exercise) for exercise in chosen}, {}
    for exercise in chosen:
        codes = compiled(assemble(student, reference, exercise))
        jobs = run([Job(check, codes) for _, check in checks_of(exercise)], began + DEADLINE)
        for test, job in zip(tests[exercise.number], jobs):
            test["output"] = job.hint or "passed"
            if not job.hint:
                test.update(score=test["max_score"], status="passed")
        points[exercise.number] = got = sum(test["score"] for test in tests[exercise.number])
        print(f"\n{exercise.number:2}  {exercise.title}: {got:.4g} of {exercise.points}", flush=True)
        for job in jobs:
            print(f"    {'FAILED' if job.hint else 'passed'}  {title(job.check)}")
            if job.hint:
                print(f"            {job.hint}")
        if save:
            write_results(save, [test for each in chosen for test in tests[each.number]], time.time() - began)
    total, most = sum(points[e.number] for e in chosen if not e.bonus), sum(e.points for e in chosen if not e.bonus)
    extra = "".join(f", bonus {points[e.number]:.4g} of {e.points}" for e in chosen if e.bonus)
    print(f"\ntotal: {total:.4g} of {most}{extra}   ({time.time() - began:.0f} s)")


def write_results(path, tests, seconds):
    """Gradescope's results.json, whole at every moment."""
    report = dict(score=round(sum(test["score"] for test in tests), 2), execution_time=round(seconds), tests=tests,
                  output="The checks are those of tests/checks; there are no others.", visibility="visible",
                  stdout_visibility="visible")
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(report, indent=1))
    os.replace(temporary, path)


# A student's copy ----------------------------------------------------------------------------------------------------

def make(folder):
    """Copy the repository into a new folder, with the bodies of all exercises' functions cut out."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CourseError(f"{folder}: is there already; give a new or an empty folder")
    if folder.resolve().is_relative_to(ROOT):
        raise CourseError(f"{folder}: lies inside of the repository; give a folder outside")
    shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=lambda _, names: LEFT_OUT.intersection(names))
    for name in FILES:
        source = (ROOT / name).read_text()
        tree, lines = ast.parse(source), source.splitlines()
        cuts = []
        for exercise in EXERCISES:
            for function in exercise.functions:
                file, path = function.split(": ")
                if file == name:
                    node = find(tree, path)
                    first = node.body[1 if ast.get_docstring(node) is not None else 0]
                    cuts.append((first.lineno, node.end_lineno, first.col_offset, exercise))
        for first, last, indent, exercise in sorted(cuts, key=lambda cut: -cut[0]):
            text = f'raise NotImplementedError("exercise {exercise.number}: {exercise.title}")'
            while lines[first - 2].lstrip().startswith("#"):  # comments above the first line are part of the body
                first -= 1
            lines[first - 1:last] = [" " * indent + text]
        (folder / name).write_text("\n".join(lines) + "\n")
    tutorial = folder / "docs" / "tutorial.md"  # it quotes some of the code
    tutorial.write_text(re.sub(r"```python\n.*?```", "*(This code is an exercise.)*", tutorial.read_text(), flags=re.S))
    print(f"made {folder}: {sum(len(exercise.functions) for exercise in EXERCISES)} functions in {len(EXERCISES)} "
          "exercises are left to be written")


# The grader, graded --------------------------------------------------------------------------------------------------

@dataclass
class Replacement:
    """One function written anew, with a planted mistake ("mutant") or in another right way ("right")."""
    name: str
    facts: dict
    source: str
    problem: str = ""       # why it does not apply


def replacements(folder):
    """Those in a folder's .py files. A file holds one or several, each begun by a line `# file: ...`."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for i, part in enumerate(re.split(r"^(?=# file:)", path.read_text(), flags=re.M)[1:]):
            facts = dict(re.findall(r"^# (file|function|exercise|kind|why): *(.*?) *$", part, re.M))
            found.append(Replacement(f"{path.stem}[{i}]" if part.strip() != path.read_text().strip() else path.stem,
                                     facts, part))
    return found


def applied(replacement, reference, codes):
    """(exercise, codes) of the reference, whose code objects are `codes`, with the replacement; (None, None), and its
    `problem`, if it does not fit."""
    facts = replacement.facts
    name = "vq" if facts.get("exercise") == "kl" else facts.get("exercise")
    exercise = next((each for each in EXERCISES if each.name == name), None)
    if exercise is None or facts.get("file") not in reference or facts.get("kind") not in ("mutant", "right"):
        replacement.problem = "its head names no exercise, file or kind that is known"
        return None, None
    tree = ast.parse(reference[facts["file"]])
    old = find(tree, facts.get("function", ""))
    try:
        defs = [node for node in ast.parse(replacement.source).body if isinstance(node, ast.FunctionDef)]
        new = next((node for node in defs if node.name == facts["function"].split(".")[-1]), None)
    except SyntaxError as error:
        new, replacement.problem = None, f"syntax error: {error}"
    if old is None or new is None or not isinstance(old, ast.FunctionDef) or not fits(new, old):
        replacement.problem = replacement.problem or "there is no such function, or its parameters are others"
        return None, None
    new.decorator_list = new.decorator_list or old.decorator_list
    put(tree, facts["function"], new)
    for helper in defs:
        if helper is not new:
            put(tree, helper.name, helper)
    return exercise, codes | {facts["file"][:-3]: compile(ast.fix_missing_locations(tree), facts["file"], "exec")}


def audit(folders, verbose=False):
    """Try every replacement against the checks of its exercise, and print those that the grader judges wrongly (all,
    with the hint that a student would read, if `verbose`)."""
    reference, counts = sources(ROOT), dict(caught=0, mutant=0, accepted=0, right=0, hung=0)
    right_codes = compiled({name: ast.parse(source) for name, source in reference.items()})
    for replacement in [replacement for folder in folders for replacement in replacements(folder)]:
        facts, (exercise, codes) = replacement.facts, applied(replacement, reference, right_codes)
        if exercise is None:
            print(f"does not apply: {replacement.name}: {replacement.problem}", flush=True)
            continue
        mutant = facts["kind"] == "mutant"
        jobs = run([Job(check, codes) for _, check in checks_of(exercise)], first_failure_ends=mutant)
        failed = [job for job in jobs if job.hint and job.process]
        counts[facts["kind"]] += 1
        counts["caught" if mutant else "accepted"] += bool(failed) == mutant
        counts["hung"] += any(job.hung for job in failed)
        if verbose or bool(failed) != mutant:
            verdict = ("caught" if failed else "MISSED") if mutant else ("REJECTED" if failed else "accepted")
            hint = f"\n    {title(failed[0].check)}: {failed[0].hint}" if failed else ""
            print(f"{verdict}: {replacement.name}, {facts['function']}: {facts.get('why', '')}{hint}", flush=True)
    print(f"(judged by the time limit: {counts['hung']})")
    print(f"mistakes caught: {counts['caught']} of {counts['mutant']}; "
          f"right variants accepted: {counts['accepted']} of {counts['right']}")


# The command ---------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(prog="exercises.py", usage=argparse.SUPPRESS,
                                     description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="make, grade or audit")
    command = commands.add_parser("make", help="a student's copy of this repository")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("grade", help="points and hints for a student's copy")
    command.add_argument("folder", type=Path)
    command.add_argument("--exercise", type=int, nargs="+", choices=[each.number for each in EXERCISES], default=[])
    command.add_argument("--json", type=Path, help="where to write Gradescope's results.json")
    command = commands.add_parser("audit", help="is the grader to be trusted?")
    command.add_argument("folder", type=Path, nargs="?", help="also the replacements in this folder")
    command.add_argument("--verbose", action="store_true", help="print every replacement and its hint")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a fork does not take threads along
    try:
        if args.command != "make" and args.folder and not args.folder.is_dir():
            raise CourseError(f"{args.folder}: no such folder")
        if args.command == "make":
            make(args.folder)
        elif args.command == "grade":
            grade(args.folder, args.exercise, args.json)
        else:
            audit([folder for folder in (AUDIT, args.folder) if folder and folder.is_dir()], args.verbose)
    except (CourseError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
