"""The repeated blocks of a module that shoal does not know: the units in which FSDP gathers its parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn

# A set of blocks with a smaller part of the parameters is not worth collectives of its own.
_LEAST_PART = 0.1

_CONTAINERS = (nn.ModuleList, nn.Sequential)


def units(module: nn.Module) -> list[nn.Module]:
    """Blocks to wrap one by one, in the module's order, none inside another; empty: only the module as a whole.

    A Hugging Face module names the classes of its blocks (`_no_split_modules`); of these, the ones that repeat.
    Else they are the children of ModuleList and Sequential that share a class with another: the class that covers
    the most parameters, then classes that cover others (a decoder's blocks beside an encoder's). Single layers
    are no blocks. A block that shares a parameter with the rest of the module is left out, since the rest would
    find the parameter sharded.
    """
    named = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks = _outermost(module, lambda part: type(part).__name__ in named)
    count = Counter(map(type, blocks))
    blocks = [block for block in blocks if count[type(block)] > 1] or _repeated(module)
    return [block for block in blocks if not _shares(module, block)]


def _repeated(module: nn.Module) -> list[nn.Module]:
    sets: list[set[nn.Module]] = []
    for kind, children in _children_of_containers(module).items():
        outer = _outermost(module, children.__contains__)
        if len(outer) > 1 and not issubclass(kind, nn.ModuleList):
            sets.append(set(outer))
    chosen: set[nn.Module] = set()
    for blocks in sorted(sets, key=lambda blocks: (-_size(blocks), -len(blocks))):
        nested = not _parts(chosen).isdisjoint(blocks) or not _parts(blocks).isdisjoint(chosen)
        if not nested and _size(blocks) >= _LEAST_PART * _size([module]):
            chosen |= blocks
    return [part for part in module.modules() if part in chosen]


def _children_of_containers(module: nn.Module) -> dict[type, set[nn.Module]]:
    """Class -> those of its instances that are children of a container and have children themselves."""
    found: dict[type, set[nn.Module]] = {}
    for container in module.modules():
        for child in container.children() if isinstance(container, _CONTAINERS) else ():
            if any(child.children()):
                found.setdefault(type(child), set()).add(child)
    return found


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The wanted modules with parameters that lie in no other wanted one, each once."""
    found: dict[nn.Module, None] = {}
    for child in module.children():
        if wanted(child) and _size([child]):
            found[child] = None
        else:
            found.update(dict.fromkeys(_outermost(child, wanted)))
    return list(found)


def _parts(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {part for module in modules for part in module.modules()}


def _size(modules: Iterable[nn.Module]) -> int:
    """Elements of all their parameters, shared ones once."""
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


def _shares(module: nn.Module, block: nn.Module) -> bool:
    rest = set(module.modules()) - set(block.modules())
    outside = {p for part in rest for p in part.parameters(recurse=False)}
    return not outside.isdisjoint(block.parameters())
