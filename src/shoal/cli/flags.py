"""Words on a command line -> a frozen dataclass. tyro parses and shows help, the job's checks judge."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro

from shoal.errors import JobError
from shoal.job import Layout
from shoal.job.check import fit, kinds, similar
from shoal.job.toml import layout

T = TypeVar("T")

# A prompt may begin with dashes too (`-- select`), so a flag is what looks like a name.
_FLAG = re.compile(r"--[A-Za-z][\w.-]*")
_POSITIONAL = get_args(tyro.conf.Positional[str])[1]


def parse(
    options: type[T],
    args: list[str],
    prog: str,
    *,
    default: T | None = None,
    short: Mapping[str, str] | None = None,
) -> T:
    """The options in `args`, over `default`. Underscores and dashes are the same in names of options.

    options: a dataclass; the docstring under each field is its help.
    short: other names of options, {"--data": "--data.source"}.
    Raises JobError for an unknown option (with the nearest known), a missing value or one of the wrong kind.
    `--help` prints the options and raises SystemExit(0).
    """
    hints = get_type_hints(options, include_extras=True)
    known = {_flag(name): kind for name, kind in kinds(options).items() if _POSITIONAL not in get_args(hints.get(name))}
    words = [_long(word, short or {}) for word in args]
    _need_values(words, known)
    found, left = tyro.cli(
        options,
        args=words,
        prog=prog,
        default=options() if default is None else default,
        registry=_registry(),
        config=(tyro.conf.FlagConversionOff,),
        return_unknown_args=True,
    )
    if left:
        _refuse(left[0], [*known, *(short or {})], prog)
    for name, kind in kinds(options).items():
        if kind != Layout | None:
            fit(_flag(name), reduce(getattr, name.split("."), found), kind)
    return found


def refuse_recipe_as_text(source: tuple[str, ...], prog: str) -> None:
    """--data takes all the words that follow it: a recipe among them would be trained on, not followed."""
    recipes = [name for name in source if name.endswith(".toml")]
    if recipes:
        others = shlex.join(name for name in source if name not in recipes) or "TEXT"
        raise JobError(
            f"{recipes[0]} stands after --data, as text to train on",
            fix=f"a recipe comes first: {prog} {shlex.quote(recipes[0])} --data {others}",
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _long(word: str, short: Mapping[str, str]) -> str:
    if any("\ud800" <= letter < "\ue000" for letter in word):
        raise JobError(f"{word!r} is not UTF-8 text", fix="rename the file")
    flag, given, value = word.partition("=")
    if not _FLAG.fullmatch(flag):
        return word
    flag = flag.replace("_", "-")
    return short.get(flag, flag) + given + value


def _need_values(words: list[str], known: Mapping[str, Any]) -> None:
    """Raises JobError if an option stands without its values."""
    for position, word in enumerate(words):
        if word in known:
            need = _count(known[word])
            following = words[position + 1 : position + 1 + need]
            given = [w for w in following if not _FLAG.fullmatch(w.partition("=")[0])]
            if len(given) < need:
                raise JobError(f"{word} needs {need} value{'s'[: need > 1]}", fix=f"give it after {word}")


def _count(kind: Any) -> int:
    """Values that an option must be given."""
    if get_origin(kind) is not tuple:
        return 1
    items = get_args(kind)
    return 0 if items[-1] is ... else len(items)


def _refuse(word: str, known: Iterable[str], prog: str) -> NoReturn:
    if not word.startswith("-"):
        raise JobError(f"unexpected argument '{word}'", fix=f"every option has a name, see `{prog} --help`")
    flag = word.partition("=")[0]
    name = flag.lstrip("-").replace("_", "-")
    close = [f"--{near}" for near in similar(name, [k.removeprefix("--") for k in known])]
    fix = f"did you mean {' or '.join(close)}?" if close else f"see `{prog} --help`"
    raise JobError(f"unknown option {flag}", fix=fix)


def _registry() -> tyro.constructors.ConstructorRegistry:
    """How tyro reads options. What is no number or truth value stays text, for `fit` to refuse by name."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def option(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type not in _READ:
            return None
        metavar, read, show = _READ[info.type]
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: read(words[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [show(value)],
        )

    @registry.struct_rule
    def table(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        if not is_dataclass(info.type):
            return None
        help_of = docstrings(info.type)
        return tyro.constructors.StructConstructorSpec(
            instantiate=info.type,
            fields=tuple(
                tyro.constructors.StructFieldSpec(name, kind, getattr(info.default, name), help_of.get(name))
                for name, kind in get_type_hints(info.type, include_extras=True).items()
            ),
        )

    return registry


def docstrings(options: type) -> dict[str, str]:
    """Field -> the docstring under it, as one line. tyro would keep the line breaks of the source."""
    found = {}
    for cls in reversed([base for base in options.__mro__ if is_dataclass(base)]):
        (tree,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def _number(kind: type) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        try:
            return kind(word)
        except ValueError:
            return word

    return read


# How a kind is called in help, how it is read, and how a default of it is shown.
_READ: dict[Any, tuple[str, Callable[[str], Any], Callable[[Any], str]]] = {
    int: ("INT", _number(int), str),
    float: ("FLOAT", _number(float), str),
    bool: (
        "BOOL",
        lambda word: {"true": True, "false": False}.get(word.lower(), word),
        lambda value: str(value).lower(),
    ),
    Layout | None: ("LAYOUT", layout, lambda value: str(value or "auto")),
}
