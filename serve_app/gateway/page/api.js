// Calls of the gateway's public routes, with the key. Addresses are relative to this file's: the page
// may lie below a prefix, and be opened with or without a slash at the end.

import { currentKey } from "./store.js";

/** What went wrong, in the server's own sentence. */
export class ApiError extends Error {
  /** `retryS`: the seconds after which the server wants to be asked again; 0 where it did not say. */
  constructor(message, status, code, retryS = 0) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryS = retryS;
  }
}

// A gateway that hangs is told as one that is away: what was seen last must not pass for what is now.
const PATIENCE_MS = 30_000;

/** GET; the Response may be a 304 where `headers` ask for what has changed. What came for a key that
 *  was changed meanwhile is not looked at: it is asked for again. */
export async function get(path, headers = {}) {
  const key = currentKey();
  const coming = call(path, { headers: { ...headers }, signal: AbortSignal.timeout(PATIENCE_MS) });
  await coming.catch(() => {});
  return currentKey() === key ? coming : get(path);
}

/** POST a body as JSON; the answer is the Response, as it may be a stream. */
export function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** The JSON of an answer; of what a proxy puts in its place, such as a form to log in, a sentence. */
export async function json(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("What answered is not the gateway: its answer is no JSON.", response.status, "no_json");
  }
}

/** The gateway's address as clients write it, without a slash at the end. */
export function baseUrl() {
  return new URL("../..", import.meta.url).href.replace(/\/$/, "");
}

/** The sentence of an error body: OpenAI's envelope, and Anthropic's. */
export function sentence(body) {
  const error = body?.error;
  return typeof error === "string" ? error : error?.message;
}

async function call(path, { headers, ...options }) {
  const key = currentKey();
  if (/[^!-~]/.test(key)) throw refused("The key has a character that no key has; copy it again.");
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(`${baseUrl()}/${path}`, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The gateway cannot be reached.", 0, "unreachable");
  }
  if (response.ok || response.status === 304) return response;
  const body = await response.json().catch(() => null);
  const said = sentence(body) ?? `The gateway answered ${response.status} ${response.statusText}.`;
  if (response.status === 401) throw refused(said, body?.error?.code);
  throw new ApiError(said, response.status, body?.error?.code, Number(response.headers.get("retry-after")) || 0);
}

/** The error of a key that will not do, for which the user is asked anew. */
function refused(said, code) {
  document.dispatchEvent(new CustomEvent("key-wanted", { detail: said }));
  return new ApiError(said, 401, code);
}
