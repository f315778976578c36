r"""Tokens -> the tree that they mean. Nothing is ever executed.

read_tree() reads an answer by recursive descent: each method of Reader reads one level of the grammar, from a list of
answers down to a number or a letter, and returns its tree.
"""

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction

from plumbing import tree
from plumbing.tokens import GREEK, UNICODE_TABLE, Token, read_words, tokenize
from plumbing.tree import Node, Unreadable

MAX_DEPTH: int = 40  # nesting of brackets, fractions, exponents and functions that the reader follows
MAX_ITEMS: int = 100  # items of a list, cells of a matrix


# Tokens -> tree -------------------------------------------------------------------------------------------------------
RELATIONS = {"=", r"\approx", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\notin"}
SET_SIGNS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "minus"}
CLOSING = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", "|": "|", r"\langle": r"\rangle"}
CLOSING |= {r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
ACCENTS = {r"\overline", r"\bar", r"\hat", r"\vec", r"\tilde", r"\widehat"}
DERIVATIVES = {r"\dot": "'", r"\ddot": "''"}
CONSTANTS = {r"\pi": tree.PI, r"\infty": tree.INFINITY, r"\emptyset": Node("set")}
MATRICES = {"pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array", "cases"}
UNIT_COMMANDS = {r"\AA": "angstrom", r"\Omega": "ohm", r"\$": "dollar"}
NO_FACTOR = RELATIONS | set(SET_SIGNS) | set(CLOSING.values()) | set(UNIT_COMMANDS)  # what no factor starts with
NO_FACTOR |= set(tree.words(r"\\ \end \circ \pm \mp \to \rightarrow \implies \Rightarrow \pmod \over \choose"))
EXCEPT = {"except", "excluding", "besides", "without"}


class Reader:
    """Recursive descent over the tokens of one answer; each method reads one level of the grammar."""

    def __init__(self, text: str) -> None:
        if r"\begin" not in text:
            text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # \\frac, escaped once too often
        self.tokens = list(tokenize(text.translate(UNICODE_TABLE)))
        self.at = 0
        self.depth = 0
        self.in_bars = False  # inside |...| or \{...|...\}, where a bar closes and does not open

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

    def words(self) -> list[str]:
        """Words in a row, also with hyphens between them."""
        words: list[str] = []
        while self.peek().kind == "word" or (words and self.peek().value == "-" and self.peek(1).kind == "word"):
            words += self.take().value.casefold().replace("-", " ").split()
        return words

    def item(self) -> Node:
        """Words, then mathematics, then a unit: The answer is 5 cm. Words alone are a number, a set or a text."""
        start, words = self.at, self.words()
        self.accept(":")  # Answer: 5
        if words and (value := self.set_in_words(words)):
            return value
        if words and self.peek().value in ("=", r"\approx"):  # Area = 5
            first = self.tokens[start].value
            is_product = len(words) == 1 and first.isupper()  # MR = SRMC
            name = self.letters(first) if is_product else Node("text", (" ".join(words),))
            return self.said((), self.relation(name))
        if words and (self.peek().kind == "end" or self.peek().value in (",", ";", ")", "]", "}", r"\}", "&", r"\\")):
            return read_words(words)
        currency = self.accept(r"\$")
        value = self.relation()
        if self.peek().value in EXCEPT:
            self.take()
            return Node("minus", (value, self.excluded()))
        return self.said(tuple(words) + (("dollar",) if currency else ()), value)

    def said(self, before: tuple[str, ...], value: Node) -> Node:
        """A value with the words before it and those after it; degrees and percent are part of the value."""
        after = f"mod {self.atom().args[-1]}" if self.accept(r"\pmod") else self.unit()
        first, _, rest = after.partition(" ")
        for name, unit in (("percent", "percent"), ("degree", "degree")):
            if first.removesuffix("s") == name:
                value, after = Node("unit", (value, unit)), rest
        if value.kind == "unit" and after in ("c", "f", "celsius", "fahrenheit"):
            after = ""
        return Node("said", (value, " ".join(before), after)) if before or after else value

    def set_in_words(self, words: list[str]) -> Node | None:
        """All real numbers, perhaps except some."""
        at = next((at for at, word in enumerate(words) if word in EXCEPT), len(words))
        name = " ".join(
            word for word in words[:at] if word not in ("all", "the", "x", "is", "numbers", "number", "any")
        )
        if name not in ("real", "reals") or (at == len(words) and self.peek().kind not in ("end", "char")):
            return None
        return tree.REALS if at == len(words) else Node("minus", (tree.REALS, self.excluded()))

    def excluded(self) -> Node:
        items = [item.args[-1] if item.kind == "rel" else item for item in self.items("")]
        return Node("set", tuple(items))

    def unit(self) -> str:
        """The words of a unit, with / and ^: kg * m / s ^2."""
        parts: list[str] = []
        while True:
            token, following = self.peek(), self.peek(1)
            joined = parts and token.value in ("/", "*") and following.kind in ("word", "name")
            if token.kind == "word" or joined or (parts and token.kind == "name"):
                parts.append(self.take().value)
            elif token.value in UNIT_COMMANDS:
                parts.append(UNIT_COMMANDS[self.take().value])
            elif token.value == r"\mu" and following.kind in ("word", "name"):
                self.take()
                parts.append("micro" + self.take().value)
            elif token.value == r"\frac" and self.peek(2).kind in ("word", "name"):
                self.take()
                parts += [self.plain_group(), "/", self.plain_group()]
            elif parts and self.accept("^"):
                exponent = self.exponent()
                parts.append(f"^{exponent.args[0]}" if exponent.kind == "num" else "^?")
            elif self.peek(1).kind == "word" and token.value == "(" and self.peek(2).value == ")":
                self.take()
                parts.append(self.take().value)
                self.take()
            else:
                return " ".join(parts).casefold()

    def relation(self, first: Node | None = None) -> Node:
        if not first:
            self.accept("=", r"\approx")  # "= 5"
        terms, signs = [first or self.ratio()], []
        while sign := self.accept(*RELATIONS):
            signs.append(sign)
            words = [] if self.peek().value.isupper() else self.words()
            terms.append(read_words(words) if words else self.ratio())
        return tree.make_relation(signs, terms)

    def ratio(self) -> Node:
        parts = [self.union()]
        while not self.in_bars and self.accept(":"):
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
            is_unit = self.peek(1 if token.value == r"\mu" else 2).kind == "word" and token.value in (r"\mu", r"\frac")
            return token.value not in NO_FACTOR and not is_unit
        opens = token.value in ("(", "[", "{") or (token.value == "|" and not self.in_bars)
        opens = opens and not (token.value == "(" and self.peek(1).kind == "word" and self.peek(2).value == ")")
        return token.kind in ("num", "name") or (token.kind == "char" and opens)

    def signed(self) -> Node:
        is_negative = False
        while sign := self.accept("+", "-"):
            is_negative ^= sign == "-"
        if self.accept(r"\$"):  # -\$5
            self.tokens.append(Token("word", "dollars"))
            is_negative ^= bool(self.accept("-"))
        return tree.negative(self.powered()) if is_negative else self.powered()

    def powered(self) -> Node:
        r"""A base with what follows it: x^2, n!, 50%, 30\circ, 30\circ 15'."""
        value = self.atom()
        for _ in range(MAX_DEPTH):
            sign = self.accept("^", r"\circ", "!", "%")
            if sign == "^" and self.accepts_circle():
                sign = r"\circ"
            if sign == "^":
                value = tree.power(value, self.exponent())
            elif sign == "!":
                value = tree.call("double_factorial" if self.accept("!") else "factorial", value)
                if self.peek().value == "!":
                    raise Unreadable("three factorials")
            elif sign == "%" and value.kind != "unit":
                value = Node("unit", (value, "percent"))
            elif sign == r"\circ":
                value = Node("unit", (tree.add(value, *self.minutes()), "degree"))
                self.at += self.peek().value in ("C", "F")  # Celsius, Fahrenheit
            elif not sign:
                return value
            else:
                break
        raise Unreadable("too many signs")

    def accepts_circle(self) -> bool:
        r"""Take \circ or {\circ}, if it comes."""
        if self.peek().value == "{" and self.peek(1).value == r"\circ" and self.peek(2).value == "}":
            self.at += 3
            return True
        return bool(self.accept(r"\circ"))

    def minutes(self) -> Iterator[Node]:
        """15' and 20'' after degrees, as degrees."""
        for per_degree, marks in ((60, 1), (3600, 2)):
            if self.peek().kind == "num" and all(self.peek(1 + mark).value == "'" for mark in range(marks)):
                yield tree.number(Fraction(self.take().value) / per_degree)
                self.at += marks

    def exponent(self) -> Node:
        sign = self.accept("+", "-")
        value = self.argument()
        return tree.negative(value) if sign == "-" else value

    def argument(self) -> Node:
        """An argument as TeX takes it, a group or one token; but 10^23 means 10^{23}."""
        return self.atom(is_argument=True)

    def fraction(self) -> Node:
        top, bottom = self.argument(), self.argument()
        d = Node("sym", ("d",))
        if top.kind == bottom.kind == "mul" and len(top.args) == len(bottom.args) == 2 and bottom.args[0] == d:
            order, name = top.args
            times = 1 if order == d else int(order.args[1].args[0]) if order.args[:1] == (d,) else 0
            if 0 < times < 4 and name.kind in ("sym", "opaque"):  # dx/dt is x'
                return Node(name.kind, (name.args[0] + "'" * times, *name.args[1:]))
        return tree.divide(top, bottom)

    def atom(self, is_argument: bool = False) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        token = self.take()
        if token.kind == "num":
            value = self.numeral(token.value, is_argument)
        elif token.kind == "name":
            value = self.symbol(token.value, is_argument)
        elif token.kind == "word" and token.value.isupper():
            value = self.letters(token.value)
        elif token.kind == "cmd" and token.value not in CLOSING:
            value = self.command(token.value, is_argument)
        elif token.value in CLOSING:
            value = self.bracket(token.value)
        else:
            raise Unreadable(f"unexpected {token.value!r}")
        self.depth -= 1
        return value

    def letters(self, word: str) -> Node:
        """MR as a product of its letters, as in formulas."""
        return tree.multiply(*(Node("sym", (letter,)) for letter in word))

    def group(self, opening: str) -> list[Node]:
        """The items after an opening bracket, up to its closing sign, which is left."""
        outside, self.in_bars = self.in_bars, opening in ("|", r"\{")
        items = self.items(CLOSING[opening])
        self.in_bars = outside
        return items

    def bracket(self, opening: str) -> Node:
        items = self.group(opening)
        if opening == r"\{" and self.accept(":", "|"):  # \{x : x > 1\}, \{2k : k \in \mathbb{Z}\}
            conditions = self.items(r"\}")
            is_free = len(items) == 1 and items[0].kind in ("sym", "clause")
            items = [tree.make_list(conditions)] if is_free else items
            self.expect(r"\}")
            return items[0] if is_free else tree.make_bracket(opening, r"\}", items)
        if opening == "{" and (sign := self.accept(r"\over", r"\choose")):
            second = self.group(opening)
            items = [tree.divide(items[0], second[0]) if sign == r"\over" else tree.call("binom", items[0], second[0])]
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
        base = self.argument()
        return tree.number(int(digits)) if base == tree.number(10) else Node("based", (digits.lstrip("0"), base))

    def numeral(self, text: str, is_argument: bool) -> Node:
        r"""A number; a mixed number (3\frac{3}{4} is a sum); a repeating decimal; digits with a base."""
        if "e" in text.lower() and abs(int(re.split("[eE]", text)[1])) * 3 > tree.MAX_BITS:
            raise Unreadable("too large")
        if "." in text and (period := self.period()):
            fixed = len(text) - text.index(".") - 1
            return tree.number(Fraction(text + "0") + Fraction(int(period), 10**fixed * (10 ** len(period) - 1)))
        value = tree.number(Fraction(re.sub(r"\.(?=[eE]|$)", "", text)))
        if is_argument:
            return value
        if self.peek().value == "_" and text.isdigit():
            return self.with_base(text)
        start, part = self.at, tree.ONE
        if text.isdigit() and self.accept(r"\frac"):
            part = self.fraction()
        elif text.isdigit() and self.peek().value.isdigit() and self.peek(1).value == "/":  # 3 3/4
            part = tree.divide(self.argument(), self.argument() if self.accept("/") else tree.ONE)
        if part.kind == "num" and 0 <= part.args[0] < 1:
            return tree.add(value, part)
        self.at = start
        return value

    def period(self) -> str:
        r"""The digits of \overline{36} after a decimal point."""
        start = self.at
        if self.accept(r"\overline", r"\bar", r"\dot"):
            digits = self.plain_group()
            if digits.isdigit():
                return digits
        self.at = start
        return ""

    def symbol(self, name: str, is_argument: bool) -> Node:
        """A letter with its primes and subscript; f(x) is one thing, n(n+1) a product; C_n^k is a binomial."""
        if name in ("i", "e") and self.peek().value not in ("_", "'"):
            return tree.IMAGINARY if name == "i" else tree.EULER
        following = [self.peek(at) for at in range(4)]
        if name == "d" and [token.value for token in following[1:3]] == ["/", "d"] and following[3].kind == "name":
            self.at += 4
            return Node("sym", (following[0].value + "'",))  # dx/dt
        if name == "C" and self.peek().value == "_":
            start = self.at
            self.take()
            lower = self.argument()
            if self.accept("^"):
                return tree.call("binom", lower, self.argument())
            self.at = start
        while mark := self.accept("'", "_") or self.accepts_prime():
            name += "'" if mark == "'" else "_" + self.plain_group()
        if not is_argument and self.peek().value == "(":
            return self.application(name)
        return Node("sym", (name,))

    def accepts_prime(self) -> str:
        r"""Take ^' or ^{\prime}, if it comes."""
        if self.peek().value == "^" and self.peek(1).value == "'":
            self.at += 1
        elif [self.peek(at).value for at in range(3)] == ["^", "{", "'"]:
            self.at += 2
            end = next((at for at in range(self.at, len(self.tokens)) if self.tokens[at].value != "'"), self.at)
            del self.tokens[end : end + 1]  # the brace
        return self.accept("'") or ""

    def application(self, name: str) -> Node:
        r"""f(x), P(A \cap B) as one thing; n(n+1) is only n here."""
        inside = list(itertools.takewhile(lambda token: token.value != ")", self.tokens[self.at + 1 :]))
        named = all(token.kind == "name" or token.value == "," or token.value[1:] in GREEK for token in inside)
        event = {token.value for token in inside} & {*RELATIONS, *SET_SIGNS, "|"}
        if name in ("P", "E") and event:
            self.at += len(inside) + 1
            self.expect(")")
            return Node("opaque", (name + "".join(token.value for token in inside),))
        if name[0] in "fgFG" and not event and (named or name[0] in "fg" or len(inside) == 1):
            named = True
        if (inside and named) or (name.isupper() and len(inside) == 1):
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
            return tree.call("binom", self.argument(), self.argument())
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
        if name in DERIVATIVES:
            return self.symbol(self.plain_group() + DERIVATIVES[name], is_argument)
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
        r"""A matrix, or the parts of \begin{cases} as a list: relations, or values with their conditions."""
        name = self.plain_group()
        if name not in MATRICES:
            raise Unreadable("no matrix")
        if name == "array":
            self.plain_group()  # its columns
        rows: list[list[Node]] = [[]]
        while not self.accept(r"\end"):
            if self.accept(r"\\"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].extend(self.items("&"))
            if self.peek().kind == "end" or sum(map(len, rows)) > MAX_ITEMS:
                raise Unreadable("a matrix without end")
        rows = [row for row in rows if row]
        if self.plain_group() != name or not rows:
            raise Unreadable("no rows, or another end")
        if name != "cases":
            return tree.matrix(rows)
        pieces = [Node("piece", tuple(row)) if len(row) > 1 else row[0] for row in rows]
        return Node("list", tuple(pieces))


def read_tree(text: str) -> Node:
    """The tree of a text; raises Unreadable where the reader does not know what it means."""
    reader = Reader(text)
    items = reader.items("")
    if reader.peek().kind != "end" or not items:
        raise Unreadable(f"unexpected {reader.peek().value!r}")
    return tree.make_list(items)
