// Prometheus' text format, and what charts show of two scrapes: rates and quantiles.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:\\.|[^"\\])*)"/g;
const ESCAPED = { n: "\n", '"': '"', "\\": "\\" };

/** The samples of a page whose names are wanted: `[{ id, name, labels, value }]`. */
export function parse(page, wanted) {
  const samples = [];
  for (const line of page.split("\n")) {
    if (line.startsWith("#")) continue;
    const match = SAMPLE.exec(line);
    if (!match || !wanted.has(match[1])) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (all, c) => ESCAPED[c] ?? all);
    }
    const id = `${match[1]}{${match[2] ?? ""}}`;
    samples.push({ id, name: match[1], labels, value: number(match[3]) });
  }
  return samples;
}

const number = (text) => (text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text));

/** How much each counter grew between two scrapes. One that fell began again from nothing; one that
 *  is new began from nothing if its process was there before: else it only was not heard of. */
export function increases(before, after) {
  const source = ({ labels }) => `${labels.gateway} ${labels.replica}`;
  const old = new Map(before.map((sample) => [sample.id, sample.value]));
  const sources = new Set(before.map(source));
  return after.map((sample) => {
    const from = old.get(sample.id) ?? (sources.has(source(sample)) ? 0 : sample.value);
    return { ...sample, value: sample.value >= from ? sample.value - from : sample.value };
  });
}

export function sum(samples) {
  return samples.reduce((total, sample) => total + sample.value, 0);
}

/** A quantile of a histogram's increases by `le`, linear within a bucket, as PromQL has it;
 *  null where nothing was observed. */
export function quantile(q, buckets) {
  const byBound = new Map();
  for (const { labels, value } of buckets) {
    const bound = number(labels.le);
    byBound.set(bound, (byBound.get(bound) ?? 0) + value);
  }
  const sorted = [...byBound].sort(([a], [b]) => a - b);
  const total = sorted.at(-1)?.[1] ?? 0;
  if (!total) return null;
  const rank = q * total;
  let [from, below] = [0, 0];
  for (const [bound, cumulated] of sorted) {
    if (cumulated >= rank) {
      if (bound === Infinity) return from; // all that is known: it is larger than this
      return from + (bound - from) * ((rank - below) / (cumulated - below || 1));
    }
    [from, below] = [bound, cumulated];
  }
  return from;
}

const GATEWAY = "serve_app_gateway_";
const TTFT = "vllm:time_to_first_token_seconds_bucket";
const ITL = "vllm:inter_token_latency_seconds_bucket";
const TPOT = "vllm:request_time_per_output_token_seconds_bucket";

export const WANTED = new Set([
  "vllm:generation_tokens_total",
  "vllm:prompt_tokens_total",
  "vllm:num_requests_running",
  "vllm:num_requests_waiting",
  "vllm:kv_cache_usage_perc",
  "vllm:prefix_cache_hits_total",
  "vllm:prefix_cache_queries_total",
  TTFT,
  ITL,
  TPOT,
  `${GATEWAY}queued_requests`,
  `${GATEWAY}requests_total`,
]);

/** One point of every chart for each model, and for all of them under "": from two scrapes that lie
 *  `seconds` apart. */
export function points(before, after, seconds) {
  const grown = byModel(increases(before, after));
  return Object.fromEntries([...byModel(after)].map(([model, now]) => [model, point(grown.get(model), now, seconds)]));
}

/** model -> name -> its samples. Each is read once: a fleet of a hundred models has ten thousand. */
function byModel(samples) {
  const found = new Map([["", new Map()]]);
  for (const sample of samples) {
    for (const model of new Set(["", sample.labels.model ?? ""])) {
      if (!found.has(model)) found.set(model, new Map());
      const named = found.get(model);
      if (!named.has(sample.name)) named.set(sample.name, []);
      named.get(sample.name).push(sample);
    }
  }
  return found;
}

/** `{ series: number }`, of the samples of a model by name. */
function point(grown, now, seconds) {
  const of = (samples, name) => samples.get(name) ?? [];
  const rate = (name) => sum(of(grown, name)) / seconds;
  const queries = sum(of(grown, "vllm:prefix_cache_queries_total"));
  const usages = of(now, "vllm:kv_cache_usage_perc").map((it) => it.value);
  const codes = {};
  for (const { labels, value } of of(grown, `${GATEWAY}requests_total`)) {
    codes[labels.code] = (codes[labels.code] ?? 0) + value / seconds;
  }
  return {
    generated: rate("vllm:generation_tokens_total"),
    prompt: rate("vllm:prompt_tokens_total"),
    ttft50: quantile(0.5, of(grown, TTFT)),
    ttft95: quantile(0.95, of(grown, TTFT)),
    itl50: quantile(0.5, of(grown, ITL)),
    itl95: quantile(0.95, of(grown, ITL)),
    tpot50: quantile(0.5, of(grown, TPOT)),
    tpot95: quantile(0.95, of(grown, TPOT)),
    running: sum(of(now, "vllm:num_requests_running")),
    queued: sum(of(now, `${GATEWAY}queued_requests`)),
    waiting: sum(of(now, "vllm:num_requests_waiting")),
    kv: usages.length ? Math.max(...usages) : null,
    hits: queries ? sum(of(grown, "vllm:prefix_cache_hits_total")) / queries : null,
    codes,
  };
}
