// Lines over the last hour, from /metrics. The browser keeps the points; the gateway keeps nothing.

import { get } from "./api.js";
import { complaint, count, duration, field, h, morph, options, s } from "./dom.js";
import { pause, poll } from "./live.js";
import { parse, points as pointsOf, WANTED } from "./metrics.js";
import { recall, remember } from "./store.js";

const EVERY_S = 5;
const KEPT_S = 3600;
const WINDOW_S = 30; // a point tells of this long: shorter is noise, longer hides what happens now
const RECENT_S = 300;
const LONGEST_S = 600; // between two scrapes that a point is made of: the gateway may ask for long pauses

const percent = (share) => `${Math.round(share * 100)} %`;
const perSecond = (rate) => `${count(Number(rate.toPrecision(3)))}/s`;
const whole = (number) => count(Math.round(number * 10) / 10);

const CHARTS = [
  { title: "Tokens", lines: { generated: "generated", prompt: "prompt" }, show: perSecond },
  { title: "Time to first token", lines: { ttft50: "p50", ttft95: "p95" }, show: duration },
  { title: "Inter-token latency", lines: { itl50: "p50", itl95: "p95" }, show: duration },
  { title: "Time per output token, by request", lines: { tpot50: "p50", tpot95: "p95" }, show: duration },
  { title: "Requests now", lines: { running: "running", queued: "queued here", waiting: "waiting in vLLM" }, show: whole },
  { title: "KV cache in use", lines: { kv: "fullest replica" }, show: percent, most: 1 },
  { title: "Prefix cache hits", lines: { hits: "of the prompts' tokens" }, show: percent, most: 1 },
  { title: "Requests by status", lines: null, show: perSecond },
];

/** The view. Scrapes begin when it is first shown. In other views they go on, one a window, so that the
 *  last hour has no hole. `watched()`: whether this view is shown. */
export function view(fleet, watched) {
  const chosen = h("select", { change: () => draw() });
  const model = field("Model", chosen);
  const said = h("div");
  const grid = h("div", { class: "charts" });
  const element = h("div", {}, h("div", { class: "toolbar" }, model, h("p", { class: "hint" },
    `Each point tells of the ${WINDOW_S} s before it. The last hour is kept in this tab.`)), said, grid);

  let points = recall("charts", []); // [{ at, scopes: { "": point, model: point } }]
  let scrapes = []; // [{ at, samples }] of the last WINDOW_S, one at least
  let pointed = null; // where the pointer is in a chart, from 0 to 1
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
      take(samples, at);
      const models = [...new Set(samples.map((it) => it.labels.model).filter(Boolean))].sort();
      options(chosen, models, "all models");
      morph(said);
    } catch (error) {
      refused = error.status === 401 || error.status === 403;
      next = error.retryS;
      morph(said, complaint(error));
    }
    draw();
    return next;
  }

  function take(samples, at) {
    const last = scrapes.at(-1);
    if (last && Math.abs(at - last.at) < 1) return; // the same page once more
    if (at < points.at(-1)?.at) scrapes = points = []; // the clock was set back
    const before = scrapes.find((it) => at - it.at <= WINDOW_S) ?? (at - last?.at < LONGEST_S && last);
    scrapes = [...scrapes.filter((it) => at - it.at <= WINDOW_S), { at, samples }];
    if (!before) return;
    const seconds = at - before.at;
    points.push({ at, seconds, scopes: pointsOf(before.samples, samples, seconds) });
    points = thinned(points, at);
  }

  function draw() {
    if (!watched()) return;
    const of = points.map((it) => ({ at: it.at, seconds: it.seconds, ...it.scopes[chosen.value] }));
    morph(grid, CHARTS.map((chart) => figure(chart, of, pointed)));
  }

  // What a pointer is at in one chart is told in all.
  function pointAt(event) {
    const box = event.type === "pointermove" && event.target.closest("svg")?.getBoundingClientRect();
    const share = box ? (event.clientX - box.left) / box.width : null;
    if (share === pointed) return;
    pointed = share;
    draw();
  }
  grid.addEventListener("pointermove", pointAt);
  grid.addEventListener("pointerleave", pointAt);

  function keep() {
    // A hundred models may be more than a tab can keep: then all of them as one.
    const summed = ({ scopes, ...it }) => ({ ...it, scopes: { "": scopes[""] } });
    return remember("charts", points.map(short)) || remember("charts", points.map(summed));
  }

  addEventListener("pagehide", keep);
  const again = poll(scrape, () => (watched() ? EVERY_S : WINDOW_S), () => shown && !refused);
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

/** The last hour: each point of the last five minutes, before that one a window. */
function thinned(points, now) {
  let before = -Infinity;
  return points.filter(({ at }) => {
    const kept = now - at < KEPT_S && (now - at < RECENT_S || at - before > 0.8 * WINDOW_S);
    if (kept) before = at;
    return kept;
  });
}

/** A point with as many digits as a chart shows. */
function short(point) {
  return JSON.parse(JSON.stringify(point, (key, it) => (typeof it === "number" && key !== "at" ? Number(it.toPrecision(4)) : it)));
}

const [WIDTH, HEIGHT, LEFT, BOTTOM] = [480, 160, 4, 18];

/** One chart, with the last values in words beside its lines' names. */
function figure(chart, points, pointed) {
  const lines = chart.lines
    ? Object.entries(chart.lines).map(([key, name]) => ({ name, of: (it) => it[key] }))
    : [...new Set(points.flatMap((it) => Object.keys(it.codes ?? {})))]
        .sort()
        .map((code) => ({ name: code, of: (it) => it.codes?.[code] ?? 0 }));
  const drawn = lines.map((line) => ({
    name: line.name,
    points: points.map((it) => ({ at: it.at, since: it.at - it.seconds, value: line.of(it) })),
  }));
  const values = drawn.flatMap((line) => line.points.map((it) => it.value)).filter(Number.isFinite);
  const most = chart.most ?? round(Math.max(0, ...values));
  const looked = index(points, pointed);
  const last = (line) => line.points.at(-1)?.value;
  const said = (value) => (Number.isFinite(value) ? chart.show(value) : "–");
  const words = drawn.map((line) => `${line.name} ${said(last(line))}`).join(", ") || "nothing yet";
  return h(
    "figure",
    { class: "card chart" },
    h("figcaption", {}, chart.title),
    h("ul", { class: "legend" }, drawn.map((line, n) =>
      h("li", { class: `line-${n % 6}` }, h("i"), `${line.name} `, h("b", {}, said(line.points[looked]?.value))))),
    plot(drawn, most, `${chart.title}: ${words}`, said, pointed === null ? null : points[looked]?.at),
  );
}

/** The next 1, 2 or 5 of its power of ten: axes end at round numbers, and seldom move. */
function round(value) {
  if (!value) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((it) => it * power >= value) * power;
}

/** The times of the left and the right edge. */
function range(points) {
  const end = points.at(-1)?.at ?? 0;
  return [Math.max(end - KEPT_S, Math.min(points[0]?.at ?? 0, end - 60)), end];
}

/** Which of the points is nearest to where the pointer is; the last without one. */
function index(points, pointed) {
  if (pointed === null) return points.length - 1;
  const [begin, end] = range(points);
  const at = begin + ((pointed * WIDTH - LEFT) / (WIDTH - 2 * LEFT)) * (end - begin);
  return points.reduce((best, it, n) => (Math.abs(it.at - at) < Math.abs(points[best].at - at) ? n : best), 0);
}

function plot(lines, most, label, said, looked) {
  const [begin, end] = range(lines[0]?.points ?? []);
  const x = (at) => LEFT + ((at - begin) / (end - begin || 1)) * (WIDTH - 2 * LEFT);
  const y = (value) => 8 + (1 - Math.min(1, value / most)) * (HEIGHT - BOTTOM - 8);
  const path = (points) => {
    let text = "";
    let before = null;
    for (const it of points) {
      if (!Number.isFinite(it.value)) continue;
      const begins = before === null || it.since > before + WINDOW_S; // nobody looked in between
      const place = `${x(it.at).toFixed(1)} ${y(it.value).toFixed(1)}`;
      text += begins ? `M${place}h0` : `L${place}`; // "h0": a point alone is a dot
      before = it.at;
    }
    return text;
  };
  const ago = (at) => (end - at < 45 ? "now" : `${Math.round((end - at) / 60)} min ago`);
  const edge = HEIGHT - BOTTOM;
  return s(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    [0, 0.5, 1].map((share) => s("line", { class: "grid", x1: 0, x2: WIDTH, y1: y(most * share), y2: y(most * share) })),
    s("text", { x: LEFT, y: 19 }, said(most)),
    end > 0 && s("text", { x: LEFT, y: HEIGHT - 4 }, ago(begin)),
    end > 0 && s("text", { x: WIDTH - LEFT, y: HEIGHT - 4, "text-anchor": "end" }, ago(looked ?? end)),
    looked && s("line", { class: "looked", x1: x(looked), x2: x(looked), y1: 8, y2: edge }),
    lines.map((line, n) => s("path", { class: `line-${n % 6}`, d: path(line.points) })),
  );
}
