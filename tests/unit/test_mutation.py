"""benchmarks/mutate.py: on a toy whose tests notice some changes and not others, it says which."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "mutation"


def _part(name):
    """A module of benchmarks/mutation, imported by path."""
    if "styleloom_mutation" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "styleloom_mutation", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return importlib.import_module(f"styleloom_mutation.{name}")


def found(source):
    source = textwrap.dedent(source).encode()
    return source, _part("mutants").mutants_of("toy.py", source)


def changes(source):
    return {mutant.change for mutant in found(source)[1]}


@pytest.mark.parametrize("expression, expected", [
    ("a < b", {"a < b -> a <= b", "a < b -> a >= b"}),
    ("a is not b", {"a is not b -> a is b"}),
    ("a + b", {"a + b -> a - b"}),
    ("a @ b.T", {"a @ b.T -> a * b.T", "a @ b.T -> b.T @ a", "b.T -> b"}),
    ("a and b", {"a and b -> a or b"}),
    ("g(a, b)", {"g(a, b) -> g(b, a)"}),
    ("min(a, b)", {"min(a, b) -> max(a, b)"}),
    ("a[1:b]", {"1:b -> b:1", "1 -> 2", "1 -> 0"}),
    ("a if b else None", {"a if b else None -> a if not b else None"}),
    ("[x for x in a if x]", {"[x for x in a if x] -> [x for x in a if not x]"}),
    ("g(flag=True, by=0.5)", {"True -> False", "0.5 -> 0.75"}),
])
def test_changes_of_an_expression(expression, expected):
    assert changes(f"x = {expression}") == expected


def test_changes_of_statements():
    source = """
        def f(a, b):
            a += b
            g(a)
            if a:
                raise ValueError(a - b)
            return b
    """
    kinds = {(mutant.source, mutant.kind) for mutant in found(source)[1]}
    assert kinds == {
        ("a += b", "delete update"), ("a += b", "arithmetic"), ("a += b", "other name"), ("g(a)", "delete call"),
        ("g(a)", "other name"), ("if a:", "negate condition"), ("if a:", "other name"), ("return b", "return None"),
        ("raise ValueError(a - b)", "skip raise"), ("return b", "other name"),
    }  # fmt: skip


def test_what_is_never_changed():
    source = '''
        """Text: 1 < 2."""
        import a.b
        from a import b
        __all__ = [1, 2]

        @cache(maxsize=8)
        def f(a: Literal[1], b: Literal[True]) -> Literal[2]:
            """Text."""
            x: Literal[3] = g
            logging.info("text %d", 1 + 2)
            logger.warning(3)
            said = f"text {1 + 2}" + ("one more" if b > 2 else "")
            raise ValueError("text", 1 < 2)
    '''
    assert {change for change in changes(source)} == {"raise ValueError('text', 1 < 2) -> pass"}


def test_a_change_keeps_the_lines_and_the_precedence():
    source, mutants = found("""
        def f(a, b, c):  # é: two bytes
            return (a /
                    b ** c)
    """)
    (power,) = [mutant for mutant in mutants if mutant.old == "b ** c"]
    scope = {}
    exec(power.applied(source), scope)
    assert scope["f"](24, 2, 3) == 24 / (2 * 3)
    for mutant in mutants:
        assert mutant.applied(source).count(b"\n") == source.count(b"\n")
        assert "é: two bytes" in mutant.applied(source).decode()
    (division,) = [mutant for mutant in mutants if mutant.old == "a / b ** c"]
    assert division.span == (3, 4) and not division.at_import


def test_the_sample_hangs_on_the_text_and_not_on_line_numbers():
    draw = _part("mutants").draw
    lines = [f"x{number} = a + {number}" for number in range(60)]
    first = draw(found("\n".join(lines))[1], 20, seed=3)
    moved = draw(found("\n".join(["import a", *lines]))[1], 20, seed=3)
    assert [mutant.source for mutant in first] == [mutant.source for mutant in moved]
    assert len({mutant.line for mutant in first}) == 20
    assert [mutant.source for mutant in first] != [m.source for m in draw(found("\n".join(lines))[1], 20, seed=4)]


SEED = "27"  # draws the changes named below
TOY = '''
import functools

STEP = 5


@functools.lru_cache
def table():
    return (1, 2)


def clip(x, low):
    if x < low:
        return low
    return x


def refuse(x):
    if x:
        raise ValueError(x)


def never(x):
    return x + 1


def step():
    return STEP
'''

TOY_TESTS = '''
import pytest
from product import toy

SEEN = []


@pytest.fixture(scope="module")
def shared():
    return toy.clip(1, 3)


def test_first():
    SEEN.append(toy.table())


def test_hangs_on_the_first():
    assert SEEN and toy.table()


def test_clip(shared, base):
    assert shared == 3 and base.is_dir()


def test_shared_again(shared):
    assert shared == 3 and toy.clip(5, 3) == 5


def test_refuse():
    toy.refuse(0)


def test_step():
    assert toy.step() == 5


def test_fails_as_it_is():
    assert toy.clip(0, 0) == 1
'''

TOY_CONFTEST = '''
import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A tree with a module and its tests, and `judged(*arguments)`, which runs the command on it."""
    root = tmp_path_factory.mktemp("toy")
    for path, text in {
        "product/__init__.py": "", "product/toy.py": TOY, "tests/test_toy.py": TOY_TESTS, "tests/conftest.py": TOY_CONFTEST,
        "conftest.py": "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\n",
    }.items():  # fmt: skip
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\n')
    command = _part("command")
    rooms = {"toy": _part("tree").Room("toy", ("product",), "tests", ("base",))}

    def judged(*arguments):
        options = command.parser("", root, rooms).parse_args(["--work", str(root / "output"), *arguments])
        assert command.run(root, rooms, options) == 0
        lines = (root / "output" / "results.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return root, judged


def test_the_toy(toy, capsys):
    root, judged = toy
    before = (root / "product" / "toy.py").read_bytes()
    found = {verdict["change"]: verdict for verdict in judged("--count", "100", "--seed", SEED)}
    assert {change: verdict["outcome"] for change, verdict in found.items()} == {
        "5 -> 6": "killed", "return (1, 2) -> return None": "survived", "x < low -> x <= low": "survived",
        "return low -> return None": "killed", "return x -> return None": "killed", "x -> not x": "killed",
        "raise ValueError(x) -> pass": "not covered", "x + 1 -> x - 1": "not covered",
        "return STEP -> return None": "killed",
    }  # fmt: skip
    assert found["5 -> 6"]["by"].endswith("::test_step")  # a constant acts where a function reads it
    by = {verdict["by"] for verdict in found.values()}
    # Neither a test that needs another one before it, nor one that fails anyway, proves anything.
    assert not any(name and ("hangs_on" in name or "as_it_is" in name) for name in by)
    assert (root / "product" / "toy.py").read_bytes() == before
    said = capsys.readouterr().out
    alone = said.split("fail alone without any mutant:\n")[1].split("\n\n")[0].split()
    assert alone == ["tests/test_toy.py::test_hangs_on_the_first"]  # and none for want of the warmed fixture
    assert "left out because they fail" in said and "test_fails_as_it_is" in said


def test_again_and_without_those_that_change_nothing(toy, capsys, tmp_path):
    root, judged = toy
    first = judged("--count", "100", "--seed", SEED)
    capsys.readouterr()
    assert judged("--count", "100", "--seed", SEED) == first
    assert f"{len(first)} need no run" in capsys.readouterr().out
    entries = (root / "output" / "survivors.txt").read_text()
    alive = entries.count("why: ?")
    assert alive == sum(verdict["outcome"] != "killed" for verdict in first) > 0
    (tmp_path / "nothing.txt").write_text("# a remark\n" + entries.replace("?", "the same value"))
    judged("--count", "100", "--seed", SEED, "--equivalent", str(tmp_path / "nothing.txt"))
    said = capsys.readouterr().out
    assert "All killed." in said and f"100.0 % killed ({len(first) - alive} of {len(first) - alive})" in said


def test_the_map_knows_fixtures_and_caches(toy):
    root, judged = toy
    judged("--count", "1")
    (record,) = (root / "output").glob("map_toy_????????????????.json")
    made = _part("coverage_map").Map.load(record, root)
    lines = TOY.splitlines()

    def runs(text):
        line = lines.index(text) + 1
        return {made.tests[number]["id"].split("::")[1] for number in made.runs("product/toy.py", (line, line))}

    assert runs("        return low") == {"test_clip", "test_shared_again"}  # only their fixture runs it
    assert runs("    return (1, 2)") == {"test_first", "test_hangs_on_the_first"}  # the second finds no cached value


@pytest.mark.skipif(sys.platform != "linux", reason="forks only on Linux")
def test_a_run_that_does_not_end_is_ended():
    endless = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    assert _part("worker")._wait(endless.pid, time.monotonic()) is None
