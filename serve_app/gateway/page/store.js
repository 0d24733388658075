// What this tab remembers: the key in memory, or in sessionStorage if its user ticked that.

const KEY = "serve_app.key";
let key = sessionStorage.getItem(KEY) ?? "";

export const currentKey = () => key;

export function setKey(text, keep) {
  key = text.trim();
  if (key && keep) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function recall(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(`serve_app.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(name, value) {
  try {
    sessionStorage.setItem(`serve_app.${name}`, JSON.stringify(value));
  } catch {
    // The storage is full: what was to be kept lasts as long as the page.
  }
}
