"""What pydantic found wrong, told to the person who wrote the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fewstep import registry, section
from fewstep.errors import did_you_mean
from fewstep.section import AT_FIELD, found

_TOLD = 3


def explain(error: ValidationError, root: type[BaseModel], values: Mapping[str, Any]) -> str:
    """One line for the first mistakes of `values`, read as a `root`."""
    mistakes = error.errors()
    more = f"; and {len(mistakes) - _TOLD} more" if len(mistakes) > _TOLD else ""
    return "; ".join(_one(mistake, root, values) for mistake in mistakes[:_TOLD]) + more


_PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "int_parsing": "a whole number is needed",
        "int_type": "a whole number is needed",
        "int_from_float": "a whole number is needed",
        "float_parsing": "a number is needed",
        "float_type": "a number is needed",
        "finite_number": "a finite number is needed",
        "bool_parsing": "true or false is needed",
        "bool_type": "true or false is needed",
        "string_type": "a word is needed",
        "path_type": "a path is needed",
        "dict_type": "a mapping of keys to values is needed",
        "tuple_type": "a list is needed",
    }
)


def _one(mistake: Any, root: type[BaseModel], values: Mapping[str, Any]) -> str:
    """The place, what is allowed, what was found, and the nearest right name."""
    inner = (mistake["ctx"]["field"],) if mistake["type"] == AT_FIELD else ()
    place = ".".join(map(str, (*mistake["loc"], *inner)))
    message = _message(mistake, root, values)
    return f"{place}: {message}" if place else message


def _message(mistake: Any, root: type[BaseModel], values: Mapping[str, Any]) -> str:
    location, kind, given = mistake["loc"], mistake["type"], found(mistake["input"])
    match kind:
        case "value_error":
            return mistake["msg"].removeprefix("Value error, ")
        case section.AT_FIELD:
            return mistake["msg"]
        case "extra_forbidden":
            known = _keys_at(location[:-1], root, values)
            near = did_you_mean(str(location[-1]), known)
            return f"unknown key{near}" if near else f"unknown key, allowed are {', '.join(known)}"
        case "model_type":
            return f"a section with the keys {', '.join(_keys_at(location, root, values))} is needed; found {given}"
        case "missing" if isinstance(location[-1], int):
            return f"missing, the list is too short; found {given}"
        case "too_long":
            return f"at most {mistake['ctx']['max_length']} values are allowed; found {given}"
        case "missing":
            keys = ", ".join(_keys_at(location, root, values))
            return f"missing, a section with the keys {keys} is needed" if keys else "missing"
        case "literal_error" | "enum":
            return f"{_allowed(mistake)}; found {given}{did_you_mean(str(mistake['input']), _quoted(mistake['msg']))}"
    return f"{_PLAIN.get(kind) or _allowed(mistake)}; found {given}"


def _allowed(mistake: Any) -> str:
    """Pydantic's own sentence, without a capital and without its word for a value."""
    text = mistake["msg"].removeprefix("Input should be ")
    return f"must be {text}" if text != mistake["msg"] else text[0].lower() + text[1:]


def _quoted(text: str) -> list[str]:
    """The words in single quotes, which is how pydantic lists what is allowed."""
    return text.split("'")[1::2]


def _keys_at(location: Sequence[Any], root: type[BaseModel], values: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the section at a place; none where there is no section."""
    here: Any = root
    for part in location:
        model = _section_in(here)
        if model is None:
            here = get_args(here)[-1] if get_origin(here) is dict else None
        elif model is root and part == "method":
            here = _method_config(values)
        else:
            here = model.model_fields[part].annotation if part in model.model_fields else None
    last = _section_in(here)
    return tuple(last.model_fields) if last is not None else ()


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation is, or allows beside null."""
    options = (annotation,) if get_origin(annotation) is dict else (annotation, *get_args(annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _method_config(values: Mapping[str, Any]) -> type[BaseModel]:
    given = values.get("method")
    name = given.get("name") if isinstance(given, Mapping) else None
    return registry.get(name).Config if name in registry.names() else registry.MethodConfig
