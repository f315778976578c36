"""report.html without a browser: its script runs in V8 (mini-racer) on a small document that is made of its HTML.

What only a browser can show (layout, the security policy, the decompression of the data) is left to the test that
starts one.
"""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from py_mini_racer import MiniRacer

DOM = r"""
class Element {
  constructor(tag, attributes = {}) {
    Object.assign(this, {tag, attributes, childNodes: [], style: {}, dataset: {}, parent: null});
    this.hidden = "hidden" in attributes;
    this.checked = false;
  }
  append(...nodes) {
    for (const node of nodes) {
      if (node instanceof Element) node.parent = this;
      this.childNodes.push(node instanceof Element ? node : String(node));
    }
  }
  replaceChildren(...nodes) { this.childNodes = []; this.append(...nodes) }
  setAttribute(name, value) { this.attributes[name] = String(value) }
  toggleAttribute(name, on) { if (on) this.attributes[name] = ""; else delete this.attributes[name] }
  hasChildNodes() { return this.childNodes.length > 0 }
  get children() { return this.childNodes.filter(node => node instanceof Element) }
  get firstChild() { return this.childNodes[0] }
  get textContent() { return this.childNodes.map(node => node.textContent ?? node).join("") }
  set textContent(text) { this.childNodes = [String(text)] }
  get title() { return this.attributes.title ?? "" }
  get className() { return this.attributes.class ?? "" }
  get value() {
    const first = this.querySelector("option");
    return this.chosen ?? first?.attributes.value ?? first?.textContent ?? "";
  }
  set value(value) { this.chosen = String(value) }
  get all() { return this.children.flatMap(child => [child, ...child.all]) }
  querySelectorAll(tag) { return this.all.filter(element => element.tag === tag) }
  querySelector(tag) { return this.querySelectorAll(tag)[0] ?? null }
  closest(tag) { return this.tag === tag ? this : this.parent?.closest(tag) }
  click() { this.checked = !this.checked; (this.onclick ?? this.onchange)?.({target: this}) }
  get outerHTML() {
    const escape = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
    const attributes = Object.entries(this.attributes).map(([name, value]) => ` ${name}="${escape(value)}"`).join("");
    const inside = this.childNodes.map(node => node.outerHTML ?? escape(node)).join("");
    return `<${this.tag}${attributes}>${inside}</${this.tag}>`;
  }
}
function build([tag, attributes, children]) {
  const element = new Element(tag, attributes);
  element.append(...children.map(child => typeof child === "string" ? child : build(child)));
  return element;
}
const root = build(TREE);
const document = {
  body: root.querySelector("body"),
  getElementById: id => root.all.find(element => element.attributes.id === id) ?? null,
  createElement: tag => new Element(tag), createElementNS: (space, tag) => new Element(tag)};
// The data arrive already decompressed.
const window = globalThis, atob = text => "";
class DecompressionStream {}
class Blob { stream() { return {pipeThrough() {}} } }
class Response { json() { return DATA } }
"""
EMPTY = ("meta", "input", "link", "br", "img")  # elements without an end


class Tree(HTMLParser):
    """HTML as [tag, attributes, children]."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[list[Any]] = [["document", {}, []]]
        self.feed(text)
        self.root = self.open[0]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = [tag, {name: value or "" for name, value in attributes}, []]
        self.open[-1][2].append(element)
        if tag not in EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        self.open[-1][2].append(data)


def embedded_data(page: str) -> dict[str, Any]:
    packed = re.search(r'<script id="data" type="text/plain">(.*?)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def page_script(page: str) -> str:
    return re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]


class Page:
    """report.html after its script has run."""

    def __init__(self, path: Path):
        page = path.read_text(encoding="utf-8")
        self.javascript = MiniRacer()
        tree, data = json.dumps(Tree(page).root), json.dumps(embedded_data(page))
        self.javascript.eval(f"const TREE = {tree}, DATA = {data};\n{DOM}\n{page_script(page)}")
        assert self.run("document.body.dataset.ready") == "yes", self.run("$('about').textContent")

    def run(self, script: str) -> Any:
        """The value of an expression."""
        return json.loads(self.javascript.eval(f"JSON.stringify({script}) ?? 'null'"))
