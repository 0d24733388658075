// The page: its views by the address's #hash, and the form that asks for a key.

import { complaint, copy, h, morph } from "./dom.js";
import { Fleet } from "./fleet.js";
import { currentKey, setKey } from "./store.js";

const main = document.querySelector("main");
const dialog = document.querySelector("dialog");
const keyButton = document.querySelector("#key");

let current = "fleet";
const fleet = new Fleet(() => current === "fleet");

// The first look is at the fleet and waits for no other view's file. Those come right after it, before
// they are wanted: a page that stays open over an update shall not be of two versions.
const FILES = { fleet: "./fleet.js", chat: "./chat.js", try: "./tryout.js", charts: "./charts.js", usage: "./usage.js" };
fleet.listen(() => {
  if (fleet.asked) for (const file of Object.values(FILES)) import(file).catch(() => {}); // tells when it is wanted
});

const sections = {};
const views = {}; // promises of those that were wanted
for (const name of Object.keys(FILES)) {
  sections[name] = h("section", { class: "view", id: `view-${name}`, hidden: true });
  main.append(sections[name]);
}

async function made(name) {
  const { view } = await import(FILES[name]);
  const it = view(fleet, () => name === current);
  sections[name].replaceChildren(it.element);
  return it;
}

async function show(name, argument) {
  const view = await (views[name] ??= made(name)).catch((error) => {
    // A browser does not fetch a module again that it could not have.
    sections[name].replaceChildren(complaint({ message: "This view could not be fetched; reload the page." }));
    if (!(error instanceof TypeError)) throw error;
  });
  if (name === current) view?.show(argument);
}

function route() {
  const [name, argument] = location.hash.slice(1).split("/");
  current = Object.hasOwn(FILES, name) ? name : "fleet";
  for (const [it, section] of Object.entries(sections)) section.hidden = it !== current;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${current}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${document.querySelector("nav a[aria-current]").textContent} · serve_app`;
  show(current, argument && decoded(argument));
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody typed a "%"
  }
}

// --- the key ---------------------------------------------------------------------------------------

const [keyInput, keep] = dialog.querySelectorAll("input");

function askForKey(said) {
  morph(dialog.querySelector("#key-said"), said ?? "");
  if (dialog.open) return; // somebody may be typing
  keyInput.value = currentKey();
  dialog.showModal();
}

function take(text) {
  setKey(text, keep.checked);
  keyButton.textContent = text ? "Change key" : "Key";
  dialog.close();
  fleet.keyChanged();
  for (const view of Object.values(views)) view.then((it) => it.keyChanged?.(), () => {});
  show(current);
}

dialog.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  take(keyInput.value);
});
dialog.querySelector("#forget").addEventListener("click", () => take(""));
dialog.querySelector("#cancel").addEventListener("click", () => dialog.close());
document.addEventListener("key-wanted", (event) => askForKey(event.detail));
keyButton.addEventListener("click", () => askForKey());
keyButton.textContent = currentKey() ? "Change key" : "Key";

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (button) copy(button);
});
addEventListener("hashchange", route);
route();
