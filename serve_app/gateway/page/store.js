// What this tab remembers: the key in memory, or in sessionStorage if its user ticked that.

const KEY = "serve_app.key";
let key = sessionStorage.getItem(KEY) ?? "";

export const currentKey = () => key;

export function setKey(text, keep) {
  key = text.trim();
  if (!key) forget(); // whoever forgets the key leaves nothing behind
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

/** Keep a value over a reload; false where the storage is full, and then nothing older is left. */
export function remember(name, value) {
  try {
    sessionStorage.setItem(`serve_app.${name}`, JSON.stringify(value));
    return true;
  } catch {
    sessionStorage.removeItem(`serve_app.${name}`);
    return false;
  }
}

function forget() {
  for (const name of Object.keys(sessionStorage)) {
    if (name.startsWith("serve_app.")) sessionStorage.removeItem(name);
  }
}
