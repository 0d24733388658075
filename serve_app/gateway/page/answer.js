// One answer of a model as it streams in: its text, reasoning, tool calls and times.

import { post } from "./api.js";
import { events } from "./stream.js";

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
  #rate = null; // of a restored one
  #abort = new AbortController();

  constructor(model) {
    this.model = model;
  }

  /** Ask for it with `body`; `changed` is called whenever there is more of it. */
  static asked(body, changed) {
    const answer = new Answer(body.model);
    answer.#run(body, changed);
    return answer;
  }

  /** One that came to its end before, from its `kept`. */
  static restored({ rate, ...kept }) {
    const answer = Object.assign(new Answer(kept.model), kept, { running: false });
    answer.#rate = rate;
    return answer;
  }

  /** What of it outlives a reload. */
  get kept() {
    const { model, text, reasoning, toolCalls, error, usage, ttft } = this;
    const finish = this.running ? "stopped" : this.finish;
    return { model, text, reasoning, toolCalls, error: error && { message: error.message }, finish, usage, ttft, rate: this.tokensPerSecond };
  }

  /** Close the connection: the gateway and the engine then end the request. */
  stop() {
    this.#abort.abort();
  }

  /** Generated tokens by second, of what came after the first; null until that is known. */
  get tokensPerSecond() {
    if (this.#rate !== null) return this.#rate;
    const tokens = this.usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.#last - this.#first) / 1000;
    return tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
  }

  /** The tool calls that are whole; of an answer that broke off the last may be half a one. */
  get calls() {
    return this.running || this.error || this.finish === "stopped" ? [] : this.toolCalls;
  }

  /** The message as a later request has it; null where there is nothing to tell. */
  get message() {
    if (!this.text && !this.calls.length) return null;
    const calls = this.calls.length ? { tool_calls: this.calls } : {};
    return { role: "assistant", content: this.text || null, ...calls };
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
