"""The laws of the house: twins, arrows, lazy doors, layout, size. Mostly read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import jaxtyping
import pytest

from tests.paths import ROOT

FLAX, TORCH = ROOT / "gam_flax", ROOT / "gam_torch"
FLAX_ADDS = {"rngs", "dtype", "param_dtype", "remat"}
FRAMEWORKS = {"torch", "torchvision", "jax", "jaxlib", "flax", "optax", "orbax", "grain"}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def each(files: list[Path]):
    return pytest.mark.parametrize("file", files, ids=lambda file: str(file.relative_to(ROOT)))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def public(tree: ast.Module | ast.ClassDef, kind: type) -> dict:
    """The classes or functions of a file, or the methods of a class, that users may name."""
    return {node.name: node for node in tree.body if isinstance(node, kind) and node.name[0] != "_"}


def arguments(function: ast.FunctionDef) -> list[tuple[str, str, str]]:
    """(kind, name, default) of every argument, in order."""
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    missing = [None] * (len(plain) - len(args.defaults))
    found = [("plain", a.arg, d) for a, d in zip(plain, missing + args.defaults, strict=True)]
    found += [("*", arg.arg, None) for arg in [args.vararg] if arg]
    found += [("named", a.arg, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    found += [("**", arg.arg, None) for arg in [args.kwarg] if arg]
    return [(kind, name, ast.unparse(default) if default else "") for kind, name, default in found]


def constructors(*classes: ast.ClassDef) -> list[ast.FunctionDef]:
    """Of those that have one of their own."""
    return [n for cls in classes for n in cls.body if getattr(n, "name", "") == "__init__"]


def constructor(cls: ast.ClassDef) -> ast.FunctionDef:
    return constructors(cls)[0]


# Twins


@each(sources(TORCH))
def test_twins(file):
    """The same public classes and functions, with the same arguments and defaults."""
    twin = FLAX / file.relative_to(TORCH)
    assert twin.exists()
    ours, theirs = parse(file), parse(twin)
    classes, twin_classes = public(ours, ast.ClassDef), public(theirs, ast.ClassDef)
    functions, twin_functions = public(ours, ast.FunctionDef), public(theirs, ast.FunctionDef)
    assert list(classes) == list(twin_classes) and list(functions) == list(twin_functions)
    pairs = [(function, twin_functions[name]) for name, function in functions.items()]
    for name, cls in classes.items():
        if not cls.bases:  # plain data
            assert ast.dump(cls) == ast.dump(twin_classes[name])
            continue
        if ast.unparse(cls.bases[0]) != "nn.Module":
            continue  # it stands in for a layer of the framework, and takes that layer's arguments
        methods = public(cls, ast.FunctionDef)
        twin_methods = public(twin_classes[name], ast.FunctionDef)
        del methods["forward"]  # Flax's is __call__
        assert list(methods) == list(twin_methods)
        pairs += [(method, twin_methods[name]) for name, method in methods.items()]
        if made := constructors(cls, twin_classes[name]):
            pairs.append((made[0], made[1]))
    for function, twin_function in pairs:
        added = [a for a in arguments(twin_function) if a not in arguments(function)]
        assert {name for _, name, _ in added} <= FLAX_ADDS | {"types"}, function.name
        kept = [a for a in arguments(twin_function) if a not in added]
        assert kept == arguments(function), function.name


@pytest.mark.parametrize("part", ["attention", "models"])
def test_neither_side_has_a_file_of_its_own(part):
    assert [file.name for file in sources(TORCH / part)] == [f.name for f in sources(FLAX / part)]


@pytest.mark.parametrize("name", ["attention/variants.py", "models/yolov5_config.py"])
def test_plain_data_are_the_same(name):
    assert ast.dump(parse(TORCH / name)) == ast.dump(parse(FLAX / name))


@pytest.mark.parametrize("name", ["gam.py", "cbam.py", "se.py", "bam.py"])
def test_linen_mirrors_nnx(name):
    """The same classes; their fields are the constructor's arguments but `channels` and `rngs`."""
    nnx = public(parse(FLAX / "attention" / name), ast.ClassDef)
    linen = public(parse(FLAX / "linen" / name), ast.ClassDef)
    assert list(nnx) == list(linen)
    for cls in nnx:
        fields = [
            (node.target.id, ast.unparse(node.annotation), ast.unparse(node.value))
            for node in linen[cls].body
            if isinstance(node, ast.AnnAssign)
        ]
        args = constructor(nnx[cls]).args
        hints = {arg.arg: ast.unparse(arg.annotation) for arg in args.kwonlyargs}
        expected = [
            (name, hints[name], default)
            for kind, name, default in arguments(constructor(nnx[cls]))
            if kind == "named" and name != "rngs"
        ]
        assert fields == expected, cls


def test_a_block_keeps_its_arguments_under_their_names():
    """`save` writes them down, `load` builds the block again from them."""
    files = [FLAX / "attention" / f"{name}.py" for name in ("gam", "cbam", "se", "bam")]
    classes = [cls for file in files for cls in public(parse(file), ast.ClassDef).values()]
    classes.append(public(parse(FLAX / "models" / "resnet.py"), ast.ClassDef)["ResNet"])
    for cls in classes:
        init = constructor(cls)
        kept = {
            node.attr
            for node in ast.walk(init)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        wanted = {name for _, name, _ in arguments(init)} - {"self", "rngs"}
        assert wanted <= kept, f"{cls.name} forgets {wanted - kept}"


# Arrows

FLOORS = [
    ["ops", "preprocess"],
    ["attention", "optimize"],
    ["linen", "models"],
    ["convert"],
    ["detection"],
    ["parity", "train"],
]
FLOORS += [["maps", "export"], ["costs", "demo"], ["cli"]]
FLOOR = {part: height for height, parts in enumerate(FLOORS) for part in parts}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is imported with the file) of all that a file imports."""

    def visit(node: ast.AST, early: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = node.module in ("gam_flax", "gam_torch")  # there the names are the parts
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name, early) for name in (names if whole else [node.module]))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "gam_flax":
            yield HOMES.get(node.attr, f"gam_flax.{node.attr}"), early
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        inside = isinstance(node, ast.FunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, early and not inside)

    yield from visit(parse(file), True)


def homes() -> dict[str, str]:
    """What `gam_flax.GAM` and its like really are."""
    stub = ast.parse((FLAX / "__init__.pyi").read_text(encoding="utf-8"))
    found = {}
    for node in stub.body:
        for alias in node.names:
            found[alias.name] = f"gam_flax.{node.module or alias.name}"
    return found


HOMES = homes()


@each(sources(FLAX))
def test_arrows(file):
    """cli → costs, demo → maps, export → train, parity → convert → models, linen → attention →
    ops, never back; optimize stands beside attention."""
    part = file.relative_to(FLAX).parts[0].removesuffix(".py")
    if part == "__init__":
        assert {name for name, _ in imports(file)} == {"lazy_loader"}
        return
    for name, early in imports(file):
        package, _, rest = name.partition(".")
        if package in ("torch", "gam_torch"):
            assert not early, f"{name} is imported with the file"
        if package != "gam_flax":
            continue
        if not rest:  # `import gam_flax`; what is used of it comes as an attribute
            assert not early and FLOOR[part] >= FLOOR["convert"]
            continue
        other = HOMES.get(rest, name).split(".")[1]
        assert other == part or FLOOR[other] < FLOOR[part], f"{part} reaches {name}"
        if part == "convert" and other in ("models", "linen", "attention", "optimize", "ops"):
            plain_data = name == "gam_flax.attention.variants"
            assert plain_data or not early, f"{name} is imported with the file"


@each(sources(TORCH))
def test_arrows_of_gam_torch(file):
    part = file.relative_to(TORCH).parts[0]
    for name, _ in imports(file):
        package, _, rest = name.partition(".")
        assert package not in ("gam_flax", "jax", "jaxlib", "flax", "optax", "orbax")
        if package == "gam_torch" and part == "attention":
            assert rest.startswith("attention")


# Lazy doors


def loaded_by(code: str) -> set[str]:
    """The frameworks that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return FRAMEWORKS & set(done.stdout.split())


EVERY_FILE_OF_CONVERT = """
import pkgutil, importlib, gam_flax.convert as convert
for file in pkgutil.iter_modules(convert.__path__):
    importlib.import_module("gam_flax.convert." + file.name)
for name in convert.__all__:
    getattr(convert, name)
"""


@pytest.mark.parametrize(
    "code, frameworks",
    [
        ("import gam_flax, gam_torch; dir(gam_flax), dir(gam_torch)", set()),
        ("import gam_flax.convert, gam_flax.attention, gam_flax.models, gam_flax.linen", set()),
        (EVERY_FILE_OF_CONVERT, set()),
        ("import gam_flax.train as t; t.Settings, t.fit, t.read_data, t.draw_curves", set()),
        ("import gam_torch; gam_torch.GAM", {"torch"}),
        ("import gam_flax; gam_flax.GAM, gam_flax.linen.GAM", {"jax", "jaxlib", "flax", "optax"}),
    ],
    ids=["packages", "parts", "convert", "train", "gam_torch.GAM", "gam_flax.GAM"],
)
def test_lazy_doors(code, frameworks):
    # flax itself imports optax where that is installed
    assert loaded_by(code) | ({"optax"} & frameworks) == frameworks


@pytest.mark.parametrize(
    "package",
    [
        *("gam_flax", "gam_flax.attention", "gam_flax.linen", "gam_flax.ops", "gam_flax.models"),
        *("gam_flax.convert", "gam_flax.parity", "gam_flax.train", "gam_flax.maps"),
        *("gam_torch", "gam_torch.attention", "gam_torch.models"),
    ],
)
def test_every_door_opens(package):
    """What a stub promises is there, under the name that it has."""
    package = import_module(package)
    assert package.__all__
    for name in package.__all__:
        assert getattr(getattr(package, name), "__name__", name).split(".")[-1] == name
    assert (ROOT / package.__name__.split(".")[0] / "py.typed").exists()


# Layout and size


@each(sources(FLAX))
def test_padding_is_explicit(file):
    """torch pads a strided convolution on both sides, 'SAME' (Flax's default) on one."""
    for node in ast.walk(parse(file)):
        assert getattr(node, "value", None) != "SAME"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            padded = node.func.attr in ("Conv", "ConvTranspose", "max_pool", "avg_pool")
            assert not padded or "padding" in {k.arg for k in node.keywords}, node.lineno


def test_files_are_short():
    folders = [FLAX, TORCH, *(ROOT / name for name in ("tests", "examples", "benchmarks"))]
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for file in sources(folder)
    }
    assert not {name: length for name, length in lengths.items() if length > 450}


def test_annotated_shapes_are_checked():
    """The hook of conftest.py is in force, on both sides."""
    import jax.numpy as jnp
    import torch

    import gam_torch
    from gam_flax.ops.conv import replicate_pad2d

    with pytest.raises(jaxtyping.TypeCheckError):
        replicate_pad2d(jnp.ones((2, 2)), 1)
    with pytest.raises(jaxtyping.TypeCheckError):
        gam_torch.GAM(8)(torch.ones(2, 2))
