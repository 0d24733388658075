// Lines over the last hour, from /metrics. The browser keeps the points; the gateway keeps nothing.

import { get } from "./api.js";
import { complaint, count, duration, field, h, morph, options, s } from "./dom.js";
import { pause, poll } from "./live.js";
import { parse, point, WANTED } from "./metrics.js";
import { recall, remember } from "./store.js";

const EVERY_S = 5;
const KEPT_S = 3600;
const WINDOW_S = 30; // a point tells of this long: shorter is noise, longer hides what happens now
const GAP_S = 60; // no line is drawn over a time in which nobody looked

const percent = (share) => `${Math.round(share * 100)} %`;
const perSecond = (rate) => `${count(Number(rate.toPrecision(3)))}/s`;
const whole = (number) => count(Math.round(number * 10) / 10);

const CHARTS = [
  { title: "Tokens", lines: { generated: "generated", prompt: "prompt" }, show: perSecond },
  { title: "Time to first token", lines: { ttft50: "p50", ttft95: "p95" }, show: duration },
  { title: "Inter-token latency", lines: { itl50: "p50", itl95: "p95" }, show: duration },
  { title: "Requests now", lines: { running: "running", queued: "queued here", waiting: "waiting in vLLM" }, show: whole },
  { title: "KV cache in use", lines: { kv: "fullest replica" }, show: percent, most: 1 },
  { title: "Prefix cache hits", lines: { hits: "of the prompts' tokens" }, show: percent, most: 1 },
  { title: "Requests by status", lines: null, show: perSecond },
];

/** The view. Scrapes begin when it is first shown and go on while the page is looked at. */
export function charts() {
  const chosen = h("select", { change: () => draw() });
  const model = field("Model", chosen);
  const said = h("div");
  const grid = h("div", { class: "charts" });
  const element = h("div", {}, h("div", { class: "toolbar" }, model, h("p", { class: "hint" },
    `Each point tells of ${WINDOW_S} s. The last hour is kept in this tab.`)), said, grid);

  let points = recall("charts", []); // [{ at, scopes: { "": point, model: point } }]
  let scrapes = []; // [{ at, samples }] of the last WINDOW_S
  let shown = false;
  let refused = false; // until there is another key

  async function scrape() {
    let next;
    try {
      // Who else looks gets the same page, which may be a little old.
      const response = await get("metrics", { "cache-control": `max-age=${EVERY_S}` });
      next = pause(response);
      const samples = parse(await response.text(), WANTED);
      const at = Date.now() / 1000 - Number(response.headers.get("x-age-s"));
      const before = scrapes.find((it) => at - it.at <= WINDOW_S);
      scrapes = [...scrapes.filter((it) => at - it.at <= WINDOW_S), { at, samples }];
      const models = [...new Set(samples.map((it) => it.labels.model).filter(Boolean))].sort();
      options(chosen, models, "all models");
      if (before) {
        const scopes = {};
        for (const name of ["", ...models]) {
          scopes[name] = point(before.samples, samples, at - before.at, name);
        }
        points = [...points.filter((it) => at - it.at < KEPT_S), { at, scopes }];
      }
      morph(said);
    } catch (error) {
      refused = error.status === 401 || error.status === 403;
      morph(said, complaint(error));
    }
    draw();
    return next;
  }

  function draw() {
    const of = points.map((it) => ({ at: it.at, ...it.scopes[chosen.value] }));
    morph(grid, CHARTS.map((chart) => figure(chart, of)));
  }

  addEventListener("pagehide", () => remember("charts", points));
  const again = poll(scrape, () => EVERY_S, () => shown && !refused);
  return {
    element,
    show() {
      shown = true;
      again();
    },
    keyChanged() {
      scrapes = points = [];
      refused = false;
    },
  };
}

const [WIDTH, HEIGHT, LEFT, BOTTOM] = [480, 160, 4, 18];

/** One chart, with the last values in words beside its lines' names. */
function figure(chart, points) {
  const lines = chart.lines
    ? Object.entries(chart.lines).map(([key, name]) => ({ name, of: (it) => it[key] }))
    : [...new Set(points.flatMap((it) => Object.keys(it.codes ?? {})))]
        .sort()
        .map((code) => ({ name: code, of: (it) => it.codes?.[code] ?? 0 }));
  const drawn = lines.map((line) => ({
    name: line.name,
    points: points.map((it) => ({ at: it.at, value: line.of(it) })),
  }));
  const values = drawn.flatMap((line) => line.points.map((it) => it.value)).filter(Number.isFinite);
  const most = chart.most ?? round(Math.max(0, ...values));
  const last = (line) => line.points.at(-1)?.value;
  const said = (value) => (Number.isFinite(value) ? chart.show(value) : "–");
  const words = drawn.map((line) => `${line.name} ${said(last(line))}`).join(", ") || "nothing yet";
  return h(
    "figure",
    { class: "card chart" },
    h("figcaption", {}, chart.title),
    h("ul", { class: "legend" }, drawn.map((line, n) =>
      h("li", { class: `line-${n % 6}` }, h("i"), `${line.name} `, h("b", {}, said(last(line)))))),
    plot(drawn, most, `${chart.title}: ${words}`, said),
  );
}

/** The next 1, 2 or 5 of its power of ten: axes end at round numbers, and seldom move. */
function round(value) {
  if (!value) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((it) => it * power >= value) * power;
}

function plot(lines, most, label, said) {
  const times = lines.flatMap((line) => line.points.map((it) => it.at));
  const end = Math.max(...times);
  const begin = Math.max(end - KEPT_S, Math.min(...times, end - 60));
  const x = (at) => LEFT + ((at - begin) / (end - begin || 1)) * (WIDTH - 2 * LEFT);
  const y = (value) => 8 + (1 - Math.min(1, value / most)) * (HEIGHT - BOTTOM - 8);
  const path = (points) => {
    let text = "";
    let before = null;
    for (const it of points) {
      if (!Number.isFinite(it.value)) continue;
      const begins = before === null || it.at - before > GAP_S;
      const place = `${x(it.at).toFixed(1)} ${y(it.value).toFixed(1)}`;
      text += begins ? `M${place}h0` : `L${place}`; // "h0": a point alone is a dot
      before = it.at;
    }
    return text;
  };
  const minutes = Math.round((end - begin) / 60);
  return s(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    [0, 0.5, 1].map((share) => s("line", { class: "grid", x1: 0, x2: WIDTH, y1: y(most * share), y2: y(most * share) })),
    s("text", { x: LEFT, y: 19 }, said(most)),
    s("text", { x: LEFT, y: HEIGHT - 4 }, times.length ? `${minutes} min ago` : ""),
    s("text", { x: WIDTH - LEFT, y: HEIGHT - 4, "text-anchor": "end" }, times.length ? "now" : ""),
    lines.map((line, n) => s("path", { class: `line-${n % 6}`, d: path(line.points) })),
  );
}
