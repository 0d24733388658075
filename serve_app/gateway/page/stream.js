// Server-sent events over fetch, as `EventSource` can neither POST nor send a key.

import { ApiError, sentence } from "./api.js";

const brokenOff = () => new ApiError("The connection broke off before the answer's end.", 0, "broken_off");

/** The JSON of each event; an error event is thrown, and an end without `[DONE]`. It reads to the
 *  end: who closes the connection at `[DONE]` is taken for a client that left. */
export async function* events(response) {
  let ended = false;
  for await (const data of datas(response.body)) {
    ended = data === "[DONE]";
    if (ended) continue;
    const event = parsed(data);
    if (event.error) throw new ApiError(sentence(event) ?? "The stream broke off.", 0, event.error.code);
    yield event;
  }
  if (!ended) throw brokenOff();
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw brokenOff();
  }
}

/** The `data` of each event: its lines joined; comments and other fields are skipped. */
export async function* datas(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw brokenOff();
      });
      rest += value ?? "";
      // A "\r" at the end may be half of "\r\n".
      const complete = done ? rest.length : rest.endsWith("\r") ? rest.length - 1 : rest.length;
      const parts = rest.slice(0, complete).split(/\r\n|\n|\r/);
      rest = (done ? "" : parts.pop()) + rest.slice(complete);
      for (const line of parts) {
        if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
      if (done) {
        if (lines.length) yield lines.join("\n");
        return;
      }
    }
  } finally {
    // A consumer that stops early closes the connection.
    reader.cancel().catch(() => {});
  }
}
