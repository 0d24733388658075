// What this tab remembers: the key in memory, or in sessionStorage if its user ticked that.

const KEY = "serve_app.key";
const storage = stored();
let key = storage.getItem(KEY) ?? "";

/** The tab's storage. A browser that is told to keep nothing has none: then all lasts as long as the page. */
function stored() {
  try {
    return sessionStorage;
  } catch {
    return { getItem: () => null, setItem() {}, removeItem() {} };
  }
}

export const currentKey = () => key;

export function setKey(text, keep) {
  key = text.trim();
  if (!key) forget(); // whoever forgets the key leaves nothing behind
  if (key && keep) storage.setItem(KEY, key);
  else storage.removeItem(KEY);
}

export function recall(name, otherwise) {
  try {
    return JSON.parse(storage.getItem(`serve_app.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keep a value over a reload; false where the storage is full, and then nothing older is left. */
export function remember(name, value) {
  try {
    storage.setItem(`serve_app.${name}`, JSON.stringify(value));
    return true;
  } catch {
    storage.removeItem(`serve_app.${name}`);
    return false;
  }
}

function forget() {
  for (const name of Object.keys(storage)) {
    if (name.startsWith("serve_app.")) storage.removeItem(name);
  }
}
