// What was just sent, as a person would send it by hand. The key is left to the environment.

import { baseUrl } from "./api.js";

export function curl(path, body) {
  const json = JSON.stringify(shortened(body), null, 2).replaceAll("'", "'\\''");
  return [
    `curl ${baseUrl()}/${path} \\`,
    '  -H "Authorization: Bearer $API_KEY" \\',
    '  -H "Content-Type: application/json" \\',
    `  -d '${json}'`,
  ].join("\n");
}

/** The same by OpenAI's SDK; a chat streams. */
export function python(body) {
  const { stream, stream_options: _, ...rest } = shortened(body);
  const given = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${baseUrl()}/v1", api_key=os.environ["API_KEY"])`,
    "stream = client.chat.completions.create(",
    ...given,
    ...(stream ? ["    stream=True,"] : []),
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
}

/** A Python literal of what JSON can hold. */
export function literal(value, depth = 0) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = "    ".repeat(depth + 1);
  const list = Array.isArray(value);
  const inner = list
    ? value.map((it) => `${pad}${literal(it, depth + 1)},`)
    : Object.entries(value).map(([key, it]) => `${pad}${JSON.stringify(key)}: ${literal(it, depth + 1)},`);
  const [open, close] = list ? "[]" : "{}";
  return inner.length ? [open, ...inner, "    ".repeat(depth) + close].join("\n") : open + close;
}

/** Images take thousands of characters: their begin stands for them. */
function shortened(value) {
  if (typeof value === "string") return value.startsWith("data:image/") ? `${value.slice(0, 40)}…` : value;
  if (Array.isArray(value)) return value.map(shortened);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, it]) => [key, shortened(it)]));
  }
  return value;
}
