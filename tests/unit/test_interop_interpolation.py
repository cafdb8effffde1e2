"""Interpolations of OmegaConf and the resolvers of l3m, as plain data."""

import math
from pathlib import Path
from typing import Any

import pytest

from flextok_pl.interop.interpolation import Resolver, read_yaml

TREE = """
constants: {width: 768, heads: 12, ratio: 4, name: absolute, eps: 1e-5, list: [16, 1], nested: "${constants.width}"}
place: {beside: "${.own}", own: 5, inner: {up: "${..own}", far: "${constants.list[1]}", old: "${constants.list.0}"}}
a: ${constants.width}
b: ${mul_int:${constants.width}, ${constants.ratio}}
c: ${div_int:${constants.width},${constants.heads}}
d: pos_${constants.name}_${constants.heads}
e: ${constants.list}
f: ${add:1, 2, 3}
g: ${subtract:10,2,3}
h: ${mul:${mul:2,3},0.5}
i: ${div_float:3,2}
j: ${sqrt_div:${constants.nested},3}
k: \\${no}
l: {part: "${constants}"}
m: ${constants.eps}
"""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.yaml").write_text(TREE)
    return read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a", 768),
        ("b", 3072),
        ("c", 64),
        ("d", "pos_absolute_12"),
        ("e", [16, 1]),
        ("f", 6),
        ("g", 5),
        ("h", 3.0),
        ("i", 1.5),
        ("j", math.sqrt(256)),
        ("k", "${no}"),
        ("m", 1e-5),
        ("l.part.nested", 768),
        ("place.beside", 5),
        ("place.inner", {"up": 5, "far": 1, "old": 16}),
        ("nowhere", None),
        ("a.b", None),
    ],
)
def test_values(values: dict[str, Any], path: str, value: Any) -> None:
    found = Resolver(values).get(path)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E3", 1000.0), ("-2.5e+4", -25000.0), ("1_0", 10), ("0.1", 0.1), ("2026-04-28", "2026-04-28")],
)
def test_numbers_as_omegaconf_reads_them(text: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"a: {text}")
    found = read_yaml(tmp_path / "c.yaml")["a"]
    assert found == value and type(found) is type(value)


BOMB = {f"x{i}": [f"${{x{i + 1}}}"] * 9 for i in range(9)} | {"x9": 1}
TEXT_BOMB = {f"x{i}": f"${{x{i + 1}}}" * 10 for i in range(9)} | {"x9": "long"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": "${b}", "b": "${a}"}, "form a cycle"),
        ({"a": "${a}"}, "form a cycle"),
        ({"a": "${b}"}, "a=.*names a key that does not exist"),
        ({"a": "${oc.env:HOME}"}, "uses the resolver 'oc.env'; known ones are add, subtract"),
        ({"a": "${eval:1+1}"}, "uses the resolver 'eval'"),
        ({"a": "${div_float:1,0}"}, "cannot be computed"),
        ({"a": "${mul:two,3}"}, "computes with .'two', 3., which are not all numbers"),
        ({"a": "${sqrt_div:1}"}, "cannot be computed"),
        ({"a": "${mul:1e300,1e300}"}, "a=.* is a number that no configuration has"),
        ({"a": "${sqrt_div:-1,1}"}, "cannot be computed"),
        ({"a": "${b"}, "an interpolation without an end"),
        ({"a": "x${b}", "b": {"c": 1}}, "inserts a mapping or list into a text"),
        ({"a": "${" * 3000 + "}" * 3000}, "form a cycle"),
        ({"a": "${....b}"}, "goes above the root"),
        ({"a": "${mul:${nan},2}", "nan": float("nan")}, "is a number that no configuration has"),
        ({"a": "${b}", "b": "${x0}"} | BOMB, "are too many"),
        ({"a": "${x0}"} | TEXT_BOMB, "becomes a text of|are too many"),
        ({"a": f"${{mul:{'9' * 4000},{'9' * 4000}}}"}, "is a number that no configuration has"),
    ],
)
def test_refusals(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resolver(tree).get("a")


def test_only_what_is_asked_for_is_resolved() -> None:
    assert Resolver({"a": 1, "b": "${oc.env:HOME}"}).get("a") == 1
