// The fleet: a card for each model, with what is wrong and what mends it.

import { get, json } from "./api.js";
import { bar, complaint, copyButton, count, duration, h, morph, s } from "./dom.js";
import { pause, poll } from "./live.js";

const EVERY_S = 2;
const ELSEWHERE_S = 15; // other views need the models' names alone

/** The state that a person sees: a word, and the colour of its dot. */
export function state(model) {
  const up = model.replicas.length;
  const begins = model.starting.length > 0;
  if (model.status === "DEPLOY_FAILED") return ["failed to start", "bad"];
  if (model.status === "UNHEALTHY") return ["unhealthy", "bad"];
  if (model.status === "DELETING") return ["being removed", "off"];
  if (model.asleep) return ["asleep", "off"];
  if (model.status === "RUNNING" && !up && !begins) return ["scaled to zero", "off"];
  if (model.status === "RUNNING" && !begins) return [model.message ? "running, with a problem" : "running", model.message ? "warn" : "good"];
  return [up ? "running, more is starting" : "starting", "warn"];
}

const takes = (model, what) => !model.takes?.length || model.takes.includes(what);

/** What the page knows of the fleet, asked again while it is looked at. */
export class Fleet {
  answer = { models: {} };
  error = null;
  asked = false; // whether there was an answer, or none to be had
  #listeners = [];
  #refused = false; // until there is another key
  #etag = null;
  #again;

  /** `watched()`: whether its view is the one that is shown. */
  constructor(watched) {
    this.#again = poll(() => this.#ask(), () => (watched() ? EVERY_S : ELSEWHERE_S), () => !this.#refused);
  }

  get models() {
    return this.answer.models;
  }

  show() {
    this.#again();
  }

  keyChanged() {
    this.#refused = false;
    this.#forget();
    this.#again(true);
  }

  /** Call `listener(fleet)` after each answer; `fleet.error` is set where there was none. */
  listen(listener) {
    this.#listeners.push(listener);
    listener(this);
  }

  /** The ids of models and adapters that take something; one of which nothing is known may. Those
   *  that cannot answer come last. */
  thatTake(what) {
    const broken = ([, model]) => state(model)[1] === "bad";
    const found = Object.entries(this.models)
      .filter(([, model]) => !what || takes(model, what))
      .sort((a, b) => broken(a) - broken(b));
    return found.flatMap(([name, model]) => [name, ...model.adapters]);
  }

  /** An id with what keeps its model from answering at once. */
  label(id) {
    const model = this.of(id);
    const [word, colour] = model ? state(model) : ["not here now", "bad"];
    if (!this.asked) return id;
    return !model?.replicas.length || ["bad", "off"].includes(colour) ? `${id} (${word})` : id;
  }

  /** The model that an id belongs to. */
  of(id) {
    return this.models[id] ?? Object.values(this.models).find((model) => model.adapters.includes(id));
  }

  async #ask() {
    try {
      const response = await get("fleet", this.#etag ? { "if-none-match": this.#etag } : {});
      if (response.status !== 304 || this.error) {
        if (response.status !== 304) this.answer = await json(response);
        this.#etag = response.headers.get("etag");
        this.#tell(null);
      }
      return pause(response);
    } catch (error) {
      this.#refused = error.status === 401;
      if (this.#refused) this.#forget();
      this.#tell(error);
      return error.retryS;
    }
  }

  #forget() {
    this.answer = { models: {} };
    this.#etag = null;
  }

  #tell(error) {
    this.error = error;
    this.asked = true;
    for (const listener of this.#listeners) listener(this);
  }
}

export function view(fleet) {
  const element = h("div", { class: "fleet" });
  fleet.listen(() => {
    // What is wrong comes first, then what changes.
    const rank = ([, model]) => ["bad", "warn"].indexOf(state(model)[1]) >>> 0;
    const models = Object.entries(fleet.models).sort((a, b) => rank(a) - rank(b));
    morph(
      element,
      fleet.error && h("div", { "data-key": "error" }, complaint(fleet.error)),
      ["keys", "usage"].map((of) => fleet.answer[of] && h("p", { class: "complaint mild", "data-key": of }, fleet.answer[of])),
      models.length > 0 && summary(models.map(([, model]) => model), fleet.answer.version),
      h("div", { class: "cards", "data-key": "cards" }, models.map(([name, model]) => card(name, model))),
      !models.length && !fleet.error && fleet.answer.version &&
        h("p", { class: "hint", "data-key": "none" }, "There is no model here yet, or none that this key may use."),
    );
  });
  return { element, show: () => fleet.show() };
}

function summary(models, version) {
  const up = models.filter((model) => model.replicas.length > 0).length;
  const queued = models.reduce((all, model) => all + model.queued, 0);
  const replicas = models.reduce((all, model) => all + model.replicas.length, 0);
  const figure = (number, what) => h("li", {}, h("b", {}, count(number)), ` ${what}`);
  return h(
    "ul",
    { class: "summary", "data-key": "summary" },
    h("li", {}, h("b", {}, `${up} of ${models.length}`), " models run"),
    figure(replicas, replicas === 1 ? "replica" : "replicas"),
    figure(queued, queued === 1 ? "request waits" : "requests wait"),
    h("li", { class: "hint" }, ["serve_app", "vllm", "ray"].filter((it) => version[it]).map((it) => `${it} ${version[it]}`).join(" · ")),
  );
}

function card(name, model) {
  const [word, colour] = state(model);
  const names = model.ids.filter((id) => id !== name && !model.adapters.includes(id));
  const loads = model.replicas.map((it) => it.load).filter(Boolean);
  return h(
    "article",
    { class: "card", "aria-label": name, "data-key": name },
    h("header", {}, h("h2", {}, name), h("span", { class: `state ${colour}` }, h("i"), word)),
    names.length > 0 && h("p", { class: "hint", "data-key": "names" }, `also ${names.join(", ")}`),
    model.message && h("p", { class: `complaint ${colour === "bad" ? "" : "mild"}`, "data-key": "message" }, model.message),
    model.mend && h("div", { class: "code mend", "data-key": "mend" }, h("code", {}, model.mend), copyButton(model.mend)),
    model.starting.map((it) =>
      h("p", { class: "phase", "data-key": `starting ${it.replica}` }, h("span", {}, it.replica), h("b", {}, it.phase), h("span", { class: "number" }, duration(it.seconds).replace(".0 s", " s")))),
    loads.length > 0 && bars(model, loads),
    model.replicas.length > 0 && replicas(model),
    model.memory && memory(model.memory),
    facts(model),
    takes(model, "chat") && model.status === "RUNNING" && h("a", { class: "button quiet", "data-key": "chat", href: `#chat/${encodeURIComponent(name)}` }, "Chat with it"),
  );
}

function bars(model, loads) {
  const all = (key) => loads.reduce((total, load) => total + (load[key] ?? 0), 0);
  const [running, waiting, capacity] = [all("running"), all("waiting"), all("capacity")];
  const kv = Math.max(...loads.map((load) => load.kv_cache_usage ?? 0));
  const wait = model.queued ? `${count(model.queued)}, ${duration(model.longest_wait_s)}` : "0";
  return h(
    "div",
    { class: "bars", "data-key": "bars" },
    bar("Load", capacity ? running / capacity : 0, `${count(running)} of ${count(capacity)}`),
    bar("Queue", capacity ? (model.queued + waiting) / capacity : 0, waiting ? `${wait} + ${count(waiting)} in vLLM` : wait),
    bar("KV cache", kv, `${Math.round(kv * 100)} %`),
  );
}

function replicas(model) {
  const row = ({ id, front_ends: frontEnds, load, asleep }) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, id),
      h("td", {}, count(frontEnds)),
      h("td", {}, asleep ? "asleep" : load ? `${count(load.running)} + ${count(load.waiting)}` : "–"),
      h("td", {}, load ? `${Math.round((load.kv_cache_usage ?? 0) * 100)} %` : "–"),
    );
  const many = model.replicas.length;
  return h(
    "details",
    { open: many <= 2, "data-key": "replicas" },
    h("summary", {}, many === 1 ? "1 replica" : `${count(many)} replicas`),
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ["Replica", "Front ends", "Runs + waits", "KV"].map((it) => h("th", { scope: "col" }, it)))),
      h("tbody", {}, model.replicas.map(row)),
    ),
  );
}

/** A picture of one GPU's memory, in the planner's numbers. */
function memory({ gpu_gib: size, gpus, parts, others }) {
  const named = Object.entries({ ...parts, ...others }).filter(([, gib]) => gib > 0);
  const gib = (number) => `${number.toFixed(1)} GiB`;
  const label = named.map(([name, it]) => `${name.replaceAll("_", " ")} ${gib(it)}`).join(", ");
  let x = 0;
  return h(
    "figure",
    { class: "memory", "data-key": "memory" },
    h("figcaption", {}, gpus > 1 ? `Each of ${gpus} GPUs, ${gib(size)}` : `GPU, ${gib(size)}`),
    s(
      "svg",
      { role: "img", "aria-label": `Memory of ${gib(size)}: ${label}`, height: "16" },
      s("rect", { class: "track", width: "100%", height: "100%" }),
      named.map(([, it], n) => {
        const rect = s("rect", { class: `part-${n % 6}`, x: `${(100 * x) / size}%`, width: `${(100 * it) / size}%`, height: "100%" });
        x += it;
        return rect;
      }),
    ),
    h("ul", { class: "legend" }, named.map(([name, it], n) => h("li", { class: `part-${n % 6}` }, h("i"), `${name.replaceAll("_", " ")} ${gib(it)}`))),
  );
}

function facts(model) {
  const chips = [...(model.takes ?? [])];
  if (model.max_model_len) chips.push(`${count(model.max_model_len)} tokens`);
  return (chips.length > 0 || model.adapters.length > 0) && h(
    "ul",
    { class: "chips", "data-key": "facts" },
    chips.map((it) => h("li", {}, it)),
    model.adapters.map((it) => h("li", { class: "adapter" }, `adapter ${it}`)),
  );
}
