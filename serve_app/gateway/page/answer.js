// One answer of a model as it streams in: its text, reasoning, tool calls and times.

import { post } from "./api.js";
import { events } from "./stream.js";

/** The answer to `body`; `changed` is called whenever there is more of it. */
export class Answer {
  text = "";
  reasoning = "";
  toolCalls = []; // as OpenAI's: { id, type, function: { name, arguments } }
  error = null;
  finish = null;
  usage = null;
  ttft = null; // seconds
  running = true;
  revision = 0; // grows with each change
  #began = performance.now();
  #first = 0;
  #last = 0;
  #pieces = 0;
  #abort = new AbortController();

  constructor(body, changed) {
    this.model = body.model;
    this.done = this.#run(body, changed);
  }

  /** Close the connection: the gateway and the engine then end the request. */
  stop() {
    this.#abort.abort();
  }

  /** Generated tokens by second, of what came after the first; null until that is known. */
  get tokensPerSecond() {
    const tokens = this.usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.#last - this.#first) / 1000;
    return tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
  }

  /** The message as a later request has it. */
  get message() {
    const calls = this.toolCalls.length ? { tool_calls: this.toolCalls } : {};
    return { role: "assistant", content: this.text || (this.toolCalls.length ? null : ""), ...calls };
  }

  async #run(body, changed) {
    try {
      const response = await post("v1/chat/completions", body, this.#abort.signal);
      for await (const event of events(response)) {
        this.#take(event);
        this.revision += 1;
        changed();
      }
    } catch (error) {
      if (error.name === "AbortError") this.finish = "stopped";
      else this.error = error;
    }
    this.running = false;
    this.revision += 1;
    changed();
  }

  #take(event) {
    if (event.usage) this.usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) this.finish = choice.finish_reason;
    const delta = choice.delta ?? {};
    const reasoning = delta.reasoning ?? delta.reasoning_content ?? "";
    if (!delta.content && !reasoning && !delta.tool_calls) return;
    this.#last = performance.now();
    this.#pieces += 1;
    if (this.ttft === null) {
      this.#first = this.#last;
      this.ttft = (this.#first - this.#began) / 1000;
    }
    this.text += delta.content ?? "";
    this.reasoning += reasoning;
    for (const piece of delta.tool_calls ?? []) {
      const call = (this.toolCalls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
      if (piece.id) call.id = piece.id;
      call.function.name += piece.function?.name ?? "";
      call.function.arguments += piece.function?.arguments ?? "";
    }
  }
}
