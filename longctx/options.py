"""The configuration is the command line: options are derived from frozen config dataclasses.

A field `max_context` of any group is `--max-context`, the environment variable
LONGCTX_MAX_CONTEXT and the key `max_context` of the TOML file given by `--config` (or
LONGCTX_CONFIG). The command line wins over the environment, that over the file, that over the
default. Unknown names are errors. This is the only place that looks at the environment.
"""

import argparse
import dataclasses
import difflib
import math
import re
import tomllib
import types
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as type_hints

_PREFIX = "LONGCTX_"
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLEANS |= {"0": False, "false": False, "no": False, "off": False}
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_METAVARS = {int: "N", float: "N", str: "TEXT", Path: "PATH"}

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    name: str  # the field's
    kind: type  # of one value
    choices: tuple[str, ...] | None
    many: bool
    help: str
    default: Any

    def parse(self, value: object, source: str) -> Any:
        """Turn text of the environment, or a value of TOML, into the field's value, or end."""
        if self.many:
            parts = value.split(",") if isinstance(value, str) else value
            if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
                _fail(f"{source} must be a list of texts")
            return tuple(parts)
        if self.choices is not None and value not in self.choices:
            _fail(f"{source} is {value!r}; choose from {', '.join(self.choices)}")
        if isinstance(value, str) and self.kind is bool:
            value = _BOOLEANS.get(value.lower(), value)
        elif isinstance(value, int) and not isinstance(value, bool) and self.kind is float:
            value = float(value)
        elif isinstance(value, str) and self.kind is not str and source.startswith(_PREFIX):
            try:
                value = self.kind(value)
            except ValueError:
                _fail(f"{source} is {value!r}, it must be {_NAMES[self.kind]}")
        elif isinstance(value, str) and self.kind is Path:
            value = Path(value)
        if not isinstance(value, self.kind) or (self.kind is not bool and isinstance(value, bool)):
            _fail(f"{source} is {value!r}, it must be {_NAMES[self.kind]}")
        return value


def add_options(
    parser: argparse.ArgumentParser, config_type: type, *, only: Container[str] | None = None
) -> None:
    """Add the options of a config tree, and `--config`; call once for each tree of a command.

    With `only`, no others than the fields of these names: a command may need a part of a tree.
    """
    known: tuple[type, ...] = parser.get_default("config_types") or ()
    if not known:
        parser.add_argument(
            "--config", type=Path, metavar="FILE", help="TOML file with these options as keys"
        )
    parser.set_defaults(config_types=(*known, config_type))
    _by_name((*known, config_type))  # a name in two trees is a bug: noticed here
    group = parser.add_argument_group(config_type.__name__)
    for option in _options(config_type):
        if only is not None and option.name not in only:
            continue
        text = option.help.replace("%", "%%")
        if option.default not in (None, (), ""):
            text += f" (default: {option.default})".replace("%", "%%")
        flag = "--" + option.name.replace("_", "-")
        # Absent options leave no trace, so that the environment and the file can speak
        shared: dict[str, Any] = {"help": text, "dest": option.name, "default": argparse.SUPPRESS}
        if option.kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        elif option.many:
            group.add_argument(flag, action="append", metavar="TEXT", **shared)
        elif option.choices is not None:
            group.add_argument(flag, choices=option.choices, **shared)
        else:
            group.add_argument(flag, type=option.kind, metavar=_METAVARS[option.kind], **shared)


def read_options(
    namespace: argparse.Namespace,
    config_type: type[Config],
    *,
    environment: Mapping[str, str],
    file: Path | None,
    others: Iterable[type] = (),
) -> Config:
    """Merge command line, environment, file and defaults into a config.

    A key may belong to any config tree that the parser was given, or to `others`: those of
    other commands, since file and environment are shared. Ends the program with one line on
    an unknown name or a bad value.
    """
    known = _by_name((*namespace.config_types, *others))
    given: dict[str, Any] = {}
    if file is None and f"{_PREFIX}CONFIG" in environment:
        file = Path(environment[f"{_PREFIX}CONFIG"])
    if file is not None:
        for key, value in _read_toml(file).items():
            name = key.replace("-", "_")
            option = known.get(name) or _unknown(f"key {key!r} in {file}", name, known)
            given[name] = option.parse(value, f"{key} in {file}")
    for variable, text in environment.items():
        name = variable.removeprefix(_PREFIX).lower()
        if not variable.startswith(_PREFIX) or name == "config":
            continue
        if _is_of_kubernetes(variable, text):
            continue
        option = known.get(name) or _unknown(f"variable {variable}", name, known, _PREFIX)
        given[name] = option.parse(text, variable)
    for name in known.keys() & vars(namespace).keys():
        value = getattr(namespace, name)
        given[name] = tuple(value) if known[name].many else value
    try:
        config: Config = _build(config_type, given)
    except ValueError as error:
        _fail(str(error))
    return config


def _options(config_type: Any) -> Iterator[_Option]:
    hints = type_hints(config_type, include_extras=True)
    for field in dataclasses.fields(config_type):
        hint, help_text = hints[field.name], ""
        if get_origin(hint) is Annotated:
            hint, help_text = get_args(hint)
        if dataclasses.is_dataclass(hint):
            yield from _options(hint)
            continue
        if get_origin(hint) in (Union, types.UnionType):
            (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
        choices = get_args(hint) if get_origin(hint) is Literal else None
        many = get_origin(hint) is tuple
        kind = str if choices or many else hint
        assert kind in _NAMES, f"{config_type.__name__}.{field.name}: no option for {kind}"
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        assert default is not dataclasses.MISSING, f"{field.name} needs a default"
        yield _Option(
            name=field.name, kind=kind, choices=choices, many=many, help=help_text, default=default
        )


def _by_name(config_types: Iterable[type]) -> dict[str, _Option]:
    found: dict[str, _Option] = {}
    for config_type in dict.fromkeys(config_types):
        for option in _options(config_type):
            assert option.name not in found, f"two options are called {option.name}"
            found[option.name] = option
    return found


def _build(config_type: Any, given: Mapping[str, Any]) -> Any:
    hints = type_hints(config_type)
    values = {}
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _build(hints[field.name], given)
        elif field.name in given:
            value = values[field.name] = given[field.name]
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name}={value} must be a finite number")
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not is_unicode(text):
                    raise ValueError(f"{field.name}={text!r} is not UTF-8 text")
    return config_type(**values)


def is_unicode(text: str) -> bool:
    """Whether an argument was text: bytes that are not UTF-8 reach a program as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        _fail(f"cannot read {file}: {error.strerror}")
    except ValueError as error:  # TOML's and UTF-8's
        _fail(f"{file} is not TOML: {error}")


# Kubernetes tells every pod where each service is. Of one called `longctx`, or `longctx-web`:
# LONGCTX_SERVICE_HOST, LONGCTX_SERVICE_PORT_HTTP, LONGCTX_PORT_80_TCP_ADDR, LONGCTX_WEB_PORT, ...
_SERVICE_VARIABLE = re.compile(
    rf"{_PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")


def _is_of_kubernetes(variable: str, text: str) -> bool:
    """Whether the variable tells the address of a service, which is no option of ours."""
    if _SERVICE_VARIABLE.fullmatch(variable) is not None:
        return True
    # LONGCTX_PORT is an option too, but that is a number.
    return variable.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(text) is not None


def _unknown(what: str, name: str, known: Iterable[str], prefix: str = "") -> NoReturn:
    close = difflib.get_close_matches(name, known, n=1)
    spelled = f"{prefix}{close[0].upper()}" if close and prefix else "".join(close)
    _fail(f"unknown {what}" + (f"; did you mean {spelled}?" if spelled else "; see --help"))


def _fail(message: str) -> NoReturn:
    raise SystemExit(f"longctx: {message}")
