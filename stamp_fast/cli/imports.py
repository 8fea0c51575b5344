"""What MODEL, DATA and --loss name: objects of modules that can be imported, called with the options given."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

from stamp_fast.errors import ArgumentError

_SPEC = re.compile(r"(?P<module>[\w.]+):(?P<name>[\w.-]+)(?:\((?P<options>.*)\))?", re.DOTALL)


def parsed(text: str, what: str) -> tuple[str, str, dict[str, Any]]:
    match = _SPEC.fullmatch(text)
    file, _, function = text.partition(":")
    if match is None or file.endswith(".py"):
        module = ".".join(Path(file).with_suffix("").parts)
        hint = f"; for a function in that file write {module}:{function or 'function'}" if file.endswith(".py") else ""
        forms = "torchvision:NAME, timm:NAME, package.module:function, or a file written by `prune` (.safetensors)"
        if what == "DATA":
            forms = "a folder of images, or package.module:loader"
        raise click.BadParameter(f"expected {forms}, got '{text}'{hint}", param_hint=what)
    try:
        tree = ast.parse(f"_({match['options'] or ''})", mode="eval").body
        if tree.args:
            raise ValueError("an option without a name")
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in tree.keywords}
    except (SyntaxError, ValueError) as error:
        raise click.BadParameter(
            f"the options in '{text}' cannot be read ({error}); write them like mymodel:make(width=32, norm='bn')",
            param_hint=what,
        ) from None
    return match["module"], match["name"], options


def imported(module_name: str, name: str, what: str) -> Any:
    """An object of a module that can be imported, from the current folder too."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with torch.random.fork_rng(devices=[]):  # a module that draws numbers is imported once in a process
            found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise click.BadParameter(
                f"there is no module '{module_name}': neither a file {module_name.replace('.', '/')}.py in {folder}, "
                "nor an installed package",
                param_hint=what,
            ) from None
        raise ArgumentError(f"{what}: importing '{module_name}' raised {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            inside = vars(found) if hasattr(found, "__dict__") else {}
            names = [key for key, value in inside.items() if key[0] != "_" and not isinstance(value, ModuleType)]
            raise click.BadParameter(unknown(part, f"module '{module_name}'", names), param_hint=what)
        found = getattr(found, part)
    return found


def import_function(text: str, what: str) -> Callable:
    """The user's function itself, not what it gives."""
    module, name, options = parsed(text, what)
    found = imported(module, name, what)
    if not callable(found) or options:
        raise click.BadParameter(f"expected a function, package.module:function, got '{text}'", param_hint=what)
    return found


def called(function: Any, options: dict[str, Any], text: str, what: str) -> Any:
    if not callable(function):
        wanted = "a torch.nn.Module" if what == "MODEL" else "a DataLoader, a Dataset, a list of batches"
        raise ArgumentError(
            f"{what}: {text} is {type(function).__name__}, expected {wanted} or a function that gives one"
        )
    try:
        return function(**options)
    except (Exception, SystemExit) as error:
        hint = ""
        if isinstance(error, TypeError) and "argument" in str(error):
            hint = "; it is called without arguments but for those in parentheses: mymodel:make(width=32)"
        raise ArgumentError(f"{what}: {text} raised {type(error).__name__}: {error}{hint}") from error


def library(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArgumentError(f"{name} cannot be imported ({error}): pip install {name}") from error


def unknown(name: str, place: str, names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    close = difflib.get_close_matches(name, names) or names[:3]
    return f"there is no '{name}' in {place}" + (f"; did you mean {', '.join(close)}?" if close else "")


def some(names: list[str]) -> str:
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)]) or "none"


def call_text(function: str, options: dict[str, Any], *positional: str) -> str:
    arguments = [f'"{value}"' for value in positional] + [f"{key}={value!r}" for key, value in options.items()]
    return f"{function}({', '.join(arguments)})"
