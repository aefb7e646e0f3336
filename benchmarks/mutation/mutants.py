"""Small wrong changes ("mutants") of a source file, found in its syntax tree and made in its text.

A mutant replaces one piece of the text; the number of lines stays as it is. Texts (docstrings, messages, keys), type
annotations, imports, decorators, `__all__`, logging and what a `raise` says are never touched.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

COMPARE = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
}  # fmt: skip
_PAIRS = (("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"), ("clamp_min", "clamp_max"),
          ("any", "all"), ("floor", "ceil"), ("zeros", "ones"), ("zeros_like", "ones_like"), ("cos", "sin"))
OTHER_CALL = {**dict(_PAIRS), **{b: a for a, b in _PAIRS}}
TRANSPOSED = {"T", "mT", "H", "mH"}  # attributes
TRANSPOSES = {"t", "transpose"}  # methods
# The order of their first two arguments means nothing, or swapping it only raises.
UNORDERED = {"min", "max", "minimum", "maximum", "gcd", "lcm", "hypot", "isinstance", "issubclass", "getattr",
             "setattr", "hasattr", "mul", "add", "logaddexp", "cosine_similarity"}
LOGS = {"logging", "log", "logger", "_log", "_logger", "warnings"}
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "type_params", "type_comment", "format_spec", "bases"}
SKIPPED_NODES = (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.JoinedStr, ast.match_case)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Mutant:
    """One change: bytes `start` to `end` of `file` become `text`.

    Attributes:
        span: First and last line of the statement it is in (of its head, for `if`, `for`, `def` and the like).
        at_import: True where the statement runs while the module is imported, not in a function.
        source: The first line that changes, without its indent.
        old, new: Both sides in short, for a reader.
    """

    file: str
    line: int
    kind: str
    start: int
    end: int
    text: str
    old: str
    new: str
    source: str
    span: tuple[int, int]
    at_import: bool

    @property
    def change(self) -> str:
        return f"{self.old} -> {self.new}"

    @property
    def id(self) -> str:
        return _digest(self.file, self.line, self.start, self.end, self.kind, self.text)[:12]

    def applied(self, source: bytes) -> bytes:
        """The file's text with the change made."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Every mutant of one file, in the order of the text. `file` is its name in the report."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source), None, None, False)
    return sorted(finder.found, key=lambda mutant: (mutant.start, mutant.end, mutant.kind, mutant.text))


def draw(mutants: list[Mutant], count: int, seed: int, good: Callable[[Mutant], bool] = bool) -> list[Mutant]:
    """`count` of them (fewer if there are not so many), at most one a line, in the order of the files; `good` ones.

    First a line, each as likely as any other, then a kind of change, then a mutant; of the lines where only a name
    can be changed every fourth is kept, for there are many and nearly all fail at once. What is drawn hangs on the
    seed and on the lines' own text, not on line numbers: an edit elsewhere leaves the sample as it is.
    """
    lines: dict[tuple[str, int], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        lines[mutant.file, mutant.line].append(mutant)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    ranked = []
    for (file, line), here in sorted(lines.items()):
        again = seen[file, here[0].source]
        seen[file, here[0].source] += 1
        key = (seed, file, here[0].source, again)
        kinds = sorted({mutant.kind for mutant in here})
        if kinds == ["other name"] and int(_digest(*key, "name"), 16) % 4:
            continue
        kind = kinds[int(_digest(*key, "kind"), 16) % len(kinds)]
        of_kind = [mutant for mutant in here if mutant.kind == kind]
        ranked.append((_digest(*key), of_kind[int(_digest(*key, "which"), 16) % len(of_kind)]))
    in_turn = (mutant for _, mutant in sorted(ranked, key=lambda pair: pair[0]))
    drawn = list(itertools.islice(filter(good, in_turn), count))
    return sorted(drawn, key=lambda mutant: (mutant.file, mutant.start))


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _short(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def is_message(node: ast.AST) -> bool:
    """Whether an expression is a text for people: an f-string, a text with a blank in it, or made up of such."""
    if isinstance(node, ast.JoinedStr):
        return True
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and (not node.value or " " in node.value)
    if isinstance(node, ast.BinOp):
        return is_message(node.left) or is_message(node.right)
    if isinstance(node, ast.IfExp):
        return is_message(node.body) or is_message(node.orelse)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        text = node.func.value
        return node.func.attr in ("join", "format") and isinstance(text, ast.Constant) and isinstance(text.value, str)
    return False


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def _called(node: ast.AST) -> str:
    func = getattr(node, "func", None)
    return func.id if isinstance(func, ast.Name) else func.attr if isinstance(func, ast.Attribute) else ""


def _root_name(node: ast.AST) -> str:
    while isinstance(node, (ast.Call, ast.Attribute)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _own_names(function: ast.AST) -> dict[str, int]:
    """The function's parameters and the names it assigns, each with the line from which on it has a value."""
    args = function.args
    params = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    names = {arg.arg: 0 for arg in params if arg.arg not in ("self", "cls")}
    todo = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
                             ast.GeneratorExp)):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = min(names.get(node.id, node.lineno), node.lineno)
        todo.extend(ast.iter_child_nodes(node))
    return names


class _Finder:
    """Walks the tree with what a change must know: the statement, the function's names, whether it runs at import."""

    def __init__(self, file: str, source: bytes):
        self.file, self.found = file, []
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def visit(self, node: ast.AST, statement: ast.stmt | None, names: dict[str, int] | None, inside: bool) -> None:
        if isinstance(node, SKIPPED_NODES) or not isinstance(node, ast.stmt) and is_message(node):
            return
        if isinstance(node, ast.stmt):
            statement = node
            if not self._statement(node, names, inside):
                return
        elif isinstance(node, ast.expr):
            for kind, new in self._expressions(node, statement, names):
                self._add(node, kind, new, statement, inside)
        self._children(node, statement, names, inside)

    def _children(self, node, statement, names, inside):
        for field, value in ast.iter_fields(node):
            if field in SKIPPED_FIELDS or isinstance(node, ast.ExceptHandler) and field == "type":
                continue
            if field == "func" and isinstance(value, ast.Name):
                continue  # swapped by _call only
            if isinstance(node, ast.Attribute) and isinstance(value, ast.Name):
                continue  # another name there nearly always has no such attribute
            body = isinstance(node, FUNCTIONS) and field == "body"
            own = _own_names(node) if body else None if isinstance(node, ast.Lambda) else names
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child, statement, own, inside or body)

    def _statement(self, node: ast.stmt, names, inside: bool) -> bool:
        """Adds the changes of a whole statement; False where nothing inside is to be changed."""
        if isinstance(node, ast.Raise):
            self._add(node, "skip raise", "pass", node, inside)
            return False
        if isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant) or _root_name(node.value) in LOGS:
                return False
            if isinstance(node.value, (ast.Call, ast.Await)):
                self._add(node, "delete call", "pass", node, inside)
        elif isinstance(node, ast.AugAssign):
            self._add(node, "delete update", "pass", node, inside)
            if type(node.op) in ARITHMETIC and not is_message(node.value):
                self._add(node, "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]()), node, inside)
        elif isinstance(node, ast.Return):
            if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
                self._add(node, "return None", "return None", node, inside)
        elif isinstance(node, ast.Assign):
            return not any(isinstance(target, ast.Name) and target.id.startswith("__") for target in node.targets)
        elif isinstance(node, ast.If):
            return not {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)} & {
                "TYPE_CHECKING", "__name__"}
        elif isinstance(node, FUNCTIONS):
            return node.name not in ("__repr__", "__str__")
        return True

    def _expressions(self, node, statement, names):
        """(kind, replacement) for one expression."""
        if isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                for other in COMPARE[type(op)]:
                    yield "comparison", _with(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
        elif isinstance(node, ast.BinOp):
            if type(node.op) in ARITHMETIC and not (_is_text(node.left) or _is_text(node.right)):
                yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())
                if isinstance(node.op, ast.MatMult):
                    yield "arithmetic", _with(node, left=node.right, right=node.left)
        elif isinstance(node, ast.BoolOp):
            yield "and/or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        elif isinstance(node, ast.Constant):
            for value in _constants(node.value):
                yield "constant", ast.Constant(value)
        elif isinstance(node, ast.Attribute):
            if node.attr in TRANSPOSED:
                yield "drop transpose", node.value
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield "arithmetic", node.operand
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and names and node.id in names:
            others = sorted(name for name, line in names.items() if name != node.id and line < statement.lineno)
            if others:
                pick = int(_digest(self.file, self.lines[node.lineno - 1], node.col_offset), 16)
                yield "other name", ast.Name(others[pick % len(others)], ast.Load())
        if isinstance(node, ast.IfExp):
            yield "negate condition", _with(node, test=_negated(node.test))
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            for i, loop in enumerate(node.generators):
                for k, test in enumerate(loop.ifs):
                    ifs = [*loop.ifs[:k], _negated(test), *loop.ifs[k + 1 :]]
                    loops = [*node.generators[:i], _with(loop, ifs=ifs), *node.generators[i + 1 :]]
                    yield "negate condition", _with(node, generators=loops)
        if isinstance(statement, (ast.If, ast.While, ast.Assert)) and node is statement.test:
            yield "negate condition", _negated(node)
        if isinstance(node, ast.Slice) and node.step is None and (node.lower or node.upper):
            yield "slice bounds", _with(node, lower=node.upper, upper=node.lower)

    def _call(self, node: ast.Call):
        name, first = _called(node), node.args[:2]
        if name in OTHER_CALL:
            other = OTHER_CALL[name]
            func = ast.Name(other, ast.Load()) if isinstance(node.func, ast.Name) else _with(node.func, attr=other)
            yield f"{min(name, other)}/{max(name, other)}", _with(node, func=func)
        if name in TRANSPOSES and isinstance(node.func, ast.Attribute) and _root_name(node.func) not in ("torch", "np"):
            yield "drop transpose", node.func.value
        if name in UNORDERED or any(isinstance(arg, ast.Starred) for arg in node.args):
            return
        if len(first) == 2 and not any(map(is_message, first)) and ast.dump(first[0]) != ast.dump(first[1]):
            yield "swap arguments", _with(node, args=[node.args[1], node.args[0], *node.args[2:]])

    def _add(self, node, kind: str, new, statement: ast.stmt, inside: bool) -> None:
        start, end = self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)
        text = shown = new if isinstance(new, str) else _short(new)
        if isinstance(node, ast.expr) and not isinstance(node, (ast.Slice, ast.Constant, ast.Name)):
            text = "(" + text + "\n" * (node.end_lineno - node.lineno) + ")"
        else:
            text += "\n" * (node.end_lineno - node.lineno)
        source = self.lines[node.lineno - 1].decode().strip()
        self.found.append(Mutant(self.file, node.lineno, kind, start, end, text, _short(node), shown, source,
                                 _head(statement), not inside))

    def _offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column


def _constants(value: object) -> list:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return {0: [1], 1: [2, 0]}.get(value, [value + 1])
    if isinstance(value, float):
        return [float(f"{value * 1.5:.6g}") if value else 1.0]
    return []


def _negated(test: ast.expr) -> ast.expr:
    return test.operand if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) else ast.UnaryOp(
        ast.Not(), test)


def _head(statement: ast.stmt) -> tuple[int, int]:
    """First and last line of a statement, without the block below it."""
    body = getattr(statement, "body", None)
    last = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno
    return statement.lineno, last
