"""A small language of conditions on columns, as after SQL's WHERE, parsed into an Arrow expression and nothing else.

    condition  = and_part { OR and_part }
    and_part   = not_part { AND not_part }
    not_part   = NOT not_part | "(" condition ")" | test
    test       = column ( "=" | "!=" | "<>" | "<" | "<=" | ">" | ">=" ) ( literal | column )
               | column [NOT] IN "(" literal { "," literal } ")"
               | column [NOT] BETWEEN literal AND literal
               | column [NOT] LIKE text
               | column IS [NOT] NULL
               | column                                            (a boolean column)
    column     = name | name "." name | "\\"" any characters "\\""     (a dotted part may hold hyphens)
    literal    = number | text | TRUE | FALSE ;  text in single quotes, one inside is doubled

Nulls behave as in SQL: a test of a null is neither true nor false, and a row counts only where the condition is true.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies import suggest

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>[-+]?+(?:\d++\.?+\d*+|\.\d++)(?:[eE][-+]?+\d++)?+(?![\w.]))
    | (?P<text>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")*"|`[^`]*`)
    | (?P<name>[^\W\d]\w*(?:\.[\w-]+)*)
    | (?P<operator><=|>=|<>|!=|==|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE,
)
# (Numbers are read possessively: a long one that turns out to be none is not read again from each of its digits.)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_KEYWORDS = frozenset({"and", "or", "not", "in", "like", "is", "null", "true", "false", "between"})
_DEEPEST = 64
_LONGEST = 10_000
_MOST_VALUES = 200
_SHOWN = 200  # characters of the condition that a sentence repeats


def parse_where(text: str, schema: pa.Schema) -> pc.Expression:
    """The condition as an expression over `schema`, to be evaluated by Arrow; see the grammar above.

    Raises RefusedError where the text is no condition, names an unknown column (with the nearest one), or compares a
    column with a value of another type.
    """
    if len(text) > _LONGEST:
        raise RefusedError(f"the condition has {len(text):,} characters, more than the {_LONGEST:,} that are read.")
    return _Parser(text, schema).parse()


@dataclass(frozen=True, slots=True)
class _Token:
    """kind: number, text, quoted, name, operator or end; start: where it stands in the condition."""

    kind: str
    value: str
    start: int


class _Parser:
    def __init__(self, text: str, schema: pa.Schema) -> None:
        self._text = text
        self._schema = schema
        self._tokens: list[_Token] = list(self._scan())
        self._next = 0
        self._depth = 0

    def parse(self) -> pc.Expression:
        if self._peek().kind == "end":
            raise RefusedError("the condition is empty; write for example width > 300.")
        found = self._or()
        if self._peek().kind != "end":
            self._fail("and, or, or the end of the condition", self._peek())
        return found

    def _scan(self) -> Iterator[_Token]:
        place = 0
        end = len(self._text.rstrip())
        while place < end:
            match = _TOKEN.match(self._text, place)
            if match is None:
                start = place + len(self._text[place:]) - len(self._text[place:].lstrip())
                raise RefusedError(
                    f"the condition cannot be read from {self._text[start : start + 20]!r} on{self._hint(start)}."
                )
            kind = str(match.lastgroup)
            yield _Token(kind, match[kind], match.start(kind))
            place = match.end()
        yield _Token("end", "", len(self._text))

    def _hint(self, start: int) -> str:
        if self._text[start] == "'":
            return ": a quote is opened and not closed"
        return ": text stands in single quotes, column names with unusual characters in double ones"

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        if token.kind != "end":
            self._next += 1
        return token

    def _accept(self, *words: str) -> str | None:
        """The next token, taken, when it is one of these keywords or operators."""
        token = self._peek()
        value = token.value.lower()
        if token.kind in ("name", "operator") and value in words:
            self._next += 1
            return value
        return None

    def _expect(self, word: str) -> None:
        if self._accept(word) is None:
            self._fail(word.upper() if word.isalpha() else f"{word!r}", self._peek())

    def _fail(self, wanted: str, token: _Token) -> NoReturn:
        found = "it ends" if token.kind == "end" else f"there is {self._text[token.start : token.start + 20]!r}"
        raise RefusedError(f"the condition {_short(self._text)!r} wants {wanted} where {found}.")

    def _or(self) -> pc.Expression:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise RefusedError(f"the condition is nested more than {_DEEPEST} deep.")
        found = self._and()
        while self._accept("or"):
            found = found | self._and()
        self._depth -= 1
        return found

    def _and(self) -> pc.Expression:
        found = self._not()
        while self._accept("and"):
            found = found & self._not()
        return found

    def _not(self) -> pc.Expression:
        negated = False
        while self._accept("not"):
            negated = not negated
        if self._accept("("):
            found = self._or()
            self._expect(")")
        else:
            found = self._test()
        return ~found if negated else found

    def _test(self) -> pc.Expression:
        field = self._column()
        operator = self._accept(*_COMPARE)
        if operator is not None:
            return _COMPARE[operator](*self._operands(field))
        if self._accept("is"):
            negated = self._accept("not")
            self._expect("null")
            return _field(field).is_valid() if negated else _field(field).is_null()
        negated = self._accept("not")
        if self._accept("in"):
            test = self._in(field)
        elif self._accept("between"):
            low = self._literal(field)
            self._expect("and")
            high = self._literal(field)
            test = _COMPARE[">="](*_alike(field, low)) & _COMPARE["<="](*_alike(field, high))
        elif self._accept("like"):
            test = self._like(field)
        elif negated is None and pa.types.is_boolean(_type(field)):
            return _field(field)
        else:
            self._fail("=, !=, <, <=, >, >=, IN, BETWEEN, LIKE or IS NULL", self._peek())
        return ~test if negated else test

    def _in(self, field: pa.Field) -> pc.Expression:
        self._expect("(")
        found = _COMPARE["="](*_alike(field, self._literal(field)))
        count = 1
        while self._accept(","):
            count += 1
            if count > _MOST_VALUES:
                raise RefusedError(f"IN lists more than {_MOST_VALUES} values; give them as several conditions.")
            found = found | _COMPARE["="](*_alike(field, self._literal(field)))
        self._expect(")")
        return found

    def _like(self, field: pa.Field) -> pc.Expression:
        if not _is_text(_type(field)):
            raise RefusedError(f"LIKE is for text, and {field.name} is {_type(field)}.")
        token = self._take()
        if token.kind != "text":
            self._fail("a text in single quotes (% is any characters, _ is one)", token)
        return pc.match_like(_field(field), _unquoted(token))

    def _column(self) -> pa.Field:
        token = self._take()
        if token.kind == "text":
            raise RefusedError(
                f"{_short(token.value)} stands in single quotes, which hold text; a column's name stands bare or in double ones."
            )
        if token.kind not in ("name", "quoted") or (token.kind == "name" and token.value.lower() in _KEYWORDS):
            self._fail("the name of a column", token)
        return self._named(token)

    def _named(self, token: _Token) -> pa.Field:
        name = _unquoted(token) if token.kind == "quoted" else token.value
        if name not in self._schema.names:
            near = [other for other in (f"{cf.PREFIX}{name}", cf.score(name)) if other in self._schema.names]
            hint = f"; did you mean {near[0]!r}?" if near else suggest(name[:_SHOWN], self._schema.names)
            known = "" if hint else f"; there are {', '.join(self._schema.names)}"
            raise RefusedError(
                f"the condition names the column {_short(name)!r}, which the rows do not have{hint or known + '.'}"
            )
        if self._schema.names.count(name) > 1:
            raise RefusedError(f"the rows have several columns {name!r}, so a condition on it is ambiguous.")
        field = self._schema.field(name)
        if pa.types.is_nested(_type(field)):
            raise RefusedError(f"{name} is {field.type}, which a condition cannot compare.")
        return field

    def _operands(self, field: pa.Field) -> tuple[pc.Expression, Any]:
        """The column, and the literal or column that it is compared with."""
        token = self._peek()
        if token.kind == "quoted" or (token.kind == "name" and token.value.lower() not in _KEYWORDS):
            other = self._named(token)
            if _family(other) != _family(field):
                raise RefusedError(
                    f"{field.name} is {_type(field)} and {other.name} is {_type(other)}, which cannot be compared; "
                    "text stands in single quotes."
                )
            self._next += 1
            if _family(field) == "number" and _type(field) != _type(other):
                return _as_double(field), _as_double(other)
            return _field(field), _field(other)
        return _alike(field, self._literal(field))

    def _literal(self, field: pa.Field) -> pa.Scalar:
        token = self._take()
        family = _family(field)
        word = token.value.lower()
        if token.kind == "name" and word == "null":
            raise RefusedError(f"write {field.name} IS NULL or IS NOT NULL: nothing is equal to NULL.")
        if token.kind == "number" and family == "number":
            return _number(token.value, _type(field))
        if token.kind == "text" and family == "text":
            return pa.scalar(_unquoted(token))
        if token.kind == "name" and word in ("true", "false") and family == "boolean":
            return pa.scalar(word == "true")
        if token.kind == "text" and family == "other":
            try:
                return pa.scalar(_unquoted(token)).cast(_type(field))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise RefusedError(f"{_short(token.value)} is no {_type(field)}, which {field.name} is.") from None
        wanted = {"number": "a number", "boolean": "TRUE or FALSE"}.get(family, "a text in single quotes")
        return self._fail(f"{wanted} ({field.name} is {_type(field)})", token)


def _field(field: pa.Field) -> pc.Expression:
    found = pc.field(field.name)
    return found.cast(_type(field)) if pa.types.is_dictionary(field.type) else found


def _type(field: pa.Field) -> pa.DataType:
    return field.type.value_type if pa.types.is_dictionary(field.type) else field.type


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _family(field: pa.Field) -> str:
    """number, text, boolean or other (dates and times)."""
    kind = _type(field)
    if _is_text(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return "boolean" if pa.types.is_boolean(kind) else "other"


def _number(text: str, kind: pa.DataType) -> pa.Scalar:
    """A scalar of the column's own type where that holds the number, else of float64."""
    if pa.types.is_integer(kind) and re.fullmatch(r"[-+]?\d+", text):
        with contextlib.suppress(
            pa.ArrowInvalid, OverflowError, ValueError
        ):  # too large for Arrow, or for Python to read
            return pa.scalar(int(text), kind)
    number = float(text)
    if not math.isfinite(number):
        raise RefusedError(f"the number {_short(text)} is larger than any that a column holds.")
    return pa.scalar(number, pa.float64())


def _alike(field: pa.Field, literal: pa.Scalar) -> tuple[pc.Expression, pa.Scalar]:
    """The column and the literal, of types that Arrow compares without refusing large integers."""
    if literal.type == pa.float64() and _family(field) == "number":
        return _as_double(field), literal
    return _field(field), literal


def _as_double(field: pa.Field) -> pc.Expression:
    return _field(field).cast(pa.float64(), safe=False)


def _short(words: str) -> str:
    return words if len(words) <= _SHOWN else words[:_SHOWN] + "..."


def _unquoted(token: _Token) -> str:
    quote = token.value[0]
    return token.value[1:-1].replace(quote * 2, quote)
