// Elements without HTML: text that comes from a server becomes a text node and nothing else.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Attributes that are null, undefined or false are left out; functions listen. */
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An element of SVG. Sizes are attributes, as the page's policy allows no inline styles. */
export function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  // An empty text stays a node: streamed text can then be morphed into it.
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

/** Make the children of `node` like `fresh` with few changes: focus, selection and scroll stay. A child
 *  with a `data-key` is known by it, wherever it was before, and any other by its place. */
export function morph(node, ...fresh) {
  const wanted = fresh.flat(Infinity).filter(Boolean);
  const keys = new Set(wanted.map(keyOf));
  const known = new Map();
  for (const child of [...node.children]) {
    const key = keyOf(child);
    if (key && !keys.has(key)) child.remove();
    else if (key) known.set(key, child);
  }
  wanted.forEach((next, at) => {
    if (typeof next === "string") next = document.createTextNode(next);
    const same = known.get(keyOf(next));
    if (same && same !== node.childNodes[at]) move(same, node.childNodes[at]);
    const old = node.childNodes[at];
    if (!old) node.append(next);
    else if (old === next || patched(old, next)) return;
    else if (keyOf(old)) old.before(next); // its own place comes later
    else old.replaceWith(next);
  });
  while (node.childNodes.length > wanted.length) node.lastChild.remove();
}

const keyOf = (child) => child.getAttribute?.("data-key");

/** Put a child before another. Who types or tabs in it notices nothing. */
function move(child, before) {
  const focused = document.activeElement;
  if (before.parentNode.moveBefore) before.parentNode.moveBefore(child, before);
  else before.before(child);
  if (child.contains(focused) && document.activeElement !== focused) focused.focus({ preventScroll: true });
}

function patched(old, next) {
  if (old.nodeName !== next.nodeName || old.id !== next.id || keyOf(old) !== keyOf(next)) return false;
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return true;
  }
  for (const { name } of [...old.attributes]) {
    if (!next.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    // What a person has folded open or shut stays so.
    if (old.getAttribute(name) !== value && name !== "open") old.setAttribute(name, value);
  }
  morph(old, [...next.childNodes]);
  return true;
}

/** A button that copies `text`, or without one the code beside it; app.js listens for all of them. */
export function copyButton(text, label = "Copy") {
  return h("button", { type: "button", class: "quiet copy", "data-copy": text ?? "" }, label);
}

/** Of a click on a copy button: copy, and say so. */
export async function copy(button) {
  const text = button.dataset.copy || button.closest(".code")?.querySelector("code").textContent || "";
  const label = button.textContent;
  button.disabled = true;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Without https there is no clipboard but on localhost.
    button.textContent = "Select and copy by hand";
  }
  setTimeout(() => {
    button.textContent = label;
    button.disabled = false;
  }, 1500);
}

/** A labelled control: `control` gets the label's id, and a hint below. */
export function field(label, control, hint) {
  return h("label", { class: "field" }, h("span", {}, label), control, hint && h("small", {}, hint));
}

/** A bar from 0 to 1, with what it says in words. */
export function bar(label, share, text) {
  const width = `${Math.round(Math.min(1, Math.max(0, share || 0)) * 100)}%`;
  const level = share >= 0.9 ? "high" : share >= 0.7 ? "raised" : "";
  return h(
    "div",
    { class: "bar" },
    h("span", {}, label),
    s(
      "svg",
      { "aria-hidden": "true", class: level, height: "8" },
      s("rect", { class: "track", width: "100%", height: "100%", rx: "4" }),
      s("rect", { class: "level", width, height: "100%", rx: "4" }),
    ),
    h("span", { class: "number" }, text),
  );
}

/** The error in a box, in the server's words. */
export function complaint(error) {
  return h("p", { class: "complaint", role: "alert" }, error.message || String(error));
}

/** What is in a select was meant: by who chose it there, by a link, or by who asked that model. */
export function mean(select) {
  select.dataset.meant = "";
}

addEventListener("change", ({ target }) => target instanceof HTMLSelectElement && mean(target), true);

/** Options of a select. What was meant stays, also where it is gone: nobody shall ask another
 *  model than the one that was chosen. `label(name)`: how it is written. */
export function options(select, names, empty, label = (name) => name) {
  const chosen = names.includes(select.value) || "meant" in select.dataset ? select.value : "";
  const all = new Set([...(empty === undefined ? [] : [""]), ...names, ...(chosen ? [chosen] : [])]);
  morph(select, [...all].map((name) => h("option", { value: name }, name ? label(name) : empty)));
  select.value = chosen || [...all][0] || "";
}

export function count(number) {
  return new Intl.NumberFormat("en").format(number);
}

/** A duration in the unit that is read at a glance. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 0.1) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
