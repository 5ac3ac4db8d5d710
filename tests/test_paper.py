"""PAPER.md: every numbered thing of the paper has its row, and every entry of a row is there under that name."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in (ROOT / "PAPER.md").read_text(encoding="utf-8").splitlines()
        if re.match(r"\| (Eq|Tab|Fig|Alg|Sec|App)\.", line)]
NAMED = re.compile(r"`([^`:]+\.py): ([\w.]+)`")


@cache
def defined(file):
    """The names that a Python file defines: f, C, C.method, CONSTANT; what is assigned in a class's `__init__` is none."""
    def names(body, prefix=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from names(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))
    return {*names(ast.parse((ROOT / file).read_text(encoding="utf-8")).body)}


def test_every_numbered_thing_has_one_row():
    labels = [row[0] for row in ROWS]
    for kind, count in (("Eq", 25), ("Tab", 7), ("Fig", 13), ("Alg", 2)):
        assert [label for label in labels if label.startswith(kind)] == [f"{kind}. {n}" for n in range(1, count + 1)]
    assert len({*labels}) == len(labels)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_entry_resolves(row):
    assert len(row) == 5 and all(row)
    for cell, folders in zip(row[2:], (["."], ["tests"], ["experiments", "benchmarks", "."])):
        entries = NAMED.findall(cell)
        assert entries or cell in ("not yet", "-"), f"{cell!r} is no entry"
        assert re.fullmatch(r"(, |; [\w ,]+: not yet)*|not yet|-", NAMED.sub("", cell)), f"{cell!r}: what stands beside the entries?"
        for file, name in entries:
            assert str(Path(file).parent) in folders and (ROOT / file).is_file(), f"{file} is not there"
            assert name in defined(file), f"{file} defines no {name}"
            assert folders != ["tests"] or name.startswith("test_"), f"{name} is no test"


def test_the_checker_can_fail():
    assert "Formulation.loss" in defined("flow.py") and "PAPER_FORMULATIONS" in defined("flow.py")
    assert "Formulation.lost" not in defined("flow.py") and "loss" not in defined("flow.py")
