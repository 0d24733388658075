// Talk to a model, or to two side by side. Each side has a conversation of its own; what the user
// writes goes to both.

import { Answer } from "./answer.js";
import { complaint, copyButton, count, duration, field, h, mean, morph, options } from "./dom.js";
import { codeBlock, markdown } from "./markdown.js";
import { curl, python } from "./snippets.js";
import { currentKey, recall, remember } from "./store.js";

const LONGEST_KEPT_IMAGE = 200_000; // characters; a tab can keep some five million

export function view(fleet) {
  const models = [h("select", { change: chosen }), h("select", { change: changed })];
  const settings = new Settings();
  const panes = h("div", { class: "panes" });
  const images = new Images();
  const text = h("textarea", { rows: "2", "aria-label": "Message", placeholder: "Message" });
  const send = h("button", { type: "submit", class: "primary" }, "Send");
  const stop = h("button", { type: "button", hidden: true, click: stopped }, "Stop");
  const clear = h("button", { type: "button", class: "quiet", click: restart }, "New chat");
  const said = h("div");
  const code = h("details", { class: "snippets", hidden: true, toggle: drawSnippets }, h("summary", {}, "As code"));
  const form = h("form", { class: "composer" }, images.shown, text,
    h("div", { class: "row" }, images.button, clear, h("span", { class: "space" }), stop, send), said);
  let sides = [new Side()];
  let sent = null;
  let wanted = "";

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!send.disabled) ask();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  text.addEventListener("paste", (event) => {
    if (images.allowed) images.add(event.clipboardData.files);
  });
  panes.addEventListener("click", (event) => {
    const button = event.target.closest("button.again");
    if (!button) return;
    handOver(button);
    again(sides.find((side) => side.element.contains(button)));
  });

  const label = (id) => fleet.label(id);
  fleet.listen(() => {
    options(models[0], fleet.thatTake("chat"), undefined, label);
    choose();
    options(models[1], fleet.thatTake("chat"), "no other", label);
    changed();
  });

  restore(recall("chat", null));
  addEventListener("pagehide", keep);

  function keep() {
    const kept = (longest) => ({
      models: models.map((it) => it.value),
      settings: settings.kept,
      draft: text.value,
      sides: sides.map((side) => side.kept(longest)),
    });
    return remember("chat", kept(LONGEST_KEPT_IMAGE)) || remember("chat", kept(0));
  }

  function restore(kept) {
    if (!kept) return;
    settings.restore(kept.settings);
    text.value = kept.draft;
    if (!kept.sides.some((messages) => messages.length)) return;
    sides = kept.sides.map((messages) => new Side(messages));
    models.forEach((select, n) => {
      options(select, [kept.models[n]], n ? "no other" : undefined, label);
      select.value = kept.models[n];
      mean(select);
    });
    changed();
  }

  /** Who chooses another model than the address names means that one, after a reload too. */
  function chosen() {
    if (location.hash.startsWith("#chat/")) history.replaceState(null, "", "#chat");
    changed();
  }

  /** Take the model that the address names, once the fleet has it. */
  function choose() {
    if (!fleet.thatTake("chat").includes(wanted)) return;
    models[0].value = wanted;
    mean(models[0]);
    wanted = "";
  }

  function changed() {
    const compared = models[1].value !== "";
    if (compared && sides.length === 1) sides.push(new Side());
    if (!compared && sides.length === 2) sides.pop().answer?.stop();
    sides.forEach((side, n) => (side.model = models[n].value));
    images.allow(sides.every((side) => fleet.of(side.model)?.takes?.includes("images")));
    draw();
  }

  function restart() {
    sides.forEach((side) => side.answer?.stop());
    sides = sides.map(() => new Side());
    morph(said);
    code.hidden = true;
    changed();
    text.focus();
  }

  function stopped() {
    sides.forEach((side) => side.answer?.stop());
    handOver(stop);
  }

  /** A button that vanishes by its own press leaves a keyboard's user nowhere: the text is next. */
  function handOver(button) {
    if (button.matches(":focus-visible")) text.focus();
  }

  function ask() {
    const written = text.value.trim();
    if (!written && !images.urls.length) return;
    let given;
    try {
      given = settings.read();
    } catch (error) {
      morph(said, complaint(error));
      return;
    }
    morph(said);
    models.forEach(mean);
    for (const side of sides) {
      side.add(written, images.urls);
      if (!side.pending) start(side, given);
    }
    text.value = "";
    images.clear();
    draw();
    text.focus();
  }

  function again(side) {
    try {
      const given = settings.read();
      side.messages.pop();
      start(side, given);
    } catch (error) {
      morph(said, complaint(error));
    }
    draw();
  }

  function start(side, given) {
    sent = side.start(given, schedule);
    code.hidden = false;
    drawSnippets();
  }

  // Tokens come faster than a screen shows them. A long answer takes long to draw, and is drawn more
  // seldom: a quarter of the time at most.
  let scheduled = false;
  let took = 0;
  function schedule() {
    if (scheduled) return;
    scheduled = true;
    const turn = () => {
      scheduled = false;
      const began = performance.now();
      draw();
      took = performance.now() - began;
    };
    setTimeout(() => requestAnimationFrame(turn), 3 * took);
  }

  function draw() {
    const running = sides.some((side) => side.answer?.running);
    const pending = sides.map((side) => side.pending).find(Boolean);
    stop.hidden = !running;
    send.disabled = running || !sides.every((side) => side.model);
    text.placeholder = pending ? `The result of ${pending.function.name}` : "Message";
    const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 120;
    panes.classList.toggle("two", sides.length === 2);
    for (const side of sides) side.draw();
    if (panes.children.length !== sides.length || sides.some((side) => side.element.parentNode !== panes)) {
      panes.replaceChildren(...sides.map((side) => side.element));
    }
    if (running && atEnd) scrollTo(0, document.documentElement.scrollHeight);
  }

  function drawSnippets() {
    if (!sent || !code.open) return;
    morph(code, code.firstElementChild, codeBlock(curl("v1/chat/completions", sent), "curl"), codeBlock(python(sent), "Python"));
  }

  return {
    element: h(
      "div",
      { class: "chat" },
      h("div", { class: "toolbar" }, field("Model", models[0]), field("Compare with", models[1])),
      settings.element,
      panes,
      code,
      form,
    ),
    /** `#chat/<model>` chooses one. */
    show(model) {
      wanted = model ?? "";
      choose();
      changed();
    },
    keyChanged() {
      if (currentKey()) return;
      text.value = "";
      restart();
    },
  };
}

/** One model's side of the conversation. */
class Side {
  model = "";
  messages; // what the user wrote, as it is sent, and Answers
  element = h("section", { class: "pane", role: "log", "aria-live": "polite" });
  #drawn = new Map(); // message -> { element, as }: what did not change is not drawn again

  constructor(kept = []) {
    this.messages = kept.map((it) => (it.role ? it : Answer.restored(it)));
  }

  /** What of it outlives a reload; an image with more characters than `longest` does not. */
  kept(longest) {
    const part = (it) => (it.image_url?.url.length > longest ? { type: "text", text: "(An image that was not kept.)" } : it);
    const asked = (it) => (Array.isArray(it.content) ? { ...it, content: it.content.map(part) } : it);
    return this.messages.map((it) => (it instanceof Answer ? it.kept : asked(it)));
  }

  get answer() {
    const last = this.messages.at(-1);
    return last instanceof Answer ? last : null;
  }

  /** The tool call whose result the user is to write next. */
  get pending() {
    const at = this.messages.findLastIndex((it) => it instanceof Answer);
    if (at < 0 || this.messages[at].running) return null;
    const results = this.messages.length - at - 1;
    return this.messages[at].calls[results] ?? null;
  }

  add(text, images) {
    const call = this.pending;
    if (call) {
      this.messages.push({ role: "tool", tool_call_id: call.id, content: text });
      return;
    }
    const pictures = images.map((url) => ({ type: "image_url", image_url: { url } }));
    const content = pictures.length ? [...pictures, ...(text ? [{ type: "text", text }] : [])] : text;
    this.messages.push({ role: "user", content });
  }

  /** Begin an answer; returns the body that was sent. */
  start({ system, ...settings }, changed) {
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const it of this.messages) {
      if (!(it instanceof Answer)) messages.push(it);
      else if (it.message) messages.push(it.message);
      else if (messages.at(-1)?.role === "user") messages.pop(); // a question without an answer: templates want both by turns
    }
    const body = { model: this.model, messages, ...settings, stream: true, stream_options: { include_usage: true } };
    this.messages.push(Answer.asked(body, changed));
    return body;
  }

  draw() {
    this.element.setAttribute("aria-label", `Conversation with ${this.model}`);
    this.element.classList.toggle("empty", !this.messages.length);
    const before = this.#drawn;
    this.#drawn = new Map(this.messages.map((it, n) => {
      const last = n === this.messages.length - 1;
      const as = `${it.revision ?? 0} ${last}`;
      const { element, as: drawnAs } = before.get(it) ?? { element: h("div") };
      if (as !== drawnAs) {
        if (it instanceof Answer) drawAnswer(element, it, last);
        else drawAsked(element, it);
      }
      return [it, { element, as }];
    }));
    const elements = [...this.#drawn.values()].map((it) => it.element);
    if (elements.length !== this.element.children.length || elements.some((it, n) => this.element.children[n] !== it)) {
      this.element.replaceChildren(...elements);
    }
  }
}

function drawAsked(element, { role, content }) {
  const parts = Array.isArray(content) ? content : [{ type: "text", text: content }];
  element.className = "message user";
  morph(
    element,
    h("p", { class: "who" }, role === "tool" ? "Tool's result" : "You"),
    parts.map((it) =>
      it.type === "text"
        ? h("p", { class: "plain" }, it.text)
        : h("img", { src: it.image_url.url, alt: "An image that was sent" })),
  );
}

function drawAnswer(element, it, last) {
  element.className = "message";
  // Readers wait for the end of an answer, and do not read it again at each token.
  element.setAttribute("aria-busy", String(it.running));
  morph(
    element,
    h("p", { class: "who" }, it.model),
    it.reasoning && h("details", { class: "reasoning" }, h("summary", {}, it.running && !it.text ? "Reasoning …" : "Reasoning"), h("p", { class: "plain" }, it.reasoning)),
    h("div", { class: "markdown" }, markdown(it.text)),
    it.toolCalls.map((call) =>
      h("div", { class: "tool-call" }, h("p", { class: "who" }, `Calls ${call.function.name}`), h("pre", { tabindex: "0" }, h("code", {}, call.function.arguments)))),
    it.error && complaint(it.error),
    h(
      "div",
      { class: "row meta" },
      h("span", {}, numbers(it)),
      !it.running && it.text && copyButton(it.text),
      !it.running && last && h("button", { type: "button", class: "quiet again" }, "Regenerate"),
    ),
  );
}

function numbers(it) {
  const said = [];
  if (it.ttft !== null) said.push(`TTFT ${duration(it.ttft)}`);
  if (it.tokensPerSecond !== null) said.push(`${count(Number(it.tokensPerSecond.toPrecision(3)))} tokens/s`);
  if (it.usage) said.push(`${count(it.usage.prompt_tokens)} + ${count(it.usage.completion_tokens)} tokens`);
  if (it.finish && it.finish !== "stop") said.push({ length: "cut off by max_tokens" }[it.finish] ?? it.finish.replaceAll("_", " "));
  if (it.running && it.ttft === null) said.push("waiting …");
  return said.join(" · ");
}

/** What goes with a request beside the messages. An empty field is not sent. */
class Settings {
  #system = h("textarea", { rows: "2" });
  #tools = h("textarea", { rows: "3", spellcheck: "false", placeholder: '[{"type": "function", "function": {"name": …}}]' });
  #numbers = {
    temperature: h("input", { type: "number", min: "0", max: "2", step: "0.1", placeholder: "model's" }),
    top_p: h("input", { type: "number", min: "0", max: "1", step: "0.05", placeholder: "model's" }),
    max_tokens: h("input", { type: "number", min: "1", step: "1", placeholder: "no limit" }),
    seed: h("input", { type: "number", step: "1", placeholder: "random" }),
  };

  element = h(
    "details",
    { class: "card settings" },
    h("summary", {}, "Settings"),
    field("System prompt", this.#system),
    h("div", { class: "fields" }, Object.entries(this.#numbers).map(([name, input]) => field(name, input))),
    field("Tools, as JSON", this.#tools, "A call is shown; write its result as the next message."),
  );

  #inputs = { system: this.#system, tools: this.#tools, ...this.#numbers };

  get kept() {
    return Object.fromEntries(Object.entries(this.#inputs).map(([name, input]) => [name, input.value]));
  }

  restore(kept) {
    for (const [name, input] of Object.entries(this.#inputs)) input.value = kept[name] ?? "";
  }

  read() {
    const given = { system: this.#system.value.trim() };
    for (const [name, input] of Object.entries(this.#numbers)) {
      if (input.validity.badInput) throw new Error(`${name} must be a number.`);
      if (input.value !== "") given[name] = Number(input.value);
    }
    const tools = this.#tools.value.trim();
    if (tools) {
      try {
        given.tools = JSON.parse(tools);
      } catch (error) {
        throw new Error(`The tools are no JSON: ${error.message}.`);
      }
    }
    return given;
  }
}

/** Images for the next message, as data: URLs. */
class Images {
  urls = [];
  allowed = false;
  #input = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true, tabindex: "-1", "aria-label": "Images", change: () => this.#chosen() });
  button = h("span", { hidden: true }, this.#input, h("button", { type: "button", class: "quiet", click: () => this.#input.click() }, "Add images"));
  shown = h("div", { class: "thumbs" });

  allow(allowed) {
    this.allowed = allowed;
    this.button.hidden = !allowed;
    if (!allowed) this.clear();
  }

  async add(files) {
    for (const file of files) {
      if (file.type.startsWith("image/")) this.urls.push(await dataUrl(file));
    }
    this.#draw();
  }

  clear() {
    this.urls = [];
    this.#draw();
  }

  async #chosen() {
    await this.add(this.#input.files);
    this.#input.value = "";
  }

  #draw() {
    const thumb = (url, n) =>
      h("button", { type: "button", class: "quiet", "aria-label": `Remove image ${n + 1}`, click: () => this.#remove(url) }, h("img", { src: url, alt: "" }));
    this.shown.replaceChildren(...this.urls.map(thumb));
  }

  #remove(url) {
    this.urls = this.urls.filter((it) => it !== url);
    this.#draw();
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
