"""A stage's config from its command line: flags, `--config` files, presets, and the names of other frameworks.

A flag wins over the file, the file over the preset, the preset over the defaults. Names may have dashes or underscores;
a name of TRL, trlx, OpenRLHF or verl (`aliases.py`) is taken for ours, with a line that says so.
"""

import argparse
import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from .aliases import ALIASES, TRLX_METHOD, Alias
from .config import CommonConfig, DataConfig, UserError, range_text
from .presets import PRESETS


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print a usage text and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def make_parser(stage: str, description: str, config_class: type) -> Parser:
    """A parser with `--config`, `--preset` where the stage has presets, and one flag for each field.

    Flags that are not given leave no trace in the result.
    """
    parser = Parser(
        prog=f"rlhf {stage}",
        description=description,
        usage="%(prog)s [--flag value …]",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    flags = parser.add_argument_group("flags (dashes or underscores)")
    flags.add_argument("--config", metavar="FILE", help="JSON or YAML file with values for these flags; flags win")
    if stage in PRESETS:
        names = "{" + ",".join(PRESETS[stage]) + "}"
        flags.add_argument("--preset", metavar=names, help="the conventions of a reference; --config and flags win")
    types_of = typing.get_type_hints(config_class)
    shared = {field.name for part in (CommonConfig, DataConfig) for field in dataclasses.fields(part)}
    fields = dataclasses.fields(config_class)
    for field in sorted(fields, key=lambda field: (not _required(field), field.name in shared)):
        kind, _, many = _kind(types_of[field.name])
        flag = _flag(field.name)
        help = f"{field.metadata.get('help', '')} {_default_text(field)}".replace("%", "%%")
        if kind is bool:
            flags.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
            continue
        choices = field.metadata.get("choices")
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()
        if many:
            flags.add_argument(flag, metavar=metavar, help=help, nargs="+", action="extend")
        else:
            flags.add_argument(flag, metavar=metavar, help=help)
    flags.add_argument("-h", "--help", action="store_true", help="show this text")
    return parser


def parse_config(parser: Parser, stage: str, config_class: type, argv: list[str]) -> Any:
    """The config of a command line. Raises UserError naming what is unknown, missing, given twice or ill-typed."""
    kinds = typing.get_type_hints(config_class)
    fields = {field.name for field in dataclasses.fields(config_class)}
    names = Names(stage, fields)
    switches = {name for name in fields if _kind(kinds[name])[0] is bool}
    given, rest = parser.parse_known_args(_plain_flags(argv, switches))
    flags = vars(given)
    path, preset = flags.pop("config", None), flags.pop("preset", None)
    implied: dict[str, Any] = {}
    for name, value in _unknown_flags(rest):
        names.take(name, value, flags, implied)
    from_file: dict[str, Any] = {}
    for name, value in (_read_file(path) if path else {}).items():
        if name == "preset":
            preset = preset or value
        else:
            names.take(name, value, from_file, implied, f"{path}: ")
    values = _preset(stage, preset) | implied | from_file | flags

    values = {name: convert(_flag(name), value, kinds[name]) for name, value in values.items()}
    for field in dataclasses.fields(config_class):
        if _required(field) and field.name not in values:
            raise UserError(f"{_flag(field.name)} is required: {field.metadata.get('help', '')}")
    return config_class(**values)


def convert(flag: str, value: Any, annotation: Any) -> Any:
    """A flag's text, or a value of a config file, as the field's type; raises UserError naming what was wanted."""
    kind, optional, many = _kind(annotation)
    if many:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(flag, item, kind) for item in items)
    if optional and (value is None or value in ("none", "None")):
        return None
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        fits = True
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not fits and not (isinstance(value, str) and kind in (int, float)):
        raise UserError(f"{flag} must be {_wanted(kind, optional)}, got {value!r}")
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{flag} must be {_wanted(kind, optional)}, got {value!r}") from None


# Names that are not ours


class Names:
    """Gives a value to the field that its name stands for: ours as it is, another framework's through its alias."""

    def __init__(self, stage: str, fields: set[str]) -> None:
        self.stage, self.fields = stage, fields
        mine = [alias for alias in ALIASES if not alias.stages or stage in alias.stages]
        self.aliases = [alias for alias in mine if {*alias.ours.split(), *alias.also} <= fields]
        self.elsewhere = [alias for alias in ALIASES if alias not in self.aliases]

    def take(self, name: str, value: Any, values: dict[str, Any], implied: dict[str, Any], where: str = "") -> None:
        """Put `value` into `values` under our name, and what else the name means into `implied`.

        where: the file that the name stands in, "" for a flag. Raises UserError for a name that nobody knows, one that
        is refused, and one whose field has a value already.
        """
        name = name.removeprefix(TRLX_METHOD)
        if name in self.fields:
            new = {name: value}
        else:
            alias = self._alias(name, where)
            new = alias.translate(value, where)
            implied |= alias.also
            if str(value).lower() in alias.yields:
                implied |= new
            said = " ".join(_spelled(each, meant) for each, meant in {**new, **alias.also}.items())
            note = alias.note and f" ({alias.note})"
            print(f"rlhf {self.stage}: {where}{name} of {alias.source} is {said} here{note}", file=sys.stderr)
            if str(value).lower() in alias.yields:
                return
        for each in new:
            if each in values:
                raise UserError(f"{where}{name} is {_flag(each)}, which is given twice")
        values |= new

    def _alias(self, name: str, where: str) -> Alias:
        matches = [alias for alias in self.aliases if alias.theirs == name]
        for alias in matches:
            if alias.ours:
                return alias
        if matches:
            raise UserError(f"{where}{name} of {matches[0].source} is not taken: {matches[0].note}")
        for alias in self.elsewhere:
            if alias.theirs == name:
                ours = " ".join(map(_flag, alias.ours.split()))
                raise UserError(f"{where}{name} of {alias.source} is {ours}, which rlhf {self.stage} does not have")
        known = [*self.fields, "config", *(alias.theirs for alias in self.aliases)]
        if where:
            raise UserError(f"{where}unknown flag {name}{suggestion(name, known)}")
        raise UserError(f"unknown flag {_flag(name)}{suggestion(_flag(name), map(_flag, known))}")


def _unknown_flags(rest: list[str]) -> list[tuple[str, Any]]:
    """(name, value) of what argparse did not know: `--name values …`, and `a.b=value` as verl's command line has it."""
    found: list[tuple[str, list[str]]] = []
    for word in rest:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            found.append((_field(name), [value] if equals else []))
        elif equals and "." in name:
            found.append((_field(name), [value]))
        elif found:
            found[-1][1].append(word)
        else:
            raise UserError(f"{word!r} belongs to no flag")
    return [(name, (values if len(values) > 1 else values[0]) if values else True) for name, values in found]


def _plain_flags(argv: list[str], switches: set[str]) -> list[str]:
    """Flags with dashes; `--flag true` and `--flag=false` of a switch become `--flag` and `--no-flag`."""
    plain: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        answer = value.lower() in ("true", "false")
        if flag and equals and answer and _field(flag) in switches:
            plain.append(_spelled(_field(flag), value.lower() == "true"))
        elif flag:
            plain.append(_flag(_field(flag)) + equals + value)
        elif answer and plain and plain[-1].startswith("--") and _field(plain[-1]) in switches:
            plain[-1] = _spelled(_field(plain[-1]), value.lower() == "true")
        else:
            plain.append(word)
    return plain


def suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# Presets and files


def _preset(stage: str, name: Any) -> dict[str, Any]:
    presets = PRESETS.get(stage, {})
    if name is None:
        return {}
    if name not in presets:
        raise UserError(f"preset must be one of {', '.join(presets) or 'none, as there is none here'}, got {name!r}")
    return dict(presets[name])


def _read_file(path: str) -> dict[str, Any]:
    """The values of a JSON or YAML file under dotted names with underscores."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.endswith(".json") else _load_yaml(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one object with flags and values, got {type(values).__name__}")
    return _flat(values)


def _flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + str(key).replace("-", "_")
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _load_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(str(error)) from error


# Fields


def _kind(annotation: Any) -> tuple[type, bool, bool]:
    """(element type, may be None, is a tuple) of str, int, float, bool, `… | None` or tuple[…, ...]."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], False, True
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (kind,) = (option for option in typing.get_args(annotation) if option is not types.NoneType)
        return kind, True, False
    return annotation, False, False


def _wanted(kind: type, optional: bool) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    return f"{words} or none" if optional else words


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _required(field: Any) -> bool:
    return field.default is MISSING


def _default_text(field: Any) -> str:
    allowed = range_text(field)
    allowed = allowed and f"; {allowed}"
    if _required(field):
        return f"(required{allowed})"
    default = field.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default)) or "none"
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"(default: {'none' if default is None else default}{allowed})"


def _field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _spelled(name: str, value: Any) -> str:
    """A field with its value, as one would type it."""
    if isinstance(value, bool):
        return _flag(name) if value else _flag(f"no_{name}")
    return f"{_flag(name)} {value:g}" if isinstance(value, float) else f"{_flag(name)} {value}"
