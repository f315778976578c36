r"""Tokens -> the tree that they mean. Nothing is ever executed.

read_tree() reads an answer by recursive descent: each method of Reader reads one level of the grammar, from a list of
answers down to a number or a letter, and returns its tree.
"""

import functools
import itertools
import re
from fractions import Fraction

from plumbing import tree
from plumbing.tokens import END, GREEK, Token, tokenize
from plumbing.tree import Node, Unreadable

MAX_DEPTH: int = 40  # nesting of brackets, fractions, exponents and functions that the reader follows
MAX_ITEMS: int = 100  # items of a list, cells of a matrix
MAX_CHARS: int = 1000  # longer answers are only compared as text; the longest gold of the usual sets has 210
MAX_SIGNS: int = 4  # \pm signs in one answer; each doubles the values


# Number words, names -------------------------------------------------------------------------------------------------
SMALL = tree.words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen")
SMALL += tree.words("sixteen seventeen eighteen nineteen")
TENS = tree.words("twenty thirty forty fifty sixty seventy eighty ninety")
NUMERALS = {word: at for at, word in enumerate(SMALL)} | {word: 10 * at for at, word in enumerate(TENS, 2)}
BASES = {word: str(at) for word, at in NUMERALS.items() if 1 < at < 17} | {"binary": "2"}
PARTS = tree.words("half third quarter fifth sixth seventh eighth ninth tenth")
SCALES = {"hundred": Fraction(100), "thousand": Fraction(1000), "million": Fraction(10**6), "billion": Fraction(10**9)}
SCALES |= {name: Fraction(1, at) for at, word in enumerate(PARTS, 2) for name in (word, word + "s")}
SCALES |= {"halves": Fraction(1, 2), "fourth": Fraction(1, 4), "fourths": Fraction(1, 4)}
CALL = re.compile(  # what may stand before "=": a function with its argument (\sin x, P(X = 2), f^{-1}(3)), words
    r"\\(?:lim|log|ln|gcd|lcm|max|min|det|Pr|arg|deg|(?:arc)?(?:sin|cos|tan|cot|sec|csc))(?![a-z])"
    r"|(?:\\(?:text|math[a-z]+|operatorname)\{\w+\}|[A-Z]\w*|[fgh]|[a-z]{3,})['_^{}\w-]*\s*(?:\\left)?[(\[]"
    r"|\\(?:text|mathrm)\{[\w ]*[a-z]{2}[\w ]*\}\s*$|[A-Za-z]{5,}\s*$"
)


def split_name(text: str) -> tuple[str, str]:
    """What stands before the first "=" that is outside brackets, and what follows it: P(X = 2), 1/2."""
    depths = itertools.accumulate((sign in "([{") - (sign in ")]}") for sign in text)
    at = next((at for at, depth in enumerate(depths) if text[at] == "=" and not depth), 0)
    return (text[:at].strip(), text[at + 1 :].strip()) if at else ("", "")


# Tokens -> tree -------------------------------------------------------------------------------------------------------
RELATIONS = {"=", r"\approx", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\notin"}
SET_SIGNS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "minus"}
CLOSING = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", "|": "|", r"\langle": r"\rangle"}
CLOSING |= {r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
ACCENTS = {r"\overline", r"\bar", r"\hat", r"\vec", r"\tilde", r"\widehat"}
SYMBOLS = {*GREEK, *map(str.title, GREEK)}
SYMBOLS |= set(tree.words("hbar mho odot oplus partial nabla sum prod int oint lim ldots aleph"))
CONSTANTS = {r"\pi": tree.PI, r"\infty": tree.INFINITY, r"\emptyset": Node("set")}
MATRICES = {"pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array", "cases"}
UNIT_COMMANDS = {r"\AA": "angstrom", r"\Omega": "ohm", r"\$": "dollar"}
NESTING = {"{": 1, "(": 1, "}": -1, ")": -1}
ENDS = {",", ";", ":", "&", r"\\", r"\end", *CLOSING.values()}  # of an item
NO_FACTOR = RELATIONS | set(SET_SIGNS) | set(CLOSING.values()) | set(UNIT_COMMANDS)  # what no factor starts with
NO_FACTOR |= set(tree.words(r"\\ \end \circ \pm \mp \to \rightarrow \implies \Rightarrow \pmod"))
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
DIGITS_WITH_BASE = re.compile(rf"\(?([0-9A-F]+)\)?_(\d+|{'|'.join(BASES)})")
REAL_NUMBERS = re.compile(r"(?:x is )?(?:all |any |the )*reals?(?: numbers?)?(?: (except|excluding|besides|\w+ than))?")
BOUNDS = {"greater than": "<", "larger than": "<", "less than": ">", "smaller than": ">"}


def read_based(digits: str, base: str) -> Node:
    base = BASES.get(base, base)
    return tree.number(int(digits)) if base == "10" and digits.isdigit() else Node("based", (digits, base))


def read_words(words: list[str]) -> Node:
    """Words alone: a number, perhaps of things (twenty-five, two thirds, three million, five apples), or a text."""
    value, used = Fraction(0), 0
    for word in words:
        if word in NUMERALS and (not used or (value and value % 10 == 0)):
            value += NUMERALS[word]
        elif used and word in SCALES:
            value *= SCALES[word]
        else:
            break
        used += 1
    if not used:
        return Node("text", (" ".join(words),))
    rest = " ".join(words[used:])
    return Node("said", (tree.number(value), "", rest)) if rest else tree.number(value)


class Reader:
    """Recursive descent over the tokens of one answer; each method reads one level of the grammar."""

    def __init__(self, text: str) -> None:
        if r"\begin" not in text:
            text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # \\frac, escaped once too often
        self.tokens = tokenize(text)
        self.at = 0
        self.depth = 0
        self.in_bars = False  # inside |...| or \{...|...\}, where a bar closes and does not open

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else END

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
            while items and self.accept(",", ";"):
                pass
            if self.peek().kind == "end" or self.peek().value == closing:
                return items
            items.append(self.item())
            if len(items) > MAX_ITEMS:
                raise Unreadable("too many items")
            goes_on = items[-1].kind == "said" and self.peek().kind == "num"  # 2 hours 30 minutes
            if self.peek().value not in (",", ";") and not goes_on:
                return items

    def words(self) -> list[str]:
        """Words in a row, also with hyphens between them."""
        words: list[str] = []
        while self.peek().kind == "word" or (words and self.peek().value == "-" and self.peek(1).kind == "word"):
            words += self.take().value.casefold().replace("-", " ").split()
        return words

    def item(self) -> Node:
        """Words, then mathematics, then a unit: The answer is 5 cm. Words alone are a number, a set or a text."""
        words = self.words()
        self.accept(":")  # Answer: 5
        if match := REAL_NUMBERS.fullmatch(" ".join(words)):
            return self.real_numbers(match[1])
        if words and (self.peek().kind == "end" or self.peek().value in ENDS):
            return read_words(words)
        if self.accept(r"\$"):
            words.append("dollar")
        is_negative = words[-1:] in (["minus"], ["negative"])
        value = tree.negative(self.relation()) if is_negative else self.relation()
        return self.with_unit(words[: -1 if is_negative else None], value)

    def real_numbers(self, limit: str | None) -> Node:
        """All real numbers, perhaps except some, or greater than one."""
        if limit in BOUNDS:
            return tree.make_relation([BOUNDS[limit]], [self.sum(), Node("sym", ("x",))])
        if not limit:
            return tree.REALS
        excluded = [item.args[-1] if item.kind == "rel" else item for item in self.items("")]  # 3, or x = 3
        return Node("minus", (tree.REALS, Node("set", tuple(excluded))))

    def with_unit(self, before: list[str], value: Node) -> Node:
        """A value with the words before it and what stands after it: a unit, or words, or what cannot be read."""
        start, depth = self.at, 0
        while self.peek().kind != "end" and (depth or self.peek().value not in ENDS):
            last = self.peek(-1) if start < self.at else END
            if self.peek().kind == "num" and last.kind == "word" and last.value != "mod":  # 2 hours 30 minutes
                break
            depth += NESTING.get(self.take().value, 0)
        after = " ".join(UNIT_COMMANDS.get(token.value, token.value) for token in self.tokens[start : self.at])
        return Node("said", (value, " ".join(before), after)) if before or after else value

    def relation(self) -> Node:
        self.accept("=", r"\approx")  # "= 5"
        terms, signs = [self.ratio()], []
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
        ahead = [self.peek(at) for at in range(3)]
        inner = next((other for other in ahead if other.value not in ("{", "(", r"\frac", r"\mu")), END)
        if inner.kind == "word" or inner.value in UNIT_COMMANDS:  # a unit
            return False
        opens = token.value in ("(", "[", "{") or (token.value == "|" and not self.in_bars)
        return token.kind in ("num", "name") or opens or (token.kind == "cmd" and token.value not in NO_FACTOR)

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
            if not sign:
                return value
            if sign == "^":
                value = tree.power(value, self.exponent())
            elif sign == "!":
                value = tree.call("double_factorial" if self.accept("!") else "factorial", value)
            elif value.kind != "unit":
                value = Node("unit", (value, "percent" if sign == "%" else "degree"))
            else:
                break
        raise Unreadable("too many signs")

    def exponent(self) -> Node:
        sign = self.accept("+", "-")
        value = self.argument()
        return tree.negative(value) if sign == "-" else value

    def argument(self) -> Node:
        """An argument as TeX takes it, a group or one token; but 10^23 means 10^{23}."""
        return self.atom(is_argument=True)

    def atom(self, is_argument: bool = False) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        token = self.take()
        if token.kind == "num":
            value = self.numeral(token.value, is_argument)
        elif token.kind == "name":
            value = self.symbol(token.value, is_argument)
        elif token.kind == "cmd" and token.value not in CLOSING:
            value = self.command(token.value, is_argument)
        elif token.value in CLOSING:
            value = self.bracket(token.value)
        else:
            raise Unreadable(f"unexpected {token.value!r}")
        self.depth -= 1
        return value

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
        closing = self.take().value
        half_open = opening in ("(", "[") and closing in (")", "]")
        if closing != CLOSING[opening] and not half_open:
            raise Unreadable("a bracket is open")
        return tree.make_bracket(opening, closing, items)

    def numeral(self, text: str, is_argument: bool) -> Node:
        r"""A number; a mixed number: 3\frac{3}{4} is a sum."""
        if "e" in text.lower() and abs(int(re.split("[eE]", text)[1])) * 3 > tree.MAX_BITS:
            raise Unreadable("too large")
        fixed, _, period = text.partition("…")
        value = tree.number(Fraction(re.sub(r"\.(?=[eE]|$)", "", fixed)))
        if period:  # 0.4…5 is 0.4555...
            places = len(fixed) - fixed.index(".") - 1
            return tree.add(value, tree.number(Fraction(int(period), 10**places * (10 ** len(period) - 1))))
        if is_argument:
            return value
        if self.peek().value in SCALES:  # 5 million
            return tree.multiply(value, tree.number(SCALES[self.take().value]))
        start, part = self.at, tree.ONE
        if text.isdigit() and self.accept(r"\frac"):
            part = tree.divide(self.argument(), self.argument())
        elif text.isdigit() and self.peek().value.isdigit() and self.peek(1).value == "/":  # 3 3/4
            part = tree.divide(self.argument(), self.argument() if self.accept("/") else tree.ONE)
        if part.kind == "num" and 0 <= part.args[0] < 1:
            return tree.add(value, part)
        self.at = start
        return value

    def symbol(self, name: str, is_argument: bool) -> Node:
        """A letter with its subscript and primes; f(x), F(2) are one thing, n(n+1) is a product."""
        if name in ("i", "e") and self.peek().value not in ("_", "'"):
            return tree.IMAGINARY if name == "i" else tree.EULER
        marks = subscripts = ""
        while mark := self.accept("'", "_"):
            if mark == "'":
                marks += mark
            else:
                subscripts += "_" + self.plain_group()
        name += subscripts + marks
        if is_argument or self.peek().value != "(":
            return Node("sym", (name,))
        inside = list(itertools.takewhile(lambda token: token.value != ")", self.tokens[self.at + 1 :]))
        if not inside or not (
            name[0] in "fg" or (name[0].isupper() and all(token.value == "," for token in inside[1::2]))
        ):
            return Node("sym", (name,))
        self.take()
        arguments = self.group("(")
        self.expect(")")
        return Node("opaque", (name, *arguments))

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
            return tree.divide(self.argument(), self.argument())
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
        if name[1:] in SYMBOLS:
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
            elif self.peek().value in ("if", "when", "for") or self.peek().value == "&":
                self.take()
            else:
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
    if based := DIGITS_WITH_BASE.fullmatch(re.sub(r"\\(?:text|mathrm)(?=\{)|[{} $]", "", text)):
        return read_based(*based.groups())
    name, value = split_name(text)
    if "=" not in value and CALL.match(name):
        name = "".join(token.value for token in tokenize(name))
        return tree.make_relation(["="], [Node("text", (name,)), read_tree(value)])
    reader = Reader(text)
    items = reader.items("")
    if reader.peek().kind != "end" or not items:
        raise Unreadable(f"unexpected {reader.peek().value!r}")
    return tree.make_list(items)


def choose_signs(text: str) -> list[str]:
    r"""1 \pm \sqrt{2} as two texts; each \pm has its own sign unless \mp ties them together."""
    signs, parts = PLUS_MINUS.findall(text), PLUS_MINUS.split(text)
    upper = ["+ " if sign == r"\pm" else "- " for sign in signs]
    lower = ["- " if sign == r"\pm" else "+ " for sign in signs]
    choices = [upper, lower] if r"\mp" in signs else itertools.product("+-", repeat=len(signs))
    return ["".join(itertools.chain(*zip(["", *choice], parts, strict=True))) for choice in choices]


@functools.lru_cache(maxsize=8192)
def read_answer(text: str) -> Node | None:
    r"""The tree of a tidied answer with all its \pm signs, or None where it cannot be read."""
    if len(text) > MAX_CHARS or len(PLUS_MINUS.findall(text)) > MAX_SIGNS:
        return None
    try:
        trees = [read_tree(choice) for choice in choose_signs(text)]
    except (Unreadable, RecursionError):
        return None
    return trees[0] if len(trees) == 1 else Node("list", tuple(trees))
