"""The library as a whole: how its functions are called and described, who imports whom, and the style of the text."""

import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import pytest

import gridreg_jax
from gridreg_jax import losses

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(gridreg_jax.__path__, "gridreg_jax."))


def public(module):
    """Functions and classes that a module defines for others."""
    for name, item in vars(module).items():
        own = getattr(item, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isroutine(item) or inspect.isclass(item)):
            yield name, item


@pytest.mark.parametrize("name", losses.SIMILARITIES)
def test_a_similarity_takes_fixed_and_warped_and_then_named_options_with_defaults(name):
    first, second, *options = inspect.signature(losses.SIMILARITIES[name]).parameters.values()
    assert (first.name, second.name) == ("fixed", "warped")
    assert first.default is second.default is inspect.Parameter.empty
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY and option.default is not inspect.Parameter.empty


def test_images_come_in_one_order_everywhere():
    for name in MODULES:
        for item_name, item in public(importlib.import_module(name)):
            if inspect.isclass(item):
                item = item.__call__ if issubclass(item, nn.Module) else item.__init__
            parameters = list(inspect.signature(item).parameters)
            pairs = [("fixed", other) for other in ("moving", "warped")]
            pairs += [("fixed_labels", "moving_labels"), ("fixed_labels", "warped_labels")]
            pairs += [("fixed_landmarks", "moving_landmarks")]
            for first, second in pairs:
                if first in parameters and second in parameters:
                    assert parameters.index(first) + 1 == parameters.index(second), f"{name}.{item_name}"


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_says_what_it_does(name):
    module = importlib.import_module(name)
    silent = [item_name for item_name, item in public(module) if not inspect.getdoc(item)]
    assert not silent
    content = (ROOT / name.replace(".", "/")).with_suffix(".py")
    assert module.__doc__ or not content.exists()


def test_imports_point_downwards():
    pytest.importorskip("importlinter")
    # A process of its own: the linter keeps state, and reads the source, not what is imported here.
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    found = subprocess.run([*command, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert " kept, 0 broken" in found.stdout


@pytest.mark.parametrize(
    ("word", "places"),
    [("pmap", {"training/step.py"}), ("orbax", {"training/checkpoint.py"}), ("nibabel", {"data/nifti.py"})],
)
def test_one_place_for_each_of_these(word, places):
    package = ROOT / "gridreg_jax"
    found = set()
    for path in package.rglob("*.py"):
        code = [line.split("#")[0] for line in path.read_text().splitlines()]
        if any(f"jax.{word}(" in line or f"import {word}" in line or f"from {word}" in line for line in code):
            found.add(str(path.relative_to(package)))
    assert found == places


def test_the_style_of_the_text():
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    found = subprocess.run([ruff, "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
