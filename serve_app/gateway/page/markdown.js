// Markdown as DOM nodes. There is no way from a model's text to HTML: each piece of it becomes a
// text node, and of links only http and https ones are made. A model may also write what no person
// would, and it is read again as it grows: no pattern here looks twice at a long text.

import { copyButton, h } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DIVIDER = /^\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?$/;

/** The blocks of a text, as elements. */
export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  /** Take lines from here on while they are of a kind. */
  const take = (is) => {
    const begin = at;
    while (at < lines.length && is(lines[at], at - begin)) at++;
    return lines.slice(begin, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      at++;
      const code = take((it) => !it.trim().startsWith(fence[1]));
      at++; // the closing fence; while a text still streams there may be none
      found.push(codeBlock(code.join("\n"), fence[2]));
    } else if (heading) {
      at++;
      // The page's own headings are h1 and h2.
      found.push(h(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2].trimEnd().replace(/\s#+$/, "").trimEnd())));
    } else if (RULE.test(line)) {
      at++;
      found.push(h("hr"));
    } else if (QUOTE.test(line) && depth < 8) {
      const quoted = take((it) => QUOTE.test(it)).map((it) => it.replace(QUOTE, ""));
      found.push(h("blockquote", {}, blocks(quoted, depth + 1)));
    } else if (ITEM.test(line) && depth < 8) {
      const indent = ITEM.exec(line)[1].length;
      found.push(list(take((it, n) => n === 0 || ITEM.test(it) || !it.trim() || leading(it) > indent), depth));
    } else if (line.includes("|") && DIVIDER.test((lines[at + 1] ?? "").trim())) {
      found.push(table(take((it) => it.includes("|"))));
    } else {
      found.push(h("p", {}, inline(take((it, n) => n === 0 || (it.trim() && !startsBlock(it))).join("\n"))));
    }
  }
  return found;
}

const leading = (line) => line.length - line.trimStart().length;

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || ITEM.test(line) || RULE.test(line);
}

/** A block of code with a button that copies it. */
export function codeBlock(text, language) {
  return h(
    "div",
    { class: "code" },
    h("div", { class: "code-head" }, h("span", {}, language || "text"), copyButton()),
    h("pre", { tabindex: "0" }, h("code", {}, text)),
  );
}

function list(lines, depth) {
  const [, , mark] = ITEM.exec(lines[0]);
  const indent = leading(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent + 1) items.push([item[3]]);
    else items.at(-1).push(line.slice(Math.min(leading(line), indent + 2)));
  }
  const ordered = /\d/.test(mark);
  return h(
    ordered ? "ol" : "ul",
    { start: ordered && parseInt(mark) !== 1 ? parseInt(mark) : null },
    items.map((item) => {
      const inner = blocks(item, depth + 1);
      // One paragraph alone is the item's text: a tight list.
      const [first, ...rest] = inner;
      return h("li", {}, first?.nodeName === "P" ? [[...first.childNodes], rest] : inner);
    }),
  );
}

function table([head, , ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const titles = cells(head);
  return h(
    "div",
    { class: "scroll", tabindex: "0" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, titles.map((it) => h("th", { scope: "col" }, inline(it))))),
      h("tbody", {}, rows.map((row) => h("tr", {}, cells(row).slice(0, titles.length).map((it) => h("td", {}, inline(it)))))),
    ),
  );
}

// Each pattern is one way to mark a piece of text, in order of their strength. What looks for its end
// does so for 1000 characters.
const INLINE = [
  [/^(`+)([^`]|[^`][\s\S]{0,1000}?[^`])\1(?!`)/, (it) => h("code", {}, it[2])],
  [/^\\([\\`*_{}[\]()#+\-.!|~<>])/, (it) => it[1]],
  [/^!?\[([^\][]*)\]\(\s*(?=\S)<?([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/, (it) => link(it[2], it[1], it[0])],
  [/^<?(https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_])>?/, (it) => link(it[1], it[1], it[0])],
  [/^(\*\*|__)(?=\S)([\s\S]{0,1000}?\S)\1/, (it) => h("strong", {}, inline(it[2]))],
  [/^~~(?=\S)([\s\S]{0,1000}?\S)~~/, (it) => h("del", {}, inline(it[1]))],
  [/^\*(?=[^\s*])([^*]*[^\s*])\*(?!\*)/, (it) => h("em", {}, inline(it[1]))],
  [/^_(?=[^\s_])([^_]*[^\s_])_(?!\w)/, (it) => h("em", {}, inline(it[1]))],
  [/^(?: {2,}|\\)\n/, () => h("br")],
];

/** The pieces of one text: strings and elements. */
function inline(text) {
  const found = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const marked = mark(text, at);
    if (typeof marked?.node === "string") {
      plain += marked.node;
      at += marked.length;
    } else if (marked) {
      if (plain) found.push(plain);
      plain = "";
      found.push(marked.node);
      at += marked.length;
    } else plain += text[at++];
  }
  if (plain) found.push(plain);
  return found;
}

function mark(text, at) {
  if (!/[`\\![<h*_~ ]/.test(text[at])) return null;
  if (/[` ]/.test(text[at]) && text[at - 1] === text[at]) return null; // a row of them was tried whole
  if (/[_h]/.test(text[at]) && /\w/.test(text[at - 1] ?? "")) return null; // snake_case
  const rest = text.slice(at);
  for (const [pattern, make] of INLINE) {
    const match = pattern.exec(rest);
    if (match) return { node: make(match), length: match[0].length };
  }
  return null;
}

/** A link to http or https; of any other address the text stays as it was written. */
function link(address, text, written) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return written;
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return written;
  const attributes = { href: url.href, target: "_blank", rel: "noopener noreferrer" };
  return h("a", attributes, text || address);
}
