"""Schemas that structured output is judged by: function parameters of BFCL, and hard ones written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
Schema = dict[str, Any]

# BFCL writes Python's names of types.
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None, "String": "string", "list": "array"}


def _object(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False, **more}


def bfcl_schemas(limit: int | None = None) -> list[Schema]:
    """Parameters of BFCL's functions as JSON Schema, distinct ones, in the files' order; [] where the files are not here."""
    found: dict[str, Schema] = {}
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json"):
        path = SHARED / "data/prompts" / name
        if not path.exists():
            continue
        for line in path.read_text().splitlines():
            for function in json.loads(line)["function"]:
                schema = _translated(function["parameters"])
                found.setdefault(json.dumps(schema, sort_keys=True), schema)
    return list(found.values())[:limit]


def bfcl_tools(limit: int | None = None) -> list[Schema]:
    """BFCL's functions as tools, one for each name, small enough for a small model: closed, with short texts and lists."""
    found: dict[str, Schema] = {}
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json"):
        path = SHARED / "data/prompts" / name
        for line in path.read_text().splitlines() if path.exists() else ():
            for function in json.loads(line)["function"]:
                parameters = _bounded(_translated(function["parameters"]))
                description = {
                    "name": function["name"],
                    "description": function["description"],
                    "parameters": parameters,
                }
                found.setdefault(function["name"], {"type": "function", "function": description})
    return list(found.values())[:limit]


def _bounded(schema: Schema) -> Schema:
    more: Schema = {}
    if schema.get("type") == "object":
        more = {
            "additionalProperties": False,
            "properties": {k: _bounded(v) for k, v in schema.get("properties", {}).items()},
        }
    elif schema.get("type") == "array":
        more = {"maxItems": 2, "items": _bounded(schema.get("items", {"type": "integer"}))}
    elif schema.get("type") == "string" and "enum" not in schema:
        more = {"maxLength": 16}
    return schema | more


def _translated(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key == "type":
            value = _TYPES.get(value, value)
            if value is not None:
                result["type"] = value
        elif key == "properties":
            result[key] = {name: _translated(inner) for name, inner in value.items()}
            result.setdefault("additionalProperties", False)  # a function takes no other arguments
        elif key in ("items", "additionalProperties"):
            result[key] = _translated(value)
        elif key in ("enum", "required", "minimum", "maximum", "description"):
            result[key] = value
    return result


_TREE: Schema = {
    "$defs": {
        "node": _object(
            {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            }
        )
    },
    "$ref": "#/$defs/node",
}
_LIST: Schema = {
    "$defs": {
        "cell": {"anyOf": [{"type": "null"}, _object({"head": {"type": "boolean"}, "tail": {"$ref": "#/$defs/cell"}})]}
    },
    "$ref": "#/$defs/cell",
}
_EXPRESSION: Schema = {
    "$defs": {
        "expr": {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": 99},
                _object(
                    {
                        "op": {"enum": ["+", "-", "*"]},
                        "left": {"$ref": "#/$defs/expr"},
                        "right": {"$ref": "#/$defs/expr"},
                    }
                ),
            ]
        }
    },
    "$ref": "#/$defs/expr",
}

HARD: dict[str, Schema] = {
    # ---- nesting
    "nested 3": _object({"a": _object({"b": _object({"c": {"type": "integer"}})})}),
    "nested 6": _object(
        {"a": _object({"b": _object({"c": _object({"d": _object({"e": _object({"f": {"type": "null"}})})})})})}
    ),
    "array of arrays": {
        "type": "array",
        "items": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "minItems": 2,
            "maxItems": 2,
        },
        "minItems": 2,
        "maxItems": 2,
    },
    "array of objects": {
        "type": "array",
        "items": _object({"id": {"type": "integer"}, "ok": {"type": "boolean"}}),
        "minItems": 1,
        "maxItems": 3,
    },
    "matrix 3x3": {
        "type": "array",
        "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 3, "maxItems": 3},
        "minItems": 3,
        "maxItems": 3,
    },
    "open object": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]},
    "map of integers": {"type": "object", "additionalProperties": {"type": "integer"}},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,4}$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "optional fields": _object({"a": {"type": "integer"}, "b": {"type": "integer"}, "c": {"type": "integer"}}, ["b"]),
    "no required": _object({"a": {"type": "boolean"}, "b": {"type": "boolean"}}, []),
    "empty object": _object({}),
    "many fields": _object({f"field_{index}": {"type": "boolean"} for index in range(24)}),
    "many optional": _object({f"f{index}": {"type": "boolean"} for index in range(16)}, []),
    # ---- recursion
    "tree": _TREE,
    "linked list": _LIST,
    "expression": _EXPRESSION,
    "tree in a field": {
        **_object({"root": {"$ref": "#/$defs/node"}}),
        "$defs": {"node": _object({"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}})},
    },
    "definitions, old style": {
        **_object({"home": {"$ref": "#/definitions/address"}, "work": {"$ref": "#/definitions/address"}}),
        "definitions": {
            "address": _object(
                {"city": {"type": "string", "maxLength": 10}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}
            )
        },
    },
    "mutual recursion": {
        "$defs": {
            "even": _object({"odd": {"anyOf": [{"$ref": "#/$defs/odd"}, {"type": "null"}]}}),
            "odd": _object({"even": {"anyOf": [{"$ref": "#/$defs/even"}, {"type": "null"}]}}),
        },
        "$ref": "#/$defs/even",
    },
    "ref to the root": _object({"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}),
    # ---- enum and const
    "enum of strings": {"enum": ["red", "green", "blue"]},
    "enum of mixed": {"enum": [1, "one", None, True, 1.5]},
    "enum with prefixes": {"enum": ["a", "ab", "abc", "abcd"]},
    "enum of objects": {"enum": [{"a": 1}, {"a": 2, "b": [1, 2]}, [1, 2, 3]]},
    "large enum": {"enum": [f"item-{index:03}" for index in range(300)]},
    "const": _object({"version": {"const": 2}, "kind": {"const": "point"}}),
    "enum with quotes": {"enum": ['say "hi"', "back\\slash", "new\nline", "tab\t"]},
    "enum typed": _object(
        {"size": {"type": "string", "enum": ["S", "M", "L"]}, "count": {"type": "integer", "enum": [1, 2, 3]}}
    ),
    # ---- strings
    "pattern: phone": _object({"phone": {"type": "string", "pattern": "^\\+[1-9][0-9]{6,12}$"}}),
    "pattern: hex colour": {"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"},
    "pattern: licence plate": {"type": "string", "pattern": "^[A-Z]{1,3}-[A-Z]{1,2} [1-9][0-9]{0,3}$"},
    "pattern: alternatives": {"type": "string", "pattern": "^(foo|bar|ba[zx])+$", "maxLength": 12},
    "pattern, unanchored": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 12},
    "pattern: semver": {"type": "string", "pattern": "^(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)$"},
    "length 5": {"type": "string", "minLength": 5, "maxLength": 5},
    "length 1 to 40": {"type": "string", "minLength": 1, "maxLength": 40},
    "format: date": _object({"day": {"type": "string", "format": "date"}}),
    "format: date-time": _object({"at": {"type": "string", "format": "date-time"}}),
    "format: uuid": _object({"id": {"type": "string", "format": "uuid"}}),
    "format: ipv4": _object({"ip": {"type": "string", "format": "ipv4"}}),
    "format: email": _object({"mail": {"type": "string", "format": "email", "maxLength": 30}}),
    # ---- numbers
    "integer 0 to 7": _object({"n": {"type": "integer", "minimum": 0, "maximum": 7}}),
    "integer, negative bounds": {"type": "integer", "minimum": -1234, "maximum": -17},
    "integer, exclusive": {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 111},
    "integer, odd bounds": {
        "type": "array",
        "items": {"type": "integer", "minimum": 987, "maximum": 12345},
        "minItems": 3,
        "maxItems": 3,
    },
    "number 0 to 1": _object({"p": {"type": "number", "minimum": 0, "maximum": 1}}),
    "number, decimal bounds": {"type": "number", "minimum": -0.75, "maximum": 2.125},
    "number, exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "number at least": {"type": "number", "minimum": 100.5},
    "integer, multiple of 5": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "latitude, longitude": _object(
        {
            "lat": {"type": "number", "minimum": -90, "maximum": 90},
            "lon": {"type": "number", "minimum": -180, "maximum": 180},
        }
    ),
    # ---- unicode
    "unicode names": _object(
        {"größe": {"type": "integer"}, "名前": {"enum": ["太郎", "花子"]}, "emoji 🎉": {"type": "boolean"}}
    ),
    "unicode enum": {"enum": ["naïve", "Ελλάδα", "русский", "日本語", "👩‍🚀", "مرحبا"]},
    "unicode pattern": {"type": "string", "pattern": "^[α-ω]{2,6}$"},
    "escaped name": _object({'a"b\\c': {"type": "integer"}, "": {"type": "boolean"}, "a/b~c": {"type": "null"}}),
    # ---- combinations
    "anyOf of types": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 6}, {"type": "boolean"}]},
    "type list": _object({"x": {"type": ["integer", "null", "boolean"]}}),
    "oneOf of types": {"oneOf": [{"type": "integer"}, {"type": "null"}]},
    "oneOf, tagged": {
        "oneOf": [
            _object({"kind": {"const": "circle"}, "radius": {"type": "integer", "minimum": 1, "maximum": 50}}),
            _object({"kind": {"const": "box"}, "width": {"type": "integer"}, "height": {"type": "integer"}}),
        ]
    },
    "anyOf of objects": {
        "anyOf": [
            _object({"cat": {"type": "boolean"}}),
            _object({"dog": {"type": "integer"}}),
            _object({"cat": {"type": "null"}}),
        ]
    },
    "allOf of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
    },
    "allOf of bounds": {"allOf": [{"type": "integer"}, {"minimum": 10}, {"maximum": 20}]},
    "nullable by anyOf": _object({"x": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 3}, {"type": "null"}]}}),
    "anyOf beside properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
        "anyOf": [{"properties": {"a": {"minimum": 5}}}, {"properties": {"a": {"maximum": -5}}}],
    },
    # ---- arrays
    "array exactly 4": {"type": "array", "items": {"type": "boolean"}, "minItems": 4, "maxItems": 4},
    "array at least 2": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2},
    "array of nothing": {"type": "array", "maxItems": 0},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "boolean"}, {"enum": ["x", "y"]}],
        "items": False,
        "minItems": 3,
    },
    "tuple with a tail": {
        "type": "array",
        "prefixItems": [{"const": "head"}],
        "items": {"type": "integer"},
        "minItems": 2,
        "maxItems": 4,
    },
    "array of unions": {
        "type": "array",
        "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "minItems": 1,
        "maxItems": 5,
    },
    # ---- whole documents
    "order": _object(
        {
            "customer": _object(
                {"name": {"type": "string", "minLength": 1, "maxLength": 20}, "vip": {"type": "boolean"}}
            ),
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": _object(
                    {
                        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                        "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
                        "price": {"type": "number", "minimum": 0, "maximum": 999.99},
                    }
                ),
            },
            "currency": {"enum": ["EUR", "USD", "JPY"]},
        }
    ),
    "any value": {},
}

# What is refused at admission: keyword that nobody can hold a generator to, or that is simply wrong.
REFUSED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "unique items": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "if, then": {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependent required": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "property names": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "unknown type": {"type": "decimal"},
    "dangling ref": {"$ref": "#/$defs/nothing"},
    "remote ref": {"$ref": "https://example.com/schema.json"},
    "bad pattern": {"type": "string", "pattern": "(["},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "unknown format": {"type": "string", "format": "klingon"},
    "min above max": {"type": "integer", "minimum": 5, "maximum": 3},
    "nothing fits": {"type": "array", "minItems": 3, "maxItems": 2},
}
