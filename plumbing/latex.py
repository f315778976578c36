"""LaTeX -> text without dress -> tokens -> the tree that it means. Nothing is ever executed.

undress() removes what only decorates and writes in one way what has several spellings. read_tree() reads the result by
recursive descent: each method of Reader reads one level of the grammar, from a list of answers down to a number or a
letter, and returns its tree.
"""

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from plumbing import tree
from plumbing.tree import Node, Unreadable

MAX_DEPTH: int = 40  # nesting of brackets, fractions, exponents and functions that the reader follows
MAX_ITEMS: int = 100  # items of a list, cells of a matrix


# Answer -> text without dress -----------------------------------------------------------------------------------------
UNICODE = {  # signs and their LaTeX
    **dict.fromkeys("−–—‐‑﹣－", "-"), **dict.fromkeys("×✕", r"\times "), **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u200a\u3000", " "), **dict.fromkeys("’‘′ʹ", "'"),
    "÷": "/", "∕": "/", "⁄": "/", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "°": r"^\circ ", "≈": r"\approx ", "ℝ": r"\mathbb{R}", "，": ",", "（": "(", "）": ")", "、": ",", "；": ";",
    "％": "%", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅔": r"\frac{2}{3}",
    "∖": r"\setminus ", "…": r"\ldots ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "€": r"\text{euros}", "£": r"\text{pounds sterling}", "¥": r"\text{yen}", "¢": r"\text{cents}",
    "\u200b": "", "\ufeff": "",
}  # fmt: skip
GREEK = tree.words("alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi pi rho sigma tau phi chi psi omega")
UNICODE |= dict(zip("αβγδεζηθλμνξπρστφχψω", (f"\\{name} " for name in GREEK), strict=True))
UNICODE_TABLE = str.maketrans(UNICODE)
SUPERSCRIPTS, SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"
LIFTED = str.maketrans(SUPERSCRIPTS + SUBSCRIPTS, "0123456789+-()n" * 2)
TEXT = re.compile(r"\\(?:text[a-z]*|[mh]box|math(?:rm|bf|it|sf)|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
AFTER_VALUE = re.compile(r"[\d})!]$|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}\s*(?:/|\\cdot)$")


def write_as_fraction(match: re.Match) -> str:
    r"""A repeating decimal: 0.1\overline{6} -> \frac{15}{90}"""
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    top = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def undress_text(match: re.Match) -> str:
    r"""What \text{...} stands for: a comma (and), mathematics (225; A,C,F), or words, which stay \text{words}."""
    content = re.sub(r"\\[,;:! ]|[~{}$]", " ", match[1]).strip()
    if re.fullmatch(r"(?:,?\s*(?:and|or)|&)\s*,?", content):
        return " , "
    if "\\" in content or not content:
        return f" {TEXT.sub(undress_text, match[1])} "
    before = match.string[: match.start()].rstrip(" ~\\,;:")
    vector = len(content) == 1 and match[0].startswith(r"\mathbf")
    unit = AFTER_VALUE.search(before) and content[0].isalpha() and content not in ("e", "i", "d") and not vector
    if not unit and (not re.search(r"[A-Za-z]{2}", content) or content[0].isdigit() or content[-1] == "="):
        return f" {match[1]} "
    return ",".join(rf"\text{{{part.strip()}}}" for part in content.split(","))


DRESS = [  # patterns and what replaces them; applied in this order, each to the result of those before it
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\\\(?:\[-?[\d.]+\s*[a-z]{2}\])?", r"\\cr "),
        (rf"([{SUPERSCRIPTS}]+)", lambda m: "^{" + m[1].translate(LIFTED) + "}"),
        (rf"([{SUBSCRIPTS}]+)", lambda m: "_{" + m[1].translate(LIFTED) + "}"),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"(?<=\d)(?:\{,\}(?:\\!)?|\\!|\\,|,\s*\\!)\s*(?=\d{3}(?!\d))", ""),  # thousands
        (r"\\!", ""),
        (r"\\\$(?=\})", "dollars"),  # \text{\$}
        (TEXT.pattern, undress_text),
        (r"\^\{?\s*\\circ\s*\}?\s*(C|F)(?![A-Za-z])", r"\\text{degrees \1}"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", r"\\circ "),
        (r"\\(?:left|right)\s*\.", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])", ""),
        (r"\\(?:(?:display|text|script)style|(?:no)?limits|rm|bf|it|small|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])", " "),
        (r"\\(?:[hv]?phantom|color)\s*(?:\{[^{}]*\}|\S)|\\[hv]space\*?\{[^{}]*\}|\\q?quad|\\[,;:> ]|[~\s]+", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\(?:math(?!bb)[a-z]+|text[a-z]+|boldsymbol|bm|pmb|underline|boxed|fbox)\s*(?=\{)", ""),
        (r"^(-?)\\\$", r"\\text{dollars}\1"),
        (r"\\\$", " "),
        (r"\$|\\[()\[\]]", " "),
        (r"\\%|\\text\{\s*%\s*\}|(?<![a-z])(?:percent(?:age)?|pct)\b|\\text\{percent\}", "%"),
        (r"\\lvert|\\rvert|\\vert|\\mid(?![A-Za-z])", "|"),
        (r"\^\{?\s*\\prime\s*\}?", "'"),
        (r"\\text\{(?:all )?real(?: number)?s\}", r"\\mathbb{R}"),
        (r"\b([apAP])\.\s?([mM])\b\.?", r"\1\2"),
        (r"(?<!\.)\.(?=\s*[)\]}])", ""),  # a period inside brackets
        (r"\b(?:np|math|numpy|sympy)\.", ""),
        (r"(?<=\d)\s*((?:[kcm]?m|ft|mi|k?g|k?J|N|L)/(?:s|h|hr|min|kg|mol|m)(?:\^\{?\d\}?)?)$", r"\\text{\1}"),
        (r"\b([fgh])\s*\^\s*\{?\s*-1\s*\}?\s*(?=\()", r"\1'"),  # an inverse function is a name, not a power
        (r"\\\{ ?[a-z] ?(?:\\in ?\\mathbb ?\{?R\}? ?)?[:|](?=[^:]*(?:[<>=|]|\\[lgn]e))", r"\\{"),  # {x : x > 1}
        (r"^\](?=.*,)", "("),  # ]0,1[ is (0,1)
        (r"(?<=\w)\[$", ")"),
        (r"\*\*", "^"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"\.\.\.+", r"\\ldots "),
        (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))", write_as_fraction),
    ]
]


def undress(text: str) -> str:
    r"""The text without what only decorates it.

    >>> undress(r"\left(\dfrac12,\;1{,}000\text{ cm}\right)")
    '(\\frac12, 1000\\text{cm})'
    """
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # \\frac, escaped once too often
    text = text.translate(UNICODE_TABLE)
    for pattern, replacement in DRESS:
        text = pattern.sub(replacement, text)
    return re.sub(r"\s+", " ", text)


# Text -> tokens -------------------------------------------------------------------------------------------------------
class Token(NamedTuple):
    kind: str  # "num", "name" (one letter), "cmd", "word", "char" or "end"
    value: str


NAMES = dict.fromkeys(("infty", "infinity", "inf", "oo"), "infty") | {name: name for name in GREEK}
COMMANDS = {  # other names of one command
    r"\cdot": "*", r"\times": "*", r"\ast": "*", r"\div": "/", r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge",
    r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">", r"\neq": r"\ne", r"\lbrace": r"\{",
    r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\varnothing": r"\emptyset", r"\dots": r"\ldots",
    r"\cdots": r"\ldots", r"\colon": ":", r"\backslash": r"\setminus", r"\varphi": r"\phi", r"\land": ",",
    r"\varepsilon": r"\epsilon", r"\degree": r"\circ", r"\lor": ",", r"\equiv": "=", r"\overrightarrow": r"\vec",
}  # fmt: skip
RELATIONS = {"=", r"\approx", "<", ">", r"\le", r"\ge", r"\ne", r"\in"}
SET_SIGNS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "minus"}
CLOSING = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", "|": "|", r"\langle": r"\rangle"}
CLOSING |= {r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
ACCENTS = {r"\overline", r"\bar", r"\hat", r"\vec", r"\dot", r"\ddot", r"\tilde", r"\widehat"}
CONSTANTS = {r"\pi": tree.PI, r"\infty": tree.INFINITY, r"\emptyset": Node("set")}
MATRICES = {"pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array", "cases"}
NO_FACTOR = RELATIONS | set(SET_SIGNS) | set(CLOSING.values())  # what no factor of a product starts with
NO_FACTOR |= set(tree.words(r"\cr \end \circ \pm \mp \to \rightarrow \implies \Rightarrow \pmod"))
CHANGES_MEANING = re.compile(r"\b(?:not?|non|never|without|except|undefined|wrong|than|least|most|or)\b", re.I)
TOKEN = re.compile(
    r"(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,5}(?![A-Za-z\d.]))?)|\\text\{(?P<word>[^{}]*)\}"
    r"|(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<run>[A-Za-z]+)|(?P<char>\S)",
    re.S,
)


def tokenize(text: str) -> Iterator[Token]:
    """Numbers, commands, words and letters; a run of letters is a known name, a word, or a product of letters."""
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[match.lastgroup]
        if kind == "run":
            if value in ("and", "or"):
                yield Token("char", ",")
            elif value in tree.FUNCTIONS or value in NAMES:
                yield Token("cmd", "\\" + NAMES.get(value, value))
            elif value in tree.UNIT_WORDS or len(value) > 4:
                yield Token("word", value)
            else:
                yield from (Token("name", letter) for letter in value)
        elif kind in ("cmd", "char"):
            value = COMMANDS.get(value, value)
            yield Token("cmd" if value[0] == "\\" else "char", value)
        else:
            yield Token(kind, value)


# Tokens -> tree -------------------------------------------------------------------------------------------------------
class Reader:
    """Recursive descent over the tokens of one answer; each method reads one level of the grammar."""

    def __init__(self, text: str) -> None:
        self.tokens = list(tokenize(text))
        self.at = 0
        self.depth = 0
        self.in_bars = False  # inside |...|, where a bar closes and does not open

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else Token("end", "")

    def take(self) -> Token:
        self.at += 1
        return self.peek(-1)

    def accept(self, *values: str) -> str | None:
        """Take the next token if it is one of these signs."""
        token = self.peek()
        if token.kind in ("char", "cmd") and token.value in values:
            return self.take().value
        return None

    def expect(self, value: str) -> None:
        if not self.accept(value):
            raise Unreadable(f"{value!r} is missing")

    def items(self, closing: str) -> list[Node]:
        """What stands between commas up to a closing sign, which is left, or the end."""
        items: list[Node] = []
        while True:
            while self.accept(",", ";"):
                pass
            if self.peek().kind == "end" or self.peek().value == closing:
                return items
            items.append(self.item())
            if len(items) > MAX_ITEMS:
                raise Unreadable("too many items")
            if self.peek().value not in (",", ";"):
                return items

    def item(self) -> Node:
        """Words, then mathematics, then a unit: The answer is 5 cm."""
        words = []
        while self.peek().kind == "word":
            words.append(self.take().value)
            self.accept(":")  # Answer: 5
        before = " ".join(words)
        if words and (self.peek().kind == "end" or self.peek().value in (",", ";", ")", "]", "}", r"\}")):
            return Node("text", (re.sub(r"[\s.'\"-]+", " ", before).strip().casefold(),))
        value = self.relation()
        after = f"mod {self.argument()}" if self.accept(r"\pmod") else self.unit()
        if CHANGES_MEANING.search(f"{before} {after}"):
            raise Unreadable("words that cannot be ignored")
        unit = tree.normalize_unit(after or before)
        if unit and (
            after or unit in tree.CURRENCIES
        ):  # of the words before a value only "dollars" and the like are units
            return Node("unit", (value, unit))
        return value

    def unit(self) -> str:
        parts = []
        while True:
            if self.peek().kind == "word" or (parts and self.peek().value in "/*" and self.peek(1).kind == "word"):
                parts.append(self.take().value)
            elif parts and self.accept("^"):
                exponent = self.argument()
                parts.append(f"^{exponent.args[0]}" if exponent.kind == "num" else "^?")
            else:
                return " ".join(parts)

    def relation(self) -> Node:
        self.accept("=", r"\approx")  # "= 5"
        terms, signs = [self.ratio()], []
        while sign := self.accept(*RELATIONS):
            signs.append(sign)
            terms.append(self.ratio())
        return tree.make_relation(signs, terms)

    def ratio(self) -> Node:
        parts = [self.union()]
        while self.accept(":"):
            parts.append(self.union())
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def union(self) -> Node:
        value = self.sum()
        while sign := self.accept(*SET_SIGNS):
            parts = value.args if value.kind == SET_SIGNS[sign] == "union" else (value,)
            value = Node(SET_SIGNS[sign], (*parts, self.sum()))
        return value

    def sum(self) -> Node:
        terms = [self.product()]
        while sign := self.accept("+", "-"):
            terms.append(tree.negative(self.product()) if sign == "-" else self.product())
        return tree.add(*terms) if len(terms) > 1 else terms[0]

    def product(self) -> Node:
        start = self.at  # of the last factor
        factors = [self.signed()]
        while True:
            if sign := self.accept("*", "/"):
                start = self.at
                factors.append(self.signed() if sign == "*" else tree.power(self.signed(), tree.MINUS_ONE))
            elif self.starts_factor():
                if self.peek().kind == self.peek(-1).kind == "num" and start == self.at - 1:
                    raise Unreadable("two numbers side by side")
                start = self.at
                factors.append(self.powered())
            else:
                return tree.multiply(*factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind == "cmd":
            return token.value not in NO_FACTOR
        opens = token.value in ("(", "[", "{") or (token.value == "|" and not self.in_bars)
        return token.kind in ("num", "name") or (token.kind == "char" and opens)

    def signed(self) -> Node:
        is_negative = False
        while sign := self.accept("+", "-"):
            is_negative ^= sign == "-"
        return tree.negative(self.powered()) if is_negative else self.powered()

    def powered(self) -> Node:
        r"""A base with what follows it: x^2, n!, 50%, 30\circ."""
        value = self.atom()
        for _ in range(MAX_DEPTH):
            sign = self.accept("^", r"\circ", "!", "%")
            if sign == "^":
                value = tree.power(value, self.exponent())
            elif sign == "!":
                value = tree.call("factorial", value)
            elif sign:
                value = Node("unit", (value, "percent" if sign == "%" else "degree"))
            else:
                return value
        raise Unreadable("too many signs")

    def exponent(self) -> Node:
        sign = self.accept("+", "-")
        value = self.argument()
        return tree.negative(value) if sign == "-" else value

    def argument(self, one_digit: bool = False) -> Node:
        r"""An argument as TeX takes it, a group or one token; \frac43 takes one digit, but 10^23 means 10^{23}."""
        token = self.peek()
        if one_digit and token.kind == "num" and len(token.value) > 1 and token.value.isdigit():
            self.tokens[self.at] = Token("num", token.value[1:])
            return tree.number(int(token.value[0]))
        return self.atom(is_argument=True)

    def fraction(self) -> Node:
        return tree.divide(self.argument(one_digit=True), self.argument(one_digit=True))

    def atom(self, is_argument: bool = False) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        token = self.take()
        if token.kind == "num":
            value = self.numeral(token.value, is_argument)
        elif token.kind == "name":
            value = self.symbol(token.value, is_argument)
        elif token.value in CLOSING:
            value = self.bracket(token.value)
        elif token.kind == "cmd":
            value = self.command(token.value, is_argument)
        else:
            raise Unreadable(f"unexpected {token.value!r}")
        self.depth -= 1
        return value

    def group(self, opening: str) -> list[Node]:
        """The items after an opening bracket, up to its closing sign, which is left."""
        outside, self.in_bars = self.in_bars, opening == "|"
        items = self.items(CLOSING[opening])
        self.in_bars = outside
        return items

    def bracket(self, opening: str) -> Node:
        items = self.group(opening)
        closing = self.take().value
        half_open = opening in ("(", "[") and closing in (")", "]")
        if closing != CLOSING[opening] and not half_open:
            raise Unreadable("a bracket is open")
        value = tree.make_bracket(opening, closing, items)
        if opening != "{" and value.kind == "num" and self.peek().value == "_":
            return self.with_base(str(value.args[0]))
        return value

    def with_base(self, digits: str) -> Node:
        self.take()  # the _
        return Node("based", (digits.lstrip("0"), self.argument()))

    def numeral(self, text: str, is_argument: bool) -> Node:
        r"""A number; a mixed number (3\frac{3}{4} is a sum); digits with a base."""
        if "e" in text.lower() and abs(int(re.split("[eE]", text)[1])) * 3 > tree.MAX_BITS:
            raise Unreadable("too large")
        value = tree.number(Fraction(re.sub(r"\.(?=[eE]|$)", "", text)))
        if is_argument:
            return value
        if self.peek().value == "_":
            return self.with_base(text)
        start = self.at
        if text.isdigit() and self.accept(r"\frac"):
            part = self.fraction()
            if part.kind == "num" and 0 <= part.args[0] < 1:
                return tree.add(value, part)
            self.at = start
        return value

    def symbol(self, name: str, is_argument: bool) -> Node:
        """A letter with its primes and subscript; f(x) is one thing, n(n+1) a product."""
        if name in ("i", "e") and self.peek().value not in ("_", "'"):
            return tree.IMAGINARY if name == "i" else tree.EULER
        while mark := self.accept("'", "_"):
            name += "'" if mark == "'" else "_" + self.plain_group()
        if not is_argument and self.peek().value == "(":
            inside = list(itertools.takewhile(lambda token: token.value != ")", self.tokens[self.at + 1 :]))
            named = all(token.kind == "name" or token.value == "," or token.value[1:] in GREEK for token in inside)
            if name[0] in "fgFG" or (inside and named) or (name.isupper() and len(inside) == 1):
                self.take()
                arguments = self.group("(")
                self.expect(")")
                return Node("opaque", (name, *arguments))
        return Node("sym", (name,))

    def plain_group(self) -> str:
        """A subscript, or a name in braces, as text."""
        if not self.accept("{"):
            return self.take().value
        parts = []
        while not self.accept("}"):
            if self.peek().kind == "end" or self.peek().value == "{":
                raise Unreadable("a brace is open")
            parts.append(self.take().value.lstrip("\\"))
        return "".join(parts)

    def command(self, name: str, is_argument: bool) -> Node:
        if name == r"\frac":
            return self.fraction()
        if name == r"\binom":
            return tree.call("binom", self.argument(one_digit=True), self.argument(one_digit=True))
        if name == r"\sqrt":
            index = tree.number(2)
            if self.accept("["):
                index = self.sum()
                self.expect("]")
            return tree.call("root", self.argument(), index)
        if name[1:] in tree.FUNCTIONS:
            return self.function(name[1:])
        if name == r"\begin":
            return self.environment()
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name == r"\mathbb":
            letter = self.plain_group()
            return tree.REALS if letter == "R" else Node("sym", (name + letter,))
        if name in ACCENTS:
            return self.symbol(name + self.plain_group(), is_argument)
        if name in (r"\angle", r"\triangle"):
            return self.atom(is_argument)
        if name[1:].isalpha() and name not in NO_FACTOR:
            return self.symbol(name, is_argument)
        raise Unreadable(f"unexpected {name!r}")

    def function(self, name: str) -> Node:
        r"""\sin^2 2x, \log_2 8, \ln|x|, \max(1, 2): without brackets the argument is the product that follows."""
        exponent = base = None
        while mark := self.accept("^", "_"):
            if mark == "^":
                exponent = self.exponent()
            else:
                base = self.argument()
        if self.peek().value in ("(", "[", "{", "|"):
            inner = self.atom(is_argument=True)
            args = inner.args[2:] if inner.kind == "tuple" else inner.args if inner.kind == "set" else (inner,)
        else:
            factors = [self.signed()]
            while self.starts_factor() and self.peek().value[1:] not in tree.FUNCTIONS:
                factors.append(self.powered())
            args = (tree.multiply(*factors),)
        return tree.apply_function(name, args, base, exponent)

    def environment(self) -> Node:
        r"""A matrix, or the parts of \begin{cases} as a list."""
        name = self.plain_group()
        if name not in MATRICES:
            raise Unreadable("no matrix")
        if name == "array":
            self.plain_group()  # its columns
        rows: list[list[Node]] = [[]]
        while not self.accept(r"\end"):
            if self.accept(r"\cr"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].extend(self.items("&"))
            if self.peek().kind == "end" or sum(map(len, rows)) > MAX_ITEMS:
                raise Unreadable("a matrix without end")
        rows = [row for row in rows if row]
        if self.plain_group() != name or not rows:
            raise Unreadable("no rows, or another end")
        if name == "cases":
            return Node("list", tuple(cell for row in rows for cell in row))
        return tree.matrix(rows)


def read_tree(text: str) -> Node:
    """The tree of an undressed text; raises Unreadable where the reader does not know what it means."""
    reader = Reader(text)
    items = reader.items("")
    if reader.peek().kind != "end" or not items:
        raise Unreadable(f"unexpected {reader.peek().value!r}")
    return items[0] if len(items) == 1 else Node("list", tuple(items))
