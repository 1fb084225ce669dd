"""How are the tensors named? A tree of their names with sizes; layers that are alike are shown once. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from reshard.commands.amounts import size


def tree(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Nested by the dots of the names. tensors: name -> {shape, dtype, bytes}, as a report has them.

    Each node: tensors, numbers, bytes (of all below it), children; a tensor itself: shape and dtype, too.
    """
    root: dict[str, Any] = _node()
    for name, tensor in tensors.items():
        node = root
        _count(node, tensor)
        for part in name.split("."):
            node = node["children"].setdefault(part, _node())
            _count(node, tensor)
        node |= {"shape": list(tensor["shape"]), "dtype": tensor["dtype"]}
    return root


def _node() -> dict[str, Any]:
    return {"tensors": 0, "numbers": 0, "bytes": 0, "children": {}}


def _count(node: dict[str, Any], tensor: Mapping[str, Any]) -> None:
    node["tensors"] += 1
    node["numbers"] += prod(tensor["shape"])
    node["bytes"] += tensor["bytes"]


def text(root: Mapping[str, Any]) -> list[str]:
    """The tree for people."""
    rows = _rows(root, "")
    width = max((len(label) for label, _ in rows), default=0)
    total = f"{root['tensors']:,} tensors, {root['numbers']:,} numbers, {size(root['bytes'])}"
    return [*(f"{label:{width}}  {what}".rstrip() for label, what in rows), "", total]


def _rows(node: Mapping[str, Any], indent: str) -> list[tuple[str, str]]:
    rows = []
    groups = _alike(node["children"])
    for i, (first, node_below, count) in enumerate(groups):
        label, child, last = first, node_below, i == len(groups) - 1
        while len(child["children"]) == 1 and "shape" not in child and count == 1:  # `wq` and its `weight`: one line
            ((name, child),) = child["children"].items()
            label += f".{name}"
        shape = " x ".join(map(str, child["shape"])) or "one number" if "shape" in child else ""
        times = f"{count} x {size(child['bytes'])} " if count > 1 else ""
        what = f"{size(count * child['bytes']):>10}  {times}{shape} {child.get('dtype', '')}".rstrip()
        rows.append((f"{indent}{'└── ' if last else '├── '}{label}", what))
        rows += _rows(child, indent + ("    " if last else "│   "))
    return rows


def _alike(children: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any], int]]:
    """(label, node, how many) of the children, in order; neighbours numbered one after the other that are alike are one."""
    ordered = sorted(
        children.items(), key=lambda item: (not item[0].isdecimal(), int(item[0]) if item[0].isdecimal() else 0)
    )
    runs: list[tuple[str, str, Mapping[str, Any], int]] = []
    for name, node in ordered:
        if (
            runs
            and name.isdecimal()
            and runs[-1][1].isdecimal()
            and int(name) == int(runs[-1][1]) + 1
            and node == runs[-1][2]
        ):
            first, _, same, count = runs[-1]
            runs[-1] = (first, name, same, count + 1)
        else:
            runs.append((name, name, node, 1))
    return [(first if count == 1 else f"{first} .. {last}", node, count) for first, last, node, count in runs]
