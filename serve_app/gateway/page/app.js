// The page: its views by the address's #hash, and the form that asks for a key.

import { charts } from "./charts.js";
import { chat } from "./chat.js";
import { copy, h, morph } from "./dom.js";
import { Fleet, fleetView } from "./fleet.js";
import { currentKey, setKey } from "./store.js";
import { tryout } from "./tryout.js";
import { usage } from "./usage.js";

const main = document.querySelector("main");
const dialog = document.querySelector("dialog");
const keyButton = document.querySelector("#key");

let current = "fleet";
const fleet = new Fleet(() => current === "fleet");
const views = { fleet: fleetView(fleet), chat: chat(fleet), try: tryout(fleet), charts: charts(), usage: usage() };

for (const [name, view] of Object.entries(views)) {
  main.append(h("section", { class: "view", id: `view-${name}`, hidden: true }, view.element));
}

function route() {
  const [name, argument] = location.hash.slice(1).split("/");
  current = Object.hasOwn(views, name) ? name : "fleet";
  for (const section of main.children) section.hidden = section.id !== `view-${current}`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${current}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${document.querySelector("nav a[aria-current]").textContent} · serve_app`;
  views[current].show(argument && decoded(argument));
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
  for (const view of Object.values(views)) view.keyChanged?.();
  views[current].show();
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
