"""The rules that keep the package one house: which floor may import which, and what importing it may load."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import mamba2_hf

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "mamba2_hf"
MODULES = sorted(SOURCE.rglob("*.py"))

FLOORS = {
    "errors": -1,  # every floor may raise them
    "ops": 0,
    "pretrained": 0,
    "layers": 1,
    "theory": 1,
    "distributed": 2,
    "models": 3,
    "checkpoints": 4,
    "training": 4,
    "inspect": 4,
    "registration": 5,
    "cli": 5,
    "compat": 6,
    "__init__": 7,
}
# Floors 0 to 2 serve anybody's models; training stacks are met where a user brings them.
HUGGING_FACE = {"transformers", "tokenizers", "huggingface_hub", "peft", "trl", "accelerate", "datasets"}
OPTIONAL = {"triton", "peft", "trl", "accelerate", "datasets", "matplotlib"}
PEERS = {"mamba_ssm", "causal_conv1d", "fla"}


class Import(NamedTuple):
    """One imported module, absolute, and whether importing the file alone already runs it."""

    module: str
    at_module_level: bool
    line: int


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """The top-level part of the package that a module belongs to; None outside the package."""
    package, _, rest = module.partition(".")
    if package != "mamba2_hf":
        return None
    return rest.split(".")[0] or "__init__"


def imports_of(path: Path) -> list[Import]:
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")), package, at_module_level=True))


def _imports(node: ast.AST, package: str, *, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_module_level, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                above = package.split(".")[: len(package.split(".")) - child.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in child.names:
                # `from .. import ops` names a module, `from ..ops import scan` a name inside of one.
                inner = SOURCE.parent.joinpath(*base.split("."), alias.name)
                is_module = (inner / "__init__.py").is_file() or inner.with_suffix(".py").is_file()
                yield Import(f"{base}.{alias.name}" if is_module else base, at_module_level, child.lineno)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from _imports(statement, package, at_module_level=at_module_level)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, package, at_module_level=at_module_level and not inside)


@cache
def eager_imports() -> dict[str, set[str]]:
    """The modules of the package that importing each of them alone runs at once."""
    names = {name_of(path) for path in MODULES}
    return {
        name_of(path): {found.module for found in imports_of(path) if found.at_module_level} & names - {name_of(path)}
        for path in MODULES
    }


@cache
def needing_triton() -> set[str]:
    """Modules of `ops` that import triton, or one that does."""
    direct = {
        name_of(path)
        for path in MODULES
        if any(found.at_module_level and found.module.split(".")[0] == "triton" for found in imports_of(path))
    }
    found = {name for name in direct if part_of(name) == "ops"}
    while (
        more := {name for name, imports in eager_imports().items() if part_of(name) == "ops" and imports & found}
        - found
    ):
        found |= more
    return found


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "MAMBA2_HF_BACKEND": ""}
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.mark.parametrize("path", MODULES, ids=name_of)
class TestImports:
    def test_point_downward_only(self, path):
        part = part_of(name_of(path))
        assert part in FLOORS, f"{part} has no floor: give it one in FLOORS"
        upward = [
            f"line {found.line}: {found.module}"
            for found in imports_of(path)
            if (target := part_of(found.module)) is not None
            and target != part
            and FLOORS.get(target, 99) >= FLOORS[part]
        ]
        assert not upward, f"{path.name} (floor {FLOORS[part]}) imports upward or sideways: {upward}"

    def test_lower_floors_know_nothing_of_hugging_face(self, path):
        if FLOORS[part_of(name_of(path))] > 2:
            return
        found = [found for found in imports_of(path) if found.module.split(".")[0] in HUGGING_FACE]
        assert not found, f"floors 0 to 2 are plain PyTorch: {found}"

    def test_optional_packages_load_when_used(self, path):
        """A package without its extras, or without triton, must import."""
        module = name_of(path)
        if module in needing_triton():
            return
        eager = [
            found
            for found in imports_of(path)
            if found.at_module_level and (found.module.split(".")[0] in OPTIONAL or found.module in needing_triton())
        ]
        assert not eager, f"import inside the function that needs it: {eager}"

    def test_no_peer_is_imported(self, path):
        assert not [found for found in imports_of(path) if found.module.split(".")[0] in PEERS]


@cache
def imported() -> tuple[set[str], list[str]]:
    """What a fresh interpreter has loaded after importing the package, and all that it prints, then and again."""
    *lines, loaded = python(
        "import sys\nimport mamba2_hf\nloaded = [*sys.modules]\nmamba2_hf.register()\nimport mamba2_hf\nprint(*loaded)"
    ).splitlines()
    return set(loaded.split()), lines


class TestImportingThePackage:
    def test_reaches_no_triton(self):
        reached, more = set(), {"mamba2_hf"}
        while more:
            reached |= more
            more = {found for name in more for found in eager_imports()[name]} - reached
        assert "mamba2_hf.ops" in reached
        assert not reached & needing_triton()

    def test_loads_nothing_optional(self):
        """Beyond what the parts of transformers that any model needs load by themselves."""
        names = repr(sorted(OPTIONAL | PEERS | {"transformers.trainer"}))
        loaded = f"import sys; print([name for name in {names} if name in sys.modules])"
        stock = python(
            "from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel\n"
            "import transformers.cache_utils, transformers.modeling_layers, transformers.conversion_mapping\n" + loaded
        )
        assert imported()[0] & (OPTIONAL | PEERS | {"transformers.trainer"}) <= set(ast.literal_eval(stock))

    def test_loads_what_is_for_looking_only_when_asked(self):
        assert not {"mamba2_hf.theory", "mamba2_hf.inspect"} & imported()[0]

    def test_works_without_optional_packages_and_peers(self):
        missing = "".join(f"sys.modules[{name!r}] = None\n" for name in sorted(OPTIONAL - {"accelerate"} | PEERS))
        code = f"import sys\n{missing}import mamba2_hf\nprint(mamba2_hf.ops.dispatch.report()[0].name)"
        assert python(code).strip() == "triton"

    def test_is_idempotent_and_silent(self):
        assert imported()[1] == []


class TestOps:
    LONGEST_CHAIN = 8  # files that have to be open to follow a call from where it comes in to a kernel

    def test_chains_of_imports_are_short(self):
        imports = {name: found for name, found in eager_imports().items() if name.startswith("mamba2_hf.ops.")}

        @cache
        def longest(name: str) -> tuple[str, ...]:
            below = (longest(found) for found in imports[name] if found in imports)
            return (name, *max(below, key=len, default=()))

        chain = max((longest(name) for name in imports), key=len)
        assert len(chain) <= self.LONGEST_CHAIN, " > ".join(chain)


class TestPublicNames:
    @pytest.mark.parametrize("module", [mamba2_hf, mamba2_hf.ops], ids=lambda module: module.__name__)
    def test_each_is_documented(self, module):
        for name in module.__all__:
            public = getattr(module, name)
            doc = public.__doc__ if inspect.ismodule(public) else inspect.getdoc(public)
            assert doc, f"{module.__name__}.{name} has no docstring"
            if inspect.isclass(public):
                assert public.__dict__.get("__doc__"), f"{module.__name__}.{name} only inherits its docstring"

    def test_none_is_missing_from_all(self):
        assert len(set(mamba2_hf.ops.__all__)) == len(mamba2_hf.ops.__all__)
        functions = {
            name
            for name, value in vars(mamba2_hf.ops).items()
            if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith("mamba2_hf.ops.")
        }
        assert functions <= set(mamba2_hf.ops.__all__)


class TestRepository:
    def test_house_files_exist(self):
        expected = (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "LICENSE",
            "Makefile",
            ".pre-commit-config.yaml",
            "constraints/cpu.txt",
        )
        missing = [name for name in (*expected, "src/mamba2_hf/py.typed") if not (ROOT / name).is_file()]
        assert not missing
        assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")

    def test_version_is_the_same_everywhere(self):
        version = metadata.version("mamba2-hf")
        assert mamba2_hf.__version__ == version
        assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    def test_readme_ci_and_makefile_name_the_same_commands(self):
        readme, makefile, ci = (
            ROOT.joinpath(name).read_text(encoding="utf-8") for name in ("README.md", "Makefile", ".ci/run")
        )
        for command in ("demo", "test"):
            assert f"\nmake {command}\n" in readme
            assert re.search(rf"^{command}:", makefile, re.MULTILINE)
        assert "make test" in ci
        assert os.access(ROOT / ".ci" / "run", os.X_OK)

    @pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
    def test_links_lead_to_files(self, page):
        links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
        broken = [link for link in links if "://" not in link and not (ROOT / link).exists()]
        assert not broken

    def test_files_named_to_contributors_exist(self):
        named = re.findall(r"`([\w/.]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
        files = [str(path.relative_to(ROOT)) for path in tracked_files()]
        assert named
        assert not [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)]

    def test_no_file_names_a_place_on_one_machine(self):
        place = re.compile(r"(?<![\w.:/])/(?:work|root|home|opt|mnt|Users)/[\w.]")
        found = []
        for path in tracked_files():
            if path.suffix in {".safetensors", ".png", ".pdf", ".model"} or path.name == "tokenizer.json":
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if place.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
        assert not found

    def test_lowest_versions_are_those_that_are_tested(self):
        lines = (ROOT / "constraints" / "lowest.txt").read_text(encoding="utf-8").splitlines()
        lowest = dict(line.split("==") for line in lines if "==" in line)
        requirements = [Requirement(text) for text in metadata.requires("mamba2-hf") or []]
        floors = {
            found.name: spec.version for found in requirements for spec in found.specifier if spec.operator == ">="
        }
        assert floors.pop("torch") == "2.11"
        assert floors.keys() <= lowest.keys()
        different = {
            name: (floor, lowest[name]) for name, floor in floors.items() if Version(floor) != Version(lowest[name])
        }
        assert not different
