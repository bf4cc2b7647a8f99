"""One file that holds the models, made from this package's own sources.

Beside a checkpoint, with ``auto_map`` in its config, it lets ``AutoModelForCausalLM.from_pretrained(...,
trust_remote_code=True)`` build these models where the package is not installed. It has the PyTorch backend only.

The sources are taken apart into their top-level statements; what the models reach is put behind one another, imports
from each other are resolved, and names that two modules use for different things get the module's name appended.
Annotations of functions and comments are left behind.
"""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

FILE = "modeling_mamba2_hf.py"
AUTO_MAP = {
    f"Auto{name}": f"{FILE.removesuffix('.py')}.Mamba2{ours}"
    for name, ours in (
        ("Config", "Config"),
        ("Model", "Model"),
        ("ModelForCausalLM", "ForCausalLM"),
        ("ModelForSequenceClassification", "ForSequenceClassification"),
    )
}
"""The entry of ``config.json`` that names the classes in the file."""
ROOTS = ("Mamba2Config", "Mamba2Model", "Mamba2ForCausalLM", "Mamba2ForSequenceClassification")

_PACKAGE = __name__.partition(".")[0]
_ROOT = Path(__file__).parents[1]
_BACKEND = f"{_PACKAGE}.ops.torch"
_DISPATCH = f"{_PACKAGE}.ops.dispatch"
# In place of ops/dispatch.py: there is nothing to choose from.
_ONE_BACKEND = '''
from types import SimpleNamespace
from typing import Any

from ..errors import BackendError
from .torch import {ops}

_TORCH = SimpleNamespace({fields})


def choose(op: str, device: Any, requested: str | None = None, **call: Any) -> Any:
    """Refuses any backend but the one that is here."""
    if requested not in (None, "auto", "torch"):
        raise BackendError(f"backend={{requested!r}}: this file holds the PyTorch backend only; install mamba2-hf")
    return SimpleNamespace(name="torch", reason="the only backend in this file")


def again(op: str, call: Any, requested: str | None = None) -> Any:
    """There are no calls to repeat without their checks."""
    return None


def usable(device: Any) -> Any:
    """Whether there is another backend, and why not."""
    return False, "this file holds the PyTorch backend only"


def backend_module(name: str) -> Any:
    """The PyTorch backend."""
    return _TORCH


def is_batch_invariant() -> bool:
    """Whether results do not depend on the batch: not by the PyTorch backend."""
    return False


def batch_invariant() -> Any:
    """Only the installed package has that backend."""
    raise BackendError("this file holds the PyTorch backend only; install mamba2-hf for batch_invariant()")


def use_backend(name: str | None) -> Any:
    """Only the installed package has a choice."""
    raise BackendError("this file holds the PyTorch backend only; install mamba2-hf to choose another")
'''

_DISTRIBUTED = f"{_PACKAGE}.distributed"
# In place of all of distributed/: the file's models are each one process's.
_ONE_PROCESS = '''
from ..errors import ArgumentError

Group = object


def tensor_parallel(model, mesh):
    """Only the installed package shares layers among processes."""
    raise ArgumentError("this file's models are whole in every process: install mamba2-hf to share them")


whole_state_dict = agree_on_random_numbers = tensor_parallel
'''


@dataclass
class _Module:
    """A module of the package, taken apart.

    Attributes:
        name: its full name.
        statements: its top-level statements, without imports and docstring.
        imports: what each imported name stands for: a module and a name in it, or a module alone.
        defines: the names that its statements bind.
    """

    name: str
    statements: list[ast.stmt] = field(default_factory=list)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    defines: set[str] = field(default_factory=set)


@cache
def source() -> str:
    """The file's text."""
    modules: dict[str, _Module] = {}
    _load(f"{_PACKAGE}.models.configuration_mamba2", modules)
    _load(f"{_PACKAGE}.models.modeling_mamba2", modules)
    names = _Names(modules)
    pieces: list[tuple[set[str], set[str], str]] = []  # what a statement defines, what it uses, its text
    for module in modules.values():
        for statement in module.statements:
            bound = {names.flat(module.name, name) for name in _bound(statement)}
            rewritten = ast.fix_missing_locations(_Rewriter(module, names).visit(statement))
            pieces.append((bound, _used(rewritten), ast.unparse(rewritten)))
    texts = _reachable(pieces)
    used = {name for _, inside, _ in texts for name in inside}
    header = f'"""Mamba-2 for transformers, generated from mamba2-hf {metadata.version("mamba2-hf")}: do not edit.\n\n'
    header += (
        "The package itself has the commented sources, faster kernels and the tests. License: Apache-2.0.\n" + '"""\n\n'
    )
    return header + names.imports(used) + "\n\n\n" + "\n\n\n".join(text for *_, text in texts) + "\n"


def _load(name: str, modules: dict[str, _Module]) -> None:
    """Adds a module to ``modules``, after all that it imports from the package."""
    if name in modules:
        return
    module = _Module(name)
    modules[name] = module  # a second visit must find it; its place in the order is set below
    tree = ast.parse(_text(name))
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            module.imports.update(_imports(statement, name))
        elif not _is_dropped(statement):
            module.statements.append(statement)
            module.defines |= _bound(statement)
    for inner in ast.walk(tree):  # imports inside functions
        if isinstance(inner, ast.ImportFrom) and inner.level and not _only_for_types(tree, inner):
            module.imports.update(_imports(inner, name))
    for target, _ in module.imports.values():
        if target.startswith(f"{_PACKAGE}."):
            _load(target, modules)
    modules[name] = modules.pop(name)


def _path(name: str) -> Path:
    path = _ROOT.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if (path / "__init__.py").is_file() else path.with_suffix(".py")


def _text(name: str) -> str:
    if name == _DISTRIBUTED or name.startswith(f"{_DISTRIBUTED}."):
        return _ONE_PROCESS
    if name != _DISPATCH:
        return _path(name).read_text(encoding="utf-8")
    exported = ast.parse(_path(_BACKEND).read_text(encoding="utf-8"))
    ops = sorted(
        alias.name for node in exported.body if isinstance(node, ast.ImportFrom) and node.level for alias in node.names
    )
    return _ONE_BACKEND.format(ops=", ".join(ops), fields=", ".join(f"{op}={op}" for op in ops))


def _imports(node: ast.Import | ast.ImportFrom, name: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Local names of one import statement, and what they stand for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.asname or alias.name.partition(".")[0]), (alias.name, None)
        return
    base = node.module or ""
    if node.level:
        package = name if _path(name).name == "__init__.py" else name.rpartition(".")[0]
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    if base == "__future__":
        return
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        is_module = inner.startswith(f"{_PACKAGE}.") and _path(inner).is_file()
        yield (alias.asname or alias.name), ((inner, None) if is_module else (base, alias.name))


def _is_dropped(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
        return True
    if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
        return True
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)  # docstrings


def _only_for_types(tree: ast.Module, node: ast.AST) -> bool:
    return any(_is_dropped(statement) and node in ast.walk(statement) for statement in tree.body)


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement defines."""
    table = symtable.symtable(ast.unparse(statement), "", "exec")
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_namespace()}


def _used(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _reachable(pieces: list[tuple[set[str], set[str], str]]) -> list[tuple[set[str], set[str], str]]:
    """The statements that the models need, in their order."""
    wanted, kept = set(ROOTS), set[int]()
    while True:
        more = [
            number
            for number, (bound, _, _) in enumerate(pieces)
            if number not in kept and (bound & wanted or not bound)
        ]
        if not more:
            return [pieces[number] for number in sorted(kept)]
        kept.update(more)
        for number in more:
            wanted |= pieces[number][1]


class _Names:
    """One name in the file for everything that is defined or imported anywhere."""

    def __init__(self, modules: dict[str, _Module]) -> None:
        self.modules = modules
        things: dict[str, set[tuple[str, str | None]]] = {}
        for module in modules.values():
            for name in module.defines:
                things.setdefault(name, set()).add((module.name, name))
            for name, target in module.imports.items():
                if not target[0].startswith(_PACKAGE):
                    things.setdefault(name, set()).add(target)
        self._shared = {name for name, found in things.items() if len(found) > 1} | set(dir(builtins)) & things.keys()

    def flat(self, module: str, name: str) -> str:
        """The name in the file of what ``name`` is in a module."""
        if name in ROOTS or name not in self._shared:
            return name
        return f"{name}_{module.removeprefix(f'{_PACKAGE}.').replace('.', '_')}"

    def resolve(self, module: str, name: str) -> tuple[str, str | None] | None:
        """Where a name that a module uses comes from; None if it is no name of the module's."""
        found = self.modules[module]
        if name in found.defines:
            return module, name
        if name not in found.imports:
            return None
        target, inner = found.imports[name]
        if inner is None or not target.startswith(f"{_PACKAGE}."):
            return target, inner
        return self.resolve(target, inner)

    def imports(self, used: set[str]) -> str:
        """The import statements for the used names that come from outside."""
        plain: set[str] = set()
        by_module: dict[str, set[str]] = {}
        for module in self.modules.values():
            for name, (target, inner) in module.imports.items():
                flat = self.flat(module.name, name)
                if target.startswith(f"{_PACKAGE}.") or flat not in used:
                    continue
                if inner is None:
                    plain.add(f"import {target}" + ("" if flat == target else f" as {flat}"))
                else:
                    by_module.setdefault(target, set()).add(inner if flat == inner else f"{inner} as {flat}")
        lines = sorted(plain) + [
            f"from {name} import {', '.join(sorted(by_module[name]))}" for name in sorted(by_module)
        ]
        return "\n".join(lines)


class _Rewriter(ast.NodeTransformer):
    """Gives the names in a statement their names in the file, and drops what only type checkers read."""

    def __init__(self, module: _Module, names: _Names) -> None:
        self.module, self.names = module, names
        self.scopes: list[tuple[bool, set[str]]] = []  # whether it is a class's, and what it binds

    def _is_local(self, name: str) -> bool:
        last = len(self.scopes) - 1
        return any(
            name in bound for depth, (is_class, bound) in enumerate(self.scopes) if not is_class or depth == last
        )

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if self._is_local(node.id) or (found := self.names.resolve(self.module.name, node.id)) is None:
            return node
        target, inner = found
        if not target.startswith(_PACKAGE):
            return ast.Name(self.names.flat(self.module.name, node.id), node.ctx)
        if inner is None:
            raise NotImplementedError(
                f"{self.module.name}: {node.id} is used as a value, and modules do not exist here"
            )
        return ast.Name(self.names.flat(target, inner), node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and not self._is_local(node.value.id):
            target = self.names.resolve(self.module.name, node.value.id)
            if target is not None and target[1] is None and target[0].startswith(_PACKAGE):
                inner = self.names.resolve(target[0], node.attr)
                assert inner is not None, f"{self.module.name}: {node.value.id}.{node.attr}"
                if inner[0].startswith(_PACKAGE) and inner[1] is not None:
                    return ast.Name(self.names.flat(inner[0], inner[1]), node.ctx)
                return ast.Name(self.names.flat(target[0], node.attr), node.ctx)
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        """An f-string as a call of format: from Python 3.12 on, ``ast`` writes them as older ones cannot read."""
        values: list[ast.expr] = []
        template = _template(node, values)
        return ast.Call(
            ast.Attribute(ast.Constant(template), "format", ast.Load()), [self.visit(v) for v in values], []
        )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        return node if not node.level else ast.Pass()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        self._visit_defaults(node.args)
        node.returns = None
        if not self.scopes:
            node.name = self.names.flat(self.module.name, node.name)
        elif not self._is_local(node.name):
            raise AssertionError(node.name)
        self.scopes.append((False, _locals(node)))
        node.body = [self.visit(statement) for statement in node.body]
        self.scopes.pop()
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        self._visit_defaults(node.args)
        self.scopes.append((False, {argument.arg for argument in _arguments(node.args)}))
        node.body = self.visit(node.body)
        self.scopes.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        if any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in node.bases):
            for member in node.body:
                if isinstance(member, ast.AnnAssign):  # the types of a tuple's fields may stand further down
                    member.annotation = ast.Name("object", ast.Load())
        node.bases = [self.visit(base) for base in node.bases]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        if not self.scopes:
            node.name = self.names.flat(self.module.name, node.name)
        bound = {name for statement in node.body for name in _bound(statement)}
        self.scopes.append((True, bound))
        node.body = [self.visit(statement) for statement in node.body]
        self.scopes.pop()
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if self.scopes and self.scopes[-1][0]:  # fields of dataclasses, and what transformers reads off classes
            return self.generic_visit(node)  # type: ignore[return-value]
        if node.value is None:
            return ast.Pass()
        return ast.Assign([self.visit(node.target)], self.visit(node.value), lineno=node.lineno)

    def _visit_defaults(self, arguments: ast.arguments) -> None:
        arguments.defaults = [self.visit(default) for default in arguments.defaults]
        arguments.kw_defaults = [default and self.visit(default) for default in arguments.kw_defaults]
        for argument in _arguments(arguments):
            argument.annotation = None


def _template(text: ast.JoinedStr, values: list[ast.expr]) -> str:
    """What ``str.format`` needs to make the same text; the values are appended to ``values``."""
    pieces = []
    for part in text.values:
        if isinstance(part, ast.FormattedValue):
            values.append(part.value)
            kind = "" if part.conversion < 0 else f"!{chr(part.conversion)}"
            spec = f":{_template(part.format_spec, values)}" if isinstance(part.format_spec, ast.JoinedStr) else ""
            pieces.append("{" + kind + spec + "}")
        elif isinstance(part, ast.Constant):
            pieces.append(str(part.value).replace("{", "{{").replace("}", "}}"))
    return "".join(pieces)


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return named + [extra for extra in (arguments.vararg, arguments.kwarg) if extra]


def _locals(function: ast.FunctionDef) -> set[str]:
    """What a function binds, comprehensions in it included: none of our comprehensions hides a global."""
    bound = {argument.arg for argument in _arguments(function.args)}
    shared: set[str] = set()

    def look(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                bound.add(child.name)
                continue
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                bound.add(child.id)
            elif isinstance(child, ast.ExceptHandler) and child.name:
                bound.add(child.name)
            elif isinstance(child, (ast.Import, ast.ImportFrom)) and not getattr(child, "level", 0):
                bound.update(alias.asname or alias.name.partition(".")[0] for alias in child.names)
            elif isinstance(child, ast.Global):
                shared.update(child.names)
            if not isinstance(child, ast.Lambda):
                look(child)

    for statement in function.body:
        look(ast.Module([statement], []))
    return bound - shared
