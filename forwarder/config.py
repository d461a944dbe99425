"""Configuration: one YAML file, plus environment variables, into frozen structs.

This module knows the rules, not the settings: every component declares its own frozen
``msgspec.Struct`` beside its code (type, default, bounds, unit, meaning), and the composition root
nests them into one schema. ``load`` walks schema and data side by side and reports *every* fault at
once, each with the path of its key and its line in the file; it touches nothing but the file it reads.

Rules: unknown keys are faults, in the file and as ``FORWARDER__...`` names alike. The environment
wins over the file. A key ``a.b`` is ``FORWARDER__A__B`` there; its value is text for text settings
and YAML for all others. A list of structs (``rules``) is one key: its elements have paths like
``rules[2].match.priority``, and the environment replaces all of it. A date is text: no setting wants another
type, and a bad one must be a fault of its key, not of the whole file.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
import yaml

ENVIRONMENT_PREFIX = "FORWARDER__"
FILE_BYTES_MAX = 1 << 20

PriorityName = Literal[
    "emergency", "alert", "critical", "error", "warning", "notice", "informational", "info", "debug"
]

S = TypeVar("S", bound=msgspec.Struct)

_INDEX = re.compile(r"\[(\d{1,9})\]")


class Fault(NamedTuple):
    """One thing wrong with the configuration: the key's dotted path, and what to do about it."""

    where: str
    what: str
    line: int = 0
    """Of the key in the file, or of what it is missing in; 0 where the file is not to blame."""

    def __str__(self) -> str:
        return f"{self.where} (line {self.line}): {self.what}" if self.line else f"{self.where}: {self.what}"


class ConfigError(Exception):
    """The configuration cannot be used; ``faults`` lists everything that is wrong with it."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = faults


def setting(description: str, *, unit: str = "", **bounds: Any) -> msgspec.Meta:
    """The annotation of a setting: its meaning and unit for the docs, its bounds (``ge``, ``le``, ...)."""
    return msgspec.Meta(description=description, extra={"unit": unit}, **bounds)


class Documented(NamedTuple):
    """One leaf of the schema, as the generated docs show it."""

    key: str
    environment: str
    default: Any
    unit: str
    meaning: str
    type: str


def load(schema: type[S], path: Path | None, environment: Mapping[str, str] | None = None) -> S:
    """Read the file and the environment into ``schema``; raise ``ConfigError`` with all faults.

    A settings struct may have a method ``faults`` for what no single key can tell (a log group where
    the sink is on): pairs of key and text.
    """
    faults: list[Fault] = []
    data, root = _read(path, faults) if path else ({}, None)
    if faults:  # what the rest lacks is only the file
        raise ConfigError(faults)
    given = _merge_environment(schema, data, os.environ if environment is None else environment, faults)
    settings = _decode_struct(schema, data, "", faults)
    if faults or settings is None:
        raise ConfigError(sorted((_traced(fault, given, root) for fault in faults), key=lambda it: it.line))
    return settings


def _traced(fault: Fault, given: Mapping[str, str], root: yaml.Node | None) -> Fault:
    """The fault with the variable or the line it comes from."""
    for key, name in given.items():
        if fault.where == key or fault.where.startswith((f"{key}.", f"{key}[")):
            return Fault(fault.where, f"{fault.what} (from {name})")
    return fault._replace(line=_line_of(root, fault.where))


def _line_of(node: yaml.Node | None, where: str) -> int:
    """Line of a dotted path, or of the innermost part of it that is there. Keys may have dots in them."""
    line = 0
    while where:
        step = _step(node, where)
        if step is None:
            break
        mark, node, where = step
        line = mark.line + 1
    return line


def _step(node: yaml.Node | None, where: str) -> tuple[yaml.Mark, yaml.Node, str] | None:
    """The first key or index of ``where``: its place, its value, and the rest of the way."""
    if isinstance(node, yaml.SequenceNode):
        index = _INDEX.match(where)
        if index is None or int(index[1]) >= len(node.value):
            return None
        element = node.value[int(index[1])]
        return element.start_mark, element, where[index.end() :].removeprefix(".")
    if not isinstance(node, yaml.MappingNode):
        return None
    fitting = [
        (key, value)
        for key, value in node.value
        if key.value == where or where.startswith((f"{key.value}.", f"{key.value}["))
    ]
    if not fitting:
        return None
    key, value = max(fitting, key=lambda pair: len(pair[0].value))
    return key.start_mark, value, where[len(key.value) :].removeprefix(".")


def documented(schema: type[msgspec.Struct], prefix: str = "") -> Iterator[Documented]:
    """Every leaf of the schema in order, for docs/configuration.md."""
    for field in msgspec.structs.fields(schema):
        key = f"{prefix}{field.name}"
        base, meta = _unwrap(field.type)
        if _is_struct(base):
            yield from documented(base, f"{key}.")
            continue
        yield Documented(
            key=key,
            environment=ENVIRONMENT_PREFIX + key.upper().replace(".", "__"),
            default=field.default_factory()
            if field.default_factory is not msgspec.NODEFAULT
            else field.default,
            unit=str((meta.extra or {}).get("unit", "")) if meta else "",
            meaning=(meta.description or "") if meta else "",
            type=_type_name(base),
        )


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last one silently."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _construct_date(loader: _StrictLoader, node: yaml.ScalarNode) -> str:
    return loader.construct_scalar(node)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", _construct_date)


def _parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The document, and its nodes, which know their lines."""
    loader = _StrictLoader(text)
    try:
        root = loader.get_single_node()
        return (None if root is None else loader.construct_document(root)), root
    finally:
        loader.dispose()


def _read(path: Path, faults: list[Fault]) -> tuple[dict[str, Any], yaml.Node | None]:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            faults.append(Fault(str(path), f"larger than {FILE_BYTES_MAX} bytes"))
            return {}, None
        data, root = _parse_yaml(raw.decode())
    except OSError as error:
        faults.append(Fault(str(path), f"cannot be read: {error.strerror or error}"))
    except UnicodeDecodeError as error:
        faults.append(Fault(str(path), f"is not UTF-8 text (byte {error.start})"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        faults.append(Fault(str(path), f"is not valid YAML: {' '.join(str(error).split())}"))
    else:
        if data is None:
            return {}, None
        if isinstance(data, dict):
            return data, root
        faults.append(Fault(str(path), "must be a mapping of sections"))
    return {}, None


def _merge_environment(
    schema: type[msgspec.Struct], data: dict[str, Any], environment: Mapping[str, str], faults: list[Fault]
) -> dict[str, str]:
    """Put the environment's values over the file's; which key came by which name."""
    given: dict[str, str] = {}
    known = {leaf.environment: leaf.key for leaf in documented(schema)}
    types = dict(_leaf_types(schema))
    for name in sorted(environment):
        if not name.upper().startswith(ENVIRONMENT_PREFIX):
            continue
        key = known.get(name.upper())
        if key is None:
            faults.append(Fault(name, f"unknown setting{_suggest(name.upper(), known)}"))
            continue
        value: Any = environment[name]
        if types[key] is not str:
            try:
                value, _ = _parse_yaml(value)
            except (yaml.YAMLError, ValueError, RecursionError):
                faults.append(Fault(name, f"is not valid YAML: {value[:80]!r}"))
                continue
        *sections, leaf = key.split(".")
        target = data
        for section in sections:
            below = target.setdefault(section, {})
            if not isinstance(below, dict):
                break  # the file's fault, reported by the walk
            target = below
        else:
            target[leaf] = value
            given[key] = name
    return given


def _leaf_types(schema: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in msgspec.structs.fields(schema):
        base, _ = _unwrap(field.type)
        if _is_struct(base):
            yield from _leaf_types(base, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", base


def _decode_struct(schema: type[S], data: Any, where: str, faults: list[Fault]) -> S | None:
    """The struct, with defaults in the place of faulty values so that the rest can be checked too."""
    if not isinstance(data, dict):
        faults.append(Fault(where.rstrip("."), f"must be a mapping, not {_describe(data)}"))
        data = {}
    fields = {field.name: field for field in msgspec.structs.fields(schema)}
    faults.extend(
        Fault(f"{where}{key}", f"unknown key{_suggest(key, fields)}") for key in data if key not in fields
    )
    values: dict[str, Any] = {}
    for name, field in fields.items():
        required = field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
        if name in data or _is_struct(_unwrap(field.type)[0]):
            values[name] = _decode_value(field.type, data.get(name, {}), f"{where}{name}", faults)
        elif required:
            faults.append(Fault(f"{where}{name}", "is required"))
    try:
        settings = schema(**{name: value for name, value in values.items() if value is not None})
    except TypeError:  # a required value is missing, and said so above
        return None
    return _own_faults(settings, where, faults)


def _decode_value(kind: Any, value: Any, where: str, faults: list[Fault]) -> Any:
    """The value, or None with a fault said."""
    base, _ = _unwrap(kind)
    element = _element_of(base)
    if element is not None:
        if isinstance(value, list):
            return [
                _decode_struct(element, it, f"{where}[{place}].", faults) for place, it in enumerate(value)
            ]
        faults.append(Fault(where, f"must be a list, not {_describe(value)}"))
        return None
    parts = get_args(base)
    struct: Any = next((part for part in parts if _is_struct(part)), None) if type(None) in parts else base
    if _is_struct(struct):
        return _decode_struct(struct, value, f"{where}.", faults)
    try:
        return msgspec.convert(_in_any_case(value, base), kind, strict=True)
    except msgspec.ValidationError as error:
        faults.append(Fault(where, _plain(error, value, base)))
    return None


def _in_any_case(value: Any, base: Any) -> Any:
    """A choice may be written in any case: Falco writes ``Warning``."""
    if get_origin(base) is not Literal or not isinstance(value, str):
        return value
    return next((choice for choice in get_args(base) if choice.lower() == value.lower()), value)


def _own_faults(settings: S, where: str, faults: list[Fault]) -> S:
    """What a component says of its settings as a whole, except of keys that are wrong by themselves."""
    said = [Fault(f"{where}{key}".rstrip("."), what) for key, what in getattr(settings, "faults", tuple)()]
    if said:
        known = {fault.where for fault in faults}
        faults.extend(fault for fault in said if fault.where not in known)
    return settings


def _plain(error: msgspec.ValidationError, value: Any, base: Any) -> str:
    text = str(error).replace("`", "").replace(" - at $", " at ")
    if get_origin(base) is Literal:
        return f"{value!r} is not one of {', '.join(map(str, get_args(base)))}"
    if bool in get_args(base):
        return f"{value!r} is not one of {', '.join(_choices(base))}"
    hint = "; put it in quotes" if re.search(r"Expected str\b.*, got (int|float|bool)\b", text) else ""
    plain = f"{text[0].lower()}{text[1:]}"
    for types, words in (("str | array | object", "text, list or mapping"), ("str | array", "text or list")):
        plain = plain.replace(types, words)
    return f"{plain} ({value!r}){hint}"


def _suggest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _describe(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]


def _unwrap(annotated: Any) -> tuple[Any, msgspec.Meta | None]:
    if get_origin(annotated) is Annotated:
        base, *metas = get_args(annotated)
        return base, next((meta for meta in metas if isinstance(meta, msgspec.Meta)), None)
    return annotated, None


def _is_struct(base: Any) -> bool:
    return isinstance(base, type) and issubclass(base, msgspec.Struct)


def _element_of(base: Any) -> Any:
    """The struct of a list of structs."""
    parts = get_args(base) if get_origin(base) is list else ()
    return next((part for part in parts if _is_struct(part)), None)


def _choices(base: Any) -> list[str]:
    """Of a switch that may also be left to the program (``bool | Literal["auto"]``), as a person writes them."""
    parts = get_args(base)
    literals = [part for part in parts if get_origin(part) is Literal]
    return [str(choice) for part in literals for choice in get_args(part)] + ["true", "false"] * (
        bool in parts
    )


def _type_name(base: Any) -> str:
    if bool in get_args(base):
        return " \\| ".join(_choices(base))
    if get_origin(base) is Literal:
        return " \\| ".join(map(str, get_args(base)))
    if _element_of(base) is not None:
        return "list"
    if isinstance(base, type) and not get_args(base):
        return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
            base.__name__, base.__name__
        )
    return (
        re.sub(r"Annotated\[([a-z]+), .*?\)\]", r"\1", str(base)).replace("typing.", "").replace("|", "\\|")
    )
